// The backend for every kernel: threads that block in preadv.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "reader_queue.h"

namespace dipnet {
namespace {

constexpr std::size_t kMostThreads = 16;

class PoolReader final : public QueuedReader {
 public:
  PoolReader(File file, std::size_t threads) : QueuedReader(std::move(file), threads) {
    for (std::size_t t = 0; t < threads; ++t) threads_.emplace_back([this] { work(); });
  }

  ~PoolReader() override {
    drain();
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    to_do_changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  std::string_view backend() const override { return "pread"; }

 protected:
  void start(std::size_t job) override { started_.push_back(job); }

  void flush() override {
    {
      const std::lock_guard lock(mutex_);
      to_do_.insert(to_do_.end(), started_.begin(), started_.end());
    }
    for (std::size_t i = 0; i < started_.size(); ++i) to_do_changed_.notify_one();
    started_.clear();
  }

  void reap(bool block) override {
    reaped_.clear();
    {
      std::unique_lock lock(mutex_);
      if (block) results_changed_.wait(lock, [this] { return !results_.empty(); });
      reaped_.swap(results_);
    }
    for (const auto& [job, result] : reaped_) completed(job, result);
  }

 private:
  struct Result {
    std::size_t job;
    std::int64_t result;
  };

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      to_do_changed_.wait(lock, [this] { return stop_ || !to_do_.empty(); });
      if (to_do_.empty()) return;
      const std::size_t job = to_do_.front();
      to_do_.pop_front();
      lock.unlock();
      const std::int64_t result = read_once(jobs_[job]);
      lock.lock();
      results_.push_back({job, result});
      results_changed_.notify_one();
    }
  }

  std::int64_t read_once(Job& job) const {
    const ssize_t got = ::preadv(file_.fd(), job.rest(), job.rest_count(),
                                 static_cast<off_t>(job.position));
    if (got < 0) return -errno;
    file_.forget(job.position, static_cast<std::uint64_t>(got));
    return got;
  }

  std::vector<std::size_t> started_;  // by the caller, until flush()
  std::vector<Result> reaped_;

  std::mutex mutex_;  // of what follows
  std::condition_variable to_do_changed_, results_changed_;
  std::deque<std::size_t> to_do_;
  std::vector<Result> results_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Reader> make_pool_reader(File file, std::size_t depth) {
  return std::make_unique<PoolReader>(std::move(file), std::min(depth, kMostThreads));
}

}  // namespace dipnet
