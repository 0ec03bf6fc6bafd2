// The arithmetic of attention over a tile of keys: scores, softmax weights and the sum of values. attention.cpp says who sees what.
//
// Knows pointers to keys and values, in the order in which they are visited. Invariant: a query's bits do not depend on the other queries.
#pragma once

#include <algorithm>

#include "amx.h"

namespace specedge {
namespace {

// A chunk of a list is visited as eight runs side by side, one per tile: places 0, 64, 128 .. 448, 1, 65 .. (fewer if it is not full.) A page
// is too short for the hardware to see a stream and read ahead of it. Eight at once, and the next tile fetched to L2: one float32 decode row
// over 4,096 keys on pages in random order, of 400 MB, went from 5.9 to 11.9 GB/s (D 64) and from 6.0 to 10.7 (D 128); a plain stream had 18.
constexpr int64_t CHUNK = 512;                // places
constexpr int64_t TILE = 64;                  // places
constexpr int64_t APART = CHUNK + 2 * LANES;  // between rows of scores and weights: at a power of two they would meet in few sets of L1

// Whether products go by tile registers (amx.h): those of 16 queries with 32 keys, and of 16 queries' weights of 32 keys with 32 elements.
template <class Dot>
constexpr bool TILES = requires { &Dot::template add<true>; };

template <class T>
constexpr int64_t PER_WORD = 4 / sizeof(T);

// What a lane does with two words and a sum: of two products that of the later elements goes first. vdpbf16ps is defined to do just this, but
// for subnormals, which it takes as zero. It is written as text because this file is built for processors that may not have it.
struct Fma {
  template <class V>
  V operator()(V a, V b, V sum) const {
    return fma(a, b, sum);
  }
};
struct Pairs {
  template <class V>
  V operator()(V a, V b, V sum) const {
    return fma(low(a), low(b), fma(high(a), high(b), sum));
  }
};
#ifdef __AVX512BW__
struct Dpbf16 {
  Avx512 operator()(Avx512 a, Avx512 b, Avx512 sum) const {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
    return sum;
  }
};
#endif

void prefetch(const void* x, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)x + i, 0, 2);  // 2: to L2, which has room for more misses at once
}

// scores[i * APART + k] = q[i] . key[k] for queries from .. to of a vector, and 16 keys of steps * PARTS words. `q` is [steps][16], a
// vector of PARTS words of each of 16 / PARTS queries: so keys are multiplied as they lie, PARTS words at a time.
template <class V, class Dot, int PARTS, class T>
void dot(const float* q, const T* const* key, int64_t steps, int64_t from, int64_t to, float* scores) {
  V r[LANES];
  for (int i = 0; i < LANES; i += V::KEYS) {
    V sum[V::KEYS];
    for (V& x : sum) x = V::set(0);
    for (int64_t j = 0; j < steps; j++) {
      const V x = V::load(q + j * LANES);
      for (int k = 0; k < V::KEYS; k++) sum[k] = Dot()(x, V::template repeat<PARTS>(key[i + k] + j * PARTS * PER_WORD<T>), sum[k]);
    }
    std::copy_n(sum, V::KEYS, r + i);
  }
  transpose(r);
  for (int64_t i = from; i < to; i++) {
    V sum = r[i * PARTS];
    for (int p = 1; p < PARTS; p++) sum = sum + r[i * PARTS + p];
    sum.store(scores + i * APART);
  }
}

// Elements d .. d + n, n <= 32, of the values whose weights share a word.
template <class V>
void values(const float* const* value, int64_t d, int n, V& x, V& y) {
  x = V::load(value[0] + d, std::min(n, LANES)), y = n > LANES ? V::load(value[0] + d + LANES, n - LANES) : V::set(0);
}
template <class V>
void values(const bf16* const* value, int64_t d, int n, V& even, V& odd) {
  zip(value[0] + d, value[1] + d, n, even, odd);
}

// The 32 sums that `values` leads to, to their places.
template <class V>
void finish(V x, V y, float* to, int n) {
  x.store(to, std::min(n, LANES));
  if (n > LANES) y.store(to + LANES, n - LANES);
}
template <class V>
void finish(V even, V odd, bf16* to, int n) {
  unzip(even, odd, to, n);
}

// out[i][d] += sum over k of p[i * APART + k] * value[k][d], for N queries and n values; `out` is [N][width] in the order of `values`.
template <class V, class Dot, int N, class T>
void weigh(const T* p, const T* const* value, const T* const* next, int64_t n, int64_t dim, float* out, int64_t width) {
  for (int64_t d = 0; d < dim; d += 2 * LANES) {
    const int lanes = int(std::min<int64_t>(2 * LANES, dim - d));
    V sum[N][2];
    for (int i = 0; i < N; i++)
      for (int c = 0; c < 2; c++) sum[i][c] = V::load(out + i * width + d + c * LANES);
    for (int64_t k = 0; k < n; k += PER_WORD<T>) {
      if (next)
        for (int64_t j = 0; j < PER_WORD<T>; j++) prefetch(next[k + j] + d, 2 * LANES * sizeof(T));
      V v[2];
      values(value + k, d, lanes, v[0], v[1]);
      for (int i = 0; i < N; i++) {
        const V x = V::template repeat<1>(p + i * APART + k);
        for (int c = 0; c < 2; c++) sum[i][c] = Dot()(x, v[c], sum[i][c]);
      }
    }
    for (int i = 0; i < N; i++)
      for (int c = 0; c < 2; c++) sum[i][c].store(out + i * width + d + c * LANES);
  }
}

// scores -> weights exp(score * scale - top), zero from n to the next multiple of TILE; top rises to the largest score * scale, scale > 0.
// Returns their sum.
template <class V, class Dot, class T>
float soften(float* scores, int64_t n, float scale, float& top, T* p) {
  const int64_t end = (n + LANES - 1) / LANES * LANES;
  std::fill(scores + n, scores + end, -std::numeric_limits<float>::infinity());
  V most = V::load(scores), other = most;
  for (int64_t i = LANES; i < end; i += 2 * LANES) {
    most = max(most, V::load(scores + i));
    if (i + LANES < end) other = max(other, V::load(scores + i + LANES));
  }
  float lane[LANES];
  max(most, other).store(lane);
  top = std::max(top, *std::max_element(lane, lane + LANES) * scale);
  V total = V::set(0);
  for (int64_t i = 0; i < end; i += LANES) {
    const V x = exp(V::load(scores + i) * V::set(scale) - V::set(top));
    if constexpr (TILES<Dot>)
      Dot::narrow(x, p + i);
    else
      x.store(p + i);
    total = total + V::load(p + i);
  }
  std::fill(p + end, p + (n + TILE - 1) / TILE * TILE, T{});
  return sum(total);
}

}  // namespace
}  // namespace specedge
