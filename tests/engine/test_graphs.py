"""What is captured on a GPU, run on the CPU in the same padded shapes: the bits of a pass, the ids of texts, the trees of drafts.

With CUDA_OPS the kernels of csrc/cuda take part too, on the CPU as in tests/kernels/test_cuda.py. What only a GPU can show is marked gpu.
"""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specedge import kernels
from specedge.config import DraftConfig, EngineConfig, ModelConfig, SamplingParams
from specedge.engine import graphs
from specedge.engine import runner as runners
from specedge.engine.batch import StepBatch
from specedge.engine.buckets import Bucket, buckets, fits, kv_tokens_that_fit, layout, least_bucket, pack, size
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine
from specedge.engine.graphs import CapturedScorer, CapturedVerifier, Passes
from specedge.engine.runner import DeviceError, Runner, sizes_for
from specedge.engine.speculative import SpeculativeEngine
from specedge.kernels.cuda_ops import CudaOps
from tests.engine.cuda_stand_in import StandIn
from tests.engine.test_model import Text
from tests.helpers import check_empty, drafter, engine, random_model, random_tree, runner
from tests.kernels.test_cuda import emulate

EVERY = {
    "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, "logit_bias": {7: 3.0, 9: -2.0},
    "min_tokens": 5, "stop_ids": (3, 8, 40),
}  # fmt: skip
GPU_8B = ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, 1e-5, 5e5, 131072, False)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), 1)


@pytest.fixture(params=["ops", "cuda"])
def ops(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's ops, or those of csrc/cuda in their place where there are any."""
    if request.param == "cuda":
        cuda: CudaOps = emulate(tmp_path, 64)
        names = ("accept", "adjust", "fill_noise", "sample", "truncate")
        mixed = replace(kernels._CPU, **{name: getattr(cuda, name) for name in names})
        monkeypatch.setattr(kernels, "_ops_of", lambda _: mixed)


def captured(e: Any) -> Any:
    """An engine whose steps run as on a GPU."""
    e._verify = CapturedVerifier(e.runner, graphs.Sampler(e.vocab, e.vocab, e.runner.device, e.runner.sizes.max_rows))
    return e


@given(st.integers(2, 3000), st.integers(1, 300), st.data())
def test_a_batch_finds_the_least_bucket(max_rows: int, max_segments: int, data: st.DataObject) -> None:
    among = buckets(max_rows, min(max_rows, max_segments), 64, 700, 64)
    rows = data.draw(st.integers(1, max_rows))
    segments, wanted = data.draw(st.integers(1, min(rows, max_segments, max_rows))), data.draw(st.integers(0, rows))
    pages = data.draw(st.integers(1, 700))
    bucket = least_bucket(among, Bucket(rows, segments, wanted, pages))
    assert bucket is not None and bucket.pages in (32, 512, 700) and bucket.pages >= pages
    assert bucket.rows >= rows and bucket.segments >= segments and bucket.wanted >= wanted
    assert bucket.rows <= max(64, 2 * rows) and among[0] == max(among) and len(among) <= 360
    assert least_bucket(among, Bucket(max_rows + 1, 1, 1, 1)) is None is least_bucket(among, Bucket(1, 1, 1, 701))


def test_fields_lie_apart_and_are_padded() -> None:
    fields_ = layout(Bucket(16, 3, 8, 5), 33, 77)
    buffer = np.full(size(fields_), 255, np.uint8)
    arrays = {"tokens": np.arange(9), "page_table": np.ones((2, 4), np.int32), "anc": np.full((9, 2), -1)}
    assert fits(fields_, arrays) and not fits(fields_, {"tokens": np.arange(17)})
    pack(buffer, fields_, arrays)
    spans = sorted((f.offset, f.offset + int(np.prod(f.shape)) * f.dtype.itemsize) for f in fields_.values())
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)) and all(first % 16 == 0 for first, _ in spans)
    views = {n: buffer[f.offset :][: int(np.prod(f.shape)) * f.dtype.itemsize].view(f.dtype).reshape(f.shape) for n, f in fields_.items()}
    assert views["tokens"].tolist() == [*range(9), *[0] * 7] and (views["slots"] == 32).all()
    assert views["page_table"].tolist() == [[1, 1, 1, 1, 77], [1, 1, 1, 1, 77], [77] * 5] and not views["segments"].any()
    assert (views["anc"][:9, :2] == -1).all() and not views["anc"][:, 2:].any() and not views["anc"][9:].any()
    assert (views["noise_row"] == -2).all() and (views["fills"] == -1).all() and (views["log_min_p"] == -np.inf).all()
    assert {f.name for f in fields(StepBatch)} <= set(fields_) and {f.name for f in fields(graphs.Draw)} - {"filters", "noisy"} <= set(fields_)


def test_padding_does_not_change_a_bit(path: Path) -> None:
    """Chunk, tree and single row together, alone in their shapes and in the corner of three buckets."""
    if kernels.backend() == "torch":
        pytest.skip("bits are promised by the C++ ops only")
    rng = np.random.default_rng(0)
    r = runner(path, page_size=16, max_rows=128)
    texts = [Text(r, rng.integers(0, 105, n).tolist()) for n in (40, 61, 3)]
    for i, text in enumerate(texts):
        text.pages = list(range(20 * i, 20 * i + 20))
        text.run(17)
        text.computed = len(text.tokens) - (10 if i == 0 else 1)
    batch = r.batch()
    texts[0].add(batch, 10)
    texts[1].add(batch, 1, random_tree(rng, 20, 0.5, [], 105))
    texts[2].add(batch, 1)
    want = r.run(batch)
    rows, pages = r.rows.clone(), r.pages.clone()

    def program(batch: StepBatch, draw: Any, verify: Any, stops: Any) -> tuple[torch.Tensor, ...]:
        return (r.model.forward(batch, r.rows, r.pages),)

    for bucket in (Bucket(64, 4, 64, 32), Bucket(128, 16, 64, 20), Bucket(33, 3, 40, 99)):
        r.rows.fill_(float("nan"))
        (got,) = Passes(r, [bucket], program).run(bucket, batch.arrays())
        assert torch.equal(got[: len(want)], want) and torch.equal(r.pages, pages)
        assert torch.equal(r.rows[:, :, : batch.rows], rows[:, :, : batch.rows]) and r.rows[:, :, batch.rows : -1].isnan().all()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_have_the_same_ids(path: Path, ops: None, temperature: float) -> None:
    """Many at a time, with every parameter, with trees and without; pages end up the same."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 105, n).tolist() for n in (1, 20, 70, 150)]
    each = [SamplingParams(temperature, 24, seed=5), SamplingParams(temperature, 24, seed=6, **EVERY)]  # type: ignore[arg-type]
    each.append(SamplingParams(temperature, 9, seed=7, logprobs=2))
    plain, ours = engine(path, page_size=16, max_rows=96), captured(engine(path, page_size=16, max_rows=96))
    both = SpeculativeEngine(ours, drafter(path, DraftConfig(tree_size=11, engine=EngineConfig(kv_tokens=8192, max_rows=256))))
    for params in each:
        want = [(c.token_ids, c.finish_reason, c.logprobs) for c in plain.generate(prompts, params)]
        assert [(c.token_ids, c.finish_reason, c.logprobs) for c in ours.generate(prompts, params)] == want
        drafted = both.generate(prompts, params)
        assert [(c.token_ids, c.finish_reason, c.logprobs) for c in drafted] == want
        assert sum(c.speculation.accepted for c in drafted) > 10
    check_empty(ours)


def test_what_has_no_room_in_a_bucket_runs_without(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(0.8, 12, seed=1, repetition_penalty=1.2)
    want = [c.token_ids for c in engine(path).generate([[1, 2, 3], [4]], params)]
    monkeypatch.setattr("specedge.engine.buckets.EDITS", 2)
    assert [c.token_ids for c in captured(engine(path)).generate([[1, 2, 3], [4]], params)] == want


def test_drafts_are_the_same_trees(path: Path, tmp_path: Path, ops: None) -> None:
    config = DraftConfig(tree_size=21, width=4, depth=5, engine=EngineConfig(kv_tokens=8192, max_rows=256))  # a depth: no times decide
    target, draft = engine(path), random_model(tmp_path / "draft", 2)
    params = [SamplingParams(0.9, 30, seed=2), SamplingParams(0.0, 30), SamplingParams(0.7, 30, seed=3, **EVERY)]  # type: ignore[arg-type]
    found = []
    for ours in (False, True):
        d = drafter(draft, config)
        if ours:
            sampler = graphs.Sampler(105, 105, d.runner.device, 256)
            d._score = CapturedScorer(d.runner, sampler, config.max_sessions, config.width, config.tau, config.branch)
        both = SpeculativeEngine(target, d)
        found.append([(c.token_ids, c.speculation) for p in params for c in both.generate([[1, 2, 3], [5] * 90], p)])
    assert found[0] == found[1]


def test_noise_of_the_largest_draft_fits_its_table(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that grows moves, and captured graphs would go on with what was its memory."""
    monkeypatch.setattr(kernels, "backend", lambda _: kernels.CAPTURABLE)
    scorer = graphs.make_scorer(runner(path, page_size=16, max_rows=4), 105, 3, 8, 1.0, 4)
    assert isinstance(scorer, CapturedScorer)
    noise = scorer._sampler.noise
    table = noise.table
    noise.assign([(seed, 7) for seed in range(3 + 8)])
    assert noise.table is table


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, e: Any, stand_in: StandIn) -> Any:
    """`e` with captured steps, on a stand-in for a GPU."""
    once = Passes._once

    def noted(self: Passes, bucket: Bucket) -> Any:
        outputs = once(self, bucket)
        stand_in.last = (lambda: once(self, bucket)), outputs
        return outputs

    monkeypatch.setattr(Passes, "_once", noted)
    monkeypatch.setattr(graphs, "torch", stand_in)
    monkeypatch.setattr(e.runner, "device", SimpleNamespace(type="cuda"))
    sampler = graphs.Sampler(e.vocab, e.vocab, torch.device("cpu"), e.runner.sizes.max_rows)
    e._verify = CapturedVerifier(e.runner, sampler)
    e._verify._uncaptured = None  # nothing here needs it
    return e


def test_steps_are_replays_of_captured_graphs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a GPU: largest first, two buffers in turn, one wait for a step with verdicts and none for a prompt chunk."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 105, n).tolist() for n in (300, 5)]
    params = SamplingParams(0.9, 8, seed=5, repetition_penalty=1.2)
    want = [c.token_ids for c in engine(path, max_rows=128, max_sequences=8).generate(prompts, params)]
    stand_in = StandIn()
    e = on_a_gpu(monkeypatch, engine(path, max_rows=128, max_sequences=8), stand_in)
    graphs_of = e._verify._passes._graphs
    assert list(graphs_of) == sorted(graphs_of, reverse=True) and len(stand_in.captured) == len(graphs_of) > 3
    assert stand_in.streams == 1  # each costs a workspace of the matrix library for good
    copies = stand_in.events[:2]
    before, steps = sum(c.recorded for c in copies), 0
    e.run_until(e.open(prompts[0], params), len(prompts[0]) + 8)
    found: dict[int, list[int]] = {}
    timed, waited = list[tuple[Any, ...]](), True
    monkeypatch.setattr(e.cost, "observe", lambda *step: timed.append(step))
    while e.busy:
        known = len(timed)
        waits, verdicts, steps = len(stand_in.events), e.step(), steps + 1
        assert len(timed) - known == (bool(verdicts) and waited)  # a step that was not waited for has no time, nor has the next
        waited = bool(verdicts)
        assert len(stand_in.events) - waits == bool(verdicts) and all(event.waited for event in stand_in.events[waits:])
        for v in verdicts:
            found.setdefault(v.sequence.number, []).extend(v.tokens)
        if steps == 1:  # which was a chunk alone
            assert not verdicts
            e.run_until(e.open(prompts[1], params), len(prompts[1]) + 8)
    assert 0 < len(timed) <= steps - 2
    assert list(found.values()) in (want, want[::-1]) and sorted(map(tuple, found.values())) == sorted(map(tuple, want))
    assert sum(c.recorded for c in copies) - before == steps == sum(g.replays for g in stand_in.captured)
    assert abs(copies[0].recorded - copies[1].recorded) <= 1 and min(c.waited for c in copies) > 0
    check_empty(e)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("accept could not be launched: CUDA error 2"),
    ],
    ids=["torch", "cublas", "cublasLt", "triton", "csrc"],
)
def test_what_is_too_large_to_capture_is_said(path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(graphs, "there_is", lambda _: "0.2 of 24.0 GB are free")
    e = engine(path, max_rows=128)
    want = "passes of 128 rows do not fit .* 4096 tokens of K/V .0.2 of 24.0 GB are free.: ask for fewer kv_tokens"
    with pytest.raises(DeviceError, match=want), graphs.memory_said(e.runner):
        on_a_gpu(monkeypatch, e, StandIn(2, error))


def test_what_else_goes_wrong_is_not_taken_for_memory(path: Path) -> None:
    with pytest.raises(RuntimeError, match="error 209"), graphs.memory_said(engine(path).runner):
        raise RuntimeError("accept could not be launched: CUDA error 209")


def test_pages_are_sized_by_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 8B model in bfloat16 (16 GB of weights) on GPUs of 141 and 24 GB, and on one that is too small."""
    sizes, gb = EngineConfig(), 10**9
    large = kv_tokens_that_fit(GPU_8B, sizes, 2, 124 * gb, 141 * gb)
    assert large % 64 == 0 and 700_000 < large < 0.9 * 124e9 / 131072
    assert 5_000 < kv_tokens_that_fit(GPU_8B, sizes, 2, 7 * gb, 24 * gb) < 40_000
    assert kv_tokens_that_fit(GPU_8B, sizes, 2, 2 * gb, 18 * gb) == 0
    cuda = torch.device("cuda")
    monkeypatch.setattr(runners.torch.cuda, "mem_get_info", lambda _: (2 * gb, 18 * gb))
    monkeypatch.setattr(runners.torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(DeviceError, match=r"no room for K/V: 2.0 of 18.0 GB are free, passes of 512 rows take .* GB, and 90% may be used"):
        sizes_for(GPU_8B, sizes, cuda, 2)
    assert sizes_for(GPU_8B, EngineConfig(kv_tokens=640), cuda, 2).tokens == 640 and sizes_for(GPU_8B, sizes, torch.device("cpu"), 2).tokens == 16384


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_on_a_gpu(path: Path, dtype: str) -> None:
    """Captured steps and drafts: the CPU's ids in float32 (no near tie in these texts), the same ids in every run in bfloat16."""
    if kernels.backend("cuda") != kernels.CAPTURABLE:
        pytest.skip("the CUDA ops are not built: python setup.py build_ext --inplace, with nvcc on the PATH")
    sizes, prompts = EngineConfig(kv_tokens=4096, page_size=16, max_rows=128, max_sequences=8), [[1, 2, 3], [5] * 90, [7]]
    each = [SamplingParams(0.8, 30, seed=2), SamplingParams(0.0, 30), SamplingParams(0.8, 30, seed=3, **EVERY)]  # type: ignore[arg-type]
    target = Engine(Runner.load(path, sizes, sizes.max_rows, "cuda", dtype, False))
    config = DraftConfig(tree_size=15, engine=EngineConfig(kv_tokens=8192, max_rows=256))
    draft = Drafter(Runner.load(path, config.engine, config.max_sessions * 256, "cuda", dtype, False), config)
    assert isinstance(target._verify, CapturedVerifier) and isinstance(draft._score, CapturedScorer)
    plain = [[c.token_ids for c in target.generate(prompts, p)] for p in each]
    again = Engine(target.runner)  # whose prefix cache is empty, as that of `target` was: with other pages rows would be grouped otherwise
    assert [[c.token_ids for c in again.generate(prompts, p)] for p in each] == plain
    drafted = SpeculativeEngine(target, draft).generate(prompts, each[0])
    assert sum(c.speculation.accepted for c in drafted) > 10
    if dtype == "float32":
        law = engine(path, page_size=16)
        assert plain == [[c.token_ids for c in law.generate(prompts, p)] for p in each]
        assert [c.token_ids for c in drafted] == plain[0]
    check_empty(target)
