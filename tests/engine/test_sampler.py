"""Sampling: the whole chain against a slow float64 reading of its rules, the filters against their distributions, speculation against plain ids."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specedge import kernels
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.engine import Engine
from specedge.engine.sampler import Ask, Sampler
from specedge.engine.speculative import SpeculativeEngine
from specedge.engine.texts import RequestError
from specedge.kernels import reference
from specedge.tree import make_tree
from tests.helpers import byte_tokenizer, check_empty, drafter, engine, random_model

VOCAB, LIMIT = 40, 37


def survivors(logits: np.ndarray, ask: Ask, path: tuple[int, ...], limit: int) -> tuple[np.ndarray, list[int]]:
    """What the rules make of `logits [V]` in float64, over the temperature unless that is 0, and the ids that survive the filters, best first."""
    p, z = ask.params, logits.astype(np.float64).copy()
    for token, value in p.logit_bias:
        z[token] += value
    text = [*ask.tokens, *path]
    output = text[ask.prompt_len :]
    if len(output) < p.min_tokens:
        z[sorted(ask.stop)] = -np.inf
    for token in set(text):
        z[token] = z[token] / p.repetition_penalty if z[token] > 0 else z[token] * p.repetition_penalty
    for token in set(output):
        z[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    z = z[:limit] / (1.0 if p.greedy else p.temperature)
    ranked = sorted(range(limit), key=lambda v: (-z[v], v))
    if p.greedy:
        return z, ranked
    if p.min_p > 0:
        ranked = [v for v in ranked if z[v] - z[ranked[0]] >= math.log(p.min_p)]
    if p.top_k > 0:
        ranked = ranked[: p.top_k]
    weights = np.exp(z[ranked] - z[ranked[0]])
    return z, [v for v, above in zip(ranked, np.cumsum(weights) - weights, strict=True) if above < p.top_p * weights.sum()]


def slow(logits: np.ndarray, ask: Ask, path: tuple[int, ...]) -> tuple[int, float]:
    """The token that the rules give in float64, and by how much it wins."""
    p = ask.params
    z, ranked = survivors(logits, ask, path, LIMIT)
    if not p.greedy:
        z = z + reference.gumbel(p.seed or 0, len(ask.tokens) + len(path), VOCAB).double().numpy()[:LIMIT]
        ranked.sort(key=lambda v: -z[v])
    return ranked[0], z[ranked[0]] - z[ranked[1]] if len(ranked) > 1 else math.inf


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]), max_tokens=st.just(30), seed=st.integers(0, 2**64 - 1), top_k=st.sampled_from([0, -1, 1, 5]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]), min_p=st.sampled_from([0.0, 0.1]), repetition_penalty=st.sampled_from([0.7, 1.0, 1.4]),
    presence_penalty=st.sampled_from([-1.0, 0.0, 1.5]), frequency_penalty=st.sampled_from([-0.5, 0.0, 0.8]), min_tokens=st.sampled_from([0, 4, 12]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=4),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=3), st.integers(0, 10**6))
def test_the_chain_follows_its_rules(several: list[SamplingParams], seed: int) -> None:
    rng = np.random.default_rng(seed)
    asks, logits = [], []
    for params in several:
        tree = make_tree(rng.integers(0, VOCAB, 6).tolist(), [int(rng.integers(0, i + 1)) for i in range(6)])
        tokens = rng.integers(0, VOCAB, int(rng.integers(1, 15))).tolist()
        stop = frozenset(rng.integers(0, VOCAB, 3).tolist())
        asks.append(Ask(params, tokens, int(rng.integers(1, len(tokens) + 1)), stop, tree.texts()))
        logits.append(torch.from_numpy(rng.normal(0, 2, (7, VOCAB)).astype(np.float32)))
    flat = torch.cat(logits)
    got = iter(Sampler(VOCAB, LIMIT, torch.device("cpu"))(flat.clone(), asks))
    for ask, rows in zip(asks, logits, strict=True):
        for path, row in zip(ask.paths, rows, strict=True):
            want, margin = slow(row.numpy(), ask, tuple(path))
            token = next(got)
            assert token == want or margin < 1e-4  # float32 may decide a near tie the other way


DRAWS, FEW = 100_000, 12  # draws of a distribution, and tokens that it is over
TEXT = [1, 2, 2, 5]
each_parameter = pytest.mark.parametrize(
    ("name", "value"), [("temperature", 1.6), ("top_k", 4), ("top_p", 0.7), ("min_p", 0.15), ("logit_bias", {3: 2.0}), ("repetition_penalty", 1.8),
                        ("presence_penalty", 1.0), ("frequency_penalty", -1.0)],
)  # fmt: skip


def logits_and_odds(name: str, value: object) -> tuple[SamplingParams, torch.Tensor, np.ndarray]:
    """Parameters, logits `[FEW]`, and the odds `[FEW]` of every token by the slow reading of the rules."""
    params = SamplingParams(**{"temperature": 0.9, "max_tokens": 10**6, "seed": 5, name: value})  # type: ignore[arg-type]
    logits = torch.randn(FEW, generator=torch.Generator().manual_seed(3)) * 1.5
    z, ranked = survivors(logits.numpy(), Ask(params, TEXT, 1, frozenset(), [()]), (), FEW)
    p = np.zeros(FEW)
    p[ranked] = np.exp(z[ranked] - z[ranked[0]])
    return params, logits, p / p.sum()


def fits(found: np.ndarray, p: np.ndarray) -> bool:
    """Chi-square of counts under the odds `p`, with 5 sigma of its distribution as the bound; what has no odds must not be there."""
    seen, draws = p > 0, found.sum()
    chi, freedom = ((found[seen] - draws * p[seen]) ** 2 / (draws * p[seen])).sum(), seen.sum() - 1
    return bool((found[~seen] == 0).all() and chi < freedom + 5 * math.sqrt(2 * freedom))


@each_parameter
def test_draws_have_the_distribution_of_the_rules(name: str, value: object) -> None:
    """10^5 seeds, one position."""
    params, logits, p = logits_and_odds(name, value)
    sampler, found = Sampler(FEW, FEW, torch.device("cpu")), np.zeros(FEW)
    for at in range(0, DRAWS, 1000):
        asks = [Ask(replace(params, seed=at + i), TEXT, 1, frozenset(), [()]) for i in range(1000)]
        found += np.bincount(sampler(logits.expand(1000, -1).clone(), asks), minlength=FEW)
    assert fits(found, p)


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    """What one seed draws at 10^5 positions, `[DRAWS, FEW]`."""
    table, at = torch.empty(DRAWS, FEW), torch.arange(DRAWS)
    kernels.fill_noise(table, torch.stack((torch.full_like(at, 5), at, at), 1))
    return table


@each_parameter
def test_so_have_the_positions_of_one_seed(name: str, value: object, noise: torch.Tensor) -> None:
    """10^5 positions, one seed; and neighbours know nothing of each other. One text stands for all: of their lengths, they would
    have 5 * 10^9 ids."""
    params, logits, p = logits_and_odds(name, value)
    sampler = Sampler(FEW, FEW, torch.device("cpu"))
    draw = sampler.draw([Ask(params, TEXT, 1, frozenset(), [()])])
    rows, every = sampler.process(logits[None].clone(), draw), torch.arange(DRAWS, dtype=torch.int32)
    tokens = kernels.sample(rows.repeat(DRAWS, 1), noise, every, draw.inv_temperature.repeat(DRAWS), FEW).numpy()
    assert fits(np.bincount(tokens, minlength=FEW), p)
    assert fits(np.bincount(tokens[::2] * FEW + tokens[1::2], minlength=FEW * FEW), np.outer(p, p).ravel())


@pytest.mark.parametrize("fault", [lambda at: at & 0xFF, lambda at: at >> 1, lambda at: at * 0], ids=["a byte", "halved", "ignored"])
def test_the_test_of_positions_sees_faults(fault: Callable[[torch.Tensor], torch.Tensor], noise: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        test_so_have_the_positions_of_one_seed("temperature", 1.6, noise[fault(torch.arange(DRAWS))])


EACH = {
    "top_k": 5, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.7,
    "logit_bias": {7: 5.0, 8: -100.0}, "min_tokens": 20, "stop_ids": (3, 4, 5, 6, 7, 8, 9),
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", [*EACH, "all"])
def test_speculation_gives_the_plain_ids(tmp_path_factory: pytest.TempPathFactory, name: str, temperature: float) -> None:
    base = tmp_path_factory.getbasetemp()
    for model, seed in (("target", 1), ("draft", 2)):
        if not (base / model).exists():
            random_model(base / model, seed)
    params = SamplingParams(temperature, 30, seed=4, **(EACH if name == "all" else {name: EACH[name]}))  # type: ignore[arg-type]
    plain = SamplingParams(temperature, 30, seed=4)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 105, n).tolist() for n in (1, 20, 70)]
    want = [c.token_ids for c in engine(base / "target").generate(prompts, params)]
    if name not in ("stop_ids", "min_tokens", "top_k", "top_p", "min_p"):
        assert want != [c.token_ids for c in engine(base / "target").generate(prompts, plain)], "the parameter must matter"
    for draft in ("target", "draft"):
        config = DraftConfig(tree_size=13, engine=EngineConfig(kv_tokens=8192, max_rows=256))
        both = SpeculativeEngine(engine(base / "target", page_size=16), drafter(base / draft, config))
        done = both.generate(prompts, params)
        assert [c.token_ids for c in done] == want
        check_empty(both.engine)


def test_min_tokens_and_bias_do_what_they_say(tmp_path: Path) -> None:
    e = engine(random_model(tmp_path, 1))
    free = e.generate([[1]], SamplingParams(1.0, 40, seed=2))[0].token_ids
    stop = tuple(set(free[:3]))
    held = e.generate([[1]], SamplingParams(1.0, 40, seed=2, stop_ids=stop, min_tokens=10))[0].token_ids
    assert len(held) > 10 and not set(held[:10]) & set(stop)
    assert set(e.generate([[1]], SamplingParams(1.0, 9, seed=2, logit_bias={50: 100.0}))[0].token_ids) == {50}
    with pytest.raises(RequestError, match="logit_bias names token 105"):
        e.generate([[1]], SamplingParams(logit_bias={105: 1.0}))


def test_stop_strings_end_a_text_where_they_begin(tmp_path: Path) -> None:
    random_model(tmp_path, 1, byte_tokenizer(), vocab_size=257)
    e = Engine.from_pretrained(tmp_path, device="cpu", sizes=EngineConfig(kv_tokens=1024))
    both = SpeculativeEngine(e, tmp_path, DraftConfig(engine=EngineConfig(kv_tokens=8192, max_rows=256)))
    for seed in range(6):
        free = e.generate(["ab"], SamplingParams(1.0, 60, seed=seed, ignore_eos=True))[0]
        at = next(i for i in range(10, 50) if free.text[i : i + 3].isprintable() and len(free.text[i : i + 3]) == 3)
        stop = (free.text[at : at + 3], "never there")
        params = SamplingParams(1.0, 60, seed=seed, ignore_eos=True, stop=stop)
        done = e.generate(["ab"], params)[0]
        assert done.finish_reason == "stop" and done.text == free.text[: free.text.index(stop[0])]
        assert done.token_ids == free.token_ids[: len(done.token_ids)] and stop[0] in e.tokenizer.decode(done.token_ids)  # type: ignore[union-attr]
        for source in (e, both):
            chunks = list(source.stream("ab", params))
            assert "".join(c.text for c in chunks) == done.text
            assert [i for c in chunks for i in c.token_ids] == done.token_ids
        check_empty(e)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        engine(tmp_path).generate([[1]], SamplingParams(stop=("x",)))


def test_ids_that_a_model_does_not_know_are_no_fault(tmp_path: Path) -> None:
    """Stop ids past the vocabulary with min_tokens, and biases past the draft's: once an IndexError that took all other texts with it."""
    target, draft = random_model(tmp_path / "target", 1), random_model(tmp_path / "draft", 2, vocab_size=90)
    params = SamplingParams(0.8, 12, seed=1, stop_ids=(10**6,), min_tokens=3, logit_bias={100: 3.0}, top_k=2**31 - 1)
    want = engine(target).generate([[1, 2]], params)[0].token_ids
    assert len(want) == 12
    both = SpeculativeEngine(engine(target), drafter(draft))
    assert both.generate([[1, 2]], params)[0].token_ids == want


def test_a_row_of_nan_is_no_crash() -> None:
    asks = [Ask(SamplingParams(1.0, 9, seed=1, top_p=0.5), [1], 1, frozenset(), [()])]
    assert Sampler(VOCAB, LIMIT, torch.device("cpu"))(torch.full((1, VOCAB), float("nan")), asks)[0] in range(LIMIT)
