// The functions of one instruction set's vectors against their definitions, every lane. Included once per instruction
// set, inside its target region and a namespace of its own, by the vectors_*.cpp files, which define FloatVec.
#pragma once

constexpr int W = FloatVec::W;
using reg = FloatVec::reg;

static const char* isa;
static int failures = 0;

static uint32_t bits(float x) { return float_bits(x); }
static uint32_t bits(uint16_t x) { return x; }
static bool same(float a, float b) { return float_bits(a) == float_bits(b); }

static void fail(const char* function, double a, double b, double got, double want) {
  std::printf("%s: %s(%.9g, %.9g): got %.9g, expected %.9g\n", isa, function, a, b, got, want);
  ++failures;
}

// run(in, out) of n inputs at(i), W at a time; prints the first that right(in, out) refuses.
template <class Out, class At, class Run, class Right>
static void check(const char* function, uint32_t n, const At& at, const Run& run, const Right& right) {
  for (uint32_t i = 0; i < n; i += W) {
    decltype(at(i)) in[W];
    Out out[W];
    for (uint32_t lane = 0; lane < W; ++lane) in[lane] = at(i + lane < n ? i + lane : n - 1);
    run(in, out);
    for (uint32_t lane = 0; lane < W; ++lane) {
      if (right(in[lane], out[lane])) continue;
      std::printf("%s: %s of input %u, lane %u: got bits %#x\n", isa, function, unsigned(i + lane), unsigned(lane),
                  unsigned(bits(out[lane])));
      ++failures;
      return;
    }
  }
}

// The distance of floats at x.
static double ulp(double x) {
  const int exponent = x == 0 ? -126 : std::ilogb(x);
  return std::ldexp(1.0, (exponent > -126 ? exponent : -126) - 23);
}

static void check_exp_and_tanh() {
  // Floats of both signs, evenly in their bits: every magnitude.
  auto at = [](uint32_t i) { return bits_float((i >> 1) * 10007u | i << 31); };
  constexpr uint32_t kAll = 2 * (0x7f800000u / 10007u);
  auto exp = [](const float* in, float* out) { FloatVec::store(out, FloatVec::exp(FloatVec::load(in))); };
  check<float>("exp", kAll, at, exp, [](float x, float got) {
    if (x > 88) return true;
    const double want = std::exp(double(x));
    // Below the normal range some instruction sets keep subnormals and some give 0.
    return got >= 0 && std::fabs(got - want) <= (x < -87.33f ? 1.2e-38 : ulp(want)) && (x > -104.1f || got == 0);
  });
  auto tanh = [](const float* in, float* out) { FloatVec::store(out, FloatVec::tanh(FloatVec::load(in))); };
  check<float>("tanh", kAll, at, tanh, [](float x, float got) {
    const double want = std::tanh(double(x));
    return std::fabs(got - want) <= 2 * ulp(want) && std::fabs(got) <= 1;
  });
  static constexpr float kExact[][3] = {{0, 1, 0}, {-INFINITY, 0, -1}, {NAN, NAN, NAN}, {INFINITY, NAN, 1}};  // x, exp, tanh
  for (const auto& x : kExact) {
    float e[W], t[W];
    FloatVec::store(e, FloatVec::exp(FloatVec::set1(x[0])));
    FloatVec::store(t, FloatVec::tanh(FloatVec::set1(x[0])));
    for (int lane = 0; lane < W; ++lane) {
      if (x[0] < INFINITY && e[lane] != x[1]) fail("exp", x[0], 0, e[lane], x[1]);
      if (x[0] != x[0] && e[lane] == e[lane]) fail("exp", x[0], 0, e[lane], x[1]);
      if (x[0] == x[0] ? t[lane] != x[2] : t[lane] == t[lane]) fail("tanh", x[0], 0, t[lane], x[2]);
    }
  }
}

// Where a comparison, a slack of 8, a sign or a NaN decides.
static constexpr float kValues[] = {0.f,     -0.f,  1.f,    9.f,      9.000001f, -7.f, -7.000001f, 1e-40f,
                                    -1e-40f, 3e38f, -3e38f, INFINITY, -INFINITY, NAN,  -NAN};
constexpr int kCount = sizeof kValues / sizeof *kValues;

static void check_selections() {
  for (int i = 0; i < kCount; ++i)
    for (int j = 0; j < kCount; ++j) {
      float a[W], b[W], max[W], raised[W], finite[W];
      for (int lane = 0; lane < W; ++lane) a[lane] = kValues[(i + lane) % kCount], b[lane] = kValues[(j + 2 * lane) % kCount];
      const reg x = FloatVec::load(a), y = FloatVec::load(b);
      FloatVec::store(max, FloatVec::max(x, y));
      FloatVec::store(raised, FloatVec::raise(x, y, 8));
      FloatVec::store(finite, FloatVec::finite_max(x));
      for (int lane = 0; lane < W; ++lane) {
        const bool greater = FloatVec::greater(x, y) >> lane & 1;
        if (greater != (a[lane] > b[lane])) fail("greater", a[lane], b[lane], greater, a[lane] > b[lane]);
        const float larger = a[lane] > b[lane] ? a[lane] : b[lane], moved = b[lane] > a[lane] + 8 ? b[lane] : a[lane];
        const float known = a[lane] == -INFINITY ? 0 : a[lane];
        if (!same(max[lane], larger)) fail("max", a[lane], b[lane], max[lane], larger);
        if (!same(raised[lane], moved)) fail("raise", a[lane], b[lane], raised[lane], moved);
        if (!same(finite[lane], known)) fail("finite_max", a[lane], 0, finite[lane], known);
      }
    }
}

static void check_reductions() {
  for (int lane = 0; lane < W; ++lane) {
    float x[W];
    for (int i = 0; i < W; ++i) x[i] = float(-2 - i);
    x[lane] = -1;
    const float max = FloatVec::reduce_max(FloatVec::load(x));
    if (max != -1) fail("reduce_max", lane, 0, max, -1);
    for (int i = 0; i < W; ++i) x[i] = i == lane ? 0 : float(1 << i);
    const float sum = FloatVec::reduce_add(FloatVec::load(x)), want = float((1 << W) - 1 - (1 << lane));
    if (sum != want) fail("reduce_add", lane, 0, sum, want);
    for (float a : kValues)
      for (float b : kValues) {
        for (int i = 0; i < W; ++i) x[i] = 1;
        x[lane] = a;
        const reg left = FloatVec::load(x);
        x[lane] = b;
        const bool different = FloatVec::any_different(left, FloatVec::load(x)), expected = !(a == b);
        if (different != expected) fail("any_different", a, b, different, expected);
      }
  }
}

static void check_16_bits() {
  auto half = [](uint32_t i) { return uint16_t(i); };
  auto load_bf16 = [](const uint16_t* in, float* out) { FloatVec::store(out, FloatVec::load_bf16(in)); };
  auto load_f16 = [](const uint16_t* in, float* out) { FloatVec::store(out, FloatVec::load_f16(in)); };
  auto store_bf16 = [](const float* in, uint16_t* out) { FloatVec::store_bf16(out, FloatVec::load(in)); };
  auto store_f16 = [](const float* in, uint16_t* out) { FloatVec::store_f16(out, FloatVec::load(in)); };
  check<float>("load_bf16", 1 << 16, half, load_bf16, [](uint16_t h, float got) { return same(got, bf16_to_float(h)); });
  check<float>("load_f16", 1 << 16, half, load_f16, [](uint16_t h, float got) {
    const uint32_t want = float_bits(f16_to_float(h)), quiet = (h & 0x7fff) > 0x7c00 ? 0x400000 : 0;
    return float_bits(got) == want || float_bits(got) == (want | quiet);
  });

  // Around every bf16 value and every middle of two.
  static constexpr uint32_t kAround[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
  auto near_bf16 = [](uint32_t i) { return bits_float(i / 6 << 16 | kAround[i % 6]); };
  check<uint16_t>("store_bf16", 6 << 16, near_bf16, store_bf16, [](float x, uint16_t got) {
#if defined(DPOFAST_AVX512_BF16)
    if (std::fabs(x) < 1.17549435e-38f) return got == (float_bits(x) >> 16 & 0x8000);  // the instruction has no subnormals
#endif
    return got == float_to_bf16(x);
  });
  // The same for fp16, infinity as if it were the next value; then everything else.
  auto near_f16 = [](uint32_t i) {
    const uint16_t h = uint16_t(i / 6);
    const float here = f16_to_float(h), sign = h & 0x8000 ? -1.f : 1.f;
    const float next = (h & 0x7fff) == 0x7bff ? 65536 * sign : f16_to_float(uint16_t(h + 1));
    return bits_float(float_bits(i % 6 < 3 ? here : (here + next) / 2) + i % 3 - 1);
  };
  check<uint16_t>("store_f16", 6 << 16, near_f16, store_f16, [](float x, uint16_t got) { return got == float_to_f16(x); });
  auto any_float = [](uint32_t i) { return bits_float(i * 10007u); };
  check<uint16_t>("store_f16", 0xffffffffu / 10007u, any_float, store_f16,
                  [](float x, uint16_t got) { return got == float_to_f16(x); });
}

static int vector_failures(const char* name) {
  isa = name;
  check_exp_and_tanh();
  check_selections();
  check_reductions();
  check_16_bits();
  return failures;
}
