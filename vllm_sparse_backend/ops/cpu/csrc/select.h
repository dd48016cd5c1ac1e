// Which tiles a head keeps beyond sink and local window.
#pragma once

#include "products.h"
#include "score.h"

namespace vsb {
namespace VSB_ISA_NAME {

// Always-kept tiles are a prefix and a suffix: [0, sink) and [local, subs), in packed tiles.
struct Window {
  int32_t sink, local, subs;
};

inline Window window_of(const VsbPolicy &policy, int32_t seq_len, int32_t a0, int32_t end) {
  const int32_t subs = ceil_div(end, kSub), per_tile = policy.tile / kSub;
  if (policy.selector == VSB_DENSE || (is_scored(policy) && policy.tau == 0) ||
      !is_followed(policy, seq_len))
    return {subs, subs, subs};
  int32_t local = policy.local;
  if (policy.selector == VSB_STATIC) local += (int32_t)(policy.growth * (double)end);
  const int32_t from = larger(0, a0 - local) / policy.tile * per_tile;
  const int32_t sink = smaller(subs, ceil_div(policy.sink, policy.tile) * per_tile);
  return {sink, larger(sink, from), subs};
}

// Query rows of one head and q block, in place.
template <class T>
struct Rows {
  const T *q;  // row r at q + r * stride
  int64_t stride;
  int32_t first, count;  // absolute position of the first, 1 to kQBlock
};

// One row's codes as the lane of its group. Returns the size of a code's unit.
VSB_INLINE float encode_row(const float *q, int head_dim, float limit, int shift, int32_t *lane) {
  vf most = {};
  for (int d = 0; d < head_dim; d += kLanes) most = max(abs(load(q + d)), most);
  const float bound = hmax(most), inverse = bound > 0 ? limit / bound : 0;
  alignas(64) uint8_t codes[kMaxHeadDim];
  for (int d = 0; d < head_dim; d += kLanes)
    store_as(codes + d, __builtin_convertvector(to_codes(load(q + d), inverse, limit) + shift, vb));
  for (int step = 0; step < head_dim / 4; step++)
    memcpy(lane + step * kRowGroup, codes + 4 * step, 4);
  return bound / limit;
}

// Whether the row at `place` in its q block is one of 64 / stride that are spread over it evenly,
// its first and its last among them: so that of a question of a few tokens more than the stride
// some row is scored in each q block that it touches.
inline bool is_sampled(int place, int stride) {
  const int gaps = kQBlock / stride - 1, last = kQBlock - 1;
  return ((place * gaps + last / 2) / last * last + gaps / 2) / gaps == place;
}

// The threshold of a q block: `tau` where 8192 tokens of context end, and a power law around that.
inline float tau_of(const VsbPolicy &policy, int32_t first) {
  if (policy.tau_slope == 0) return policy.tau;
  const int32_t context = first / kQBlock * kQBlock + kQBlock;
  return (float)(policy.tau * __builtin_pow(context / 8192.0, policy.tau_slope));
}

// The rows a policy scores: those that are sampled, the first and the last there is of the q block,
// and all of the step's tail.
//
//   log2(exp(s - m) / (tau l)) = product * step_q * step_k * base2 + q.mean * base2 - m2 - log2(tau
//   l)
//
// with base2 = scale * log2(e) and m2 = m * log2(e). A row that cannot be judged, because of a
// NaN in its threshold, hits every tile.
template <int Bits, class T>
void encode_rows(const VsbProblem &p, const KvHead &kv, const VsbPolicy &policy,
                 const Rows<T> &rows, const float *maxima, const float *sums, ScoredRows &out) {
  const int D = p.head_dim;
  const float base2 = p.scale * 1.44269504f, unit = 8388608.0f;  // 2^23
  const int32_t tail = kv.request->seq_len - policy.tail;
  const float tau = tau_of(policy, rows.first);
  int scored = 0;
  for (int r = 0; r < rows.count; r++) {
    const int32_t position = rows.first + r;
    const bool edge = r == 0 || r == rows.count - 1;
    if (!edge && position < tail && !is_sampled(position % kQBlock, policy.row_stride)) continue;
    alignas(64) float x[kMaxHeadDim];
    vf mean = {};
    for (int d = 0; d < D; d += kLanes) {
      const vf part = load(rows.q + r * rows.stride + d);
      mean += part * load(kv.mean + d);
      store(x + d, part);
    }
    const int group = scored / kRowGroup, lane = scored % kRowGroup;
    const float step = encode_row(x, D, Codes<Bits>::kQueryMax, Codes<Bits>::kShift,
                                  out.codes + group * kRowGroup * D / 4 + lane);
    const float offset = hsum(mean) * base2 - maxima[r] - __builtin_log2f(tau * sums[r]);
    const float scale = step * base2 * unit;
    const bool judged = offset == offset && scale * 0 == 0;
    out.scale[scored] = judged ? scale : 0;
    // Bounded only so that its bits are finite: where keys that a row does not see lift the mean
    // far above its maximum, it is the products that bring the keys that it does see back down.
    const float bounded = offset > 1e30f ? 1e30f : offset < -1e30f ? -1e30f : offset;
    out.offset[scored++] = kOne + (judged ? bounded : 100) * unit;
  }
  out.groups = ceil_div(scored, kRowGroup);
  for (; scored < out.groups * kRowGroup; scored++) {
    out.scale[scored] = 0;
    out.offset[scored] = 0;
    for (int step = 0; step < D / 4; step++)
      out.codes[(scored / kRowGroup * D / 4 + step) * kRowGroup + scored % kRowGroup] = 0;
  }
}

template <int Bits, class Rule>
void mark_tiles(const VsbProblem &p, const KeyCodes &keys, const VsbPolicy &policy,
                const ScoredRows &rows, const Window &window, uint8_t *keep) {
  const int per_tile = policy.tile / kSub;
  for (int sub = window.sink; sub < window.local; sub += per_tile) {
    const int subs = smaller(per_tile, window.local - sub);
    bool hit = false;
    for (int s = sub; s < sub + subs; s++) hit |= !(keys.step[s] * 0 == 0);
    for (int group = 0; group < rows.groups && !hit; group++)
      hit = group_hits<Bits, Rule>(rows, group, keys, p.head_dim, sub, subs);
    if (hit) memset(keep + sub, 1, subs);
  }
}

// SALE (any scored element with exp(s - m) / l > tau) or MASS (any scored row's sum of them over
// the tile), m and l over sink and local tiles, here of base-2 scores. Sets keep[sub] in the
// window's gap.
template <int Bits, class T>
void select_scored(const VsbProblem &p, const KvHead &kv, const VsbPolicy &policy,
                   const Rows<T> &rows, const Window &window, const float *maxima,
                   const float *sums, ScoredRows &scratch, uint8_t *keep) {
  const KeyCodes &keys = kv.codes[Codes<Bits>::kIndex];
  encode_rows<Bits>(p, kv, policy, rows, maxima, sums, scratch);
  if (policy.selector == VSB_MASS)
    mark_tiles<Bits, MassRule>(p, keys, policy, scratch, window, keep);
  else
    mark_tiles<Bits, PeakRule>(p, keys, policy, scratch, window, keep);
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
