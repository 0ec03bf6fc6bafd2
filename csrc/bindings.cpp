// The ops as torch sees them: schemas, checks at the boundary, dispatch on dtype. specedge/kernels/reference.py says what each op means.
//
// Knows nothing of arithmetic. Invariant: no index that comes in through a tensor reaches a kernel unchecked, so a mistake of the engine is
// an exception with a sentence and never a read or write outside a tensor. `scalar` runs the plain twin of a kernel (tests only).
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>

#include "cpu/kernels.h"

namespace specedge {

using at::Tensor;

void for_each(int64_t tasks, double work, const std::function<void(int64_t)>& f) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  if (threads <= 1 || work < 20e3) {  // a wake-up costs about 5 us, far more where another process has the core
    for (int64_t i = 0; i < tasks; i++) f(i);
    return;
  }
  std::atomic<int64_t> next = 0;  // by arrival: tasks differ in length, and a thread may lose its core
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < tasks;) f(i);
  });
}

int64_t threads() { return at::get_num_threads(); }

namespace {

template <class T>
constexpr at::ScalarType DTYPE = at::kFloat;
template <>
constexpr at::ScalarType DTYPE<bf16> = at::kBFloat16;

void check(const Tensor& t, const char* name, int64_t dim, at::ScalarType dtype) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, is on ", t.device());
  TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, has shape ", t.sizes());
  TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype, ", is ", t.scalar_type());
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous, has strides ", t.strides(), " for shape ", t.sizes());
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void check_range(const int32_t* x, int64_t n, int64_t limit, const char* name) {
  for (int64_t i = 0; i < n; i++) TORCH_CHECK(x[i] >= 0 && x[i] < limit, name, "[", i, "] = ", x[i], " is not in 0 .. ", limit - 1);
}

// Call f with a float or a bf16, as x has it.
template <class F>
void by_dtype(const Tensor& x, const char* name, F f) {
  if (x.scalar_type() == at::kFloat) return f(float());
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, name, " must be float32 or bfloat16 on the CPU, is ", x.scalar_type());
  f(bf16());
}

Tensor rms_norm_op(const Tensor& x, const Tensor& weight, double eps, bool scalar) {
  TORCH_CHECK(x.dim() >= 1, "x must have a dimension");
  const int64_t width = x.size(-1);
  const Tensor in = x.contiguous();
  Tensor out = at::empty_like(in);
  by_dtype(x, "x", [&]<class T>(T) {
    check(weight, "weight", 1, DTYPE<T>);
    TORCH_CHECK(weight.size(0) == width, "weight has ", weight.size(0), " elements for a width of ", width);
    if (width) rms_norm(data<T>(in), data<T>(weight), data<T>(out), in.numel() / width, width, float(eps), scalar);
  });
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm_op(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, bool scalar) {
  Tensor out = at::empty_like(x), total = at::empty_like(x);
  by_dtype(x, "x", [&]<class T>(T) {
    check(x, "x", 2, DTYPE<T>), check(residual, "residual", 2, DTYPE<T>), check(weight, "weight", 1, DTYPE<T>);
    TORCH_CHECK(residual.sizes() == x.sizes() && weight.size(0) == x.size(1), "residual is ", residual.sizes(), ", weight ", weight.sizes(),
                " for x ", x.sizes());
    add_rms_norm(data<T>(x), data<T>(residual), data<T>(weight), data<T>(out), data<T>(total), x.size(0), x.size(1), float(eps), scalar);
  });
  return {out, total};
}

Tensor silu_mul_op(const Tensor& x, bool scalar) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, "x must be [.., 2F], is ", x.sizes());
  const int64_t width = x.size(-1) / 2;
  const Tensor in = x.contiguous();
  auto sizes = in.sizes().vec();
  sizes.back() = width;
  Tensor out = at::empty(sizes, in.options());
  by_dtype(x, "x", [&]<class T>(T) {
    if (width) silu_mul(data<T>(in), data<T>(out), in.numel() / (2 * width), width, scalar);
  });
  return out;
}

Tensor rope_write_op(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions, const Tensor& slots, Tensor rows_kv,
                     int64_t heads, bool scalar) {
  TORCH_CHECK(rows_kv.dim() == 4 && rows_kv.size(0) == 2, "rows_kv must be [2, rows, Hkv, D], is ", rows_kv.sizes());
  const int64_t rows = qkv.size(0), slot_count = rows_kv.size(1), kv_heads = rows_kv.size(2), dim = rows_kv.size(3);
  TORCH_CHECK(dim % 8 == 0, "head dim must be a multiple of 8, is ", dim);
  check(cos, "cos", 2, at::kFloat), check(sin, "sin", 2, at::kFloat);
  check(positions, "positions", 1, at::kInt), check(slots, "slots", 1, at::kInt);
  TORCH_CHECK(cos.size(1) == dim / 2 && sin.sizes() == cos.sizes(), "cos and sin must be [max_position, ", dim / 2, "]");
  TORCH_CHECK(positions.size(0) == rows && slots.size(0) == rows, "positions and slots must have one element per row, ", rows);
  check_range(data<int32_t>(positions), rows, cos.size(0), "positions");
  check_range(data<int32_t>(slots), rows, slot_count, "slots");
  Tensor q = at::empty({rows, heads, dim}, qkv.options());
  by_dtype(qkv, "qkv", [&]<class T>(T) {
    check(qkv, "qkv", 2, DTYPE<T>), check(rows_kv, "rows_kv", 4, DTYPE<T>);
    TORCH_CHECK(qkv.size(1) == (heads + 2 * kv_heads) * dim, "qkv is ", qkv.size(1), " wide, not (", heads, " + 2 * ", kv_heads,
                ") * ", dim);
    T* k = data<T>(rows_kv);
    rope_write(Rope<T>{data<T>(qkv), data<float>(cos), data<float>(sin), data<int32_t>(positions), data<int32_t>(slots), data<T>(q), k,
                       k + slot_count * kv_heads * dim, rows, heads, kv_heads, dim},
               scalar);
  });
  return q;
}

Tensor attention_op(const Tensor& q, const Tensor& rows_kv, const Tensor& pages_kv, const Tensor& segments, const Tensor& page_table,
                    const Tensor& q_pos, const Tensor& k_pos, const Tensor& anc, double scale, int64_t window, bool scalar) {
  TORCH_CHECK(q.dim() == 3 && rows_kv.dim() == 4 && pages_kv.dim() == 5, "attention wants q [R, Hq, D], rows_kv [2, rows, Hkv, D], ",
              "pages_kv [2, P, Hkv, S, D]; got ", q.sizes(), ", ", rows_kv.sizes(), ", ", pages_kv.sizes());
  const int64_t rows = q.size(0), heads = q.size(1), dim = q.size(2), slots = rows_kv.size(1), kv_heads = rows_kv.size(2);
  const int64_t page_count = pages_kv.size(1), size = pages_kv.size(3);
  TORCH_CHECK(rows_kv.sizes() == at::IntArrayRef({2, slots, kv_heads, dim}), "rows_kv is ", rows_kv.sizes(), " with q ", q.sizes());
  TORCH_CHECK(pages_kv.sizes() == at::IntArrayRef({2, page_count, kv_heads, size, dim}), "pages_kv is ", pages_kv.sizes(), " with rows_kv ",
              rows_kv.sizes());
  TORCH_CHECK(dim % 8 == 0 && dim > 0 && kv_heads > 0 && heads % kv_heads == 0, "head dim must be a multiple of 8 and Hq one of Hkv: ",
              q.sizes(), ", ", rows_kv.sizes());
  check(segments, "segments", 2, at::kInt), check(page_table, "page_table", 2, at::kInt), check(anc, "anc", 2, at::kLong);
  check(q_pos, "q_pos", 1, at::kInt), check(k_pos, "k_pos", 1, at::kInt);
  TORCH_CHECK(segments.size(1) == 6 && page_table.size(0) == segments.size(0), "segments must be [B, 6] and page_table [B, M]; got ",
              segments.sizes(), ", ", page_table.sizes());
  TORCH_CHECK(q_pos.size(0) == rows && k_pos.size(0) == slots, "q_pos must have ", rows, " elements and k_pos ", slots);
  for (int64_t b = 0; b < segments.size(0); b++) {
    const int32_t* s = data<int32_t>(segments) + 6 * b;
    const int64_t q0 = s[0], nq = s[1], k0 = s[2], nk = s[3], prefix = s[4], causal = s[5];
    TORCH_CHECK(q0 >= 0 && nq >= 0 && q0 + nq <= rows, "segment ", b, ": queries ", q0, " + ", nq, " of ", rows);
    TORCH_CHECK(k0 >= 0 && nk >= 0 && k0 + nk <= slots, "segment ", b, ": keys ", k0, " + ", nk, " of ", slots);
    TORCH_CHECK(!causal || nk >= nq, "segment ", b, ": causal with ", nq, " queries and ", nk, " keys");
    TORCH_CHECK(causal || (anc.size(0) == rows && anc.size(1) * 64 >= nk), "segment ", b, ": anc is ", anc.sizes(), " for ", nk, " keys");
    TORCH_CHECK(prefix >= 0 && prefix <= page_table.size(1) * size, "segment ", b, ": prefix ", prefix, " exceeds the page table");
    check_range(data<int32_t>(page_table) + b * page_table.size(1), size ? (prefix + size - 1) / size : 0, page_count, "page_table");
  }
  Tensor out = at::zeros_like(q);
  by_dtype(q, "q", [&]<class T>(T) {
    check(q, "q", 3, DTYPE<T>), check(rows_kv, "rows_kv", 4, DTYPE<T>), check(pages_kv, "pages_kv", 5, DTYPE<T>);
    const T *rk = data<T>(rows_kv), *pk = data<T>(pages_kv);
    Attention<T> a{data<T>(q), rk, rk + slots * kv_heads * dim, pk, pk + page_count * kv_heads * size * dim};
    a.segments = data<int32_t>(segments), a.page_table = data<int32_t>(page_table), a.q_pos = data<int32_t>(q_pos);
    a.k_pos = data<int32_t>(k_pos), a.anc = reinterpret_cast<const uint64_t*>(data<int64_t>(anc)), a.out = data<T>(out);
    a.segment_count = segments.size(0), a.heads = heads, a.kv_heads = kv_heads, a.dim = dim, a.page_size = size;
    a.table_width = page_table.size(1), a.anc_words = anc.size(1), a.scale = float(scale), a.window = window;
    attention(a, scalar);
  });
  return out;
}

// Memory for packed weights, in huge pages where the system gives them. It is mapped afresh: what malloc gives again has small pages already, and so
// had half of the weights of a 0.5B, whose single rows then took 43 ms in place of 38.
Tensor packed_memory(at::IntArrayRef sizes, const at::TensorOptions& options) {
#ifdef MADV_HUGEPAGE
  constexpr size_t HUGE = 2 << 20;
  const size_t bytes = size_t(c10::multiply_integers(sizes)) * options.dtype().itemsize(), whole = (bytes + HUGE - 1) & ~(HUGE - 1);
  void* const got = bytes < HUGE / 2 ? MAP_FAILED : mmap(nullptr, whole + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got != MAP_FAILED) {
    char *const begin = static_cast<char*>(got), *const first = begin + (-uintptr_t(begin) & (HUGE - 1));
    if (first > begin) munmap(begin, size_t(first - begin));
    munmap(first + whole, size_t(begin + HUGE - first));
    madvise(first, whole, MADV_HUGEPAGE);
    return at::from_blob(first, sizes, [whole](void* p) { munmap(p, whole); }, options);
  }
#endif
  return at::empty(sizes, options);
}

Tensor linear_pack_op(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, "weight must be [N, K] and not empty, is ", weight.sizes());
  const Tensor in = weight.contiguous();
  const int64_t n = in.size(0), k = in.size(1);
  Tensor out;
  by_dtype(in, "weight", [&]<class T>(T) {
    constexpr int64_t step = 4 / sizeof(T);
    out = packed_memory({(n + 31) / 32, words<T>(k), 32, step}, in.options());
    linear_pack(data<T>(in), data<T>(out), n, k);
  });
  return out;
}

// q [N, K] and perhaps scales [N, K / 32] -> panels, 8 bits without scales and 4 with them.
Tensor linear_pack_int_op(const Tensor& q, const std::optional<Tensor>& scale) {
  check(q, "q", 2, at::kChar);
  TORCH_CHECK(q.numel() > 0, "q is empty");
  const int64_t n = q.size(0), k = q.size(1);
  Tensor out = packed_memory({(n + 31) / 32, (k + INPUTS - 1) / INPUTS, scale ? STEP4 : STEP8}, q.options().dtype(at::kByte));
  if (!scale) {
    linear_pack8(data<int8_t>(q), data<uint8_t>(out), n, k);
  } else {
    check(*scale, "scale", 2, at::kBFloat16);
    TORCH_CHECK(scale->sizes() == at::IntArrayRef({n, (k + 31) / 32}), "scale is ", scale->sizes(), " for q ", q.sizes());
    linear_pack4(data<int8_t>(q), data<bf16>(*scale), data<uint8_t>(out), n, k);
  }
  return out;
}

// Everything of a linear layer but its weights, checked; y is made, or is `logits`.
template <class T>
Linear<T> linear_of(const Tensor& x, const Tensor& packed, int64_t n, const std::optional<Tensor>& bias, bool gated,
                    const std::optional<Tensor>& logits, Tensor& y) {
  check(x, "x", 2, DTYPE<T>);
  if (bias) check(*bias, "bias", 1, DTYPE<T>);
  Linear<T> a{data<T>(x), packed.data_ptr(), nullptr, bias ? data<T>(*bias) : nullptr, nullptr, nullptr, x.size(0), n, x.size(1), gated};
  TORCH_CHECK(!bias || bias->size(0) == a.columns(), "bias must have ", a.columns(), " elements");
  TORCH_CHECK(!gated || !logits, "a gated layer has no logits");
  if (logits) {
    check(*logits, "logits", 2, at::kFloat);
    TORCH_CHECK(logits->size(0) == a.rows && logits->size(1) == n, "logits must be [", a.rows, ", ", n, "], are ", logits->sizes());
    y = *logits, a.logits = data<float>(y);
  } else {
    y = at::empty({a.rows, n}, x.options()), a.out = data<T>(y);
  }
  return a;
}

Tensor linear_op(const Tensor& x, const Tensor& packed, int64_t n, const std::optional<Tensor>& bias, bool scalar, bool gated,
                 const std::optional<Tensor>& logits) {
  Tensor y;
  by_dtype(x, "x", [&]<class T>(T) {
    constexpr int64_t step = 4 / sizeof(T);
    check(packed, "packed", 4, DTYPE<T>);
    const Linear<T> a = linear_of<T>(x, packed, n, bias, gated, logits, y);
    TORCH_CHECK(packed.sizes() == at::IntArrayRef({a.panels(), words<T>(a.k), COLUMNS, step}), "packed is ", packed.sizes(), " for ", n,
                " outputs of ", a.k, " inputs");
    if (a.rows) linear(a, scalar);
  });
  return y;
}

Tensor linear_int_op(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& scale, int64_t n, const std::optional<Tensor>& bias,
                     bool scalar, bool gated, const std::optional<Tensor>& logits) {
  Tensor y;
  check(packed, "packed", 3, at::kByte);
  if (scale) check(*scale, "scale", 1, at::kFloat);
  by_dtype(x, "x", [&]<class T>(T) {
    Linear<T> a = linear_of<T>(x, packed, n, bias, gated, logits, y);
    TORCH_CHECK(!scale || scale->size(0) == a.columns(), "scale must have ", a.columns(), " elements");
    TORCH_CHECK(packed.sizes() == at::IntArrayRef({a.panels(), (a.k + INPUTS - 1) / INPUTS, scale ? STEP8 : STEP4}), "packed is ",
                packed.sizes(), " for ", n, " outputs of ", a.k, " inputs");
    if (scale) a.scale = data<float>(*scale);
    if (a.rows) scale ? linear8(a, scalar) : linear4(a, scalar);
  });
  return y;
}

Tensor gumbel_op(int64_t seed, int64_t position, int64_t vocab) {
  TORCH_CHECK(position >= 0 && position <= UINT32_MAX && vocab >= 0 && vocab <= INT32_MAX, "position ", position, ", vocab ", vocab);
  Tensor out = at::empty({vocab}, at::kFloat);
  gumbel(uint64_t(seed), uint32_t(position), data<float>(out), vocab);
  return out;
}

Tensor sample_op(const Tensor& logits, const Tensor& noise, const Tensor& noise_row, const Tensor& inv_temperature, int64_t limit,
                 bool scalar) {
  check(logits, "logits", 2, at::kFloat), check(noise, "noise", 2, at::kFloat);
  check(noise_row, "noise_row", 1, at::kInt), check(inv_temperature, "inv_temperature", 1, at::kFloat);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  TORCH_CHECK(limit > 0 && limit <= vocab && vocab < 1 << 24, "limit ", limit, " of a vocabulary of ", vocab);
  TORCH_CHECK(noise_row.size(0) == rows && inv_temperature.size(0) == rows, "noise_row and inv_temperature must have ", rows, " elements");
  TORCH_CHECK(noise.size(0) == 0 || noise.size(1) == vocab, "noise is ", noise.sizes(), " for a vocabulary of ", vocab);
  const int32_t* row = data<int32_t>(noise_row);
  for (int64_t i = 0; i < rows; i++) TORCH_CHECK(row[i] < noise.size(0), "noise_row[", i, "] = ", row[i], " of ", noise.size(0));
  Tensor out = at::empty({rows}, at::kLong);
  sample(data<float>(logits), data<float>(noise), row, data<float>(inv_temperature), data<int64_t>(out), rows, vocab, limit, scalar);
  return out;
}

Tensor truncate_op(const Tensor& logits, const Tensor& inv_temperature, const Tensor& log_min_p, const Tensor& top_k, const Tensor& top_p,
                   int64_t limit) {
  check(logits, "logits", 2, at::kFloat), check(inv_temperature, "inv_temperature", 1, at::kFloat);
  check(log_min_p, "log_min_p", 1, at::kFloat), check(top_k, "top_k", 1, at::kInt), check(top_p, "top_p", 1, at::kDouble);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  TORCH_CHECK(limit > 0 && limit <= vocab && vocab <= INT32_MAX, "limit ", limit, " of a vocabulary of ", vocab);
  for (const Tensor& t : {inv_temperature, log_min_p, top_k, top_p}) TORCH_CHECK(t.size(0) == rows, "every filter must have ", rows, " elements");
  Tensor out = at::empty_like(logits);
  truncate(data<float>(logits), Filters{data<float>(inv_temperature), data<float>(log_min_p), data<int32_t>(top_k), data<double>(top_p)},
           data<float>(out), rows, vocab, limit);
  return out;
}

}  // namespace
}  // namespace specedge

TORCH_LIBRARY(specedge, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool scalar=False) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool scalar=False) -> (Tensor, Tensor)");
  m.def("silu_mul(Tensor x, bool scalar=False) -> Tensor");
  m.def("rope_write(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, Tensor(a!) rows_kv, int heads, bool scalar=False)"
        " -> Tensor");
  m.def("attention(Tensor q, Tensor rows_kv, Tensor pages_kv, Tensor segments, Tensor page_table, Tensor q_pos, Tensor k_pos, Tensor anc,"
        " float scale, int window, bool scalar=False) -> Tensor");
  m.def("linear_pack(Tensor weight) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, int n, Tensor? bias, bool scalar=False, *, bool gated=False, Tensor(a!)? logits=None) -> Tensor");
  m.def("linear_pack_int(Tensor q, Tensor? scale) -> Tensor");
  m.def("linear_int(Tensor x, Tensor packed, Tensor? scale, int n, Tensor? bias, bool scalar=False, *, bool gated=False, Tensor(a!)? logits=None)"
        " -> Tensor");
  m.def("gumbel(int seed, int position, int vocab) -> Tensor", specedge::gumbel_op);
  m.def("sample(Tensor logits, Tensor noise, Tensor noise_row, Tensor inv_temperature, int limit, bool scalar=False) -> Tensor");
  m.def("truncate(Tensor logits, Tensor inv_temperature, Tensor log_min_p, Tensor top_k, Tensor top_p, int limit) -> Tensor");
}

TORCH_LIBRARY_IMPL(specedge, CPU, m) {
  m.impl("rms_norm", specedge::rms_norm_op);
  m.impl("add_rms_norm", specedge::add_rms_norm_op);
  m.impl("silu_mul", specedge::silu_mul_op);
  m.impl("rope_write", specedge::rope_write_op);
  m.impl("attention", specedge::attention_op);
  m.impl("linear_pack", specedge::linear_pack_op);
  m.impl("linear", specedge::linear_op);
  m.impl("linear_pack_int", specedge::linear_pack_int_op);
  m.impl("linear_int", specedge::linear_int_op);
  m.impl("sample", specedge::sample_op);
  m.impl("truncate", specedge::truncate_op);
}
