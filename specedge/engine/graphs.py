"""Passes on a GPU: captured once for each bucket, replayed with one copy to the device and at most one wait.

A step packs all that its kernels read into pinned memory, copies it, replays the graph of its bucket - forward, sampling, acceptance, commit, or for
a draft forward and scoring - and waits only where somebody wants to know the result. There are two pinned buffers: a step that wants nothing to be
known (prompt chunks) returns at once, and the next is packed while it runs. What fits no bucket, or asks for log-probabilities, runs uncaptured.
On other devices the same programs run in the same padded shapes without a graph, which is how they are tested. Knows nothing of texts or trees.

Invariant: the answers are those of verify.py; nothing between logits and commit passes through the host.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from specedge import kernels
from specedge.engine.batch import BatchBuilder, StepBatch
from specedge.engine.buckets import Bucket, Field, buckets, fits, layout, least_bucket, pack, size
from specedge.engine.runner import DeviceError, Runner, there_is
from specedge.engine.sampler import Ask, Draw, Sampler
from specedge.engine.verify import Found, Job, Scorer, Verifier

LEAST = 64  # rows of a target's smallest bucket
FINISH = ("", "stop", "length")
# torch, Triton and captures of graphs; cuBLAS, for its handle and for its workspace; an op of csrc/cuda
NO_MEMORY = "out of memory|CUBLAS_STATUS_(NOT_INITIALIZED|ALLOC_FAILED)|CUDA error 2$"
Program = Callable[[StepBatch, Draw, Tensor, Tensor], tuple[Tensor, ...]]


@contextmanager
def memory_said(runner: Runner) -> Iterator[None]:
    """Turns memory that runs out into a sentence, whoever asked for it."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(NO_MEMORY, str(error)):
            raise
        raise DeviceError(
            f"passes of {runner.sizes.max_rows} rows do not fit {runner.device} beside the weights and {runner.sizes.tokens} tokens of K/V "
            f"({there_is(runner.device)}): ask for fewer kv_tokens or max_rows"
        ) from None


def make_verifier(runner: Runner, ids: int) -> "Verifier | CapturedVerifier":
    """The verifier for a runner's device, over a vocabulary whose ids at or above `ids` never win."""
    vocab, rows = runner.model.config.vocab, runner.sizes.max_rows
    if kernels.backend(runner.device) != kernels.CAPTURABLE:
        return Verifier(runner, Sampler(vocab, ids, runner.device))
    with memory_said(runner):
        return CapturedVerifier(runner, Sampler(vocab, ids, runner.device, rows))


def make_scorer(runner: Runner, ids: int, sequences: int, width: int, tau: float, best: int) -> "Scorer | CapturedScorer":
    """The scorer for a runner's device, for drafts of up to `sequences` sessions and of about `width` rows a forward."""
    vocab, rows = runner.model.config.vocab, runner.sizes.max_rows
    if kernels.backend(runner.device) != kernels.CAPTURABLE:
        return Scorer(runner, Sampler(vocab, ids, runner.device), tau, best)
    with memory_said(runner):  # a forward asks for the roots and for `width` rows; a table that grew would leave graphs that read the old one
        return CapturedScorer(runner, Sampler(vocab, ids, runner.device, max(rows, sequences + width)), sequences, width, tau, best)


def buckets_of(runner: Runner, sequences: int, least: int) -> list[Bucket]:
    """The buckets of a runner's passes over up to `sequences` sequences."""
    sizes = runner.sizes
    table = -(-runner.context // sizes.page_size)
    return buckets(sizes.max_rows, min(sizes.max_rows, sequences), least, table, sizes.page_size)


class Staging:
    """The way of a step's arrays to the device: two host buffers in turn, one device buffer of fixed address."""

    def __init__(self, device: torch.device, bytes_: int) -> None:
        self._cuda = device.type == "cuda"
        self._host = [torch.zeros(bytes_, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if self._cuda else []  # type: ignore[no-untyped-call]
        self._there = torch.zeros(bytes_, dtype=torch.uint8, device=device)
        self._turn = 0

    def send(self, layout_: Mapping[str, Field], arrays: Mapping[str, np.ndarray]) -> None:
        """Pack `arrays` and begin their copy. Waits only for the copy of the step before the last."""
        self._turn = 1 - self._turn
        if self._cuda:
            self._copied[self._turn].synchronize()
        used, host = size(layout_), self._host[self._turn]
        pack(host.numpy(), layout_, arrays)
        self._there[:used].copy_(host[:used], non_blocking=True)
        if self._cuda:
            self._copied[self._turn].record()

    def views(self, layout_: Mapping[str, Field]) -> dict[str, Tensor]:
        """The arrays where they arrive."""
        found = {}
        for name, f in layout_.items():
            kind = torch.from_numpy(np.zeros(0, f.dtype)).dtype
            found[name] = self._there[f.offset :][: int(np.prod(f.shape)) * f.dtype.itemsize].view(kind).view(f.shape)
        return found


class Passes:
    """One program over the buckets of a runner; on CUDA captured, the largest first, in one pool of memory."""

    def __init__(self, runner: Runner, among: list[Bucket], program: Program) -> None:
        self._runner, self.buckets, self._program = runner, among, program
        self.layouts = {b: layout(b, len(runner.k_pos), runner.sizes.pages) for b in among}
        self._staging = Staging(runner.device, max(size(f) for f in self.layouts.values()))
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        if runner.device.type == "cuda":
            self._capture()

    @torch.inference_mode()
    def _capture(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        aside = torch.cuda.Stream(self._runner.device)  # type: ignore[no-untyped-call]
        for bucket in self.buckets:  # one stream for all: cuBLAS keeps 32 MB of workspace for every stream that it has seen
            self._staging.send(self.layouts[bucket], {})
            aside.wait_stream(torch.cuda.current_stream(self._runner.device))
            with torch.cuda.stream(aside):  # compiles kernels, makes the libraries' handles
                self._once(bucket)
            torch.cuda.current_stream(self._runner.device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                outputs = self._once(bucket)
            self._graphs[bucket] = graph, outputs

    def _once(self, bucket: Bucket) -> tuple[Tensor, ...]:
        v = self._staging.views(self.layouts[bucket])
        batch = StepBatch(**{f.name: v[f.name] for f in fields(StepBatch)})
        draw = Draw(**{f.name: v[f.name] for f in fields(Draw) if f.name in v}, filters=True, noisy=True)
        return self._program(batch, draw, v["verify"], v["stops"])

    @torch.inference_mode()
    def run(self, bucket: Bucket, arrays: Mapping[str, np.ndarray]) -> tuple[Tensor, ...]:
        """Begin a pass; its outputs, on the device, are valid until the next one."""
        self._staging.send(self.layouts[bucket], arrays)
        if bucket not in self._graphs:
            return self._once(bucket)
        graph, outputs = self._graphs[bucket]
        graph.replay()
        return outputs

    def fetch(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The outputs on the host: the one wait of a step."""
        if self._runner.device.type != "cuda":
            return list(outputs)
        there = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in outputs]
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        done.synchronize()
        return there


class CapturedVerifier:
    """As Verifier, without a round trip to the host between logits and commit."""

    waits = False

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        self._runner, self._sampler, self._uncaptured = runner, sampler, Verifier(runner, sampler)
        self._passes = Passes(runner, buckets_of(runner, runner.sizes.max_sequences, LEAST), self._program)

    def _program(self, batch: StepBatch, draw: Draw, verify: Tensor, stops: Tensor) -> tuple[Tensor, ...]:
        r = self._runner
        sampled = self._sampler.sample(r.model.forward(batch, r.rows, r.pages), draw)
        return (kernels.accept(r.rows, r.pages, batch.segments, batch.page_table, batch.tokens, batch.anc, sampled, verify, stops),)

    def __call__(self, batch: BatchBuilder, jobs: list[Job]) -> list[Found | None]:
        """One answer for each job, None for those that want no token."""
        bucket = least_bucket(self._passes.buckets, batch.shape)
        if bucket is None or any(job.sequence.params.logprobs is not None for job in jobs):
            return self._uncaptured(batch, jobs)
        arrays = batch.arrays() | self._sampler.arrays([job.ask for job in jobs if job.grant.token]) | _verification(jobs)
        if not fits(self._passes.layouts[bucket], arrays):
            self._sampler.fill(arrays["fills"])
            return self._uncaptured(batch, jobs)
        outputs = self._passes.run(bucket, arrays)
        if not any(job.grant.token for job in jobs):
            return [None] * len(jobs)
        results = self._passes.fetch(outputs)[0].tolist()
        return [
            Found(job.tree.path(row), last, FINISH[end]) if job.grant.token else None for job, (row, last, end) in zip(jobs, results, strict=False)
        ]

    def forget(self) -> None:
        """As in Verifier."""
        self._uncaptured.forget()


def _verification(jobs: list[Job]) -> dict[str, np.ndarray]:
    verify, stops, at = list[tuple[int, int, int, int, int]](), list[int](), 0
    for job in jobs:
        first = len(stops)
        if job.grant.token:
            stops += sorted(i for i in job.sequence.stop if i < 2**31)
        verify.append((at if job.grant.token else -1, job.grant.chain, job.room, first, len(stops)))
        at += len(job.tree) + 1 if job.grant.token else 0
    return {"verify": np.array(verify, np.int32), "stops": np.array(stops, np.int32)}


class CapturedScorer:
    """As Scorer, in one graph from tokens to the best children of every row, which nothing stops."""

    stops = False

    def __init__(self, runner: Runner, sampler: Sampler, sequences: int, width: int, tau: float, best: int) -> None:
        self._runner, self._sampler, self._tau, self._best = runner, sampler, tau, best
        self._uncaptured = Scorer(runner, sampler, tau, best)
        self._passes = Passes(runner, buckets_of(runner, sequences, width), self._program)

    def _program(self, batch: StepBatch, draw: Draw, verify: Tensor, stops: Tensor) -> tuple[Tensor, ...]:
        r = self._runner
        return self._sampler.score(r.model.forward(batch, r.rows, r.pages), draw, self._tau, self._best)

    def __call__(
        self, batch: BatchBuilder, asks: list[Ask], stop: Callable[[], bool] | None = None
    ) -> tuple[list[list[float]], list[list[int]]]:  # fmt: skip
        """Values and ids of the best children of every row that is asked for."""
        bucket = least_bucket(self._passes.buckets, batch.shape)
        if bucket is None:
            return self._uncaptured(batch, asks)
        arrays = batch.arrays() | self._sampler.arrays(asks, looser=True)
        if not fits(self._passes.layouts[bucket], arrays):
            self._sampler.fill(arrays["fills"])
            return self._uncaptured(batch, asks)
        outputs = self._passes.run(bucket, arrays)
        if not asks:
            return [], []
        values, ids = self._passes.fetch(outputs)
        wanted = sum(len(ask.paths) for ask in asks)
        return values[:wanted].tolist(), ids[:wanted].tolist()
