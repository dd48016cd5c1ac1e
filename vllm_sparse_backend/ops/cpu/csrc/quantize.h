// Keys to integer codes, once per call for all q blocks.
//
// Per kv head: the keys' mean over the whole context is taken off (it adds the same to every
// score of a query row, so it is added back there), then every kSub keys share one step,
// max |k - mean| / (127 or 7), and are rounded to nearest even. SALE (arXiv 2505.24179).
#pragma once

#include "pack.h"

namespace vsb {
namespace VSB_ISA_NAME {

constexpr int kMaxHeadDim = 256;
constexpr float kCodeMax[2] = {127, 7};  // 8 and 4 bits

// x * inverse, rounded to the nearest code. The clamping lies between the product and the
// rounding so that the compiler makes no fused multiply-add of them: in 16-bit inputs half a
// step is common, and which way it goes must not depend on bits that fp32 products lack.
VSB_INLINE vi to_codes(vf x, float inverse, float limit) {
  return round_to_int(max(min(x * inverse, splat(limit)), splat(-limit)));
}

// In double: the sums of 16-bit inputs are then exact, whatever the order.
template <class T>
void sum_keys(const VsbProblem &p, const KvHead &kv, int32_t page) {
  const int D = p.head_dim, subs = p.page_size / kSub;
  double *sums = kv.page_sums + (int64_t)page * D;
  alignas(64) float keys[kMaxHeadDim * kSub];
  for (int d = 0; d < D; d++) sums[d] = 0;
  for (int s = page * subs; s < (page + 1) * subs && s * kSub < kv.request->seq_len; s++) {
    unpack_keys(tile_address<T>(p, kv, s), p, keys);
    for (int d = 0; d < D; d++) {
      double sum = 0;
      for (int n = 0; n < kSub; n++) sum += keys[d * kSub + n];
      sums[d] += sum;
    }
  }
}

// One tile's codes from its centred keys, [head_dim][kSub].
VSB_INLINE void encode(const float *keys, int head_dim, float inverse, float limit, int8_t *codes,
                       int32_t *row_shift) {
  constexpr int depth = kCodeDepth;
  vi sums[kSub / kLanes] = {};
  for (int d = 0; d < head_dim; d += depth)
    for (int w = 0; w < kSub; w += kLanes) {
      int8_t *out = codes + d * kSub + w * depth;
      vi word = {};  // the depth codes of each key, first channel lowest
      for (int j = 0; j < depth; j++) {
        const vi c = to_codes(load(keys + (d + j) * kSub + w), inverse, limit);
        sums[w / kLanes] += c;
        word |= (c & 0xff) << (8 * j);
      }
      if (depth == 4)
        store_as(out, word);
      else
        store_as(out, __builtin_convertvector(word, vh));
    }
  for (int w = 0; w < kSub; w += kLanes) store_as(row_shift + w, sums[w / kLanes] * kRowShift);
}

template <class T>
void quantize_keys(const VsbProblem &p, const KvHead &kv, int32_t page) {
  const int D = p.head_dim, subs = p.page_size / kSub;
  alignas(64) float keys[kMaxHeadDim * kSub];
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
    float bound = 0, bad = 0;
    for (int n = 0; n < at.valid; n++) {
      const float m = most[n / kLanes][n % kLanes];
      bound = m > bound ? m : bound;
      bad += poison[n / kLanes][n % kLanes];
    }
    for (int i = 0; i < 2; i++) {
      const KeyCodes &out = kv.codes[i];
      if (!out.codes) continue;
      const float inverse = bound > 0 ? kCodeMax[i] / bound : 0;
      encode(keys, D, inverse, kCodeMax[i], out.codes + (int64_t)s * kSub * D,
             out.row_shift + s * kSub);
      // Keys beyond the context hold -mean: their codes must not reach a limit by chance, and
      // cannot, because such a tile is the diagonal's and never scored.
      out.inverse_step[s] = 1 / (bound / kCodeMax[i]) + bad;
    }
  }
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
