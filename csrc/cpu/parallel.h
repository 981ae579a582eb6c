// A team of threads for one kernel call: steps of dynamically shared tasks with a barrier between steps.
//
// Results never depend on the number of threads, because a task's work does not depend on who runs it.
// The threads are OpenMP's, where PyTorch has loaded one, and otherwise new ones that live for the call, as in a forked
// child: there is no pool of ours to survive a fork, to oversubscribe, or to tear down.
// Out of line and free of templates, so that no instruction set leaks into code shared by all.
#pragma once
#include <cstdint>

namespace dpofast::cpu {

struct Steps {
  int64_t n_steps;
  int64_t (*n_tasks)(const void* ctx, int64_t step);
  void (*task)(const void* ctx, int64_t step, int64_t task, int thread);
  const void* ctx;
};

void run_steps(int threads, const Steps& steps);

// run_steps for callables: n_tasks(step) -> int64_t and task(step, index, thread).
template <class Count, class Task>
inline void for_steps(int threads, int64_t n_steps, const Count& n_tasks, const Task& task) {
  struct Ctx {
    const Count* n_tasks;
    const Task* task;
  } ctx{&n_tasks, &task};
  run_steps(threads, {n_steps, [](const void* c, int64_t s) { return (*static_cast<const Ctx*>(c)->n_tasks)(s); },
                      [](const void* c, int64_t s, int64_t i, int t) { (*static_cast<const Ctx*>(c)->task)(s, i, t); }, &ctx});
}

template <class Task>
inline void for_tasks(int threads, int64_t n_tasks, const Task& task) {
  for_steps(threads, 1, [&](int64_t) { return n_tasks; }, [&](int64_t, int64_t i, int t) { task(i, t); });
}

}  // namespace dpofast::cpu
