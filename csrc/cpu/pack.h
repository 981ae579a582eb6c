// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// Moving matrices into the shapes that gemm.h wants, converting to the product's element type on the way.
#pragma once

// out[i] = src[offset + i * stride] for i < n, and zeros up to n_padded.
template <class K>
static void read_row(const void* src, DType dtype, int64_t offset, int64_t stride, int64_t n, int64_t n_padded,
                     typename K::elem* out) {
  using E = typename K::elem;
  if (dtype == K::kElemType) {
    const E* p = static_cast<const E*>(src) + offset;
    if (stride == 1) std::memcpy(out, p, size_t(n) * sizeof(E));
    else
      for (int64_t i = 0; i < n; ++i) out[i] = p[i * stride];
  } else if constexpr (K::unit == 1) {  // the bf16 product is chosen only where both sides are bf16
    switch (dtype) {
      case DType::f32: {
        const float* p = static_cast<const float*>(src) + offset;
        for (int64_t i = 0; i < n; ++i) out[i] = E(p[i * stride]);
        break;
      }
      case DType::f64: {
        const double* p = static_cast<const double*>(src) + offset;
        for (int64_t i = 0; i < n; ++i) out[i] = E(p[i * stride]);
        break;
      }
      case DType::bf16: {
        const uint16_t* p = static_cast<const uint16_t*>(src) + offset;
        int64_t i = 0;
        if (stride == 1)
          for (; i + K::Vec::W <= n; i += K::Vec::W) K::Vec::store(out + i, K::Vec::load_bf16(p + i));
        for (; i < n; ++i) out[i] = E(bf16_to_float(p[i * stride]));
        break;
      }
      case DType::f16: {
        const uint16_t* p = static_cast<const uint16_t*>(src) + offset;
        int64_t i = 0;
        if (stride == 1)
          for (; i + K::Vec::W <= n; i += K::Vec::W) K::Vec::store(out + i, K::Vec::load_f16(p + i));
        for (; i < n; ++i) out[i] = E(f16_to_float(p[i * stride]));
        break;
      }
    }
  }
  for (int64_t i = n; i < n_padded; ++i) out[i] = E(0);
}

// dst[i] = src[i] in `dtype`, for i < n.
template <class K>
DPOFAST_NOINLINE static void write_row(void* dst, DType dtype, int64_t offset, const typename K::acc* src, int64_t n) {
  using V = typename K::Vec;
  int64_t i = 0;
  switch (dtype) {
    case DType::f32: {
      float* p = static_cast<float*>(dst) + offset;
      for (; i < n; ++i) p[i] = float(src[i]);
      break;
    }
    case DType::f64: {
      double* p = static_cast<double*>(dst) + offset;
      for (; i < n; ++i) p[i] = double(src[i]);
      break;
    }
    case DType::bf16: {
      uint16_t* p = static_cast<uint16_t*>(dst) + offset;
      for (; i + V::W <= n; i += V::W) V::store_bf16(p + i, V::load(src + i));
      for (; i < n; ++i) p[i] = float_to_bf16(float(src[i]));
      break;
    }
    case DType::f16: {
      uint16_t* p = static_cast<uint16_t*>(dst) + offset;
      for (; i + V::W <= n; i += V::W) V::store_f16(p + i, V::load(src + i));
      for (; i < n; ++i) p[i] = float_to_f16(float(src[i]));
      break;
    }
  }
}

// Row `t` of a matrix becomes column `t` of a B panel: b[k / unit][t][k % unit] = row[k].
template <class K>
DPOFAST_NOINLINE static void put_column(typename K::elem* b, int64_t ldb, int64_t t, const typename K::elem* row,
                                        int64_t k_padded) {
  for (int64_t k = 0; k < k_padded; k += K::unit)
    for (int u = 0; u < K::unit; ++u) b[k * ldb + t * K::unit + u] = row[k + u];
}

// Row `k` of a matrix becomes row `k` of B panels of `width` columns each: the panels stand `panel_size` apart.
template <class K>
DPOFAST_NOINLINE static void put_row(typename K::elem* b, int64_t width, int64_t panel_size, int64_t k,
                                     const typename K::elem* row, int64_t n) {
  for (int64_t c0 = 0; c0 < n; c0 += width, b += panel_size) {
    const int64_t m = n - c0 < width ? n - c0 : width;
    typename K::elem* to = b + (k - k % K::unit) * width + k % K::unit;
    for (int64_t c = 0; c < m; ++c) to[c * K::unit] = row[c0 + c];
  }
}

// out[c][r] = in[r][c] for r < rows, c < cols.
template <class K>
DPOFAST_NOINLINE static void transpose(const typename K::elem* in, int64_t ld_in, int64_t rows, int64_t cols,
                                       typename K::elem* out, int64_t ld_out) {
  const int64_t r_tiles = rows / K::kTransposed * K::kTransposed, c_tiles = cols / 16 * 16;
  for (int64_t c = 0; c < c_tiles; c += 16)
    for (int64_t r = 0; r < r_tiles; r += K::kTransposed)
      K::transpose_tile(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out);
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = c < c_tiles ? r_tiles : 0; r < rows; ++r) out[c * ld_out + r] = in[r * ld_in + c];
}
