// Estimated scores of sampled query rows with every key of a tile, from integer codes.
//
// A lane is a query row, so that what a rule sums or compares per row stays in its lane: with
// every 4th row scored, the 16 rows of a q block are one AVX-512 vector. Codes of a key are
// broadcast, 4 channels at a time, to the rows of two heads where there are two: the broadcasts
// would else keep the units that load busier than those that multiply.
#pragma once

#include "quantize.h"

namespace vsb {
namespace VSB_ISA_NAME {

constexpr int kRowGroup = 16;                    // query rows of one head, scored together
constexpr int kRowVectors = kRowGroup / kLanes;  // vectors in a group
constexpr int kGroupsAtOnce = kLanes == 16 ? 2 : 1;
// Keys whose sums are held in registers: 16 sums of AVX-512's 32, 8 of AVX2's 16.
template <int Groups>
constexpr int kKeysAtOnce = (kLanes == 16 ? 16 : 8) / (Groups * kRowVectors);

// Scored rows of one head and q block; padding never hits.
struct ScoredRows {
  // [groups][head_dim / 4][kRowGroup] words of 4 codes, each shifted by kShift to be unsigned
  int32_t *codes;
  // Exponent of a key's weight relative to the row's threshold: product * scale * key step +
  // offset, as an IEEE float's bits (times 2^23, exponent bias included). [kQBlock]
  float *scale, *offset;
  int groups;
};

// One group of them.
struct RowGroup {
  const int32_t *codes;
  const float *scale, *offset;
};

constexpr float kOne = 127 * 8388608.0f;   // the bits of 1.0f, as a float
constexpr float kMost = 250 * 8388608.0f;  // of 2^123

// acc[g][v][k]: products of the groups' rows with the next kKeysAtOnce keys.
template <int Bits, int Groups>
VSB_INLINE void code_products(const RowGroup *groups, const int8_t *keys, const int32_t *shifts,
                              int steps, vi (&acc)[Groups][kRowVectors][kKeysAtOnce<Groups>]) {
  constexpr int kKeys = kKeysAtOnce<Groups>;
  auto key_at = [keys](int step, int k) {
    int32_t word;
    memcpy(&word, keys + (step * kSub + k) * 4, 4);
    return word;
  };
  auto rows_at = [groups](int step, int g, int v) {
    return load_as<vi>(groups[g].codes + step * kRowGroup + v * kLanes);
  };
  auto for_each_sum = [](auto &&f) {
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; k++)
#pragma GCC unroll 2
      for (int g = 0; g < Groups; g++)
#pragma GCC unroll 2
        for (int v = 0; v < kRowVectors; v++) f(g, v, k);
  };
  for_each_sum([&](int g, int v, int k) { acc[g][v][k] = splat(shifts[k]); });
#if VSB_INT8_DOT
  for (int step = 0; step < steps; step += 4)
#pragma GCC unroll 4
    for (int s = step; s < step + 4; s++)
      for_each_sum([&](int g, int v, int k) {
        acc[g][v][k] = dot_codes(acc[g][v][k], rows_at(s, g, v), key_at(s, k));
      });
#else
  for (int step = 0; step < steps;) {
    vs sums[Groups][kRowVectors][kKeys] = {};
    const int stop = smaller(steps, step + Codes<Bits>::kRun);
    for (; step < stop; step++)
      for_each_sum([&](int g, int v, int k) {
        sums[g][v][k] += dot_pairs(rows_at(step, g, v), key_at(step, k));
      });
    for_each_sum([&](int g, int v, int k) { acc[g][v][k] += widen_pairs(sums[g][v][k]); });
  }
#endif
}

// A tile's weight in each row, summed over its keys. 2^x is taken to be linear between powers of
// two, which is what a float's bits are: at most 6% too much, never too little.
struct MassRule {
  vf sum[kRowVectors] = {};
  template <int Keys>
  VSB_INLINE void add(int v, const vi (&products)[Keys], vf scale, vf offset) {
#pragma GCC unroll 16
    for (int k = 0; k < Keys; k++) {
      const vf bits = __builtin_convertvector(products[k], vf) * scale + offset;
      sum[v] += (vf) __builtin_convertvector(max(min(bits, splat(kMost)), vf{}), vi);
    }
  }
  VSB_INLINE vi hits(int v) const { return sum[v] > splat(1.0f); }
};

// A tile's largest weight in each row.
struct PeakRule {
  vi hit[kRowVectors] = {};
  template <int Keys>
  VSB_INLINE void add(int v, const vi (&products)[Keys], vf scale, vf offset) {
    vi most = products[0];
#pragma GCC unroll 16
    for (int k = 1; k < Keys; k++) most = max(products[k], most);
    hit[v] |= ~(__builtin_convertvector(most, vf) * scale + offset <= splat(kOne));
  }
  VSB_INLINE vi hits(int v) const { return hit[v]; }
};

// Bit g is set where any row of group g hits the tile of `subs` packed tiles from `sub` on.
template <int Bits, class Rule, int Groups>
unsigned groups_hit(const RowGroup *groups, const KeyCodes &keys, int head_dim, int sub, int subs) {
  constexpr int kKeys = kKeysAtOnce<Groups>;
  Rule rules[Groups];
  for (int s = sub; s < sub + subs; s++)
    for (int k = 0; k < kSub; k += kKeys) {
      vi acc[Groups][kRowVectors][kKeys];
      code_products<Bits, Groups>(groups, keys.codes + ((int64_t)s * head_dim * kSub + k * 4),
                                  keys.shifts + s * kSub + k, head_dim / 4, acc);
      // What follows is not to be loaded before the products: they need the registers.
      __asm__ volatile("" ::: "memory");
#pragma GCC unroll 2
      for (int g = 0; g < Groups; g++)
#pragma GCC unroll 2
        for (int v = 0; v < kRowVectors; v++)
          rules[g].add(v, acc[g][v], load(groups[g].scale + v * kLanes) * keys.step[s],
                       load(groups[g].offset + v * kLanes));
    }
  unsigned hits = 0;
  for (int g = 0; g < Groups; g++) {
    vi hit = rules[g].hits(0);
    for (int v = 1; v < kRowVectors; v++) hit |= rules[g].hits(v);
    hits |= (unsigned)any(hit) << g;
  }
  return hits;
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
