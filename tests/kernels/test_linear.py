"""Linear layers: near the exact product, equal to the twin, and rows that do not depend on each other; of integers equal to the reference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specedge import kernels
from specedge.kernels import linear, reference
from specedge.kernels.linear import Linear

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 300), (33, 1), (16, 128), (63, 31), (65, 129), (200, 2000), (97, 5001)]  # N, K; the last two go by blocks
FLOATS, INTS = [(torch.float32, None), (torch.bfloat16, None)], [(torch.bfloat16, 8), (torch.float32, 8), (torch.bfloat16, 4)]
KINDS: list[tuple[torch.dtype, int | None]] = [*FLOATS, *INTS]


def case(rows: int, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, weight, bias."""
    gen = torch.Generator().manual_seed(seed + rows + 7 * n + 31 * k)
    return tuple(torch.randn(shape, generator=gen).to(dtype) for shape in ((rows, k), (n, k), (n,)))


def near(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *added: torch.Tensor) -> None:
    """`got` is the exact product: within one rounding to its dtype and the roundings of a sum in float32."""
    want, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    for a in added:
        want, size = want + a.double(), size + a.double().abs()
    half = 2**-8 if got.dtype == torch.bfloat16 else 2**-24
    assert ((got.double() - want).abs() <= want.abs() * half * 1.01 + size * (x.shape[1] + 3) * 2**-24).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_is_the_product(n: int, k: int, dtype: torch.dtype) -> None:
    for rows in (1, 2, 13, 40):
        x, w, b = case(rows, n, k, dtype)
        near(Linear(w)(x), x, w)
        near(Linear(w, b)(x), x, w, b)
        near(reference.linear(x, w, b), x, w, b)
    assert Linear(w, b)(x[:0]).shape == (0, n)


@pytest.mark.parametrize(("dtype", "bits"), KINDS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rows_alone_and_twin(cpp: Any, n: int, k: int, dtype: torch.dtype, bits: int | None) -> None:
    x, w, b = case(75, n, k, dtype)
    layer = Linear(w, b, bits)
    torch.set_num_threads(2)
    whole = layer(x)
    torch.set_num_threads(1)
    if bits is None:
        assert torch.equal(whole, cpp.linear(x, layer.weight, n, b, scalar=True))
    else:
        assert torch.equal(whole, cpp.linear_int(x, layer.weight, layer.scale, n, b, scalar=True))
        assert torch.equal(whole, reference.linear_int(x, *reference.quantise(w, bits), b))
    for size in (1, 2, 3, 5, 6, 7, 11, 12, 13, 24, 25, 37):
        assert torch.equal(torch.cat([layer(x[i : i + size]) for i in range(0, 75, size)]), whole)


@pytest.mark.parametrize(("dtype", "bits"), KINDS)
def test_row_counts_around_tiles(cpp: Any, dtype: torch.dtype, bits: int | None) -> None:
    x, w, b = case(130, 33, 5001, dtype)
    layer = Linear(w, b, bits)
    whole = layer(x)
    for rows in (*range(1, 130, 5), *range(16, 129, 16)):
        assert torch.equal(layer(x[:rows]), whole[:rows]), rows
        assert torch.equal(layer(x[rows:]), whole[rows:]), rows


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), st.integers(1, 150), st.integers(1, 400), st.sampled_from(KINDS), st.booleans(), st.data())
def test_any_size(rows: int, n: int, k: int, kind: tuple[torch.dtype, int | None], bias: bool, data: st.DataObject) -> None:
    dtype, bits = kind
    x, w, b = case(rows, n, k, dtype)
    layer = Linear(w, b if bias else None, bits)
    y = layer(x)
    if bits is not None:
        want = reference.linear_int(x, *reference.quantise(w, bits), b if bias else None)
        assert torch.equal(y, want)
    elif kernels.backend() != "torch":
        near(y, x, w, *[b] * bias)
    some = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
    if bits is not None or kernels.backend() != "torch":  # oneDNN: as far as it was seen, see Linear
        assert torch.equal(layer(x[some]), y[some])


@pytest.mark.parametrize("bits", [8, 4])
def test_quantise(bits: int) -> None:
    w = torch.randn(50, 203) * torch.logspace(-20, 4, 50)[:, None]
    w[7] = 0
    q, scale = reference.quantise(w, bits)
    wide = scale[:, None] if bits == 8 else scale.float().repeat_interleave(32, 1)[:, :203]
    step = wide.abs()
    assert ((q * wide - w).abs() <= step * (0.5001 if bits == 8 else 1.05)).all()  # 4 bits: +8 is cut to 7
    assert q.min() >= -(2 ** (bits - 1)) and (q[7] == 0).all()
    assert q.abs().amax(1)[0] == (127 if bits == 8 else 8)
    assert torch.equal(reference.quantise(w[3:4], bits)[0], q[3:4])


def test_quantise_rows() -> None:
    x = torch.randn(9, 300) * torch.logspace(-10, 10, 9)[:, None]
    x[2, :128], x[3, 140], x[4, 299] = 0, torch.inf, torch.nan
    q, scale = reference.quantise_rows(x)
    assert q.shape == (9, 300) and scale.shape == (9, 3)
    good = torch.ones(9, 3, dtype=torch.bool)
    good[3, 1] = good[4, 2] = False
    assert torch.equal(scale.isnan(), ~good) and (q[2, :128] == 0).all()
    error = (q * scale.repeat_interleave(128, 1)[:, :300] - x).abs()
    assert (error[:3] <= 0.5001 * scale[:3].repeat_interleave(128, 1)[:, :300]).all()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_bad_row_stays_alone(cpp: Any, bits: int | None) -> None:
    x, w, _ = case(30, 70, 200, torch.float32)
    layer = Linear(w, None, bits)
    want = layer(x)
    x[4, 150], x[9, 3], x[11], x[12, 0] = torch.nan, -torch.inf, 0, 1e-44
    got = layer(x)
    assert got[4].isnan().all() and not got[9].isfinite().any()
    assert (got[11] == 0).all()
    others = [i for i in range(30) if i not in (4, 9, 11, 12)]
    assert torch.equal(got[others], want[others])
    if bits is not None:
        torch.testing.assert_close(got, reference.linear_int(x, *reference.quantise(w, bits), None), rtol=0, atol=0, equal_nan=True)


def test_small_numbers(cpp: Any) -> None:
    """bfloat16: subnormal inputs count as zero where the processor multiplies pairs, and as they are elsewhere; both are within the least normal."""
    x, w, _ = case(8, 40, 64, torch.bfloat16)
    near(Linear(w)(x * 2.0**-60) * 2.0**60, x, w)
    assert (Linear(w)(x * 1e-39).abs() <= 64 * 16 * 2.0**-126).all()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_without_the_library(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN, or the reference for integers: the same bits for the latter."""
    x, w, b = case(9, 70, 130, torch.float32)
    here = Linear(w, b, bits)(x)
    monkeypatch.setattr(linear, "backend", lambda: "torch")
    there = Linear(w, b, bits)
    assert there.kind in (("oneDNN", "torch") if bits is None else ("integers",))
    torch.testing.assert_close(there(x), here, rtol=0 if bits else 1e-5, atol=0 if bits else 1e-4)
    assert torch.equal(there(x[3:4]), there(x)[3:4])


def test_bad_arguments_are_refused(cpp: Any) -> None:
    x, w, b = case(3, 40, 50, torch.float32)
    packed, ints = cpp.linear_pack(w), cpp.linear_pack_int(w.to(torch.int8), None)
    for args, sentence in (
        ((x[:, :48].contiguous(), packed, 40, None), "packed is"), ((x, packed, 80, None), "packed is"),
        ((x, packed, 40, b[:39]), "bias must have 40"),
        ((x.bfloat16(), packed, 40, None), "packed must be"), ((x.double(), packed, 40, None), "must be float32 or bfloat16"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=sentence):
            cpp.linear(*args)
    for args, sentence in (
        ((x, ints, None, 40, None), "packed is"), ((x, ints, torch.ones(39), 40, None), "scale must have 40"),
        ((x, ints, torch.ones(40), 70, None), "scale must have 70"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=sentence):
            cpp.linear_int(*args)
    with pytest.raises(RuntimeError, match="scale is"):
        cpp.linear_pack_int(w.to(torch.int8), torch.ones(40, 3).bfloat16())


@given(st.integers(1, 70), st.integers(1, 80), st.integers(1, 150), st.sampled_from([None, 8, 4]), st.booleans(), st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_a_gated_layer_is_silu_mul_of_a_plain_one(rows: int, ffn: int, k: int, bits: int | None, bias: bool, dtype: torch.dtype) -> None:
    x, w, b = (torch.randn(*shape).to(dtype) for shape in ((rows, k), (2 * ffn, k), (2 * ffn,)))
    got = Linear(w, b if bias else None, bits, gated=True)(x)
    assert torch.equal(got, kernels.silu_mul(Linear(w, b if bias else None, bits)(x)))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33, 70])
def test_logits_are_the_outputs_in_float32(rows: int, dtype: torch.dtype, bits: int | None) -> None:
    x, w = torch.randn(rows, 96).to(dtype), torch.randn(105, 96).to(dtype)
    layer, into = Linear(w, None, bits), torch.full((rows, 105), torch.nan)
    assert layer(x, into) is into or layer.kind.startswith("C++")
    assert torch.equal(into, layer(x).float())
