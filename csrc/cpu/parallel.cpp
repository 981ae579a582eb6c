// The team of threads of parallel.h: OpenMP's, found at run time, or new ones; barriers; the counter of tasks.
#include "cpu/parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace dpofast::cpu {
namespace {

// The OpenMP that PyTorch brought along, found at run time: nothing here is compiled for OpenMP or linked with it. Its
// threads wait in a loop for some milliseconds after each of PyTorch's operations, where they would keep a thread of
// our own from its core; so they do our work, too. LLVM's and Intel's OpenMP have GNU's entry under the same name.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*team_size)() = nullptr;
  int (*thread)() = nullptr;

  explicit operator bool() const { return parallel && team_size && thread; }
};

std::atomic<bool> is_forked{false};  // a forked child has its parent's OpenMP, but none of its threads

OpenMp find_openmp() {
  OpenMp found;
#if defined(__unix__) || defined(__APPLE__)
  const auto find = [](auto& entry, const char* name) {
    entry = reinterpret_cast<std::decay_t<decltype(entry)>>(dlsym(RTLD_DEFAULT, name));
  };
  find(found.parallel, "GOMP_parallel");
  find(found.team_size, "omp_get_num_threads");
  find(found.thread, "omp_get_thread_num");
  pthread_atfork(nullptr, nullptr, [] { is_forked.store(true); });
#endif
  return found;
}

// Spins briefly, since a step is often shorter than a wake-up, then sleeps, since cores may be shared.
class Barrier {
 public:
  template <class OnLast>
  void arrive(int team_size, const OnLast& on_last) {
    const uint64_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team_size) {
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
  std::atomic<int> arrived_{0};
  std::atomic<uint64_t> phase_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Runs work(thread, team_size) on at most so many threads; how many there are is known before any of them starts.
template <class Work>
void run_on_new_threads(int threads, const Work& work) {
  std::vector<std::thread> team;
  std::mutex gate;
  int team_size = 1;
  {
    std::lock_guard<std::mutex> hold(gate);
    try {
      for (int t = 1; t < threads; ++t)
        team.emplace_back([&, t] {
          { std::lock_guard<std::mutex> wait(gate); }
          work(t, team_size);
        });
    } catch (const std::system_error&) {
      // The system refused another thread: go on with those that there are.
    }
    team_size = int(team.size()) + 1;
  }
  work(0, team_size);
  for (std::thread& t : team) t.join();
}

template <class Work>
void run_on_threads(int threads, const Work& work) {
  static const OpenMp openmp = find_openmp();
  if (threads == 1) return work(0, 1);
  if (!openmp || is_forked.load()) return run_on_new_threads(threads, work);
  const auto run = [](void* data) { (*static_cast<const Work*>(data))(openmp.thread(), openmp.team_size()); };
  openmp.parallel(run, const_cast<Work*>(&work), unsigned(threads), 0);
}

}  // namespace

void run_steps(int threads, const Steps& steps) {
  int64_t widest = 1;
  for (int64_t s = 0; s < steps.n_steps; ++s) {
    const int64_t n = steps.n_tasks(steps.ctx, s);
    widest = n > widest ? n : widest;
  }
  if (threads > widest) threads = int(widest);

  Barrier barrier;
  std::atomic<int64_t> next[2] = {{0}, {0}};  // the step in progress and the one after it
  run_on_threads(threads, [&](int thread, int team_size) {
    for (int64_t s = 0; s < steps.n_steps; ++s) {
      const int64_t n = steps.n_tasks(steps.ctx, s);
      for (int64_t i; (i = next[s & 1].fetch_add(1, std::memory_order_relaxed)) < n;) steps.task(steps.ctx, s, i, thread);
      if (s + 1 < steps.n_steps) barrier.arrive(team_size, [&] { next[s & 1].store(0, std::memory_order_relaxed); });
    }
  });
}

}  // namespace dpofast::cpu
