// Tile registers (AMX), where the level of the build has them: 16 rows of x times 16 columns of weights over 64 bytes of k in one instruction, which
// takes 16 cycles for 16 rows and 9 for up to 8. One core of an Intel Xeon does 3.0 TFLOP/s with bf16 tiles in registers and 2.0 from L1; by
// vdpbf16ps it does 0.1.
//
// A tile is 16 lines of 64 bytes. Panels (kernels.h) are tiles of weights as they are: 16 words of k by 16 columns, the lines 128 bytes apart, so
// that 2 KB of a panel are two tiles side by side. Rows of x are brought into such an order once (TileRows). A pass takes up to 32 rows and one
// panel, four products for four loads: registers 0 .. 3 hold sums, 4 and 5 x, 6 and 7 weights.
// Invariant: a row of x meets its own row of sums alone, so that its bits depend on no other row and on no number of rows.
#pragma once

#include "linear.h"

#ifdef __AMX_TILE__

namespace specedge {

constexpr int64_t TILE_ROWS = 16, PAIR = 2 * TILE_ROWS;    // rows of a tile and of a pass
constexpr int64_t TILE_BYTES = 64, TILE_WORDS = 16;        // of k
constexpr int64_t TWO_TILES = TILE_ROWS * 2 * TILE_BYTES;  // bytes of a panel that are two tiles
constexpr int64_t TILES_BLOCK = 16 << 10;                  // of a panel, which stay in L1: 512 rows took 10 to 20 % longer by 64 KB
constexpr int64_t X_BYTES = 1 << 20;                       // half of L2

// The registers as these kernels take them, on this thread, for its lifetime. Tiles of x and of sums have `rows` rows.
class Tiles {
 public:
  explicit Tiles(int64_t rows) {
    struct {
      uint8_t palette = 1, start = 0, zero[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = TILE_BYTES, config.rows[i] = uint8_t(i < 6 ? rows : TILE_ROWS);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
};

template <int T>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// sums += x . w for pairs of bf16: from 0, even k and odd k each in order by fma, then both together, then onto the sum.
template <int SUMS_, int X, int W>
inline void tile_dot_pairs() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS_), "i"(X), "i"(W));
}
// The same for fours of signed x and unsigned w, exactly.
template <int SUMS_, int X, int W>
inline void tile_dot_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS_), "i"(X), "i"(W));
}

// sums [16][32], `apart` floats from row to row, += (= if FRESH) a [16][32 steps] . w [16 steps words][32]; rows of a are `stride` bytes apart.
// It takes Tiles(16).
struct TilePairs {
  // To words of w or elements of a: a subnormal number becomes zero here and not in the product.
  static void narrow(Avx512 x, bf16* to) {
    __m256i y;
    asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x.v));
    _mm256_storeu_si256((__m256i*)to, y);
  }
  template <bool FRESH>
  static void add(const bf16* a, int64_t stride, const void* w, int64_t steps, float* sums, int64_t apart) {
    constexpr int64_t LINE = COLUMNS * 4;
    if (FRESH)
      tile_zero<0>(), tile_zero<1>();
    else
      tile_load<0>(sums, apart * 4), tile_load<1>(sums + LANES, apart * 4);
    for (const char* at = static_cast<const char*>(w); steps > 0; steps--, at += TWO_TILES, a += 2 * TILE_WORDS) {
      tile_load<6>(at, LINE), tile_load<7>(at + TILE_BYTES, LINE);
      tile_load<4>(a, stride);
      tile_dot_pairs<0, 4, 6>(), tile_dot_pairs<1, 4, 7>();
    }
    tile_store<0>(sums, apart * 4), tile_store<1>(sums + LANES, apart * 4);
  }
};

// The twin: what tdpbf16ps does, but for subnormal numbers, as in linear.cpp.
struct TilePairsTwin {
  static void narrow(const Scalar& x, bf16* to) { x.store(to); }
  template <bool FRESH>
  static void add(const bf16* a, int64_t stride, const void* w, int64_t steps, float* sums, int64_t apart) {
    const bf16* words = static_cast<const bf16*>(w);
    for (int64_t i = 0; i < TILE_ROWS; i++)
      for (int64_t c = 0; c < COLUMNS; c++) {
        const bf16* x = a + i * stride / 2;
        float sum = FRESH ? 0 : sums[i * apart + c];
        for (int64_t s = 0; s < steps; s++) {
          float part[2] = {};
          for (int64_t k = s * 2 * TILE_WORDS; k < (s + 1) * 2 * TILE_WORDS; k++)
            part[k % 2] = std::fma(to_float(x[k]), to_float(words[(k / 2 * COLUMNS + c) * 2 + k % 2]), part[k % 2]);
          sum += part[0] + part[1];
        }
        sums[i * apart + c] = sum;
      }
  }
};

// Bytes of k that passes over `rows` rows of `bytes` take at once: all, if one pass reads the weights or two pass over a panel of 64 KB (in blocks 64
// rows of 896 took 11 % longer, and 20 % less of 4,864), else as many as make a block.
inline int64_t at_once(int64_t rows, int64_t bytes) {
  return rows <= PAIR || (rows <= 2 * PAIR && bytes / TILE_BYTES * TWO_TILES <= 64 << 10) ? bytes : TILES_BLOCK / TWO_TILES * TILE_BYTES;
}

// x [rows][k] in the order in which walk_tiles reads it, so that each tile is 1 KB of one stream: for each block of k, for each 32 rows, for each 64
// bytes of k, those bytes of all rows. What is not there is zero: k is rounded up to 64 bytes, and rows above 16 to 16.
template <class T>
struct TileRows {
  static constexpr int64_t EACH = TILE_BYTES / sizeof(T);
  int64_t rows, width, block;  // rounded up
  std::unique_ptr<T[], Free> all;

  TileRows(const T* x, int64_t count, int64_t k)
      : rows(count <= TILE_ROWS ? count : (count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS),
        width((k + EACH - 1) / EACH * EACH),
        block(at_once(rows, width * sizeof(T)) / sizeof(T)),
        all(room_for<T>(rows * width)) {
    for_each((rows + PAIR - 1) / PAIR, double(rows) * double(width) / 20, [=, this](int64_t i) {
      const int64_t first = i * PAIR, height = std::min(rows - first, PAIR);
      for (int64_t r = first; r < first + height; r++)
        for (int64_t c = 0; c < width; c += EACH) {
          T* to = all.get() + place(first, c / block * block) + c % block * height + (r - first) * EACH;
          const int64_t there = r < count ? std::min(EACH, k - c) : 0;
          if (there == EACH) {
            std::memcpy(to, x + r * k + c, TILE_BYTES);  // of a known size: one load and one store
          } else {
            std::fill_n(to, EACH, T{});
            std::copy_n(x + r * k + c, there, to);
          }
        }
    });
  }
  int64_t place(int64_t row, int64_t column) const { return rows * column + row * std::min(block, width - column); }
  // From column on, the first of a block, of the rows from a pass's first.
  const T* at(int64_t row, int64_t column) const { return all.get() + place(row, column); }
};

// Whether sums of all panels of a thread stay in L2, so that k can be sliced in place of the rows.
inline bool keeps_sums(int64_t rows, int64_t panels) {
  return rows * (panels + threads() - 1) / threads() * COLUMNS * int64_t(sizeof(float)) <= X_BYTES;
}

// f(a layer over some rows) for as many at a time as leave half of L2 to the weights: x of `bytes` a row is read once for every panel.
template <class T, class F>
void in_slices(const Linear<T>& a, int64_t bytes, F f) {
  const int64_t most = keeps_sums(a.rows, a.panels()) ? a.rows : std::max(2 * PAIR, X_BYTES / bytes / PAIR * PAIR);
  for (int64_t first = 0; first < a.rows; first += most) {
    Linear<T> slice = a;
    slice.x += first * a.k, slice.rows = std::min(a.rows - first, most);
    if (a.logits) slice.logits += first * a.n;
    if (a.out) slice.out += first * a.n;
    f(slice);
  }
}

// What a pass works on: rows row .. row + height of x, steps from .. to of a panel, whose first is at w. While it does it fetches `lines` cache
// lines from `fetch` on for every 2 KB of w. Its first steps, from 0 on, find no sums.
struct Pass {
  int64_t row, height, from, to;
  const char *w, *fetch;
  int64_t lines;
  float* sums;

  template <class T>
  void ahead(T& at) const {
    for (int64_t i = 0; i < lines; i++, at += 64) __builtin_prefetch(at, 0, 2);  // to L2; into L1 64 rows took half as long again
  }
};

// Call tile(pass) for all passes and done(panel, sums [rows][COLUMNS]) after each panel, on all threads. The passes over a panel share the work of
// fetching what comes next, so that memory streams while they multiply; many go by blocks, which stay in L1. x is in L2: by slices of k,
// where it is larger than half of that, and then so are the sums of all panels.
template <class T, class Tile, class Done>
void walk_tiles(const TileRows<T>& x, int64_t panels, int64_t steps, int64_t step_bytes, const void* packed, double work, Tile tile, Done done) {
  const int64_t rows = x.rows, row_bytes = x.width * int64_t(sizeof(T));
  const int64_t parts = std::min(threads(), panels), passes = (rows + PAIR - 1) / PAIR, lines = (TWO_TILES / 64 + passes - 1) / passes;
  const int64_t block = x.block / x.EACH * TWO_TILES / step_bytes;
  const int64_t slices = keeps_sums(rows, panels) ? (rows * row_bytes + X_BYTES - 1) / X_BYTES : 1;
  const int64_t slice = ((steps + slices - 1) / slices + block - 1) / block * block;
  for_each(parts, work, [&](int64_t part) {
    const Tiles tiles(std::min(rows, TILE_ROWS));
    const int64_t begin = panels * part / parts, end = panels * (part + 1) / parts, apart = slices > 1 ? rows * COLUMNS : 0;
    const auto sums = room_for<float>(std::max(rows * COLUMNS, apart * (end - begin)));
    for (int64_t first = 0; first < steps; first += slice)
      for (int64_t panel = begin; panel < end; panel++) {
        const int64_t last = std::min(steps, first + slice);
        float* to_sums = sums.get() + (panel - begin) * apart;
        for (int64_t from = first; from < last; from += block) {
          const int64_t to = std::min(last, from + block), bytes = (to - from) * step_bytes;
          const char* w = static_cast<const char*>(packed) + (panel * steps + from) * step_bytes;
          const char* next = to < last ? w + bytes : w + (steps + first - from) * step_bytes;
          for (int64_t row = 0; row < rows; row += PAIR) {
            const char* fetch = passes == 1 ? w + AHEAD : next + row / PAIR * (bytes / TWO_TILES * lines * 64);
            tile(Pass{row, std::min(rows - row, PAIR), from, to, w, fetch, lines, to_sums + row * COLUMNS});
          }
        }
        if (last == steps) done(panel, to_sums);
      }
  });
}

}  // namespace specedge

#endif
