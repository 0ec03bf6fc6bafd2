"""Attention of rows over rows of the row buffer, merged with the partials of triton_prefix.py into the whole op, in Triton.

Visibility among rows is causal or by ancestor words. Scores are kept in base 2; partials are added in the order of their splits, without
atomics. Knows nothing of sequences beyond their segments.

Invariants: as in triton_prefix.py the grid follows from shapes alone, and how a segment is cut follows from the segment alone; so a row's bits do
not depend on its batch. They do depend on which of its keys are committed: those are summed apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specedge.kernels.triton_prefix import (
    LOG2_E,
    MAX_REGISTERS,
    NO_WINDOW,
    PRECISION,
    Tile,
    accumulate,
    cut,
    has_wgmma,
    max_tiles,
    padded,
    prefix_attention,
    sum_before,
)

SMALL = tl.constexpr(16)  # packed rows of a tile
SMALL_UP_TO = tl.constexpr(256)  # packed rows of a segment that small tiles cover: a tree of 64 rows with G = 4


def choose_tile(dim: int, itemsize: int, wgmma: bool) -> Tile:
    """The tile of segments of more than 256 packed rows, which read the keys less often with it (by wgmma on sm_90).

    All others have tiles of 16, which spread the merge of up to 32 partials over many multiprocessors: for 128 rows and 8 key heads 64 programs.
    """
    if itemsize == 4:
        return Tile(16, 16, 4 if dim <= 128 else 8, 1)
    if dim > 128:
        return Tile(16, 32, 4, 2)
    return Tile(64, 32, 4, 2) if wgmma else Tile(64, 64, 8, 2)


@triton.jit
def row_tile(
    q, k_rows, v_rows, q_pos, k_pos, anc, words, part_out, part_lse, out, segment, head, heads, first, part, splits, window, scale,
    G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of packed rows first .. first + ROWS of a segment, whose partials begin at `part`."""
    q0, nq = tl.load(segment).to(tl.int64), tl.load(segment + 1)
    k0, nk, causal = tl.load(segment + 2).to(tl.int64), tl.load(segment + 3), tl.load(segment + 5)
    r = first + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    live = r < nq * G
    there = live[:, None] & (d < D)[None, :]
    i = r // G
    at = ((i * heads + head) * G + r % G)[:, None] * D + d[None, :]
    queries = tl.load(q + q0 * heads * G * D + at, mask=there, other=0.0)
    q_at = tl.load(q_pos + q0 + i, mask=live, other=0)

    # the partials first: their log-sum-exp is the running maximum and sum with which the softmax over rows goes on
    top = tl.full([ROWS], -1e38, tl.float32)
    for s in range(0, splits):
        lse = tl.load(part_lse + (part + s * nq * G) * heads + r * heads + head, mask=live, other=-1e38)
        top = tl.maximum(top, lse)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for s in tl.range(0, splits, loop_unroll_factor=4 if ROWS == SMALL else 1):  # the loads of four splits are on their way together
        base = (part + s * nq * G) * heads
        share = tl.exp2(tl.load(part_lse + base + r * heads + head, mask=live, other=-1e38) - top)
        sums += share[:, None] * tl.load(part_out + base * D + (r * heads + head)[:, None] * D + d[None, :], mask=there, other=0.0)
        total += share

    bound = tl.where(causal > 0, nk - nq + 1 + i, nk)  # keys that visibility may reach
    end = tl.minimum(tl.max(tl.where(live, bound, 0), 0), nk)
    n = tl.arange(0, KEYS)
    for start in range(0, end, KEYS):
        inside = n < end - start
        mask = inside[:, None] & (d < D)[None, :]
        base = ((k0 + start) * heads + head) * D
        k = tl.load(k_rows + base + (n[:, None] * (heads * D) + d[None, :]), mask=mask, other=0.0)
        v = tl.load(v_rows + base + (n[:, None] * (heads * D) + d[None, :]), mask=mask, other=0.0)
        word = tl.load(anc + q0 * words + i * words + start // 64, mask=live & (causal == 0), other=-1)
        bit = (start % 64 + n).to(tl.int64)
        seen = ((word[:, None] >> bit[None, :]) & 1 == 1) & ((start + n)[None, :] < bound[:, None])
        if WINDOW:
            k_at = tl.load(k_pos + k0 + start + n, mask=inside, other=0)
            seen = seen & (q_at[:, None] - k_at[None, :] < window)
        scores = tl.where(seen, tl.dot(queries, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
        top, total, sums = accumulate(scores, v, top, total, sums, PRECISION)
    o = sums / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + q0 * heads * G * D + at, o.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count", "words", "window"])
def rows_kernel(
    q, k_rows, v_rows, segments, q_pos, k_pos, anc, part_out, part_lse, out, count, words, heads, scale, window,
    G: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    TALL: tl.constexpr,
):  # fmt: skip
    """Program (tile, key head). Segments of more than 256 packed rows are cut into tiles of TALL, all others into tiles of 16."""
    tile, head = tl.program_id(0), tl.program_id(1)
    b = tl.arange(0, COUNT)
    nqs = tl.load(segments + 6 * b + 1, mask=b < count, other=0)
    prefixes = tl.load(segments + 6 * b + 4, mask=b < count, other=0)
    size = tl.where(nqs * G > SMALL_UP_TO, TALL, SMALL)
    tiles = (nqs * G + size - 1) // size
    mine = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if mine >= count:
        return
    _, _, splits = cut(nqs, prefixes, window, G)
    part = sum_before(nqs * G * splits, b, mine).to(tl.int64)
    before = tile - sum_before(tiles, b, mine)
    segment = segments + 6 * mine
    nq = tl.load(segment + 1)
    _, _, own = cut(nq, tl.load(segment + 4), window, G)
    if nq * G > SMALL_UP_TO:
        row_tile(
            q, k_rows, v_rows, q_pos, k_pos, anc, words, part_out, part_lse, out, segment, head, heads, before * TALL, part, own, window, scale,
            G, D, TALL, KEYS, WIDTH, WINDOW, PRECISION,
        )  # fmt: skip
    else:
        row_tile(
            q, k_rows, v_rows, q_pos, k_pos, anc, words, part_out, part_lse, out, segment, head, heads, before * SMALL, part, own, window, scale,
            G, D, SMALL, KEYS, WIDTH, WINDOW, PRECISION,
        )  # fmt: skip


def attention(
    q: Tensor,
    rows_kv: Tensor,
    pages_kv: Tensor,
    segments: Tensor,
    page_table: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    anc: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """`reference.attention` in two launches, with float32 sums; positions of queries are at least their segment's prefix."""
    part_out, part_lse = prefix_attention(q, pages_kv, segments, page_table, q_pos, scale, window)
    rows, q_heads, dim = q.shape
    heads, count = rows_kv.shape[2], len(segments)
    group = q_heads // heads
    wgmma = has_wgmma(q.device)
    tile = choose_tile(dim, q.element_size(), wgmma)
    out = torch.zeros_like(q)
    rows_kernel[(max_tiles(rows, count, group, SMALL.value), heads)](
        q, rows_kv[0], rows_kv[1], segments, q_pos, k_pos, anc, part_out, part_lse, out, count, anc.shape[1], heads, scale * LOG2_E,
        window or NO_WINDOW, G=group, D=dim, TALL=tile.rows, KEYS=tile.keys, WIDTH=padded(dim), COUNT=padded(count), WINDOW=window > 0,
        PRECISION=PRECISION[q.dtype], num_warps=tile.warps, num_stages=tile.stages, maxnreg=None if wgmma else MAX_REGISTERS,
    )  # fmt: skip
    return out
