"""The row ops in Triton: equal to the reference, rope_write bit for bit; in the interpreter or on a GPU, there in bfloat16 too."""

from typing import Any

import pytest
import torch
from torch import Tensor

from specedge.kernels import reference
from tests.kernels.test_pointwise import TOLERANCE, near_turned, rope_case

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
from specedge.kernels import triton_pointwise  # noqa: E402

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NEAR = TOLERANCE | {torch.float16: {"rtol": 2**-10, "atol": 1e-6}}


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), want, **NEAR[want.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 896, 5000])
def test_norms(device: torch.device, width: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(width)
    x, residual = (torch.randn(2, 5, width, generator=gen) * 3).to(dtype)
    weight = torch.randn(width, generator=gen).to(dtype)
    near(triton_pointwise.rms_norm(x.to(device), weight.to(device), 1e-6), reference.rms_norm(x, weight, 1e-6))
    normed, total = triton_pointwise.add_rms_norm(x.to(device), residual.to(device), weight.to(device), 1e-6)
    want_normed, want_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total.cpu(), want_total)
    near(normed, want_normed)
    alone, _ = triton_pointwise.add_rms_norm(x[3:4].to(device), residual[3:4].to(device), weight.to(device), 1e-6)
    assert torch.equal(alone[0], normed[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 2500])
def test_silu_mul(device: torch.device, width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(width)) * 5).to(dtype)
    x[0, 0], x[1, 0] = -80, 80
    near(triton_pointwise.silu_mul(x.to(device)), reference.silu_mul(x))


def moved(args: tuple[Any, ...], device: torch.device) -> list[Any]:
    return [a.to(device) if isinstance(a, Tensor) else a for a in args]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 8), (6, 2, 16), (8, 2, 80), (3, 3, 128)])
def test_rope_write(device: torch.device, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    ours, law = moved(rope_case(heads, kv_heads, dim, 5, dtype), device), rope_case(heads, kv_heads, dim, 5, dtype)
    assert torch.equal(triton_pointwise.rope_write(*ours).cpu(), reference.rope_write(*law))
    assert torch.equal(ours[5].cpu(), law[5])  # also the slots that nobody wrote


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 16), (8, 2, 80), (3, 3, 128)])
def test_norm_rope_write(device: torch.device, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(dim)
    q_norm, k_norm = torch.randn(2, dim, generator=gen).to(dtype)
    law, ours = list(rope_case(heads, kv_heads, dim, 5, dtype)), moved(rope_case(heads, kv_heads, dim, 5, dtype), device)
    want = reference.norm_rope_write(law[0], q_norm, k_norm, 1e-6, *law[1:])
    got = triton_pointwise.norm_rope_write(ours[0], q_norm.to(device), k_norm.to(device), 1e-6, *ours[1:])
    near_turned(got, want)
    near_turned(ours[5], law[5])
