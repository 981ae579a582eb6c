// The words of CUDA that csrc/cuda uses, for a plain C++ compiler: the unmodified kernels run on the CPU.
//
// Every thread of a block is a fiber on one OS thread. Barriers and shuffles are real: a thread that waits gives way to
// the others, in an order drawn from `emu::seed`. A favoured warp runs ahead of the others until it has to wait for
// them, and blocks run one after another in any order: what only works because threads happen to keep pace goes
// wrong for some seed. Shared memory is an arena that starts as NaN (all ones) in every block, with red zones under
// AddressSanitizer. What CUDA leaves undefined and a GPU would do silently is an error here: an exited thread that
// others wait for, threads at different barriers, a shuffle in which part of a warp takes part.
//
// It shows wrong indices, masks, reductions, barriers and bounds. It says nothing about speed or the memory model.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emu {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kSharedBytes = 48 << 10;  // what a kernel may declare statically, on every GPU
constexpr size_t kRedZone = 64;
// Not a power of two: stacks whose tops differ by one share the same few sets of every cache.
constexpr size_t kStackBytes = (128 << 10) + 4096 + 192;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

}  // namespace emu

inline emu::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

inline uint64_t seed = 1;  // of the order of threads and blocks, for every launch from now on

[[noreturn]] inline void fail(const char* what, int line) {
  std::fprintf(stderr, "emulator: %s (line %d, block %u)\n", what, line, blockIdx.x);
  std::abort();
}

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  unsigned below(unsigned n) { return unsigned(((next() >> 32) * n) >> 32); }
  template <class T>
  void shuffle(T* x, unsigned n) {
    for (unsigned i = n; i > 1; --i) std::swap(x[i - 1], x[below(i)]);
  }
};

// Where a fiber, or the scheduler, goes on. A first entry is a ucontext; every later switch is a jump without a system
// call, and without the C library, which a jump to another stack might alarm.
struct Context {
  void* jump[5];
  bool entered = false;
  ucontext_t first;
  // For AddressSanitizer, which has to know the stack it is on.
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// Neither is instrumented: AddressSanitizer takes a call that never returns for the end of the whole stack.
[[gnu::noinline, gnu::no_sanitize("address")]] inline void enter(Context& to) {
  if (to.entered) __builtin_longjmp(to.jump, 1);
  to.entered = true;
  setcontext(&to.first);
  std::abort();
}

[[gnu::noinline, gnu::no_sanitize("address")]] inline void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  if (__builtin_setjmp(from.jump) == 0) enter(to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

enum class State : uint8_t { kReady, kAtShuffle, kAtBarrier, kDone };

struct Thread {
  State state = State::kDone;
  unsigned turn = 0;  // of the two slots, so that one wait a shuffle is enough
  int line = 0;       // where it waits
  uint64_t slot[2];   // what it gives to a shuffle
};

struct Array {
  int line;
  size_t bytes, offset;
};

// The one machine: a pool of fibers, and the block that runs now.
struct Machine {
  std::mutex one_launch;
  Thread threads[kMaxThreads];
  std::vector<Context> fibers;  // of those threads
  Context scheduler;
  unsigned running = 0;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  Random random{0};
  alignas(128) unsigned char arena[kSharedBytes];
  std::vector<Array> arrays;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void wait(State at, int line) {
  Machine& m = machine();
  Thread& t = m.threads[m.running];
  t.state = at;
  t.line = line;
  switch_to(m.fibers[m.running], m.scheduler);
}

inline void fiber() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler.stack, &m.scheduler.stack_bytes);
#endif
  for (;;) {  // one round is one thread of one block
    m.body(m.argument);
    wait(State::kDone, 0);
  }
}

inline void make_fibers(Machine& m) {
  m.fibers.resize(kMaxThreads);
  m.scheduler.entered = true;
  void* stacks =
      mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for stacks", __LINE__);
  for (int i = 0; i < kMaxThreads; ++i) {
    Context& c = m.fibers[size_t(i)];
    c.stack = static_cast<char*>(stacks) + size_t(i) * kStackBytes;
    c.stack_bytes = kStackBytes;
    getcontext(&c.first);
    c.first.uc_stack.ss_sp = const_cast<void*>(c.stack);
    c.first.uc_stack.ss_size = kStackBytes;
    c.first.uc_link = nullptr;
    makecontext(&c.first, fiber, 0);
  }
}

inline void poison_shared(Machine& m) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(m.arena, kSharedBytes);
#endif
  const size_t used = m.arrays.empty() ? kSharedBytes : m.arrays.back().offset + m.arrays.back().bytes;
  std::memset(m.arena, 0xff, used);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(m.arena, kSharedBytes);
#endif
  m.arrays.clear();
}

// The array that a __shared__ declaration in this line names: the same for every thread of the block.
template <class T>
T* shared(size_t count, int line) {
  static_assert(std::is_trivially_copyable<T>::value && alignof(T) <= 16, "shared memory is not constructed");
  Machine& m = machine();
  const size_t bytes = count * sizeof(T);
  for (const Array& a : m.arrays)
    if (a.line == line) {
      if (a.bytes != bytes) fail("two shared arrays are declared in lines of one number", line);
      return reinterpret_cast<T*>(m.arena + a.offset);
    }
  const size_t end = m.arrays.empty() ? 0 : m.arrays.back().offset + m.arrays.back().bytes;
  const size_t offset = (end + kRedZone + 15) / 16 * 16;
  if (offset + bytes + kRedZone > kSharedBytes) fail("more shared memory than a kernel may declare", line);
  m.arrays.push_back({line, bytes, offset});
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(m.arena + offset, bytes);
#endif
  return reinterpret_cast<T*>(m.arena + offset);
}

// Runs the ready threads of one warp, in the order of `lanes`, until each waits. True if there was one.
inline bool run_warp(Machine& m, unsigned first, const unsigned* lanes) {
  bool any = false;
  for (int i = 0; i < kWarp; ++i) {
    Thread& t = m.threads[first + lanes[i]];
    if (t.state != State::kReady) continue;
    any = true;
    m.running = threadIdx.x = first + lanes[i];
    switch_to(m.scheduler, m.fibers[m.running]);
  }
  return any;
}

// Lets `count` threads go on if all of them wait at the same point. A done thread is never waited for: an error.
inline bool release(Machine& m, unsigned first, unsigned count, State from) {
  Thread* const t = m.threads + first;
  const Thread* waits = nullptr;
  unsigned waiting = 0, done = 0;
  for (unsigned i = 0; i < count; ++i) {
    if (t[i].state == from) {
      if (waits && waits->line != t[i].line) fail("threads wait at different barriers or shuffles", t[i].line);
      waits = t + i;
      ++waiting;
    }
    done += t[i].state == State::kDone;
  }
  if (waiting && done) fail("threads wait for one that has exited", waits->line);
  if (waiting < count) return false;
  for (unsigned i = 0; i < count; ++i) t[i].state = State::kReady;
  return true;
}

inline void run_block(Machine& m, unsigned n) {
  unsigned warps[kMaxThreads / kWarp], lanes[kWarp];
  const unsigned n_warps = n / kWarp;
  for (unsigned i = 0; i < n_warps; ++i) warps[i] = i;
  for (unsigned i = 0; i < kWarp; ++i) lanes[i] = i;
  m.random.shuffle(warps, n_warps);
  m.random.shuffle(lanes, kWarp);
  for (unsigned i = 0; i < n; ++i) m.threads[i].state = State::kReady;
  for (;;) {
    // The first warp that can run does, and again: the last ones starve until all others wait for them.
    bool ran = false;
    for (unsigned w = 0; w < n_warps && !ran; ++w) {
      ran = run_warp(m, warps[w] * kWarp, lanes);
      if (ran) release(m, warps[w] * kWarp, kWarp, State::kAtShuffle);
    }
    if (!ran && !release(m, 0, n, State::kAtBarrier)) break;
    if (m.random.below(16) == 0) {
      m.random.shuffle(warps, n_warps);
      m.random.shuffle(lanes, kWarp);
    }
  }
  for (unsigned i = 0; i < n; ++i)
    if (m.threads[i].state != State::kDone) fail("threads wait for others that never come", m.threads[i].line);
}

template <class F>
void launch(unsigned blocks, unsigned threads, const F& body) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_launch);
  if (threads == 0 || threads > kMaxThreads || threads % kWarp != 0) fail("threads must be whole warps", __LINE__);
  if (m.fibers.empty()) make_fibers(m);
  m.body = [](const void* f) { (*static_cast<const F*>(f))(); };
  m.argument = &body;
  m.random = {seed};
  blockDim = {threads, 1, 1};
  gridDim = {blocks, 1, 1};
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  m.random.shuffle(order.data(), blocks);
  m.arrays.clear();
  for (unsigned block : order) {
    blockIdx.x = block;
    poison_shared(m);
    run_block(m, threads);
  }
}

template <class T>
T shuffle(unsigned mask, T x, unsigned from_lane, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "one register or two");
  if (mask != 0xffffffffu) fail("a shuffle of part of a warp is not emulated", line);
  Machine& m = machine();
  const unsigned me = m.running, first = me / kWarp * kWarp;
  const unsigned turn = m.threads[me].turn ^= 1;
  std::memcpy(&m.threads[me].slot[turn], &x, sizeof x);
  wait(State::kAtShuffle, line);
  std::memcpy(&x, &m.threads[first + from_lane % kWarp].slot[turn], sizeof x);
  return x;
}

inline unsigned lane() { return machine().running % kWarp; }

// A lane past the warp's end gets its own value.
inline unsigned lane_down(unsigned lanes) { return lane() + lanes < kWarp ? lane() + lanes : lane(); }

}  // namespace emu

#define __syncthreads() emu::wait(emu::State::kAtBarrier, __LINE__)
#define __syncwarp() ((void)emu::shuffle(0xffffffffu, 0, 0, __LINE__))
#define __shfl_sync(mask, x, from) emu::shuffle(mask, x, unsigned(from), __LINE__)
#define __shfl_xor_sync(mask, x, lanes) emu::shuffle(mask, x, emu::lane() ^ unsigned(lanes), __LINE__)
#define __shfl_down_sync(mask, x, lanes) emu::shuffle(mask, x, emu::lane_down(unsigned(lanes)), __LINE__)
