#include "reader_queue.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace dipnet {
namespace {

std::uint64_t total_bytes(const Read& read) {
  return std::accumulate(read.into.begin(), read.into.end(), std::uint64_t{0},
                         [](std::uint64_t sum, const iovec& part) { return sum + part.iov_len; });
}

bool aligned(const iovec& part) {
  return (reinterpret_cast<std::uintptr_t>(part.iov_base) | part.iov_len) % kSector == 0;
}

}  // namespace

int Job::rest_count() const {
  return static_cast<int>(std::min<std::size_t>(read.into.size() - next, IOV_MAX));
}

void Job::advance(std::uint64_t bytes) {
  position += bytes;
  left -= bytes;
  while (next < read.into.size() && bytes >= read.into[next].iov_len) {
    bytes -= read.into[next++].iov_len;
  }
  if (bytes == 0) return;
  iovec& part = read.into[next];
  part.iov_base = static_cast<char*>(part.iov_base) + bytes;
  part.iov_len -= bytes;
}

QueuedReader::QueuedReader(File file, std::size_t depth)
    : file_(std::move(file)), jobs_(depth), free_(depth) {
  std::iota(free_.begin(), free_.end(), std::size_t{0});
}

void QueuedReader::check(const Read& read) const {
  if (total_bytes(read) == 0) throw std::invalid_argument("a read must have bytes to read");
  if (!direct()) return;
  if (read.offset % kSector != 0 || !std::all_of(read.into.begin(), read.into.end(), aligned)) {
    throw std::invalid_argument("offset, addresses and lengths of a direct read must be multiples "
                                "of " + std::to_string(kSector));
  }
}

void QueuedReader::submit(std::vector<Read> reads) {
  for (const Read& read : reads) check(read);
  std::move(reads.begin(), reads.end(), std::back_inserter(queue_));
  feed();
}

void QueuedReader::feed() {
  bool started = false;
  while (!queue_.empty() && !free_.empty()) {
    if (in_flight() == 0) busy_since_ = Clock::now();
    const std::size_t job = free_.back();
    free_.pop_back();
    Read& read = queue_.front();
    const std::uint64_t offset = read.offset, total = total_bytes(read);
    jobs_[job] = {std::move(read), 0, offset, total, total};
    queue_.pop_front();
    start(job);
    started = true;
  }
  if (started) flush();
}

std::size_t QueuedReader::poll(std::vector<Done>& done) {
  const std::size_t before = done.size();
  if (in_flight() == 0) return 0;
  done_ = &done;
  reap(false);
  done_ = nullptr;
  feed();
  return done.size() - before;
}

std::size_t QueuedReader::wait(std::vector<Done>& done) {
  const std::size_t before = done.size();
  done_ = &done;
  while (in_flight() > 0 && done.size() == before) reap(true);  // a short read is not done
  done_ = nullptr;
  feed();
  return done.size() - before;
}

void QueuedReader::drain() {
  queue_.clear();
  while (in_flight() > 0) reap(true);
}

void QueuedReader::completed(std::size_t number, std::int64_t result) {
  Job& job = jobs_[number];
  const bool again = result == -EINTR || result == -EAGAIN;
  if (result < 0 && !again) return finish(number, static_cast<int>(-result));
  if (result == 0) return finish(number, ENODATA);
  if (result > 0) job.advance(static_cast<std::uint64_t>(result));
  if (job.left == 0) return finish(number, 0);
  // A direct read that stops within a sector has met the end of the file.
  if (direct() && job.position % kSector != 0) return finish(number, ENODATA);
  if (done_ == nullptr) return finish(number, ECANCELED);
  start(number);
  flush();
}

void QueuedReader::finish(std::size_t number, int error) {
  Job& job = jobs_[number];
  totals_.reads += error == 0;
  totals_.failed += error != 0;
  totals_.bytes += error == 0 ? job.total : 0;
  if (done_ != nullptr) done_->push_back({job.read.tag, error, job.total - job.left});
  free_.push_back(number);
  if (in_flight() == 0) {
    totals_.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since_).count();
  }
}

std::vector<std::uint64_t> QueuedReader::cancel_queued(
    const std::function<bool(std::uint64_t tag)>& wanted) {
  std::vector<std::uint64_t> tags;
  std::erase_if(queue_, [&](const Read& read) {
    const bool drop = wanted(read.tag);
    if (drop) tags.push_back(read.tag);
    return drop;
  });
  return tags;
}

ReaderTotals QueuedReader::totals() const {
  ReaderTotals totals = totals_;
  if (in_flight() > 0) {
    totals.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since_).count();
  }
  return totals;
}

}  // namespace dipnet
