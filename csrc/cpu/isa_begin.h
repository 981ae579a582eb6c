// Everything an instruction set's file needs before its target region opens: the standard headers and
// the shared, baseline parts. Included first, so that none of it is compiled for the wider target.
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "core/float16.h"
#include "cpu/finish.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // both: GCC 12's own AVX-512 headers, PR 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// Unrolls a whole loop over registers: none has more than 16 rounds.
#if defined(__clang__)
#define DPOFAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define DPOFAST_UNROLL _Pragma("GCC unroll 16")
#endif
#define DPOFAST_NOINLINE __attribute__((noinline))
// What follows in the file is the region; the headers that belong there ask for it.
#define DPOFAST_ISA_REGION
