// Attention of rows over pages and over the row buffer: prompt chunks, single rows and trees in one call.
//
// Knows nothing of sequences. Invariant: a query visits its visible keys in order of absolute position, and what is computed for it depends
// on that list alone: a score is a sum over d in order; maximum and sum of exponentials fold sixteen lanes by place in the list; the output
// is a sum over the keys in order. So one row = tree = chunk = batch and pages = row buffer, bit for bit. A key that a query does not see
// is never multiplied by zero, it is not visited: NaN and inf stay where they are.
//
// Work is cut into tasks (segment, kv head, block of rows). The lists of a block's rows share a run in the middle (the pages, and the row
// keys that all of a causal block see); before it lies what a window still shows to some, behind it what each row sees alone (its path).
// Keys go by tiles of 64, which all queries of the block use while they are in L1.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace specedge {
namespace {

constexpr int64_t QUERIES = 64;  // of a block: the scores of 4,096 keys are then 1 MB
constexpr int64_t TILE = 64;     // keys
constexpr int GROUP = 4;         // queries whose accumulators share the registers

// Prefetching the next tile while this one is used: a page is too short for the hardware to see a stream. One decode row over 4,096 keys
// in 24 layers' worth of memory, bf16, D 64, went from 540 to 405 us with G = 7 and from 381 to 267 us with G = 1.

// scores[i][k] = q[i] . key k, for N queries and TILES times 16 keys; `tile` is [TILES][dim][16]. The last store writes n - 16 (TILES - 1).
template <class V, int N, int TILES>
void dot(const float* const* q, const float* tile, int64_t dim, float* const* scores, int64_t n) {
  V sum[N][TILES];
  for (auto& row : sum)
    for (V& x : row) x = V::set(0);
  for (int64_t d = 0; d < dim; d++) {
    V key[TILES];
    for (int t = 0; t < TILES; t++) key[t] = V::load(tile + (t * dim + d) * LANES);
    for (int i = 0; i < N; i++)
      for (int t = 0; t < TILES; t++) sum[i][t] = fma(V::set(q[i][d]), key[t], sum[i][t]);
  }
  for (int i = 0; i < N; i++)
    for (int t = 0; t < TILES; t++) sum[i][t].store(scores[i] + t * LANES, int(std::min<int64_t>(LANES, n - t * LANES)));
}

// out[i][d] += sum over k of p[i][k] * value k [d], for N queries, n values, and CHUNKS times 16 of d from `at`, the last one `lanes` wide.
template <class V, int N, int CHUNKS, class T>
void weigh(const float* const* p, const T* const* value, const T* const* next, int64_t n, int64_t at, int lanes, float* const* out) {
  V sum[N][CHUNKS];
  for (int i = 0; i < N; i++)
    for (int c = 0; c < CHUNKS; c++) sum[i][c] = V::load(out[i] + at + c * LANES);
  for (int64_t k = 0; k < n; k++) {
    if (next)
      for (int c = 0; c < CHUNKS * LANES; c += int(64 / sizeof(T))) __builtin_prefetch(next[k] + at + c);
    V v[CHUNKS];
    for (int c = 0; c < CHUNKS; c++) v[c] = CHUNKS == 1 ? V::load(value[k] + at, lanes) : V::load(value[k] + at + c * LANES);
    for (int i = 0; i < N; i++)
      for (int c = 0; c < CHUNKS; c++) sum[i][c] = fma(V::set(p[i][k]), v[c], sum[i][c]);
  }
  for (int i = 0; i < N; i++)
    for (int c = 0; c < CHUNKS; c++) sum[i][c].store(out[i] + at + c * LANES);
}

// keys [n][dim] -> tile [ceil(n / 16)][dim][16]; lanes from n on repeat the last key, and nobody reads what becomes of them.
template <class V, class T>
void turn(const T* const* key, const T* const* next, int64_t n, int64_t dim, float* tile) {
  for (int64_t t = 0; t < n; t += LANES)
    for (int64_t d = 0; d < dim; d += LANES) {
      const int lanes = int(std::min<int64_t>(LANES, dim - d));
      V r[LANES];
      for (int i = 0; i < LANES; i++) {
        __builtin_prefetch(next[t + i] + d);
        r[i] = V::load(key[std::min(t + i, n - 1)] + d, lanes);
      }
      transpose(r);
      for (int i = 0; i < lanes; i++) r[i].store(tile + t * dim + (d + i) * LANES);
    }
}

// scores -> exp(score - maximum) in place, returns their sum; writes up to the next multiple of 16.
template <class V>
float soften(float* s, int64_t n) {
  const int64_t end = (n + LANES - 1) / LANES * LANES;
  std::fill(s + n, s + end, -std::numeric_limits<float>::infinity());
  V top = V::load(s);
  for (int64_t i = LANES; i < end; i += LANES) top = max(top, V::load(s + i));
  float lane[LANES];
  top.store(lane);
  top = V::set(*std::max_element(lane, lane + LANES));
  V total = V::set(0);
  for (int64_t i = 0; i < end; i += LANES) {
    const V e = exp(V::load(s + i) - top);
    e.store(s + i);
    total = total + e;
  }
  return sum(total);
}

template <class F>
void by_groups(int64_t n, F f) {
  for (int64_t i = 0; i < n; i += GROUP) switch (n - i) {
      case 1: f.template operator()<1>(i); break;
      case 2: f.template operator()<2>(i); break;
      case 3: f.template operator()<3>(i); break;
      default: f.template operator()<GROUP>(i);
    }
}

struct Row {
  int64_t begin;             // the first key of the common order that it sees
  int64_t length;            // how many keys it sees
  std::vector<int64_t> own;  // those behind the shared run, by position
};

// What a thread keeps from task to task: a fresh megabyte would cost its page faults every time.
struct Scratch {
  std::vector<Row> rows;
  std::vector<float> floats, totals;
  std::vector<float*> scores, out, p;
  std::vector<const float*> q;
};

// Rows first .. first + count of a segment, with one kv head.
template <class V, class T>
struct Block {
  const Attention<T>& a;
  Scratch& s;
  const int32_t* pages;
  int64_t q0, nq, k0, nk, prefix, causal, head, first, count;
  int64_t group = a.heads / a.kv_heads, queries = count * group;
  int64_t from = 0, to = 0;  // the shared run
  const T *keys[2][TILE], **key = keys[0], **next = keys[1];  // addresses of a tile's keys and of those that come next

  Block(const Attention<T>& args, Scratch& scratch, int64_t segment, int64_t kv_head, int64_t first_row, int64_t row_count)
      : a(args), s(scratch), pages(a.page_table + segment * a.table_width), head(kv_head), first(first_row), count(row_count) {
    const int32_t* x = a.segments + 6 * segment;
    q0 = x[0] + first, nq = x[1], k0 = x[2], nk = x[3], prefix = x[4], causal = x[5];
  }

  // Who sees what. Key t < prefix is token t of the pages, key prefix + j is row k0 + j: the common order.
  int64_t list() {
    const int32_t* k_pos = a.k_pos + k0;
    const int64_t ends = nk - nq + first + 1;  // causal: how many row keys the block's first row sees
    const bool ordered = causal && std::is_sorted(k_pos, k_pos + std::min(ends + count, nk));
    to = prefix + (ordered ? ends : 0);
    int64_t longest = 0;
    s.rows.resize(count);
    for (int64_t i = 0; i < count; i++) {
      Row& row = s.rows[i];
      const int64_t oldest = a.window > 0 ? a.q_pos[q0 + i] - a.window + 1 : INT32_MIN;
      row.begin = std::clamp<int64_t>(oldest, 0, prefix);
      if (row.begin == prefix) row.begin += std::lower_bound(k_pos, k_pos + (to - prefix), oldest) - k_pos;
      row.own.clear();
      const uint64_t* words = a.anc + (q0 + i) * a.anc_words;
      for (int64_t j = to - prefix; j < (causal ? ends + i : nk); j++)
        if (k_pos[j] >= oldest && (causal || words[j / 64] >> j % 64 & 1)) row.own.push_back(prefix + j);
      const auto earlier = [&](int64_t x, int64_t y) { return k_pos[x - prefix] < k_pos[y - prefix]; };
      if (!ordered) std::stable_sort(row.own.begin(), row.own.end(), earlier);
      row.length = to - row.begin + int64_t(row.own.size());
      from = std::max(from, row.begin), longest = std::max(longest, row.length);
    }
    return longest;
  }

  // key[0 .. n) = addresses of keys id, id + 1, .. or, if given, of ids[0 .. n), which lie behind the pages.
  void locate(int64_t id, const int64_t* ids, int64_t n, const T* row_keys, const T* page_keys, const T** key) {
    int64_t i = 0;
    while (i < n && id + i < prefix) {
      const int64_t page = (id + i) / a.page_size, offset = (id + i) % a.page_size;
      const T* at = page_keys + ((pages[page] * a.kv_heads + head) * a.page_size + offset) * a.dim;
      for (const int64_t end = i + std::min({n - i, prefix - id - i, a.page_size - offset}); i < end; i++, at += a.dim) key[i] = at;
    }
    for (; i < n; i++) key[i] = row_keys + ((k0 + (ids ? ids[i] : id + i) - prefix) * a.kv_heads + head) * a.dim;
  }

  // f(first query, queries, keys) for every tile, in the common order, with `key`, `next` and `p` (places among the scores) set.
  template <class F>
  void visit(const T* row_keys, const T* page_keys, F f) {
    const auto run = [&](int64_t query, int64_t n_queries, int64_t id, const int64_t* ids, int64_t n) {
      if (n > 0) locate(id, ids, std::min(TILE, n), row_keys, page_keys, next);
      for (int64_t done = 0; done < n; done += TILE) {
        std::swap(key, next);
        const int64_t n_keys = std::min(TILE, n - done), n_next = std::clamp<int64_t>(n - done - TILE, 0, TILE), then = done + TILE;
        locate(id + then, ids ? ids + then : nullptr, n_next, row_keys, page_keys, next);
        std::fill(next + n_next, next + TILE, key[0]);
        for (int64_t i = query; i < query + n_queries; i++) s.p[i] = s.scores[i] + id + done - s.rows[i / group].begin;
        f(query, n_queries, n_keys);
      }
    };
    for (int64_t i = 0; i < count; i++) run(i * group, group, s.rows[i].begin, nullptr, from - s.rows[i].begin);
    run(0, queries, from, nullptr, to - from);
    for (int64_t i = 0; i < count; i++) run(i * group, group, to, s.rows[i].own.data(), int64_t(s.rows[i].own.size()));
  }

  void run() {
    const int64_t width = (a.dim + LANES - 1) / LANES * LANES, length = (list() + LANES - 1) / LANES * LANES;
    const size_t need = queries * (2 * width + length) + TILE * a.dim;
    if (s.floats.size() < need) s.floats.resize(need);
    float *out = s.floats.data(), *q = out + queries * width, *tile = q + queries * width, *scores = tile + TILE * a.dim;
    s.scores.resize(queries), s.out.resize(queries), s.p.resize(queries), s.q.resize(queries), s.totals.resize(queries);
    std::fill_n(out, queries * width, 0.0f);
    const auto place = [&](int64_t i) { return ((q0 + i / group) * a.heads + head * group + i % group) * a.dim; };
    for (int64_t i = 0; i < queries; i++) {
      s.scores[i] = scores + i * length, s.out[i] = out + i * width, s.q[i] = q + i * width;
      for (int64_t d = 0; d < a.dim; d++) q[i * width + d] = to_float(a.q[place(i) + d]) * a.scale;
    }

    visit(a.rows_k, a.pages_k, [&](int64_t query, int64_t n_queries, int64_t n) {
      turn<V>(key, next, n, a.dim, tile);
      by_groups(n_queries, [&]<int N>(int64_t i) {
        i += query;
        for (int64_t k = 0; k < n;) {
          float* at[N];
          for (int j = 0; j < N; j++) at[j] = s.p[i + j] + k;
          const bool full = n - k > LANES * (V::TILES - 1);
          (full ? dot<V, N, V::TILES> : dot<V, N, 1>)(&s.q[i], tile + k * a.dim, a.dim, at, n - k);
          k += full ? LANES * V::TILES : LANES;
        }
      });
    });
    for (int64_t i = 0; i < queries; i++)
      if (s.rows[i / group].length) s.totals[i] = soften<V>(s.scores[i], s.rows[i / group].length);
    visit(a.rows_v, a.pages_v, [&](int64_t query, int64_t n_queries, int64_t n) {
      by_groups(n_queries, [&]<int N>(int64_t i) {
        i += query;
        const T* const* fetch = i == query ? next : nullptr;
        int64_t d = 0;
        for (; d + 4 * LANES <= a.dim; d += 4 * LANES) weigh<V, N, 4>(&s.p[i], key, fetch, n, d, LANES, &s.out[i]);
        for (; d < a.dim; d += LANES) weigh<V, N, 1>(&s.p[i], key, fetch, n, d, int(std::min<int64_t>(LANES, a.dim - d)), &s.out[i]);
      });
    });
    for (int64_t i = 0; i < queries; i++) {
      if (s.rows[i / group].length == 0) continue;  // against the contract: the output stays zero
      for (int64_t d = 0; d < a.dim; d += LANES)
        (V::load(s.out[i] + d) / V::set(s.totals[i])).store(a.out + place(i) + d, int(std::min<int64_t>(LANES, a.dim - d)));
    }
  }
};

template <class V, class T>
void all(const Attention<T>& a) {
  const int64_t step = std::max<int64_t>(1, QUERIES / (a.heads / a.kv_heads));  // rows of a block
  struct Task {
    int64_t segment, head, first, count;
  };
  std::vector<Task> tasks;
  double work = 0;
  for (int64_t b = 0; b < a.segment_count; b++) {
    const int32_t* s = a.segments + 6 * b;
    for (int64_t h = 0; h < a.kv_heads; h++)
      for (int64_t i = 0; i < s[1]; i += step) tasks.push_back({b, h, i, std::min<int64_t>(step, s[1] - i)});
    work += double(s[1]) * double(a.heads * a.dim) * double(s[3] + s[4]) / 8;
  }
  for_each(int64_t(tasks.size()), work, [&](int64_t i) {
    static thread_local Scratch scratch;
    const Task& t = tasks[i];
    Block<V, T>(a, scratch, t.segment, t.head, t.first, t.count).run();
  });
}

}  // namespace

template <class T>
void attention(const Attention<T>& a, bool scalar) {
  scalar ? all<Scalar>(a) : all<Native>(a);
}

template void attention(const Attention<float>&, bool);
template void attention(const Attention<bf16>&, bool);

}  // namespace specedge
