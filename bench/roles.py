"""The processes of bench/serve.py: a server, which can also draft for itself, and edges. Each does what its parent asks through a pipe.

    server = Role(serve_role, setup);  server.ask("measure")

A role pins itself to its core before torch starts a thread. Results are plain lists and dicts. Knows nothing of cells, tables or the network between.
"""

import dataclasses
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.logged import IndependentDrafter, LoggedDrafter, LoggedEngine, LoggedRunner, Pace, PacedRunner, layer_ends, sharpen_sleep
from bench.widen import wide_runner
from specedge.config import MAX_ROWS_PER_TREE, DraftConfig, EngineConfig, ModelConfig, SamplingParams
from specedge.engine.runner import Runner
from specedge.engine.speculative import DraftedText, SpeculativeEngine
from specedge.net.edge import Edge
from specedge.net.server import Server
from specedge.text import Tokenizer

DRAFT_ROWS = (1, 2, 4, 8, 16, 32, 96)
TARGET_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
CONTEXT = 128  # of the measured passes, in tokens


@dataclass(frozen=True, slots=True)
class Setup:
    """The pair, the shapes that it is widened to (None: as it is), where everything runs and how many sessions there may be."""

    target: Path
    draft: Path
    target_shape: ModelConfig | None
    draft_shape: ModelConfig | None
    device: str
    dtype: str
    sessions: int
    kv_tokens: int
    server_core: int | None  # None: wherever the system likes
    edge_core: int | None


class Role:
    """A process that answers. What goes wrong in it is raised here, with its traceback as text."""

    def __init__(self, kind: Callable[[Setup], Any], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_answer, args=(other, kind, *args), daemon=True)
        self._process.start()
        other.close()

    def tell(self, what: str, *args: object) -> None:
        """Ask without waiting; `hear` gives the answer."""
        self._pipe.send((what, args))

    def hear(self) -> Any:
        try:
            fine, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process of the benchmark has died: look above for its last words") from None
        if not fine:
            raise RuntimeError(f"a process of the benchmark failed:\n{answer}")
        return answer

    def ask(self, what: str, *args: object) -> Any:
        self.tell(what, *args)
        return self.hear()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _answer(pipe: Connection, kind: Callable[..., Any], *args: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
    role = None
    while True:
        try:
            what, given = pipe.recv()
        except EOFError:
            return
        try:
            role = role or kind(*args)
            pipe.send((True, getattr(role, what)(*given)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def pin(core: int | None) -> None:
    """Run on one core only, with one thread; None: anywhere."""
    if core is not None:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)


def load(path: Path, shape: ModelConfig | None, sizes: EngineConfig, device: str, dtype: str, rows: int) -> Runner:
    """A model as it is, or at another shape."""
    if shape is None:
        return Runner.load(path, sizes, rows, device, dtype, False)
    return wide_runner(path, shape, sizes, torch.device(device), getattr(torch, dtype), rows)


def pace_of(runner: Runner, rows: tuple[int, ...], times: int = 7) -> Pace:
    """The least of seven times, for what else runs only ever adds, of a forward of so many rows at CONTEXT tokens: two chains below a root, of whose
    logits all are wanted."""
    pages = list(range(-(-CONTEXT // runner.sizes.page_size)))

    def forward(n: int) -> float:
        begun = time.monotonic()
        batch = runner.batch()
        anc = [1 | sum(1 << j for j in range(1, i + 1) if j % 2 == i % 2) for i in range(n)]
        batch.add([5] * n, [CONTEXT + (i + 1) // 2 for i in range(n)], list(range(n)), (0, n), CONTEXT, pages, anc, list(range(n)))
        runner.run(batch)
        if runner.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - begun

    return [(n, min(forward(n) for _ in range(times))) for n in rows]


# ----------------------------------------------------------------------------------------------------------------------


class ServerRole:
    """The target, and the draft of the same cost for the co-located mode, on one core."""

    def __init__(self, setup: Setup) -> None:
        pin(setup.server_core)
        self._setup = setup
        sizes = EngineConfig(kv_tokens=setup.kv_tokens)
        wide = load(setup.target, setup.target_shape, sizes, setup.device, setup.dtype, sizes.max_rows)
        self._target = LoggedRunner(wide.model, sizes, sizes.max_rows)
        self._tokenizer = Tokenizer.from_dir(setup.target, self._target.model.config.vocab)
        rows = setup.sessions * MAX_ROWS_PER_TREE
        self._draft = load(setup.draft, setup.draft_shape, sizes, setup.device, setup.dtype, rows)
        narrow = load(setup.target, None, sizes, setup.device, setup.dtype, sizes.max_rows)
        self._narrow = LoggedRunner(narrow.model, sizes, sizes.max_rows), load(setup.draft, None, sizes, setup.device, setup.dtype, rows)
        self._server: Server | None = None

    def measure(self) -> tuple[Pace, Pace]:
        """Times of target and draft by rows, the machine otherwise idle."""
        return pace_of(self._target, TARGET_ROWS), pace_of(self._draft, DRAFT_ROWS)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self._tokenizer.encode(t) for t in texts]

    def _engine(self, runner: LoggedRunner, admission: bool) -> LoggedEngine:
        """A fresh one over a loaded model: no cached prefix of an earlier cell, nothing learned in it."""
        runner.sizes = dataclasses.replace(runner.sizes, admission=admission)
        return LoggedEngine(runner, self._tokenizer, runner.model.config.eos_ids)

    def start(self, admission: bool, pipeline: bool) -> str:
        """Serve; returns host:port."""
        self._cpu = time.process_time()
        self._serving = self._engine(self._target, admission)
        self._server = Server(self._serving, pipeline=pipeline)
        self._server.start()
        return self._server.endpoint.removeprefix("tcp://")

    def stop(self) -> dict[str, Any]:
        """End serving; the log."""
        assert self._server is not None
        self._server.stop()
        self._server = None
        return {"steps": self._serving.steps, "prompts": self._serving.prompts, "grows": [], "cpu": time.process_time() - self._cpu}

    def colocated(
        self, waves: list[list[tuple[list[int], SamplingParams]]], config: DraftConfig, narrow: bool = False
    ) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:  # fmt: skip
        """Draft and verify in this process, the requests of a wave at once and whole trees, as in the paper; records as of `EdgeRole.go`, the log.
        `narrow`: with the pair as it ships, whose tokens are the same and come sooner."""
        begun = time.process_time()
        target, draft = self._narrow if narrow else (self._target, self._draft)
        drafter, engine = LoggedDrafter(draft, config, self._tokenizer), self._engine(target, False)
        both = SpeculativeEngine(engine, drafter)
        found = []

        def run(wave: list[tuple[list[int], SamplingParams]]) -> list[dict[str, Any]]:
            started = time.monotonic()
            texts = [both.begin(prompt, params) for prompt, params in wave]
            times: list[list[tuple[float, int]]] = [[] for _ in texts]
            while any(t.output.completion is None for t in texts):
                both.advance()
                for text, at in zip(texts, times, strict=True):
                    at += [(time.monotonic(), len(c.token_ids)) for c in text.chunks]
                    text.chunks.clear()
            return [_record(started, at, t.output.completion) for t, at in zip(texts, times, strict=True) if isinstance(t, DraftedText)]

        for wave in waves:
            reading = [_ttft(r) for r in run([(prompt, dataclasses.replace(params, max_tokens=1)) for prompt, params in wave])]
            found.append([record | {"ttft": ttft} for record, ttft in zip(run(wave), reading, strict=True)])
        log = {"steps": engine.steps, "prompts": engine.prompts, "grows": drafter.grows, "cpu": time.process_time() - begun}
        return found, log


def _record(started: float, times: list[tuple[float, int]], completion: Any) -> dict[str, Any]:
    return {"started": started, "times": times, "ids": completion.token_ids, "speculation": dataclasses.asdict(completion.speculation)}


def _ttft(record: dict[str, Any]) -> float:
    return float(record["times"][0][0] - record["started"])


class EdgeRole:
    """One user's machine: the shipped draft, at the pace of the large one."""

    def __init__(self, setup: Setup, pace: Pace) -> None:
        pin(setup.edge_core)
        torch.set_num_threads(1)
        if setup.edge_core is not None:
            os.nice(5)  # whoever wakes up for the network goes first
        sharpen_sleep()
        sizes = EngineConfig(kv_tokens=4096, max_rows=256)
        narrow = Runner.load(setup.draft, sizes, 8, "cpu", setup.dtype, False)
        self._runner = PacedRunner(narrow.model, sizes, MAX_ROWS_PER_TREE, pace, layer_ends(setup.draft_shape or narrow.model.config))
        self._tokenizer = Tokenizer.from_dir(setup.draft, narrow.model.config.vocab)

    def ready(self) -> None:
        """Nothing: whoever is told so knows that this process is up."""

    def start(self, address: str, config: DraftConfig | None, shared: bool = True) -> None:
        """Connect; with `config` None without a draft. `shared` False: without the target's noise."""
        self._cpu = time.process_time()
        self._runner.late, self._runner.paced = [], 0.0
        kind = LoggedDrafter if shared else IndependentDrafter
        self._drafter = kind(self._runner, config, self._tokenizer) if config else None
        self._edge = Edge(f"specedge://{address}", self._drafter, tokenizer=self._tokenizer)

    def read(self, prompt: list[int], params: SamplingParams) -> float:
        """Have the prompt read, and cached, on both sides; seconds to the first token."""
        return _ttft(self.go(prompt, dataclasses.replace(params, max_tokens=1)))

    def go(self, prompt: list[int], params: SamplingParams) -> dict[str, Any]:
        """One text."""
        started, times, completion = time.monotonic(), [], None
        for chunk in self._edge.stream(prompt, params):
            times.append((time.monotonic(), len(chunk.token_ids)))
            completion = chunk.completion
        return _record(started, times, completion)

    def stop(self) -> dict[str, Any]:
        """Disconnect; the log."""
        self._edge.close()
        d = self._drafter
        names = ("grows", "submits", "verdicts", "begun")
        log: dict[str, Any] = {name: getattr(d, name) if d else [] for name in names}
        return log | {"late": self._runner.late, "paced": self._runner.paced, "cpu": time.process_time() - self._cpu}
