// The emulator's own tests, and the CUDA kernels' on it, under AddressSanitizer and UBSan.
//
//   test_emu kernels        every launcher against a naive computation in double, for several orders of threads;
//                           the last line is "ok" if all agree
//   test_emu planted NAME   a kernel with a planted error: the process must die, or print "caught" as its last line
//
// Buffers are exactly as long as the kernels may read, rows start anywhere, and what was not written yet is NaN.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/float16.h"
#include "cuda/kernels.h"
#include "cuda/logprob_finish.cuh"
#include "cuda/logprob_fold.cuh"
#include "cuda/logprob_grad.cuh"

using namespace dpofast;
using namespace dpofast::cuda;

namespace {

constexpr uint64_t kSeeds = 5;
const double kInf = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();

emu::Random random_numbers{1};
double uniform() { return double(int64_t(random_numbers.next() >> 11)) / double(int64_t(1) << 52) - 1; }  // in (-1, 1)

// ---- Planted errors.

// Reverses 128 numbers in shared memory; without a barrier a thread may read before another wrote.
template <bool kBarrier>
void reverse(const float* in, float* out) {
  DPOFAST_SHARED(float, s, 128);
  s[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = s[127 - threadIdx.x];
}

// Sums a row's 64 numbers, for 8 rows in turn; without the second barrier a fast warp writes over what a slow one has
// yet to read.
template <bool kBarrier>
void sum_rows(const float* in, float* out) {
  DPOFAST_SHARED(float, s, 64);
  for (int row = 0; row < 8; ++row) {
    s[threadIdx.x] = in[row * 64 + int(threadIdx.x)];
    __syncthreads();
    if (threadIdx.x == 0) {
      out[row] = 0;
      for (int i = 0; i < 64; ++i) out[row] += s[i];
    }
    if (kBarrier) __syncthreads();
  }
}

// How many of the first seeds give a wrong result.
template <class Run>
int wrong_seeds(const Run& run, const std::vector<float>& want) {
  int wrong = 0;
  for (emu::seed = 1; emu::seed <= 10; ++emu::seed) {
    std::vector<float> out(want.size(), 0);
    run(out.data());
    wrong += out != want;
  }
  return wrong;
}

bool race_is_caught() {
  std::vector<float> in(512), reversed(128), sums(8, 0);
  for (int i = 0; i < 512; ++i) in[size_t(i)] = float(i + 1);
  for (int i = 0; i < 128; ++i) reversed[size_t(i)] = in[size_t(127 - i)];
  for (int i = 0; i < 512; ++i) sums[size_t(i / 64)] += in[size_t(i)];
  auto run = [&](void (*kernel)(const float*, float*), unsigned threads) {
    return [&in, kernel, threads](float* out) { emu::launch(1, threads, [&] { kernel(in.data(), out); }); };
  };
  const int wrong[4] = {wrong_seeds(run(&reverse<true>, 128), reversed), wrong_seeds(run(&reverse<false>, 128), reversed),
                        wrong_seeds(run(&sum_rows<true>, 64), sums), wrong_seeds(run(&sum_rows<false>, 64), sums)};
  std::printf("wrong seeds of 10: reverse %d, without its barrier %d; sum_rows %d, without its second barrier %d\n", wrong[0],
              wrong[1], wrong[2], wrong[3]);
  return wrong[0] == 0 && wrong[1] > 0 && wrong[2] == 0 && wrong[3] > 0;
}

bool planted(const std::string& name) {
  const std::unique_ptr<float[]> data(new float[64]());
  float* const x = data.get();
  if (name == "race") return race_is_caught();
  if (name == "uninitialised") {
    emu::launch(1, 64, [&] {
      DPOFAST_SHARED(float, s, 64);
      x[threadIdx.x] = s[threadIdx.x];
    });
    bool caught = true;
    for (int i = 0; i < 64; ++i) caught = caught && std::isnan(x[i]);
    return caught;
  }
  if (name == "left by another block") {  // whichever block runs second
    float got[2] = {0, 0};
    emu::launch(2, 32, [&] {
      DPOFAST_SHARED(float, s, 32);
      if (threadIdx.x == 0) got[blockIdx.x] = s[0];
      s[threadIdx.x] = 1;
    });
    return std::isnan(got[0]) && std::isnan(got[1]);
  }
  if (name == "exit before a barrier")
    emu::launch(1, 64, [&] {
      if (threadIdx.x == 40) return;
      __syncthreads();
    });
  if (name == "exit before a shuffle")
    emu::launch(1, 64, [&] {
      if (threadIdx.x == 40) return;
      x[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
    });
  if (name == "two barriers")
    emu::launch(1, 64, [&] {
      if (threadIdx.x < 32) __syncthreads();
      else __syncthreads();
    });
  if (name == "a barrier and a shuffle")
    emu::launch(1, 64, [&] {
      if (threadIdx.x == 0) __syncthreads();
      else x[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
    });
  if (name == "part of a warp") emu::launch(1, 32, [&] { x[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); });
  if (name == "out of bounds") emu::launch(1, 96, [&] { x[threadIdx.x] += 1; });
  if (name == "out of shared bounds")
    emu::launch(1, 64, [&] {
      DPOFAST_SHARED(float, s, 63);
      s[threadIdx.x] = 1;
    });
  if (name == "too much shared memory")
    emu::launch(1, 32, [&] {
      DPOFAST_SHARED(double, s, 6144);
      s[0] = 1;
    });
  if (name == "misaligned")
    emu::launch(1, 32, [&] {
      struct alignas(16) Vec {
        float x[4];
      };
      x[threadIdx.x] = reinterpret_cast<const Vec*>(x + 1)->x[0];
    });
  return false;
}

// What shuffles return, for every lane and distance.
int wrong_shuffles() {
  int wrong = 0;
  emu::launch(2, 64, [&] {
    const int lane = int(threadIdx.x % 32), base = int(threadIdx.x) - lane;
    for (int d = 1; d < 32; ++d) {
      wrong += __shfl_xor_sync(kAll, double(threadIdx.x), d) != base + (lane ^ d);
      wrong += __shfl_down_sync(kAll, int(threadIdx.x), d) != base + (lane + d < 32 ? lane + d : lane);
      wrong += __shfl_sync(kAll, float(threadIdx.x), d) != float(base + d);
      __syncwarp();
    }
  });
  return wrong;
}

// ---- The kernels.

// Exactly `bytes` bytes on the heap, all ones: NaN in every floating-point type.
struct Buffer {
  std::unique_ptr<char[]> data;
  explicit Buffer(int64_t bytes) : data(new char[size_t(bytes)]) { std::memset(data.get(), 0xff, size_t(bytes)); }
};

double get(DType t, const void* p, int64_t i) {
  switch (t) {
    case DType::f32: return double(static_cast<const float*>(p)[i]);
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::bf16: return double(bf16_to_float(static_cast<const uint16_t*>(p)[i]));
    case DType::f16: return double(f16_to_float(static_cast<const uint16_t*>(p)[i]));
  }
  return kNaN;
}

void set(DType t, void* p, int64_t i, double x) {
  switch (t) {
    case DType::f32: static_cast<float*>(p)[i] = float(x); break;
    case DType::f64: static_cast<double*>(p)[i] = x; break;
    case DType::bf16: static_cast<uint16_t*>(p)[i] = float_to_bf16(float(x)); break;
    case DType::f16: static_cast<uint16_t*>(p)[i] = float_to_f16(float(x)); break;
  }
}

// [n] of one dtype.
struct Vector {
  DType dtype;
  int64_t n;
  Buffer buffer;
  Vector(DType t, int64_t n, double fill = kNaN) : dtype(t), n(n), buffer(n * int64_t(size_of(t))) {
    if (!std::isnan(fill))
      for (int64_t i = 0; i < n; ++i) put(i, fill);
  }
  void* data(int64_t i = 0) { return buffer.data.get() + i * int64_t(size_of(dtype)); }
  double operator[](int64_t i) { return get(dtype, data(), i); }
  void put(int64_t i, double x) { set(dtype, data(), i, x); }
};

// Rows [n, width] of one dtype, `ld` apart, the first `offset` elements into its buffer, the last at its end. As
// `row_offsets` the rows lie in the opposite order.
struct Rows {
  Vector all;
  int64_t n, width, ld, offset;
  std::vector<int64_t> starts;
  Rows(DType t, int64_t n, int64_t width, int64_t ld, int64_t offset)
      : all(t, offset + (n - 1) * ld + width), n(n), width(width), ld(ld), offset(offset) {
    for (int64_t i = 0; i < n; ++i) starts.push_back((n - 1 - i) * ld);
  }
  int64_t at(bool scattered, int64_t row, int64_t v) const { return offset + (scattered ? starts[size_t(row)] : row * ld) + v; }
};

enum class Special { none, first_minus_inf, all_minus_inf, plus_inf, nan, label_minus_inf, label_nan, bad_label };

struct Case {
  int64_t n, v, tile;  // the vocabulary goes past in tiles of `tile` columns
  DType x, out;
  int64_t ld_more = 0, offset = 0;
  bool scattered = false, bias = false, outputs = true, entropy = false;
  double temperature = 1, scale = 1, softcap = 0;
  int64_t split_width = 0;          // 0: rows are not split
  Special special = Special::none;  // of row 1
};

std::string describe(const Case& c) {
  char text[300];
  std::snprintf(text, sizeof text,
                "n %d v %d tile %d dtypes %d %d ld +%d offset %d scattered %d bias %d outputs %d entropy %d softcap %g "
                "split_width %d special %d seed %d",
                int(c.n), int(c.v), int(c.tile), int(c.x), int(c.out), int(c.ld_more), int(c.offset), c.scattered, c.bias,
                c.outputs, c.entropy, c.softcap, int(c.split_width), int(c.special), int(emu::seed));
  return text;
}

int failures = 0;

void expect(double got, double want, double tolerance, const char* what, int64_t row, int64_t v, const Case& c) {
  const bool same = std::isnan(want) ? std::isnan(got) : std::isinf(want) ? got == want : std::fabs(got - want) <= tolerance;
  if (same || ++failures > 20) return;
  std::printf("%s [%d, %d]: got %.9g, expected %.9g (%s)\n", what, int(row), int(v), got, want, describe(c).c_str());
}

// One row from its logits x, in double: every result, p, and d/dx for incoming gradients c and e.
struct Naive {
  std::vector<double> z, slope, p, grad;
  double logp, lse, z_max, entropy = 0, sum_sq = 0, mean = 0;
  bool is_top1;

  Naive(const std::vector<double>& x, int64_t y, const Case& k, double c, double e) {
    const size_t v = x.size();
    double sum = 0;
    size_t first = 0;
    z_max = -kInf;
    for (size_t i = 0; i < v; ++i) {
      const double u = k.softcap != 0 ? std::tanh(k.scale * x[i] / k.softcap) : 0;
      z.push_back((k.softcap != 0 ? k.softcap * u : k.scale * x[i]) / k.temperature);
      slope.push_back(k.scale / k.temperature * (1 - u * u));
      if (z[i] > z_max) z_max = z[i], first = i;
      mean += z[i] / double(v);
    }
    for (double a : z) sum += std::exp(a - z_max);
    const bool valid = y >= 0 && y < int64_t(v);
    const double bad = valid ? 0 : kNaN;
    lse = z_max + std::log(sum) + bad;
    logp = valid ? z[size_t(y)] - lse : kNaN;
    is_top1 = valid && int64_t(first) == y;
    mean += bad;
    for (double a : z) {
      p.push_back(std::exp(a - lse));
      entropy -= p.back() == 0 ? 0 : p.back() * (a - lse);
      sum_sq += p.back() * p.back();
    }
    for (size_t i = 0; i < v; ++i) {
      const double g = c * (double(int64_t(i) == y) - p[i]) - (p[i] == 0 ? 0 : e * p[i] * (z[i] - lse + entropy));
      grad.push_back(slope[i] * g);
    }
  }
};

// Folds, finishes and differentiates one problem, and compares everything.
void check(const Case& c) {
  const DType acc = c.x == DType::f64 ? DType::f64 : DType::f32;
  const double eps = acc == DType::f64 ? 1e-12 : 2e-5;
  const int64_t n = c.n, v = c.v;
  Rows x(c.x, n, v, v + c.ld_more, c.offset), out(c.out, n, v, v + c.ld_more + 1, c.offset);
  Vector bias(acc, v), grad_logps(acc, n), grad_entropy(acc, n);
  std::vector<int64_t> labels(static_cast<size_t>(n));
  for (int64_t i = 0; i < v; ++i) bias.put(i, uniform());
  for (int64_t row = 0; row < n; ++row) {
    grad_logps.put(row, uniform());
    grad_entropy.put(row, c.entropy ? uniform() : 0);
    // first and last of the vocabulary, the edges of the first tile, and anything
    const int64_t edges[] = {0, v - 1, c.tile - 1, c.tile % v, int64_t(random_numbers.below(unsigned(v)))};
    labels[size_t(row)] = row < 5 ? edges[row] : edges[4];
    for (int64_t i = 0; i < v; ++i) x.all.put(x.at(c.scattered, row, i), 4 * uniform());
  }
  if (c.special != Special::none && n > 1) {
    auto spoil = [&](int64_t i, double value) { x.all.put(x.at(c.scattered, 1, i), value); };
    if (c.special == Special::first_minus_inf) spoil(0, -kInf);
    if (c.special == Special::plus_inf) spoil(v / 2, kInf);
    if (c.special == Special::nan) spoil(v / 2, kNaN);
    if (c.special == Special::label_minus_inf) spoil(labels[1], -kInf);
    if (c.special == Special::label_nan) spoil(labels[1], kNaN);
    if (c.special == Special::all_minus_inf)
      for (int64_t i = 0; i < v; ++i) spoil(i, -kInf);
    if (c.special == Special::bad_label) labels[1] = v, labels[0] = -1;
  }
  std::vector<Naive> want;
  for (int64_t row = 0; row < n; ++row) {
    std::vector<double> logits;
    for (int64_t i = 0; i < v; ++i) logits.push_back(x.all[x.at(c.scattered, row, i)] + (c.bias ? bias[i] : 0));
    want.emplace_back(logits, labels[size_t(row)], c, grad_logps[row], grad_entropy[row]);
  }

  Vector stats(acc, kStats * n, 0);
  for (int64_t row = 0; row < n; ++row)
    for (int column : {kM, kTopBefore, kZLabel}) stats.put(column * n + row, -kInf);
  for (int64_t v0 = 0; v0 < v; v0 += c.tile) {
    FoldArgs a{};
    a.x = x.all.data(c.offset + v0);
    a.row_offsets = c.scattered ? x.starts.data() : nullptr;
    a.ld = x.ld, a.n = n, a.width = std::min(c.tile, v - v0), a.v0 = v0;
    a.bias = c.bias ? bias.data(v0) : nullptr;
    a.labels = labels.data();
    a.temperature = c.temperature, a.logit_scale = c.scale, a.softcap = c.softcap;
    a.outputs = c.outputs ? 15 : 0;
    a.stats = stats.data();
    a.split_width = c.split_width ? c.split_width : a.width;
    a.splits = ceil_div(a.width, a.split_width);
    Vector partials(acc, a.splits * kStats * n);
    a.partials = partials.data();
    launch_logprob_fold(c.x, a, nullptr);
  }

  Vector logps(acc, n), lse(acc, 2 * n), entropy(acc, n), sum_sq(acc, n), mean(acc, n);
  std::vector<uint8_t> is_top1(size_t(n), 7);
  FinishArgs f{};
  f.stats = stats.data(), f.labels = labels.data(), f.n = n, f.v = v;
  f.logps = logps.data(), f.lse = lse.data();
  if (c.outputs) {
    f.of(kEntropy) = entropy.data(), f.of(kLogSumSqProbs) = sum_sq.data(), f.of(kMeanLogits) = mean.data();
    f.of(kIsTop1) = is_top1.data();
  }
  launch_logprob_finish(acc, f, nullptr);
  for (int64_t row = 0; row < n; ++row) {
    const Naive& w = want[size_t(row)];
    expect(logps[row], w.logp, eps * 10, "logps", row, 0, c);
    expect(lse[2 * row] + lse[2 * row + 1], w.lse, eps * 10, "lse", row, 0, c);
    if (!c.outputs) continue;
    expect(entropy[row], w.entropy, eps * 10, "entropy", row, 0, c);
    expect(sum_sq[row], std::log(w.sum_sq), eps * 10, "log_sum_sq_probs", row, 0, c);
    expect(mean[row], w.mean, eps * 10, "mean_logits", row, 0, c);
    if (std::isfinite(w.lse) || c.special == Special::bad_label)
      expect(is_top1[size_t(row)], w.is_top1, 0, "is_top1", row, 0, c);
  }

  const double round = c.out == DType::bf16 ? 1 / 256.0 : c.out == DType::f16 ? 1 / 2048.0 : 0;
  for (int64_t v0 = 0; v0 < v; v0 += c.tile) {
    GradArgs a{};
    a.x = x.all.data(c.offset + v0);
    a.row_offsets = c.scattered ? x.starts.data() : nullptr;
    a.ld = x.ld, a.n = n, a.width = std::min(c.tile, v - v0), a.v0 = v0;
    a.bias = c.bias ? bias.data(v0) : nullptr;
    a.labels = labels.data();
    a.temperature = c.temperature, a.logit_scale = c.scale, a.softcap = c.softcap;
    a.logps = logps.data(), a.lse = lse.data(), a.grad_logps = grad_logps.data();
    a.entropy = entropy.data(), a.grad_entropy = c.entropy ? grad_entropy.data() : nullptr;
    a.out = out.all.data(c.offset + v0);
    a.out_offsets = c.scattered ? out.starts.data() : nullptr;
    a.out_ld = out.ld;
    a.split_width = c.split_width ? c.split_width : a.width;
    a.splits = ceil_div(a.width, a.split_width);
    launch_logprob_grad(c.x, c.out, a, nullptr);
  }
  for (int64_t row = 0; row < n; ++row) {
    const Naive& w = want[size_t(row)];
    for (int64_t i = 0; i < v; ++i) {
      const double got = out.all[out.at(c.scattered, row, i)], g = w.grad[size_t(i)];
      expect(got, g, eps + round * std::fabs(g) + 1e-7 * (round != 0), "grad", row, i, c);
    }
  }
  // Nothing between the rows was written.
  for (int64_t row = 0; row + 1 < n; ++row)
    for (int64_t i = v; i < out.ld; ++i) expect(out.all[out.offset + row * out.ld + i], kNaN, 0, "a gap", row, i, c);
}

// What a row of cached exponentials must survive; those that are of one tile, in each of the three.
enum class Trouble { none, grows, grows_twice, shrinks, minus_inf, plus_inf, nan, all_minus_inf, sure };

bool is_of_one_tile(Trouble t) { return t == Trouble::minus_inf || t == Trouble::plus_inf || t == Trouble::nan; }

// Keeps the exponentials of a problem in three tiles and seals them: factor e is d logps / d x.
void check_cached(DType t, DType cached, Trouble trouble, int64_t where, bool folds, bool bias, double softcap) {
  const int64_t n = 5, v = 1500, tile = 512, ld = 1504;
  const DType acc = t == DType::f64 ? DType::f64 : DType::f32;
  Case c{n, v, tile, t, cached};
  c.bias = bias, c.softcap = softcap, c.temperature = 0.7, c.scale = 1.3;
  Rows x(t, n, v, ld, 0), e(cached, n, v, ld, 0);
  Vector biases(acc, v), stats(acc, kStats * n, 0), shifts(acc, 3 * n), factor(acc, n);
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < v; ++i) biases.put(i, uniform());
  for (int64_t row = 0; row < n; ++row) {
    labels.push_back(row == 0 ? 3 : row == 1 ? v - 1 : int64_t(random_numbers.below(unsigned(v))));
    for (int64_t i = 0; i < v; ++i) {
      double at = 3 * uniform();
      const int64_t k = i / tile;
      if (row % 2 == 1) {
        if (trouble == Trouble::grows) at += k == 0 ? -80 : 80;
        if (trouble == Trouble::grows_twice) at += 70 * double(k);
        if (trouble == Trouble::shrinks) at += k == 0 ? 80 : -80;
        if (trouble == Trouble::minus_inf && k == where) at = -kInf;
        if (trouble == Trouble::plus_inf && i == where * tile + 9) at = kInf;
        if (trouble == Trouble::nan && i == where * tile + 1) at = kNaN;
        if (trouble == Trouble::all_minus_inf && i != labels.back()) at = -kInf;
        if (trouble == Trouble::sure && i == labels.back()) at = 120;
      }
      x.all.put(x.at(false, row, i), at);
    }
  }
  std::vector<Naive> want;
  for (int64_t row = 0; row < n; ++row) {
    std::vector<double> logits;
    for (int64_t i = 0; i < v; ++i) logits.push_back(x.all[x.at(false, row, i)] + (bias ? biases[i] : 0));
    want.emplace_back(logits, labels[size_t(row)], c, 1, 0);
    for (int column : {kM, kTopBefore, kZLabel}) stats.put(column * n + row, -kInf);
  }
  const int64_t split_width = folds ? tile : 200, splits = ceil_div(tile, split_width);
  Vector partials(acc, splits * kStats * n);
  auto fill = [&](TileArgs& a, int64_t v0) {
    a.x = x.all.data(v0), a.ld = ld, a.n = n, a.width = std::min(tile, v - v0), a.v0 = v0;
    a.bias = bias ? biases.data(v0) : nullptr, a.labels = labels.data();
    a.temperature = c.temperature, a.logit_scale = c.scale, a.softcap = softcap;
    a.split_width = split_width, a.splits = ceil_div(a.width, split_width);
  };
  for (int64_t v0 = 0; v0 < v; v0 += tile) {
    if (!folds) {
      FoldArgs a{};
      fill(a, v0);
      a.stats = stats.data(), a.partials = partials.data(), a.outputs = 15;
      launch_logprob_fold(t, a, nullptr);
    }
    KeepArgs a{};
    fill(a, v0);
    a.folds = folds, a.stats = stats.data(), a.out = e.all.data(), a.out_ld = ld;
    a.shift_before = v0 ? shifts.data((v0 / tile - 1) * n) : nullptr, a.shift = shifts.data(v0 / tile * n);
    launch_logprob_keep(t, cached, a, nullptr);
  }
  Vector logps(acc, n), lse(acc, 2 * n);
  FinishArgs f{};
  f.stats = stats.data(), f.labels = labels.data(), f.n = n, f.v = v, f.logps = logps.data(), f.lse = lse.data();
  launch_logprob_finish(acc, f, nullptr);
  SealArgs s{};
  s.stats = stats.data(), s.lse = lse.data(), s.shift = shifts.data(2 * n), s.labels = labels.data(), s.n = n, s.width = v;
  s.temperature = c.temperature, s.logit_scale = c.scale, s.softcap = softcap;
  s.factor = factor.data(), s.out = e.all.data(), s.out_ld = ld;
  launch_logprob_seal(acc, cached, s, nullptr);
  const double round = cached == DType::bf16 ? 1 / 256.0 : cached == DType::f16 ? 1 / 2048.0 : 0;
  const double eps = acc == DType::f64 ? 1e-11 : 3e-5;
  for (int64_t row = 0; row < n; ++row) {
    const Naive& w = want[size_t(row)];
    expect(logps[row], w.logp, eps * (10 + std::fabs(w.logp)), "logps of cached rows", row, int64_t(trouble), c);
    for (int64_t i = 0; i < v; ++i) {
      // With fp16 the label's entry is the caller's, and what is 2^-24 of the row's largest is lost.
      if (cached == DType::f16 && i == labels[size_t(row)]) continue;
      const double g = w.grad[size_t(i)], tiny = cached == DType::f16 ? 1e-7 : 1e-9;
      expect(factor[row] * e.all[e.at(false, row, i)], g, (round + eps) * std::fabs(g) + tiny, "cached", row, i, c);
    }
  }
  for (int64_t row = 0; row + 1 < n; ++row)
    for (int64_t i = v; i < ld; ++i) expect(e.all[row * ld + i], kNaN, 0, "a gap of cached rows", row, i, c);
}

// Two blocks for nine rows: each takes several, and shared memory is used again for the next.
void check_few_blocks() {
  const int64_t n = 9, v = 300;
  Case c{n, v, v, DType::f32, DType::f32};
  Rows x(DType::f32, n, v, v, 0), out(DType::f32, n, v, v, 0);
  std::vector<int64_t> labels(size_t(n), 7);
  Vector stats(DType::f32, kStats * n, 0), lse(DType::f32, 2 * n, 0), ones(DType::f32, n, 1), logps(DType::f32, n);
  std::vector<Naive> want;
  for (int64_t row = 0; row < n; ++row) {
    std::vector<double> logits;
    for (int64_t i = 0; i < v; ++i) {
      x.all.put(row * v + i, 4 * uniform());
      logits.push_back(x.all[row * v + i]);
    }
    want.emplace_back(logits, 7, c, 1, 0);
    for (int column : {kM, kTopBefore, kZLabel}) stats.put(column * n + row, -kInf);
    lse.put(2 * row, want.back().lse);
    logps.put(row, want.back().logp);
  }
  const Transform<float> transform = make_transform<float>(1, 1, 0);
  FoldArgs a{};
  a.x = x.all.data(), a.ld = a.width = a.split_width = v, a.n = n, a.splits = 1, a.labels = labels.data(), a.outputs = 15;
  a.stats = stats.data();
  emu::launch(2, kThreads, [&] { logprob_fold_kernel<float, true, false>(a, transform); });
  GradArgs g{};
  g.x = x.all.data(), g.ld = g.width = g.split_width = g.out_ld = v, g.n = n, g.splits = 1, g.labels = labels.data();
  g.lse = lse.data(), g.logps = logps.data(), g.grad_logps = ones.data();
  g.out = out.all.data();
  emu::launch(2, kThreads, [&] { logprob_grad_kernel<float, float, true>(g, transform); });
  for (int64_t row = 0; row < n; ++row) {
    const Naive& w = want[size_t(row)];
    expect(stats[kM * n + row] + std::log(stats[kSum * n + row]), std::log(std::exp(w.lse) - std::exp(w.z[7])), 2e-5,
           "lse of the others", row, 0, c);
    for (int64_t i = 0; i < v; ++i) expect(out.all[row * v + i], w.grad[size_t(i)], 2e-5, "grad", row, i, c);
  }
}

// Rows more than 2^31 elements apart, of which only their own pages exist.
void check_far_rows(bool scattered) {
  const int64_t far = (int64_t(1) << 31) + 5, n = 2, v = 700;
  Case c{n, v, v, DType::bf16, DType::bf16};
  c.scattered = scattered;
  const size_t page = 4096, bytes = size_t(far + v) * 2 + page, second = size_t(far) * 2 / page * page;
  void* const all = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED || mprotect(all, page, PROT_READ | PROT_WRITE) != 0 ||
      mprotect(static_cast<char*>(all) + second, page * 2, PROT_READ | PROT_WRITE) != 0) {
    std::printf("no address space for far rows\n");
    ++failures;
    return;
  }
  const std::vector<int64_t> offsets = {far, 0}, labels = {3, 600};
  std::vector<Naive> want;
  auto at = [&](int64_t row) { return scattered ? offsets[size_t(row)] : row * far; };
  for (int64_t row = 0; row < n; ++row) {
    std::vector<double> logits;
    for (int64_t i = 0; i < v; ++i) {
      set(DType::bf16, all, at(row) + i, 4 * uniform());
      logits.push_back(get(DType::bf16, all, at(row) + i));
    }
    want.emplace_back(logits, labels[size_t(row)], c, 1, 0);
  }
  Vector stats(DType::f32, kStats * n, 0), logps(DType::f32, n), lse(DType::f32, 2 * n);
  for (int64_t row = 0; row < n; ++row)
    for (int column : {kM, kTopBefore, kZLabel}) stats.put(column * n + row, -kInf);
  FoldArgs a{};
  a.x = all, a.row_offsets = scattered ? offsets.data() : nullptr;
  a.ld = scattered ? 0 : far, a.n = n, a.width = a.split_width = v, a.splits = 1, a.labels = labels.data();
  a.temperature = a.logit_scale = 1, a.stats = stats.data();
  launch_logprob_fold(DType::bf16, a, nullptr);
  FinishArgs f{};
  f.stats = stats.data(), f.labels = labels.data(), f.n = n, f.v = v, f.logps = logps.data(), f.lse = lse.data();
  launch_logprob_finish(DType::f32, f, nullptr);
  GradArgs g{};
  g.x = g.out = all, g.row_offsets = g.out_offsets = a.row_offsets, g.ld = g.out_ld = a.ld, g.n = n;
  g.width = g.split_width = v, g.splits = 1, g.labels = labels.data(), g.temperature = g.logit_scale = 1;
  const std::vector<float> ones = {1, 1};
  g.lse = lse.data(), g.logps = logps.data(), g.grad_logps = ones.data();
  launch_logprob_grad(DType::bf16, DType::bf16, g, nullptr);
  for (int64_t row = 0; row < n; ++row) {
    expect(logps[row], want[size_t(row)].logp, 1e-4, "logps of far rows", row, 0, c);
    for (int64_t i = 0; i < v; ++i) {
      const double w = want[size_t(row)].grad[size_t(i)];
      expect(get(DType::bf16, all, at(row) + i), w, std::fabs(w) / 256 + 1e-6, "grad of far rows", row, i, c);
    }
  }
  munmap(all, bytes);
}

std::vector<Case> cases() {
  const DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  std::vector<Case> all;
  const DType pairs[][2] = {{f32, f32}, {f64, f64}, {bf16, bf16}, {f16, f16}, {f32, bf16}, {f32, f16}};
  auto add = [&](Case c, auto change) {
    change(c);
    all.push_back(c);
  };
  for (const auto& t : pairs) {
    add({3, 1, 1, t[0], t[1]}, [](Case&) {});
    add({3, 17, 17, t[0], t[1]}, [](Case& c) { c.offset = 3, c.bias = true; });
    add({7, 1300, 500, t[0], t[1]}, [](Case& c) { c.ld_more = 3, c.offset = 1, c.bias = c.entropy = true; });
    add({6, 2100, 2100, t[0], t[1]}, [](Case& c) {
      c.ld_more = 5, c.scattered = c.bias = c.entropy = true, c.split_width = 601;
      c.temperature = 0.7, c.scale = 1.3, c.softcap = 4;
    });
    add({5, 700, 333, t[0], t[1]}, [](Case& c) { c.offset = 5, c.outputs = false, c.softcap = 4; });
    add({6, 900, 450, t[0], t[1]}, [](Case& c) { c.ld_more = 1, c.split_width = 128; });
    add({5, 257, 257, t[0], t[1]}, [](Case& c) { c.entropy = true; });
  }
  add({300, 40, 40, f32, f32}, [](Case& c) { c.split_width = 13; });  // more rows than a block of merge and finish has threads
  for (Special special : {Special::first_minus_inf, Special::all_minus_inf, Special::plus_inf, Special::nan,
                          Special::label_minus_inf, Special::label_nan, Special::bad_label})
    for (int64_t split_width : {0, 100}) {
      add({4, 600, 300, f32, f32}, [&](Case& c) { c.special = special, c.split_width = split_width; });
      add({4, 300, 300, bf16, bf16}, [&](Case& c) { c.special = special, c.split_width = split_width; });
    }
  return all;
}

int kernels() {
  for (emu::seed = 1; emu::seed <= kSeeds; ++emu::seed) {
    if (const int wrong = wrong_shuffles()) std::printf("%d shuffles are wrong\n", wrong), ++failures;
    for (const Case& c : cases()) check(c);
    const DType kinds[][2] = {
        {DType::f32, DType::bf16}, {DType::f32, DType::f32}, {DType::f64, DType::f64}, {DType::f32, DType::f16}};
    for (const auto& kind : kinds)
      for (int trouble = 0; trouble <= int(Trouble::sure); ++trouble)
        for (int64_t where = 0; where < (is_of_one_tile(Trouble(trouble)) ? 3 : 1); ++where)
          for (bool folds : {true, false}) {
            check_cached(kind[0], kind[1], Trouble(trouble), where, folds, false, 0);
            check_cached(kind[0], kind[1], Trouble(trouble), where, folds, true, (trouble + where) % 2 ? 0 : 60);
          }
    check_few_blocks();
    check_far_rows(false);
    check_far_rows(true);
  }
  std::printf("%s\n", failures == 0 ? "ok" : "failed");
  return failures != 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "kernels") return kernels();
  if (what == "planted" && argc > 2) {
    if (planted(argv[2])) std::printf("caught\n");
    return 0;
  }
  std::fprintf(stderr, "usage: test_emu kernels | planted NAME\n");
  return 2;
}
