"""rms_norm, add_rms_norm, silu_mul, rope_write and norm_rope_write in Triton: what happens to rows between matrix products and attention.

Knows nothing of sequences. Invariant: a row is computed by programs of its own in blocks that depend on its width alone, so its bits do not depend on
its batch; float32 inside, rounded where the reference rounds. rope_write multiplies and adds without fma and equals the reference bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # that a program turns: 8 of 128 are 8 values a thread
BLOCK = 1024  # values that a program of silu_mul makes


@triton.jit
def norm_kernel(x, residual, weight, out, total, width, eps, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """Program (row): `out = rms_norm(x)`; ADD: `total = x + residual`, and of that the norm."""
    i = tl.arange(0, BLOCK)
    mask = i < width
    at = tl.program_id(0).to(tl.int64) * width + i
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        rounded = (y + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        y = rounded.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / width + eps) * tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_kernel(x, out, width, BLOCK: tl.constexpr):
    """Program (row, block of the width)."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(x + 2 * row * width + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + (2 * row + 1) * width + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + i, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rope_kernel(
    qkv, q_norm, k_norm, cos, sin, positions, slots, q_out, k_rows, v_rows, q_heads, kv_heads, eps,
    D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Program (row, HEADS heads of queries, keys and values): norm if asked for, rotation, and the store to its place."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    heads = q_heads + 2 * kv_heads
    inside = i < D // 2
    mask = (h < heads)[:, None] & inside[None, :]
    at = qkv + (row * heads + h)[:, None] * D + i[None, :]
    low, high = tl.load(at, mask=mask, other=0.0), tl.load(at + D // 2, mask=mask, other=0.0)
    a, b = low.to(tl.float32), high.to(tl.float32)
    of_queries = (h < q_heads)[:, None]
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        q_low, q_high = tl.load(q_norm + i, mask=inside, other=0.0), tl.load(q_norm + D // 2 + i, mask=inside, other=0.0)
        k_low, k_high = tl.load(k_norm + i, mask=inside, other=0.0), tl.load(k_norm + D // 2 + i, mask=inside, other=0.0)
        a = a * scale * tl.where(of_queries, q_low[None, :], k_low[None, :]).to(tl.float32)
        b = b * scale * tl.where(of_queries, q_high[None, :], k_high[None, :]).to(tl.float32)
        a, b = a.to(low.dtype).to(tl.float32), b.to(low.dtype).to(tl.float32)
    angle = tl.load(positions + row).to(tl.int64) * (D // 2) + i
    c, s = tl.load(cos + angle, mask=inside, other=0.0)[None, :], tl.load(sin + angle, mask=inside, other=0.0)[None, :]
    turned_low, turned_high = (a * c - b * s).to(low.dtype), (b * c + a * s).to(low.dtype)
    to_q = q_out + (row * q_heads + h)[:, None] * D + i[None, :]
    tl.store(to_q, turned_low, mask=mask & of_queries)
    tl.store(to_q + D // 2, turned_high, mask=mask & of_queries)
    slot = tl.load(slots + row).to(tl.int64) * kv_heads
    of_keys = ((h >= q_heads) & (h < q_heads + kv_heads))[:, None]
    to_k = k_rows + (slot + h - q_heads)[:, None] * D + i[None, :]
    tl.store(to_k, turned_low, mask=mask & of_keys)
    tl.store(to_k + D // 2, turned_high, mask=mask & of_keys)
    of_values = (h >= q_heads + kv_heads)[:, None]
    to_v = v_rows + (slot + h - q_heads - kv_heads)[:, None] * D + i[None, :]
    tl.store(to_v, low, mask=mask & of_values)
    tl.store(to_v + D // 2, high, mask=mask & of_values)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    width = x.shape[-1]
    out, total = torch.empty_like(x), torch.empty_like(x) if residual is not None else x
    block = triton.next_power_of_2(width)
    warps = min(max(block // 512, 1), 16)  # 16 values a thread
    norm_kernel[(x.numel() // width,)](
        x, x if residual is None else residual.contiguous(), weight, out, total, width, eps, BLOCK=block, ADD=residual is not None, num_warps=warps
    )
    return out, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm` in one launch."""
    return _norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm` in one launch."""
    return _norm(x, residual, weight, eps)


def silu_mul(x: Tensor) -> Tensor:
    """`reference.silu_mul` in one launch."""
    x = x.contiguous()
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    silu_mul_kernel[(rows, triton.cdiv(width, BLOCK))](x, out, width, BLOCK=BLOCK, num_warps=4)
    return out


def rope_write(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, rows_kv: Tensor, heads: int) -> Tensor:
    """`reference.rope_write` in one launch. Rows that share a slot leave there what one of them wrote."""
    return _rope(qkv, None, 0.0, cos, sin, positions, slots, rows_kv, heads)


def norm_rope_write(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, rows_kv: Tensor, heads: int
) -> Tensor:
    """`reference.norm_rope_write` in one launch."""
    return _rope(qkv, (q_norm, k_norm), eps, cos, sin, positions, slots, rows_kv, heads)


def _rope(
    qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
    cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, rows_kv: Tensor, heads: int,
) -> Tensor:  # fmt: skip
    rows, (kv_heads, dim) = len(qkv), rows_kv.shape[2:]
    q = qkv.new_empty(rows, heads, dim)
    q_norm, k_norm = norms or (qkv, qkv)
    rope_kernel[(rows, triton.cdiv(heads + 2 * kv_heads, HEADS))](
        qkv, q_norm, k_norm, cos, sin, positions, slots, q, rows_kv[0], rows_kv[1], heads, kv_heads, eps,
        D=dim, HALF=triton.next_power_of_2(dim // 2), HEADS=HEADS, NORM=norms is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return q
