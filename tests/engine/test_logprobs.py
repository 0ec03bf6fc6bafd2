"""Log-probabilities: those of transformers, the same bits with and without a draft, and nothing of them where nobody asks."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from specedge import kernels
from specedge.cli import DEMO
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.engine import Engine
from specedge.engine.request import Completion, Logprobs
from specedge.engine.sampler import Sampler
from specedge.engine.speculative import SpeculativeEngine
from tests.helpers import check_empty, drafter, engine, random_model

LOUD = SamplingParams(
    0.8, 24, seed=5, top_k=30, top_p=0.95, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={7: 5.0}, min_tokens=9, stop_ids=(1, 2, 3), logprobs=3,  # type: ignore[arg-type] # noqa: E501
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), 4)


def assert_those_of(theirs: torch.nn.Module, prompt: list[int], done: Completion, k: int, limit: int) -> None:
    assert done.logprobs is not None and [p.token_id for p in done.logprobs] == done.token_ids
    with torch.inference_mode():
        want = theirs(torch.tensor([prompt + done.token_ids])).logits[0, len(prompt) - 1 : -1, :limit].log_softmax(-1)
    for row, found in zip(want, done.logprobs, strict=True):
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
        assert [value for _, value in found.top] == pytest.approx(row.topk(k).values.tolist(), abs=1e-4)
        assert [value for _, value in found.top] == pytest.approx(row[[i for i, _ in found.top]].tolist(), abs=1e-4)


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=24, logprobs=5), LOUD], ids=["greedy", "loud"])
def test_they_are_those_of_transformers(model: Path, params: SamplingParams) -> None:
    """Of the model's own logits, whatever the token was drawn with."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    done = engine(model).generate([[5, 6, 7]], params)[0]
    assert_those_of(theirs, [5, 6, 7], done, params.logprobs or 0, 105)
    if params.greedy:
        assert all(p.top[0] == (p.token_id, p.logprob) for p in done.logprobs or ())


def test_those_of_the_demo_target_with_and_without_a_draft() -> None:
    target = Engine.from_pretrained(DEMO / "target", device="cpu", sizes=EngineConfig(kv_tokens=2048))
    theirs = AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32).eval()
    params = SamplingParams(0.7, 40, seed=3, logprobs=4)
    done = target.generate(["def fibonacci(n):"], params)[0]
    assert target.tokenizer is not None
    assert_those_of(theirs, target.tokenizer.encode("def fibonacci(n):"), done, 4, target.tokenizer.size)
    config = DraftConfig(engine=EngineConfig(kv_tokens=1024))
    (both,) = SpeculativeEngine(target, DEMO / "draft", config, device="cpu").generate("def fibonacci(n):", params)
    assert both.speculation.accepted > 5
    assert both.token_ids == done.token_ids
    if kernels.backend() != "torch":
        assert both.logprobs == done.logprobs, "bit for bit"


@pytest.mark.parametrize("seed", range(2))
def test_plain_is_speculative_is_streamed(seed: int, model: Path, tmp_path: Path) -> None:
    params = replace(LOUD, seed=seed, max_tokens=30)
    prompts = [[5, 6, 7], [9] * 40, [1]]
    want = [engine(model).generate([p], params)[0] for p in prompts]
    assert want == [replace(c, logprobs=engine(model, page_size=16, max_rows=7).generate([p], params)[0].logprobs) for c, p in zip(want, prompts, strict=True)]  # noqa: E501
    for draft in (model, random_model(tmp_path, 9)):
        both = SpeculativeEngine(engine(model), drafter(draft))
        done = both.generate(prompts, params)
        assert [c.token_ids for c in done] == [c.token_ids for c in want]
        chunks = list(both.stream(prompts[0], params))
        streamed = [p for c in chunks for p in c.logprobs or ()]
        assert all(len(c.logprobs or ()) == len(c.token_ids) for c in chunks)
        assert chunks[-1].completion is not None and streamed == chunks[-1].completion.logprobs
        if kernels.backend() != "torch":
            assert [c.logprobs for c in done] == [c.logprobs for c in want] and streamed == want[0].logprobs
        check_empty(both.engine)


def test_a_stop_string_cuts_them_with_the_tokens() -> None:
    target = Engine.from_pretrained(DEMO / "target", device="cpu", sizes=EngineConfig(kv_tokens=1024))
    draft = DraftConfig(engine=EngineConfig(kv_tokens=1024))
    params = SamplingParams(max_tokens=60, stop=("return",), logprobs=0)
    for e in (target, SpeculativeEngine(target, DEMO / "draft", draft, device="cpu")):
        done = e.generate("def fibonacci(n):\n    if n < 2:\n", params)[0]
        assert done.finish_reason == "stop" and 0 < len(done.token_ids) < 60
        assert done.logprobs is not None and [p.token_id for p in done.logprobs] == done.token_ids
        assert all(p.top == () and p.logprob <= 0 for p in done.logprobs)


def test_nobody_asks_nothing_is_computed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "logprobs", None)
    done = engine(model).generate([[5], [6]], replace(LOUD, logprobs=None))
    assert [c.logprobs for c in done] == [None, None]
    assert [c.logprobs for c in engine(model).stream([5], replace(LOUD, logprobs=None))] == [None] * len(done[0].token_ids)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_are_by_value_then_by_id(data: st.DataObject) -> None:
    """Coarse logits with many ties: the k best as Python sorts them, ids at the limit and above never among them."""
    vocab = data.draw(st.integers(1, 30))
    limit, k = data.draw(st.integers(1, vocab)), data.draw(st.integers(-1, 32))
    logits = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=vocab, max_size=vocab))).float()
    token = data.draw(st.integers(0, limit - 1))
    (found,) = Sampler(vocab, limit, torch.device("cpu")).logprobs(logits[None], [token], k)
    total = math.log(sum(math.exp(v) for v in logits[:limit].tolist()))
    ranked = sorted(range(limit), key=lambda v: (-float(logits[v]), v))[: limit if k < 0 else k]
    assert [i for i, _ in found.top] == ranked
    assert [v for _, v in found.top] == pytest.approx([float(logits[i]) - total for i in ranked], abs=1e-5)
    assert found == Logprobs(token, pytest.approx(float(logits[token]) - total, abs=1e-5), found.top)
