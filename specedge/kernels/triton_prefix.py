"""Attention of every row over the committed tokens of its sequence, in Triton: partial outputs and log-sum-exps, one per split of the prefix.

The prefix holds no tree, so there is nothing to mask but its end and a sliding window. Rows and the G query heads of a key head are packed into one
dimension, row * G + g, so that the keys and values are read once for all of them; they are cut into tiles of it. The prefix is cut into splits,
each with programs of its own. Knows nothing of the rows' own keys: triton_rows.py adds these and merges.

Invariants: the grid follows from shapes alone (a program without work returns), so a launch can be captured; where the splits lie follows from
a sequence's own length, window and rows; the tiles of a GPU run the same instructions per row. So a row's bits do not depend on its batch.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGN = tl.constexpr(64)  # splits begin at multiples of it, so that a tile of keys lies on one page of 64 or more
MAX_SPLITS = tl.constexpr(32)  # with 8 key heads 256 programs for one sequence: two for each of an H200's 132 multiprocessors
MIN_SPLIT = tl.constexpr(256)
KEYS_PER_ROW = tl.constexpr(8)
NO_WINDOW = 1 << 30
MAX_REGISTERS = 255  # a stated limit, even this one, keeps ptxas from spilling to fit one program more (24 bytes for sm_89 and D = 96)
LOG2_E = 1.4426950408889634  # scores are kept in base 2
PRECISION = {torch.float32: "tf32x3", torch.bfloat16: "ieee", torch.float16: "ieee"}


class Tile(NamedTuple):
    """What a program takes at a time: packed rows and keys; with how many warps, and how many steps ahead it fetches keys."""

    rows: int
    keys: int
    warps: int
    stages: int


@cache
def has_wgmma(device: torch.device) -> bool:
    """Whether products of 64 rows run on whole warp groups (sm_90)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def tiles_of(dim: int, itemsize: int, wgmma: bool) -> list[Tile]:
    """The tiles that there are, the smallest first. They run the same instructions per row, so that a row's bits do not depend on the choice.

    With wgmma, whose least shape has 64 rows, these are 64 and 128. At full bandwidth 64 rows keep a third of the matrix units busy (balance is near
    190), so the rows that pad plain decoding cost nothing; 16 would run mma.sync, which sums otherwise. 256 are two tiles of 128: one of 256
    spills, by 8 warps and by 16. Without wgmma any tile runs mma.sync, and up to 64 rows the compiler lays all warps along the keys; with a head
    dim of at most 64 it does so up to 32 only, and 128 rows spill. A head dim above 128 leaves no registers for a choice. Float32 runs as three
    products of tf32 halves.
    """
    if itemsize == 4:
        return [Tile(16, 16, 4 if dim <= 128 else 8, 1)]
    if dim > 128:
        return [Tile(64, 32, 8, 2)]
    if wgmma:
        return [Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)]
    return [Tile(rows, 64, 8, 3) for rows in ((16, 32, 64) if dim > 64 else (64,))]


def choose_tile(rows: int, segments: int, group: int, dim: int, itemsize: int, wgmma: bool) -> Tile:
    """The tile for `rows` rows in `segments` sequences: the smallest that holds all packed rows of one, on average, for each tile re-reads the keys,
    from L2 at best."""
    among = tiles_of(dim, itemsize, wgmma)
    return next((tile for tile in among if rows * group <= tile.rows * segments), among[-1])


def padded(n: int) -> int:
    """The power of two, at least 16, that a dimension of `n` is computed in."""
    return max(16, 1 << (n - 1).bit_length())


@triton.jit
def cut(nq, prefix, window, G: tl.constexpr):
    """Where the splits of a prefix begin, how long each is and how many there are; scalars, or vectors over segments.

    A split is long enough that 1. there are at most 32, which bounds the grid; 2. its partials, written and read in float32 at 8 D bytes a row, are
    at most a quarter of its keys and values, 4 D bytes a token: 8 tokens a row; 3. it is worth a program: 256 tokens. So one sequence with 8
    key heads has, at 32 K tokens, 32 splits of 1,024 and 256 programs, be it for 4 packed rows (plain decoding, G = 4) or for 128 (a tree of 32
    rows); at 8 K tokens 32 splits of 256 for the former, 8 of 1,024 for the latter.
    Rows stand behind the prefix, so keys before prefix + 1 - window are seen by none.
    """
    begin = tl.maximum(prefix + 1 - window, 0) // ALIGN * ALIGN
    span = prefix - begin
    size = tl.maximum(tl.maximum(MIN_SPLIT, nq * G * KEYS_PER_ROW), (span + MAX_SPLITS - 1) // MAX_SPLITS)
    size = (size + ALIGN - 1) // ALIGN * ALIGN
    return begin, size, (span + size - 1) // size


@triton.jit
def sum_before(values, b, at):
    """Sum of `values [B]` over the segments before `at`."""
    return tl.sum(tl.where(b < at, values, 0), 0)


@triton.jit
def accumulate(scores, v, top, total, out, PRECISION: tl.constexpr):
    """One step of the running softmax in base 2: `scores [rows, keys]`, `v [keys, D]`, running maximum, sum and weighted values."""
    new = tl.maximum(top, tl.max(scores, 1))
    fade = tl.exp2(top - new)
    p = tl.exp2(scores - new[:, None])
    out = tl.dot(p.to(v.dtype), v, out * fade[:, None], input_precision=PRECISION)
    return new, total * fade + tl.sum(p, 1), out


@triton.jit(do_not_specialize=["count", "table_width", "window"])
def prefix_kernel(
    q, k_pages, v_pages, segments, page_table, q_pos, part_out, part_lse, count, table_width, heads, scale, window,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile, key head, split): a tile of one segment's packed rows over one split of its prefix.

    `part_out [*, Hkv, D]` and `part_lse [*, Hkv]`, float32: a segment's partials follow those of the segments before it, split by split.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = tl.arange(0, COUNT)
    nqs = tl.load(segments + 6 * b + 1, mask=b < count, other=0)
    prefixes = tl.load(segments + 6 * b + 4, mask=b < count, other=0)
    tiles = (nqs * G + ROWS - 1) // ROWS
    mine = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if mine >= count:
        return
    first = (tile - sum_before(tiles, b, mine)) * ROWS
    segment = segments + 6 * mine
    q0, nq, prefix = tl.load(segment).to(tl.int64), tl.load(segment + 1), tl.load(segment + 4)
    begin, size, _ = cut(nq, prefix, window, G)
    start = begin + split * size
    if start >= prefix:
        return
    stop = tl.minimum(start + size, prefix)
    _, _, splits = cut(nqs, prefixes, window, G)
    part = (sum_before(nqs * G * splits, b, mine) + split * nq * G).to(tl.int64)

    # 64-bit offsets are scalars, and within a segment or a tile 32 bits do: registers are short
    r = first + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    live = r < nq * G
    there = live[:, None] & (d < D)[None, :]
    queries = tl.load(q + q0 * heads * G * D + ((r // G * heads + head) * G + r % G)[:, None] * D + d[None, :], mask=there, other=0.0)
    q_at = tl.load(q_pos + q0 + r // G, mask=live, other=0)
    table = page_table + mine.to(tl.int64) * table_width
    top = tl.full([ROWS], -1e38, tl.float32)  # finite, so that a row that sees nothing yet does not become NaN
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    n = tl.arange(0, KEYS)
    for at in range(start, stop, KEYS):
        inside = n < stop - at
        mask = inside[:, None] & (d < D)[None, :]
        if S >= KEYS:
            first_token = (tl.load(table + at // S).to(tl.int64) * heads + head) * S + at % S
            k = tl.load(k_pages + first_token * D + (n[:, None] * D + d[None, :]), mask=mask, other=0.0)
            v = tl.load(v_pages + first_token * D + (n[:, None] * D + d[None, :]), mask=mask, other=0.0)
        else:
            page = tl.load(table + (at + n) // S, mask=inside, other=0).to(tl.int64)
            token = (page * heads + head) * S + (at + n) % S
            k = tl.load(k_pages + token[:, None] * D + d[None, :], mask=mask, other=0.0)
            v = tl.load(v_pages + token[:, None] * D + d[None, :], mask=mask, other=0.0)
        # adding 0 or -inf costs nothing: it makes an fma of the product
        scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION) * scale + tl.where(inside, 0.0, float("-inf"))[None, :]
        if WINDOW:
            scores = tl.where(q_at[:, None] - (at + n)[None, :] < window, scores, float("-inf"))
        top, total, out = accumulate(scores, v, top, total, out, PRECISION)
    total = tl.where(total > 0, total, 1.0)  # a row whose window ends behind this split leaves weight 2^-1e38 = 0
    o = out / total[:, None]
    tl.store(part_out + part * heads * D + (r * heads + head)[:, None] * D + d[None, :], o, mask=there)
    tl.store(part_lse + part * heads + r * heads + head, top + tl.log2(total), mask=live)


def prefix_attention(
    q: Tensor, pages_kv: Tensor, segments: Tensor, page_table: Tensor, q_pos: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Partials of `reference.attention` over the prefixes alone: `out [*, Hkv, D]` and base-2 `lse [*, Hkv]`, float32, laid out by `cut`.

    There is room for the most that prefixes in tables of this width can need; what no program writes is left as it is.
    """
    rows, q_heads, dim = q.shape
    _, _, heads, page_size, _ = pages_kv.shape
    count, width = page_table.shape
    group = q_heads // heads
    wgmma = has_wgmma(q.device)
    tile = choose_tile(rows, count, group, dim, q.element_size(), wgmma)
    tokens = width * page_size
    splits = min(MAX_SPLITS.value, triton.cdiv(tokens, MIN_SPLIT.value))
    # M packed rows have at most min(splits, 1 + tokens / (8 M)) splits
    room = min(splits * rows * group, rows * group + count * (tokens // KEYS_PER_ROW.value))
    out = torch.empty((room, heads, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((room, heads), dtype=torch.float32, device=q.device)
    prefix_kernel[(max_tiles(rows, count, group, tile.rows), heads, splits)](
        q, pages_kv[0], pages_kv[1], segments, page_table, q_pos, out, lse, count, width, heads, scale * LOG2_E, window or NO_WINDOW,
        G=group, D=dim, S=page_size, ROWS=tile.rows, KEYS=tile.keys, WIDTH=padded(dim), COUNT=padded(count), WINDOW=window > 0,
        PRECISION=PRECISION[q.dtype], num_warps=tile.warps, num_stages=tile.stages, maxnreg=None if wgmma else MAX_REGISTERS,
    )  # fmt: skip
    return out, lse


def max_tiles(rows: int, segments: int, group: int, tile: int) -> int:
    """Tiles of `tile` packed rows that `rows` rows, cut into `segments` segments, fill at most."""
    return (rows * group + min(segments, rows) * (tile - 1)) // tile
