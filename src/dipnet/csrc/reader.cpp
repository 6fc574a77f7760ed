#include "reader.h"

#include <stdexcept>
#include <system_error>
#include <utility>

#include "reader_queue.h"

namespace dipnet {
namespace {

constexpr std::size_t kMostDepth = 4096;

#ifdef DIPNET_IO_URING
constexpr bool kHasUring = true;
#else
constexpr bool kHasUring = false;
#endif

}  // namespace

#ifndef DIPNET_IO_URING
std::unique_ptr<Reader> make_uring_reader(File, std::size_t) {
  throw std::runtime_error("backend 'io_uring' is not built: install liburing's headers (Debian: "
                           "liburing-dev), then dipnet again");
}
#endif

void Reader::submit(Read read) {
  std::vector<Read> reads;
  reads.push_back(std::move(read));
  submit(std::move(reads));
}

std::unique_ptr<Reader> make_reader(const std::string& path, std::size_t depth,
                                    std::string_view backend) {
  if (depth == 0 || depth > kMostDepth) {
    throw std::invalid_argument("depth must be in 1.." + std::to_string(kMostDepth));
  }
  if (backend != "auto" && backend != "io_uring" && backend != "pread") {
    throw std::invalid_argument("no backend '" + std::string(backend) +
                                "'; there are: auto, io_uring, pread");
  }
  if (backend == "io_uring" || (backend == "auto" && kHasUring)) {
    File file(path);  // its errors are not io_uring's
    try {
      return make_uring_reader(std::move(file), depth);
    } catch (const std::system_error& error) {  // an old kernel, or forbidden as in many containers
      if (backend != "auto") {
        throw std::runtime_error("backend 'io_uring' cannot be had: " + std::string(error.what()) +
                                 "; there is also: pread");
      }
    }
  }
  return make_pool_reader(File(path), depth);
}

std::vector<std::string> reader_backends() {
  if (kHasUring) return {"io_uring", "pread"};
  return {"pread"};
}

}  // namespace dipnet
