// Estimated scores of sampled query rows with every key of a tile, from integer codes.
//
// A lane is a query row, so that what a rule sums or compares per row stays in its lane: with
// every 4th row scored, the 16 rows of a q block are one AVX-512 vector. Codes of a key are
// broadcast, 4 channels at a time.
#pragma once

#include "quantize.h"

namespace vsb {
namespace VSB_ISA_NAME {

constexpr int kRowGroup = 16;                       // query rows scored together
constexpr int kRowVectors = kRowGroup / kLanes;     // vectors in a group
constexpr int kKeysAtOnce = kLanes == 16 ? 16 : 4;  // sums held in registers: 16, or 8 of 16

// Scored rows of one head and q block; padding never hits.
struct ScoredRows {
  // [groups][head_dim / 4][kRowGroup] words of 4 codes, each shifted by kShift to be unsigned
  alignas(64) int32_t codes[kQBlock / kRowGroup * kMaxHeadDim / 4 * kRowGroup];
  // Exponent of a key's weight relative to the row's threshold: product * scale * key step +
  // offset, as an IEEE float's bits (times 2^23, exponent bias included).
  alignas(64) float scale[kQBlock], offset[kQBlock];
  int groups;
};

constexpr float kOne = 127 * 8388608.0f;   // the bits of 1.0f, as a float
constexpr float kMost = 250 * 8388608.0f;  // of 2^123

// acc[k][v]: products of one group's rows with kKeysAtOnce keys.
template <int Bits>
VSB_INLINE void code_products(const int32_t *rows, const int8_t *keys, const int32_t *key_sums,
                              int steps, vi (&acc)[kKeysAtOnce][kRowVectors]) {
  auto key_at = [keys](int step, int k) {
    int32_t word;
    memcpy(&word, keys + (step * kSub + k) * 4, 4);
    return word;
  };
  auto rows_at = [rows](int step, int v) {
    return load_as<vi>(rows + step * kRowGroup + v * kLanes);
  };
#pragma GCC unroll 16
  for (int k = 0; k < kKeysAtOnce; k++)
#pragma GCC unroll 2
    for (int v = 0; v < kRowVectors; v++) acc[k][v] = splat(-key_sums[k]);
#if VSB_INT8_DOT
  for (int step = 0; step < steps; step++)
#pragma GCC unroll 16
    for (int k = 0; k < kKeysAtOnce; k++)
#pragma GCC unroll 2
      for (int v = 0; v < kRowVectors; v++)
        acc[k][v] = dot_codes(acc[k][v], rows_at(step, v), key_at(step, k));
#else
  for (int step = 0; step < steps;) {
    vs sums[kKeysAtOnce][kRowVectors] = {};
    const int stop = smaller(steps, step + Codes<Bits>::kRun);
    for (; step < stop; step++)
#pragma GCC unroll 16
      for (int k = 0; k < kKeysAtOnce; k++)
#pragma GCC unroll 2
        for (int v = 0; v < kRowVectors; v++)
          sums[k][v] += dot_pairs(rows_at(step, v), key_at(step, k));
#pragma GCC unroll 16
    for (int k = 0; k < kKeysAtOnce; k++)
#pragma GCC unroll 2
      for (int v = 0; v < kRowVectors; v++) acc[k][v] += widen_pairs(sums[k][v]);
  }
#endif
}

// A tile's weight in each row, summed over its keys. 2^x is taken to be linear between powers of
// two, which is what a float's bits are: at most 6% too much, never too little.
struct MassRule {
  vf sum[kRowVectors] = {};
  VSB_INLINE void add(int v, vi product, vf scale, vf offset) {
    const vf bits = __builtin_convertvector(product, vf) * scale + offset;
    const vi word = __builtin_convertvector(max(min(bits, splat(kMost)), vf{}), vi);
    sum[v] += (vf)word;
  }
  VSB_INLINE void end_sub(int, vf, vf) {}
  VSB_INLINE vi hits(int v) const { return sum[v] > splat(1.0f); }
};

// A tile's largest weight in each row.
struct PeakRule {
  vi most[kRowVectors], hit[kRowVectors] = {};
  PeakRule() { restart(); }
  VSB_INLINE void restart() {
    for (int v = 0; v < kRowVectors; v++) most[v] = splat((int32_t)INT32_MIN);
  }
  VSB_INLINE void add(int v, vi product, vf, vf) { most[v] = max(product, most[v]); }
  VSB_INLINE void end_sub(int v, vf scale, vf offset) {
    hit[v] |= ~(__builtin_convertvector(most[v], vf) * scale + offset <= splat(kOne));
    most[v] = splat((int32_t)INT32_MIN);
  }
  VSB_INLINE vi hits(int v) const { return hit[v]; }
};

// Whether any row of a group hits the tile of `subs` packed tiles from `sub` on.
template <int Bits, class Rule>
bool group_hits(const ScoredRows &rows, int group, const KeyCodes &keys, int head_dim, int sub,
                int subs) {
  Rule rule;
  const int32_t *codes = rows.codes + (int64_t)group * kRowGroup * head_dim / 4;
  for (int s = sub; s < sub + subs; s++) {
    vf scale[kRowVectors], offset[kRowVectors];
    for (int v = 0; v < kRowVectors; v++) {
      scale[v] = load(rows.scale + group * kRowGroup + v * kLanes) * keys.step[s];
      offset[v] = load(rows.offset + group * kRowGroup + v * kLanes);
    }
    for (int k = 0; k < kSub; k += kKeysAtOnce) {
      vi acc[kKeysAtOnce][kRowVectors];
      code_products<Bits>(codes, keys.codes + ((int64_t)s * head_dim * kSub + k * 4),
                          keys.sums + s * kSub + k, head_dim / 4, acc);
#pragma GCC unroll 16
      for (int i = 0; i < kKeysAtOnce; i++)
#pragma GCC unroll 2
        for (int v = 0; v < kRowVectors; v++) rule.add(v, acc[i][v], scale[v], offset[v]);
    }
    for (int v = 0; v < kRowVectors; v++) rule.end_sub(v, scale[v], offset[v]);
  }
  vi hit = rule.hits(0);
  for (int v = 1; v < kRowVectors; v++) hit |= rule.hits(v);
  return any(hit);
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
