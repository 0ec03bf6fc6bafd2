"""Calibration: laws that hold whatever it has seen, and what it learns from drafts that are wrong about themselves."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specedge.engine.calibration import Calibration

RANKS = 4
Seen = list[tuple[int, float, bool]]
seen = st.lists(st.tuples(st.integers(0, RANKS - 1), st.floats(-12, 0), st.booleans()), max_size=60)


def after(observations: Seen) -> Calibration:
    c = Calibration(RANKS)
    for rank, log_p, accepted in observations:
        c.observe(rank, log_p, accepted)
    return c


@given(seen, st.integers(0, RANKS - 1), st.lists(st.floats(-30, 0), min_size=2, max_size=20))
def test_acceptance_is_a_probability_that_never_falls_with_p(observations: Seen, rank: int, log_p: list[float]) -> None:
    c = after(observations)
    found = [c.acceptance(rank, x) for x in sorted(log_p)]
    assert all(0 < a < 1 for a in found)
    assert all(a <= b for a, b in zip(found, found[1:], strict=False))
    assert all(0 <= u <= 1 for u in c.usual)


@given(seen, st.lists(st.lists(st.floats(-30, 0, width=32), min_size=RANKS, max_size=RANKS), min_size=1, max_size=5))
def test_many_at_once_are_the_same(observations: Seen, rows: list[list[float]]) -> None:
    """And never above 0, so that scores fall along a path."""
    c = after(observations)
    found = c.log_acceptances(np.array(rows, np.float32))
    assert (found <= 0).all()
    for i, row in enumerate(rows):
        for rank, log_p in enumerate(row):
            assert math.exp(found[i, rank]) == pytest.approx(c.acceptance(rank, log_p), rel=1e-6, abs=1e-12)


def test_nothing_seen_means_p() -> None:
    c = Calibration(RANKS)
    for p in (0.001, 0.1, 0.5, 0.9, 0.999):
        assert c.acceptance(0, math.log(p)) == pytest.approx(p) == c.acceptance(3, math.log(p))


@pytest.mark.parametrize("truth", [lambda p: p**2, lambda p: p**0.4, lambda p: 0.02, lambda p: 0.5 * p], ids=["p^2", "p^0.4", "noise", "p/2"])
def test_it_learns_what_a_draft_does_not_know(truth: "object") -> None:
    """Its log loss over the second half of 600 children is near that of the truth and well below that of the draft's own p."""
    rng = np.random.default_rng(1)
    c, loss = Calibration(RANKS), np.zeros(3)
    for i in range(600):
        p = float(rng.uniform(0.05, 0.98))
        right = truth(p)  # type: ignore[operator]
        accepted = bool(rng.random() < right)
        if i >= 300:
            loss += [-math.log(x if accepted else 1 - x) for x in (right, c.acceptance(0, math.log(p)), p)]
        c.observe(0, math.log(p), accepted)
    best, ours, raw = loss / 300
    assert ours < best + 0.06 and ours < raw
    assert c.acceptance(1, math.log(0.5)) == pytest.approx(0.5), "other ranks have seen nothing"


def test_it_forgets() -> None:
    c = after([(0, math.log(0.6), False)] * 100)
    assert c.acceptance(0, math.log(0.6)) < 0.15
    for _ in range(100):
        c.observe(0, math.log(0.6), True)
    assert c.acceptance(0, math.log(0.6)) > 0.85
