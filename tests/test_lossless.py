"""Losslessness is equality of ids: Engine = SpeculativeEngine = Edge, whatever drafts, however many share the server, at any temperature.

`make test` runs a set of cells in which every pair of values occurs; `make test-full` runs them all.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from specedge.cli import DEMO
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.autopilot import Autopilot
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine
from specedge.engine.speculative import SpeculativeEngine
from specedge.net.edge import Edge
from specedge.net.server import Server
from specedge.text import Tokenizer
from tests.helpers import check_empty, covers_all_pairs, pairwise, random_model

PROMPTS = [
    "def fibonacci(n):", "import os\n\n\nclass Reader:\n    def __init__(self, path):\n", "\n", "    for i in range(",
    "try:\n    import json\nexcept", "# " + "the quick brown fox " * 12,
]  # fmt: skip
TOKENS = 40
TEMPERATURES, SIZES, SESSIONS, DRAFTS = (0.0, 0.7, 1.0), (0, 1, 7, 31, 63), (1, 6), ("shipped", "random", "target")
SCHEDULING = ("clever", "plain")  # with admission and pipeline, or without
Cell = tuple[float, int, int, str, str]


def cells() -> Iterator[object]:
    short = pairwise(TEMPERATURES, SIZES, SESSIONS, DRAFTS, SCHEDULING)
    for cell in itertools.product(TEMPERATURES, SIZES, SESSIONS, DRAFTS, SCHEDULING):
        yield pytest.param(cell, id="-".join(map(str, cell)), marks=[] if cell in short else [pytest.mark.full])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(DEMO / "target", device="cpu")


@pytest.fixture(scope="module")
def truth(engine: Engine) -> dict[float, list[list[int]]]:
    """What the target writes by itself, one text at a time."""
    found = {t: [engine.generate([p], params(t))[0].token_ids for p in PROMPTS] for t in TEMPERATURES}
    check_empty(engine)
    return found


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    noise = random_model(tmp_path_factory.mktemp("noise"), 8, vocab_size=4096, max_position_embeddings=1024)
    (noise / "tokenizer.json").write_bytes((DEMO / "draft" / "tokenizer.json").read_bytes())
    return {"shipped": DEMO / "draft", "random": noise, "target": DEMO / "target"}


def params(temperature: float) -> SamplingParams:
    return SamplingParams(temperature, TOKENS, seed=21)


def drafter(path: Path, size: int, depth: int | None = None) -> Drafter:
    config = DraftConfig(tree_size=size, depth=depth, engine=EngineConfig(kv_tokens=2048, max_rows=256))
    return Drafter.from_pretrained(path, config, device="cpu")


@pytest.mark.parametrize("cell", list(cells()))
def test_ids_are_equal(cell: Cell, engine: Engine, truth: dict[float, list[list[int]]], drafts: dict[str, Path]) -> None:
    temperature, size, sessions, draft, scheduling = cell
    clever = scheduling == "clever"
    engine.runner.sizes = dataclasses.replace(engine.runner.sizes, admission=clever)
    want, prompts = truth[temperature][:sessions], PROMPTS[:sessions]
    here = SpeculativeEngine(engine, drafter(drafts[draft], size, depth=12))  # a shape that does not depend on times; the edge's does
    done = here.generate(prompts, params(temperature))
    assert [c.token_ids for c in done] == want
    check_empty(engine)
    here.drafter.pool.check()
    if draft == "target" and size >= 31 and temperature == 0.0 and not clever:
        assert all(c.speculation.tokens_per_round(TOKENS) > 2 for c in done), "a perfect draft must pay"

    with Server(engine, pipeline=clever) as server:
        with Edge(server.address, drafter(drafts[draft], size)) as edge:
            over = edge.generate(prompts, params(temperature))
        assert [c.token_ids for c in over] == want
        assert [c.text for c in over] == [c.text for c in done]
        while len(server._sessions):
            pass  # CLOSE is on its way
    check_empty(engine)


def test_the_server_alone_streams_the_same_ids(engine: Engine, truth: dict[float, list[list[int]]]) -> None:
    with Server(engine) as server, Edge(server.address, tokenizer=Tokenizer.from_dir(DEMO / "target")) as edge:
        for t in TEMPERATURES:
            assert [c.token_ids for c in edge.generate(PROMPTS, params(t))] == truth[t]


class Fickle(Autopilot):
    """Changes its mind all the time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng, self.drafts, self.streams = random.Random(seed), 0, 0

    def drafted(self, tokens: int, seconds: float | None, step: float) -> None:
        self._alone = self.rng.choice([0, 0, 1, 2, 7])
        self.drafts += 1

    def streamed(self, tokens: int, seconds: float | None) -> None:
        super().streamed(tokens, seconds)
        self.streams += 1


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ids_do_not_depend_on_who_writes(engine: Engine, truth: dict[float, list[list[int]]], temperature: float) -> None:
    """Rounds and streams follow each other in any order, in six texts at once."""
    with Server(engine) as server, Edge(server.address, drafter(DEMO / "draft", 15)) as edge:
        edge._pilot = pilot = Fickle(int(temperature * 10))
        assert [c.token_ids for c in edge.generate(PROMPTS, params(temperature))] == truth[temperature]
        assert pilot.drafts > 10 and pilot.streams > 10


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_ids_are_equal_in_few_bits(dtype: str) -> None:
    target = Engine.from_pretrained(DEMO / "target", device="cpu", dtype=dtype)
    config = DraftConfig(tree_size=15, engine=EngineConfig(kv_tokens=2048, max_rows=256))
    both = SpeculativeEngine(target, Drafter.from_pretrained(DEMO / "draft", config, device="cpu", dtype=dtype))
    for t in (0.0, 0.8):
        want = [target.generate([p], params(t))[0].token_ids for p in PROMPTS[:4]]
        assert [c.token_ids for c in both.generate(PROMPTS[:4], params(t))] == want
    check_empty(target)


def test_the_pairwise_set_covers_every_pair() -> None:
    values = (TEMPERATURES, SIZES, SESSIONS, DRAFTS, SCHEDULING)
    assert covers_all_pairs(pairwise(*values), *values)


EVERY: dict[str, object] = {
    "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3, "presence_penalty": 0.8, "frequency_penalty": 0.5,
    "logit_bias": {281: -3.0, 12: 2.0}, "min_tokens": 30, "stop": ("return", "raise"), "stop_ids": (281, 13),
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_sampling_parameter_crosses_the_wire(engine: Engine, temperature: float) -> None:
    each = [SamplingParams(temperature, TOKENS, seed=3, **{name: value}) for name, value in EVERY.items()]  # type: ignore[arg-type]
    each.append(SamplingParams(temperature, TOKENS, seed=3, **EVERY))  # type: ignore[arg-type]
    alone = [engine.generate(PROMPTS[:2], p) for p in each]  # before: an engine serves one thread at a time
    with Server(engine) as server, Edge(server.address, drafter(DEMO / "draft", 15)) as edge:
        for p, want in zip(each, alone, strict=True):
            over = edge.generate(PROMPTS[:2], p)
            assert [(c.token_ids, c.text, c.finish_reason) for c in over] == [(c.token_ids, c.text, c.finish_reason) for c in want]
