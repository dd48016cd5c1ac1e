// One work item: one or two q blocks of every query head that shares a kv head.
//
// First sink and local window with an online softmax; its maximum and sum are what a selector
// judges the other tiles by. Then the tiles it kept, continuing the same softmax. A tile is
// packed once for all heads and q blocks of the item that keep it.
#pragma once

#include "peak.h"
#include "select.h"

namespace vsb {
namespace VSB_ISA_NAME {

constexpr int kPanelTiles = 8;    // tiles per softmax step of one head
constexpr int kSlots = 32;        // tiles that are packed at a time, at most
constexpr int kFetched = 8;       // tiles fetched from memory before they are packed, at most
constexpr int kLinesAtOnce = 32;  // cache lines fetched between two products
constexpr int kAllLines = 1 << 20;
constexpr int kPanelKeys = kPanelTiles * kSub;
constexpr float kLowest = -3.40282347e38f;  // finite: a fully masked row meets no inf - inf
constexpr float kFused = 16777216.0f;       // 2^24
// Powers of two by which a weight may exceed 1 before a row's maximum is set anew: so that a panel
// needs no maximum of its own, as a rule.
constexpr float kGrowth = 8;

// Tiles that a head's next softmax step is of.
struct Panel {
  Tile tiles[kPanelTiles];
  int32_t first_key[kPanelTiles];  // positions
  int32_t count, oldest;           // when the first of them was packed, in tiles
};

// What one head of one q block carries through the passes; scores are in base 2.
struct Head {
  int32_t head, q_block;
  int32_t first, rows;  // position of its first query; how many there are
  int32_t *q;           // [kQBlock][words per row]
  float *out;           // [kQBlock][head_dim], not yet divided by the sum
  float *maxima;        // [kQBlock]: of the scores, or up to kGrowth less
  float *sums;          // [kQBlock][kLanes], summed over lanes only at the end
  Panel panel;
};

struct Shared {      // of one thread
  float *scores;     // [kQBlock][kPanelKeys]
  int32_t *weights;  // [kQBlock][kPanelKeys], words
  int32_t *packed;   // [kSlots][2 * kSub * head_dim], a ring
  int units;         // heads of the item: of its first q block, then of its second
  Head *heads;       // [units]
  Choice *choices;   // [units]
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

inline Shared carve(Carver &c, const VsbProblem &p, int32_t subs, int units) {
  const int64_t D = p.head_dim;
  Shared s;
  s.units = units;
  s.scores = c.take<float>(kQBlock * kPanelKeys);
  s.weights = c.take<int32_t>(kQBlock * kPanelKeys);
  s.packed = c.take<int32_t>(kSlots * 2 * kSub * D);
  s.heads = c.take<Head>(units);
  s.choices = c.take<Choice>(units);
  for (int u = 0; u < units; u++) {
    Head h = {};
    h.q = c.take<int32_t>(kQBlock * D);
    h.out = c.take<float>(kQBlock * D);
    h.maxima = c.take<float>(kQBlock);
    h.sums = c.take<float>(kQBlock * kLanes);
    Choice choice = {};
    choice.keep = c.take<uint8_t>(subs + 8);  // read eight at a time
    choice.rows.codes = c.take<int32_t>(kQBlock * D / 4);
    choice.rows.scale = c.take<float>(kQBlock);
    choice.rows.offset = c.take<float>(kQBlock);
    if (!c.base) continue;
    s.heads[u] = h;
    s.choices[u] = choice;
  }
  return s;
}

inline int64_t scratch_bytes(const VsbProblem &p, int32_t longest) {
  Carver counter{nullptr};
  carve(counter, p, ceil_div(longest, kSub), most_blocks(p) * (p.num_heads / p.num_kv_heads));
  return counter.used + 64;
}

// Scores of one panel to weights, in place of the row's softmax state; `masked` if any key may
// lie after its query.
template <class C>
void softmax_panel(const Shared &s, Head &h, bool masked, float base2, float *decay) {
  const int tiles = h.panel.count;
  const vf nothing = splat(-__builtin_inff());
  vi lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  for (int r = 0; r < h.rows; r++) {
    float *x = s.scores + r * kPanelKeys;
    if (masked)
      for (int i = 0; i < tiles * kSub; i += kLanes) {
        const vi key = lane + (h.panel.first_key[i / kSub] + i % kSub);
        store(x + i, key <= h.first + r ? load(x + i) : nothing);
      }
    // Weights relative to `from`. Returns the largest exponent.
    vf sum;
    auto weigh = [&](float from, float scale) {
      vf most = nothing;
      sum = vf{};
      for (int i = 0; i < tiles * kSub; i += kLanes) {
        const vf exponent = load(x + i) * scale - from, w = exp2<C::kExact>(exponent);
        most = max(exponent, most);
        sum += w;
        if constexpr (C::kPerWord == 2)
          store((bf16 *)(s.weights + r * kPanelKeys) + i, w);
        else
          store((float *)(s.weights + r * kPanelKeys) + i, w);
      }
      return most;
    };
    const float old = h.maxima[r];
    decay[r] = 1;
    if (!(abs(old) <= kFused) || any(weigh(old, base2) > splat(kGrowth))) {
      vf most = load(x);
      for (int i = kLanes; i < tiles * kSub; i += kLanes) most = max(load(x + i), most);
      const float now = hmax(most) * base2 > old ? hmax(most) * base2 : old;
      if (now != old) decay[r] = exp2<C::kExact>(splat(old - now))[0];
      h.maxima[r] = now;
      // A fused multiply-add would leave `now`'s rounding error in the exponent: beyond 2^24 that
      // may be any number of powers of two, so the products are rounded like it.
      const bool fused = abs(now) <= kFused;
      if (!fused)
        for (int i = 0; i < tiles * kSub; i += kLanes) store(x + i, load(x + i) * base2);
      weigh(now, fused ? base2 : 1.0f);
    }
    sum += load(h.sums + r * kLanes) * decay[r];
    store(h.sums + r * kLanes, sum);
  }
}

// `meanwhile` is called between the products, some thousand cycles apart.
template <class C, class F>
void attend_panel(const VsbProblem &p, const Shared &s, Head &h, F &&meanwhile) {
  const int D = p.head_dim, steps = D / C::kPerWord, count = h.panel.count, rows = h.rows;
  const Tile *tiles = h.panel.tiles;
  for (int t = 0; t < count; t += kTilesAtOnce)
    for (int r = 0; r < rows; r += kRows)
      with_sizes(rows - r, count - t, [&]<int R, int N>() {
        for (int k = 0; k < steps; k += kMaxSteps)
          query_key<C, R, N>(h.q + r * steps, steps, tiles + t, k, smaller(kMaxSteps, steps - k),
                             s.scores + r * kPanelKeys + t * kSub, kPanelKeys);
        meanwhile();
      });
  alignas(64) float decay[kQBlock];
  const bool masked = h.panel.first_key[count - 1] + kSub - 1 > h.first;
  softmax_panel<C>(s, h, masked, p.scale * 1.44269504f, decay);
  for (int slice = 0; slice < D / 16; slice += kTilesAtOnce)
    for (int r = 0; r < rows; r += kRows)
      with_sizes(rows - r, D / 16 - slice, [&]<int R, int N>() {
        weight_value<C, R, N>(s.weights + r * kPanelKeys, kPanelKeys, tiles, count, slice,
                              h.out + r * D + slice * 16, D, decay + r);
        meanwhile();
      });
}

// Every head attends to the tiles its choice keeps, in their order. A tile is packed once, for
// all heads that keep it, and stays until its slot in the ring is wanted again: so that a head's
// panels are full, as a rule, however few of the tiles are its own.
template <class C, class T>
void attend_kept(const VsbProblem &p, const KvHead &kv, const Shared &s, int32_t subs) {
  auto next_from = [&](int32_t sub) {
    while (sub < subs) {  // eight tiles at a time
      uint64_t kept = 0;
      for (int u = 0; u < s.units; u++) kept |= load_as<uint64_t>(s.choices[u].keep + sub);
      if (kept) return smaller(subs, sub + __builtin_ctzll(kept) / 8);
      sub += 8;
    }
    return subs;
  };
  // Tiles come from memory while others are attended to: fetched all at once, one after another,
  // they would be waited for.
  struct {
    int32_t sub;      // the tile that is fetched now
    int line, tiles;  // of it, and those before it that have yet to be packed
  } fetch = {next_from(0), 0, 0};
  auto meanwhile = [&] {
    if (fetch.sub >= subs || fetch.tiles == kFetched) return;
    const int lines = prefetch_tile<T, 2>(p, kv, fetch.sub, fetch.line, kLinesAtOnce);
    fetch.line += lines;
    if (lines < kLinesAtOnce) fetch = {next_from(fetch.sub + 1), 0, fetch.tiles + 1};
  };
  auto finish = [&](Head &h) {
    if (h.panel.count) attend_panel<C>(p, s, h, meanwhile);
    h.panel.count = 0;
  };
  int32_t sub = next_from(0);
  for (int32_t packed = 0; sub < subs; packed++) {
    const int32_t next = next_from(sub + 1);
    if (next < subs && fetch.sub <= next) prefetch_tile<T, 1>(p, kv, next, 0, kAllLines);
    if (fetch.sub > sub)
      fetch.tiles--;
    else
      fetch = {next, 0, 0};
    for (int u = 0; u < s.units; u++)
      if (s.heads[u].panel.oldest + kSlots == packed) finish(s.heads[u]);
    int32_t *slot = s.packed + packed % kSlots * (int64_t)(2 * kSub * p.head_dim);
    const Tile tile = pack_tile<C, T>(p, kv, sub, slot);
    for (int u = 0; u < s.units; u++) {
      if (!s.choices[u].keep[sub]) continue;
      Panel &panel = s.heads[u].panel;
      if (panel.count == 0) panel.oldest = packed;
      panel.tiles[panel.count] = tile;
      panel.first_key[panel.count++] = sub * kSub;
      if (panel.count == kPanelTiles) finish(s.heads[u]);
    }
    sub = next;
  }
  for (int u = 0; u < s.units; u++) finish(s.heads[u]);
}

// Adds the tiles that `keep` marks to the counters and to tiles_out.
inline void count_tiles(const VsbProblem &p, const KvHead &kv, const Head &h, const Choice &choice,
                        ItemStats &stats) {
  const int32_t subs = choice.window.subs;
  for (int i = 0; i < subs; i += choice.policy->tile / kSub)
    stats.tiles_computed[h.head] += choice.keep[i];
  if (!p.tiles_out) return;
  const VsbRequest &r = *kv.request;
  const int32_t first = (r.seq_len - r.query_len) / kQBlock, all = ceil_div(r.seq_len, kSub);
  const int32_t blocks = ceil_div(r.seq_len, kQBlock) - first;
  uint8_t *out = p.tiles_out + ((int64_t)h.head * blocks + h.q_block - first) * all;
  for (int i = 0; i < subs; i++) out[i] |= choice.keep[i];
}

// One head of one q block, of a request's rows.
template <class T>
const T *rows_of(const VsbProblem &p, const KvHead &kv, const Head &h) {
  const VsbRequest &r = *kv.request;
  const int64_t row = r.first_row + h.first - (r.seq_len - r.query_len);
  return (const T *)p.q + row * p.q_row + h.head * p.q_head;
}

// Sets a head up for its first pass, over sink and local window (or over the tiles it was given),
// of an item that ends at `subs`.
template <class C, class T>
void begin_head(const VsbProblem &p, const KvHead &kv, int32_t subs, Head &h, Choice &choice,
                ItemStats &stats) {
  const VsbRequest &request = *kv.request;
  const VsbPolicy &policy = p.policies[h.head];
  const int32_t start = request.seq_len - request.query_len, a0 = h.q_block * kQBlock;
  const int32_t end = smaller(a0 + kQBlock, request.seq_len), own = ceil_div(end, kSub);
  const int D = p.head_dim;
  h.first = larger(a0, start);
  h.rows = end - h.first;
  choice.policy = &policy;
  memset(h.out, 0, (size_t)h.rows * D * 4);
  memset(h.sums, 0, (size_t)h.rows * kLanes * 4);
  memset(choice.keep, 0, subs);
  const T *q = rows_of<T>(p, kv, h);
  for (int r = 0; r < h.rows; r++) {
    h.maxima[r] = kLowest;
    pack_row<C, T>(q + r * p.q_row, D, h.q + r * (D / C::kPerWord));
  }
  if (policy.selector == VSB_LIST) {
    const int32_t per_tile = policy.tile / kSub, base = start / kQBlock;
    const int64_t at =
        (int64_t)h.head * (ceil_div(request.seq_len, kQBlock) - base) + h.q_block - base;
    for (int64_t i = p.list_indptr[at]; i < p.list_indptr[at + 1]; i++)
      for (int32_t j = 0; j < per_tile; j++)
        if (p.list_tiles[i] * per_tile + j < own) choice.keep[p.list_tiles[i] * per_tile + j] = 1;
    choice.window = {0, 0, own};
  } else {
    choice.window = window_of(policy, request.seq_len, a0, end);
    memset(choice.keep, 1, choice.window.sink);
    memset(choice.keep + choice.window.local, 1, own - choice.window.local);
  }
  stats.tiles_causal[h.head] += ceil_div(end, policy.tile);
  count_tiles(p, kv, h, choice, stats);
}

// Into `keep` what every head is to attend to beyond sink and local window. Whether there is any.
template <class T>
bool select_more(const VsbProblem &p, const KvHead &kv, const Shared &s, int32_t subs,
                 ItemStats &stats) {
  bool more = false;
  for (int u = 0; u < s.units; u++) {
    const Head &h = s.heads[u];
    Choice &choice = s.choices[u];
    memset(choice.keep, 0, subs);
    if (!is_scored(*choice.policy) || choice.window.sink >= choice.window.local) continue;
    more = true;
    float sums[kQBlock];
    for (int r = 0; r < h.rows; r++) sums[r] = hsum(load(h.sums + r * kLanes));
    const Rows<T> rows = {rows_of<T>(p, kv, h), p.q_row, h.first, h.rows};
    encode_rows<T>(p, kv, rows, h.maxima, sums, choice);
  }
  if (!more) return false;
  select_scored(p, kv, s.choices, s.units);
  for (int u = 0; u < s.units; u++) count_tiles(p, kv, s.heads[u], s.choices[u], stats);
  return true;
}

template <class T>
void write_out(const VsbProblem &p, const KvHead &kv, const Head &h) {
  const VsbRequest &request = *kv.request;
  const int64_t row = request.first_row + h.first - (request.seq_len - request.query_len);
  T *out = (T *)p.out + row * p.out_row + h.head * p.out_head;
  for (int r = 0; r < h.rows; r++) {
    const float sum = hsum(load(h.sums + r * kLanes));
    const vf inverse = splat(sum == 0 ? 0.0f : 1 / sum);  // nothing seen: zeros
    for (int d = 0; d < p.head_dim; d += kLanes)
      store(out + r * p.out_row + d, load(h.out + r * p.head_dim + d) * inverse);
  }
}

// `blocks` q blocks from `q_block` on.
template <class C, class T>
void attend(const VsbProblem &p, const KvHead &kv, int32_t q_block, int32_t blocks, char *scratch,
            ItemStats &stats) {
  const int group = p.num_heads / p.num_kv_heads;
  const int32_t end = smaller((q_block + blocks) * kQBlock, kv.request->seq_len);
  const int32_t subs = ceil_div(end, kSub);
  const double began = seconds();
  Carver carver{(char *)(((uintptr_t)scratch + 63) / 64 * 64)};
  const Shared s = carve(carver, p, subs, blocks * group);
  for (int u = 0; u < s.units; u++) {
    s.heads[u].head = kv.head * group + u % group;
    s.heads[u].q_block = q_block + u / group;
    begin_head<C, T>(p, kv, subs, s.heads[u], s.choices[u], stats);
  }
  attend_kept<C, T>(p, kv, s, subs);

  const double selecting = seconds();
  const bool more = select_more<T>(p, kv, s, subs, stats);
  const double selected = seconds();
  if (more) attend_kept<C, T>(p, kv, s, subs);
  for (int u = 0; u < s.units; u++) write_out<T>(p, kv, s.heads[u]);
  stats.select_seconds += selected - selecting;
  stats.attend_seconds += seconds() - began - (selected - selecting);
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
