// Sampling on a GPU: bias and penalties, the filters without a sort, the noise of shared-noise verification, the argmax under it.
//
// No torch: the launchers at the end are plain C for specedge/kernels/cuda_ops.py; they ask nothing of the device and so can be captured.
// Invariant: as in csrc/cpu/sample.cpp. gumbel is integer arithmetic, float64 and one rounding; a product is rounded before noise is added; ranks are
// larger value, then smaller id; sums of weights are integers. So ids are those of the CPU, and the same in any order of threads.
#include <cmath>
#include <cstdint>

namespace {

constexpr int THREADS = 512, BINS = 1024;

__global__ void noise_kernel(const int64_t* fills, float* table, int vocab) {
  const int64_t *fill = fills + 3 * blockIdx.y, slot = fill[2];
  const int counter = blockIdx.x * blockDim.x + threadIdx.x;
  if (slot < 0 || 4 * counter >= vocab) return;
  const uint64_t seed = uint64_t(fill[0]);
  const uint32_t position = uint32_t(fill[1]);
  float* out = table + slot * vocab;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t x[4] = {uint32_t(counter), position, 0, 0};
  for (int round = 0; round < 10; round++) {  // Philox4x32-10
    const uint64_t p0 = uint64_t(x[0]) * 0xD2511F53, p1 = uint64_t(x[2]) * 0xCD9E8D57;
    x[0] = uint32_t(p1 >> 32) ^ x[1] ^ k0, x[1] = uint32_t(p1), x[2] = uint32_t(p0 >> 32) ^ x[3] ^ k1, x[3] = uint32_t(p0);
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  for (int i = 0; i < 4 && 4 * counter + i < vocab; i++) {
    const double e = (double(x[i]) + 0.5) * 0x1p-32, most = 1 - 0x1p-24;
    out[4 * counter + i] = float(-log(-log1p(-(e < most ? e : most))));
  }
}

// Bias, min_tokens and penalties of one row: a thread takes every THREADS-th of its edits, whose tokens differ.
__global__ void __launch_bounds__(THREADS) adjust_kernel(float* logits, const int32_t* rows, const float* penalties, const int32_t* edits,
                                                         const float* bias, const int32_t* paths, int vocab) {
  const int64_t row = blockIdx.x;
  const int32_t first = rows[4 * row], end = rows[4 * row + 1], path = rows[4 * row + 2], path_end = rows[4 * row + 3];
  const float repetition = penalties[3 * row], frequency = penalties[3 * row + 1], presence = penalties[3 * row + 2];
  for (int e = first + int(threadIdx.x); e < end; e += THREADS) {
    const int32_t token = edits[3 * e], count = edits[3 * e + 1], held = edits[3 * e + 2];
    int here = 0;
    for (int i = path; i < path_end; i++) here += paths[i] == token;
    float z = __fadd_rn(logits[row * vocab + token], bias[e]);
    if (path_end - path < held) z = -INFINITY;
    if (count >= 0 || here > 0) z = z > 0 ? __fdiv_rn(z, repetition) : __fmul_rn(z, repetition);
    const int times = (count > 0 ? count : 0) + here;
    z = __fsub_rn(z, __fmul_rn(frequency, float(times)));
    logits[row * vocab + token] = __fsub_rn(z, __fmul_rn(presence, times > 0 ? 1.0f : 0.0f));
  }
}

// Of a block's pairs the one with the larger value, the smaller id among equals; every thread gets it.
__device__ void best_of_block(float& value, int& id) {
  __shared__ float values[THREADS];
  __shared__ int ids[THREADS];
  const int t = threadIdx.x;
  values[t] = value, ids[t] = id;
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (t < half && (values[t + half] > values[t] || (values[t + half] == values[t] && ids[t + half] < ids[t])))
      values[t] = values[t + half], ids[t] = ids[t + half];
    __syncthreads();
  }
  value = values[0], id = ids[0];
  __syncthreads();
}

__global__ void __launch_bounds__(THREADS) sample_kernel(const float* logits, const float* noise, const int32_t* noise_row,
                                                         const float* inv_temperature, int64_t* out, int vocab, int limit) {
  const int64_t row = blockIdx.x;
  if (noise_row[row] < -1) return;  // padding
  const float *z = logits + row * vocab, t = inv_temperature[row];
  const float* g = noise_row[row] < 0 ? nullptr : noise + int64_t(noise_row[row]) * vocab;
  float top = -INFINITY;
  int id = threadIdx.x == 0 ? 0 : limit;
  for (int v = threadIdx.x; v < limit; v += THREADS) {
    const float y = g ? __fadd_rn(__fmul_rn(z[v], t), g[v]) : z[v];
    if (y > top) top = y, id = v;
  }
  best_of_block(top, id);
  if (threadIdx.x == 0) out[row] = id;
}

// The bits of a float in the order of its value; -0 counts as 0.
__device__ uint32_t key_of(float z) {
  const uint32_t u = __float_as_uint(z + 0.0f);
  return u >> 31 ? ~u : u | 0x80000000u;
}

__device__ float value_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// A beginning of the ranking: all tokens with a key above `key`, and the first `ties` of those that have it.
struct Cut {
  uint32_t key;
  uint64_t ties;
};

// One row, as all threads of a block see it.
struct Row {
  const float* logits;
  float t, top, log_min_p;
  int limit;

  __device__ float z(int v) const { return __fmul_rn(logits[v], t); }
  __device__ bool alive(float z) const { return z - top >= log_min_p || z == top; }
  __device__ uint64_t weight(float z) const { return uint64_t(exp(double(z) - double(top)) * 0x1p40 + 0.5); }
  __device__ int bin(float z) const {  // never falls as z does; 1/32 is narrow enough that few threads meet in one
    const float d = __fmul_rn(top - z, 32.0f);
    return d < BINS - 1 ? int(d) : BINS - 1;
  }
};

// What the threads before this one hold of `own`, and in `all` what the whole block does.
__device__ uint64_t sum_before(uint64_t own, uint64_t& all) {
  __shared__ unsigned long long sums[2][THREADS];
  const int t = threadIdx.x;
  int turn = 0;
  sums[turn][t] = own;
  for (int step = 1; step < THREADS; step *= 2, turn = 1 - turn) {
    __syncthreads();
    sums[1 - turn][t] = sums[turn][t] + (t >= step ? sums[turn][t - step] : 0);
  }
  __syncthreads();
  all = sums[turn][THREADS - 1];
  const uint64_t before = sums[turn][t] - own;
  __syncthreads();
  return before;
}

// The shortest beginning of the ranking inside `within` whose measure, tokens or their weights, reaches need(measure of all); `within` if none does.
template <bool WEIGHTS, class Need>
__device__ Cut shortest(const Row& row, Cut within, Need need) {
  __shared__ unsigned long long bins[BINS];
  __shared__ unsigned long long passed;
  __shared__ int found;
  const int first = threadIdx.x * (BINS / THREADS), end = first + BINS / THREADS;
  const auto measure = [&](float z) { return WEIGHTS ? row.weight(z) : uint64_t(1); };

  uint64_t before = 0, missing = 0;  // measures: of the bins before this thread's; what is wanted beyond the keys that are known to be in
  // Adds up the measure by bin: where(z, key) is that of a token, or negative. Returns that of all.
  const auto fill = [&](auto where) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
    const auto add = [&](float z, uint64_t times) {
      if (!times) return;
      if (const int bin = where(z, key_of(z)); bin >= 0) atomicAdd(bins + bin, (unsigned long long)(times * measure(z)));
    };
    for (int v = threadIdx.x; v < row.limit; v += THREADS) {
      const float z = row.z(v);
      add(z, row.alive(z) && key_of(z) > within.key);
    }
    if (threadIdx.x == 0) add(value_of(within.key), within.ties);
    __syncthreads();
    uint64_t own = 0, all;
    for (int i = first; i < end; i++) own += bins[i];
    before = sum_before(own, all);
    return all;
  };
  // The bin with which the first bins reach what is missing; what those before it hold is missing no more.
  const auto reach = [&] {
    for (int i = first; i < end; before += bins[i++])
      if (before < missing && before + bins[i] >= missing) found = i, passed = before;
    __syncthreads();
    missing -= passed;
    return found;
  };

  const uint64_t all = fill([&](float z, uint32_t) { return row.bin(z); });
  missing = need(all);
  if (missing > all) return within;
  const int bin = reach();
  uint32_t key = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    fill([&](float z, uint32_t k) {
      const bool in = row.bin(z) == bin && (uint64_t(k) >> (shift + 8)) == (uint64_t(key) >> (shift + 8));
      return in ? 255 - int(k >> shift & 255) : -1;  // larger values first
    });
    key |= uint32_t(255 - reach()) << shift;
  }
  const uint64_t each = measure(value_of(key));
  return {key, (missing + each - 1) / each};
}

__global__ void __launch_bounds__(THREADS) truncate_kernel(const float* logits, const float* inv_temperature, const float* log_min_p,
                                                           const int32_t* top_k, const double* top_p, float* out, int vocab, int limit) {
  const int64_t r = blockIdx.x;
  if (out == logits && log_min_p[r] == -INFINITY && top_k[r] <= 0 && top_p[r] >= 1) return;  // no filter; ids past the limit are never sampled
  Row row = {logits + r * vocab, inv_temperature[r], -INFINITY, log_min_p[r], limit};
  int id = limit;
  float top = -INFINITY;
  for (int v = threadIdx.x; v < limit; v += THREADS)
    if (const float z = row.z(v); z > top) top = z, id = v;
  best_of_block(top, id);
  row.top = top;

  Cut cut = {0, 0};  // below every number: all
  const int k = top_k[r];
  const double p = top_p[r];
  if (k > 0) cut = shortest<false>(row, cut, [=](uint64_t) { return uint64_t(k); });
  if (p < 1) cut = shortest<true>(row, cut, [=](uint64_t all) {
    const uint64_t enough = uint64_t(ceil(double(all) * p));
    return enough ? enough : uint64_t(1);  // the first token always survives
  });

  // ties survive in the order of ids: count those before a thread's share of the row, then walk it
  const int share = (vocab + THREADS - 1) / THREADS, begin = threadIdx.x * share, end = begin + share < vocab ? begin + share : vocab;
  uint64_t own = 0, all;
  for (int v = begin; v < end && v < limit; v++) own += key_of(row.z(v)) == cut.key && row.alive(row.z(v));
  uint64_t before = sum_before(own, all);
  for (int v = begin; v < end; v++) {
    bool keep = false;
    if (v < limit) {
      const float z = row.z(v);
      const uint32_t key = key_of(z);
      keep = row.alive(z) && (key > cut.key || (key == cut.key && before++ < cut.ties));
    }
    out[r * vocab + v] = keep ? row.logits[v] : -INFINITY;
  }
}

}  // namespace

// Each returns 0 or what cudaGetLastError says.

// fills [count, 3]: seed, position and the row of `table [*, vocab]` that gets their noise; a negative row: nothing to do.
extern "C" int specedge_noise(const int64_t* fills, float* table, int count, int vocab, cudaStream_t stream) {
  noise_kernel<<<dim3((vocab + 511) / 512, count), 128, 0, stream>>>(fills, table, vocab);
  return cudaGetLastError();
}

// logits [count, vocab], in place; the rest as in reference.adjust.
extern "C" int specedge_adjust(float* logits, const int32_t* rows, const float* penalties, const int32_t* edits, const float* bias,
                               const int32_t* paths, int count, int vocab, cudaStream_t stream) {
  adjust_kernel<<<count, THREADS, 0, stream>>>(logits, rows, penalties, edits, bias, paths, vocab);
  return cudaGetLastError();
}

// out [rows]: argmax over v < limit of logits [rows, vocab] * inv_temperature + noise [*, vocab]; noise_row -1: of the logits alone.
extern "C" int specedge_sample(const float* logits, const float* noise, const int32_t* noise_row, const float* inv_temperature, int64_t* out,
                               int rows, int vocab, int limit, cudaStream_t stream) {
  sample_kernel<<<rows, THREADS, 0, stream>>>(logits, noise, noise_row, inv_temperature, out, vocab, limit);
  return cudaGetLastError();
}

// out [rows, vocab]: logits, or -inf where a token does not survive. `out` may be `logits`; rows without a filter are then left as they are.
extern "C" int specedge_truncate(const float* logits, const float* inv_temperature, const float* log_min_p, const int32_t* top_k,
                                 const double* top_p, float* out, int rows, int vocab, int limit, cudaStream_t stream) {
  truncate_kernel<<<rows, THREADS, 0, stream>>>(logits, inv_temperature, log_min_p, top_k, top_p, out, vocab, limit);
  return cudaGetLastError();
}
