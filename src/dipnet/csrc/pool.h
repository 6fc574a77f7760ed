// Threads that wait for short tasks. Knows nothing of what they compute.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace dipnet {

// A fixed set of threads, the caller's among them, that share the tasks of one run at a time.
// Starting a run costs a few microseconds: idle threads spin a while before they sleep.
class Pool {
 public:
  explicit Pool(std::size_t threads);  // std::system_error when there are no more to be had
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  std::size_t threads() const { return workers_.size() + 1; }

  // Calls work(task) for every task in [0, tasks), in any order, and returns when all are done.
  // `work` must not throw. Only one thread may call run.
  template <typename Work>
  void run(std::size_t tasks, Work&& work) {
    if (tasks == 0) return;
    if (tasks == 1 || workers_.empty()) {
      for (std::size_t task = 0; task < tasks; ++task) work(task);
      return;
    }
    using Plain = std::remove_reference_t<Work>;
    start([](void* self, std::size_t task) { (*static_cast<Plain*>(self))(task); },
          const_cast<void*>(static_cast<const void*>(&work)), tasks);
  }

 private:
  using Call = void (*)(void*, std::size_t);

  void start(Call call, void* work, std::size_t tasks);
  bool take();
  void serve();
  void stop();

  // The run's number in the upper half, the next task in the lower one: a thread that comes late
  // cannot take a task of a run that it did not see.
  std::atomic<std::uint64_t> ticket_{0};
  std::atomic<std::uint32_t> tasks_{0}, done_{0}, epoch_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<void*> work_{nullptr};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace dipnet
