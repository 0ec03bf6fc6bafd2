"""What Engine.step makes of admission and of the pipeline: trees are cut, budgets follow, turns are told; the ids stay."""

import time
from pathlib import Path

import pytest

from specedge.config import SamplingParams
from specedge.engine.engine import Engine
from specedge.engine.request import Account
from specedge.tree import EMPTY, make_tree
from tests.engine.test_admission import Known
from tests.helpers import check_empty, engine, random_model

PROMPT, PARAMS = [7, 3, 9, 50], SamplingParams(max_tokens=200)
STEEP, FAIR, FLAT = (0.01, 0.01, 1, 0.0), (0.01, 0.001, 1, 0.0), (0.01, 1e-9, 1, 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), seed=5)


def with_cost(model: Path, of: tuple[float, float, int, float]) -> Engine:
    e = engine(model, admission=True)
    e.cost = e.admission.cost = Known(of)
    return e


def rounds(e: Engine, truth: list[int], nodes: int, honest: bool) -> list[int]:
    """The rows verified in every round of a text whose drafts are chains, all right or all wrong."""
    s, rows = e.open(PROMPT, PARAMS), list[int]()
    while not s.finish:
        done = len(s.tokens) - len(PROMPT)
        chain = [t if honest else (t + 1) % e.vocab for t in truth[done : done + nodes]]
        e.offer(s, make_tree(chain, list(range(len(chain)))))
        e.admission.gap = 0.0  # its edge is as near as can be
        (v,) = e.step()
        rows.append(v.verified)
    assert s.tokens[len(PROMPT) :] == truth
    check_empty(e)
    return rows


def test_hopeless_nodes_are_not_verified_where_rows_cost(model: Path) -> None:
    e = with_cost(model, STEEP)
    truth = e.generate([PROMPT], PARAMS)[0].token_ids
    rows = rounds(e, truth, 15, honest=False)
    assert sum(rows[-100:]) < 130, "after a while it is all but plain decoding"
    assert max(rows[40:]) > 1, "and sometimes it is tried again"


def test_every_tree_of_a_step_is_judged(model: Path) -> None:
    """Two accounts and a step for three: nobody gets in by an order that the cut trees would have, with a tree that was not cut."""
    e = with_cost(model, STEEP)
    accounts = [Account(b"a"), Account(b"b")]
    trees = [make_tree([1] * n, list(range(n))) for n in (100, 100, 2, 2)]
    sequences = [e.open([i + 1, 2], PARAMS, account=accounts[i // 2]) for i in range(4)]
    for s in sequences:
        e.offer(s, EMPTY)
    e.step()
    for s, tree in zip(sequences, trees, strict=True):
        e.offer(s, tree)
        e.admission.gap, s.acceptance.explored, s.acceptance.exploring = 0.0, s.acceptance.rounds, False  # nothing is tried out in this round
    verdicts = e.step(3)
    assert [v.sequence for v in verdicts] == [sequences[0], *sequences[2:]]
    assert sum(v.verified for v in verdicts) < 9, "a row costs as much as a step"


def test_good_nodes_are_and_free_ones_too(model: Path) -> None:
    e = with_cost(model, FAIR)
    truth = e.generate([PROMPT], PARAMS)[0].token_ids
    assert sum(rounds(e, truth, 7, honest=True)[4:20]) > 16 * 6
    e = with_cost(model, FLAT)
    rows = rounds(e, truth, 15, honest=False)
    assert all(n == 16 for n in rows[1:100])


def test_the_budget_follows(model: Path) -> None:
    for of, low, high in ((STEEP, 0, 3), (FLAT, 200, 255)):
        e = with_cost(model, of)
        s = e.open(PROMPT, PARAMS)
        for _ in range(40):
            e.offer(s, make_tree([1, 2, 3], [0, 0, 0]))
            e.admission.gap = 0.0
            e.step()
        assert low <= s.acceptance.budget <= high


def test_turns_say_who_is_ready_and_who_is_expected(model: Path) -> None:
    e = engine(model)
    a, b = e.open(PROMPT, PARAMS), e.open([5, 6, 7, 8, 9], PARAMS)
    assert e.turns(time.monotonic()) is None, "there are prompts to be computed"
    for s in (a, b):
        e.offer(s, EMPTY)
    e.step()
    assert e.turns(time.monotonic()) is None, "nobody is ready, and nobody known to come back"
    e.offer(a, EMPTY, at=a.answered + 0.01)
    found = e.turns(a.answered + 0.02)
    assert found and [(t.ready, t.at) for t in found] == [(True, a.offered), (False, b.answered + a.rhythm.gap)], "the other is taken to be like it"
    assert found[0].context == len(PROMPT)
    e.step()
    e.offer(b, EMPTY, at=b.answered + 0.03)
    found = e.turns(a.answered)
    assert found and {t.ready: t.at for t in found} == {True: b.offered, False: a.answered + a.rhythm.gap}
    assert found[0].rhythm.gap == pytest.approx(0.03) or found[1].rhythm.gap == pytest.approx(0.03)
    assert [t.ready for t in e.turns(a.answered + 60) or []] == [True], "one that has been away for a minute is not waited for"
    e.run_until(a, 50)
    assert [t.ready for t in e.turns(a.answered + 60) or []] == [True, True]


def test_a_prompt_of_batch_does_not_end_turns(model: Path) -> None:
    e = engine(model)
    s = e.open(PROMPT, PARAMS)
    e.offer(s, EMPTY)
    e.step()
    lower = e.open([1] * 20, PARAMS, priority="batch")
    e.offer(s, EMPTY, at=s.answered + 0.01)
    assert e.turns(s.answered) is None, "somebody is to be admitted"
    e.step()
    assert lower.pending == 20, "no row is free beside another"
    assert e.turns(s.answered) is None, "but now nobody else is ready"
    e.offer(s, EMPTY)
    assert [t.ready for t in e.turns(s.answered) or []] == [True]


def test_a_prompt_of_batch_takes_no_nodes_from_a_tree(model: Path) -> None:
    e = engine(model, admission=True, max_rows=48)
    e.cost = e.admission.cost = Known(FLAT)
    s = e.open(PROMPT, PARAMS)
    e.offer(s, EMPTY)
    e.step()
    lower = e.open([1] * 60, PARAMS, priority="batch")
    e.offer(s, make_tree(list(range(40)), [0] * 40))
    (v,) = e.step()
    assert v.verified == 41 and lower.pending == 60


def test_a_step_for_few(model: Path) -> None:
    e = engine(model)
    sequences = [e.open([i + 1, 2, 3], PARAMS) for i in range(5)]
    for s in sequences:
        e.offer(s, make_tree([1, 2], [0, 0]))
    assert [v.sequence for v in e.step(2)] == sequences[:2]
    e.offer(sequences[0], EMPTY)
    assert [v.sequence for v in e.step(2)] == sequences[2:4]
    assert [v.sequence for v in e.step(2)] == [sequences[4], sequences[0]], "whoever has waited longest"
