// What the backends of Reader share: the queue, the resuming of short reads, the totals.
#pragma once

#include <chrono>
#include <deque>

#include "reader.h"
#include "reader_file.h"

namespace dipnet {

// A read in flight: what is left of it.
struct Job {
  Read read;
  std::size_t next = 0;        // the first of read.into that is not full; it is cut as it fills
  std::uint64_t position = 0;  // in the file
  std::uint64_t left = 0;      // bytes
  std::uint64_t total = 0;

  iovec* rest() { return read.into.data() + next; }
  int rest_count() const;  // of the destinations left, as many as one system call takes
  void advance(std::uint64_t bytes);
};

// A backend calls drain() in its destructor, while its own functions can still be called.
class QueuedReader : public Reader {
 public:
  using Reader::submit;
  void submit(std::vector<Read> reads) final;
  std::size_t poll(std::vector<Done>& done) final;
  std::size_t wait(std::vector<Done>& done) final;
  std::vector<std::uint64_t> cancel_queued(
      const std::function<bool(std::uint64_t tag)>& wanted) final;
  std::size_t outstanding() const final { return queue_.size() + in_flight(); }
  std::size_t depth() const final { return jobs_.size(); }
  bool direct() const final { return file_.direct(); }
  std::uint64_t file_bytes() const final { return file_.bytes(); }
  ReaderTotals totals() const final;

 protected:
  using Clock = std::chrono::steady_clock;

  QueuedReader(File file, std::size_t depth);

  // Hands the rest of a job to the kernel, at the latest when flush() is called.
  virtual void start(std::size_t job) = 0;
  virtual void flush() = 0;
  // Calls completed() for every job that is; with block, for at least one. Some are in flight.
  virtual void reap(bool block) = 0;

  // result: bytes read, or minus an errno.
  void completed(std::size_t job, std::int64_t result);
  void drain();

  const File file_;
  std::vector<Job> jobs_;  // by number; never resized

 private:
  std::size_t in_flight() const { return jobs_.size() - free_.size(); }
  void check(const Read& read) const;
  void feed();
  void finish(std::size_t job, int error);

  std::vector<std::size_t> free_;  // numbers of the jobs that are not in flight
  std::deque<Read> queue_;
  std::vector<Done>* done_ = nullptr;  // the caller's, while reaping; none while draining
  ReaderTotals totals_;
  Clock::time_point busy_since_;
};

std::unique_ptr<Reader> make_pool_reader(File file, std::size_t depth);

// Throws std::system_error if the kernel has no io_uring or forbids it.
std::unique_ptr<Reader> make_uring_reader(File file, std::size_t depth);

}  // namespace dipnet
