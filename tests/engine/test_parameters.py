"""Every sampling parameter beside every other one and below trees of every kind: verification gives the ids of plain decoding.

`make test` runs a set of cells in which any two values meet; `make test-full` runs all of them, which takes two minutes and a half.
"""

import itertools
from typing import Any

import numpy as np
import pytest

from specedge.config import SamplingParams
from specedge.engine.engine import Engine
from specedge.engine.runner import Runner
from tests.helpers import check_empty, covers_all_pairs, pairwise, random_model, random_tree, runner

# Off and on, for a filter that is on works alike at any strength (tests/engine/test_sampler.py tries several against a slow reading of the rules);
# three temperatures, for greedy rows go another way and a hot one reaches unlikely tokens. A tree is (nodes, share of them that is true).
LEVELS: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 0.8, 1.6), "top_k": (0, 5), "top_p": (1.0, 0.8), "min_p": (0.0, 0.1), "repetition_penalty": (1.0, 1.5),
    "presence_penalty": (0.0, 1.0), "frequency_penalty": (0.0, 0.7), "logit_bias": ((), ((7, 5.0), (8, -100.0))), "min_tokens": (0, 14),
    "stop_ids": ((), (3, 4, 5, 6, 7, 8, 9)), "tree": ((1, 1.0), (12, 0.8), (60, 0.5)),
}  # fmt: skip
SAMPLING = list(LEVELS)[:-1]
PROMPTS = [[17], [(5 * i + i * i) % 105 for i in range(40)]]
COVER = pairwise(*LEVELS.values())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return runner(random_model(tmp_path_factory.mktemp("model"), 1), page_size=16, kv_tokens=1024, max_rows=140)


def plain(model: Runner, params: SamplingParams) -> list[list[int]]:
    return [c.token_ids for c in Engine(model).generate(PROMPTS, params)]


def verified(model: Runner, params: SamplingParams, tree: tuple[int, float], truth: list[list[int]]) -> list[list[int]]:
    """The texts, decoded by verifying random trees alone."""
    e, rng = Engine(model), np.random.default_rng(0)
    texts = [e.open(p, params) for p in PROMPTS]
    while not all(s.finish for s in texts):
        for s, prompt, true in zip(texts, PROMPTS, truth, strict=True):
            if not s.finish and s.tree is None:
                e.offer(s, random_tree(rng, *tree, true[len(s.tokens) - len(prompt) :], 105))
        e.step()
    check_empty(e)
    return [s.tokens[s.prompt_len :] for s in texts]


def test_the_cells_cover_every_pair() -> None:
    assert covers_all_pairs(COVER, *LEVELS.values())
    assert not covers_all_pairs(COVER[:-1], *LEVELS.values()), "and none of them is there for nothing"


@pytest.mark.parametrize("cell", COVER, ids=lambda cell: "-".join(map(str, cell)))
def test_verification_gives_the_plain_ids(cell: tuple[Any, ...], model: Runner) -> None:
    params = SamplingParams(max_tokens=24, seed=4, **dict(zip(SAMPLING, cell[:-1], strict=True)))
    want = plain(model, params)
    assert verified(model, params, cell[-1], want) == want


@pytest.mark.full
@pytest.mark.parametrize("first", list(itertools.product(*list(LEVELS.values())[:4])), ids=lambda cell: "-".join(map(str, cell)))
def test_verification_gives_the_plain_ids_in_every_cell(first: tuple[Any, ...], model: Runner) -> None:
    for rest in itertools.product(*(LEVELS[name] for name in SAMPLING[4:])):
        params = SamplingParams(max_tokens=24, seed=4, **dict(zip(SAMPLING, first + rest, strict=True)))
        want = plain(model, params)
        for tree in LEVELS["tree"]:
            assert verified(model, params, tree, want) == want, (params, tree)
