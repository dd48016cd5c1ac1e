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

// What one head computes of a q block.
struct Choice {
  const VsbPolicy *policy;
  Window window;
  uint8_t *keep;    // [packed tiles]: of the next pass
  ScoredRows rows;  // by which the tiles between sink and local window are judged
};

inline Window window_of(const VsbPolicy &policy, int32_t seq_len, int32_t a0, int32_t end) {
  const int32_t subs = ceil_div(end, kSub), per_tile = policy.tile / kSub;
  if (policy.selector == VSB_DENSE || (is_scored(policy) && policy.tau == 0) ||
      !is_followed(policy, seq_len))
    return {subs, subs, subs};
  const int32_t local = policy.local + (int32_t)((int64_t)policy.growth * (a0 + kQBlock) >> 16);
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
template <int Bits>
VSB_INLINE float encode_row(const float *q, int head_dim, int32_t *lane) {
  constexpr float limit = Codes<Bits>::kQueryMax;
  constexpr int shift = Codes<Bits>::kShift;
  vf most = {};
  for (int d = 0; d < head_dim; d += kLanes) most = max(abs(load(q + d)), most);
  const float bound = hmax(most), inverse = bound > 0 ? limit / bound : 0;
  alignas(64) uint8_t codes[kMaxHeadDim];
  for (int d = 0; d < head_dim; d += kLanes)
    store_as(codes + d,
             __builtin_convertvector(to_codes<Bits>(load(q + d), inverse, limit) + shift, vb));
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

// Into choice.rows the rows that its policy scores: those that are sampled, the first and the last
// there is of the q block, and all of the prompt's tail. Maxima and sums are those of sink and
// local tiles, of base-2 scores.
//
//   log2(exp(s - m) / (tau l)) = product * step_q * step_k * base2 + q.mean * base2 - m2 - log2(tau
//   l)
//
// with base2 = scale * log2(e) and m2 = m * log2(e). A row that cannot be judged, because of a
// NaN in its threshold, hits every tile.
template <int Bits, class T>
void encode_rows_in(const VsbProblem &p, const KvHead &kv, const Rows<T> &rows, const float *maxima,
                    const float *sums, Choice &choice) {
  const VsbPolicy &policy = *choice.policy;
  ScoredRows &out = choice.rows;
  const int D = p.head_dim;
  const float base2 = p.scale * 1.44269504f, unit = 8388608.0f;  // 2^23
  const int32_t tail = kv.request->prompt_len - policy.tail;
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
    const float step = encode_row<Bits>(x, D, out.codes + group * kRowGroup * D / 4 + lane);
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

template <class T>
void encode_rows(const VsbProblem &p, const KvHead &kv, const Rows<T> &rows, const float *maxima,
                 const float *sums, Choice &choice) {
  const int bits = choice.policy->bits;
  auto encode = bits == 8   ? encode_rows_in<8, T>
                : bits == 6 ? encode_rows_in<6, T>
                : bits == 4 ? encode_rows_in<4, T>
                            : encode_rows_in<VSB_FP4, T>;
  encode(p, kv, rows, maxima, sums, choice);
}

constexpr int kHeadsAtOnce = 8;  // heads judged in one walk over the keys

// Marks the tiles of `count` heads that judge by the same rule: SALE (any scored element with
// exp(s - m) / l > tau) or MASS (any scored row's sum of them over the tile).
template <int Bits, class Rule>
void mark_tiles(const VsbProblem &p, const KvHead &kv, Choice *const *choices, int count) {
  const KeyCodes &keys = kv.codes[Codes<Bits>::kIndex];
  // The heads' first groups, then their second ones: two that are scored together are of two
  // heads, where there are two, so that neither waits in vain for a hit of the other.
  constexpr int kMostGroups = kHeadsAtOnce * kQBlock / kRowGroup;
  RowGroup groups[kMostGroups];
  int head_of[kMostGroups], num_groups = 0;
  int32_t sub = choices[0]->window.sink, stop = 0;
  for (int i = 0; i < count; i++) {
    sub = smaller(sub, choices[i]->window.sink);
    stop = larger(stop, choices[i]->window.local);
  }
  for (int g = 0; g < kQBlock / kRowGroup; g++)
    for (int i = 0; i < count; i++) {
      const ScoredRows &rows = choices[i]->rows;
      if (g >= rows.groups) continue;
      head_of[num_groups] = i;
      groups[num_groups++] = {rows.codes + g * kRowGroup * p.head_dim / 4,
                              rows.scale + g * kRowGroup, rows.offset + g * kRowGroup};
    }
  const int per_tile = choices[0]->policy->tile / kSub;
  for (; sub < stop; sub += per_tile) {
    const int subs = smaller(per_tile, stop - sub);
    unsigned hits = 0;  // a bit for each head
    for (int s = sub; s < sub + subs; s++)
      if (!(keys.step[s] * 0 == 0)) hits = ~0u;
    for (int g = 0; g < num_groups; g += kGroupsAtOnce) {
      const int others = num_groups - g > 1 ? kGroupsAtOnce - 1 : 0;
      const unsigned first = 1u << head_of[g], last = 1u << head_of[g + others];
      if (hits & first && hits & last) continue;
      const unsigned hit =
          others ? groups_hit<Bits, Rule, kGroupsAtOnce>(groups + g, keys, p.head_dim, sub, subs)
                 : groups_hit<Bits, Rule, 1>(groups + g, keys, p.head_dim, sub, subs);
      if (hit & 1) hits |= first;
      if (hit & 2) hits |= last;
    }
    if (!hits) continue;
    for (int i = 0; i < count; i++)
      if (hits >> i & 1 && sub >= choices[i]->window.sink && sub < choices[i]->window.local)
        memset(choices[i]->keep + sub, 1, subs);
  }
}

template <class Rule>
auto mark_tiles_for(int bits) {
  return bits == 8   ? mark_tiles<8, Rule>
         : bits == 6 ? mark_tiles<6, Rule>
         : bits == 4 ? mark_tiles<4, Rule>
                     : mark_tiles<VSB_FP4, Rule>;
}

// Sets `keep` in the gap between each head's sink and local window. Heads without rows to judge by
// keep nothing there.
inline void select_scored(const VsbProblem &p, const KvHead &kv, Choice *choices, int group) {
  for (int g = 0; g < group; g++) {
    if (choices[g].rows.groups == 0) continue;
    const VsbPolicy &policy = *choices[g].policy;
    Choice *alike[kHeadsAtOnce];
    int count = 0;
    for (int i = g; i < group && count < kHeadsAtOnce; i++) {
      const VsbPolicy &other = *choices[i].policy;
      if (choices[i].rows.groups && other.selector == policy.selector &&
          other.bits == policy.bits && other.tile == policy.tile)
        alike[count++] = choices + i;
    }
    auto mark = policy.selector == VSB_MASS ? mark_tiles_for<MassRule>(policy.bits)
                                            : mark_tiles_for<PeakRule>(policy.bits);
    mark(p, kv, alike, count);
    for (int i = 0; i < count; i++) alike[i]->rows.groups = 0;
  }
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
