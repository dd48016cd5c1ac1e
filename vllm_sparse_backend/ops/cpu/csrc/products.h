// The two products of attention on packed tiles.
//
// One call computes up to kRows query rows against kTilesAtOnce tiles or value slices and
// holds all its sums in registers: 12 of AVX2's 16, 24 of AVX-512's 32. The row and tile
// counts are template parameters because a compiler spills sums whose loops it cannot unroll.
#pragma once

#include "pack.h"

namespace vsb {
namespace VSB_ISA_NAME {

constexpr int kRows = 6;
constexpr int kTilesAtOnce = kLanes == 16 ? 4 : 1;
constexpr int kVectors = 16 / kLanes;  // vectors in 16 words
// Steps summed one after another: over 256 channels the rounding errors of one long sum are
// twice those of two short ones.
constexpr int kMaxSteps = 128;

// scores[r, 16 t + n] = sum over steps of row r times key n of tile t, or what was there plus
// that sum, if the steps do not begin at the first.
template <class C, int R, int T>
void query_key(const int32_t *rows, int64_t row_words, const Tile *tiles, int first_step, int steps,
               float *scores, int64_t score_words) {
  constexpr int V = T * kVectors;
  vf acc[R][V] = {};
  const int32_t *keys[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) keys[t] = tiles[t].keys + first_step * kSub;
  for (int k = 0; k < steps; k++) {
    vi b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
      b[v] = load_as<vi>(keys[v / kVectors] + k * kSub + v % kVectors * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const int32_t a = rows[r * row_words + first_step + k];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = C::multiply_add(acc[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      float *at = scores + r * score_words + v * kLanes;
      store(at, first_step ? load(at) + acc[r][v] : acc[r][v]);
    }
}

// out[r, :] = decay[r] out[r, :] + sum over tiles and keys of weight times value, for T
// slices of 16 channels.
template <class C, int R, int T>
void weight_value(const int32_t *weights, int64_t weight_words, const Tile *tiles, int num_tiles,
                  int slice, float *out, int64_t out_words, const float *decay) {
  constexpr int V = T * kVectors;
  vf acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[r][v] = load(out + r * out_words + v * kLanes) * decay[r];
  for (int t = 0; t < num_tiles; t++) {
    const int64_t next = tiles[t].slice;
    const int32_t *values = tiles[t].values + slice * next;
    for (int k = 0; k < kSub / C::kPerWord; k++) {
      vi b[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++)
        b[v] = load_as<vi>(values + v / kVectors * next + k * 16 + v % kVectors * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const int32_t a = weights[r * weight_words + t * (kSub / C::kPerWord) + k];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[r][v] = C::multiply_add(acc[r][v], a, b[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(out + r * out_words + v * kLanes, acc[r][v]);
}

// Calls f with the rows left (1 to kRows) and the tiles left (1 to kTilesAtOnce) as constants.
template <int R = kRows, int T = kTilesAtOnce, class F>
VSB_INLINE void with_sizes(int rows, int tiles, F &&f) {
  if constexpr (R > 1) {
    if (rows < R) return with_sizes<R - 1, T>(rows, tiles, f);
  }
  if constexpr (T > 1) {
    if (tiles < T) return with_sizes<R, T - 1>(rows, tiles, f);
  }
  f.template operator()<R, T>();
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
