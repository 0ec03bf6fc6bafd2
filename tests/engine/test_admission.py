"""Admission: the rule is the optimum over all combinations of prefixes, and survival is learned, also of ranks that were refused at first."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from specedge.engine.admission import GUESS, SPENT, WIDTH, Acceptance, Admission, admit
from specedge.engine.cost import CostModel
from specedge.tree import MAX_NODES
from tests.engine.test_cost import CPU, GPU, Law, feed

CURVE = st.lists(st.floats(0, 1), max_size=4).map(lambda s: np.array(sorted(s, reverse=True)))


class Known(CostModel):
    """A cost model that knows the law."""

    def __init__(self, of: Law) -> None:
        super().__init__()
        self._base, self._slope, self._knee, self._read = of
        self._fitted = True
        self._weight[-1] = 1.0  # passes of every size

    def observe(self, rows: int, context: int, seconds: float) -> None:
        """It has nothing to learn."""


def rate(curves: list[NDArray[np.float64]], counts: tuple[int, ...], rows: int, answers: int, context: int, cost: CostModel, away: float) -> float:
    tokens = answers + sum(float(c[:n].sum()) for c, n in zip(curves, counts, strict=True))
    return tokens / (away + cost.predict(rows + sum(counts), context))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(CURVE, max_size=4), st.integers(0, 30), st.integers(0, 3), st.integers(0, 5000), st.floats(0, 0.2),
    st.tuples(st.floats(1e-3, 0.1), st.floats(1e-5, 0.05), st.integers(1, 40), st.floats(0, 1e-5)), st.integers(0, 16),
)  # fmt: skip
def test_the_rule_is_the_optimum_over_all_prefixes(
    curves: list[NDArray[np.float64]], beside: int, plain: int, context: int, away: float, of: Law, limit: int
) -> None:
    cost, answers = Known(of), len(curves) + plain
    rows = answers + beside
    counts = admit(curves, rows, answers, context, cost, away, limit)
    assert sum(counts) <= limit and all(n <= len(c) for n, c in zip(counts, curves, strict=True))
    every = (c for c in itertools.product(*(range(len(c) + 1) for c in curves)) if sum(c) <= limit)
    best = max(rate(curves, c, rows, answers, context, cost, away) for c in every)
    assert rate(curves, tuple(counts), rows, answers, context, cost, away) >= best * (1 - 1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(CURVE, min_size=1, max_size=4), st.floats(0, 0.2))
def test_a_node_is_admitted_while_it_is_worth_its_row(curves: list[NDArray[np.float64]], away: float) -> None:
    """The stopping rule of the design: at the optimum, survival >= G dT/drow inside, and <= outside."""
    cost, b = Known((0.03, 0.004, 1, 0.0)), len(curves)
    counts = admit(curves, b, b, 0, cost, away, 1000)
    price = rate(curves, tuple(counts), b, b, 0, cost, away) * cost.slope(b + sum(counts))
    for curve, n in zip(curves, counts, strict=True):
        assert (curve[:n] >= price * (1 - 1e-9)).all() and (curve[n:] <= price * (1 + 1e-9)).all()


def test_below_the_knee_everything_is_admitted_and_beyond_it_what_pays() -> None:
    hopeless, good = np.full(31, 1e-3), np.linspace(0.9, 0.3, 31)
    assert admit([hopeless, good], 2, 2, 0, Known(GPU), 0.0, 510) == [31, 31]
    assert admit([hopeless, good], 2, 2, 0, Known((0.02, 0.02, 1, 0.0)), 0.0, 510) == [0, 0], "a row costs as much as a step"
    few = admit([hopeless, good], 2, 2, 0, Known(CPU), 0.0, 510)
    assert few[0] == 0 and 7 <= few[1] <= 12, "the free rows go to the good one, and then those of 0.7 or more"


def test_a_busy_server_admits_less_than_one_that_waits() -> None:
    curve, cost = 0.8 ** np.arange(1, 32), Known(CPU)
    alone = [admit([curve], 1, 1, 0, cost, away, 510)[0] for away in (0.0, 0.1, 1.0, 100.0)]
    assert alone == sorted(alone) and alone[0] < alone[2] < alone[3] == 31
    many = admit([0.4 ** np.arange(1, 32)] * 64, 64, 64, 0, cost, 0.0, 448)
    assert many == [0] * 64, "64 sessions fill a CPU: with 0.4 a row brings less than a root"


def learn(a: Admission, sessions: list[Acceptance], truth: NDArray[np.float64], rounds: int, rng: np.random.Generator, offered: int = 63) -> None:
    """Rounds in which the node of rank i is accepted with probability truth[i - 1]."""
    for _ in range(rounds):
        trees = [min(offered, s.budget) for s in sessions]
        counts = a.choose(sessions, trees, len(sessions), len(sessions), 0, 500)
        lucky = [[i + 1 for i in range(n) if rng.random() < truth[i]] for n in counts]
        a.learn(sessions, counts, lucky)
        a.plan(sessions, len(sessions), 0, 500)


def test_survival_is_learned_by_rank() -> None:
    truth = np.minimum.accumulate(0.9 / np.arange(1, MAX_NODES + 1) ** 0.7)
    a, s = Admission(Known(GPU)), Acceptance()
    learn(a, [s], truth, 300, np.random.default_rng(0))
    curve = a.curves([s])[0]
    assert (np.diff(curve) <= 0).all()
    for rank in (1, 2, 4, 8, 16, 40):
        assert abs(curve[rank - 1] - truth[rank - 1]) < 0.12
    assert abs(curve[:63].sum() / truth[:63].sum() - 1) < 0.1


def test_new_sessions_know_what_all_have_learned() -> None:
    truth = np.full(MAX_NODES, 0.02)
    a = Admission(Known(CPU))
    learn(a, [Acceptance() for _ in range(4)], truth, 200, np.random.default_rng(1))
    fresh = a.curves([Acceptance()])[0]
    assert fresh[0] < 0.05 < GUESS[0]


def test_who_decodes_alone_makes_nobody_forget() -> None:
    a = Admission(Known(CPU))
    learn(a, [Acceptance() for _ in range(4)], np.full(MAX_NODES, 0.02), 200, np.random.default_rng(1))
    before, plain = a.curves([Acceptance()]), [Acceptance() for _ in range(50)]
    for _ in range(100):
        a.learn(plain, [0] * 50, [[]] * 50)
    assert (a.curves([Acceptance()]) == before).all()


def test_a_session_differs_from_the_others() -> None:
    rng, a = np.random.default_rng(2), Admission(Known(GPU))
    good, bad = Acceptance(), Acceptance()
    for _ in range(200):
        counts = a.choose([good, bad], [15, 15], 2, 2, 0, 500)
        a.learn([good, bad], counts, [[i + 1 for i in range(n) if rng.random() < p] for n, p in zip(counts, (0.6, 0.1), strict=True)])
    curves = a.curves([good, bad])
    assert curves[0, 0] > 0.4 and curves[1, 0] < 0.2


def test_what_was_refused_can_be_learned() -> None:
    """A draft that was noise, so that nothing is admitted any more, becomes a good one."""
    rng, a, s = np.random.default_rng(3), Admission(Known((0.03, 0.01, 1, 0.0))), Acceptance()
    learn(a, [s], np.zeros(MAX_NODES), 200, rng)
    assert s.budget <= 1
    learn(a, [s], 0.9 ** np.arange(1, MAX_NODES + 1), 1500, rng)
    assert 3 <= s.budget <= 7, "the optimum is flat: 57.3 tokens per second with 3 nodes, 58.6 with 5"


def test_exploring_is_rare_and_small() -> None:
    rng, a, s = np.random.default_rng(4), Admission(Known((0.03, 0.01, 1, 0.0))), Acceptance()
    learn(a, [s], np.zeros(MAX_NODES), 300, rng)
    before, tried = s.tries.sum(), 0
    for _ in range(64):
        counts = a.choose([s], [min(31, s.budget)], 1, 1, 0, 500)
        tried += counts[0]
        a.learn([s], counts, [[]])
        a.plan([s], 1, 0, 500)
    assert 1 <= tried <= 4 and s.tries.sum() < before + 4


def test_rows_that_were_never_seen_are_tried_out() -> None:
    """Up to 16 rows all passes took the same time, and beyond a row is taken to cost an eighth of it; in truth it is free."""
    cost, rng = CostModel(), np.random.default_rng(7)
    for i in range(200):
        cost.observe(1 + i % 16, 100, 0.1)
    a, s = Admission(cost), Acceptance()
    truth = np.full(MAX_NODES, 0.5)
    learn(a, [s], truth, 1, rng, 15)
    before = cost.largest
    for _ in range(100):
        (n,) = a.choose([s], [min(255, s.budget)], 1, 1, 100, 500)
        cost.observe(1 + n, 100, 0.1)
        a.learn([s], [n], [[i + 1 for i in range(n) if rng.random() < truth[i]]])
        a.plan([s], 1, 100, 500)
    assert before <= 16 and cost.largest > 100 and s.budget > 60


@pytest.mark.parametrize("answers", [1, 2, 8])
def test_exploring_costs_its_share_at_most(answers: int) -> None:
    cost, rng = Known((0.03, 0.01, 1, 0.0)), np.random.default_rng(6)
    a, sessions = Admission(cost), [Acceptance() for _ in range(answers)]
    learn(a, sessions, np.zeros(MAX_NODES), 50, rng)  # so that no node pays
    spent = 0.0
    for _ in range(500):
        counts = a.choose(sessions, [s.budget for s in sessions], answers, answers, 0, 500)
        spent += cost.predict(answers + sum(counts), 0) - cost.predict(answers, 0)
        a.learn(sessions, counts, [[]] * answers)
        a.plan(sessions, answers, 0, 500)
    assert 0 < spent < SPENT / answers * 550 * cost.predict(answers, 0)


def test_a_session_that_streams_is_asked_for_nodes_in_the_end() -> None:
    """An edge that is told 0 nodes leaves 32 tokens to the server, as many as lie between two rounds of exploring, and hears the last budget only."""
    rng, a, s = np.random.default_rng(5), Admission(Known((0.03, 0.01, 1, 0.0))), Acceptance()
    learn(a, [s], np.zeros(MAX_NODES), 200, rng)
    while s.budget:
        learn(a, [s], np.zeros(MAX_NODES), 1, rng)
    tried = 0
    for _ in range(20):
        for _ in range(32):
            a.learn([s], [0], [[]])
            a.plan([s], 1, 0, 500)
        if s.budget:
            (n,) = a.choose([s], [s.budget], 1, 1, 0, 500)
            tried += n
            a.learn([s], [n], [list(range(1, n + 1))])
            a.plan([s], 1, 0, 500)
    assert tried >= 10 and s.budget > 0, "the draft has become a good one"


def test_the_rhythm_of_the_server() -> None:
    a = Admission(CostModel())
    for _ in range(100):
        a.returned(0.1)
        a.paused(0.05, 0.02)
    assert a.away > 0.09
    for _ in range(100):
        a.paused(0.0, 0.02)
    assert a.away < 0.002, "somebody waits after every step"
    a.returned(1e6)
    assert a.away < 0.01, "an edge that was gone for days says nothing of the rhythm"


def test_classes_cover_all_ranks() -> None:
    assert WIDTH.sum() == MAX_NODES and (np.diff(GUESS) < 0).all()


def test_a_learned_cost_serves() -> None:
    cost = CostModel()
    feed(cost, CPU, 300, np.random.default_rng(9))
    a, sessions = Admission(cost), [Acceptance() for _ in range(3)]
    truth, rng = 0.85 ** np.arange(1, MAX_NODES + 1), np.random.default_rng(10)
    learn(a, sessions, truth, 200, rng)
    while any(s.exploring for s in sessions):
        learn(a, sessions, truth, 1, rng)
    assert 5 <= sum(s.budget for s in sessions) <= 12, "five rows are free beside three roots, and a few more pay"
