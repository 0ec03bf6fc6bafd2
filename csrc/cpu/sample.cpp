// gumbel, sample and truncate: the noise of shared-noise verification, the argmax under it, and the filters before it.
//
// Invariant: gumbel is integer arithmetic, float64 and one rounding; sample rounds the product before it adds the noise. Both are equal
// to the reference bit for bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace specedge {
namespace {

// fdlibm's log (below 1 ulp) for positive normal x, without branches, so that the compiler vectorises it: with std::log and std::log1p
// a row of 151,936 took 5 times as long. In float64 the last bit is free to differ: 2^-29 of it survives the rounding to float32.
inline double log64(double x) {
  constexpr uint64_t ROOT_HALF = 0x3fe6a09e667f3bcd, ONE = 0x3ff0000000000000;
  const uint64_t u = std::bit_cast<uint64_t>(x) + (ONE - ROOT_HALF);
  const double k = std::bit_cast<double>(0x4330000000000000 | u >> 52) - (0x1p52 + 1023);  // no 64-bit integer convert in AVX2
  const double f = std::bit_cast<double>((u & 0x000fffffffffffff) + ROOT_HALF) - 1;        // x = 2^k (1 + f)
  const double s = f / (2 + f), z = s * s, w = z * z, half = 0.5 * f * f;
  const double odd = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double even =
      z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  return k * 6.93147180369123816490e-01 - ((half - (s * (half + (odd + even)) + k * 1.90821492927058770002e-10)) - f);
}

constexpr int BLOCK = 64;  // tokens: sixteen Philox counters

// Philox4x32-10: words of tokens 4 c .. 4 c + 63, key and counter as in reference.philox.
void philox(uint64_t seed, uint32_t c, uint32_t position, uint32_t* words) {
  for (int i = 0; i < BLOCK / 4; i++) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32), x0 = c + i, x1 = position, x2 = 0, x3 = 0;
    for (int round = 0; round < 10; round++) {
      const uint64_t p0 = uint64_t(x0) * 0xD2511F53, p1 = uint64_t(x2) * 0xCD9E8D57;
      x0 = uint32_t(p1 >> 32) ^ x1 ^ k0, x1 = uint32_t(p1), x2 = uint32_t(p0 >> 32) ^ x3 ^ k1, x3 = uint32_t(p0);
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    words[4 * i] = x0, words[4 * i + 1] = x1, words[4 * i + 2] = x2, words[4 * i + 3] = x3;
  }
}

template <class V>
int64_t best(const float* logits, const float* noise, float inv_temperature, int64_t limit) {
  const V t = V::set(inv_temperature);
  const auto value = [&](int64_t v, int n) {
    const V z = V::load(logits + v, n);
    return noise ? z * t + V::load(noise + v, n) : z;
  };
  V top = V::set(-std::numeric_limits<float>::infinity()), id = V::set(0);  // ids as floats are exact below 2^24
  float lane[LANES], lane_id[LANES];
  for (int i = 0; i < LANES; i++) lane[i] = float(i);
  V here = V::load(lane);
  int64_t v = 0;
  for (; v + LANES <= limit; v += LANES, here = here + V::set(LANES)) {
    const V z = value(v, LANES);
    id = pick(z, top, here, id), top = pick(z, top, z, top);  // strictly greater: of equals a lane keeps the smallest id
  }
  top.store(lane), id.store(lane_id);
  int winner = 0;
  for (int i = 1; i < LANES; i++)
    if (lane[i] > lane[winner] || (lane[i] == lane[winner] && lane_id[i] < lane_id[winner])) winner = i;
  float most = lane[winner];
  int64_t token = int64_t(lane_id[winner]);
  if (v < limit) {
    value(v, int(limit - v)).store(lane);
    for (int i = 0; i < limit - v; i++)
      if (lane[i] > most) most = lane[i], token = v + i;
  }
  return token;
}

struct Ranked {
  float z;
  int32_t id;
  bool operator<(const Ranked& other) const { return z > other.z || (z == other.z && id < other.id); }
};

uint64_t weight(float z, float top) { return uint64_t(std::exp(double(z) - double(top)) * 0x1p40 + 0.5); }

// How many of the candidates, which are put in order as far as need be, make up top_p of their weight. Sorting them all would cost 12 ms for
// 151,936 of them; nearly always the first few hundred are enough.
int64_t nucleus(std::vector<Ranked>& c, float top, double top_p) {
  uint64_t total = 0, sum = 0;
  for (const Ranked& x : c) total += weight(x.z, top);
  const uint64_t enough = uint64_t(std::ceil(double(total) * top_p));
  const int64_t n = int64_t(c.size());
  for (int64_t done = 0, next = 256; done < n; done = next, next *= 8) {
    next = std::min(next, n);
    if (next < n) std::nth_element(c.begin() + done, c.begin() + next, c.end());
    std::sort(c.begin() + done, c.begin() + next);
    for (int64_t i = done; i < next; i++) {
      if (sum >= enough) return i;
      sum += weight(c[i].z, top);
    }
  }
  return n;
}

void filter(const float* logits, float t, float log_min_p, int32_t top_k, double top_p, float* out, int64_t limit) {
  static thread_local std::vector<Ranked> c;
  c.clear();
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t v = 0; v < limit; v++) top = std::max(top, logits[v] * t);
  for (int64_t v = 0; v < limit; v++)
    if (const float z = logits[v] * t; z - top >= log_min_p || z == top) c.push_back({z, int32_t(v)});
  if (top_k > 0 && top_k < int64_t(c.size())) {
    std::nth_element(c.begin(), c.begin() + top_k, c.end());
    c.resize(top_k);
  }
  if (c.empty()) return;  // a row of NaN: nothing survives
  const int64_t kept = top_p < 1 ? std::max<int64_t>(1, nucleus(c, top, top_p)) : int64_t(c.size());
  for (int64_t i = 0; i < kept; i++) out[c[i].id] = logits[c[i].id];
}

}  // namespace

void truncate(const float* logits, const Filters& f, float* out, int64_t rows, int64_t vocab, int64_t limit) {
  for_each(rows, double(rows) * double(limit), [=](int64_t r) {
    std::fill_n(out + r * vocab, vocab, -std::numeric_limits<float>::infinity());
    filter(logits + r * vocab, f.inv_temperature[r], f.log_min_p[r], f.top_k[r], f.top_p[r], out + r * vocab, limit);
  });
}

void gumbel(uint64_t seed, uint32_t position, float* out, int64_t vocab) {
  for_each((vocab + BLOCK - 1) / BLOCK, double(vocab) * 4, [=](int64_t block) {
    uint32_t words[BLOCK];
    float g[BLOCK];
    philox(seed, uint32_t(block * BLOCK / 4), position, words);
    for (int i = 0; i < BLOCK; i++) {
      const double w = std::bit_cast<double>(0x4330000000000000 | uint64_t(words[i])) - 0x1p52, e = (w + 0.5) * 0x1p-32;
      g[i] = float(-log64(-log64(1 - (e < 1 - 0x1p-24 ? e : 1 - 0x1p-24))));  // e has 33 bits: 1 - e is exact, its log is log1p(-e)
    }
    std::copy_n(g, std::min<int64_t>(BLOCK, vocab - block * BLOCK), out + block * BLOCK);
  });
}

void sample(const float* logits, const float* noise, const int32_t* noise_row, const float* inv_temperature, int64_t* out, int64_t rows,
            int64_t vocab, int64_t limit, bool scalar) {
  const auto row = scalar ? best<Scalar> : best<Native>;
  for_each(rows, double(rows) * double(limit) / 4, [=](int64_t r) {
    const float* g = noise_row[r] < 0 ? nullptr : noise + noise_row[r] * vocab;
    out[r] = row(logits + r * vocab, g, inv_temperature[r], limit);
  });
}

}  // namespace specedge
