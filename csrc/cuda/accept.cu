// Accept and commit on a GPU: which rows of each tree the sampled tokens follow, and the K/V of those rows, of all layers, to pages. One launch.
//
// A block belongs to one sequence and one layer's keys or values. It finds the accepted path by ancestor words, without a walk from node to node,
// and copies its share; all blocks of a sequence decide alike, so they need not speak to each other. No torch, as in sample.cu.
// Invariant: the verdict is that of engine/request.py `walk`; pages are written at the places of accepted rows and nowhere else.
#include <cstdint>

namespace {

constexpr int THREADS = 256, MOST_ROWS = 256, WORDS = MOST_ROWS / 64;
constexpr int CHUNK = 32, TURNS = 4;  // rows that a block copies at a time; blocks that take turns at a segment

// One segment, as reference.accept takes it. Row j of it has bit j in ancestor words; rows chain-1 .. nq-1 are the tree, the first of them its root.
struct Tree {
  const int64_t *tokens, *sampled;  // of its first row; of the root
  const uint64_t* anc;              // of its first row
  int words, nq, chain, room;
  const int32_t *stops, *stops_end;

  // Which rows from the root down row j sees, in word w.
  __device__ uint64_t path(int j, int w) const {
    const uint64_t word = anc[int64_t(j) * words + w];
    const int above = chain - 64 * w;  // bits below this one are the chain's
    return above <= 0 ? word : above >= 64 ? 0 : word >> above << above;
  }
  __device__ bool ends(int64_t token) const {
    for (const int32_t* s = stops; s < stops_end; s++)
      if (*s == token) return true;
    return false;
  }
  // Whether the walk goes on from the parent of row j to row j, should it come there.
  __device__ bool follows(int j, int& depth) const {
    int parent = chain - 1;
    depth = 0;
    for (int w = 0; w < words; w++) {
      uint64_t p = path(j, w);
      if (w == j / 64) p &= ~(uint64_t(1) << j % 64);
      depth += __popcll(p);
      if (p) parent = 64 * w + 63 - __clzll(p);
    }
    const int64_t token = sampled[parent - (chain - 1)];
    return token == tokens[j] && ++depth < room && !ends(token);
  }
};

__global__ void __launch_bounds__(THREADS) accept_kernel(const int32_t* segments, const int32_t* page_table, const int64_t* tokens,
                                                         const int64_t* anc, const int64_t* sampled, const int32_t* verify, const int32_t* stops,
                                                         int32_t* results, const uint4* rows_kv, uint4* pages_kv, int words, int width, int slots,
                                                         int pages, int heads, int page_size, int vectors) {
  __shared__ unsigned long long good[WORDS];  // bit j: row j is not to be left out of a path
  __shared__ int path[MOST_ROWS];             // rows of the accepted path, below the root
  __shared__ int depth, last;
  const int b = blockIdx.y, t = threadIdx.x;
  const int32_t *segment = segments + 6 * b, *v = verify + 5 * b;
  const int64_t q0 = segment[0], k0 = segment[2];
  const int nq = segment[1], prefix = segment[4], want = v[0], chain = v[1];
  if (int(blockIdx.z) * CHUNK >= nq) return;  // nothing to copy, or padding
  const Tree tree = {tokens + q0, sampled + (want < 0 ? 0 : want), reinterpret_cast<const uint64_t*>(anc) + q0 * words, words, nq, chain, v[2],
                     stops + v[3], stops + v[4]};
  if (t < WORDS) good[t] = ~0ull;
  if (t == 0) depth = 0, last = 0;
  __syncthreads();
  const int j = chain + t;  // a node for each thread: a segment with a tree has at most 256 rows
  const bool node = want >= 0 && j < nq;
  int own = 0;
  if (node && !tree.follows(j, own)) atomicAnd(good + j / 64, ~(1ull << j % 64));
  __syncthreads();
  bool accepted = node;
  for (int w = 0; node && w < words; w++) accepted &= (tree.path(j, w) & ~good[w]) == 0;
  if (accepted) {  // all accepted nodes lie on one path, for siblings differ
    path[own - 1] = j;
    atomicMax(&depth, own);
    atomicMax(&last, t + 1);
  }
  __syncthreads();

  if (t == 0 && blockIdx.x == 0 && blockIdx.z == 0 && want >= 0) {
    const int64_t token = tree.sampled[last];
    results[3 * b] = last, results[3 * b + 1] = int32_t(token);
    results[3 * b + 2] = tree.ends(token) ? 1 : depth + 1 == tree.room ? 2 : 0;
  }

  const int kept = chain + depth;
  const int64_t part = blockIdx.x;  // of layers x (keys, values)
  for (int first = blockIdx.z * CHUNK; first < kept; first += gridDim.z * CHUNK) {
    const int end = first + CHUNK < kept ? first + CHUNK : kept;
    for (int i = t; i < (end - first) * heads * vectors; i += THREADS) {
      const int row = first + i / (heads * vectors), head = i / vectors % heads, at = i % vectors;
      const int64_t from = k0 + (row < chain ? row : path[row - chain]);
      const int64_t page = page_table[int64_t(b) * width + (prefix + row) / page_size], offset = (prefix + row) % page_size;
      pages_kv[(((part * pages + page) * heads + head) * page_size + offset) * vectors + at] =
          rows_kv[((part * slots + from) * heads + head) * vectors + at];
    }
  }
}

}  // namespace

// Returns 0 or what cudaGetLastError says. The letters of reference.accept; `most` rows a segment has at most, `vectors` of 16 bytes a head.
extern "C" int specedge_accept(const int32_t* segments, const int32_t* page_table, const int64_t* tokens, const int64_t* anc,
                               const int64_t* sampled, const int32_t* verify, const int32_t* stops, int32_t* results, const void* rows_kv,
                               void* pages_kv, int count, int most, int words, int width, int parts, int slots, int pages, int heads, int page_size,
                               int vectors, cudaStream_t stream) {
  const int chunks = (most + CHUNK - 1) / CHUNK;
  const dim3 grid(parts, count, chunks < TURNS ? chunks : TURNS);
  accept_kernel<<<grid, THREADS, 0, stream>>>(segments, page_table, tokens, anc, sampled, verify, stops, results,
                                             static_cast<const uint4*>(rows_kv), static_cast<uint4*>(pages_kv), words, width, slots, pages, heads,
                                             page_size, vectors);
  return cudaGetLastError();
}
