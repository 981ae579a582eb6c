// Launches a kernel on a stream, and turns a failure into an exception that names the kernel and its shape.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device.h"

#if !defined(DPOFAST_EMULATE)
#include <cuda_runtime.h>
#endif

namespace dpofast::cuda {

// Rows are strided over, so that a grid never passes its limit of 2^31 - 1 blocks.
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

inline unsigned blocks_for(int64_t jobs) { return unsigned(jobs < kMaxBlocks ? jobs : kMaxBlocks); }

template <class... P, class... A>
void launch(const char* name, int64_t n, int64_t width, void* stream, void (*kernel)(P...), int64_t blocks, A... args) {
  if (blocks == 0) return;
#if defined(DPOFAST_EMULATE)
  (void)name, (void)n, (void)width, (void)stream;
  emu::launch(blocks_for(blocks), kThreads, [&] { kernel(args...); });
#else
  kernel<<<blocks_for(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error("dpofast: CUDA kernel " + std::string(name) + " on " + std::to_string(n) + " rows of " +
                             std::to_string(width) + ", or a kernel before it: " + cudaGetErrorString(error));
#endif
}

}  // namespace dpofast::cuda
