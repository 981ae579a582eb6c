// The CPU kernels of one instruction set against a naive double implementation, in buffers of exactly the
// size they ask for, so that AddressSanitizer sees a read or a write one element too far. Before them, the
// functions of its vectors (vectors.h).
//
//   test_kernels <instruction set>
//
// Prints "ok" as its last line if every case agrees. Workspaces start as NaN, so that what a kernel reads
// before it wrote it shows.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/float16.h"
#include "cpu/kernels.h"

namespace dpofast::cpu {
// vectors_*.cpp: how many functions of an instruction set's vectors are wrong
int check_scalar_vectors();
int check_neon_vectors();
int check_avx2_vectors();
int check_avx512_vectors();
int check_avx512_bf16_vectors();
}  // namespace dpofast::cpu

using namespace dpofast;
using namespace dpofast::cpu;

namespace {

struct VectorCheck {
  const char* isa;
  int (*run)();
};
constexpr VectorCheck kVectorChecks[] = {
    {"scalar", check_scalar_vectors},
#if defined(__x86_64__)
    {"avx2", check_avx2_vectors},
    {"avx512", check_avx512_vectors},
    {"avx512_bf16", check_avx512_bf16_vectors},
#elif defined(__aarch64__)
    {"neon", check_neon_vectors},
#endif
};

uint64_t random_state = 1;

double uniform() {  // in (-1, 1)
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(random_state >> 11)) / double(int64_t(1) << 52) - 1;
}

// Exactly `bytes` bytes on the heap, all ones: NaN in every floating-point type.
struct Buffer {
  std::unique_ptr<char[]> data;
  size_t bytes;
  explicit Buffer(int64_t n) : data(new char[size_t(n)]), bytes(size_t(n)) { std::memset(data.get(), 0xff, bytes); }
};

// A tensor of any dtype, read and written as double.
struct Tensor {
  DType dtype;
  Buffer buffer;
  Tensor(DType t, int64_t n) : dtype(t), buffer(n * int64_t(size_of(t))) {}

  void* data() { return buffer.data.get(); }
  int64_t size() const { return int64_t(buffer.bytes / size_of(dtype)); }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(buffer.data.get());
  }

  double get(int64_t i) {
    switch (dtype) {
      case DType::f32: return double(as<float>()[i]);
      case DType::f64: return as<double>()[i];
      case DType::bf16: return double(bf16_to_float(as<uint16_t>()[i]));
      case DType::f16: return double(f16_to_float(as<uint16_t>()[i]));
    }
    return 0;
  }
  void set(int64_t i, double x) {
    switch (dtype) {
      case DType::f32: as<float>()[i] = float(x); break;
      case DType::f64: as<double>()[i] = x; break;
      case DType::bf16: as<uint16_t>()[i] = float_to_bf16(float(x)); break;
      case DType::f16: as<uint16_t>()[i] = float_to_f16(float(x)); break;
    }
  }
  void fill(double scale) {
    for (int64_t i = 0; i < size(); ++i) set(i, scale * uniform());
  }
};

struct Case {
  int64_t n, h, v, block;
  DType hidden, weight;
  bool bias, softcap, entropy;  // entropy: its gradient too
  int schedule;                 // share of cached blocks in thirds, or kJacobian, or kScore
  bool transposed_weight;
  int threads;
  int64_t token_chunk = 0;  // of the backward
  double ramp = 0;          // how much later logits are larger, an entry
};
constexpr int kRecompute = 0, kMixed = 1, kCached = 3, kJacobian = 4, kScore = 5;

std::string describe(const Case& c) {
  char text[200];
  std::snprintf(text, sizeof text,
                "n %d h %d v %d block %d dtypes %d %d bias %d softcap %d entropy %d schedule %d ld %d threads %d chunk %d",
                int(c.n), int(c.h), int(c.v), int(c.block), int(c.hidden), int(c.weight), c.bias, c.softcap, c.entropy,
                c.schedule, c.transposed_weight, c.threads, int(c.token_chunk));
  return text;
}

struct Results {
  std::vector<double> logps, lse, entropy, log_sum_sq_probs, mean_logits, is_top1, d_hidden, d_weight, d_bias;
};

// From logits x [n, v]: the results, and d loss / d x in place of x.
void naive_rows(std::vector<double>& x, const std::vector<int64_t>& labels, int64_t v, double temperature, double scale,
                double softcap, const std::vector<double>& c, const std::vector<double>& e, Results& r) {
  for (size_t t = 0; t < labels.size(); ++t) {
    double* row = x.data() + int64_t(t) * v;
    const int64_t y = labels[t];
    std::vector<double> z(size_t(v), 0), slope(size_t(v), 0);
    double m = -INFINITY, sum = 0, entropy = 0, sum_sq = 0, mean = 0;
    int64_t first = 0;
    for (int64_t i = 0; i < v; ++i) {
      const double u = softcap != 0 ? std::tanh(scale * row[i] / softcap) : 0;
      z[size_t(i)] = (softcap != 0 ? softcap * u : scale * row[i]) / temperature;
      slope[size_t(i)] = scale / temperature * (1 - u * u);
      if (z[size_t(i)] > m) m = z[size_t(i)], first = i;
      mean += z[size_t(i)] / double(v);
    }
    for (double a : z) sum += std::exp(a - m);
    const double lse = m + std::log(sum);
    for (double a : z) entropy -= std::exp(a - lse) * (a - lse), sum_sq += std::exp(2 * (a - lse));
    r.logps.push_back(z[size_t(y)] - lse);
    r.lse.push_back(lse);
    r.entropy.push_back(entropy);
    r.log_sum_sq_probs.push_back(std::log(sum_sq));
    r.mean_logits.push_back(mean);
    r.is_top1.push_back(first == y);
    for (int64_t i = 0; i < v; ++i) {
      const double log_p = z[size_t(i)] - lse, p = std::exp(log_p);
      row[i] = slope[size_t(i)] * (c[t] * ((i == y) - p) - e[t] * p * (log_p + entropy));
    }
  }
}

int failures = 0;

void compare(const char* name, const std::vector<double>& got, const std::vector<double>& want, double tolerance,
             const std::string& where) {
  double scale = 1e-3;
  for (double x : want) scale = std::fabs(x) > scale ? std::fabs(x) : scale;
  for (size_t i = 0; i < want.size(); ++i)
    if (!(std::fabs(got[i] - want[i]) <= tolerance * scale)) {
      std::printf("%s[%zu]: got %.9g, expected %.9g (%s)\n", name, i, got[i], want[i], where.c_str());
      ++failures;
      return;
    }
}

std::vector<double> values(Tensor& x) {
  std::vector<double> out;
  for (int64_t i = 0; i < x.size(); ++i) out.push_back(x.get(i));
  return out;
}

std::vector<double> halves(Tensor& x) {
  std::vector<double> out = values(x);
  for (double& y : out) y /= 2;
  return out;
}

std::vector<double> sums_of_pairs(Tensor& x) {
  std::vector<double> out;
  for (int64_t i = 0; i < x.size(); i += 2) out.push_back(x.get(i) + x.get(i + 1));
  return out;
}

double rounding(DType t) { return t == DType::bf16 ? 4e-3 : t == DType::f16 ? 5e-4 : t == DType::f32 ? 6e-8 : 1e-16; }

void check_linear_logprob(const Table& table, const Case& c) {
  random_state = uint64_t(c.n * 1000 + c.h * 100 + c.v);
  const Traits traits = table.traits(c.hidden, c.weight);
  const DType acc = traits.acc_size == 8 ? DType::f64 : DType::f32;
  Tensor hidden(c.hidden, c.n * c.h), weight(c.weight, c.v * c.h), bias(acc, c.v);
  hidden.fill(1);
  weight.fill(4 / std::sqrt(double(c.h)));
  bias.fill(1);
  for (int64_t i = 0; i < c.v; ++i) bias.set(i, bias.get(i) + c.ramp * double(i));
  std::vector<int64_t> offsets, labels, grad_positions;
  for (int64_t t = 0; t < c.n; ++t) {
    offsets.push_back((c.n - 1 - t) * c.h);  // the last row first
    grad_positions.push_back((t + 1) % c.n);
    labels.push_back(t == 0 ? c.v - 1 : t == 1 ? 0 : int64_t((uniform() + 1) / 2 * double(c.v)));
  }
  const double temperature = 0.7, scale = 1.3, softcap = c.softcap ? 3.0 : 0.0;
  Tensor grad_logps(acc, c.n), grad_entropy(acc, c.n);
  grad_logps.fill(1);
  grad_entropy.fill(1);

  // The truth.
  Results want;
  const std::vector<double> dc = values(grad_logps),
                            de = c.entropy ? values(grad_entropy) : std::vector<double>(size_t(c.n), 0);
  const int64_t row_stride = c.transposed_weight ? 1 : c.h, col_stride = c.transposed_weight ? c.v : 1;
  std::vector<double> x(size_t(c.n * c.v), 0);
  for (int64_t t = 0; t < c.n; ++t)
    for (int64_t i = 0; i < c.v; ++i) {
      double sum = c.bias ? bias.get(i) : 0;
      for (int64_t k = 0; k < c.h; ++k) sum += hidden.get(offsets[size_t(t)] + k) * weight.get(i * row_stride + k * col_stride);
      x[size_t(t * c.v + i)] = sum;
    }
  naive_rows(x, labels, c.v, temperature, scale, softcap, dc, de, want);
  want.d_hidden.assign(size_t(c.n * c.h), 0);
  want.d_weight.assign(size_t(c.v * c.h), 0);
  want.d_bias.assign(size_t(c.v), 0);
  for (int64_t t = 0; t < c.n; ++t)
    for (int64_t i = 0; i < c.v; ++i) {
      const double g = x[size_t(t * c.v + i)];
      want.d_bias[size_t(i)] += g;
      for (int64_t k = 0; k < c.h; ++k) {
        want.d_hidden[size_t(grad_positions[size_t(t)] * c.h + k)] += g * weight.get(i * row_stride + k * col_stride);
        want.d_weight[size_t(i * c.h + k)] += g * hidden.get(offsets[size_t(t)] + k);
      }
    }

  // The kernels.
  const int64_t n_padded = round_up(c.n, traits.vector), blocks = ceil_div(c.v, c.block);
  const int64_t cached = c.schedule <= kCached ? blocks * c.schedule / 3 : 0;
  const int64_t per_block =
      round_up(c.block * n_padded * traits.cached_size, 64) + round_up(ceil_div(c.block, 48) * n_padded * traits.acc_size, 64);
  Buffer cache(cached * per_block), jacobian(c.schedule == kJacobian ? c.h * n_padded * traits.acc_size : 0);
  Tensor logps(acc, c.n), lse(acc, 2 * c.n), entropy(acc, c.n), log_sum_sq_probs(acc, c.n), mean_logits(acc, c.n);
  std::vector<uint8_t> is_top1(size_t(c.n), 255);

  Problem problem{};
  problem.n = c.n, problem.h = c.h, problem.v = c.v;
  problem.hidden = hidden.data(), problem.hidden_dtype = c.hidden, problem.token_offsets = offsets.data(),
  problem.hidden_col_stride = 1;
  problem.weight = weight.data(), problem.weight_dtype = c.weight;
  problem.weight_row_stride = row_stride, problem.weight_col_stride = col_stride;
  problem.bias = c.bias ? bias.data() : nullptr, problem.labels = labels.data();
  problem.temperature = temperature, problem.logit_scale = scale, problem.softcap = softcap;
  problem.block = c.block, problem.threads = c.threads;

  ForwardArgs f{};
  f.problem = problem;
  f.logps = logps.data(), f.lse = lse.data();
  if (c.entropy) {  // all statistics, or none
    f.outputs = kEntropy | kLogSumSqProbs | kMeanLogits | kIsTop1;
    f.of(kEntropy) = entropy.data(), f.of(kLogSumSqProbs) = log_sum_sq_probs.data(), f.of(kMeanLogits) = mean_logits.data();
    f.of(kIsTop1) = is_top1.data();
  }
  f.cache = cached ? cache.data.get() : nullptr;
  f.jacobian = c.schedule == kJacobian ? jacobian.data.get() : nullptr;
  f.cache_bytes = int64_t(f.jacobian ? jacobian.bytes : cache.bytes);
  Buffer forward_workspace(table.forward(f));
  f.workspace = forward_workspace.data.get();
  table.forward(f);

  const std::string where = std::string(table.name) + ": " + describe(c);
  const double tight = acc == DType::f64 ? 1e-11 : 2e-5;
  compare("logps", values(logps), want.logps, tight, where);
  compare("lse", sums_of_pairs(lse), want.lse, tight, where);
  if (c.entropy) {
    compare("entropy", values(entropy), want.entropy, tight, where);
    compare("log_sum_sq_probs", values(log_sum_sq_probs), want.log_sum_sq_probs, tight, where);
    compare("mean_logits", values(mean_logits), want.mean_logits, tight, where);
    compare("is_top1", std::vector<double>(is_top1.begin(), is_top1.end()), want.is_top1, 0, where);
  }
  if (c.schedule == kScore) return;

  // Rounded where it is stored and, in a 16-bit product, where g is; the jacobian rounds its p, not its label.
  const double product = traits.cached_size == 2 ? 8e-3 : 0;
  Tensor d_hidden(c.hidden, c.n * c.h), d_weight(c.weight, c.v * c.h), d_bias(acc, c.v);
  const bool with_jacobian = c.schedule == kJacobian && !c.entropy, head_trains = c.schedule != kJacobian;
  BackwardArgs b{};
  b.problem = problem;
  b.logps = logps.data(), b.lse = lse.data(), b.grad_logps = grad_logps.data();
  if (c.entropy) b.entropy = entropy.data(), b.grad_entropy = grad_entropy.data();
  else b.cache = f.cache;
  b.jacobian = with_jacobian ? f.jacobian : nullptr;
  b.cache_bytes = f.cache_bytes;
  b.grad_hidden = d_hidden.data(), b.grad_hidden_dtype = c.hidden, b.grad_positions = grad_positions.data();
  b.grad_weight = head_trains ? d_weight.data() : nullptr;
  b.grad_weight_dtype = c.weight;
  b.grad_bias = head_trains && c.bias ? d_bias.data() : nullptr;
  b.token_chunk = c.token_chunk;
  Buffer backward_workspace(table.backward(b));
  b.workspace = backward_workspace.data.get();
  table.backward(b);
  compare("d hidden", values(d_hidden), want.d_hidden, tight + product + rounding(c.hidden), where);
  if (b.grad_weight) compare("d weight", values(d_weight), want.d_weight, tight + product + rounding(c.weight), where);
  if (b.grad_bias) compare("d bias", values(d_bias), want.d_bias, tight + product, where);

  if (head_trains) {  // written to sums of the accumulator's type, then added to them: twice as much
    Tensor sums(acc, c.v * c.h), bias_sums(acc, c.v);
    BackwardArgs more = b;
    more.workspace = nullptr;
    more.grad_weight = sums.data(), more.grad_weight_dtype = acc;
    if (b.grad_bias) more.grad_bias = bias_sums.data();
    for (int i = 0; i < 2; ++i) {
      more.adds = i == 1;
      Buffer workspace(table.backward(more));
      more.workspace = workspace.data.get();
      table.backward(more);
      more.workspace = nullptr;
    }
    compare("d weight, added", halves(sums), want.d_weight, tight + product, where);
    if (b.grad_bias) compare("d bias, added", halves(bias_sums), want.d_bias, tight + product, where);
  }

  // The bits do not depend on the number of threads.
  if (c.threads == 1) return;
  Tensor again(c.hidden, c.n * c.h);
  b.problem.threads = 1;
  b.grad_hidden = again.data();
  Buffer workspace(table.backward(b));
  b.workspace = workspace.data.get();
  table.backward(b);
  if (std::memcmp(again.data(), d_hidden.data(), again.buffer.bytes) != 0) {
    std::printf("d hidden depends on the threads (%s)\n", where.c_str());
    ++failures;
  }
}

// The tokens that a filtered call takes first.
std::vector<int64_t> first_tokens(int64_t n, int64_t panel) {
  const int64_t panels = (n + panel - 1) / panel, count = panels < 4 ? 0 : panel * ((panels + 63) / 64);
  std::vector<int64_t> found;
  for (int64_t i = 0; i < count; ++i) found.push_back(i * n / count);
  return found;
}

// What each row of the vocabulary gets of the mass that is given back: as the first tokens dropped it, in shares of what their
// labels leave to others, and in equal parts as far as it takes for the squares to add up to no more than `most`.
std::vector<double> shares(const std::vector<int64_t>& first, const std::vector<std::vector<double>>& left_out,
                           const std::vector<double>& others, double most, int64_t v) {
  std::vector<double> share(size_t(v), 1 / double(v)), sums(size_t(v), 0);
  double total = 0, squares = 0;
  for (int64_t i = 0; i < v; ++i) {
    for (int64_t t : first) sums[size_t(i)] += left_out[size_t(t)][size_t(i)] / others[size_t(t)];
    total += sums[size_t(i)], squares += sums[size_t(i)] * sums[size_t(i)];
  }
  if (!(total > 0) || most <= 1 / double(v)) return share;
  const double equal = 1 / double(v), found = squares / (total * total);
  const double part = found <= most ? 1 : std::sqrt((most - equal) / (found - equal));
  for (int64_t i = 0; i < v; ++i) share[size_t(i)] = part * sums[size_t(i)] / total + (1 - part) * equal;
  return share;
}

// A filter, as its definition says, for tokens of which it says that it dropped something, and exact gradients for others.
// `room`: bytes of the cache, from none for any entry to enough for all.
void check_filtered(const Table& table, DType type, int64_t n, int64_t h, int64_t v, int64_t block, bool has_bias, bool capped,
                    int64_t room, int threads, double cut = 1.0 / 64) {
  random_state = uint64_t(n * 1000 + h * 100 + v);
  const Traits traits = table.traits(type, type);
  const DType acc = traits.acc_size == 8 ? DType::f64 : DType::f32;
  const double tolerance = 1.0 / 8, softcap = capped ? 12 : 0;
  Tensor hidden(type, n * h), weight(type, v * h), bias(acc, v), grad_logps(acc, n), logps(acc, n), lse(acc, 2 * n);
  Tensor dropped(acc, n), d_hidden(type, n * h), d_weight(type, v * h), d_bias(acc, v);
  hidden.fill(1);
  weight.fill(16 / std::sqrt(double(h)));
  bias.fill(1);
  grad_logps.fill(1);
  std::vector<int64_t> offsets, labels, positions;
  for (int64_t t = 0; t < n; ++t) {
    offsets.push_back(t * h), positions.push_back(t);
    labels.push_back(int64_t((uniform() + 1) / 2 * double(v)));
    for (int64_t k = 0; t % 13 == 5 && k < h; ++k) hidden.set(t * h + k, hidden.get(t * h + k) / 64);  // a flat one
  }
  Buffer cache(room);
  ForwardArgs f{};
  Problem& problem = f.problem;
  problem.n = n, problem.h = h, problem.v = v, problem.block = block, problem.threads = threads;
  problem.hidden = hidden.data(), problem.hidden_dtype = type, problem.token_offsets = offsets.data();
  problem.hidden_col_stride = 1;
  problem.weight = weight.data(), problem.weight_dtype = type, problem.weight_row_stride = h, problem.weight_col_stride = 1;
  problem.bias = has_bias ? bias.data() : nullptr, problem.labels = labels.data();
  problem.temperature = 1, problem.logit_scale = 1, problem.softcap = softcap;
  f.logps = logps.data(), f.lse = lse.data();
  f.cache = cache.data.get(), f.cache_bytes = room;
  f.grad_filter = cut, f.tolerance = tolerance, f.dropped_mass = dropped.data();
  Buffer forward_workspace(table.forward(f));
  f.workspace = forward_workspace.data.get();
  table.forward(f);

  std::vector<double> want_hidden(size_t(n * h), 0), want_weight(size_t(v * h), 0), want_bias(size_t(v), 0), want_dropped;
  std::vector<std::vector<double>> p, slope, left_out;  // by token, then by row of the vocabulary
  std::vector<double> others;
  for (int64_t t = 0; t < n; ++t) {
    std::vector<double> z, bent;
    double sum = 0, left = 0, mass = 0;
    for (int64_t i = 0; i < v; ++i) {
      double x = has_bias ? bias.get(i) : 0;
      for (int64_t k = 0; k < h; ++k) x += hidden.get(t * h + k) * weight.get(i * h + k);
      const double u = capped ? std::tanh(x / softcap) : 0;
      z.push_back(capped ? softcap * u : x), bent.push_back(1 - u * u);
      sum += std::exp(z.back());
    }
    const int64_t y = labels[size_t(t)];
    for (int64_t i = 0; i < v; ++i) left += i == y ? 0 : std::exp(z[size_t(i)]) / sum;
    std::vector<double> kept, out;
    for (int64_t i = 0; i < v; ++i) {
      const double x = std::exp(z[size_t(i)]) / sum;
      const bool keeps = i == y || dropped.get(t) <= 0 || x > cut * left;
      kept.push_back(i != y && keeps ? x : 0), out.push_back(keeps ? 0 : x);
      mass += out.back();
    }
    want_dropped.push_back(mass);
    if (mass > tolerance * left) {
      std::printf("token %d dropped %g of %g\n", int(t), mass, left);
      ++failures;
    }
    p.push_back(kept), slope.push_back(bent), left_out.push_back(out), others.push_back(left);
  }
  const std::vector<double> share = shares(first_tokens(n, traits.panel), left_out, others, cut / tolerance, v);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i < v; ++i) {
      const double spread = capped ? 0 : want_dropped[size_t(t)] * share[size_t(i)];
      const double own = i == labels[size_t(t)] ? others[size_t(t)] : -p[size_t(t)][size_t(i)];
      const double g = grad_logps.get(t) * slope[size_t(t)][size_t(i)] * (own - spread);
      want_bias[size_t(i)] += g;
      for (int64_t k = 0; k < h; ++k) {
        want_hidden[size_t(t * h + k)] += g * weight.get(i * h + k);
        want_weight[size_t(i * h + k)] += g * hidden.get(t * h + k);
      }
    }

  BackwardArgs b{};
  b.problem = problem;
  b.logps = logps.data(), b.lse = lse.data(), b.grad_logps = grad_logps.data();
  b.cache = f.cache, b.cache_bytes = room, b.grad_filter = cut;
  b.grad_hidden = d_hidden.data(), b.grad_hidden_dtype = type, b.grad_positions = positions.data();
  b.grad_weight = d_weight.data(), b.grad_weight_dtype = type, b.grad_bias = has_bias ? d_bias.data() : nullptr;
  Buffer backward_workspace(table.backward(b));
  b.workspace = backward_workspace.data.get();
  table.backward(b);
  const std::string where = std::string(table.name) + ": filtered, n " + std::to_string(n) + ", v " + std::to_string(v) +
                            ", cache of " + std::to_string(room) + " bytes";
  const double tight = acc == DType::f64 ? 1e-11 : 3e-5, product = traits.cached_size == 2 ? 8e-3 : 0;
  compare("dropped mass", values(dropped), want_dropped, acc == DType::f64 ? 1e-10 : 1e-3, where);  // 1 less what is kept
  compare("d hidden", values(d_hidden), want_hidden, tight + product + rounding(type), where);
  compare("d weight", values(d_weight), want_weight, tight + product + rounding(type), where);
  if (has_bias) compare("d bias", values(d_bias), want_bias, tight + product, where);
}

// Filters n tokens whose logits are a bias alone, with room for so many entries in a region; says what each must drop.
void check_room(const Table& table, const std::string& what, int64_t n, int64_t room, const std::vector<double>& logits,
                double want) {
  constexpr int64_t h = 4;
  const int64_t v = int64_t(logits.size());
  Tensor hidden(DType::f32, n * h), weight(DType::f32, v * h), bias(DType::f32, v), logps(DType::f32, n),
      lse(DType::f32, 2 * n);
  Tensor dropped(DType::f32, n);
  hidden.fill(0), weight.fill(0);
  for (int64_t i = 0; i < v; ++i) bias.set(i, logits[size_t(i)]);
  std::vector<int64_t> offsets, labels(size_t(n), 1);
  for (int64_t t = 0; t < n; ++t) offsets.push_back(t * h);
  const int64_t panels = ceil_div(n, table.traits(DType::f32, DType::f32).panel), regions = panels * 8;
  const int64_t fixed =
      64 + round_up(n * 4, 64) + round_up(v * 4, 64) + round_up(regions * 4, 64) + round_up(8 * panels * (v / 192), 64) + 128;
  Buffer cache(fixed + regions * room * 6);
  ForwardArgs f{};
  Problem& problem = f.problem;
  problem.n = n, problem.h = h, problem.v = v, problem.block = 192, problem.threads = 1;
  problem.hidden = hidden.data(), problem.weight = weight.data(), problem.bias = bias.data();
  problem.hidden_dtype = problem.weight_dtype = DType::f32;
  problem.token_offsets = offsets.data(), problem.labels = labels.data();
  problem.hidden_col_stride = problem.weight_col_stride = 1, problem.weight_row_stride = h;
  problem.temperature = problem.logit_scale = 1;
  f.logps = logps.data(), f.lse = lse.data();
  f.cache = cache.data.get(), f.cache_bytes = int64_t(cache.bytes);
  f.grad_filter = 1.0 / 4096, f.tolerance = 1.0 / 8, f.dropped_mass = dropped.data();
  Buffer workspace(table.forward(f));
  f.workspace = workspace.data.get();
  table.forward(f);
  int64_t filters = 0;
  std::memcpy(&filters, f.cache, sizeof filters);
  compare("filters", {double(filters)}, {1}, 0, what);
  compare("dropped mass", values(dropped), std::vector<double>(size_t(n), want), 1e-4, what);
}

// A piece whose entries find no room holds less of the mass than the tolerance: its tokens keep everything all the same.
void check_full(const Table& table) {
  std::vector<double> logits(8 * 192, -60);
  for (size_t i = 0; i < 8; ++i) logits[i * 192] = -11;        // one entry a piece, but that
  logits[0] = 0;                                               // the first has nearly all of the mass,
  for (size_t i = 0; i < 60; ++i) logits[7 * 192 + i] = -6.8;  // and sixty of the last have 6 % together
  check_room(table, std::string(table.name) + ": full regions", 16, 20, logits, 0);
}

// All entries together have less room than the shares of one panel that goes first, which then are equal.
void check_no_room_for_shares(const Table& table) {
  std::vector<double> logits(64 * 192, -60);
  for (size_t i = 0; i < 64; ++i) logits[i * 192] = -11;
  logits[0] = 0;
  for (size_t i = 0; i < 400; ++i) logits[20 * 192 + i] = -8.5;  // each too small, and 8 % together
  double dropped = 0;
  for (double z : logits) dropped += z < 0 ? std::exp(z) : 0;
  const int64_t panel = table.traits(DType::f32, DType::f32).panel;
  check_room(table, std::string(table.name) + ": no room for shares", 4 * panel, 2 * panel + 2, logits,
             dropped / (1 + dropped));
}

// Log-probs and statistics have the same bits whatever the blocks, the schedule, the threads and the rest of the batch.
void check_equal_bits(const Table& table, DType type) {
  constexpr int64_t n = 70, h = 37, v = 2003;
  const Traits traits = table.traits(type, type);
  const DType acc = traits.acc_size == 8 ? DType::f64 : DType::f32;
  Tensor hidden(type, n * h), weight(type, v * h), bias(acc, v);
  hidden.fill(1);
  weight.fill(8 / std::sqrt(double(h)));
  bias.fill(9);
  std::vector<int64_t> offsets, labels;
  for (int64_t t = 0; t < n; ++t) offsets.push_back(t * h), labels.push_back(int64_t((uniform() + 1) / 2 * double(v)));

  auto run = [&](int64_t first, int64_t count, int64_t block, bool cached, bool jacobian, int threads) {
    ForwardArgs f{};
    f.problem = Problem{count,
                        h,
                        v,
                        hidden.data(),
                        type,
                        offsets.data() + first,
                        1,
                        weight.data(),
                        type,
                        h,
                        1,
                        bias.data(),
                        labels.data() + first,
                        0.7,
                        1.3,
                        0.0,
                        block,
                        threads};
    const int64_t n_padded = round_up(count, traits.vector), blocks = ceil_div(v, block);
    Buffer cache(cached ? blocks * (round_up(block * n_padded * traits.cached_size, 64) +
                                    round_up(ceil_div(block, 48) * n_padded * traits.acc_size, 64))
                        : 0);
    Buffer sums(jacobian ? h * n_padded * traits.acc_size : 0);
    Tensor out(acc, 6 * count);
    std::vector<uint8_t> is_top1(static_cast<size_t>(count), 255);
    char* const at = static_cast<char*>(out.data());
    const int64_t size = count * int64_t(size_of(acc));
    f.outputs = kEntropy | kLogSumSqProbs | kMeanLogits | kIsTop1;
    f.logps = at, f.of(kEntropy) = at + size, f.of(kLogSumSqProbs) = at + 2 * size, f.of(kMeanLogits) = at + 3 * size,
    f.lse = at + 4 * size;
    f.of(kIsTop1) = is_top1.data();
    f.cache = cached ? cache.data.get() : nullptr;
    f.jacobian = jacobian ? sums.data.get() : nullptr;
    f.cache_bytes = int64_t(jacobian ? sums.bytes : cache.bytes);
    Buffer workspace(table.forward(f));
    f.workspace = workspace.data.get();
    table.forward(f);
    return std::string(at, size_t(4 * size));
  };
  const std::string want = run(0, n, 192, false, false, 1);
  auto check = [&](const std::string& got, int64_t first, int64_t count, int64_t block, bool cached, bool jacobian,
                   int threads) {
    for (int64_t i = 0; i < 4; ++i) {
      const size_t size = size_of(acc), from = size_t(i * n + first) * size;
      if (got.compare(size_t(i * count) * size, size_t(count) * size, want, from, size_t(count) * size) == 0) continue;
      std::printf("%s: bits of result %d differ (dtype %d first %d count %d block %d cached %d jacobian %d threads %d)\n",
                  table.name, int(i), int(type), int(first), int(count), int(block), cached, jacobian, threads);
      ++failures;
      return;
    }
  };
  for (int64_t block : {48, 96, 192, 384, 768, 1536, 2004})
    for (int how = 0; how < 3; ++how)
      for (int threads : {1, 3})
        for (int64_t count : {n, int64_t(1), int64_t(17)}) {
          const int64_t first = n - count;
          check(run(first, count, block, how == 1, how == 2, threads), first, count, block, how == 1, how == 2, threads);
        }
}

void check_rows(const Table& table, int64_t n, int64_t v, DType dtype, bool softcap, bool entropy, bool inplace, int threads) {
  random_state = uint64_t(n * 7919 + v);
  const DType acc = dtype == DType::f64 ? DType::f64 : DType::f32;
  Tensor logits(dtype, n * v), grad(dtype, inplace ? 0 : n * v);
  logits.fill(4);
  std::vector<int64_t> offsets, grad_offsets, labels;
  for (int64_t t = 0; t < n; ++t) {
    offsets.push_back((n - 1 - t) * v);
    grad_offsets.push_back(inplace ? offsets.back() : t * v);
    labels.push_back(t == 0 ? v - 1 : t == 1 ? 0 : int64_t((uniform() + 1) / 2 * double(v)));
  }
  Tensor grad_logps(acc, n), grad_entropy(acc, n);
  grad_logps.fill(1);
  grad_entropy.fill(1);
  const double cap = softcap ? 3.0 : 0.0;
  Results want;
  std::vector<double> x;
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i < v; ++i) x.push_back(logits.get(offsets[size_t(t)] + i));
  naive_rows(x, labels, v, 0.7, 1.3, cap, values(grad_logps),
             entropy ? values(grad_entropy) : std::vector<double>(size_t(n), 0), want);

  Tensor logps(acc, n), lse(acc, 2 * n), stat_entropy(acc, n), log_sum_sq_probs(acc, n), mean_logits(acc, n);
  std::vector<uint8_t> is_top1(size_t(n), 255);
  LogitsArgs a{};
  a.n = n, a.v = v, a.logits = logits.data(), a.dtype = dtype, a.row_offsets = offsets.data(), a.labels = labels.data();
  a.temperature = 0.7, a.logit_scale = 1.3, a.softcap = cap, a.threads = threads;
  a.logps = logps.data(), a.lse = lse.data();
  if (entropy) {
    a.outputs = kEntropy | kLogSumSqProbs | kMeanLogits | kIsTop1;
    a.of(kEntropy) = stat_entropy.data(), a.of(kLogSumSqProbs) = log_sum_sq_probs.data();
    a.of(kMeanLogits) = mean_logits.data(), a.of(kIsTop1) = is_top1.data();
  }
  table.logits_forward(a);
  char where[120];
  std::snprintf(where, sizeof where, "%s rows: n %d v %d dtype %d softcap %d entropy %d inplace %d", table.name, int(n), int(v),
                int(dtype), softcap, entropy, inplace);
  const double tight = acc == DType::f64 ? 1e-11 : 2e-5;
  compare("logps", values(logps), want.logps, tight, where);
  compare("lse", sums_of_pairs(lse), want.lse, tight, where);
  if (entropy) {
    compare("entropy", values(stat_entropy), want.entropy, tight, where);
    compare("log_sum_sq_probs", values(log_sum_sq_probs), want.log_sum_sq_probs, tight, where);
    compare("mean_logits", values(mean_logits), want.mean_logits, tight, where);
    compare("is_top1", std::vector<double>(is_top1.begin(), is_top1.end()), want.is_top1, 0, where);
    a.grad_entropy = grad_entropy.data();
  }
  Tensor& out = inplace ? logits : grad;
  a.grad_logps = grad_logps.data();
  a.grad_logits = out.data(), a.grad_offsets = grad_offsets.data();
  table.logits_backward(a);
  std::vector<double> got;
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i < v; ++i) got.push_back(out.get(grad_offsets[size_t(t)] + i));
  compare("d logits", got, x, tight + rounding(dtype), where);
}

}  // namespace

int main(int argc, char** argv) {
  const Table* table = argc == 2 ? find(argv[1]) : nullptr;
  if (!table) {
    std::fprintf(stderr, "usage: test_kernels <instruction set that this machine has>\n");
    return 2;
  }
  int checked = 0;
  for (const VectorCheck& check : kVectorChecks)
    if (std::strcmp(check.isa, table->name) == 0) ++checked, failures += check.run();
  if (checked != 1) std::printf("%s: no check of its vectors\n", table->name), ++failures;

  constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

  // Odd sizes around a vector (4 to 16 tokens), a panel (8 to 64), a tile (4 to 6 rows) and a block.
  constexpr int64_t kShapes[][4] = {{1, 1, 1, 2},      {1, 7, 5, 2},     {3, 5, 7, 4},    {2, 3, 64, 64}, {17, 9, 33, 16},
                                    {67, 21, 101, 48}, {64, 16, 96, 32}, {129, 2, 19, 6}, {5, 67, 40, 14}};
  for (const auto& s : kShapes)
    for (DType t : {DType::f32, DType::bf16, DType::f64})
      for (int schedule : {kRecompute, kMixed, kCached, kJacobian, kScore})
        for (int options = 0; options < 8; ++options)
          check_linear_logprob(*table, {s[0], s[1], s[2], s[3], t, t, bool(options & 1), bool(options & 2), bool(options & 4),
                                        schedule, false, options & 1 ? 3 : 1});
  for (DType hidden : kTypes)
    for (DType weight : kTypes)
      for (int schedule : {kRecompute, kMixed, kCached, kJacobian})
        for (bool transposed : {false, true})
          check_linear_logprob(*table, {19, 11, 53, 16, hidden, weight, true, true, schedule == kMixed, schedule, transposed,
                                        transposed ? 3 : 1});
  // More k than one pass of a product takes, and more rows of d hidden than one task.
  for (DType t : {DType::f32, DType::bf16})
    for (int schedule : {kRecompute, kJacobian})
      check_linear_logprob(*table, {3, 1101, 9, 4, t, t, false, false, false, schedule, false, 3});

  // Tokens a window at a time, into d weight itself and into sums of a group of blocks; 200 tokens are several panels.
  for (DType t : kTypes)
    for (DType weight : {t, DType::bf16})
      for (int schedule : {kRecompute, kMixed})
        for (int64_t chunk : {1, 100, 1000})
          for (bool entropy : {false, true})
            check_linear_logprob(*table, {200, 21, 67, 16, t, weight, true, entropy, entropy, schedule, false, 3, chunk});
  // Maxima that move from fold to fold.
  for (DType t : {DType::f32, DType::bf16, DType::f64})
    for (int schedule : {kMixed, kCached, kJacobian})
      for (double ramp : {0.3, -0.3})
        check_linear_logprob(*table, {21, 9, 260, 96, t, t, true, false, false, schedule, false, 1, 0, ramp});
  // More tokens than are added up at a time.
  check_linear_logprob(*table, {600, 5, 30, 10, DType::f32, DType::f32, true, false, false, kRecompute, false, 1, 0});
  check_linear_logprob(*table, {600, 70, 30, 10, DType::f32, DType::f32, true, false, false, kCached, false, 3, 0});
  for (DType t : {DType::f32, DType::bf16, DType::f16, DType::f64}) check_equal_bits(*table, t);
  // Few tokens and many, small and odd vocabularies, and caches from no room at all to room for everything.
  for (DType t : kTypes)
    for (int64_t room : {1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 23})
      for (int options = 0; options < 4; ++options) {
        check_filtered(*table, t, 1, 5, 3, 4, options & 1, options & 2, room, 1);
        check_filtered(*table, t, 33, 21, 391, 192, options & 1, options & 2, room, 1);
        check_filtered(*table, t, 300, 9, 500, 48, options & 1, options & 2, room, 3, 1.0 / 256);
        check_filtered(*table, t, 100, 9, 500, 12, options & 1, options & 2, room, 3, 1.0 / 256);  // several groups of blocks
      }
  // So many that several panels go first.
  for (DType t : {DType::f32, DType::bf16, DType::f64})
    check_filtered(*table, t, 65 * table->traits(t, t).panel, 5, 100, 48, false, false, 1 << 23, 3);
  check_full(*table);
  check_no_room_for_shares(*table);

  for (int64_t v : {1, 3, 16, 17, 511, 512, 513, 1041})
    for (DType t : kTypes)
      for (int options = 0; options < 8; ++options)
        check_rows(*table, 3, v, t, options & 1, options & 2, options & 4, options & 1 ? 3 : 1);

  std::vector<char> work(kPeakBytes);
  for (DType t : kTypes) {
    const Peak peak = table->peak(t, t, work.data());
    if (!(peak.hardware > 0 && peak.micro_kernel > 0)) std::printf("peak: not positive\n"), ++failures;
  }

  if (failures) return std::printf("%d failures\n", failures), 1;
  std::printf("ok\n");
  return 0;
}
