#include "cpu/parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace dpofast::cpu {
namespace {

// Spins briefly, since a step is often shorter than a wake-up, then sleeps, since cores may be shared.
class Barrier {
 public:
  void set_size(int n) { size_ = n; }

  template <class OnLast>
  void arrive(const OnLast& on_last) {
    const uint64_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      on_last();
      arrived_.store(0, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex_);
      phase_.store(phase + 1, std::memory_order_release);
      wake_.notify_all();
      return;
    }
    for (int i = 0; i < kSpins; ++i) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return phase_.load(std::memory_order_acquire) != phase; });
  }

 private:
  static constexpr int kSpins = 2000;  // about 20-50 microseconds: a futex round trip or two
  int size_ = 1;
  std::atomic<int> arrived_{0};
  std::atomic<uint64_t> phase_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace

void run_steps(int threads, const Steps& steps) {
  Barrier barrier;
  std::atomic<int64_t> next[2] = {{0}, {0}};  // the step in progress and the one after it
  auto work = [&](int thread) {
    for (int64_t s = 0; s < steps.n_steps; ++s) {
      const int64_t n = steps.n_tasks(steps.ctx, s);
      for (int64_t i; (i = next[s & 1].fetch_add(1, std::memory_order_relaxed)) < n;)
        steps.task(steps.ctx, s, i, thread);
      if (s + 1 < steps.n_steps) barrier.arrive([&] { next[s & 1].store(0, std::memory_order_relaxed); });
    }
  };

  int64_t widest = 1;
  for (int64_t s = 0; s < steps.n_steps; ++s) {
    const int64_t n = steps.n_tasks(steps.ctx, s);
    widest = n > widest ? n : widest;
  }
  if (threads > widest) threads = int(widest);

  // The barrier must know how many threads really started before any of them reaches it.
  std::vector<std::thread> team;
  std::mutex gate;
  {
    std::lock_guard<std::mutex> hold(gate);
    try {
      for (int t = 1; t < threads; ++t)
        team.emplace_back([&, t] {
          { std::lock_guard<std::mutex> wait(gate); }
          work(t);
        });
    } catch (const std::system_error&) {
      // The system refused another thread: go on with those that there are.
    }
    barrier.set_size(int(team.size()) + 1);
  }
  work(0);
  for (std::thread& t : team) t.join();
}

}  // namespace dpofast::cpu
