// Attention of rows over pages and over the row buffer: prompt chunks, single rows and trees in one call.
//
// Knows nothing of sequences. Invariant: what is computed for a query depends on the list of its visible keys, by absolute position, and on
// nothing else: whatever is taken together or reordered (pairs, sixteen lanes, tiles, chunks) is so by place in that list. So one row = tree =
// chunk = batch and pages = row buffer, bit for bit. A value that a query does not see is not visited, or, where tile registers multiply it by a
// weight of zero, was found to be finite: NaN and inf stay where they are.
//
// Work is cut into tasks (segment, kv head, block of rows). A block goes through its lists by chunks: scores of the chunk's keys tile by tile
// (all rows use a tile while it is in L1), softmax, sum of the values tile by tile. The largest score so far counts as zero: where a chunk
// raises it, the sums of the chunks before are scaled down.
// Multiplications take words: a float or two bf16, as they lie in memory. So in bf16 the softmax weights are rounded too, as in transformers;
// they are summed after it and add up to one. Output x errs by at most 2^-8 (|x| + the weighted mean of |value|) before its own rounding.
// With tile registers 32 places in a row are summed as tdpbf16ps has it, the last of them with weights of zero where the list ends.
#include <vector>

#include "attention.h"

namespace specedge {
namespace {

constexpr int64_t QUERIES = 64;  // of a block

// f.operator()<n>() for the n in 1 .. N that is asked for.
template <int N, class F>
void with(int64_t n, F f) {
  if constexpr (N > 1)
    if (n < N) return with<N - 1>(n, f);
  f.template operator()<N>();
}

// The list of keys that a row sees: begin .. end of the common order, then its own.
struct Row {
  int64_t begin, end, length;
  std::vector<int64_t> own;  // by position
};

// What a thread keeps from task to task: fresh memory would cost its page faults every time.
template <class T>
struct Scratch {
  std::vector<Row> rows;
  Vector<float> q, scores, out, tops, totals, pairs;
  Vector<T> weights, nothing;
};

template <class X>
X* room(Vector<X>& v, int64_t n) {
  if (int64_t(v.size()) < n) v.resize(n);
  return v.data();
}

// Rows first .. first + count of a segment, with one kv head.
template <class V, class T, class Dot>
struct Block {
  const Attention<T>& a;
  Scratch<T>& s;
  const int32_t* pages;
  int64_t q0, nq, k0, nk, prefix, causal, head, first, count;
  int64_t group = a.heads / a.kv_heads, queries = count * group, width = (a.dim + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
  int64_t longest = 0;                                        // how many keys the row with most of them sees
  const T *keys[2][TILE], **key = keys[0], **next = keys[1];  // addresses of a tile's keys (or values) and of those that come next

  Block(const Attention<T>& args, Scratch<T>& scratch, int64_t segment, int64_t kv_head, int64_t first_row, int64_t row_count)
      : a(args), s(scratch), pages(a.page_table + segment * a.table_width), head(kv_head), first(first_row), count(row_count) {
    const int32_t* x = a.segments + 6 * segment;
    q0 = x[0] + first, nq = x[1], k0 = x[2], nk = x[3], prefix = x[4], causal = x[5];
  }

  // Who sees what. Key t < prefix is token t of the pages, key prefix + j is row k0 + j: the common order.
  void list() {
    const int32_t* k_pos = a.k_pos + k0;
    const int64_t ends = nk - nq + first + 1;  // causal: how many row keys the block's first row sees
    const bool ordered = causal && std::is_sorted(k_pos, k_pos + std::min(ends + count, nk));
    s.rows.resize(count);
    for (int64_t i = 0; i < count; i++) {
      Row& row = s.rows[i];
      const int64_t oldest = a.window > 0 ? a.q_pos[q0 + i] - a.window + 1 : INT32_MIN;
      row.begin = std::clamp<int64_t>(oldest, 0, prefix), row.end = prefix + (ordered ? ends + i : 0);
      if (row.begin == prefix) row.begin += std::lower_bound(k_pos, k_pos + (row.end - prefix), oldest) - k_pos;
      row.own.clear();
      const uint64_t* words = a.anc + (q0 + i) * a.anc_words;
      for (int64_t j = 0; !ordered && j < (causal ? ends + i : nk); j++)
        if (k_pos[j] >= oldest && (causal || words[j / 64] >> j % 64 & 1)) row.own.push_back(prefix + j);
      const auto earlier = [&](int64_t x, int64_t y) { return k_pos[x - prefix] < k_pos[y - prefix]; };
      std::stable_sort(row.own.begin(), row.own.end(), earlier);
      row.length = row.end - row.begin + int64_t(row.own.size());
      longest = std::max(longest, row.length);
    }
  }

  // The chunk of `place` is visited as so many runs side by side, one per whole tile, and what is left of it in order.
  static int64_t runs(const Row& row, int64_t place) { return std::clamp<int64_t>(row.length - place / CHUNK * CHUNK, 0, CHUNK) / TILE; }

  // How many keys a row has in the tile at `place`.
  static int64_t in_tile(const Row& row, int64_t place) { return std::clamp<int64_t>(row.length - place, 0, TILE); }

  // Whether row x has keys in the tile at `place`, and they are the first of y's: as many if `all`.
  static bool same(const Row& x, const Row& y, int64_t place, bool all) {
    const int64_t n = in_tile(x, place), m = in_tile(y, place), side = runs(x, place);
    const int64_t last = std::max(place / CHUNK * CHUNK + side * TILE, place + n);
    return n && (all ? n == m : n <= m) && x.begin == y.begin && side == runs(y, place) && x.begin + last <= std::min(x.end, y.end);
  }

  // at[0 .. in_tile) = addresses of the keys (values) that a row visits in the tile at `place`; the others = zeros.
  void locate(const Row& row, int64_t place, bool of_values, const T** at) {
    const int64_t chunk = place / CHUNK * CHUNK, side = runs(row, place), n = in_tile(row, place);
    if (place < chunk + side * TILE)
      for (int64_t i = 0, visit = place - chunk; i < side; i++, visit++)
        locate_run(row, chunk + visit % side * TILE + visit / side, (TILE - i + side - 1) / side, of_values, at + i, side);
    else
      locate_run(row, place, n, of_values, at, 1), std::fill(at + n, at + TILE, s.nothing.data());
  }
  void locate_run(const Row& row, int64_t place, int64_t n, bool of_values, const T** at, int64_t step) {
    const T *in_pages = of_values ? a.pages_v : a.pages_k, *in_rows = of_values ? a.rows_v : a.rows_k;
    const int64_t id = row.begin + place;
    int64_t i = 0;
    while (i < n && id + i < prefix) {
      const int64_t page = (id + i) / a.page_size, token = (id + i) % a.page_size;
      const T* x = in_pages + ((pages[page] * a.kv_heads + head) * a.page_size + token) * a.dim;
      for (const int64_t end = i + std::min({n - i, prefix - id - i, a.page_size - token}); i < end; i++, x += a.dim) at[i * step] = x;
    }
    for (; i < n; i++) {
      const int64_t j = id + i < row.end ? id + i : row.own[id + i - row.end];
      at[i * step] = in_rows + ((k0 + j - prefix) * a.kv_heads + head) * a.dim;
    }
  }

  // f(query, end, place in the chunk, keys, what to prefetch or null) for the tiles of the chunk at `begin` and all rows that see the same
  // keys there (or the first of them: not if `all`), with `key` set. To score a key for a row that does not see it yet does no harm, nobody
  // reads it; its value must wait.
  template <class F>
  void visit(int64_t begin, bool of_values, bool all, F f) {
    for (int64_t place = begin; place < std::min(begin + CHUNK, longest); place += TILE) {
      std::swap(key, next);  // the last row's tile was located when the one before it was visited
      const int64_t then = place + TILE;
      const bool last = then >= std::min(begin + CHUNK, longest);
      locate(s.rows[count - 1], last && !of_values ? begin : then, of_values != last, next);
      for (int64_t end = count, i; end > 0; end = i) {
        const Row& row = s.rows[end - 1];
        for (i = end - 1; i > 0 && same(s.rows[i - 1], row, place, all);) i--;
        if (end < count) locate(row, place, of_values, key);
        const int64_t n = in_tile(row, place);
        if (n) f(i * group, end * group, place - begin, n, end < count ? nullptr : next);
      }
    }
  }

  int64_t offset(int64_t query) { return ((q0 + query / group) * a.heads + head * group + query % group) * a.dim; }

  // The block's queries as `dot` wants them: [vectors][steps][16].
  template <int PARTS>
  void pack() {
    float* to = room(s.q, (queries + LANES) * a.dim);
    for (int64_t i = 0; i < queries; i += LANES / PARTS)
      for (int64_t word = 0; word < a.dim / PER_WORD<T>; word += PARTS, to += LANES) {
        std::fill_n(to, LANES, 0.0f);
        for (int64_t j = 0; j < std::min<int64_t>(LANES / PARTS, queries - i); j++)
          std::memcpy(to + j * PARTS, a.q + offset(i + j) + word * PER_WORD<T>, PARTS * sizeof(float));
      }
  }

  template <int PARTS>
  void score(int64_t begin) {
    constexpr int64_t SLOTS = LANES / PARTS;
    const int64_t steps = a.dim / PER_WORD<T> / PARTS;
    visit(begin, false, false, [&](int64_t query, int64_t end, int64_t at, int64_t n, const T* const* fetch) {
      for (int64_t k = 0; k < n; k += LANES) {
        if (fetch)
          for (int64_t j = k; j < k + LANES; j++) prefetch(fetch[j], a.dim * sizeof(T));
        for (int64_t i = query / SLOTS * SLOTS; i < end; i += SLOTS)
          dot<V, Dot, PARTS>(s.q.data() + i * PARTS * steps, key + k, steps, std::max<int64_t>(query - i, 0), std::min(end - i, SLOTS),
                             s.scores.data() + i * APART + at + k);
      }
    });
  }

  void soften_all(int64_t begin) {
    for (int64_t i = 0; i < queries; i++) {
      const int64_t n = std::min(s.rows[i / group].length - begin, CHUNK);
      if (n <= 0) continue;
      const float before = s.tops[i], total = soften<V, Dot>(s.scores.data() + i * APART, n, a.scale, s.tops[i], s.weights.data() + i * APART);
      if (begin && s.tops[i] > before) {
        float scale[LANES] = {before - s.tops[i]};
        exp(V::load(scale)).store(scale);
        s.totals[i] *= *scale;
        for (float* x = s.out.data() + i * width; x < s.out.data() + (i + 1) * width; x += LANES) (V::load(x) * V::set(*scale)).store(x);
      }
      s.totals[i] += total;
    }
  }

  void weigh_all(int64_t begin) {
    visit(begin, true, true, [&](int64_t query, int64_t end, int64_t at, int64_t n, const T* const* fetch) {
      for (int64_t i = query; i < end; i += V::QUERIES, fetch = nullptr)
        with<V::QUERIES>(end - i, [&]<int N>() {
          weigh<V, Dot, N>(s.weights.data() + i * APART + at, key, fetch, n, a.dim, s.out.data() + i * width, width);
        });
    });
  }

#ifdef __AMX_TILE__
  int64_t steps = (a.dim + 31) / 32;  // of 32 elements

  // The queries as tiles take them, one after another, and room below the last.
  void pack_tiles() {
    float* to = room(s.q, (queries + LANES) * steps * LANES);
    for (int64_t i = 0; i < queries; i++, to += steps * LANES) {
      std::memcpy(to, a.q + offset(i), size_t(a.dim) * sizeof(T));
      std::fill(to + a.dim / 2, to + steps * LANES, 0.0f);
    }
  }

  void score_tiles(int64_t begin) {
    room(s.pairs, TILE / 2 * width);
    visit(begin, false, false, [&](int64_t query, int64_t end, int64_t at, int64_t n, const T* const* fetch) {
      if (fetch)
        for (int64_t k = 0; k < n; k++) prefetch(fetch[k], a.dim * sizeof(T));
      turn_keys(n);
      for (int64_t k = 0; k < n; k += COLUMNS)
        for (int64_t i = query; i < end; i += LANES)
          with_rows<true>(i, end, s.scores.data() + i * APART + at + k, APART, [&](float* sums, int64_t apart) {
            Dot::template add<true>(reinterpret_cast<const T*>(s.q.data() + i * steps * LANES), steps * TILE_BYTES,
                                    s.pairs.data() + k * steps * LANES, steps, sums, apart);
          });
    });
  }

  // The first n of a tile's keys: [32 keys][words of 32 * steps elements][32].
  void turn_keys(int64_t n) {
    for (int64_t k = 0; k < n; k += LANES) {
      float* to = s.pairs.data() + k / COLUMNS * COLUMNS * steps * LANES + k % COLUMNS;
      for (int64_t d = 0; d < a.dim; d += 32) {
        V r[LANES];
        const int words = int(std::min<int64_t>(LANES, (a.dim - d) / 2));
        for (int64_t j = 0; j < LANES; j++) r[j] = V::load(reinterpret_cast<const float*>(key[k + j] + d), words);
        transpose(r);
        for (int64_t j = 0; j < LANES; j++, to += COLUMNS) r[j].store(to);
      }
    }
  }

  // f(sums [16][32], floats between their rows) for queries i .. end: in place, or in a copy of the rows that are theirs.
  template <bool FRESH, class F>
  void with_rows(int64_t i, int64_t end, float* to, int64_t apart, F f) {
    const int64_t rows = end - i;
    if (rows >= LANES || end == queries) return f(to, apart);  // there is room below the last
    alignas(64) float sums[LANES * COLUMNS];
    for (int64_t j = 0; !FRESH && j < rows; j++) std::memcpy(sums + j * COLUMNS, to + j * apart, COLUMNS * sizeof(float));
    f(sums, COLUMNS);
    for (int64_t j = 0; j < rows; j++) std::memcpy(to + j * apart, sums + j * COLUMNS, COLUMNS * sizeof(float));
  }

  // Rows that see no more than the first keys of a tile have weights of zero for the others: what they would be multiplied by must be finite.
  void weigh_tiles(int64_t begin) {
    room(s.pairs, TILE / 2 * width);
    visit(begin, true, false, [&](int64_t query, int64_t end, int64_t at, int64_t n, const T* const* fetch) {
      zip_values(n, fetch);
      if (in_tile(s.rows[query / group], begin + at) == n || finite(n)) return multiply(query, end, at, n);
      for (; end > query; end -= group) {
        const Row& row = s.rows[end / group - 1];
        const int64_t own = in_tile(row, begin + at);
        locate(row, begin + at, true, key), zip_values(own, nullptr), multiply(end - group, end, at, own);
      }
    });
  }

  // The first n of a tile's values, pair by pair: [32 elements][pairs][32 words].
  void zip_values(int64_t n, const T* const* fetch) {
    float* to = s.pairs.data();
    const int64_t all = (n + 31) / 32 * 32;
    for (int64_t d = 0; d < a.dim; d += COLUMNS)
      for (int64_t k = 0; k < all; k += 2, to += COLUMNS) {
        if (fetch) prefetch(fetch[k] + d, 64), prefetch(fetch[k + 1] + d, 64);
        V v[2];
        values(key + k, d, int(std::min(COLUMNS, a.dim - d)), v[0], v[1]);
        v[0].store(to), v[1].store(to + LANES);
      }
  }
  bool finite(int64_t n) {
    V zero = V::set(0);
    for (const float* x = s.pairs.data(); x < s.pairs.data() + (n + 31) / 32 * 16 * width; x += LANES)
      zero = fma(low(V::load(x)), V::set(0), fma(high(V::load(x)), V::set(0), zero));
    return sum(zero) == 0;
  }

  // out += weights . values for the tile at `at`.
  void multiply(int64_t query, int64_t end, int64_t at, int64_t n) {
    const int64_t blocks = (n + 31) / 32;
    for (int64_t i = query; i < end; i += LANES)
      for (int64_t d = 0; d < width; d += COLUMNS)
        with_rows<false>(i, end, s.out.data() + i * width + d, width, [&](float* sums, int64_t apart) {
          Dot::template add<false>(s.weights.data() + i * APART + at, APART * sizeof(T), s.pairs.data() + d * blocks * LANES, blocks, sums, apart);
        });
  }
#endif

  void run() {
    list();
#ifdef __AMX_TILE__
    if constexpr (TILES<Dot>) {
      const Tiles tiles(TILE_ROWS);
      return run([&] { pack_tiles(); }, [&](int64_t begin) { score_tiles(begin); }, [&](int64_t begin) { weigh_tiles(begin); });
    } else
#endif
      run_vectors();
  }

  void run_vectors() {
    // How many words of a query share a vector with those of others: a function of the model's shape alone, for a score is summed accordingly.
    int64_t parts = LANES / int64_t(std::bit_ceil(uint64_t(std::min<int64_t>(group, LANES))));
    while (a.dim / PER_WORD<T> % parts) parts /= 2;
    switch (parts) {
      case 1: return run<1>();
      case 2: return run<2>();
      case 4: return run<4>();
      case 8: return run<8>();
      default: return run<16>();
    }
  }

  template <int PARTS>
  void run() {
    run([&] { pack<PARTS>(); }, [&](int64_t begin) { score<PARTS>(begin); }, [&](int64_t begin) { weigh_all(begin); });
  }

  template <class Pack, class Score, class Weigh>
  void run(Pack pack, Score score, Weigh weigh) {
    room(s.scores, (queries + LANES) * APART), room(s.weights, (queries + LANES) * APART), room(s.nothing, a.dim);
    locate(s.rows[count - 1], 0, false, next);
    std::for_each(next, next + TILE, [&](const T* x) { prefetch(x, a.dim * sizeof(T)); });
    pack();
    s.out.assign((queries + LANES) * width, 0), s.totals.assign(queries, 0), s.tops.assign(queries, std::numeric_limits<float>::lowest());
    for (int64_t begin = 0; begin < longest; begin += CHUNK) {
      score(begin);
      soften_all(begin);
      weigh(begin);
    }
    for (int64_t i = 0; i < queries; i++) {
      if (s.rows[i / group].length == 0) continue;  // against the contract: the output stays zero
      const V total = V::set(s.totals[i]);
      for (int64_t d = 0; d < a.dim; d += 2 * LANES) {
        const float* x = s.out.data() + i * width + d;
        finish(V::load(x) / total, V::load(x + LANES) / total, a.out + offset(i) + d, int(std::min<int64_t>(2 * LANES, a.dim - d)));
      }
    }
  }
};

template <class V, class Dot, class T>
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
    work += double(s[1]) * double(a.heads * a.dim) * double(s[3] + s[4]) / 16;
  }
  for_each(int64_t(tasks.size()), work, [&](int64_t i) {
    static thread_local Scratch<T> scratch;
    const Task& t = tasks[i];
    Block<V, T, Dot>(a, scratch, t.segment, t.head, t.first, t.count).run();
  });
}

}  // namespace

void attention(const Attention<float>& a, bool scalar) { scalar ? all<Scalar, Fma>(a) : all<Native, Fma>(a); }

void attention(const Attention<bf16>& a, bool scalar) {
#ifdef __AMX_TILE__
  scalar ? all<Scalar, TilePairsTwin>(a) : all<Native, TilePairs>(a);
#else
#ifdef __AVX512BW__
  if (!scalar && __builtin_cpu_supports("avx512bf16")) return all<Native, Dpbf16>(a);
#endif
  scalar ? all<Scalar, Pairs>(a) : all<Native, Pairs>(a);
#endif
}

}  // namespace specedge
