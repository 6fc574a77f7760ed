// A file opened for random reads past the page cache, or with as little of it as possible.
#pragma once

#include <cstdint>
#include <string>

namespace dipnet {

class File {
 public:
  // Throws std::system_error if path cannot be opened or is no regular file.
  explicit File(const std::string& path);
  File(File&& other) noexcept;
  File& operator=(File&&) = delete;
  ~File();

  int fd() const { return fd_; }
  bool direct() const { return direct_; }
  std::uint64_t bytes() const { return bytes_; }

  // Drops a range that was read from the page cache, where the reads went through it.
  void forget(std::uint64_t offset, std::uint64_t bytes) const;

 private:
  int fd_ = -1;
  bool direct_ = false;
  std::uint64_t bytes_ = 0;
};

}  // namespace dipnet
