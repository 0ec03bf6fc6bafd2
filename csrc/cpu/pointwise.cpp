// rms_norm, add_rms_norm, silu_mul, rope_write: one row after the other, each on its own. Knows nothing of sequences.
//
// Invariant: float32 inside, one rounding at the end; sums run in one fixed order. rope_write multiplies and subtracts without fma, which
// makes it equal to the reference bit for bit.
#include <algorithm>

#include "kernels.h"

namespace specedge {
namespace {

template <class V, class T>
void norm_row(const T* x, const T* weight, T* out, int64_t width, float eps) {
  V squares = V::set(0);
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const V a = V::load(x + i);
    squares = fma(a, a, squares);
  }
  const int tail = int(width - i);
  if (tail) {
    const V a = V::load(x + i, tail);
    squares = fma(a, a, squares);
  }
  const V r = V::set(1.0f / std::sqrt(sum(squares) / float(width) + eps));
  for (i = 0; i + LANES <= width; i += LANES) (V::load(x + i) * r * V::load(weight + i)).store(out + i);
  if (tail) (V::load(x + i, tail) * r * V::load(weight + i, tail)).store(out + i, tail);
}

template <class V, class T>
void add_row(const T* x, const T* residual, T* total, int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) {
    const int n = int(std::min<int64_t>(LANES, width - i));
    (V::load(x + i, n) + V::load(residual + i, n)).store(total + i, n);
  }
}

template <class V, class T>
void silu_row(const T* gate, const T* up, T* out, int64_t width) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) silu_mul(V::load(gate + i), V::load(up + i)).store(out + i);
  const int tail = int(width - i);
  if (tail) silu_mul(V::load(gate + i, tail), V::load(up + i, tail)).store(out + i, tail);
}

template <class V, class T>
void rotate(const T* in, T* out, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += LANES) {
    const int n = int(std::min<int64_t>(LANES, half - i));
    const V a = V::load(in + i, n), b = V::load(in + half + i, n), c = V::load(cos + i, n), s = V::load(sin + i, n);
    (a * c - b * s).store(out + i, n);
    (b * c + a * s).store(out + half + i, n);
  }
}

template <class V, class T>
void rope_queries(const Rope<T>& a, int64_t row) {
  const int64_t half = a.dim / 2, position = a.positions[row] * half;
  const T* in = a.qkv + row * (a.heads + 2 * a.kv_heads) * a.dim;
  for (int64_t h = 0; h < a.heads; h++) rotate<V>(in + h * a.dim, a.q + (row * a.heads + h) * a.dim, a.cos + position, a.sin + position, half);
}

template <class V, class T>
void write_kv(const Rope<T>& a, int64_t row) {
  const int64_t half = a.dim / 2, position = a.positions[row] * half, slot = a.slots[row] * a.kv_heads * a.dim;
  const T* in = a.qkv + (row * (a.heads + 2 * a.kv_heads) + a.heads) * a.dim;
  for (int64_t h = 0; h < a.kv_heads; h++) rotate<V>(in + h * a.dim, a.k + slot + h * a.dim, a.cos + position, a.sin + position, half);
  std::copy_n(in + a.kv_heads * a.dim, a.kv_heads * a.dim, a.v + slot);
}

}  // namespace

template <class T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps, bool scalar) {
  const auto row = scalar ? norm_row<Scalar, T> : norm_row<Native, T>;
  for_each(rows, double(rows) * double(width) / 4, [=](int64_t r) { row(x + r * width, weight, out + r * width, width, eps); });
}

template <class T>
void add_rms_norm(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t rows, int64_t width, float eps, bool scalar) {
  const auto add = scalar ? add_row<Scalar, T> : add_row<Native, T>;
  const auto norm = scalar ? norm_row<Scalar, T> : norm_row<Native, T>;
  for_each(rows, double(rows) * double(width) / 3, [=](int64_t r) {
    const int64_t at = r * width;
    add(x + at, residual + at, total + at, width);
    norm(total + at, weight, out + at, width, eps);
  });
}

template <class T>
void silu_mul(const T* x, T* out, int64_t rows, int64_t width, bool scalar) {
  const auto row = scalar ? silu_row<Scalar, T> : silu_row<Native, T>;
  for_each(rows, double(rows) * double(width), [=](int64_t r) { row(x + 2 * r * width, x + (2 * r + 1) * width, out + r * width, width); });
}

// Keys on one thread: rows may share a slot only by mistake, but then the last one wins here as in the reference.
template <class T>
void rope_write(const Rope<T>& a, bool scalar) {
  const auto queries = scalar ? rope_queries<Scalar, T> : rope_queries<Native, T>;
  const auto kv = scalar ? write_kv<Scalar, T> : write_kv<Native, T>;
  for_each(a.rows, double(a.rows * a.heads * a.dim) / 3, [&](int64_t r) { queries(a, r); });
  for (int64_t r = 0; r < a.rows; r++) kv(a, r);
}

template void rms_norm(const float*, const float*, float*, int64_t, int64_t, float, bool);
template void rms_norm(const bf16*, const bf16*, bf16*, int64_t, int64_t, float, bool);
template void add_rms_norm(const float*, const float*, const float*, float*, float*, int64_t, int64_t, float, bool);
template void add_rms_norm(const bf16*, const bf16*, const bf16*, bf16*, bf16*, int64_t, int64_t, float, bool);
template void silu_mul(const float*, float*, int64_t, int64_t, bool);
template void silu_mul(const bf16*, bf16*, int64_t, int64_t, bool);
template void rope_write(const Rope<float>&, bool);
template void rope_write(const Rope<bf16>&, bool);

}  // namespace specedge
