"""Forward passes of whole models of random weights on a GPU, beside their floor and beside transformers; and a profile of one, kernel by kernel.

Two times: `us`, the pass alone in a CUDA graph that is captured here, which is what kernels cost; `run_us`, by the clock, host work and all: of whole
steps as graphs.py replays them, in the cells named "step", and of transformers. Every case has both. Weights pass through the L2 anew in every
pass, so nothing is rotated.
The cases and the floor are those of bench/step.py.
"""

import gc
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType

from bench.column import Case
from bench.common import SHAPES, median_ms, random_runner
from bench.gpu_lab import Cell, Lab
from bench.step import case_batch, work
from specedge import kernels
from specedge.config import EngineConfig, ModelConfig, SamplingParams
from specedge.engine.batch import StepBatch
from specedge.engine.buckets import least_bucket
from specedge.engine.graphs import LEAST, Passes, buckets_of
from specedge.engine.runner import Runner
from specedge.engine.sampler import Ask, Draw, Sampler

BIG: list[Case] = [("decode", 1, 1, 1024), ("verify", 1, 32, 1024), ("verify", 1, 64, 1024), ("verify", 4, 16, 1024), ("decode", 16, 1, 1024)]
BIG += [("verify", 16, 32, 1024), ("verify", 1, 16, 1024), ("decode", 4, 1, 1024), ("verify", 16, 16, 1024), ("verify", 16, 64, 1024)]
BIG += [("verify", 4, 32, 1024), ("verify", 4, 64, 1024), ("decode", 1, 1, 8192), ("verify", 1, 64, 8192), ("verify", 16, 32, 8192)]
BIG += [("decode", 16, 1, 8192), ("prompt", 1, 512, 0), ("prompt", 1, 512, 8192)]
DRAFT: list[Case] = [("verify", 1, 8, 1024), ("decode", 1, 1, 1024), ("verify", 8, 8, 1024), ("verify", 1, 32, 1024), ("verify", 1, 8, 8192)]
PEER: list[Case] = [("decode", 1, 1, 1024), ("verify", 1, 32, 1024), ("verify", 16, 32, 1024), ("decode", 16, 1, 1024)]
PROFILED: Case = ("verify", 4, 16, 1024)
PLAN = (("llama-3.1-8b", BIG), ("qwen3-0.6b", DRAFT), ("qwen3-14b", BIG))
SMALL: list[Case] = [("decode", 1, 1, 64), ("verify", 2, 3, 64)]  # of a dry run


def name_of(case: Case) -> str:
    kind, sequences, rows, context = case
    return f"{kind} {sequences} x {rows} @ {context}"


def make_runner(lab: Lab, c: ModelConfig, cases: Iterable[Case]) -> Runner:
    """A runner with room for all of `cases`."""
    tokens = max(s * -(-n // 64) * 64 for _, s, _, n in cases)
    sizes = EngineConfig(kv_tokens=max(64, tokens), max_rows=max(s * r for _, s, r, _ in cases))
    runner = random_runner(c, sizes, lab.device, torch.float32 if lab.dry else lab.dtype)
    runner.pages.normal_()  # a GPU computes faster on zeros
    return runner


def some_batch(lab: Lab, runner: Runner, case: Case) -> StepBatch:
    """The batch of a case on the device, of random tokens."""
    batch = case_batch(runner, case).build(lab.device)
    return replace(batch, tokens=torch.randint_like(batch.tokens, runner.model.config.vocab))


@torch.inference_mode()
def one(lab: Lab, runner: Runner, case: Case) -> dict[str, Any]:
    """The forward pass of a case."""
    batch = some_batch(lab, runner, case)
    moved, flops = work(runner.model.config, 2, 2, case)
    logits = runner.model.forward(batch, runner.rows, runner.pages)
    if not bool(logits.isfinite().all()):
        raise ValueError("its logits are not finite")
    us = lab.us(lambda: runner.model.forward(batch, runner.rows, runner.pages), 1, 0.2)
    return {"case": case, "moved": moved, "flops": flops, "us": us}


def replayed(runner: Runner, case: Case, width: int | None) -> Callable[[], object]:
    """A step of graphs.py in the bucket of `case`: arrays, one copy, a replay from tokens to verdicts, the wait. `width`: of a draft, to children."""
    kind, sequences, rows, context = case
    vocab, prompt = runner.model.config.vocab, kind == "prompt"
    sampler, seeds = Sampler(vocab, vocab, runner.device, sequences * rows), itertools.count()
    text = [1] * (context + (rows if prompt else 1))
    paths = [[1] * ((i + 1) // 2) for i in range(1 if prompt else rows)]  # of case_batch's trees
    verify = [(s * len(paths), rows if prompt else 1, 1000, 0, 0) for s in range(sequences)]
    more = {"verify": np.array(verify, np.int32), "stops": np.zeros(0, np.int32)}
    bucket = least_bucket(buckets_of(runner, runner.sizes.max_sequences, width or LEAST), case_batch(runner, case).shape)
    assert bucket is not None

    def program(batch: StepBatch, draw: Draw, verify: Tensor, stops: Tensor) -> tuple[Tensor, ...]:
        r = runner
        logits = r.model.forward(batch, r.rows, r.pages)
        if width:
            return sampler.score(logits, draw, 1.0, 8)
        sampled = sampler.sample(logits, draw)
        return (kernels.accept(r.rows, r.pages, batch.segments, batch.page_table, batch.tokens, batch.anc, sampled, verify, stops),)

    passes = Passes(runner, [bucket], program)

    def step() -> object:  # with noise of its own, as every step
        asks = [Ask(SamplingParams(0.8, seed=next(seeds), top_p=0.9), text, len(text), frozenset(), paths) for _ in range(sequences)]
        return passes.fetch(passes.run(bucket, case_batch(runner, case).arrays() | sampler.arrays(asks, bool(width)) | more))

    return step


def whole(lab: Lab, runner: Runner, case: Case, width: int | None) -> dict[str, Any]:
    """A captured step by the clock."""
    if not lab.dry and kernels.backend(lab.device) != kernels.CAPTURABLE:
        raise ValueError("without the CUDA library no step is captured")
    moved, flops = work(runner.model.config, 2, 2, case)
    try:
        run_us = 1e3 * median_ms(replayed(runner, case, width), 0 if lab.dry else 0.15, 2)
        return {"case": case, "moved": moved, "flops": flops, "run_us": run_us}
    finally:
        if not lab.dry:
            torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails may stay on its own


def kernels_of(events: Iterable[Any], dry: bool) -> tuple[dict[str, list[float]], float, float]:
    """Times of each kernel in microseconds; how long any ran, and from the start of the first to the end of the last."""
    there = DeviceType.CPU if dry else DeviceType.CUDA
    times: dict[str, list[float]] = defaultdict(list)
    spans = []
    for e in events:
        if e.device_type == there:
            times[e.name].append(e.time_range.elapsed_us())
            spans.append((e.time_range.start, e.time_range.end))
    busy, upto = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, upto))
        upto = max(upto, end)
    return times, busy, upto - min((s for s, _ in spans), default=0.0)


@torch.inference_mode()
def profile(lab: Lab, runner: Runner, captured: bool) -> dict[str, Any]:
    """One pass by kernel: captured, or as `Runner.run` launches it; `gaps`: the share of the time in which no kernel ran."""
    case = SMALL[1] if lab.dry else PROFILED
    batch = some_batch(lab, runner, case)

    def forward() -> object:
        return runner.model.forward(batch, runner.rows, runner.pages)

    def run() -> object:
        return runner.run(case_batch(runner, case))

    play = forward if captured else run
    play()
    if captured and not lab.dry:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        play = graph.replay
        play()
    lab.sync()
    kinds = [torch.profiler.ProfilerActivity.CPU if lab.dry else torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        play()
        lab.sync()
    times, busy, span = kernels_of(seen.events(), lab.dry)
    top = sorted(times, key=lambda name: -sum(times[name]))[:15]
    table = [{"kernel": name[:90], "calls": len(times[name]), "us": sum(times[name])} for name in top]
    return {"case": case, "captured": captured, "span_us": span, "busy_us": busy, "gaps": 1 - busy / span if span else 0.0,
            "kernels": sum(map(len, times.values())), "top": table}  # fmt: skip


def peer(lab: Lab, c: ModelConfig, cases: list[Case]) -> dict[str, Cell]:
    """transformers over the same cases; the model is made with the first."""
    made: list[Any] = []

    def run(case: Case) -> dict[str, Any]:
        from bench.peers import Transformers

        if not made:
            made.append(Transformers(c, lab.device, torch.bfloat16))
        found = made[0]
        found.prepare(*case)
        found.step(*case)
        lab.sync()
        times = []
        for _ in range(1 if lab.dry else 5):
            found.prepare(*case)
            lab.sync()
            begun = time.perf_counter()
            found.step(*case)
            lab.sync()
            times.append((time.perf_counter() - begun) * 1e6)
        moved, flops = work(c, 2, 2, case)
        return {"case": case, "moved": moved, "flops": flops, "version": found.version, "run_us": statistics.median(times)}

    return {f"transformers {name_of(case)}": lambda case=case: run(case) for case in cases}  # type: ignore[misc]


def steps(lab: Lab, quick: bool) -> None:
    """The models of PLAN in turn; each is let go of before the next is made."""
    for name, cases in PLAN[:2] if quick else PLAN:
        c = SHAPES["tiny"] if lab.dry else SHAPES[name]
        todo = SMALL if lab.dry else cases[:5] if quick else cases
        made: list[Runner] = []

        def runner(c: ModelConfig = c, made: list[Runner] = made, todo: list[Case] = todo) -> Runner:
            if not made:
                made.append(make_runner(lab, c, [*todo, SMALL[1] if lab.dry else PROFILED]))
            return made[0]

        cells: dict[str, Cell] = {f"{name} {name_of(case)}": lambda case=case: one(lab, runner(), case) for case in todo}  # type: ignore[misc]
        lab.each("step", cells)
        width = 8 if cases is DRAFT else None
        lab.each("step", {f"{name} step {name_of(case)}": lambda case=case, w=width: whole(lab, runner(), case, w) for case in todo})  # type: ignore[misc]
        if name == PLAN[0][0]:
            both = {"captured": True, "as run": False}
            lab.each("profile", {how: lambda captured=captured: profile(lab, runner(), captured) for how, captured in both.items()})  # type: ignore[misc]
        made.clear()
        gc.collect()
        if not lab.dry:
            torch.cuda.empty_cache()
        if name == PLAN[0][0]:
            later = {f"{name} {key}": cell for key, cell in peer(lab, c, SMALL if lab.dry else PEER).items()}
            lab.each("step", later)
            del later
            gc.collect()
