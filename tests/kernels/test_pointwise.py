"""rms_norm, silu_mul, rope_write, commit: equal to the reference, row by row, native and twin."""

from typing import Any

import pytest
import torch

from specedge import kernels
from specedge.kernels import reference

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 17, 63, 64, 65]
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-7},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 16, 63, 65, 896])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(width)
    weight = torch.randn(width, generator=gen).to(dtype)
    for rows in ROWS:
        x = (torch.randn(rows, width, generator=gen) * 3).to(dtype)
        got = kernels.rms_norm(x, weight, 1e-6)
        torch.testing.assert_close(got, reference.rms_norm(x, weight, 1e-6), **TOLERANCE[dtype])
    view = torch.randn(9, 3, 2 * width, generator=gen).to(dtype)[:, 1:, :width]  # as of a q/k norm: heads, not contiguous
    torch.testing.assert_close(kernels.rms_norm(view, weight, 1e-6), reference.rms_norm(view, weight, 1e-6), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 16, 63, 65, 896])
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(width)
    for rows in ROWS:
        x = (torch.randn(rows, 2 * width, generator=gen) * 5).to(dtype)
        torch.testing.assert_close(kernels.silu_mul(x), reference.silu_mul(x), **TOLERANCE[dtype])


def test_exp_is_within_two_ulp(cpp: Any) -> None:
    """Through silu: x / (1 + e^-x) adds two roundings to it. Where e^-x rules, its error shows undiluted."""
    x = torch.linspace(-87, 88, 1_000_001)
    pair = torch.stack((x, torch.ones_like(x)), 1)
    got = cpp.silu_mul(pair)[:, 0]
    want = x.double() / (1 + torch.exp(-x.double()))
    ulp = torch.nextafter(want.float().abs(), torch.tensor(torch.inf)).double() - want.float().abs().double()
    assert ((got.double() - want).abs() / ulp)[want.abs() > 1e-36].max() < 3.5


def test_silu_at_the_ends() -> None:
    gate = torch.tensor([-torch.inf, -1e30, -200.0, -89.0, -0.0, 0.0, 89.0, 200.0, 1e30, torch.nan, torch.inf])
    got = kernels.silu_mul(torch.stack((gate, torch.ones_like(gate)), 1))[1:, 0]
    want = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 89.0, 200.0, 1e30, torch.nan, torch.inf])  # -inf * 0 is NaN in both
    torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=1e-30)


def rope_case(heads: int, kv_heads: int, dim: int, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    gen = torch.Generator().manual_seed(rows + dim)
    angle = torch.rand(50, dim // 2, generator=gen) * 6
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, generator=gen).to(dtype)
    positions = torch.randint(0, 50, (rows,), generator=gen).int()
    slots = torch.randperm(rows + 5, generator=gen)[:rows].int()
    rows_kv = torch.full((2, rows + 5, kv_heads, dim), 7.0).to(dtype)
    return qkv, angle.cos(), angle.sin(), positions, slots, rows_kv, heads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 8), (6, 2, 16), (4, 1, 40), (7, 1, 64), (8, 2, 80), (3, 3, 128)])
def test_rope_write(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        ours, law = rope_case(heads, kv_heads, dim, rows, dtype), rope_case(heads, kv_heads, dim, rows, dtype)
        assert torch.equal(kernels.rope_write(*ours), reference.rope_write(*law))
        assert torch.equal(ours[5], law[5])  # also the slots that nobody wrote


def near_turned(got: torch.Tensor, want: torch.Tensor) -> None:
    """A norm that is one step of rounding away moves the sum of two products by as much of the larger."""
    loose = {torch.float32: 2e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}[want.dtype]
    torch.testing.assert_close(got.cpu(), want, rtol=loose, atol=loose)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 16), (3, 3, 128)])
def test_norm_rope_write(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    q_norm, k_norm = torch.randn(2, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    (qkv, *ours), (_, *law) = rope_case(heads, kv_heads, dim, 17, dtype), rope_case(heads, kv_heads, dim, 17, dtype)
    near_turned(kernels.norm_rope_write(qkv, q_norm, k_norm, 1e-6, *ours), reference.norm_rope_write(qkv, q_norm, k_norm, 1e-6, *law))
    near_turned(ours[4], law[4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 9, 65, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.linspace(-2, 2, 65).to(dtype)
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual) and torch.equal(normed, kernels.rms_norm(total, weight, 1e-6))
    torch.testing.assert_close(normed, reference.add_rms_norm(x, residual, weight, 1e-6)[0], **TOLERANCE[dtype])


def test_rope_write_refuses_bad_indices(cpp: Any) -> None:
    for index, value in ((3, 50), (3, -1), (4, 7), (4, -1)):
        args = list(rope_case(2, 1, 8, 2, torch.float32))
        args[index][1] = value
        with pytest.raises(RuntimeError, match=f"\\[1\\] = {value}"):
            kernels.rope_write(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 63, 896])
def test_rows_alone_and_twin(cpp: Any, width: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(width)
    x, weight = torch.randn(65, 2 * width, generator=gen).to(dtype), torch.randn(2 * width, generator=gen).to(dtype)
    x[3, 0] = torch.nan
    x[4] *= 1e-20  # bf16: small numbers and their rounding
    ops = [
        lambda x, **kw: cpp.rms_norm(x, weight, 1e-5, **kw), lambda x, **kw: cpp.silu_mul(x, **kw),
        lambda x, **kw: torch.cat(cpp.add_rms_norm(x, x * 0.5, weight, 1e-5, **kw), 1),
    ]  # fmt: skip
    for op in ops:
        torch.set_num_threads(2)
        whole = op(x)
        torch.set_num_threads(1)
        for other in (op(x), op(x, scalar=True), torch.cat([op(x[i : i + 1]) for i in range(65)])):
            torch.testing.assert_close(whole, other, rtol=0, atol=0, equal_nan=True)
    for dim in (8, 64, 80):
        ours, twin = rope_case(4, 2, dim, 17, dtype), rope_case(4, 2, dim, 17, dtype)
        assert torch.equal(cpp.rope_write(*ours), cpp.rope_write(*twin, scalar=True)) and torch.equal(ours[5], twin[5])


def test_bf16_rounds_to_nearest_even() -> None:
    """silu(g) is g for a g of 100, so the product of two 8-bit mantissas is exact in float32: the store meets thousands of true ties."""
    up = torch.arange(65536).to(torch.uint16).view(torch.bfloat16)  # every bf16: subnormals, inf and NaN too
    for g in (90.0, 101.5, 127.5):
        gate = torch.full_like(up, g)
        got, want = kernels.silu_mul(torch.cat((gate, up))[None])[0], (gate.float() * up.float()).bfloat16()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [16, 64])
def test_commit(size: int) -> None:
    rows_kv, pages = torch.randn(3, 2, 9, 2, 8), torch.zeros(3, 2, 5, 2, size, 8)
    rows, page, offset = torch.tensor([8, 0, 3]), torch.tensor([4, 1, 1]), torch.tensor([size - 1, 0, 5])
    kernels.commit(rows_kv, pages, rows, page, offset)
    for r, p, o in zip(rows.tolist(), page.tolist(), offset.tolist(), strict=True):
        assert torch.equal(pages[:, :, p, :, o], rows_kv[:, :, r])
    assert pages.count_nonzero() == 3 * 3 * 2 * 2 * 8
