// Asynchronous reads of one file. Knows no Python, no records and no cache.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace dipnet {

// Offsets, addresses and lengths are multiples of this where the reader is direct().
constexpr std::size_t kSector = 512;
constexpr std::size_t kDefaultDepth = 128;

// One contiguous range of the file, scattered over the destinations in their order. The
// destinations belong to the caller and must stay until the read is reported or cancelled.
struct Read {
  std::uint64_t offset = 0;
  std::vector<iovec> into;
  std::uint64_t tag = 0;  // the caller's own; need not be unique
};

// A finished read. Without error, bytes is all of it; with one, the destinations are undefined.
struct Done {
  std::uint64_t tag = 0;
  int error = 0;  // 0 or an errno; ENODATA: the file ends before the read does
  std::uint64_t bytes = 0;
};

struct ReaderTotals {
  std::uint64_t reads = 0;      // finished without error
  std::uint64_t bytes = 0;      // of those
  std::uint64_t failed = 0;     // finished with an error
  double busy_seconds = 0;      // while a read was in flight, from its start until it was reaped
};

// For one caller at a time: calls of one reader must not overlap, but may come from any thread.
class Reader {
 public:
  Reader() = default;
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  // Drops what is queued and waits for what is in flight: no destination is written after it.
  virtual ~Reader() = default;

  // Queues reads and never blocks. At most depth() are in flight; the others wait here and follow
  // as reads are reaped. A batch costs one system call, as does a single read.
  // Throws std::invalid_argument, and queues none, if a read is empty or is not aligned.
  virtual void submit(std::vector<Read> reads) = 0;
  void submit(Read read);

  // Appends what has finished to done, in any order, and feeds the queue; never blocks. Returns how
  // many it appended.
  virtual std::size_t poll(std::vector<Done>& done) = 0;

  // As poll, but blocks until at least one read has finished or none is outstanding.
  virtual std::size_t wait(std::vector<Done>& done) = 0;

  // Drops the reads not yet in flight whose tag the predicate wants; returns their tags. They are
  // never reported as done.
  virtual std::vector<std::uint64_t> cancel_queued(
      const std::function<bool(std::uint64_t tag)>& wanted) = 0;

  virtual std::size_t outstanding() const = 0;  // submitted, and neither reported nor cancelled
  virtual std::size_t depth() const = 0;        // how many are in flight at most
  virtual bool direct() const = 0;              // past the page cache (O_DIRECT)
  virtual std::uint64_t file_bytes() const = 0; // the file's size when it was opened
  virtual std::string_view backend() const = 0; // "io_uring" or "pread"
  virtual ReaderTotals totals() const = 0;
};

// Reader of a regular file. backend: "io_uring", "pread" or "auto", the first of them that works.
// O_DIRECT where the file system has it; elsewhere what was read is dropped from the page cache.
// "pread" has min(depth, 16) threads, and that is its depth().
// Throws std::system_error if the file cannot be opened or is no regular file, std::runtime_error
// (with the reason) if "io_uring" is asked for and cannot be had, std::invalid_argument for an
// unknown backend or depth 0.
std::unique_ptr<Reader> make_reader(const std::string& path, std::size_t depth = kDefaultDepth,
                                    std::string_view backend = "auto");

// For tests: reads that touch a byte of [start, end) finish with the error, unread.
struct Fault {
  std::uint64_t start = 0, end = 0;
  int error = 0;
};
std::unique_ptr<Reader> make_faulty(std::unique_ptr<Reader> reader, std::vector<Fault> faults);

// The backends that this build has, best first.
std::vector<std::string> reader_backends();

}  // namespace dipnet
