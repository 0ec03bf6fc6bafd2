// Sixteen float lanes, three times: AVX-512, AVX2 (2 x 8) and plain C++ (the twin), with the same lane semantics.
//
// Knows nothing of ops. Invariant: a function here gives the same bits in all three, because every operation is one IEEE operation
// per lane, sums fold by one fixed tree, and nothing is contracted but by an explicit fma (the build says -ffp-contract=off).
// So a kernel is a template over the vector, and a test can ask for equality between the native one and the twin.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <utility>
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

namespace specedge {

struct bf16 {
  uint16_t bits;
};

constexpr int LANES = 16;

// A word is 32 bits: a float, or two bf16 that lie next to each other in memory.
inline float word(const void* p) {
  float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

// Round to nearest even; any NaN becomes 0x7FC0, as torch has it. (vcvtneps2bf16 would flush subnormals: not used.)
inline bf16 to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  return {x != x ? uint16_t(0x7FC0) : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { *p = to_bf16(x); }

// The twin.
struct Scalar {
  static constexpr int KEYS = 16, QUERIES = 8;  // how many accumulate at once in attention.cpp: what the registers hold
  float v[LANES];

  template <class F>
  static Scalar make(F f) {
    Scalar r;
    for (int i = 0; i < LANES; i++) r.v[i] = f(i);
    return r;
  }
  static Scalar set(float x) {
    return make([=](int) { return x; });
  }
  template <class T>
  static Scalar load(const T* p, int n = LANES) {  // lanes from n on are zero and are not read
    return make([=](int i) { return i < n ? to_float(p[i]) : 0.0f; });
  }
  template <class T>
  void store(T* p, int n = LANES) const {
    for (int i = 0; i < n; i++) put(p + i, v[i]);
  }
  template <int N>
  static Scalar repeat(const void* p) {  // the N words at p, over and over; N divides 16
    Scalar r;
    for (int i = 0; i < LANES; i += N) std::memcpy(r.v + i, p, 4 * N);
    return r;
  }
};

inline Scalar operator+(const Scalar& a, const Scalar& b) {
  return Scalar::make([&](int i) { return a.v[i] + b.v[i]; });
}
inline Scalar operator-(const Scalar& a, const Scalar& b) {
  return Scalar::make([&](int i) { return a.v[i] - b.v[i]; });
}
inline Scalar operator*(const Scalar& a, const Scalar& b) {
  return Scalar::make([&](int i) { return a.v[i] * b.v[i]; });
}
inline Scalar operator/(const Scalar& a, const Scalar& b) {
  return Scalar::make([&](int i) { return a.v[i] / b.v[i]; });
}
inline Scalar fma(const Scalar& a, const Scalar& b, const Scalar& c) {
  return Scalar::make([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
// x where a > b, else y (also where one of them is NaN: the semantics of maxps).
inline Scalar pick(const Scalar& a, const Scalar& b, const Scalar& x, const Scalar& y) {
  return Scalar::make([&](int i) { return a.v[i] > b.v[i] ? x.v[i] : y.v[i]; });
}
inline Scalar max(const Scalar& a, const Scalar& b) { return pick(a, b, a, b); }
inline Scalar min(const Scalar& a, const Scalar& b) { return pick(b, a, a, b); }
// 2^n of n + 1.5 * 2^23, n in -127 .. 128, where -127 gives 0 and 128 gives inf.
inline Scalar pow2(const Scalar& t) {
  return Scalar::make([&](int i) { return std::bit_cast<float>((std::bit_cast<uint32_t>(t.v[i]) + 127) << 23); });
}
// Of lanes that hold two bf16: the one that comes first in memory, and the other.
inline Scalar low(const Scalar& x) {
  return Scalar::make([&](int i) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x.v[i]) << 16); });
}
inline Scalar high(const Scalar& x) {
  return Scalar::make([&](int i) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x.v[i]) & 0xFFFF0000); });
}
// Lane i of even is (a[2i], b[2i]) and that of odd (a[2i + 1], b[2i + 1]); elements from n <= 32 on are zero and are not read.
inline void zip(const bf16* a, const bf16* b, int n, Scalar& even, Scalar& odd) {
  const auto at = [&](int i) { return std::bit_cast<float>(i < n ? a[i].bits | uint32_t(b[i].bits) << 16 : 0); };
  even = Scalar::make([&](int i) { return at(2 * i); }), odd = Scalar::make([&](int i) { return at(2 * i + 1); });
}
inline void unzip(const Scalar& even, const Scalar& odd, bf16* p, int n) {  // p[2i] = even[i], p[2i + 1] = odd[i], n <= 32 of them
  for (int i = 0; i < n; i++) p[i] = to_bf16(i % 2 ? odd.v[i / 2] : even.v[i / 2]);
}
inline float sum(Scalar a) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline void transpose(Scalar (&r)[LANES]) {
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < i; j++) std::swap(r[i].v[j], r[j].v[i]);
}

#if defined(__AVX2__) && defined(__FMA__)

struct Avx2 {
  static constexpr int KEYS = 4, QUERIES = 2;  // of 16 registers, eight accumulate
  __m256 a, b;

  static Avx2 set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Avx2 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static __m256 widen(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static Avx2 load(const bf16* p) { return {widen(p), widen(p + 8)}; }
  template <class T>
  static Avx2 load(const T* p, int n) {
    if (n == LANES) return load(p);
    T tail[LANES] = {};
    std::memcpy(tail, p, n * sizeof(T));
    return load(tail);
  }
  void store(float* p) const { _mm256_storeu_ps(p, a), _mm256_storeu_ps(p + 8, b); }
  static __m256i narrow(__m256 x) {
    const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7FC0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  }
  void store(bf16* p) const {
    const __m256i packed = _mm256_packus_epi32(narrow(a), narrow(b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xD8));
  }
  template <class T>
  void store(T* p, int n) const {
    if (n == LANES) return store(p);
    T tail[LANES];
    store(tail);
    std::memcpy(p, tail, n * sizeof(T));
  }
  template <int N>
  static Avx2 repeat(const void* p) {
    if constexpr (N == 16) return load((const float*)p);
    __m256 x;
    if constexpr (N == 1) x = _mm256_set1_ps(word(p));
    if constexpr (N == 2) x = _mm256_castsi256_ps(_mm256_broadcastq_epi64(_mm_loadu_si64(p)));
    if constexpr (N == 4) x = _mm256_broadcast_ps((const __m128*)p);
    if constexpr (N == 8) x = _mm256_loadu_ps((const float*)p);
    return {x, x};
  }
};

inline Avx2 operator+(Avx2 x, Avx2 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Avx2 operator-(Avx2 x, Avx2 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Avx2 operator*(Avx2 x, Avx2 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Avx2 operator/(Avx2 x, Avx2 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Avx2 fma(Avx2 x, Avx2 y, Avx2 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Avx2 max(Avx2 x, Avx2 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Avx2 min(Avx2 x, Avx2 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Avx2 pick(Avx2 a, Avx2 b, Avx2 x, Avx2 y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ)), _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ))};
}
inline __m256 pow2(__m256 t) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(127)), 23));
}
inline Avx2 pow2(Avx2 t) { return {pow2(t.a), pow2(t.b)}; }
inline __m256 low(__m256 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
inline Avx2 low(Avx2 x) { return {low(x.a), low(x.b)}; }
inline __m256 high(__m256 x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xFFFF0000)))); }
inline Avx2 high(Avx2 x) { return {high(x.a), high(x.b)}; }
inline void zip(const bf16* a, const bf16* b, int n, Avx2& even, Avx2& odd) {
  bf16 tails[2][2 * LANES];
  if (n < 2 * LANES) {
    std::memset(tails, 0, sizeof tails), std::memcpy(tails[0], a, n * sizeof(bf16)), std::memcpy(tails[1], b, n * sizeof(bf16));
    a = tails[0], b = tails[1];
  }
  const auto half = [&](int at, __m256& even, __m256& odd) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)(a + at)), y = _mm256_loadu_si256((const __m256i*)(b + at));
    even = _mm256_castsi256_ps(_mm256_blend_epi16(x, _mm256_slli_epi32(y, 16), 0xAA));
    odd = _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_srli_epi32(x, 16), y, 0xAA));
  };
  half(0, even.a, odd.a), half(LANES, even.b, odd.b);
}
inline void unzip(Avx2 even, Avx2 odd, bf16* p, int n) {
  const auto both = [](__m256 x, __m256 y) { return _mm256_or_si256(Avx2::narrow(x), _mm256_slli_epi32(Avx2::narrow(y), 16)); };
  bf16 all[2 * LANES];
  _mm256_storeu_si256((__m256i*)all, both(even.a, odd.a)), _mm256_storeu_si256((__m256i*)(all + LANES), both(even.b, odd.b));
  std::memcpy(p, all, n * sizeof(bf16));
}
inline float sum(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float sum(Avx2 x) { return sum(_mm256_add_ps(x.a, x.b)); }
inline void transpose8(__m256 (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; i++) {
    const __m256 low = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    r[i] = low;
  }
}
inline void transpose(Avx2 (&r)[LANES]) {
  __m256 q[4][8];  // quadrants
  for (int i = 0; i < 8; i++) q[0][i] = r[i].a, q[1][i] = r[i].b, q[2][i] = r[i + 8].a, q[3][i] = r[i + 8].b;
  for (auto& quadrant : q) transpose8(quadrant);
  for (int i = 0; i < 8; i++) r[i] = {q[0][i], q[2][i]}, r[i + 8] = {q[1][i], q[3][i]};
}

#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

struct Avx512 {
  static constexpr int KEYS = 8, QUERIES = 8;  // of 32 registers, eight accumulate (for more keys the addresses would not fit) or sixteen
  __m512 v;

  static Avx512 set(float x) { return {_mm512_set1_ps(x)}; }
  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
  static Avx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Avx512 load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Avx512 widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
  static Avx512 load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static Avx512 load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  __m256i narrow() const {
    const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0)));
  }
  void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, narrow()); }
  void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow()); }
  template <int N>
  static Avx512 repeat(const void* p) {
    if constexpr (N == 1) return set(word(p));
    if constexpr (N == 2) return {_mm512_castsi512_ps(_mm512_broadcastq_epi64(_mm_loadu_si64(p)))};
    if constexpr (N == 4) return {_mm512_broadcast_f32x4(_mm_loadu_ps((const float*)p))};
    if constexpr (N == 8) return {_mm512_broadcast_f32x8(_mm256_loadu_ps((const float*)p))};
    if constexpr (N == 16) return load((const float*)p);
  }
};

inline Avx512 operator+(Avx512 a, Avx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Avx512 operator-(Avx512 a, Avx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Avx512 operator*(Avx512 a, Avx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Avx512 operator/(Avx512 a, Avx512 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Avx512 fma(Avx512 a, Avx512 b, Avx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Avx512 max(Avx512 a, Avx512 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Avx512 min(Avx512 a, Avx512 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Avx512 pick(Avx512 a, Avx512 b, Avx512 x, Avx512 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
inline Avx512 pow2(Avx512 t) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(t.v), _mm512_set1_epi32(127)), 23))};
}
inline Avx512 low(Avx512 x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 16))}; }
inline Avx512 high(Avx512 x) { return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0xFFFF0000)))}; }
inline void zip(const bf16* a, const bf16* b, int n, Avx512& even, Avx512& odd) {
  const __mmask32 some = __mmask32((uint64_t(1) << n) - 1);
  const __m512i x = _mm512_maskz_loadu_epi16(some, a), y = _mm512_maskz_loadu_epi16(some, b);
  even = {_mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAAAAAA, x, _mm512_slli_epi32(y, 16)))};
  odd = {_mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(x, 16), y))};
}
inline void unzip(Avx512 even, Avx512 odd, bf16* p, int n) {
  const auto wide = [](Avx512 x) { return _mm512_cvtepu16_epi32(x.narrow()); };
  _mm512_mask_storeu_epi16(p, __mmask32((uint64_t(1) << n) - 1), _mm512_or_si512(wide(even), _mm512_slli_epi32(wide(odd), 16)));
}
inline float sum(Avx512 a) { return sum(_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1))); }
inline void transpose(Avx512 (&r)[LANES]) {
  const auto pd = [](Avx512 x) { return _mm512_castps_pd(x.v); };
  Avx512 t[LANES];
  for (int i = 0; i < 16; i += 2) t[i] = {_mm512_unpacklo_ps(r[i].v, r[i + 1].v)}, t[i + 1] = {_mm512_unpackhi_ps(r[i].v, r[i + 1].v)};
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = {_mm512_castpd_ps(_mm512_unpacklo_pd(pd(t[i + j]), pd(t[i + j + 2])))};
      r[i + 2 * j + 1] = {_mm512_castpd_ps(_mm512_unpackhi_pd(pd(t[i + j]), pd(t[i + j + 2])))};
    }
  for (int i = 0; i < 4; i++) {
    const __m512 a = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0x88), b = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0xDD);
    const __m512 c = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0x88), d = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0xDD);
    r[i] = {_mm512_shuffle_f32x4(a, c, 0x88)}, r[i + 8] = {_mm512_shuffle_f32x4(a, c, 0xDD)};
    r[i + 4] = {_mm512_shuffle_f32x4(b, d, 0x88)}, r[i + 12] = {_mm512_shuffle_f32x4(b, d, 0xDD)};
  }
}
using Native = Avx512;
#elif defined(__AVX2__) && defined(__FMA__)
using Native = Avx2;
#else
using Native = Scalar;
#endif

// e^x: below -88.03 it is 0, above 88.37 inf (the true limit is 88.72), NaN stays NaN; else within 1.01 ulp.
template <class V>
inline V exp(V x) {
  x = min(V::set(88.8f), max(V::set(-88.3f), x));           // x second: NaN passes
  const V t = fma(x, V::set(1.44269504f), V::set(0x1.8p23f));  // n + 1.5 * 2^23: rounds to the integer n and leaves it in the low bits
  const V n = t - V::set(0x1.8p23f);
  V r = fma(n, V::set(-0x1.62e4p-1f), x);  // ln 2 in two parts, the first with few bits: n times it is exact
  r = fma(n, V::set(-0x1.7f7d1cp-20f), r);
  V p = V::set(1.9875691500e-4f);  // Cephes expf
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = fma(p, r, V::set(c));
  p = fma(p, r * r, r) + V::set(1.0f);
  return p * pow2(t);
}

template <class V>
V silu_mul(V gate, V up) {
  return gate / (V::set(1) + exp(V::set(0) - gate)) * up;
}

}  // namespace specedge
