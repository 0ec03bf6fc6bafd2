// The CPU kernels as the bindings see them: raw pointers and sizes, no torch, so that each file compiles in seconds.
//
// Shapes are those of specedge/kernels/reference.py and have been checked by bindings.cpp. `scalar` asks for the twin (vec.h).
// Invariant: the bits of a row depend on that row alone: not on the other rows, where its keys lie, or the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "vec.h"

namespace specedge {

// Run f(0) .. f(tasks - 1) on torch's threads, or on this one alone if `work` (about: nanoseconds) would not pay for waking others.
void for_each(int64_t tasks, double work, const std::function<void(int64_t)>& f);
int64_t threads();  // that torch would use

// Memory from the start of a cache line on. A tile whose lines cross into the next takes twice the loads.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
};
template <class T>
using Vector = std::vector<T, Aligned<T>>;

// The same, not cleared.
struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <class T>
std::unique_ptr<T[], Free> room_for(int64_t n) {
  return std::unique_ptr<T[], Free>(Aligned<T>().allocate(size_t(n)));
}

template <class T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps, bool scalar);

template <class T>  // total = x + residual, out = its norm
void add_rms_norm(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t rows, int64_t width, float eps, bool scalar);

template <class T>
void silu_mul(const T* x, T* out, int64_t rows, int64_t width, bool scalar);  // width = F

template <class T>
struct Rope {
  const T* qkv;
  const float *cos, *sin;
  const int32_t *positions, *slots;
  T *q, *k, *v;  // k, v: the two halves of rows_kv
  int64_t rows, heads, kv_heads, dim;
};
template <class T>
void rope_write(const Rope<T>& a, bool scalar);

template <class T>
struct Attention {
  const T *q, *rows_k, *rows_v, *pages_k, *pages_v;
  const int32_t *segments, *page_table, *q_pos, *k_pos;
  const uint64_t* anc;
  T* out;
  int64_t segment_count, heads, kv_heads, dim, page_size, table_width, anc_words;
  float scale;
  int64_t window;
};
void attention(const Attention<float>& a, bool scalar);
void attention(const Attention<bf16>& a, bool scalar);

constexpr int64_t COLUMNS = 32;  // of a panel of weights

// y = x W^T (times scale) (plus bias), which may be null. It goes to logits, if they are there, else to out. Of a gated layer each panel holds 16
// columns of a gate and the 16 of its multiplicand, and y is silu(gate) * up [rows][n]; scale and bias are in the order of the columns.
template <class T>
struct Linear {
  const T* x;
  const void* packed;
  const float* scale;
  const T* bias;
  T* out;
  float* logits;
  int64_t rows, n, k;
  bool gated;

  int64_t panels() const { return gated ? (n + LANES - 1) / LANES : (n + COLUMNS - 1) / COLUMNS; }
  int64_t columns() const { return gated ? panels() * COLUMNS : n; }  // that scale and bias have
};
// Words of 4 bytes that the weights of an output take; of bf16 whole tiles where tiles are multiplied (amx.h).
template <class T>
constexpr int64_t words(int64_t k) {
#ifdef __AMX_TILE__
  if (sizeof(T) == 2) return (k + 31) / 32 * 16;
#endif
  return (k * int64_t(sizeof(T)) + 3) / 4;
}
// Panels of 32 outputs (linear.h), in each [words][32][2] for bf16 and [K][32] for float; what is not there is zero.
template <class T>
void linear_pack(const T* weight, T* packed, int64_t n, int64_t k);
template <class T>
void linear(const Linear<T>& a, bool scalar);

// Weights of 8 or 4 bits: panels of 32 outputs, in each a step for every 128 inputs. 8 bits: [32][32][4] of q + 128. 4 bits: for every 32 inputs
// [4][32][4] of q + 8, the lower half of a byte for inputs 0 .. 15 and the upper for 16 .. 31, then the 32 scales.
constexpr int64_t INPUTS = 128, STEP8 = INPUTS * 32, STEP4 = INPUTS * 32 / 2 + INPUTS / 32 * 32 * 2;
void linear_pack8(const int8_t* q, uint8_t* packed, int64_t n, int64_t k);
void linear_pack4(const int8_t* q, const bf16* scale, uint8_t* packed, int64_t n, int64_t k);  // scale [n][k / 32, rounded up]
template <class T>
void linear8(const Linear<T>& a, bool scalar);
template <class T>
void linear4(const Linear<T>& a, bool scalar);

void gumbel(uint64_t seed, uint32_t position, float* out, int64_t vocab);

void sample(const float* logits, const float* noise, const int32_t* noise_row, const float* inv_temperature, int64_t* out, int64_t rows,
            int64_t vocab, int64_t limit, bool scalar);

// top_p as float64, min_p as ln(min_p) or -inf; see reference.truncate.
struct Filters {
  const float *inv_temperature, *log_min_p;
  const int32_t* top_k;
  const double* top_p;
};
void truncate(const float* logits, const Filters& f, float* out, int64_t rows, int64_t vocab, int64_t limit);

}  // namespace specedge
