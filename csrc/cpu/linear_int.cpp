// Linear layers over weights of 8 and 4 bits, for which a row of x is rounded to 8 bits as it comes. Knows nothing of layers or models.
//
// Invariant: equal to reference.quantised_linear bit for bit, whatever the rows and the processor. Sums of products of integers are exact; the float
// part is one multiplication or two and one addition per group of inputs, in order and without fma, which torch does likewise.
#include <type_traits>
#include <vector>

#include "amx.h"

namespace specedge {
namespace {

constexpr int64_t GROUP = 32;  // inputs that share a 4-bit weight's scale

// A row of x as 8-bit codes with a scale for every 128 of them, and the sums of codes that undo the offset of the weights, which vpdpbusd wants
// unsigned: -128 times the sum of 128 codes, or -8 times that of 32.
struct Codes {
  int64_t k, steps;  // k: rounded up to whole steps
  int per_step;      // offsets
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> offset;
};

template <class T>
void encode(const T* x, int64_t width, int zero, Codes& c, int64_t row) {
  const int64_t each = INPUTS / c.per_step;
  for (int64_t s = 0; s < c.steps; s++) {
    float v[INPUTS];
    const int64_t n = std::min(INPUTS, width - s * INPUTS);
    for (int64_t i = 0; i < n; i++) v[i] = to_float(x[s * INPUTS + i]);
    for (int64_t i = n; i < INPUTS; i++) v[i] = 0;
    uint32_t bits = 0;  // of the largest magnitude; inf and NaN are above all numbers
    for (int64_t i = 0; i < INPUTS; i++) bits = std::max(bits, std::bit_cast<uint32_t>(v[i]) & 0x7FFFFFFFu);
    const float most = std::bit_cast<float>(bits);
    const bool number = bits < 0x7F800000u, some = number && most >= 1e-30f;
    const float inverse = some ? 127.0f / most : 0.0f;
    c.scale[size_t(row * c.steps + s)] = some ? most / 127.0f : number ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    int8_t* q = c.q.data() + row * c.k + s * INPUTS;
    if (some)  // adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits
      for (int64_t i = 0; i < INPUTS; i++) q[i] = int8_t(std::bit_cast<int32_t>(v[i] * inverse + 0x1.8p23f));
    else
      std::fill_n(q, INPUTS, int8_t(0));
    for (int64_t g = 0; g < c.per_step; g++) {
      int32_t sum = 0;
      for (int64_t i = g * each; i < (g + 1) * each; i++) sum += q[i];
      c.offset[size_t((row * c.steps + s) * c.per_step + g)] = -zero * sum;
    }
  }
}

template <class T>
Codes encode(const Linear<T>& a, int zero, int per_step) {
  Codes c;
  c.steps = (a.k + INPUTS - 1) / INPUTS, c.k = c.steps * INPUTS, c.per_step = per_step;
  c.q.resize(size_t(a.rows * c.k)), c.scale.resize(size_t(a.rows * c.steps)), c.offset.resize(size_t(a.rows * c.steps * per_step));
  for_each(a.rows, double(a.rows) * double(a.k) / 4, [&](int64_t r) { encode(a.x + r * a.k, a.k, zero, c, r); });
  return c;
}

// Sixteen int32 lanes, each seen as four bytes by dot: sum + the products of the unsigned bytes of w and the signed bytes of x, one for all lanes.
struct ScalarInts {
  using V = Scalar;
  static constexpr int WIDE = 0, TALL = 1, WIDE4 = 0, TALL4 = 1;
  int32_t v[LANES];
  static ScalarInts set(int32_t x) {
    ScalarInts r;
    std::fill_n(r.v, LANES, x);
    return r;
  }
  static ScalarInts load(const uint8_t* p) {
    ScalarInts r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
};
inline ScalarInts dot(ScalarInts sum, const ScalarInts& w, int32_t x) {
  for (int i = 0; i < LANES; i++)
    for (int b = 0; b < 32; b += 8) sum.v[i] += int32_t(uint8_t(w.v[i] >> b)) * int8_t(x >> b);
  return sum;
}
inline ScalarInts low(ScalarInts a) {
  for (int32_t& x : a.v) x &= 0x0F0F0F0F;
  return a;
}
inline ScalarInts high(ScalarInts a) {
  for (int32_t& x : a.v) x = x >> 4 & 0x0F0F0F0F;
  return a;
}
inline Scalar floats(const ScalarInts& a) {
  return Scalar::make([&](int i) { return float(a.v[i]); });
}

#if defined(__AVX2__) && defined(__FMA__)
struct Avx2Ints {
  using V = Avx2;
  static constexpr int WIDE = 0, TALL = 2, WIDE4 = 0, TALL4 = 2;
  __m256i a, b;
  static Avx2Ints set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static Avx2Ints load(const uint8_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}; }
};
// Without vpdpbusd: even and odd bytes as 16 bits each, so that no sum saturates (as in vpmaddubsw).
inline __m256i dot(__m256i sum, __m256i w, __m256i x) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xFF)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8))));
}
inline Avx2Ints dot(Avx2Ints sum, Avx2Ints w, int32_t x) {
  const __m256i all = _mm256_set1_epi32(x);
  return {dot(sum.a, w.a, all), dot(sum.b, w.b, all)};
}
inline Avx2Ints low(Avx2Ints x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Avx2Ints high(Avx2Ints x) { return low(Avx2Ints{_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
inline Avx2 floats(Avx2Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
using NativeInts = Avx2Ints;
#else
using NativeInts = ScalarInts;
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
struct VnniInts {
  using V = Avx512;
  // 24 of 32 registers hold sums; 4 bits need more for the weights: one core reaches 306 Gop/s with 8 rows and 264 with 12.
  static constexpr int WIDE = 6, TALL = 12, WIDE4 = 4, TALL4 = 8;
  __m512i v;
  static VnniInts set(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static VnniInts load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
};
inline VnniInts dot(VnniInts sum, VnniInts w, int32_t x) {  // as assembly: no level of setup.py promises the instruction, run() asks the processor
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(_mm512_set1_epi32(x)));
  return sum;
}
inline VnniInts low(VnniInts x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
inline VnniInts high(VnniInts x) { return low(VnniInts{_mm512_srli_epi16(x.v, 4)}); }
inline Avx512 floats(VnniInts x) { return {_mm512_cvtepi32_ps(x.v)}; }
#endif

constexpr int EACH = COLUMNS / LANES;  // vectors of a panel

// M rows of codes against P panels, over `steps` steps. All pointers are at the first row and step.
struct Tile {
  const int8_t* q;
  const float* scale;
  const int32_t* offset;
  const uint8_t* w;
  int64_t k, all_steps, apart, steps;  // of a row, of a row, between panels, to do
  float* sums;
};
inline int32_t word(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

template <class I, int M, int P>
void tile8(const Tile& a) {
  using V = typename I::V;
  for (int64_t step = 0; step < a.steps; step++) {
    I sum[M][P * EACH];
    for (int i = 0; i < M; i++)
      for (int t = 0; t < P * EACH; t++) sum[i][t] = I::set(a.offset[i * a.all_steps + step]);
    for (int64_t s = 0; s < INPUTS / 4; s++) {
      I column[P * EACH];
      for (int t = 0; t < P * EACH; t++) {
        const uint8_t* w = a.w + t / EACH * a.apart + step * STEP8 + (s * EACH + t % EACH) * 64;
        column[t] = I::load(w);
        __builtin_prefetch(w + AHEAD);
      }
      for (int i = 0; i < M; i++)
        for (int t = 0; t < P * EACH; t++) sum[i][t] = dot(sum[i][t], column[t], word(a.q + i * a.k + step * INPUTS + 4 * s));
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)  // unrolled, or else the sums would go through memory
      for (int t = 0; t < P * EACH; t++) {
        float* at = a.sums + i * SUMS + t * LANES;
        (V::load(at) + floats(sum[i][t]) * V::set(a.scale[i * a.all_steps + step])).store(at);
      }
  }
}

template <class I, int M, int P>
void tile4(const Tile& a) {
  using V = typename I::V;
  constexpr int64_t GROUPS = INPUTS / GROUP, BYTES = STEP4 / GROUPS;
  for (int64_t g = 0; g < a.steps * GROUPS; g++) {
    I sum[M][P * EACH];
    for (int i = 0; i < M; i++)
      for (int t = 0; t < P * EACH; t++) sum[i][t] = I::set(a.offset[i * a.all_steps * GROUPS + g]);
    const uint8_t* group = a.w + g * BYTES;
    for (int64_t s = 0; s < 4; s++) {
      I both[P * EACH], half[P * EACH];
      for (int t = 0; t < P * EACH; t++) {
        const uint8_t* w = group + t / EACH * a.apart + (s * EACH + t % EACH) * 64;
        both[t] = I::load(w), half[t] = low(both[t]);
        __builtin_prefetch(w + AHEAD);
      }
      const int8_t* q = a.q + g * GROUP + 4 * s;
      for (int i = 0; i < M; i++)
        for (int t = 0; t < P * EACH; t++) sum[i][t] = dot(sum[i][t], half[t], word(q + i * a.k));
      for (int t = 0; t < P * EACH; t++) half[t] = high(both[t]);
      for (int i = 0; i < M; i++)
        for (int t = 0; t < P * EACH; t++) sum[i][t] = dot(sum[i][t], half[t], word(q + i * a.k + GROUP / 2));
    }
    for (int t = 0; t < P * EACH; t++) {
      const V scale = V::load(reinterpret_cast<const bf16*>(group + t / EACH * a.apart + BYTES - COLUMNS * 2) + t % EACH * LANES);
#pragma GCC unroll 12
      for (int i = 0; i < M; i++) {
        float* at = a.sums + i * SUMS + t * LANES;
        (V::load(at) + floats(sum[i][t]) * scale * V::set(a.scale[i * a.all_steps + g / GROUPS])).store(at);
      }
    }
  }
}

// The tile of `rows` rows, which is at most M.
template <class I, int BITS, int M, int P>
auto tile_of(int rows) {
  if constexpr (M == 1)
    return BITS == 8 ? tile8<I, 1, P> : tile4<I, 1, P>;
  else
    return rows == M ? (BITS == 8 ? tile8<I, M, P> : tile4<I, M, P>) : tile_of<I, BITS, M - 1, P>(rows);
}

template <class I, int BITS, class T>
void run_as(const Linear<T>& a) {
  constexpr int WIDE = BITS == 8 ? I::WIDE : I::WIDE4, TALL = BITS == 8 ? I::TALL : I::TALL4;
  constexpr int64_t BYTES = BITS == 8 ? STEP8 : STEP4;
  const Codes c = encode(a, BITS == 8 ? 128 : 8, BITS == 8 ? 1 : INPUTS / GROUP);
  const auto add = [&](int64_t panel, int panels, int64_t row, int rows, int64_t from, int64_t to, float* sums) {
    auto f = tile_of<I, BITS, TALL, 1>(rows);
    if constexpr (WIDE > 0)
      if (panels == 2) f = tile_of<I, BITS, WIDE, 2>(rows);
    const int64_t at = row * c.steps + from;
    f(Tile{c.q.data() + row * c.k + from * INPUTS, c.scale.data() + at, c.offset.data() + at * c.per_step,
           static_cast<const uint8_t*>(a.packed) + (panel * c.steps + from) * BYTES, c.k, c.steps, c.steps * BYTES, to - from, sums});
  };
  const auto done = [&](int64_t panel, int64_t panels, const float* sums) { finish<typename I::V>(a, panel, panels, sums); };
  const double work = double(a.panels() * COLUMNS) * double(a.k) * (0.05 + 0.005 * double(a.rows));
  walk(a.rows, a.panels(), c.steps, BYTES, WIDE, TALL, work, add, done);
}

#ifdef __AMX_TILE__
// As tile8, over the rows of a pass, more than 16 if BOTH: two tiles of k are a step.
template <bool BOTH>
void pass_bytes(const Pass& p, const int8_t* x, const Codes& c, int64_t rows) {
  constexpr int64_t LINE = COLUMNS * 4;  // bytes between words of k and between rows of products
  alignas(64) int32_t products[PAIR * COLUMNS];
  const char *w = p.w, *fetch = p.fetch;
  if (p.from == 0) std::fill_n(p.sums, p.height * COLUMNS, 0.0f);
  for (int64_t step = p.from; step < p.to; step++) {
    tile_zero<0>(), tile_zero<1>();
    if (BOTH) tile_zero<2>(), tile_zero<3>();
    for (int half = 0; half < 2; half++, w += TWO_TILES, x += p.height * TILE_BYTES) {
      p.ahead(fetch);
      tile_load<6>(w, LINE), tile_load<7>(w + TILE_BYTES, LINE);
      tile_load<4>(x, TILE_BYTES);
      tile_dot_bytes<0, 4, 6>(), tile_dot_bytes<1, 4, 7>();
      if (!BOTH) continue;
      tile_load<5>(x + TILE_ROWS * TILE_BYTES, TILE_BYTES);
      tile_dot_bytes<2, 5, 6>(), tile_dot_bytes<3, 5, 7>();
    }
    tile_store<0>(products, LINE), tile_store<1>(products + LANES, LINE);
    if (BOTH) tile_store<2>(products + TILE_ROWS * COLUMNS, LINE), tile_store<3>(products + TILE_ROWS * COLUMNS + LANES, LINE);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t at = (p.row + i) * c.steps + step;
      const __m512i offset = _mm512_set1_epi32(c.offset[size_t(at)]);
      const Avx512 scale = Avx512::set(c.scale[size_t(at)]);
      for (int64_t t = 0; t < COLUMNS; t += LANES) {
        float* sums = p.sums + i * COLUMNS + t;
        const Avx512 sum = {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(products + i * COLUMNS + t), offset))};
        (Avx512::load(sums) + sum * scale).store(sums);
      }
    }
  }
}

template <class T>
void run_tiles8(const Linear<T>& a) {
  const Codes c = encode(a, 128, 1);
  const TileRows<int8_t> x(c.q.data(), a.rows, c.k);
  const auto tile = [&](const Pass& p) {
    const auto f = p.height > TILE_ROWS ? pass_bytes<true> : pass_bytes<false>;
    f(p, x.at(p.row, p.from * INPUTS), c, std::min(a.rows - p.row, PAIR));
  };
  const auto done = [&](int64_t panel, const float* sums) { finish<Native>(a, panel, 1, sums, COLUMNS); };
  const double work = double(a.panels() * COLUMNS) * double(a.k) * (0.05 + 0.001 * double(a.rows));
  walk_tiles(x, a.panels(), c.steps, STEP8, a.packed, work, tile, done);
}
#endif

template <int BITS, class T>
void run(const Linear<T>& a, bool scalar) {
  if (scalar) return run_as<ScalarInts, BITS>(a);
#ifdef __AMX_TILE__
  if (BITS == 8) return in_slices(a, a.k, run_tiles8<T>);
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
  if (__builtin_cpu_supports("avx512vnni")) return run_as<VnniInts, BITS>(a);
#endif
  run_as<NativeInts, BITS>(a);
}

}  // namespace

template <class T>
void linear8(const Linear<T>& a, bool scalar) {
  run<8>(a, scalar);
}
template <class T>
void linear4(const Linear<T>& a, bool scalar) {
  run<4>(a, scalar);
}
template void linear8(const Linear<float>&, bool);
template void linear8(const Linear<bf16>&, bool);
template void linear4(const Linear<float>&, bool);
template void linear4(const Linear<bf16>&, bool);

void linear_pack8(const int8_t* q, uint8_t* packed, int64_t n, int64_t k) {
  const int64_t steps = (k + INPUTS - 1) / INPUTS;
  for_each((n + COLUMNS - 1) / COLUMNS, double(n) * double(k), [=](int64_t panel) {
    uint8_t* to = packed + panel * steps * STEP8;
    for (int64_t s = 0; s < steps * INPUTS; s += 4)
      for (int64_t c = panel * COLUMNS; c < (panel + 1) * COLUMNS; c++)
        for (int64_t i = s; i < s + 4; i++) *to++ = uint8_t(128 + (c < n && i < k ? q[c * k + i] : 0));
  });
}

void linear_pack4(const int8_t* q, const bf16* scale, uint8_t* packed, int64_t n, int64_t k) {
  const int64_t steps = (k + INPUTS - 1) / INPUTS, groups = (k + GROUP - 1) / GROUP;
  for_each((n + COLUMNS - 1) / COLUMNS, double(n) * double(k), [=](int64_t panel) {
    const auto code = [=](int64_t c, int64_t i) { return 8 + (c < n && i < k ? q[c * k + i] : 0); };
    uint8_t* to = packed + panel * steps * STEP4;
    for (int64_t g = 0; g < steps * INPUTS / GROUP; g++) {
      for (int64_t s = g * GROUP; s < g * GROUP + GROUP / 2; s += 4)
        for (int64_t c = panel * COLUMNS; c < (panel + 1) * COLUMNS; c++)
          for (int64_t i = s; i < s + 4; i++) *to++ = uint8_t(code(c, i) | code(c, i + GROUP / 2) << 4);
      for (int64_t c = panel * COLUMNS; c < (panel + 1) * COLUMNS; c++, to += 2) {
        const bf16 s = c < n && g < groups ? scale[c * groups + g] : bf16{0};
        std::memcpy(to, &s, 2);
      }
    }
  });
}

}  // namespace specedge
