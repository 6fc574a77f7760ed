#include "pool.h"

#include <chrono>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dipnet {
namespace {

constexpr std::uint64_t kTaskBits = 32;
constexpr std::uint64_t kClosed = std::numeric_limits<std::uint32_t>::max();
// Longer than what torch does between two of our calls: a thread that sleeps is woken some 200 times a
// token, and on a virtual machine a processor that sleeps may be given away.
constexpr auto kAwake = std::chrono::milliseconds(3);
constexpr int kSpins = 256;  // between two looks at the clock

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

Pool::Pool(std::size_t threads) {
  try {
    for (std::size_t i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
  } catch (...) {  // the system has no more threads to give: those that run are to end
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stopping_ = true;
  ++epoch_;
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::start(Call call, void* work, std::size_t tasks) {
  const std::uint64_t run = (ticket_.load() >> kTaskBits) + 1;
  ticket_ = (run << kTaskBits) | kClosed;  // nobody takes a task while the run is described
  call_ = call;
  work_ = work;
  tasks_ = static_cast<std::uint32_t>(tasks);
  done_ = 0;
  ticket_ = run << kTaskBits;
  ++epoch_;
  epoch_.notify_all();
  while (take()) {}
  while (done_.load(std::memory_order_acquire) < tasks) pause();
}

// Does one task of the current run, if there is one left.
bool Pool::take() {
  std::uint64_t seen = ticket_.load();
  while (true) {
    const std::uint64_t task = seen & kClosed;
    if (task >= tasks_.load()) return false;
    if (ticket_.compare_exchange_weak(seen, seen + 1)) {
      call_.load()(work_.load(), task);
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
  }
}

void Pool::serve() {
  std::uint32_t seen = epoch_.load();
  while (!stopping_) {  // asked first: a pool may be gone before its threads have begun
    while (take()) {}
    const auto until = std::chrono::steady_clock::now() + kAwake;
    const auto idle = [&] { return epoch_.load(std::memory_order_relaxed) == seen; };
    while (idle() && std::chrono::steady_clock::now() < until) {
      for (int spin = 0; spin < kSpins && idle(); ++spin) pause();
      std::this_thread::yield();  // to threads that read the disk, or whoever has work to do
    }
    epoch_.wait(seen);
    seen = epoch_.load();
  }
}

}  // namespace dipnet
