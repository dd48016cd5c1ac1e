// From the paged cache to tiles of kSub keys, in the order in which the products read them.
//
// Everything is counted in 32-bit words: one float, or a pair of bf16 along the axis that a
// product sums over. A packed tile is
//   keys    [head_dim steps][kSub words]            a step: one channel, or two
//   values  [head_dim / 16 slices][key steps][16 words]  a step: one key, or two
#pragma once

#include "kernel.h"
#include "simd.h"

namespace vsb {
namespace VSB_ISA_NAME {

struct Tile {
  const int32_t *keys, *values;
  int64_t slice;  // words from one slice of values to the next
};

// The page and the offset in it where a tile starts. Tiles never straddle pages.
template <class T>
struct TileAddress {
  const T *keys, *values;  // of the page
  int32_t n0;              // first key's place in the page
  int32_t valid;           // keys of the tile below seq_len
};

template <class T>
VSB_INLINE TileAddress<T> tile_address(const VsbProblem &p, const KvHead &kv, int32_t sub) {
  const int32_t first = sub * kSub, page = first / p.page_size;
  const T *keys = (const T *)p.kv + kv.request->pages[page] * p.kv_page + kv.head * p.kv_head;
  return {keys, keys + (int64_t)p.page_size * p.head_dim, first - page * p.page_size,
          smaller(kSub, kv.request->seq_len - first)};
}

// Fetches some of a tile's cache lines, which lie a page's row apart, so that no hardware
// prefetcher follows: from the `line`th on, up to `most`, into the cache of that level. Returns how
// many there were to fetch; 0 once the tile is done, or where nothing needs to be fetched.
template <class T, int Level>
VSB_INLINE int prefetch_tile(const VsbProblem &p, const KvHead &kv, int32_t sub, int line,
                             int most) {
  if (p.layout != VSB_VEC) return 0;
  const TileAddress<T> at = tile_address<T>(p, kv, sub);
  constexpr int kLine = 64 / sizeof(T);
  const int keys = p.head_dim, stop = smaller(line + most, keys + kSub * p.head_dim / kLine);
  for (int i = line; i < smaller(stop, keys); i++)
    __builtin_prefetch(at.keys + (int64_t)i * p.page_size + at.n0, 0, 4 - Level);
  for (int i = larger(line, keys); i < stop; i++)
    __builtin_prefetch(at.values + (int64_t)at.n0 * p.head_dim + (i - keys) * kLine, 0, 4 - Level);
  return stop - line;
}

// Floats: a word is one channel (keys) or one key (values).
struct Floats {
  static constexpr int kPerWord = 1;
  static constexpr bool kExact = true;
  static VSB_INLINE vf multiply_add(vf acc, int32_t a, vi b) {
    float x;
    memcpy(&x, &a, 4);
    return acc + x * (vf)b;
  }
};
// Products of 16-bit inputs in fp32: the same, with the cheaper exponential.
struct WidenedFloats : Floats {
  static constexpr bool kExact = false;
};
// bf16 pairs through the bf16 dot product.
struct Pairs {
  static constexpr int kPerWord = 2;
  static constexpr bool kExact = false;
  static VSB_INLINE vf multiply_add(vf acc, int32_t a, vi b) { return dot_bf16(acc, splat(a), b); }
};

// Two rows of kLanes bf16 as words: the first row's value in the low half.
VSB_INLINE vi interleave(const bf16 *low, const bf16 *high) {
  return __builtin_convertvector(load_as<vh>(low), vi) |
         (__builtin_convertvector(load_as<vh>(high), vi) << 16);
}

// The AMX layout already has pairs: words to two rows of floats.
VSB_INLINE void split(const bf16 *pairs, float *low, float *high) {
  vi w = load_as<vi>(pairs);
  store(low, (vf)(w << 16));
  store(high, (vf)(w & (int32_t)0xffff0000));
}

// Keys as floats, [head_dim][kSub]; beyond `valid` zero.
template <class T>
void unpack_keys(const TileAddress<T> &at, const VsbProblem &p, float *out) {
  const int D = p.head_dim, N = p.page_size;
  if constexpr (sizeof(T) == 2) {
    if (p.layout == VSB_AMX) {
      const bf16 *in = (const bf16 *)at.keys + (int64_t)at.n0 * D;
      for (int d = 0; d < D; d += 2)
        for (int w = 0; w < kSub; w += kLanes)
          split(in + d * kSub + 2 * w, out + d * kSub + w, out + (d + 1) * kSub + w);
    }
  }
  if (p.layout == VSB_VEC)
    for (int d = 0; d < D; d++)
      for (int w = 0; w < kSub; w += kLanes)
        store(out + d * kSub + w, load(at.keys + (int64_t)d * N + at.n0 + w));
  if (at.valid < kSub)  // what lies there may be stale, even NaN
    for (int d = 0; d < D; d++)
      for (int n = at.valid; n < kSub; n++) out[d * kSub + n] = 0;
}

// Values as floats, [head_dim / 16][kSub][16]; beyond `valid` zero, since 0 * NaN is NaN.
template <class T>
void unpack_values(const TileAddress<T> &at, const VsbProblem &p, float *out) {
  const int D = p.head_dim, N = p.page_size;
  for (int s = 0; s < D / 16; s++) {
    float *slice = out + s * kSub * 16;
    if constexpr (sizeof(T) == 2) {
      if (p.layout == VSB_AMX) {
        const bf16 *in = (const bf16 *)at.values + (int64_t)s * 16 * N + at.n0 * 16;
        for (int n = 0; n < kSub; n += 2)
          for (int w = 0; w < 16; w += kLanes)
            split(in + n * 16 + 2 * w, slice + n * 16 + w, slice + (n + 1) * 16 + w);
      }
    }
    if (p.layout == VSB_VEC)
      for (int n = 0; n < at.valid; n++)
        for (int w = 0; w < 16; w += kLanes)
          store(slice + n * 16 + w, load(at.values + (int64_t)(at.n0 + n) * D + s * 16 + w));
    for (int n = at.valid; n < kSub; n++)
      for (int d = 0; d < 16; d++) slice[n * 16 + d] = 0;
  }
}

// One tile, packed at `out` (2 * kSub * head_dim words at most) or read where it lies.
template <class C, class T>
Tile pack_tile(const VsbProblem &p, const KvHead &kv, int32_t sub, int32_t *out) {
  const TileAddress<T> at = tile_address<T>(p, kv, sub);
  float *values = (float *)out + (int64_t)kSub * p.head_dim;
  unpack_keys(at, p, (float *)out);
  unpack_values(at, p, values);
  return {out, (int32_t *)values, kSub * 16};
}

template <>
Tile pack_tile<Pairs, bf16>(const VsbProblem &p, const KvHead &kv, int32_t sub, int32_t *out) {
  const TileAddress<bf16> at = tile_address<bf16>(p, kv, sub);
  const int D = p.head_dim, N = p.page_size, words = kSub * D / 2;
  int32_t *keys = out, *values = out + words;
  constexpr int kSliceWords = kSub / 2 * 16;
  if (p.layout == VSB_AMX) {
    const int32_t *k = (const int32_t *)(at.keys + (int64_t)at.n0 * D);
    const int32_t *v = (const int32_t *)(at.values + (int64_t)at.n0 * 16);
    if (at.valid == kSub) return {k, v, 8 * (int64_t)N};
    memcpy(keys, k, words * 4);
    for (int s = 0; s < D / 16; s++)
      memcpy(values + s * kSliceWords, v + s * 8 * (int64_t)N, kSliceWords * 4);
  } else {
    for (int d = 0; d < D; d += 2)
      for (int w = 0; w < kSub; w += kLanes) {
        const bf16 *in = at.keys + (int64_t)d * N + at.n0 + w;
        store_as(keys + d / 2 * kSub + w, interleave(in, in + N));
      }
    for (int s = 0; s < D / 16; s++)
      for (int n = 0; n < kSub; n += 2)
        for (int w = 0; w < 16; w += kLanes) {
          const bf16 *in = at.values + (int64_t)(at.n0 + n) * D + s * 16 + w;
          store_as(values + s * kSliceWords + n / 2 * 16 + w, interleave(in, in + D));
        }
  }
  // Stale keys only meet masked scores; stale values would meet 0 * NaN.
  for (int n = at.valid; n < kSub; n++)
    for (int s = 0; s < D / 16; s++)
      for (int d = 0; d < 16; d++)
        ((uint16_t *)(values + s * kSliceWords + n / 2 * 16 + d))[n % 2] = 0;
  return {keys, values, kSliceWords};
}

// A query row: head_dim values to words.
template <class C, class T>
VSB_INLINE void pack_row(const T *in, int head_dim, int32_t *out) {
  for (int d = 0; d < head_dim; d += 16)
    for (int w = 0; w < 16; w += kLanes) store((float *)out + d + w, load(in + d + w));
}
template <>
VSB_INLINE void pack_row<Pairs, bf16>(const bf16 *in, int head_dim, int32_t *out) {
  memcpy(out, in, 2 * head_dim);
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
