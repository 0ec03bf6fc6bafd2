"""Priorities: batch sequences get the rows and pages that interactive ones leave, no more, and the same ids."""

from pathlib import Path

import pytest

from specedge.config import SamplingParams
from specedge.engine.engine import Engine
from specedge.engine.request import Sequence
from specedge.tree import EMPTY
from tests.helpers import check_empty, engine, random_model

PARAMS = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), seed=5)


def run(e: Engine, *sequences: Sequence) -> None:
    for s in sequences:
        e.run_until(s, s.limit)
    while any(not s.finish for s in sequences):
        e.step()


def test_batch_has_the_same_ids_and_ends_later(model: Path) -> None:
    prompts = [[7, 3, 9], [50, 100, 2, 5], [8] * 20]
    with engine(model) as e:
        truth = [c.token_ids for c in e.generate(prompts, PARAMS)]
        lower = e.open(prompts[0], PARAMS, priority="batch")
        upper = [e.open(p, PARAMS) for p in prompts[1:]]
        e.run_until(lower, lower.limit)
        run(e, *upper)
        assert len(lower.tokens) <= len(upper[0].tokens)
        run(e, lower)
        assert [s.tokens[s.prompt_len :] for s in (lower, *upper)] == truth
        check_empty(e)


def test_batch_gives_its_pages_to_others(model: Path) -> None:
    """It came first and holds nearly all pages; an interactive one is admitted beside it, takes them, and ends first."""
    long, other = list(range(90)), list(range(30, 100))
    with engine(model, page_size=16, kv_tokens=144) as e:
        truth = [e.generate([p], PARAMS)[0].token_ids for p in (long, other)]
        lower = e.open(long, PARAMS, priority="batch")
        e.run_until(lower, lower.limit)
        while len(lower.tokens) < len(long) + 5:
            e.step()
        upper = e.open(other, PARAMS)
        run(e, upper)
        assert not lower.finish and lower.computed == 0, "it was preempted"
        run(e, lower)
        assert [lower.tokens[len(long) :], upper.tokens[len(other) :]] == truth
        check_empty(e)


def test_batch_takes_no_page_from_others(model: Path) -> None:
    long, other = list(range(90)), list(range(30, 100))
    with engine(model, page_size=16, kv_tokens=144) as e:
        upper = e.open(long, PARAMS)
        e.run_until(upper, len(long) + 5)
        while len(upper.tokens) < len(long) + 5:
            e.step()
        lower = e.open(other, PARAMS, priority="batch")
        e.run_until(lower, lower.limit)
        for _ in range(3):
            e.step()
        assert upper.computed == len(upper.tokens) - 1, "though it is idle, and came first, and pages are short"
        e.cancel(upper)
        run(e, lower)


def test_nobody_waits_for_a_page_of_batch(model: Path) -> None:
    """A prompt of batch stands still beside one who takes all cheap rows; whoever begins like it computes those pages without waiting."""
    stem = list(range(40))
    with engine(model, page_size=16) as e:
        first = e.open([5, 6, 7], PARAMS)
        e.run_until(first, first.limit)
        e.step()
        lower = e.open(stem, PARAMS, priority="batch")
        e.step()
        assert lower.table is not None and lower.computed == 0, "it was admitted, and has no rows"
        upper = e.open([*stem, 1], PARAMS)
        e.run_until(upper, upper.limit)
        e.step()
        assert upper.computed > 40
        run(e, first, upper, lower)
        check_empty(e)


def test_batch_between_rounds_is_no_queue(model: Path) -> None:
    """A server that fills the pauses of an edge with batch is not taken to be full, else it would refuse nodes that cost nobody time."""
    with engine(model, admission=True) as e:
        lower, upper = e.open([8, 9], SamplingParams(max_tokens=200), priority="batch"), e.open([7, 3, 9], PARAMS)
        e.run_until(lower, lower.limit)
        e.offer(upper, EMPTY)
        while not upper.answered:
            e.step()
        e.admission._queued, before = 0.0, len(lower.tokens)
        for _ in range(10):
            for _ in range(4):
                e.step()
            e.offer(upper, EMPTY)
            assert upper in [v.sequence for v in e.step()]
        assert len(lower.tokens) >= before + 20
        assert e.admission._queued < 0.3, "0.9 if steps of batch counted"


def test_another_priority_is_refused(model: Path) -> None:
    with engine(model) as e, pytest.raises(ValueError, match="priority is 'low', but must be interactive or batch"):
        e.open([1], PARAMS, priority="low")
