// Which instruction sets this machine has, best first.
#include <cstring>

#include "cpu/kernels.h"

namespace dpofast::cpu {

namespace {

struct Available {
  const Table* list[5] = {};
  Available() {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) list[n++] = &kAvx512Bf16;
    if (avx512) list[n++] = &kAvx512;
    if (avx2) list[n++] = &kAvx2;
#elif defined(__aarch64__)
    list[n++] = &kNeon;
#endif
    list[n] = &kScalar;
  }
};

}  // namespace

const Table* const* tables() {
  static const Available available;
  return available.list;
}

const Table* find(const char* name) {
  for (const Table* const* t = tables(); *t; ++t)
    if (std::strcmp((*t)->name, name) == 0) return *t;
  return nullptr;
}

}  // namespace dpofast::cpu
