// How a linear layer walks its weights, whatever they are made of; linear.cpp and linear_int.cpp bring the arithmetic.
//
// Weights are packed into panels of 32 columns (outputs), k running along the panel, so that a thread reads one stream of memory. Up to `wide`
// rows of x take two panels at once, up to `tall` rows one, so that as many rows as the registers hold pass over the weights in one go, straight
// from DRAM. More rows go tile by tile over blocks of a panel that stay in L2, sums in float32 being carried from block to block.
// Invariant: an output is one sum in order of k, whatever the rows, tiles, blocks and threads.
#pragma once

#include <algorithm>
#include <new>

#include "kernels.h"

namespace specedge {

constexpr int64_t SUMS = 2 * COLUMNS;       // between rows of sums
constexpr int64_t BLOCK_BYTES = 128 << 10;  // of a panel: an eighth of L2
constexpr int64_t AHEAD = 4096;             // bytes that a tile prefetches ahead: past the page where the hardware stops

// Call tile(panel, panels, row, rows, first step, end step, sums) for all tiles and done(panel, panels, sums [rows][SUMS]) after each panel or
// pair of panels, on all threads. A tile adds to the sums. There are two panels only with at most `wide` rows.
template <class Tile, class Done>
void walk(int64_t rows, int64_t panels, int64_t steps, int64_t step_bytes, int64_t wide, int64_t tall, double work, Tile tile, Done done) {
  const int64_t parts = std::min(threads(), panels), tiles = (rows + tall - 1) / tall;  // of even heights: 32 rows are 11 + 10 + 11
  const int64_t block = tiles == 1 ? steps : BLOCK_BYTES / step_bytes;
  for_each(parts, work, [&](int64_t part) {
    const auto all = room_for<float>(rows * SUMS);
    float* sums = all.get();
    const int64_t last = panels * (part + 1) / parts;
    for (int64_t panel = panels * part / parts, n; panel < last; panel += n) {
      n = rows <= wide && panel + 2 <= last ? 2 : 1;
      std::fill_n(sums, rows * SUMS, 0.0f);
      for (int64_t from = 0; from < steps; from += block)
        for (int64_t i = 0; i < tiles; i++) {
          const int64_t row = rows * i / tiles, count = rows * (i + 1) / tiles - row;
          tile(panel, int(n), row, int(count), from, std::min(steps, from + block), sums + row * SUMS);
        }
      done(panel, n, sums);
    }
  });
}

// Round the sums [rows][apart] of a panel or two to the output: times scale (if there is one), plus bias. Logits are rounded all the same, and so
// are gate and up before they are multiplied: as if each had been written first.
template <class V, class T>
void finish(const Linear<T>& a, int64_t panel, int64_t panels, const float* sums, int64_t apart = SUMS) {
  const auto rounded = [&](int64_t r, int64_t c, int n, T* to) {
    V y = V::load(sums + r * apart + c - panel * COLUMNS);
    if (a.scale) y = y * V::load(a.scale + c, n);
    if (a.bias) y = y + V::load(a.bias + c, n);
    y.store(to, n);
  };
  T gate[LANES], up[LANES];
  for (int64_t r = 0; r < a.rows; r++)
    for (int64_t p = panel; p < panel + panels; p++) {
      if (a.gated) {
        rounded(r, p * COLUMNS, LANES, gate), rounded(r, p * COLUMNS + LANES, LANES, up);
        silu_mul(V::load(gate), V::load(up)).store(a.out + r * a.n + p * LANES, int(std::min<int64_t>(LANES, a.n - p * LANES)));
        continue;
      }
      for (int64_t c = p * COLUMNS; c < std::min(a.n, (p + 1) * COLUMNS); c += LANES) {
        const int n = int(std::min<int64_t>(LANES, a.n - c));
        if (a.logits)
          rounded(r, c, n, gate), V::load(gate, n).store(a.logits + r * a.n + c, n);
        else
          rounded(r, c, n, a.out + r * a.n + c);
      }
    }
}

}  // namespace specedge
