// What the driver (core.cpp) and the kernels (kernel.cpp, once per instruction set) share.
// No STL here: this is seen by code compiled for CPUs newer than the one it may run on.
#pragma once

#include "core.h"

namespace vsb {

constexpr int kQBlock = 64;  // query tokens, aligned to the absolute position
constexpr int kSub = 16;     // key tokens in a packed tile; a policy's tile is 1, 2 or 4 of them

// Keys of one kv head as integer codes, for selectors' scores.
struct KeyCodes {
  int8_t *codes;    // [sub][head_dim / 4][kSub][4]
  int32_t *shifts;  // [sub][kSub]: to add to the products, since the rows' codes are shifted
  float *step;      // [sub]: the size of a code's unit; NaN where the keys are not finite
};

// One kv head of one request: the unit whose keys are quantized together.
struct KvHead {
  const VsbRequest *request;
  int32_t head;
  double *page_sums;  // [pages][head_dim]
  float *mean;        // [head_dim], over all seq_len keys
  KeyCodes codes[4];  // for 8, 6, 4 bits and VSB_FP4; codes == nullptr where no head asks for it
};

struct ItemStats {
  int64_t *tiles_computed, *tiles_causal;  // [num_heads]
  double select_seconds, attend_seconds;
};

struct Kernels {
  int64_t (*scratch_bytes)(const VsbProblem &, int32_t longest);
  void (*sum_keys)(const VsbProblem &, const KvHead &, int32_t page);
  void (*quantize_keys)(const VsbProblem &, const KvHead &, int32_t page);
  void (*attend)(const VsbProblem &, const KvHead &, int32_t q_block, int32_t blocks, char *scratch,
                 ItemStats &);
  void (*peak)(double *gops);
};

inline bool is_scored(const VsbPolicy &policy) {
  return policy.selector == VSB_SALE || policy.selector == VSB_MASS;
}
inline bool is_followed(const VsbPolicy &policy, int32_t seq_len) {
  return seq_len >= policy.dense_below;
}

inline int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// Q blocks of one work item, at most. Two share the tiles that both keep, which are then fetched
// and packed once; where many heads share them already, there is little to gain.
inline int32_t most_blocks(const VsbProblem &p) {
  return p.num_heads / p.num_kv_heads <= 4 ? 2 : 1;
}

}  // namespace vsb
