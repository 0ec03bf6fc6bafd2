"""Any order of operations on an engine, on its pages and on a drafter: books are right after every one of them, nothing leaks, every text ends
after a bounded number of steps and is the text of an undisturbed engine. `make test-full` runs 10^5 operations on each."""

import itertools
import time
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import specedge.engine.engine as engine_module
from specedge.config import PRIORITIES, DraftConfig, SamplingParams
from specedge.engine.drafter import Drafter, Session
from specedge.engine.engine import Engine
from specedge.engine.request import Account, Sequence
from specedge.engine.runner import Runner
from specedge.tree import TokenTree
from tests.engine.test_drafter import VOCAB, FakeRunner, audit, target
from tests.engine.test_pages import Pool
from tests.helpers import check_empty, engine, random_model, random_tree, runner

LONG = pytest.param(100_000, marks=[pytest.mark.full, pytest.mark.timeout(1800)])


def run(machine: type[RuleBasedStateMachine], operations: int) -> Counter[str]:
    """At least `operations`, which the machine counts itself; the same ones each time in `make test`, new ones in `make test-full`."""
    machine.seen = seen = Counter()  # type: ignore[attr-defined]
    short = operations < 10_000
    steps = 40 if short else 100
    how = settings(max_examples=operations // steps * 13 // 10, stateful_step_count=steps, deadline=None, database=None, derandomize=short)
    run_state_machine_as_test(machine, settings=settings(how, suppress_health_check=list(HealthCheck)))  # type: ignore[no-untyped-call]
    print(dict(seen))
    assert seen["operations"] >= operations
    return seen


# ----------------------------------------------------------------------------------------------------------------------
# the engine

STEMS = [[(7 * i + j * j) % 105 for j in range(70)] for i in range(3)]
SHAPES = [(1, 0), (40, 0), (16, 1), (33, 0), (40, 9), (70, 0), (20, 30), (64, 1), (70, 5)]
PROMPTS = [STEMS[i % 3][:n] + [i] * extra for i, (n, extra) in enumerate(SHAPES)]
PARAMS = [
    SamplingParams(0.0, 20),
    SamplingParams(0.9, 24, seed=9),
    SamplingParams(1.0, 1, seed=2),
    SamplingParams(0.8, 40, seed=3, top_p=0.9, stop_ids=(5, 17)),
    SamplingParams(0.0, 30, repetition_penalty=1.3, frequency_penalty=0.4),
    SamplingParams(1.2, 22, seed=2**64 - 1, min_p=0.05, min_tokens=9, stop_ids=(3,)),
]
SIZES = [
    {"page_size": 16, "kv_tokens": 192, "max_rows": 40},  # so few pages that sequences are preempted
    {"page_size": 16, "kv_tokens": 144, "max_rows": 7, "max_sequences": 3},
    {"page_size": 16, "kv_tokens": 128, "max_rows": 300},
    {"page_size": 64, "kv_tokens": 320, "max_rows": 64},
]


class Operations(RuleBasedStateMachine):
    """Sequences of all kinds in one engine, driven and dropped at random."""

    seen: Counter[str]
    path: Path
    runners: list[Runner]

    @staticmethod
    @cache
    def truth(prompt: int, params: int) -> list[int]:
        """Prompt and text as an engine writes it that does nothing else."""
        with pytest.MonkeyPatch.context() as m:  # the clock of the machine must not tell whether this was known already
            m.setattr(engine_module, "time", time)
            return PROMPTS[prompt] + engine(Operations.path).generate([PROMPTS[prompt]], PARAMS[params])[0].token_ids

    @initialize(sizes=st.sampled_from(range(len(SIZES))), crowd=st.integers(0, 6), more=st.sampled_from([0, 40]))
    def begin(self, sizes: int, crowd: int, more: int) -> None:
        """With a crowd of long texts from the start, which are idle or want to be longer still. Time passes with every look at the clock, so that
        turns end and that nothing depends on the machine."""
        clock = itertools.count(1.0, 0.1)
        engine_module.time = SimpleNamespace(monotonic=lambda: next(clock))  # type: ignore[assignment]
        self.engine = Engine(self.runners[sizes])  # its pages hold what the last one left there
        self.texts: list[tuple[Sequence, list[int]]] = []
        self.rng = np.random.default_rng(0)
        for i in range(crowd):
            self.open(3 + i, i, b"a", 0, PRIORITIES[i % 2])
            self.run_until(i, more)
        self.step(3 * crowd)

    @precondition(lambda self: len(self.texts) < 12)
    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1), params=st.integers(0, len(PARAMS) - 1), salt=st.sampled_from([b"", b"a"]), known=st.integers(0, 30),
        priority=st.sampled_from(PRIORITIES),
    )  # fmt: skip
    def open(self, prompt: int, params: int, salt: bytes, known: int, priority: str) -> None:
        """A new text of either priority, or one of which some tokens are known already."""
        self.seen["operations"] += 1
        truth, start = self.truth(prompt, params), len(PROMPTS[prompt])
        tokens = truth[: min(start + max(0, known - 15), len(truth) - 1)]
        self.texts.append((self.engine.open(tokens, PARAMS[params], start, account=Account(salt), priority=priority), truth))

    def pick(self, i: int) -> tuple[Sequence, list[int]]:
        return self.texts[i % len(self.texts)]

    @precondition(lambda self: self.texts)
    @rule(i=st.integers(0, 11), n=st.integers(0, 60), honest=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    def offer(self, i: int, n: int, honest: float) -> None:
        """A random tree in which a share of the tokens is true."""
        self.seen["operations"] += 1
        s, truth = self.pick(i)
        if not s.finish:
            self.engine.offer(s, random_tree(self.rng, n, honest, truth[len(s.tokens) :], 105))

    @precondition(lambda self: self.texts)
    @rule(i=st.integers(0, 11), more=st.integers(0, 45))
    def run_until(self, i: int, more: int) -> None:
        self.seen["operations"] += 1
        s, _ = self.pick(i)
        self.engine.run_until(s, len(s.tokens) + more if more else 0)

    @precondition(lambda self: self.texts)
    @rule(i=st.integers(0, 11))
    def cancel(self, i: int) -> None:
        self.seen["operations"] += 1
        s, _ = self.texts.pop(i % len(self.texts))
        self.engine.cancel(s)
        assert s.table is None

    @rule(n=st.integers(16, 140))
    def evict(self, n: int) -> None:
        """A text whose pages nobody will find takes what is idle, and goes."""
        self.seen["operations"] += 1
        n = min(n, self.engine.runner.context - 1)
        s = self.engine.open(self.rng.integers(0, 105, n).tolist(), PARAMS[2])
        self.engine.run_until(s, n + 1)
        self.one_step()
        self.one_step()
        self.engine.cancel(s)

    @precondition(lambda self: self.texts and not self.engine.busy)
    @rule(prompt=st.integers(0, len(PROMPTS) - 1), params=st.integers(0, len(PARAMS) - 1))
    def text(self, prompt: int, params: int) -> None:
        """Where all others want nothing, whatever pages they hold, a text comes to its end."""
        self.seen["operations"] += 1
        text = self.engine.begin(PROMPTS[prompt], PARAMS[params])
        prompts = sum(len(s.tokens) + 1 for s, _ in self.texts)  # of those that wait with nothing but a prompt: each may be computed, and go, before
        for _ in range(text.sequence.limit + prompts):
            if text.output.completion is not None:
                break
            self.engine.advance()
        assert text.sequence.tokens == self.truth(prompt, params) and text.output.completion is not None
        self.seen["parked"] += sum(s.parked for s, _ in self.texts)
        self.engine.end(text)

    @rule(n=st.integers(1, 6))
    def step(self, n: int) -> None:
        self.seen["operations"] += 1
        for _ in range(n):
            self.one_step()

    def one_step(self) -> None:
        e = self.engine
        busy, found = e.busy, set(e.pool._place)
        there = [*e.line.running, *e.line.waiting]
        running = [s for s in there if s.table is not None]
        before = [(s.computed, s.table) for s in there]
        verdicts = e.step()
        for v in verdicts:
            assert tuple(v.sequence.tokens[v.base :]) == v.tokens
            assert v.sequence.computed == len(v.sequence.tokens) - 1, "accepted rows are not computed again"
            assert v.sequence.finish == v.finish and (not v.finish or v.sequence.table is None)
            self.seen["accepted"] += len(v.tokens) - 1
            self.seen["finished"] += bool(v.finish)
            self.seen["batch"] += v.sequence.batch
            self.seen["batch beside"] += v.sequence.batch and any(not w.sequence.batch for w in verdicts)
        assert len(verdicts) == len({id(v.sequence) for v in verdicts})
        assert not busy or verdicts or before != [(s.computed, s.table) for s in there], "busy, and nothing done"
        gone = [s for s in running if s.table is None and not s.finish]
        self.seen["preempted"] += len(gone)
        self.seen["batch preempted"] += sum(s.batch for s in gone)
        self.seen["evicted"] += len(found - set(e.pool._place))
        self.seen["steps"] += 1

    @invariant()
    def all_is_right(self) -> None:
        if hasattr(self, "engine"):
            self.engine.pool.check()
            for s, truth in self.texts:
                assert s.tokens == truth[: len(s.tokens)]
                assert bool(s.finish) == (len(s.tokens) == len(truth))
                held = len(s.table.pages) if s.table else 0
                assert s.computed <= held * self.engine.pool.page_size or s.finish

    def teardown(self) -> None:
        """Whatever was done: every text ends, and every page is free or idle."""
        if not hasattr(self, "engine"):
            return
        open_ = [s for s, _ in self.texts if not s.finish]
        for s in open_:
            self.engine.run_until(s, s.limit)
        patience = sum(s.limit for s in open_)  # at least one row of the first in each step
        while any(not s.finish for s in open_):
            assert patience > 0, "a text does not get on"
            self.one_step()
            patience -= 1
        self.all_is_right()
        self.seen["hits"] += self.engine.pool.hits
        for s, _ in self.texts:
            self.engine.cancel(s)
        check_empty(self.engine)


@pytest.mark.parametrize("operations", [1500, LONG])
def test_any_order_of_operations_on_an_engine(operations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "time", None)  # to be put back in the end
    Operations.path = random_model(tmp_path, 4, num_hidden_layers=1)
    Operations.runners = [runner(tmp_path, **sizes) for sizes in SIZES]
    Operations.truth.cache_clear()
    seen = run(Operations, operations)
    assert all(seen[what] for what in ("preempted", "parked", "evicted", "hits", "accepted", "finished", "batch")), seen
    assert seen["batch preempted"] and seen["batch beside"], seen


# ----------------------------------------------------------------------------------------------------------------------
# pages


class CountedPool(Pool):
    """tests/engine/test_pages.py has the rules."""

    seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.seen["operations"] -= 1  # the invariant is also looked at before the first operation

    @invariant()
    def counted(self) -> None:
        self.seen["operations"] += 1


@pytest.mark.parametrize("operations", [2000, LONG])
def test_any_order_of_operations_on_pages(operations: int) -> None:
    run(CountedPool, operations)


# ----------------------------------------------------------------------------------------------------------------------
# the drafter


class Drafts(RuleBasedStateMachine):
    """Sessions of a drafter whose fake model tells from K/V what it was computed from, and a server that answers at its own pace."""

    seen: Counter[str]

    @initialize(
        proactive=st.booleans(), width=st.integers(1, 6), branch=st.integers(1, 5), sessions=st.integers(1, 3), pages=st.sampled_from([6, 9, 40]),
    )  # fmt: skip
    def begin(self, proactive: bool, width: int, branch: int, sessions: int, pages: int) -> None:
        config = DraftConfig(max_sessions=sessions, proactive=proactive, width=width, branch=branch)
        self.drafter = Drafter(FakeRunner(sessions * 256, context=90, pages=pages), config)  # type: ignore[arg-type]
        self.sessions: list[tuple[Session, list[int]]] = []
        self.trees: dict[int, TokenTree] = {}  # by session: what awaits its verdict
        self.rng = np.random.default_rng(0)

    @rule(length=st.integers(1, 60), stem=st.integers(0, 1), temperature=st.sampled_from([0.0, 0.8]), tokens=st.integers(1, 60), stop=st.booleans())
    def open(self, length: int, stem: int, temperature: float, tokens: int, stop: bool) -> None:
        self.seen["operations"] += 1
        prompt = [(stem + i * i) % VOCAB for i in range(length)]
        d = self.drafter
        before = d.pool.available, len(d._regions)
        s = d.open(prompt, SamplingParams(temperature, tokens, seed=stem), length + tokens, frozenset({3, 4}) if stop else frozenset(), VOCAB - 2)
        if s is None:
            assert (d.pool.available, len(d._regions)) == before, "a refusal takes nothing"
        else:
            self.sessions.append((s, prompt))
            self.seen["opened"] += 1
            self.seen["shared"] += s.computed

    @rule(n=st.integers(1, 8))
    def grow(self, n: int) -> None:
        self.seen["operations"] += 1
        flying = {id(s): s.live for s, _ in self.sessions if s.submitted is not None}
        for _ in range(n):
            self.drafter.grow()
        if not self.drafter.config.proactive:
            assert all(s.live == flying.get(id(s), s.live) or flying[id(s)] == 0 for s, _ in self.sessions), "growth in flight"

    @precondition(lambda self: self.sessions)
    @rule(i=st.integers(0, 2), n=st.integers(0, 20))
    def submit(self, i: int, n: int) -> None:
        self.seen["operations"] += 1
        s, _ = self.sessions[i % len(self.sessions)]
        if id(s) in self.trees:
            return
        tree = self.drafter.submit(s, n)
        tree.check(s.vocab)
        assert len(tree) <= n and not set(tree.tokens.tolist()) & s.stop
        assert len(s.tokens) + int(tree.depths().max()) < max(s.limit, len(s.tokens) + 1), "no node lies where the text has ended"
        self.trees[id(s)] = tree

    @precondition(lambda self: self.sessions)
    @rule(
        i=st.integers(0, 2), forwards=st.integers(0, 8), cut=st.integers(0, 20), wild=st.sampled_from([0.0, 0.0, 0.5]), more=st.integers(-9, 3),
        strange=st.integers(0, 30),
    )  # fmt: skip
    def verdict(self, i: int, forwards: int, cut: int, wild: float, more: int, strange: int) -> None:
        """The server verifies a prefix of the tree, may go on alone for `more` tokens, and seldom says one that the draft does not know."""
        self.seen["operations"] += 1
        s, text = self.sessions[i % len(self.sessions)]
        for _ in range(forwards):
            self.drafter.grow()
        if id(s) not in self.trees:
            self.submit(i, 20)
            self.grow(forwards)
        tree = self.trees.pop(id(s)).cut(cut)
        row, children, at = 0, tree.children(), list(text)
        while (token := target(at, s.params, wild, self.rng)) in children[row]:
            row = children[row][token]
            at.append(token)
        tokens = [token]
        for _ in range(max(0, more)):
            tokens.append(target(at + tokens, s.params, wild, self.rng))
        if strange == 0:
            tokens[-1] = VOCAB + 7
        before = set(map(id, s.nodes))
        hit = self.drafter.verdict(s, (at + tokens)[len(s.tokens) :])
        self.seen["hits" if hit else "misses"] += 1
        text[:] = at + tokens
        assert s.submitted is None and s.root.token == text[-1] and s.root.parent is None
        assert (id(s.root) in before) == hit and set(map(id, s.nodes)) <= before
        assert hit or not s.nodes

    @precondition(lambda self: self.sessions)
    @rule(i=st.integers(0, 2))
    def close(self, i: int) -> None:
        self.seen["operations"] += 1
        s, _ = self.sessions.pop(i % len(self.sessions))
        self.trees.pop(id(s), None)
        self.drafter.cancel(s)

    @invariant()
    def all_is_right(self) -> None:
        if hasattr(self, "drafter"):
            d = self.drafter
            assert sorted([s.base for s, _ in self.sessions] + d._regions) == [256 * i for i in range(d.config.max_sessions)]
            assert [id(s) for s, _ in self.sessions] == list(map(id, d._sessions))
            for s, text in self.sessions:
                assert s.tokens == text
                audit(d, s)

    def teardown(self) -> None:
        if hasattr(self, "drafter"):
            while self.sessions:
                self.close(0)
            self.all_is_right()
            assert self.drafter.pool.available == self.drafter.pool.total


@pytest.mark.parametrize("operations", [2000, LONG])
def test_any_order_of_operations_on_a_drafter(operations: int) -> None:
    seen = run(Drafts, operations)
    assert all(seen[what] for what in ("opened", "shared", "hits", "misses")), seen
