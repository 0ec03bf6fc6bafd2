"""csrc/cuda against the CPU's ops: the same ids from the same logits whatever the parameters, and the walk of engine/request.py.

The kernels run on the CPU as in test_cuda.py, or on a GPU where there is one (`pytest -m gpu`).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specedge import kernels
from specedge.config import SamplingParams
from specedge.engine.request import walk
from specedge.engine.sampler import Ask, Draw, Sampler
from specedge.kernels import reference
from specedge.kernels.cuda_ops import CudaOps
from specedge.tree import EMPTY, make_tree
from tests.helpers import random_tree
from tests.kernels.test_cuda import emulate

VOCAB, LIMIT = 64, 61
OFF = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": (), "min_tokens": 0}
ON: dict[str, list[Any]] = {
    "repetition_penalty": [0.7, 1.3], "presence_penalty": [-1.0, 1.5], "frequency_penalty": [-0.5, 0.8], "logit_bias": [((3, 2.5), (60, -4.1))],
    "min_tokens": [6, 30],
}  # fmt: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> CudaOps:
    """The ops with smaller blocks, for rows here are short and fibers cost time."""
    return emulate(tmp_path_factory.mktemp("chain"), 64)


def asks_of(rng: np.random.Generator, count: int, filters: bool) -> list[Ask]:
    """`count` texts with random trees of 8 nodes; each parameter is on in half of them."""
    found = []
    for _ in range(count):
        more = {name: values[rng.integers(len(values))] if rng.random() < 0.5 else OFF[name] for name, values in ON.items()}
        if filters:
            more |= {"top_k": int(rng.choice([0, 1, 5, 40])), "top_p": float(rng.choice([1.0, 0.9, 0.3]))}
            more["min_p"] = float(rng.choice([0.0, 0.05, 0.4]))
        params = SamplingParams(float(rng.choice([0.0, 0.3, 1.0, 1.7])), 40, seed=int(rng.integers(2**63)), **more)
        tokens = rng.integers(0, VOCAB, int(rng.integers(1, 20))).tolist()
        tree = random_tree(rng, 8, 0.5, [], VOCAB)
        stop = frozenset(rng.integers(0, VOCAB + 9, 3).tolist())
        found.append(Ask(params, tokens, int(rng.integers(1, len(tokens) + 1)), stop, tree.texts()))
    return found


def chain(ops: Any, logits: Tensor, draw: Draw, table: Tensor) -> Tensor:
    """Sampler.sample by the ops of `ops`."""
    ops.fill_noise(table, draw.fills)
    ops.adjust(logits, draw.rows, draw.penalties, draw.edits, draw.bias, draw.paths)
    if draw.filters:
        logits = ops.truncate(logits, draw.inv_temperature, draw.log_min_p, draw.top_k, draw.top_p, LIMIT)
    ids: Tensor = ops.sample(logits, table, draw.noise_row, draw.inv_temperature, LIMIT)
    return ids


def batches(rows: int, seed: int) -> Iterator[tuple[Tensor, Draw, int]]:
    """Logits, coarse ones among them so that there are ties, and how to draw from them, until there were `rows` rows; one batch in 8 has filters."""
    rng, done, turn = np.random.default_rng(seed), 0, 0
    while done < rows:
        sampler = Sampler(VOCAB, LIMIT, torch.device("cpu"), 4096)
        draw = sampler.draw(asks_of(rng, 100, turn % 8 == 0))
        logits = torch.from_numpy(rng.normal(0, 3, (len(draw.rows), VOCAB)).astype(np.float32))
        yield (logits.mul(2).round() if turn % 2 else logits), draw, len(sampler.noise.table)
        done, turn = done + len(logits), turn + 1


def same_ids(ops: Any, device: torch.device, rows: int, seed: int) -> None:
    for logits, draw, capacity in batches(rows, seed):
        want = chain(kernels, logits.clone(), draw, torch.full((capacity, VOCAB), float("nan")))
        there = replace(draw, **{name: getattr(draw, name).to(device) for name in draw.__slots__ if isinstance(getattr(draw, name), Tensor)})
        got = chain(ops, logits.to(device), there, torch.full((capacity, VOCAB), float("nan"), device=device))
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("rows", [10_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_ids_are_those_of_the_cpu(emulated: CudaOps, rows: int) -> None:
    same_ids(emulated, torch.device("cpu"), rows, rows)


@pytest.mark.gpu
def test_ids_on_a_gpu_are_those_of_the_cpu() -> None:
    if kernels.backend("cuda") != kernels.CAPTURABLE:
        pytest.skip("the CUDA ops are not built: python setup.py build_ext --inplace, with nvcc on the PATH")
    rows = 1_000_000 if kernels.backend() != "torch" else 50_000  # the CPU's part is slow without the C++ ops
    same_ids(kernels, torch.device("cuda"), rows, 7)


def test_adjusted_logits_are_the_reference(emulated: CudaOps) -> None:
    changed = 0
    for logits, d, _ in batches(2000, 3):
        ours, law = logits.clone(), logits.clone()
        emulated.adjust(ours, d.rows, d.penalties, d.edits, d.bias, d.paths)
        reference.adjust(law, d.rows, d.penalties, d.edits, d.bias, d.paths)
        assert torch.equal(ours, law)
        changed += int((law != logits).sum())
    assert changed > 1000


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 4), st.booleans())
def test_accept_is_the_walk(emulated: CudaOps, seed: int, count: int, wide: bool) -> None:
    """Random trees below random chains, some of them prompt chunks or padding; stop ids and room that end the walk early."""
    rng = np.random.default_rng(seed)
    size, heads, dim, layers, vocab = 16, 2, 8, 2, 3 if not wide else 6
    plans, want = [], []
    rows, k0, n = 2, 3, 0
    segments, verify, stops, tokens, sampled, seen = [], [], list[int](), [7, 7], list[int](), [0, 0]
    for _ in range(count):
        kind = rng.choice(["tree", "tree", "chunk", "padding"])
        made = int(rng.integers(1, 240 if wide else 20))
        tree = random_tree(rng, made, 0.7, [], vocab) if kind == "tree" else EMPTY
        chain_len = int(rng.integers(1, min(40, 257 - len(tree)))) if kind != "padding" else 0
        nq, asked, prefix = chain_len + len(tree), kind == "tree" or (kind == "chunk" and rng.random() < 0.5), int(rng.integers(0, 50))
        own = rng.integers(0, vocab, len(tree) + 1).tolist() if asked else []
        stop, room = frozenset(rng.integers(0, vocab + 3, int(rng.integers(0, 2))).tolist()), int(rng.integers(1, 12))
        segments.append((rows, nq, k0, nq, prefix, int(not len(tree))))
        verify.append((n if asked else -1, chain_len, room, len(stops), len(stops) + len(stop)))
        below = (1 << chain_len - 1) - 1 if chain_len else 0
        tokens += rng.integers(0, vocab, chain_len).tolist() + tree.tokens.tolist()
        seen += ([(1 << i + 1) - 1 for i in range(chain_len - 1)] + [below | a << chain_len - 1 for a in tree.ancestors()]) if chain_len else []
        if asked:
            row, path, last, finish = walk(tree, own, stop, room)
            want.append((row, last, {"": 0, "stop": 1, "length": 2}[finish]))
            kept = [*range(chain_len), *(chain_len - 1 + r for r in tree.path(row))]
        else:
            want.append(None)
            kept = list(range(chain_len))
        plans.append([(k0 + j, prefix + i) for i, j in enumerate(kept)])
        stops += stop
        sampled += own
        rows, k0, n = rows + nq, k0 + nq + 1, n + len(own)
    words = -(-max(1, *(s[1] for s in segments)) // 64)
    bits = b"".join((a & (1 << 64 * words) - 1).to_bytes(8 * words, "little") for a in seen)
    anc = torch.from_numpy(np.frombuffer(bits, "<i8").reshape(len(seen), words).copy())
    pages = len(segments) * 20
    table = torch.from_numpy(rng.permutation(pages).reshape(len(segments), 20).astype(np.int32))
    rows_kv = torch.randn(layers, 2, k0 + 2, heads, dim, generator=torch.Generator().manual_seed(seed % 2**31))
    law = torch.full((layers, 2, pages, heads, size, dim), float("nan"))
    for b, plan in enumerate(plans):
        for slot, token in plan:
            law[:, :, table[b, token // size], :, token % size] = rows_kv[:, :, slot]
    args = (torch.tensor(segments, dtype=torch.int32), table, torch.tensor(tokens), anc, torch.tensor(sampled + [0]),
            torch.tensor(verify, dtype=torch.int32), torch.tensor([*stops, 0], dtype=torch.int32))  # fmt: skip
    for op in (reference.accept, emulated.accept):
        got = torch.full_like(law, float("nan"))
        results = op(rows_kv, got, *args).tolist()
        assert torch.equal(got.nan_to_num(99.0), law.nan_to_num(99.0))
        assert [tuple(r) if w else None for r, w in zip(results, want, strict=True)] == want


def test_a_path_through_every_word(emulated: CudaOps) -> None:
    """A chain of 255 nodes, all accepted, and cut short by room at any length."""
    n = 256
    anc = torch.from_numpy(np.frombuffer(b"".join(((1 << i + 1) - 1).to_bytes(32, "little") for i in range(n)), "<i8").reshape(n, 4).copy())
    tokens, rows_kv = torch.arange(n), torch.randn(1, 2, n, 1, 8)
    tree = make_tree(list(range(1, n)), list(range(n - 1)))
    for room in (1, 2, 64, 65, 255, 256, 257):
        row, _, last, finish = walk(tree, list(range(1, n + 1)), frozenset(), room)
        pages = torch.zeros(1, 2, 16, 1, 16, 8)
        args = torch.tensor([[0, n, 0, n, 0, 0]], dtype=torch.int32), torch.arange(16, dtype=torch.int32)[None], tokens, anc, tokens + 1
        verdict = emulated.accept(rows_kv, pages, *args, torch.tensor([[0, 1, room, 0, 0]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        assert verdict.tolist() == [[row, last, {"": 0, "length": 2}[finish]]]
        flat = pages.flatten(2, 4)
        assert torch.equal(flat[:, :, : row + 1], rows_kv.flatten(2, 3)[:, :, : row + 1]) and not flat[:, :, row + 1 :].any()
