// Which tiles a head keeps beyond sink and local window.
#pragma once

#include "products.h"
#include "quantize.h"

namespace vsb {
namespace VSB_ISA_NAME {

// Query rows of one head and q block.
struct Rows {
  const int32_t *words;  // [count][words per row]
  int32_t first, count;  // absolute position of the first, 1 to kQBlock
};

// Always-kept tiles are a prefix and a suffix: [0, sink) and [local, subs), in packed tiles.
struct Window {
  int32_t sink, local, subs;
};

inline Window window_of(const VsbPolicy &policy, int32_t a0, int32_t end) {
  const int32_t subs = ceil_div(end, kSub), per_tile = policy.tile / kSub;
  if (policy.selector == VSB_DENSE || (policy.selector == VSB_SALE && policy.tau == 0))
    return {subs, subs, subs};
  int32_t local = policy.local;
  if (policy.selector == VSB_STATIC) local += (int32_t)(policy.growth * (double)end);
  const int32_t from = larger(0, a0 - local) / policy.tile * per_tile;
  const int32_t sink = smaller(subs, ceil_div(policy.sink, policy.tile) * per_tile);
  return {sink, larger(sink, from), subs};
}

constexpr int kMaxScored = kQBlock;

struct SelectScratch {
  alignas(64) row_code codes[kMaxScored * kMaxHeadDim];
  alignas(64) float limits[kMaxScored];  // a row's threshold in code products per key step
  alignas(64) int32_t tile_limits[kTilesAtOnce * kMaxScored];
};

// A row's codes: max |q| / (127 or 7) per step. Returns codes per unit, 0 for a row of zeros.
VSB_INLINE float encode_row(const float *q, int head_dim, float limit, row_code *codes) {
  float bound = 0;
  for (int d = 0; d < head_dim; d++) {
    const float a = q[d] < 0 ? -q[d] : q[d];
    bound = a > bound ? a : bound;
  }
  const float inverse = bound > 0 ? limit / bound : 0;
  for (int d = 0; d < head_dim; d += kLanes) {
    const vi c = to_codes(load(q + d), inverse, limit);
    for (int i = 0; i < kLanes; i++) codes[d + i] = (row_code)(c[i] + kRowShift);
  }
  return bound / limit;
}

// SALE: any scored element with exp(s - m) / l > tau, m and l over sink and local tiles.
//
//   scale * (step_q * step_k * product + q.mean) > m + ln(tau * l)
//   <=> product > limit / step_k,  limit = ((m + ln(tau * l)) / scale - q.mean) / step_q
//
// `maxima` and `sums` are of base-2 scores s * scale * log2(e). Sets keep[sub] in the window's
// gap. A limit that is NaN keeps the tile: what cannot be judged is computed.
template <class T>
void select_sale(const VsbProblem &p, const KvHead &kv, const VsbPolicy &policy, const T *q,
                 int64_t q_row, const Rows &rows, const Window &window, const float *maxima,
                 const float *sums, SelectScratch &scratch, uint8_t *keep) {
  const int D = p.head_dim, which = policy.bits == 4, steps = D / kCodeDepth;
  const KeyCodes &keys = kv.codes[which];
  const float base2 = p.scale * 1.44269504f;
  int scored = 0;
  const int32_t tail = kv.request->seq_len - policy.tail;
  for (int r = 0; r < rows.count; r++) {
    const int32_t position = rows.first + r;
    if (position % policy.row_stride && position < tail && r != rows.count - 1) continue;
    alignas(64) float x[kMaxHeadDim];
    vf mean = {};
    for (int d = 0; d < D; d += kLanes) {
      const vf part = load(q + r * q_row + d);
      mean += part * load(kv.mean + d);
      store(x + d, part);
    }
    const float step = encode_row(x, D, kCodeMax[which], scratch.codes + scored * D);
    const float threshold = maxima[r] + __builtin_log2f(policy.tau * sums[r]);
    scratch.limits[scored++] = (threshold / base2 - hsum(mean)) / step;
  }
  const int padded = (scored + kLanes - 1) / kLanes * kLanes;
  for (int r = scored; r < padded; r++) scratch.limits[r] = 0;

  const int per_tile = policy.tile / kSub;
  for (int sub = window.sink; sub < window.local; sub += kTilesAtOnce) {
    const int tiles = smaller(kTilesAtOnce, window.local - sub);
    for (int t = 0; t < tiles; t++)
      for (int r = 0; r < padded; r += kLanes) {
        const vf low = splat(-1073741824.0f), high = -low;
        vf limit = load(scratch.limits + r) * keys.inverse_step[sub + t];
        limit = limit > low ? min(limit, high) : low;  // NaN: low
        store_as(scratch.tile_limits + t * kMaxScored + r, floor_to_int(limit));
      }
    vi hits[kTilesAtOnce * kVectors] = {};
    for (int r = 0; r < scored; r += kRows)
      with_sizes(scored - r, tiles, [&]<int R, int N>() {
        code_hits<R, N>((const int32_t *)(scratch.codes + r * D), steps,
                        keys.codes + (int64_t)sub * kSub * D, kSub * D, steps,
                        keys.row_shift + sub * kSub, scratch.tile_limits + r, kMaxScored, hits);
      });
    for (int t = 0; t < tiles; t++) {
      vi hit = hits[t * kVectors];
      for (int v = 1; v < kVectors; v++) hit |= hits[t * kVectors + v];
      if (!any(hit)) continue;
      const int first = (sub + t) / per_tile * per_tile;
      for (int i = first; i < smaller(first + per_tile, window.local); i++) keep[i] = 1;
    }
  }
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
