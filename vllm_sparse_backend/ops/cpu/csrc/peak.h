// What one thread reaches at most: the products that the kernels are made of, of registers alone.
#pragma once

#include <ctime>

#include "score.h"

namespace vsb {
namespace VSB_ISA_NAME {

inline double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// What the compiler is to take for unknown, so that it computes it anew.
template <class V>
VSB_INLINE void hide(V &v) {
#if VSB_LANES == 8 || defined(__AVX512F__)
  __asm__ volatile("" : "+v"(v));
#else
  __asm__ volatile("" : "+m"(v));
#endif
}

// `step(sums)` does one product per sum; the best of several short runs, in 1e9 operations a
// second, of which a product is `operations`.
template <class V, class F>
double best_rate(int operations, F &&step) {
  constexpr int kSums = kLanes == 16 ? 16 : 10, kSteps = 200000;
  double best = 0;
  for (int run = 0; run < 10; run++) {
    V sums[kSums] = {};
    const double began = seconds();
    for (int i = 0; i < kSteps; i++) {
#pragma GCC unroll 16
      for (int s = 0; s < kSums; s++) sums[s] = step(sums[s]);
#pragma GCC unroll 16
      for (int s = 0; s < kSums; s++) hide(sums[s]);
    }
    const double rate = 1e-9 * kSums * operations * kSteps / (seconds() - began);
    best = rate > best ? rate : best;
  }
  return best;
}

// fp32, bf16 and int8 products.
inline void peak(double *gops) {
  // Of bf16 and, nearly, of fp32: ones. Opaque, or their product would be taken once for all.
  const vi ones = splat(0x3f803f80);
  auto a = [ones] {
    vi x = ones;
    hide(x);
    return x;
  };
  gops[0] = best_rate<vf>(2 * kLanes, [&](vf s) { return s + (vf)a() * (vf)ones; });
#if VSB_BF16_DOT
  gops[1] = best_rate<vf>(4 * kLanes, [&](vf s) { return dot_bf16(s, a(), ones); });
#else
  gops[1] = gops[0];
#endif
  // With the bytes of `ones` it comes to 0, so that no sum overflows.
  constexpr int32_t kKey = (int32_t)0x803f803f;
#if VSB_INT8_DOT
  gops[2] = best_rate<vi>(8 * kLanes, [&](vi s) { return dot_codes(s, a(), kKey); });
#else
  gops[2] = best_rate<vs>(8 * kLanes, [&](vs s) { return s + dot_pairs(a(), kKey); });
#endif
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
