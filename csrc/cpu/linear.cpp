// Linear layers over float32 and bfloat16 weights. Knows nothing of layers or models.
//
// Invariant: output n of a row is one sum over k in order, kept in float32 and rounded once at the end, at any number of rows. In bfloat16 a pair
// of products is added odd k first, each by one fma: what vdpbf16ps does (checked on 2 million random triples), so that processors with and
// without it agree, except that it takes and leaves subnormal numbers as zero. One core of a Zen 4 does 222 GFLOP/s with it, 113 by fma.
#include <type_traits>
#include <vector>

#include "amx.h"

namespace specedge {
namespace {

// What a step of k is: words of weights, one per column, against one word of x.
template <class V_>
struct Singles {
  using V = V_;
  using T = float;
  static constexpr int64_t STEP = 1;
  static V add(V sum, V w, const float* x) { return fma(w, V::set(*x), sum); }
};
template <class V_>
struct Pairs {
  using V = V_;
  using T = bf16;
  static constexpr int64_t STEP = 2;
  static V add(V sum, V w, const float* x) {
    const uint32_t u = std::bit_cast<uint32_t>(*x);
    sum = fma(high(w), V::set(std::bit_cast<float>(u & 0xFFFF0000u)), sum);
    return fma(low(w), V::set(std::bit_cast<float>(u << 16)), sum);
  }
};
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
struct DotPairs {
  using V = Avx512;
  using T = bf16;
  static constexpr int64_t STEP = 2;
  static V add(V sum, V w, const float* x) {  // as assembly: no level of setup.py promises the instruction, linear() asks the processor
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(_mm512_set1_ps(*x)));
    return sum;
  }
};
#endif

// Rows of a tile of four panels and of one: 24 of 32 registers hold sums. AVX2 has 16, and a vector takes two.
template <class V>
struct Shape {
  static constexpr int WIDE = 6, TALL = 12;
};
template <>
struct Shape<Scalar> {
  static constexpr int WIDE = 0, TALL = 1;
};
#if defined(__AVX2__) && defined(__FMA__)
template <>
struct Shape<Avx2> {
  static constexpr int WIDE = 0, TALL = 3;
};
#endif

// sums[i] += x[i] . w for M rows of x over `steps` words; P panels lie `apart` words from each other.
template <class Step, int M, int P>
void tile(const float* x, int64_t stride, const float* w, int64_t apart, int64_t steps, float* sums) {
  using V = typename Step::V;
  constexpr int EACH = COLUMNS / LANES;
  V sum[M][P * EACH];
  for (int i = 0; i < M; i++)
    for (int t = 0; t < P * EACH; t++) sum[i][t] = V::load(sums + i * SUMS + t * LANES);
  for (int64_t s = 0; s < steps; s++) {
    V column[P * EACH];
    for (int p = 0; p < P; p++)
      for (int t = 0; t < EACH; t++) column[p * EACH + t] = V::load(w + p * apart + s * COLUMNS + t * LANES);
    for (int p = 0; p < P; p++)
      for (int64_t line = 0; line < COLUMNS; line += 16) __builtin_prefetch(w + p * apart + s * COLUMNS + line + AHEAD / 4);
    for (int i = 0; i < M; i++)
      for (int t = 0; t < P * EACH; t++) sum[i][t] = Step::add(sum[i][t], column[t], x + i * stride + s);
  }
  for (int i = 0; i < M; i++)
    for (int t = 0; t < P * EACH; t++) sum[i][t].store(sums + i * SUMS + t * LANES);
}

// The tile of `rows` rows, which is at most M.
template <class Step, int M, int P>
auto tile_of(int rows) {
  if constexpr (M == 1)
    return tile<Step, 1, P>;
  else
    return rows == M ? tile<Step, M, P> : tile_of<Step, M - 1, P>(rows);
}

template <class Step>
void run(const Linear<typename Step::T>& a) {
  using V = typename Step::V;
  using T = typename Step::T;
  const int64_t steps = (a.k + Step::STEP - 1) / Step::STEP;
  const T* rows = a.x;
  std::vector<T> padded;
  if (a.k % Step::STEP) {
    padded.resize(size_t(a.rows * steps * Step::STEP));
    for (int64_t r = 0; r < a.rows; r++) std::copy_n(a.x + r * a.k, a.k, padded.data() + r * steps * Step::STEP);
    rows = padded.data();
  }
  const float *x = reinterpret_cast<const float*>(rows), *w = static_cast<const float*>(a.packed);
  const auto add = [=](int64_t panel, int panels, int64_t row, int count, int64_t from, int64_t to, float* sums) {
    auto f = tile_of<Step, Shape<V>::TALL, 1>(count);
    if constexpr (Shape<V>::WIDE > 0)
      if (panels == 2) f = tile_of<Step, Shape<V>::WIDE, 2>(count);
    f(x + row * steps + from, steps, w + (panel * steps + from) * COLUMNS, steps * COLUMNS, to - from, sums);
  };
  const auto done = [=](int64_t panel, int64_t panels, const float* sums) { finish<V>(a, panel, panels, sums); };
  const double work = double(a.panels() * COLUMNS) * double(a.k) * (0.1 + 0.01 * double(a.rows));
  walk(a.rows, a.panels(), steps, COLUMNS * 4, Shape<V>::WIDE, Shape<V>::TALL, work, add, done);
}

#ifdef __AMX_TILE__
// sums[i] += x[i] . w for the rows of a pass, of which there are more than 16 if BOTH; x as in TileRows.
template <bool BOTH>
void pass_pairs(const Pass& p, const bf16* x) {
  constexpr int64_t LINE = COLUMNS * 4;  // bytes between words of k and between rows of sums
  float *const upper = p.sums, *const lower = p.sums + TILE_ROWS * COLUMNS;
  if (p.from == 0) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(upper, LINE), tile_load<1>(upper + LANES, LINE);
    if (BOTH) tile_load<2>(lower, LINE), tile_load<3>(lower + LANES, LINE);
  }
  const char *w = p.w, *fetch = p.fetch;
  for (int64_t s = p.from; s < p.to; s += TILE_WORDS, w += TWO_TILES, x += p.height * 2 * TILE_WORDS) {
    p.ahead(fetch);
    tile_load<6>(w, LINE), tile_load<7>(w + TILE_BYTES, LINE);
    tile_load<4>(x, TILE_BYTES);
    tile_dot_pairs<0, 4, 6>(), tile_dot_pairs<1, 4, 7>();
    if (!BOTH) continue;
    tile_load<5>(x + TILE_ROWS * 2 * TILE_WORDS, TILE_BYTES);
    tile_dot_pairs<2, 5, 6>(), tile_dot_pairs<3, 5, 7>();
  }
  tile_store<0>(upper, LINE), tile_store<1>(upper + LANES, LINE);
  if (BOTH) tile_store<2>(lower, LINE), tile_store<3>(lower + LANES, LINE);
}

// The twin: what tdpbf16ps does, but for subnormal numbers (checked on 272,000 random sums).
void pass_twin(const Pass& p, const bf16* x) {
  const bf16* w = reinterpret_cast<const bf16*>(p.w);
  if (p.from == 0) std::fill_n(p.sums, p.height * COLUMNS, 0.0f);
  for (int64_t s = p.from; s < p.to; s += TILE_WORDS, w += TWO_TILES / 2, x += p.height * 2 * TILE_WORDS)
    for (int64_t i = 0; i < p.height; i++)
      for (int64_t c = 0; c < COLUMNS; c++) {
        float part[2] = {};
        for (int64_t k = 0; k < 2 * TILE_WORDS; k++)
          part[k % 2] = std::fma(to_float(x[i * 2 * TILE_WORDS + k]), to_float(w[(k / 2 * COLUMNS + c) * 2 + k % 2]), part[k % 2]);
        p.sums[i * COLUMNS + c] += part[0] + part[1];
      }
}

void run_tiles(const Linear<bf16>& a, bool scalar) {
  const TileRows<bf16> x(a.x, a.rows, a.k);
  const auto tile = [&](const Pass& p) {
    const auto f = scalar ? pass_twin : p.height > TILE_ROWS ? pass_pairs<true> : pass_pairs<false>;
    f(p, x.at(p.row, 2 * p.from));
  };
  const auto done = [&](int64_t panel, const float* sums) { finish<Native>(a, panel, 1, sums, COLUMNS); };
  const double work = double(a.panels() * COLUMNS) * double(a.k) * (0.1 + 0.001 * double(a.rows));
  walk_tiles(x, a.panels(), words<bf16>(a.k), COLUMNS * 4, a.packed, work, tile, done);
}
#endif

}  // namespace

template <class T>
void linear_pack(const T* weight, T* packed, int64_t n, int64_t k) {
  constexpr int64_t STEP = 4 / sizeof(T);
  const int64_t panels = (n + COLUMNS - 1) / COLUMNS, steps = words<T>(k);
  for_each(panels, double(n) * double(k), [=](int64_t panel) {
    T* to = packed + panel * steps * COLUMNS * STEP;
    for (int64_t s = 0; s < steps; s++)
      for (int64_t c = panel * COLUMNS; c < (panel + 1) * COLUMNS; c++)
        for (int64_t i = s * STEP; i < (s + 1) * STEP; i++) *to++ = c < n && i < k ? weight[c * k + i] : T{};
  });
}

template <>
void linear(const Linear<float>& a, bool scalar) {
  scalar ? run<Singles<Scalar>>(a) : run<Singles<Native>>(a);
}
template <>
void linear(const Linear<bf16>& a, bool scalar) {
#ifdef __AMX_TILE__
  in_slices(a, a.k * 2, [&](const Linear<bf16>& slice) { run_tiles(slice, scalar); });
#else
  if (scalar) return run<Pairs<Scalar>>(a);
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
  if (__builtin_cpu_supports("avx512bf16")) return run<DotPairs>(a);
#endif
  run<Pairs<Native>>(a);
#endif
}
template void linear_pack(const float*, float*, int64_t, int64_t);
template void linear_pack(const bf16*, bf16*, int64_t, int64_t);

}  // namespace specedge
