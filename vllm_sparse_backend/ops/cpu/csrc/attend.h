// One work item: a q block of every query head that shares a kv head.
//
// First sink and local window with an online softmax; its maximum and sum are what a selector
// judges the other tiles by. Then the tiles it kept, continuing the same softmax. A tile is
// packed once for all heads of the group that keep it.
#pragma once

#include "peak.h"
#include "select.h"

namespace vsb {
namespace VSB_ISA_NAME {

constexpr int kPanelTiles = 8;   // tiles per softmax step of one head
constexpr int kBatchTiles = 16;  // tiles packed before the heads go through them
constexpr int kPanelKeys = kPanelTiles * kSub;
constexpr float kLowest = -3.40282347e38f;  // finite: a fully masked row meets no inf - inf
constexpr float kFused = 16777216.0f;       // 2^24

// What one head carries through the passes; scores are in base 2.
struct Head {
  int32_t *q;     // [kQBlock][words per row]
  float *out;     // [kQBlock][head_dim], not yet divided by the sum
  float *maxima;  // [kQBlock]
  float *sums;    // [kQBlock][kLanes], summed over lanes only at the end
  uint8_t *keep;  // [packed tiles]: what the next pass computes
  Window window;
};

struct Shared {      // of one thread
  float *scores;     // [kQBlock][kPanelKeys]
  int32_t *weights;  // [kQBlock][kPanelKeys], words
  int32_t *packed;   // [kBatchTiles][2 * kSub * head_dim]
  Head *heads;       // [group]
  ScoredRows *scored;
};

// Hands out 64-byte aligned pieces of a thread's scratch; with no base, only counts.
struct Carver {
  char *base;
  int64_t used = 0;
  template <class T>
  T *take(int64_t count) {
    T *piece = (T *)(base + used);
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

inline Shared carve(Carver &c, const VsbProblem &p, int32_t subs) {
  const int64_t group = p.num_heads / p.num_kv_heads, D = p.head_dim;
  Shared s;
  s.scores = c.take<float>(kQBlock * kPanelKeys);
  s.weights = c.take<int32_t>(kQBlock * kPanelKeys);
  s.packed = c.take<int32_t>(kBatchTiles * 2 * kSub * D);
  s.scored = c.take<ScoredRows>(1);
  s.heads = c.take<Head>(group);
  for (int g = 0; g < group; g++) {
    Head h = {};
    h.q = c.take<int32_t>(kQBlock * D);
    h.out = c.take<float>(kQBlock * D);
    h.maxima = c.take<float>(kQBlock);
    h.sums = c.take<float>(kQBlock * kLanes);
    h.keep = c.take<uint8_t>(subs);
    if (c.base) s.heads[g] = h;
  }
  return s;
}

inline int64_t scratch_bytes(const VsbProblem &p, int32_t longest) {
  Carver counter{nullptr};
  carve(counter, p, ceil_div(longest, kSub));
  return counter.used + 64;
}

// Scores of one panel to weights, in place of the row's softmax state. first_key[t] is the
// position of tile t's first key; `masked` if any key may lie after its query.
template <class C>
void softmax_panel(const Shared &s, Head &h, int rows, int tiles, int32_t first_row,
                   const int32_t *first_key, bool masked, float base2, float *decay) {
  const vf nothing = splat(-__builtin_inff());
  vi lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  for (int r = 0; r < rows; r++) {
    float *x = s.scores + r * kPanelKeys;
    if (masked)
      for (int i = 0; i < tiles * kSub; i += kLanes) {
        const vi key = lane + (first_key[i / kSub] + i % kSub);
        store(x + i, key <= first_row + r ? load(x + i) : nothing);
      }
    vf most = load(x);
    for (int i = kLanes; i < tiles * kSub; i += kLanes) most = max(load(x + i), most);
    const float old = h.maxima[r], now = hmax(most) * base2 > old ? hmax(most) * base2 : old;
    decay[r] = now == old ? 1.0f : exp2_nonpositive<C::kExact>(splat(old - now))[0];
    h.maxima[r] = now;
    vf scale = splat(base2);
    // A fused multiply-add would leave `now`'s rounding error in the exponent: beyond 2^24 that
    // may be any number of powers of two, so the products are rounded like it.
    if (now > kFused || now < -kFused) {
      for (int i = 0; i < tiles * kSub; i += kLanes) store(x + i, load(x + i) * scale);
      scale = splat(1.0f);
    }
    vf sum = load(h.sums + r * kLanes) * decay[r];
    for (int i = 0; i < tiles * kSub; i += kLanes) {
      const vf w = exp2_nonpositive<C::kExact>(load(x + i) * scale - now);
      sum += w;
      if constexpr (C::kPerWord == 2)
        store((bf16 *)(s.weights + r * kPanelKeys) + i, w);
      else
        store((float *)(s.weights + r * kPanelKeys) + i, w);
    }
    store(h.sums + r * kLanes, sum);
  }
}

template <class C>
void attend_panel(const VsbProblem &p, const Shared &s, Head &h, int rows, int32_t first_row,
                  const Tile *tiles, const int32_t *first_key, int count) {
  const int D = p.head_dim, steps = D / C::kPerWord;
  for (int t = 0; t < count; t += kTilesAtOnce)
    for (int r = 0; r < rows; r += kRows)
      with_sizes(rows - r, count - t, [&]<int R, int N>() {
        for (int k = 0; k < steps; k += kMaxSteps)
          query_key<C, R, N>(h.q + r * steps, steps, tiles + t, k, smaller(kMaxSteps, steps - k),
                             s.scores + r * kPanelKeys + t * kSub, kPanelKeys);
      });
  alignas(64) float decay[kQBlock];
  const bool masked = first_key[count - 1] + kSub - 1 > first_row;
  softmax_panel<C>(s, h, rows, count, first_row, first_key, masked, p.scale * 1.44269504f, decay);
  for (int slice = 0; slice < D / 16; slice += kTilesAtOnce)
    for (int r = 0; r < rows; r += kRows)
      with_sizes(rows - r, D / 16 - slice, [&]<int R, int N>() {
        weight_value<C, R, N>(s.weights + r * kPanelKeys, kPanelKeys, tiles, count, slice,
                              h.out + r * D + slice * 16, D, decay + r);
      });
}

// Every head attends to the tiles its `keep` marks.
template <class C, class T>
void attend_kept(const VsbProblem &p, const KvHead &kv, const Shared &s, int group, int rows,
                 int32_t first_row, int32_t subs) {
  Tile packed[kBatchTiles];
  int32_t subs_of[kBatchTiles];
  for (int32_t sub = 0; sub < subs;) {
    int n = 0;
    for (; sub < subs && n < kBatchTiles; sub++) {
      bool wanted = false;
      for (int g = 0; g < group; g++) wanted |= s.heads[g].keep[sub];
      if (wanted) subs_of[n++] = sub;
    }
    for (int i = 0; i < n; i++) {
      if (i + 1 < n) prefetch_tile<T>(p, kv, subs_of[i + 1]);
      packed[i] = pack_tile<C, T>(p, kv, subs_of[i], s.packed + (int64_t)i * 2 * kSub * p.head_dim);
    }
    for (int g = 0; g < group; g++) {
      Tile panel[kPanelTiles];
      int32_t first_key[kPanelTiles];
      int filled = 0;
      for (int i = 0; i < n; i++) {
        if (s.heads[g].keep[subs_of[i]]) {
          panel[filled] = packed[i];
          first_key[filled++] = subs_of[i] * kSub;
        }
        if (filled && (filled == kPanelTiles || i == n - 1)) {
          attend_panel<C>(p, s, s.heads[g], rows, first_row, panel, first_key, filled);
          filled = 0;
        }
      }
    }
  }
}

// Adds the tiles that `keep` marks to the counters and to tiles_out.
inline void count_tiles(const VsbProblem &p, const KvHead &kv, const Head &h, int head,
                        int32_t q_block, ItemStats &stats) {
  const int tile = p.policies[head].tile, per_tile = tile / kSub;
  for (int i = 0; i < h.window.subs; i += per_tile) stats.tiles_computed[head] += h.keep[i];
  if (!p.tiles_out) return;
  const VsbRequest &r = *kv.request;
  const int32_t first = (r.seq_len - r.query_len) / kQBlock, all = ceil_div(r.seq_len, kSub);
  const int32_t blocks = ceil_div(r.seq_len, kQBlock) - first;
  uint8_t *out = p.tiles_out + ((int64_t)head * blocks + q_block - first) * all;
  for (int i = 0; i < h.window.subs; i++) out[i] |= h.keep[i];
}

template <class C, class T>
void attend(const VsbProblem &p, const KvHead &kv, int32_t q_block, char *scratch,
            ItemStats &stats) {
  const VsbRequest &request = *kv.request;
  const int32_t start = request.seq_len - request.query_len;  // position of the first query
  const int32_t a0 = q_block * kQBlock;
  const int32_t first = larger(a0, start), end = smaller(a0 + kQBlock, request.seq_len);
  const int rows = end - first, D = p.head_dim, group = p.num_heads / p.num_kv_heads;
  const int32_t subs = ceil_div(end, kSub);
  const T *q0 = (const T *)p.q + (request.first_row + first - start) * p.q_row;
  T *out0 = (T *)p.out + (request.first_row + first - start) * p.out_row;
  const double began = seconds();

  Carver carver{(char *)(((uintptr_t)scratch + 63) / 64 * 64)};
  const Shared s = carve(carver, p, subs);
  for (int g = 0; g < group; g++) {
    Head &h = s.heads[g];
    const int head = kv.head * group + g;
    const VsbPolicy &policy = p.policies[head];
    memset(h.out, 0, (size_t)rows * D * 4);
    memset(h.sums, 0, (size_t)rows * kLanes * 4);
    memset(h.keep, 0, subs);
    for (int r = 0; r < rows; r++) {
      h.maxima[r] = kLowest;
      pack_row<C, T>(q0 + r * p.q_row + head * p.q_head, D, h.q + r * (D / C::kPerWord));
    }
    if (policy.selector == VSB_LIST) {
      const int32_t per_tile = policy.tile / kSub, base = start / kQBlock;
      const int64_t at =
          (int64_t)head * (ceil_div(request.seq_len, kQBlock) - base) + q_block - base;
      for (int64_t i = p.list_indptr[at]; i < p.list_indptr[at + 1]; i++)
        for (int32_t j = 0; j < per_tile; j++)
          if (p.list_tiles[i] * per_tile + j < subs) h.keep[p.list_tiles[i] * per_tile + j] = 1;
      h.window = {0, 0, subs};
    } else {
      h.window = window_of(policy, request.seq_len, a0, end);
      memset(h.keep, 1, h.window.sink);
      memset(h.keep + h.window.local, 1, subs - h.window.local);
    }
    stats.tiles_causal[head] += ceil_div(end, policy.tile);
    count_tiles(p, kv, h, head, q_block, stats);
  }
  attend_kept<C, T>(p, kv, s, group, rows, first, subs);

  const double selecting = seconds();
  bool more = false;
  for (int g = 0; g < group; g++) {
    Head &h = s.heads[g];
    const int head = kv.head * group + g;
    const VsbPolicy &policy = p.policies[head];
    memset(h.keep, 0, subs);
    if (!is_scored(policy) || h.window.sink >= h.window.local) continue;
    more = true;
    float sums[kQBlock];
    for (int r = 0; r < rows; r++) sums[r] = hsum(load(h.sums + r * kLanes));
    const Rows<T> scored = {q0 + head * p.q_head, p.q_row, first, rows};
    auto select = policy.bits == 8   ? select_scored<8, T>
                  : policy.bits == 6 ? select_scored<6, T>
                                     : select_scored<4, T>;
    select(p, kv, policy, scored, h.window, h.maxima, sums, *s.scored, h.keep);
    count_tiles(p, kv, h, head, q_block, stats);
  }
  const double selected = seconds();
  if (more) attend_kept<C, T>(p, kv, s, group, rows, first, subs);

  for (int g = 0; g < group; g++) {
    const Head &h = s.heads[g];
    T *out = out0 + (kv.head * group + g) * p.out_head;
    for (int r = 0; r < rows; r++) {
      const float sum = hsum(load(h.sums + r * kLanes));
      const vf inverse = splat(sum == 0 ? 0.0f : 1 / sum);  // nothing seen: zeros
      for (int d = 0; d < D; d += kLanes)
        store(out + r * p.out_row + d, load(h.out + r * D + d) * inverse);
    }
  }
  stats.select_seconds += selected - selecting;
  stats.attend_seconds += seconds() - began - (selected - selecting);
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
