"""Pipeline: in virtual time the rule is as good as the better of stepping at once and waiting for all, and better where turns are better."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from specedge.config import SamplingParams
from specedge.engine.pipeline import HARD, Pipeline, Rhythm, Rule, Turn
from specedge.engine.request import Account, Sequence
from specedge.tree import EMPTY
from tests.engine.test_admission import Known
from tests.engine.test_cost import CPU, Law

FREE: Law = (0.030, 0.00001, 300, 0.0)  # rows cost nothing: a GPU
COSTLY: Law = (0.004, 0.0012, 1, 0.0)  # nearly linear: a CPU
BOTH: Law = (0.020, 0.0006, 40, 0.0)
ROWS, TOKENS = 24, 3.5
Decide = Callable[[list[Turn], float], tuple[float, int]]


def at_once(turns: list[Turn], now: float) -> tuple[float, int]:
    return now, len(turns)


def full_batch(turns: list[Turn], now: float) -> tuple[float, int]:
    return (now if all(t.ready for t in turns) else math.inf), len(turns)


def simulate(decide: Decide, of: Law, gaps: list[float], spread: float, seconds: float = 60.0, seed: int = 0) -> tuple[float, float]:
    """Tokens per second of a server that steps when `decide` says, and the longest time that a tree had to wait. Session i comes back
    gaps[i] seconds after its verdict, give or take a share `spread`; all begin at once."""
    cost, rng, n = Known(of), np.random.default_rng(seed), len(gaps)
    rhythms = [Rhythm(rows=ROWS, tokens=TOKENS) for _ in gaps]
    arrives, answered = [0.001 * i for i in range(n)], [0.0] * n
    now, tokens, longest, known = 0.0, 0.0, 0.0, [False] * n
    while now < seconds:
        for i in range(n):
            if arrives[i] <= now and not known[i]:
                known[i] = True
                if answered[i]:
                    rhythms[i].returned(arrives[i] - answered[i])
        turns = [
            Turn(known[i], arrives[i] if known[i] else answered[i] + max(0.0, rhythms[i].gap), rhythms[i])
            for i in range(n) if known[i] or answered[i]
        ]  # fmt: skip
        ready = sorted((i for i in range(n) if known[i]), key=lambda i: arrives[i])
        when, most = decide(turns, now) if ready else (math.inf, 0)
        later = min([a for a, k in zip(arrives, known, strict=True) if not k], default=math.inf)
        if when > now:
            assert later < math.inf or when < math.inf, "it waits for nobody"
            now = min(when, later)
            continue
        group = ready[:most]
        longest = max(longest, *(now - arrives[i] for i in group))
        now += cost.predict(ROWS * len(group), 0)
        tokens += TOKENS * len(group)
        for i in group:
            known[i], answered[i] = False, now
            arrives[i] = now + gaps[i] * max(0.1, 1 + spread * rng.standard_normal())
            rhythms[i].verified(ROWS, 3)
            rhythms[i].tokens = TOKENS
    return tokens / now, longest


def of_rule(of: Law) -> Decide:
    pipeline = Pipeline(Known(of))
    return lambda turns, now: pipeline.decide(turns, now)


CELLS = list(itertools.product((FREE, COSTLY, BOTH), (2, 4, 8), (0.005, 0.015, 0.03, 0.06, 0.15), (0.0, 0.1)))


@pytest.mark.parametrize("sessions", [2, 4, 8])
@pytest.mark.parametrize("of", [FREE, COSTLY, BOTH])
def test_the_rule_is_as_good_as_the_better_of_both(of: Law, sessions: int) -> None:
    better = 0
    for gap, spread in itertools.product((0.005, 0.015, 0.03, 0.06, 0.15), (0.0, 0.1)):
        (ours, longest), (at, _), (all_, _) = (simulate(d, of, [gap] * sessions, spread, 10.0) for d in (of_rule(of), at_once, full_batch))
        assert ours >= 0.97 * max(at, all_), (gap, spread, ours, at, all_)
        assert longest <= min(HARD, Known(of).predict(ROWS * sessions, 0)) + 2 * sessions * Known(of).predict(ROWS, 0), "all steps before its own"
        better += ours > 1.05 * max(at, all_)
    assert better >= (4 if of == BOTH and sessions > 2 else 0), "groups that take turns beat both"


def test_unequal_sessions() -> None:
    """Nobody waits for one that is far away, and those that are near do not go to waste."""
    for of in (FREE, COSTLY, BOTH):
        gaps = [0.01, 0.01, 0.01, 0.8]
        ours, at, all_ = (simulate(d, of, gaps, 0.05, 10.0)[0] for d in (of_rule(of), at_once, full_batch))
        assert ours >= 0.97 * max(at, all_)


def test_two_edges_take_turns_where_rows_cost_and_go_together_where_they_are_free() -> None:
    costly, free = Pipeline(Known(COSTLY)), Pipeline(Known(FREE))
    gap = Known(COSTLY).predict(ROWS, 0)
    simulate(lambda turns, now: costly.decide(turns, now), COSTLY, [gap] * 2, 0.05, 5.0)
    assert costly.rule.need == 1
    simulate(lambda turns, now: free.decide(turns, now), FREE, [0.01] * 2, 0.05, 5.0)
    assert free.rule == Rule(2, 2)
    assert simulate(of_rule(COSTLY), COSTLY, [gap] * 2, 0.0, 5.0)[0] > 0.97 * TOKENS / gap, "the server is never idle"


def test_a_batch_that_is_ready_is_split_where_turns_are_better() -> None:
    """All are ready at the same moment, which at once means: in lock step for ever."""
    of, gap = COSTLY, 0.06
    ours, at = (simulate(d, of, [gap] * 4, 0.0, 20.0)[0] for d in (of_rule(of), at_once))
    assert ours > 1.15 * at


def test_no_tree_waits_for_ever() -> None:
    """Whoever does not come back is given up after a step's time; HARD bounds even that."""
    slow = Known((5.0, 1e-6, 1, 0.0))
    p, steady = Pipeline(slow), Rhythm(gap=0.2, spread=0.01, rows=24, tokens=3.0)
    p.rule, p._sessions, p._left = Rule(2, 2), 2, 100
    turns = [Turn(True, 0.0, steady), Turn(False, 0.1, steady)]
    when, _ = p.decide(turns, 0.0)
    assert 0.1 < when <= HARD
    assert p.decide(turns, when)[0] == when, "it was given its chance"
    p.rule, p._left = Rule(2, 2), 100
    late = [Turn(True, 0.0, steady), Turn(False, 5.0, steady)]
    assert p.decide(late, 1.0)[0] == 1.0
    always = [Turn(True, 0.0, steady), Turn(False, 1.0, steady)]
    start, now = 0.9, 0.9
    while (when := p.decide(always, now)[0]) > now:
        p.rule, p._left, now = Rule(2, 2), 100, min(when, now + 0.05)
        always = [always[0], Turn(False, now + 0.1, steady)]
    assert now - start <= HARD + 0.05, "hope does not prolong it"


def test_a_first_tree_is_played_with_the_usual_gap() -> None:
    """Of a session whose own nobody knows yet, ready or not: as if it returned at once, groups would be made for nobody."""
    s = Sequence([1, 2], 2, SamplingParams(seed=1), frozenset(), Account())
    s.answered, s.tree = 1.0, EMPTY
    ready = s.turn(1.0, 0.1)
    s.tree = None
    expected = s.turn(1.0, 0.1)
    assert ready is not None and expected is not None and ready.ready and not expected.ready
    assert ready.rhythm.gap == expected.rhythm.gap == 0.1


def test_alone_nobody_waits() -> None:
    p = Pipeline(Known(CPU))
    assert p.decide([Turn(True, 0.0, Rhythm())], 3.0) == (3.0, p.rule.most)
    assert p.rule.need == 1


def test_the_rhythm_follows_and_forgives() -> None:
    r = Rhythm()
    for _ in range(30):
        r.returned(0.1)
    assert r.gap == pytest.approx(0.1) and r.spread < 0.001
    r.returned(100.0)
    assert r.gap < 0.2, "an edge that was gone for minutes"
    for _ in range(40):
        r.returned(0.02)
    assert r.gap == pytest.approx(0.02, rel=0.05)
    for known in (Rhythm(), r):
        known.returned(0.0)
        known.returned(0.1)
        assert known.gap > 0.0, "a tree that was there at once says nothing of the next"
    r.verified(31, 4)
    assert (r.rows, r.tokens) == (7.0, pytest.approx(1.6))


def table() -> None:
    for of, sessions, gap, spread in CELLS:
        ours, at, all_ = (simulate(d, of, [gap] * sessions, spread, 20.0) for d in (of_rule(of), at_once, full_batch))
        name = {FREE: "free", COSTLY: "costly", BOTH: "both"}[of]
        best = max(at[0], all_[0])
        cell = f"{name} | {sessions} | {gap * 1e3:.0f} | {spread}"
        print(f"| {cell} | {at[0]:.1f} | {all_[0]:.1f} | {ours[0]:.1f} | {ours[0] / best:.3f} | {ours[1] * 1e3:.0f} |")


if __name__ == "__main__":
    table()
