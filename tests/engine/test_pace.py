"""Pace: sums against the obvious ones, and durations that no clock gave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specedge.engine.pace import Pace, Rate, gain, optimum

scores = st.lists(st.floats(0, 1), max_size=40).map(lambda s: sorted(s, reverse=True))


class Line:
    """A verify time that is known."""

    def __init__(self, base: float, row: float) -> None:
        self.base, self.row = base, row

    def predict(self, rows: int, context: int) -> float:
        return self.base + self.row * rows


@given(scores, st.floats(0, 1), st.floats(0, 0.1), st.integers(0, 50))
def test_the_best_size_is_the_best_of_all(found: list[float], outside: float, row: float, others: int) -> None:
    line = Line(0.01, row)
    n = optimum(found, outside, line, others, 0)  # type: ignore[arg-type]

    def rate(k: int) -> float:
        return (1 + sum(found[:k])) / (outside + line.predict(others + k + 1, 0))

    assert 0 <= n <= len(found)
    assert rate(n) >= max(map(rate, range(len(found) + 1))) * (1 - 1e-6)


def test_free_rows_are_all_taken_and_dear_ones_never() -> None:
    many = [0.5**i for i in range(1, 20)]
    assert optimum(many, 0.02, Line(0.01, 0.0), 0, 0) == 19  # type: ignore[arg-type]
    assert optimum(many, 0.0, Line(0.0, 0.01), 0, 0) == 0  # type: ignore[arg-type]
    sizes = [optimum(many, around, Line(0.01, 0.002), 0, 0) for around in (0.0, 0.02, 0.1)]  # type: ignore[arg-type]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1], "who waits long anyway asks for more"


@given(scores, st.lists(st.floats(0, 1), max_size=8), st.integers(0, 20))
def test_a_forward_gains_what_gets_among_the_best(found: list[float], rows: list[float], nodes: int) -> None:
    found = found[:nodes]
    usual = [0.6, 0.2]
    merged = sorted([*found, *(r * a for r in rows for a in usual)], reverse=True)
    assert gain(found, rows, usual, nodes) == pytest.approx(sum(merged[:nodes]) - sum(found), abs=1e-9)
    assert gain(found, rows, usual, nodes) >= -1e-9


def test_one_long_round_is_not_believed() -> None:
    """It was sent again, or the connection was lost."""
    pace = Pace()
    assert not pace.known
    for seconds in (0.05, 0.06, 9.0, 0.05, 0.055):
        pace.verify.observe(8, 100, 0.02)
        pace.answered(seconds - 0.02)
    assert pace.known and pace.around == pytest.approx(0.035)
    assert pace.away(8, 100) == pytest.approx(0.055, rel=0.2)


def test_a_rate_follows_its_text() -> None:
    rate = Rate()
    assert rate.per_second == 0.0
    for _ in range(20):
        rate.add(4, 0.1, 0.03)
    assert rate.per_second == pytest.approx(40) and rate.outside / rate.rounds == pytest.approx(0.07)
    rate.add(4, 60.0, 0.03)
    assert rate.per_second > 25, "an outage is no habit"
    for _ in range(40):
        rate.add(1, 0.1, 0.03)
    assert rate.per_second == pytest.approx(10, rel=0.1)
