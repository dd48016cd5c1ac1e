// Vectors of VSB_LANES floats or int32s, and the few operations the kernels need.
//
// Arithmetic is GCC's vector extension, so that one source serves every width. What has no
// portable form is an intrinsic where the instruction set has it and a plain loop where it
// has not: the loops let a machine without AVX-512 run the AVX-512 code paths in tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#define VSB_INLINE inline __attribute__((always_inline))

namespace vsb {
namespace VSB_ISA_NAME {

constexpr int kLanes = VSB_LANES;
typedef float vf __attribute__((vector_size(4 * VSB_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * VSB_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * VSB_LANES)));
typedef int8_t vb __attribute__((vector_size(VSB_LANES)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class V, class T>
VSB_INLINE V load_as(const T *p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
VSB_INLINE void store_as(T *p, V v) {
  memcpy(p, &v, sizeof(V));
}
VSB_INLINE vf splat(float x) { return x - vf{}; }
VSB_INLINE vi splat(int32_t x) { return x - vi{}; }
// With a NaN the result is b. GCC makes two instructions of the plain form.
#if VSB_LANES == 8
VSB_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
VSB_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
VSB_INLINE vi max(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#elif defined(__AVX512F__)
VSB_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
VSB_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
VSB_INLINE vi max(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#else
VSB_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
VSB_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
VSB_INLINE vi max(vi a, vi b) { return a > b ? a : b; }
#endif
VSB_INLINE float abs(float a) { return __builtin_fabsf(a); }
VSB_INLINE vf abs(vf a) { return (vf)((vi)a & 0x7fffffff); }

// Lane i of the result is lane i ^ D of v.
template <int D>
VSB_INLINE vf swap_lanes(vf v) {
#if VSB_LANES == 16
  constexpr vi index = {0 ^ D, 1 ^ D, 2 ^ D,  3 ^ D,  4 ^ D,  5 ^ D,  6 ^ D,  7 ^ D,
                        8 ^ D, 9 ^ D, 10 ^ D, 11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D};
#else
  constexpr vi index = {0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D};
#endif
  return __builtin_shuffle(v, index);
}
VSB_INLINE float hmax(vf v) {
#if VSB_LANES == 16
  v = max(v, swap_lanes<8>(v));
#endif
  v = max(v, swap_lanes<4>(v));
  v = max(v, swap_lanes<2>(v));
  return max(v, swap_lanes<1>(v))[0];
}
VSB_INLINE float hsum(vf v) {
#if VSB_LANES == 16
  v += swap_lanes<8>(v);
#endif
  v += swap_lanes<4>(v);
  v += swap_lanes<2>(v);
  return (v + swap_lanes<1>(v))[0];
}
// True where any lane of a comparison's result is set.
VSB_INLINE bool any(vi mask) {
#if defined(__AVX512F__) && VSB_LANES == 16
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif VSB_LANES == 8
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t r = 0;
  for (int i = 0; i < kLanes; i++) r |= mask[i];
  return r != 0;
#endif
}

// kLanes consecutive values as floats.
VSB_INLINE vf load(const float *p) { return load_as<vf>(p); }
VSB_INLINE vf load(const bf16 *p) {
  return (vf)(__builtin_convertvector(load_as<vh>(p), vi) << 16);
}
VSB_INLINE vf load(const fp16 *p) {
#if VSB_LANES == 8
  return (vf)_mm256_cvtph_ps(load_as<__m128i>(p));
#elif defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load_as<__m256i>(p));
#else
  vf v;
  for (int i = 0; i < kLanes; i++) v[i] = _cvtsh_ss(p[i].bits);
  return v;
#endif
}
// Rounded to nearest even; a NaN stays one.
VSB_INLINE vh to_bf16(vf v) {
#if defined(__AVX512BF16__) && VSB_LANES == 16
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  typedef uint32_t vu __attribute__((vector_size(4 * VSB_LANES)));
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, vh);
#endif
}
VSB_INLINE void store(float *p, vf v) { store_as(p, v); }
VSB_INLINE void store(bf16 *p, vf v) { store_as(p, to_bf16(v)); }
VSB_INLINE void store(fp16 *p, vf v) {
#if VSB_LANES == 8
  store_as(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX512F__)
  store_as(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; i++) p[i].bits = _cvtss_sh(v[i], _MM_FROUND_TO_NEAREST_INT);
#endif
}

// Round to nearest even for |x| < 2^22.
VSB_INLINE vi round_to_int(vf x) {
  return (vi)(x + splat(12582912.0f)) - 0x4b400000;  // 1.5 * 2^23 and its bits
}
// 2^x for x < 127; 0 below 2^-126, NaN for NaN. Relative error 3e-6 (Exact: 1e-7):
// polynomials of degree 4 and 5, minimax in relative error on [-0.5, 0.5].
template <bool Exact>
VSB_INLINE vf exp2(vf x) {
  // 1.5 * 2^23 rounds x to an integer; 127 more and its bits end in the exponent of 2^x.
  const vf magic = splat(12583039.0f);
  const vf shifted = x + magic, whole = shifted - magic, f = x - whole;
  vf p;
  if (Exact) {
    p = splat(1.327647129e-3f) * f + 9.675541893e-3f;
    p = p * f + 5.550713092e-2f;
    p = p * f + 2.402212024e-1f;
    p = p * f + 6.931469440e-1f;
    p = p * f + 1.000000119f;
  } else {
    p = splat(9.570101276e-3f) * f + 5.591786280e-2f;
    p = p * f + 2.402474433e-1f;
    p = p * f + 6.931217909e-1f;
    p = p * f + 9.999992847e-1f;
  }
#if defined(__AVX512F__) && VSB_LANES == 16
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)whole);
#else
  // A product, since adding to p's exponent would make a number of some NaNs.
  const vf r = p * (vf)((vi)shifted << 23);
  return (vf)(~(x < -126.0f) & (vi)r);
#endif
}

// acc[i] += a[2i] b[2i] + a[2i+1] b[2i+1], pairs of bf16 in each 32-bit lane.
VSB_INLINE vf dot_bf16(vf acc, vi a, vi b) {
#if defined(__AVX512BF16__) && VSB_LANES == 16
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  vf even = (vf)(a << 16) * (vf)(b << 16);
  return acc + ((vf)(a & (int32_t)0xffff0000) * (vf)(b & (int32_t)0xffff0000) + even);
#endif
}

// Integer products for the selectors' scores: acc[i] + sum over 4 channels of rows[i] * key, where
// a lane of `rows` holds 4 unsigned codes of one query row and `key` 4 signed ones of one key.
#if VSB_INT8_DOT
VSB_INLINE vi dot_codes(vi acc, vi rows, int32_t key) {
#if defined(__AVX512VNNI__) && VSB_LANES == 16
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)rows, _mm512_set1_epi32(key));
#else
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < 4; j++)
      acc[i] += (int32_t)(uint8_t)(rows[i] >> (8 * j)) * (int32_t)(int8_t)(key >> (8 * j));
  return acc;
#endif
}
#else
// Without such an instruction the products of channel pairs are summed in 16 bits, for as many
// steps as cannot overflow, and then widened.
typedef int16_t vs __attribute__((vector_size(4 * VSB_LANES)));
VSB_INLINE vs dot_pairs(vi rows, int32_t key) {
#if VSB_LANES == 8
  return (vs)_mm256_maddubs_epi16((__m256i)rows, _mm256_set1_epi32(key));
#elif defined(__AVX512BW__)
  return (vs)_mm512_maddubs_epi16((__m512i)rows, _mm512_set1_epi32(key));
#else
  vs sums;
  for (int i = 0; i < 2 * kLanes; i++) {
    const int32_t row = rows[i / 2] >> (i % 2 * 16), code = key >> (i % 2 * 16);
    sums[i] = (int16_t)((uint8_t)row * (int8_t)code + (uint8_t)(row >> 8) * (int8_t)(code >> 8));
  }
  return sums;
#endif
}
VSB_INLINE vi widen_pairs(vs sums) {
#if VSB_LANES == 8
  return (vi)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
#elif defined(__AVX512BW__)
  return (vi)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1));
#else
  vi wide;
  for (int i = 0; i < kLanes; i++) wide[i] = sums[2 * i] + sums[2 * i + 1];
  return wide;
#endif
}
#endif

}  // namespace VSB_ISA_NAME
}  // namespace vsb
