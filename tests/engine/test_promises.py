"""What is promised about bits (docs/kernels.md): P1 by torch.equal, P2 by teacher forcing, on the CPU and, marked gpu, on a GPU.

P1: the same request and tree give the same bits in every run and in any batch of one bucket. P2: other groupings of rows (one by one, chunks,
trees) may round otherwise, and the token of a position may then flip only where the two best of logits / T + g are closer than BOUND.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import specedge
from specedge import kernels
from specedge.config import EngineConfig, SamplingParams
from specedge.engine.batch import StepBatch
from specedge.engine.buckets import Bucket
from specedge.engine.engine import Engine
from specedge.engine.graphs import Passes
from specedge.engine.runner import Runner
from specedge.engine.sampler import Draw
from specedge.tree import make_tree
from tests.engine.test_model import Text
from tests.helpers import random_tree

DEMO = Path(specedge.__file__).parent / "demo"
# Of logits / T + g. Logits of the demo reach 20; float32 keeps 2^-24 of them. In bfloat16 two of them, each rounded by the head to steps of 2^-3 and
# by the layers before it by 2^-8: 2 (0.125 + 0.075) / 0.8. docs/kernels.md has more.
BOUND = {"float32": 1e-3, "bfloat16": 0.5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TEMPERATURE, SEED = 0.8, 11


def load(device: str, dtype: str) -> Runner:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return Runner.load(DEMO / "target", EngineConfig(kv_tokens=2048), 512, device, dtype, False)


@pytest.fixture(scope="module")
def text() -> list[int]:
    """What the target writes in float32 on the CPU."""
    prompt = "import os\n\n\nclass Reader:\n    def __init__(self, path):\n"
    with Engine.from_pretrained(DEMO / "target", device="cpu") as e:
        done = e.generate([prompt], SamplingParams(TEMPERATURE, 120, seed=SEED, ignore_eos=True))[0]
        assert e.tokenizer is not None
        return [*e.tokenizer.encode(prompt), *done.token_ids]


def by_chunks(r: Runner, tokens: list[int], n: int) -> torch.Tensor:
    """Logits of every position, `n` rows a pass, as a chunk."""
    return Text(r, tokens).run(n).float().cpu()


def by_trees(r: Runner, tokens: list[int], n: int) -> torch.Tensor:
    """The same, each pass a tree whose first branch is the text; its other nodes are wrong."""
    rng, t, found = np.random.default_rng(0), Text(r, tokens), list[torch.Tensor]()
    while t.computed < len(tokens):
        true = tokens[t.computed + 1 : t.computed + n]
        wrong = random_tree(rng, n, 0.5, [], 4000)
        parents = [*range(len(true)), *(p + (len(true) if p else 0) for p in wrong.parents.tolist())]
        batch = r.batch()
        t.add(batch, 1, make_tree([*true, *wrong.tokens.tolist()], parents))
        found.append(r.run(batch)[: len(true) + 1].cpu().clone())
        t.commit(len(true) + 1)
    return torch.cat(found)


def flips(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """By how much the token of `a` had won, at every position where `b` chooses another."""
    gaps = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        g = kernels.gumbel(SEED, i + 1, len(x))
        x, y = x / TEMPERATURE + g, y / TEMPERATURE + g
        if x.argmax() != y.argmax():
            gaps.append(float(x.topk(2).values.diff().abs()))
    return gaps


@pytest.mark.parametrize(
    ("device", "dtype", "ops"),
    [("cpu", "float32", "best"), ("cpu", "float32", "torch"), *(pytest.param("cuda", d, "best", marks=pytest.mark.gpu) for d in BOUND)],
)
def test_a_token_flips_only_at_a_near_tie(device: str, dtype: str, ops: str, text: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if ops == "torch":  # a machine without a compiler: promises P2, not equality
        monkeypatch.setattr(kernels, "_ops_of", lambda _: kernels._TORCH)
        monkeypatch.setattr("specedge.kernels.linear.backend", lambda: "torch")
    r = load(device, dtype)
    one = by_chunks(r, text, 1)
    for other in (by_chunks(r, text, 64), by_trees(r, text, 16)):
        far = [gap for gap in flips(one, other) if gap >= BOUND[dtype]]
        assert far == [], f"largest difference of a logit: {float((one - other).abs().max())}"
        if device == "cpu" and ops == "best" and kernels.backend() != "torch":
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_same_request_has_the_same_bits(device: str, dtype: str, text: list[int]) -> None:
    """Run to run, alone and beside others, in one bucket; on a GPU these are replays of one graph."""
    if device == "cpu" and kernels.backend() == "torch":
        pytest.skip("bits are promised by the C++ ops only")
    r = load(device, dtype)

    def program(batch: StepBatch, draw: Draw, verify: torch.Tensor, stops: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (r.model.forward(batch, r.rows, r.pages),)

    bucket = Bucket(64, 4, 64, 16)
    passes, rng = Passes(r, [bucket], program), np.random.default_rng(1)
    mine, other = Text(r, text[:100]), Text(r, text[50:90])
    mine.pages, other.pages = list(range(4)), list(range(8, 12))
    mine.run(50)
    other.run(20)
    mine.computed, other.computed = 99, 30
    tree = random_tree(rng, 20, 0.6, [], 4000)

    def run(*before: int) -> torch.Tensor:
        batch = r.batch()
        for n in before:
            other.add(batch, n)
        first = batch.rows
        mine.add(batch, 1, tree)
        return passes.fetch(passes.run(bucket, batch.arrays()))[0][first : batch.rows].clone()

    alone = run()
    for before in ((), (), (10,), (1, 7)):
        assert torch.equal(run(*before), alone)
