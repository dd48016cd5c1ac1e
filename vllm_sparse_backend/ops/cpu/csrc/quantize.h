// Keys to integer codes, once per call for all q blocks.
//
// Per kv head: the keys' mean over the whole context is taken off (it adds the same to every
// score of a query row, so it is added back there), then every kSub keys share one step,
// max |k - mean| / (127, 31, 7 or 12), and are rounded to nearest even. SALE (arXiv 2505.24179).
#pragma once

#include "pack.h"

namespace vsb {
namespace VSB_ISA_NAME {

constexpr int kMaxHeadDim = 256;

// Codes of a policy's `bits`. The queries' are kept so small that, once shifted to be unsigned,
// two products with a key's fit in 16 bits, as do kRun times two.
template <int Bits>
struct Codes;
template <>
struct Codes<8> {
  static constexpr int kIndex = 0, kShift = 64, kRun = 1;
  static constexpr float kQueryMax = 63, kKeyMax = 127;
};
template <>
struct Codes<6> {
  static constexpr int kIndex = 1, kShift = 32, kRun = 8;
  static constexpr float kQueryMax = 31, kKeyMax = 31;
};
template <>
struct Codes<4> {
  static constexpr int kIndex = 2, kShift = 8, kRun = 64;
  static constexpr float kQueryMax = 7, kKeyMax = 7;
};
template <>
struct Codes<VSB_FP4> {
  static constexpr int kIndex = 3, kShift = 16, kRun = 32;
  static constexpr float kQueryMax = 12, kKeyMax = 12;
};

// x * inverse, rounded to the nearest code. The clamping lies between the product and the
// rounding so that the compiler makes no fused multiply-add of them: in 16-bit inputs half a
// step is common, and which way it goes must not depend on bits that fp32 products lack.
template <int Bits>
VSB_INLINE vi to_codes(vf x, float inverse, float limit) {
  const vf scaled = max(min(x * inverse, splat(limit)), splat(-limit));
  if constexpr (Bits != VSB_FP4) return round_to_int(scaled);
  // Two codes between powers of two: even numbers from 4 on, multiples of 4 from 8 on.
  const vi from_4 = abs(scaled) >= splat(4.0f), from_8 = abs(scaled) >= splat(8.0f);
  const vf per_unit = from_8 ? splat(0.25f) : from_4 ? splat(0.5f) : splat(1.0f);
  return round_to_int(scaled * per_unit) << -(from_4 + from_8);
}

// The keys of a page summed, in double: of 16-bit inputs the sums are then exact, whatever the
// order.
template <class T>
void sum_keys(const VsbProblem &p, const KvHead &kv, int32_t page) {
  typedef double vd __attribute__((vector_size(8 * VSB_LANES)));
  const int D = p.head_dim, N = p.page_size;
  const int valid = smaller(N, kv.request->seq_len - page * N);
  double *sums = kv.page_sums + (int64_t)page * D;
  auto add = [](const vd &sum, double *to) {
    for (int i = 0; i < kLanes; i++) *to += sum[i];
  };
  for (int d = 0; d < D; d++) sums[d] = 0;
  if (p.layout == VSB_VEC) {  // a channel's keys lie side by side
    const T *keys = tile_address<T>(p, kv, page * (N / kSub)).keys;
    for (int d = 0; d < D; d++, keys += N) {
      vd sum = {};
      int n = 0;
      for (; n + kLanes <= valid; n += kLanes) sum += __builtin_convertvector(load(keys + n), vd);
      add(sum, sums + d);
      if (n == valid) continue;
      const vf last = load(keys + n);
      for (int i = 0; n + i < valid; i++) sums[d] += last[i];
    }
    return;
  }
  alignas(64) float keys[kMaxHeadDim * kSub];
  for (int s = page * (N / kSub); s * kSub < page * N + valid; s++) {
    unpack_keys(tile_address<T>(p, kv, s), p, keys);
    for (int d = 0; d < D; d++)
      for (int w = 0; w < kSub; w += kLanes)
        add(__builtin_convertvector(load(keys + d * kSub + w), vd), sums + d);
  }
}

// One tile's codes from its centred keys, [head_dim][kSub]; `bound` is their largest magnitude.
template <int Bits>
VSB_INLINE void encode_keys(const float *keys, int head_dim, float bound, int sub,
                            const KeyCodes &out) {
  const float inverse = bound > 0 ? Codes<Bits>::kKeyMax / bound : 0;
  int8_t *codes = out.codes + (int64_t)sub * kSub * head_dim;
  vi sums[kSub / kLanes] = {};
  for (int d = 0; d < head_dim; d += 4)
    for (int w = 0; w < kSub; w += kLanes) {
      vi word = {};  // 4 codes of each key, first channel lowest
      for (int j = 0; j < 4; j++) {
        const vi c = to_codes<Bits>(load(keys + (d + j) * kSub + w), inverse, Codes<Bits>::kKeyMax);
        sums[w / kLanes] += c;
        word |= (c & 0xff) << (8 * j);
      }
      store_as(codes + d * kSub + w * 4, word);
    }
  for (int w = 0; w < kSub; w += kLanes)
    store_as(out.shifts + sub * kSub + w, sums[w / kLanes] * -Codes<Bits>::kShift);
  out.step[sub] = bound / Codes<Bits>::kKeyMax;
}

template <class T>
void quantize_keys(const VsbProblem &p, const KvHead &kv, int32_t page) {
  const int D = p.head_dim, subs = p.page_size / kSub;
  alignas(64) float keys[kMaxHeadDim * kSub];
  // All of the page at once: tile by tile its lines come in an order that nothing foresees.
  const char *first = (const char *)tile_address<T>(p, kv, page * subs).keys;
  for (int64_t i = 0; i < (int64_t)p.page_size * D * (int64_t)sizeof(T); i += 64)
    __builtin_prefetch(first + i);
  for (int s = page * subs; s < (page + 1) * subs && s * kSub < kv.request->seq_len; s++) {
    const TileAddress<T> at = tile_address<T>(p, kv, s);
    unpack_keys(at, p, keys);
    vf most[kSub / kLanes] = {}, poison[kSub / kLanes] = {};
    for (int d = 0; d < D; d++)
      for (int w = 0; w < kSub; w += kLanes) {
        vf x = load(keys + d * kSub + w) - kv.mean[d];
        most[w / kLanes] = max(abs(x), most[w / kLanes]);
        poison[w / kLanes] += x * 0;  // NaN once any key is not finite
        store(keys + d * kSub + w, x);
      }
    // Keys beyond the context hold -mean. They are the diagonal's, which is never scored.
    float bound = 0;
    for (int n = 0; n < at.valid; n++) {
      const float m = most[n / kLanes][n % kLanes];
      bound = m > bound ? m : bound;
    }
    for (int n = 0; n < at.valid; n++) bound += poison[n / kLanes][n % kLanes];
    if (kv.codes[0].codes) encode_keys<8>(keys, D, bound, s, kv.codes[0]);
    if (kv.codes[1].codes) encode_keys<6>(keys, D, bound, s, kv.codes[1]);
    if (kv.codes[2].codes) encode_keys<4>(keys, D, bound, s, kv.codes[2]);
    if (kv.codes[3].codes) encode_keys<VSB_FP4>(keys, D, bound, s, kv.codes[3]);
  }
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
