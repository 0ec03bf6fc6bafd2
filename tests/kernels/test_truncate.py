"""min_p, top_k, top_p: the C++ filters against the reference, the reference against a slow reading of the rules in Python integers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specedge import kernels
from specedge.kernels import reference


def slow(z: list[float], min_p: float, top_k: int, top_p: float) -> set[int]:
    """The surviving ids, by sorting and adding with Python's integers."""
    ranked = sorted(range(len(z)), key=lambda v: (-z[v], v))
    top = z[ranked[0]]
    if min_p > 0:
        bound = float(torch.tensor(min_p, dtype=torch.float32).log())
        ranked = [v for v in ranked if float(np.float32(z[v]) - np.float32(top)) >= bound] or ranked[:1]
    if top_k > 0:
        ranked = ranked[:top_k]
    if top_p < 1:
        weights = [int(math.exp(z[v] - top) * 2**40 + 0.5) for v in ranked]
        need, sum_, kept = math.ceil(float(sum(weights)) * top_p), 0, []
        for v, w in zip(ranked, weights, strict=True):
            if sum_ >= need and kept:
                break
            kept.append(v)
            sum_ += w
        ranked = kept
    return set(ranked)


def arguments(rows: int, min_p: float, top_k: int, top_p: float, t: float = 1.0) -> tuple[torch.Tensor, ...]:
    return (
        torch.full((rows,), 1.0 / t), torch.full((rows,), min_p).log(), torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p, dtype=torch.float64),
    )  # fmt: skip


FILTERS = st.tuples(st.sampled_from([0.0, 0.01, 0.3, 1.0]), st.sampled_from([0, 1, 2, 7, 50]), st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]))


@settings(max_examples=150, deadline=None)
@given(FILTERS, st.integers(1, 60), st.integers(0, 10**6), st.sampled_from([0.5, 3.0]), st.booleans())
def test_the_reference_keeps_what_the_rules_say(filters: tuple[float, int, float], vocab: int, seed: int, spread: float, ties: bool) -> None:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    if ties:
        logits = logits.round()
    got = reference.truncate(logits, *arguments(1, *filters), vocab)[0]
    want = slow(logits[0].tolist(), *filters)
    assert set(got.isfinite().nonzero().flatten().tolist()) == want
    assert torch.equal(got[got.isfinite()], logits[0][got.isfinite()])


@pytest.mark.parametrize("vocab", [1, 5, 300, 5000])
@pytest.mark.parametrize("ties", [False, True])
def test_cpp_equals_the_reference(cpp: Any, vocab: int, ties: bool) -> None:
    rng = torch.Generator().manual_seed(vocab)
    logits = torch.randn(12, vocab, generator=rng) * 4
    if ties:
        logits = logits.round()
    for min_p, top_k, top_p in ((0.0, 0, 0.9), (0.05, 0, 1.0), (0.0, 40, 0.99), (0.001, 300, 0.9999), (0.0, 1, 1.0), (1.0, 0, 0.5), (0.0, 0, 1.0)):
        for t in (0.3, 1.7):
            for limit in {vocab, (vocab + 1) // 2}:
                a = arguments(12, min_p, top_k, top_p, t)
                assert torch.equal(kernels.truncate(logits, *a, limit), reference.truncate(logits, *a, limit))


def test_rows_have_their_own_filters(cpp: Any) -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    min_p, top_k, top_p = torch.tensor([0.0, 0.5, 0, 0]), torch.tensor([0, 0, 3, 0], dtype=torch.int32), torch.tensor([1.0, 1, 1, 0.5])
    a = (torch.ones(4), min_p.log(), top_k, top_p.double())
    got = kernels.truncate(logits, *a, 100)
    assert torch.equal(got, reference.truncate(logits, *a, 100))
    assert got[0].isfinite().all() and got[2].isfinite().sum() == 3
