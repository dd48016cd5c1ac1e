// The C interface of the core: pointers, strides and lengths. ops/cpu/core.py mirrors these
// structs with ctypes; vsb_abi() changes whenever they do.
#pragma once

#include <cstdint>

#define VSB_API __attribute__((visibility("default")))

extern "C" {

enum VsbDtype { VSB_BF16 = 0, VSB_FP16 = 1, VSB_FP32 = 2 };

// How a page of N keys and values of one kv head lies in memory (vLLM's CPU cache).
//   VEC  key (n, d) at d*N + n; value at n*D + d
//   AMX  key at (n/16)*16*D + (d/2)*32 + (n%16)*2 + d%2; value at
//        (d/16)*16*N + (n/2)*32 + (d%16)*2 + n%2
// The page's values start N*D elements after its keys.
enum VsbLayout { VSB_VEC = 0, VSB_AMX = 1 };

enum VsbSelector { VSB_DENSE = 0, VSB_STATIC = 1, VSB_SALE = 2, VSB_LIST = 3, VSB_MASS = 4 };

enum VsbBits { VSB_FP4 = 14 };  // or 4, 6, 8: of integers

struct VsbPolicy {
  int32_t selector;
  int32_t tile;  // key tokens: 16, 32 or 64
  int32_t sink, local;
  int32_t growth;  // of the window, in 1/65536 of the context
  int32_t bits;    // of codes: 4, 6, 8 or VSB_FP4
  int32_t row_stride, tail;
  int32_t dense_below;  // tokens of context from which on the policy is followed
  float tau;
  double tau_slope;
};

struct VsbRequest {
  const int32_t *pages;  // block table row
  int64_t first_row;     // its first query row in q and out
  int32_t query_len, seq_len;
  int32_t prompt_len;  // of which the step may be a chunk: policies' tails count from its end
};

struct VsbProblem {
  const void *q;  // row t, head h at q + t*q_row + h*q_head; channels are adjacent
  void *out;
  int64_t q_row, q_head, out_row, out_head;  // in elements
  const void *kv;
  int64_t kv_page, kv_head;  // in elements
  const VsbRequest *requests;
  const VsbPolicy *policies;  // one per q head
  int32_t num_requests, num_heads, num_kv_heads, head_dim, page_size;
  int32_t dtype, layout;
  float scale;

  // Selector LIST: CSR over (head, q block of the only request).
  const int64_t *list_indptr;
  const int32_t *list_tiles;

  // Results. tiles_*: per q head. seconds: summed over threads.
  int64_t *tiles_computed, *tiles_causal;
  double *pack_seconds, *select_seconds, *attend_seconds;
  // Optional, for one request: [num_heads, its q blocks, ceil(seq_len / 16)], 1 = computed.
  uint8_t *tiles_out;
};

VSB_API int32_t vsb_abi(void);
// Comma-separated names of the compiled instruction sets, best first.
VSB_API const char *vsb_isas(void);
// 1 if this CPU and operating system can run the named one, 0 if not, -1 if unknown.
VSB_API int32_t vsb_usable(const char *isa);
// What one thread reaches with the named one, in 1e9 operations a second (a multiply-add is two):
// fp32, bf16 and int8 products, as the kernels compute them, of registers. -1 if not usable.
VSB_API int32_t vsb_peak(const char *isa, double *gops);
// Runs on the calling thread's OpenMP pool. 0, or -1 if memory ran out or isa is not usable.
VSB_API int32_t vsb_forward(const char *isa, const struct VsbProblem *problem);
}
