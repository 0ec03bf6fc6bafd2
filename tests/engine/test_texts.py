"""What callers of an engine rely on beside its ids: several completions, closing, several engines, one thread at a time, a bar."""

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from specedge import kernels
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine import texts
from specedge.engine.admission import Acceptance
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine
from specedge.engine.speculative import SpeculativeEngine
from specedge.engine.texts import RequestError, TextEngine, UseError
from tests.helpers import byte_tokenizer, check_empty, drafter, engine, random_model

PARAMS = SamplingParams(1.0, 20, seed=2**64 - 2)
PROMPT = [7, 3] * 70
Make = Callable[..., TextEngine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), 4)


@pytest.fixture(params=["plain", "speculative"])
def make(request: pytest.FixtureRequest, model: Path) -> Make:
    """Makes an engine of either kind."""

    def plain(**sizes: int) -> Engine:
        return engine(model, **sizes)

    def speculative(**sizes: int) -> SpeculativeEngine:
        return SpeculativeEngine(engine(model, **sizes), drafter(model))

    return plain if request.param == "plain" else speculative


def core(e: TextEngine) -> Engine:
    return e.engine if isinstance(e, SpeculativeEngine) else e  # type: ignore[return-value]


def test_completions_come_prompt_by_prompt_and_can_be_had_alone(make: Make, model: Path) -> None:
    e = make(page_size=16)
    done = e.generate([PROMPT, [5]], replace(PARAMS, n=3))
    assert [c.seed for c in done] == [2**64 - 2, 2**64 - 1, 0] * 2
    assert [c.prompt_tokens for c in done] == [140] * 3 + [1] * 3
    assert len({tuple(c.token_ids) for c in done}) == 6
    for prompt, three in ((PROMPT, done[:3]), ([5], done[3:])):
        for c in three:
            assert engine(model).generate([prompt], replace(PARAMS, seed=c.seed))[0].token_ids == c.token_ids
    drawn = e.generate([[5], [5]], replace(PARAMS, seed=None, n=2))
    assert len({c.seed for c in drawn}) == 4, "each prompt has a seed of its own"
    check_empty(core(e))


def test_completions_share_the_pages_of_their_prompt(model: Path) -> None:
    """The prompt is computed once: the others wait for its pages, and strangers pass them meanwhile."""
    e = engine(model, page_size=16, max_rows=32)
    rows = list[int]()
    run = e.runner.run

    def counted(batch: object) -> object:
        rows.append(batch.rows)  # type: ignore[attr-defined]
        return run(batch)  # type: ignore[arg-type]

    e.runner.run = counted  # type: ignore[method-assign, assignment]
    e.generate([PROMPT], replace(PARAMS, n=8, max_tokens=1))
    assert sum(rows) == 140 + 7 * (140 - 128) and e.pool.hits == 7 * 128
    mine, twin, stranger = (e.open([*p], PARAMS) for p in ([9] * 100, [9] * 90, [1, 2]))
    for s in (mine, twin, stranger):
        e.run_until(s, 200)
    e.step()
    assert (mine.table is not None, twin.table is not None, stranger.table is not None) == (True, False, True)
    while not all(s.finish for s in (mine, twin, stranger)):
        e.step()
    assert twin.tokens[90:] == engine(model).generate([[9] * 90], PARAMS)[0].token_ids
    check_empty(e)


def test_a_stream_is_one_text(make: Make) -> None:
    e = make()
    with pytest.raises(ValueError, match="^n is 2, but must be 1 for a stream"):
        next(e.stream([5], replace(PARAMS, n=2)))
    check_empty(core(e))


@pytest.mark.parametrize("prompt", [5, [5, "a"], [[5]], None, b"ab"], ids=repr)
def test_a_prompt_that_is_none_is_refused(make: Make, prompt: object) -> None:
    e = make()
    with pytest.raises(RequestError, match="is no prompt: give a string or a list of token ids"):
        e.generate([[5], prompt], PARAMS)  # type: ignore[list-item]
    check_empty(core(e))


def test_close_releases_pages_and_weights(tmp_path: Path) -> None:
    random_model(tmp_path, 1, byte_tokenizer(), vocab_size=300)
    both = SpeculativeEngine(tmp_path, tmp_path, DraftConfig(engine=EngineConfig(kv_tokens=4096)), device="cpu")
    stream = both.stream("ab", PARAMS)
    next(stream)
    held = [
        weakref.ref(thing) for r in (both.engine.runner, both.drafter.runner)
        for thing in (r, r.pages, r.rows, r.model.weights.embedding, r.model.weights.layers[0].qkv)
    ]  # fmt: skip
    both.close()
    both.close()
    gc.collect()
    assert [h() for h in held] == [None] * len(held)
    check_empty(both.engine)
    both.drafter.pool.check()
    assert both.drafter.pool.available == both.drafter.pool.total
    for use in (
        lambda: next(stream), lambda: both.generate("ab"), lambda: next(both.stream("ab")), lambda: both.engine.generate("ab"), both.engine.step,
        lambda: both.engine.open([1], PARAMS), lambda: both.drafter.open([1], PARAMS, 9),
    ):  # fmt: skip
        with pytest.raises(UseError, match="is closed: load it again$"):
            use()


def test_what_was_given_stays_open(model: Path) -> None:
    e, d = engine(model), drafter(model)
    want = e.generate([[5]], PARAMS)[0].token_ids
    with SpeculativeEngine(e, d) as both:
        assert both.generate([[5]], PARAMS)[0].token_ids == want
    with pytest.raises(UseError, match="closed"):
        both.generate([[5]], PARAMS)
    assert e.generate([[5]], PARAMS)[0].token_ids == want and not d.closed
    with e, Drafter(d.runner, d.config) as other:
        pass
    assert e.guard.closed and other.closed and not d.closed


def test_several_engines_in_one_process(tmp_path: Path) -> None:
    """Streams of engines over different models, taken in turns: each writes what it writes alone, also after another one is closed."""
    paths = [random_model(tmp_path / str(i), i) for i in range(3)]
    want = [engine(p).generate([[5, 6]], PARAMS)[0].token_ids for p in paths]
    engines = [engine(p) for p in paths]
    streams, got = [e.stream([5, 6], PARAMS) for e in engines], [list[int]() for _ in paths]
    for turn in range(PARAMS.max_tokens):
        for i, stream in enumerate(streams):
            if turn < 10 or i != 1:
                got[i] += next(stream).token_ids
        if turn == 9:
            engines[1].close()
    assert got == [want[0], want[1][:10], want[2]]


def elsewhere(call: Callable[[], object]) -> object:
    """What a call in another thread gives, or the exception that it raises."""
    found = list[object]()

    def run() -> None:
        try:
            found.append(call())
        except Exception as e:
            found.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_two_threads_at_once_get_a_sentence(make: Make, model: Path) -> None:
    """A second thread comes in the middle of a step of the first: it is refused, the first does not notice, and what it cancels is freed later."""
    e = make()
    inner, found = core(e), list[object]()
    mine = e.stream([9, 9], PARAMS)
    next(mine)
    run = inner.runner.run

    def interrupted(batch: object) -> object:
        if not found:
            found.extend(elsewhere(call) for call in (
                lambda: e.generate([[1]], PARAMS), lambda: next(e.stream([1], PARAMS)), inner.step, lambda: inner.open([1], PARAMS), e.close,
            ))  # fmt: skip
            assert elsewhere(mine.close) is None
            assert inner.guard.behind and inner.busy
        return run(batch)  # type: ignore[arg-type]

    inner.runner.run = interrupted  # type: ignore[method-assign, assignment]
    got = e.generate([[5]], PARAMS)[0].token_ids
    assert len(found) == 5
    for error in found:
        assert isinstance(error, UseError) and str(error).startswith("another thread is using this engine: ")
    assert got == engine(model).generate([[5]], PARAMS)[0].token_ids
    assert elsewhere(lambda: e.generate([[5]], PARAMS)[0].token_ids) == got, "one thread after the other may"
    check_empty(inner)


def test_a_stream_may_be_dropped_in_the_middle_of_a_step(make: Make, model: Path) -> None:
    """As by the garbage collector, which may run anywhere: the other text does not notice, and the dropped one is freed when the step has ended."""
    e = make()
    inner, run, mine = core(e), core(e).runner.run, e.stream([9, 9], PARAMS)
    next(mine)

    def interrupted(batch: object) -> object:
        mine.close()
        return run(batch)  # type: ignore[arg-type]

    inner.runner.run = interrupted  # type: ignore[method-assign, assignment]
    assert e.generate([[5]], PARAMS)[0].token_ids == engine(model).generate([[5]], PARAMS)[0].token_ids
    assert not inner.guard.behind
    check_empty(inner)


def test_a_text_is_begun_in_one_go(make: Make) -> None:
    """Between its sequence and its first step nobody else gets in."""
    e, found = make(), list[object]()
    opened = core(e).open

    def interrupted(*args: object, **kwargs: object) -> object:
        sequence = opened(*args, **kwargs)  # type: ignore[arg-type]
        if not found:
            found.append(None)
            found[0] = elsewhere(lambda: e.generate([[1]], PARAMS))
        return sequence

    core(e).open = interrupted  # type: ignore[method-assign, assignment]
    assert len("".join(str(c.token_ids) for c in e.stream([5], PARAMS))) > 20
    assert isinstance(found[0], UseError)


def test_an_interrupted_step_leaves_no_noise_that_was_never_drawn(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the noise of a step is drawn; asked again, the text is the same."""
    want = engine(model).generate([[5]], PARAMS)[0].token_ids
    e, fill, calls = engine(model), kernels.fill_noise, list[int]()

    def interrupted(table: Tensor, fills: Tensor) -> None:
        if len(fills):
            calls.append(1)
            if len(calls) == 3:
                table[fills[:, 2], 7] = 1e9  # whatever is in the memory
                raise KeyboardInterrupt
        fill(table, fills)

    monkeypatch.setattr(kernels, "fill_noise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        e.generate([[5]], PARAMS)
    assert e.generate([[5]], PARAMS)[0].token_ids == want
    check_empty(e)


def test_a_drafter_that_is_closed_under_its_texts(model: Path) -> None:
    """A sentence, and nothing stays behind."""
    both = SpeculativeEngine(engine(model), drafter(model))
    one, other = both.stream([5], PARAMS), both.stream([6], PARAMS)
    next(one), next(other)
    both.drafter.close()
    for stream in (one, other):
        with pytest.raises(UseError, match="the drafter of this engine is closed: load it again"):
            list(stream)
    both.close()
    check_empty(both.engine)
    assert both.guard.closed


def test_long_prompts_have_a_bar(make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(texts, "BAR_AFTER", 0)
    e = make(max_rows=16)
    want = e.generate([PROMPT, PROMPT[1:]], PARAMS)
    assert capsys.readouterr() == ("", "")
    assert [c.token_ids for c in e.generate([PROMPT, PROMPT[1:]], PARAMS, progress=True)] == [c.token_ids for c in want]
    shown = capsys.readouterr()
    assert shown.out == "" and "reading" in shown.err and "/279 " in shown.err
    stream = e.stream(PROMPT[2:], PARAMS, progress=True)
    next(stream)
    assert capsys.readouterr().err.rstrip(" ").endswith("\r"), "gone before the text begins"
    assert "".join(str(c.token_ids) for c in stream) and capsys.readouterr().err == ""


def test_nothing_is_drafted_while_no_nodes_are_wanted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tree teaches that nodes do not pay; from the sixth step on they do."""
    want = engine(model).generate([[1, 2, 3]], SamplingParams(max_tokens=40, seed=1))[0].token_ids
    small = DraftConfig(tree_size=3, engine=EngineConfig(kv_tokens=8192, max_rows=256))
    both, steps = SpeculativeEngine(engine(model, admission=True), drafter(model, small)), list[int]()
    grow = both.drafter.grow

    def plan(sessions: list[Acceptance], *_: object) -> None:
        steps.append(len(forwards))
        for s in sessions:
            s.budget = 0 if len(steps) < 6 else 7

    forwards = list[int]()
    monkeypatch.setattr(both.engine.admission, "plan", plan)
    monkeypatch.setattr(both.drafter, "grow", lambda: (forwards.append(1), grow())[1])
    assert both.generate([[1, 2, 3]], SamplingParams(max_tokens=40, seed=1))[0].token_ids == want
    assert 0 < steps[0] == steps[5] < steps[6], "forwards before each step"
