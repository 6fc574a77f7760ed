#include "reader_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "reader.h"

namespace dipnet {
namespace {

[[noreturn]] void fail(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

// Before it is opened: opening a pipe would block.
std::uint64_t regular_bytes(const std::string& path) {
  struct stat found;
  if (::stat(path.c_str(), &found) != 0) fail(errno, "cannot open " + path);
  if (S_ISDIR(found.st_mode)) fail(EISDIR, "cannot read " + path);
  if (!S_ISREG(found.st_mode)) fail(EINVAL, path + " is no regular file");
  return static_cast<std::uint64_t>(found.st_size);
}

// Whether direct reads of single sectors work: some file systems accept the flag and then refuse
// every read, and disks with larger sectors refuse what is aligned to ours only.
bool serves_sectors(int fd, std::uint64_t bytes) {
  alignas(2 * kSector) unsigned char room[2 * kSector];
  const std::uint64_t offset = bytes >= 2 * kSector ? kSector : 0;
  const ssize_t got = ::pread(fd, room + kSector, kSector, static_cast<off_t>(offset));
  return got >= 0 || errno != EINVAL;
}

}  // namespace

File::File(const std::string& path) : bytes_(regular_bytes(path)) {
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  direct_ = fd_ >= 0 && serves_sectors(fd_, bytes_);
  if (direct_) return;
  if (fd_ >= 0) ::close(fd_);
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd_ < 0) fail(errno, "cannot open " + path);
  ::posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);  // no read-ahead: neighbours are not wanted
}

File::File(File&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), direct_(other.direct_), bytes_(other.bytes_) {}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

void File::forget(std::uint64_t offset, std::uint64_t bytes) const {
  if (direct_) return;
  // Outwards to whole pages: the kernel keeps those that a range covers in part.
  static const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t start = offset / page * page;
  const std::uint64_t end = (offset + bytes + page - 1) / page * page;
  ::posix_fadvise(fd_, static_cast<off_t>(start), static_cast<off_t>(end - start),
                  POSIX_FADV_DONTNEED);
}

}  // namespace dipnet
