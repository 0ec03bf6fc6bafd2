"""Every sampling parameter beside every other one and below trees of every kind: verification gives the ids of plain decoding.

`make test` runs a set of cells in which any two values meet; `make test-full` runs all of those of what changes the odds of tokens, each with some
values of the others, which takes a minute and a half.
"""

import itertools
import random
from typing import Any

import numpy as np
import pytest

from specedge import kernels
from specedge.config import SamplingParams
from specedge.engine.engine import Engine
from specedge.engine.request import Logprobs
from specedge.engine.runner import Runner
from tests.helpers import check_empty, covers_all_pairs, pairwise, random_model, random_tree, runner

# Off and on, for a filter that is on works alike at any strength (tests/engine/test_sampler.py tries several against a slow reading of the rules);
# three temperatures, for greedy rows go another way and a hot one reaches unlikely tokens. A tree is (nodes, share of them that is true).
# Two parameters are not here, for they belong to the side of the text and verification knows neither: strings of `stop` are looked for in what it has
# given (tests/test_stop.py), and `n` is so many texts.
LEVELS: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 0.8, 1.6), "top_k": (0, 5), "top_p": (1.0, 0.8), "min_p": (0.0, 0.1), "repetition_penalty": (1.0, 1.5),
    "presence_penalty": (0.0, 1.0), "frequency_penalty": (0.0, 0.7), "logit_bias": ((), ((7, 5.0), (8, -100.0))), "min_tokens": (0, 14),
    "stop_ids": ((), (3, 4, 5, 6, 7, 8, 9)), "max_tokens": (24, 5), "ignore_eos": (True, False), "logprobs": (None, 2),
    "tree": ((1, 1.0), (12, 0.8), (60, 0.5)),
}  # fmt: skip
SAMPLING = list(LEVELS)[:-1]
ODDS, OTHERS = SAMPLING[:10], SAMPLING[10:]
EOS = tuple(range(40, 46))  # as many as stop ids: of 24 tokens one in five is one of them
PROMPTS = [[17], [(5 * i + i * i) % 105 for i in range(40)]]
COVER = pairwise(*LEVELS.values())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return runner(random_model(tmp_path_factory.mktemp("model"), 1), page_size=16, kv_tokens=1024, max_rows=140)


Found = tuple[list[int], str, list[Logprobs]]  # ids of a text, how it ended, log-probabilities


def parameters(names: list[str], values: tuple[Any, ...]) -> SamplingParams:
    given = dict(zip(names, values, strict=True))
    return SamplingParams(seed=4, **{**given, "min_tokens": min(given["min_tokens"], given["max_tokens"])})


def plain(model: Runner, params: SamplingParams) -> list[Found]:
    return [(c.token_ids, c.finish_reason, c.logprobs or []) for c in Engine(model, eos_ids=EOS).generate(PROMPTS, params)]


def verified(model: Runner, params: SamplingParams, tree: tuple[int, float], truth: list[Found]) -> list[Found]:
    """The texts, decoded by verifying random trees alone."""
    e, rng = Engine(model, eos_ids=EOS), np.random.default_rng(0)
    texts = [e.open(p, params) for p in PROMPTS]
    logprobs = {s: list[Logprobs]() for s in texts}
    while not all(s.finish for s in texts):
        for s, prompt, (true, _, _) in zip(texts, PROMPTS, truth, strict=True):
            if not s.finish and s.tree is None:
                e.offer(s, random_tree(rng, *tree, true[len(s.tokens) - len(prompt) :], 105))
        for v in e.step():
            logprobs[v.sequence] += v.logprobs or ()
    check_empty(e)
    return [(s.tokens[s.prompt_len :], s.finish, logprobs[s]) for s in texts]


def check(model: Runner, params: SamplingParams, trees: list[tuple[int, float]]) -> None:
    """Ids, ends and, bit for bit, log-probabilities are the plain ones; plain torch may round those otherwise where other rows are beside them."""
    want = plain(model, params)
    assert all(len(logprobs) == (0 if params.logprobs is None else len(ids)) for ids, _, logprobs in want)
    for tree in trees:
        got = verified(model, params, tree, want)
        assert [g[:2] for g in got] == [w[:2] for w in want], (params, tree)
        assert [[p.token_id for p in g[2]] for g in got] == [[p.token_id for p in w[2]] for w in want]
        if kernels.backend() != "torch":
            assert got == want, (params, tree)


def test_the_cells_cover_every_pair() -> None:
    assert covers_all_pairs(COVER, *LEVELS.values())
    assert not covers_all_pairs(COVER[:-1], *LEVELS.values()), "and none of them is there for nothing"


def test_the_parameters_that_end_a_text_matter(model: Runner) -> None:
    """In the cells above texts end at an id of the model, pass one by, and come to their last token, soon or late."""
    each = [parameters(SAMPLING, cell[:-1]) for cell in COVER]
    found = [(p, *text[:2]) for p in each for text in plain(model, p)]
    assert any(end == "stop" and ids[-1] in EOS for p, ids, end in found if not p.ignore_eos)
    assert any(set(ids) & set(EOS) for p, ids, _ in found if p.ignore_eos)
    assert {len(ids) for _, ids, end in found if end == "length"} == {5, 24}


@pytest.mark.parametrize("cell", COVER, ids=lambda cell: "-".join(map(str, cell)))
def test_verification_gives_the_plain_ids(cell: tuple[Any, ...], model: Runner) -> None:
    check(model, parameters(SAMPLING, cell[:-1]), [cell[-1]])


@pytest.mark.full
@pytest.mark.parametrize("first", list(itertools.product(*list(LEVELS.values())[:4])), ids=lambda cell: "-".join(map(str, cell)))
def test_verification_gives_the_plain_ids_in_every_cell(first: tuple[Any, ...], model: Runner) -> None:
    rng = random.Random(repr(first))
    for rest in itertools.product(*(LEVELS[name] for name in ODDS[4:])):
        others = tuple(rng.choice(LEVELS[name]) for name in OTHERS)
        check(model, parameters(SAMPLING, first + rest + others), list(LEVELS["tree"]))
