"""The engine's text is a function of model, prompt, parameters and seed: not of neighbours, chunks, trees, page sizes or cancelled work."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import specedge.engine.engine as engine_module
from specedge.config import EngineConfig, SamplingParams
from specedge.engine import line
from specedge.engine.engine import Engine
from specedge.engine.line import TURN
from specedge.engine.request import Account, Sequence, walk
from specedge.engine.speculative import SpeculativeEngine
from specedge.engine.texts import RequestError
from specedge.tree import EMPTY, TreeError, make_tree
from tests.helpers import byte_tokenizer, check_empty, drafter, engine, random_model, runner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), 4)


def prompts(n: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 105, int(rng.integers(1, longest))).tolist() for _ in range(n)]


def drive(e: Engine, s: Sequence, length: int) -> list[int]:
    e.run_until(s, length)
    while not s.finish and len(s.tokens) < length:
        e.step()
    return s.tokens


def test_greedy_text_is_that_of_transformers(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for prompt in prompts(3):
        ours = engine(model).generate([prompt], SamplingParams(max_tokens=24))[0].token_ids
        text = list(prompt)
        for _ in range(24):
            with torch.inference_mode():
                text.append(int(theirs(torch.tensor([text])).logits[0, -1].argmax()))
        assert ours == text[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_text_does_not_depend_on_its_batch(model: Path, temperature: float) -> None:
    params = SamplingParams(temperature, max_tokens=30, seed=11)
    many = prompts(9, longest=100)
    alone = [engine(model).generate([p], params)[0].token_ids for p in many]
    few = {"kv_tokens": 144, "page_size": 16}
    for sizes in ({}, {"page_size": 16, "max_rows": 33}, {"max_rows": 2}, {"max_sequences": 2}, {"kv_tokens": 256}, few):
        e = engine(model, **sizes)
        assert [c.token_ids for c in e.generate(many, params)] == alone
        check_empty(e)


def test_seeds_and_temperatures_matter(model: Path) -> None:
    def text(**changes: float) -> list[int]:
        return engine(model).generate([[1, 2, 3]], SamplingParams(**{"temperature": 1.0, "max_tokens": 30, "seed": 1, **changes}))[0].token_ids  # type: ignore[arg-type]

    assert text() == text()
    assert len({tuple(text()), tuple(text(seed=2)), tuple(text(temperature=0.3)), tuple(text(temperature=0))}) == 4
    drawn = engine(model).generate([[1, 2, 3]], SamplingParams(1.0, 30))[0]
    assert text(seed=drawn.seed) == drawn.token_ids


def test_stop_ids_and_max_tokens_close_a_text(model: Path) -> None:
    free = engine(model).generate([[5]], SamplingParams(1.0, 40, seed=3))[0]
    assert free.finish_reason == "length" and len(free.token_ids) == 40
    stop = free.token_ids[17]
    at = free.token_ids.index(stop)
    held = engine(model).generate([[5]], SamplingParams(1.0, 40, seed=3, stop_ids=(stop,)))[0]
    assert held.finish_reason == "stop" and held.token_ids == free.token_ids[: at + 1]
    e = Engine(runner(model), eos_ids=(stop,))
    assert e.generate([[5]], SamplingParams(1.0, 40, seed=3))[0].token_ids == held.token_ids
    assert e.generate([[5]], SamplingParams(1.0, 40, seed=3, ignore_eos=True))[0].token_ids == free.token_ids


def test_walk_ends_where_it_must() -> None:
    tree = make_tree([7, 8, 9, 7], [0, 1, 0, 2])
    assert walk(tree, [7, 8, 7, 5, 3], frozenset(), 9) == (4, [7, 8, 7], 3, "")
    assert walk(tree, [7, 1, 7, 5, 3], frozenset(), 9) == (1, [7], 1, "")
    assert walk(tree, [7, 8, 7, 5, 3], frozenset({8}), 9) == (1, [7], 8, "stop")
    assert walk(tree, [7, 8, 7, 5, 3], frozenset(), 2) == (1, [7], 8, "length")
    assert walk(tree, [7, 8, 7, 5, 3], frozenset(), 1) == (0, [], 7, "length")
    assert walk(EMPTY, [7], frozenset({7}), 1) == (0, [], 7, "stop")


def test_streams_of_one_engine_mix_and_can_be_dropped(model: Path) -> None:
    params = SamplingParams(0.8, 25, seed=5)
    first, second, third = prompts(3, 7)
    want = [engine(model).generate([p], params)[0].token_ids for p in (first, second)]
    e = engine(model)
    a, b, c = e.stream(first, params), e.stream(second, params), e.stream(third, params)
    got: tuple[list[int], list[int]] = ([], [])
    next(c)
    for x, y in zip(a, b, strict=True):
        got[0].extend(x.token_ids)
        got[1].extend(y.token_ids)
    c.close()
    assert list(got) == want
    check_empty(e)


def test_text_of_chunks_is_the_text(tmp_path: Path) -> None:
    random_model(tmp_path, 1, byte_tokenizer(), vocab_size=300)
    e = Engine.from_pretrained(tmp_path, device="cpu", sizes=EngineConfig(kv_tokens=1024))
    chunks = list(e.stream("ab\u00e9", SamplingParams(1.0, 60, seed=1)))
    done = chunks[-1].completion
    assert done is not None and done.prompt_tokens == 4
    assert "".join(c.text for c in chunks) == done.text == e.tokenizer.decode(done.token_ids)  # type: ignore[union-attr]
    assert max(done.token_ids) < 257, "ids past the tokenizer's must never win"


def test_what_cannot_be_served_is_refused_in_a_sentence(model: Path) -> None:
    e = engine(model)
    for tokens, params, words in (
        ([], SamplingParams(), "no tokens"),
        ([105], SamplingParams(), "outside the vocabulary of 105"),
        ([-1], SamplingParams(), "token -1"),
        ([1] * 500, SamplingParams(max_tokens=13), "context of 512"),
        ("text", SamplingParams(), "no tokenizer"),
    ):
        with pytest.raises(RequestError, match=words):
            e.generate([[1], tokens], params)  # type: ignore[list-item]
    check_empty(e)
    s = e.open([1], SamplingParams())
    with pytest.raises(TreeError, match="row 1"):
        e.offer(s, make_tree([1], [1]))
    e.cancel(s)
    e.cancel(s)
    check_empty(e)


def test_common_beginnings_are_computed_once(model: Path) -> None:
    e, stem = engine(model, page_size=16), prompts(1, 5, 200)[0] * 3
    params = SamplingParams(0.9, 20, seed=6)
    many = [stem + tail for tail in ([1], [2, 3], [1], [9] * 30)]
    want = [engine(model).generate([p], params)[0].token_ids for p in many]
    assert [e.generate([p], params)[0].token_ids for p in many] == want
    full = len(stem) // 16 * 16
    assert e.pool.hits >= 3 * full and full > 32
    check_empty(e)
    salted = [e.open(stem, params, account=Account(s)) for s in (b"a", b"b")]
    before = e.pool.hits
    for s in salted:
        drive(e, s, len(stem) + 3)
    assert e.pool.hits == before, "nobody finds what another account has computed"
    for s in salted:
        e.cancel(s)
    check_empty(e)


def test_preemption_takes_the_latest_and_changes_no_text(model: Path) -> None:
    params = SamplingParams(1.0, 60, seed=8)
    many = prompts(5, 9, 30)
    want = [engine(model).generate([p], params)[0].token_ids for p in many]
    e = engine(model, page_size=16, kv_tokens=160)
    opened = [e.open(p, params) for p in many]
    preempted = 0
    for s in opened:
        e.run_until(s, s.limit)
    while any(not s.finish for s in opened):
        before = {id(s) for s in e.line.running}
        e.step()
        gone = before - {id(s) for s in e.line.running} - {id(s) for s in opened if s.finish}
        preempted += len(gone)
        assert id(opened[0]) not in gone, "the first must get on"
    assert [s.tokens[len(p) :] for s, p in zip(opened, many, strict=True)] == want
    assert preempted
    check_empty(e)


@pytest.mark.parametrize("sizes", [{"kv_tokens": 192}, {"max_sequences": 2}])
def test_nobody_waits_for_ever_beside_active_edges(model: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]) -> None:
    """Five edges whose next tree is there 0.4 s after each verdict, and room for one or two: they take turns. Nobody waits for longer than the
    turns of all others, nobody pays twice, and no text changes."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    many, params = [p[:30] + [i] * 20 for i, p in enumerate(prompts(5, 3))], SamplingParams(0.9, 140, seed=2)
    truth = [engine(model).generate([p], params)[0].token_ids for p in many]
    e = engine(model, page_size=16, **sizes)
    accounts = [Account(bytes([i])) for i in range(5)]
    opened = [e.open(p, params, account=a) for p, a in zip(many, accounts, strict=True)]
    before, longest = dict.fromkeys(map(id, opened), clock.now), 0.0
    while any(s in e.line.running and not s.finish for s in opened) or e.busy:
        for s in opened:
            if not s.finish and s.tree is None and clock.now > s.answered + 0.4:
                e.offer(s, EMPTY)
        for v in e.step():
            longest = max(longest, clock.now - before[id(v.sequence)])
            before[id(v.sequence)] = clock.now
        clock.now += 0.5
    assert [s.tokens[len(p) :] for s, p in zip(opened, many, strict=True)] == truth
    assert TURN < longest < 8 * TURN, "four others, who wait for a turn and have one"
    assert [(a.prompt, a.verified) for a in accounts] == [(len(p) - 1, 140) for p in many]
    check_empty(e)


@pytest.mark.parametrize("drafts", [False, True])
def test_who_is_idle_makes_room_for_a_text(model: Path, monkeypatch: pytest.MonkeyPatch, drafts: bool) -> None:
    """Sequences that hold every page and want nothing: the latest gives its own up, and only as many do as it takes; no text changes."""
    monkeypatch.setattr(line, "TURN", math.inf)  # at once, not when its turn is over
    params = SamplingParams(1.0, 20, seed=8)
    first, second, third = prompts(3, 9, 30)
    want = [engine(model).generate([p], params)[0].token_ids for p in (first, second, third)]
    e = engine(model, page_size=16, kv_tokens=96)
    idle = [e.open(p, params) for p in (first, second)]
    while e.busy:
        e.step()
    who = SpeculativeEngine(e, drafter(model)) if drafts else e
    assert who.generate([third], params)[0].token_ids == want[2]
    assert [s.computed > 0 for s in idle] == [True, False] and not e.busy, "what was taken is not computed again unasked"
    for s in idle:
        e.run_until(s, s.limit)
    while e.busy:
        e.step()
    assert [s.tokens[len(p) :] for s, p in zip(idle, (first, second), strict=True)] == want[:2]
    check_empty(e)


def test_a_deep_tree_does_not_preempt(model: Path) -> None:
    """Pages for its depth are more than there are beside an idle text: its prefix is verified, nobody is dropped, and the text is the same."""
    prompt, other = list(range(20)), list(range(30, 60))
    params = SamplingParams(max_tokens=150)
    truth = engine(model).generate([prompt], params)[0].token_ids
    e = engine(model, page_size=16, kv_tokens=192, max_rows=256)
    idle, s = e.open(other, SamplingParams(max_tokens=100)), e.open(prompt, params)
    e.run_until(idle, len(other) + 60)
    while len(idle.tokens) < len(other) + 60:
        e.step()
    e.offer(s, make_tree(truth[:140], list(range(140))))
    (verdict,) = e.step()
    assert verdict.sequence is s and len(verdict.tokens) > 51 and s.tokens == prompt + truth[: len(s.tokens) - 20]
    assert idle.computed == len(idle.tokens) - 1
    e.cancel(s)
    e.cancel(idle)
    check_empty(e)


def test_an_account_that_is_held_waits_and_is_charged(model: Path) -> None:
    """Prompt rows and verified rows are counted apart; a held account gets none of its kind, and the others do not notice."""
    e, params = engine(model), SamplingParams(max_tokens=8)
    prompt = prompts(1, 4, 30)[0]
    want = e.generate([prompt], params)[0].token_ids
    before = Account(b"c", verified_held=True, prompt_held=True)
    slow, other = e.open(prompt, params, account=before), e.open(prompt, params)
    for s in (slow, other):
        e.run_until(s, s.limit)
    while e.busy:
        assert {v.sequence for v in e.step()} <= {other}
    assert other.tokens[len(prompt) :] == want and (before.verified, before.prompt, slow.computed) == (0, 0, 0)
    before.prompt_held = False
    e.step()
    assert (before.verified, before.prompt) == (1, len(prompt) - 1), "the root makes a token, the rest is the prompt"
    assert not e.busy
    before.verified_held = False
    while e.busy:
        e.step()
    assert slow.tokens[len(prompt) :] == want and (before.verified, before.prompt) == (8, len(prompt) - 1)
    check_empty(e)
