"""The real engine, scheduler and drafters in virtual time: a thousand edges on a laptop.

    python -m bench.simulate --sessions 1 2 4 8 1000
    python -m bench.simulate --like build/serve.jsonl      # times and acceptance of a real run, compared with it

Only the models are stand-ins, tables of logits by token and position, and the clock: a pass takes the time that was measured for its rows, a message
half a round trip. What is drafted, admitted, verified, kept and thrown away is decided by the classes that ship. The draft's table is the target's
plus noise, as much of it as gives the acceptance asked for. Knows nothing of processes or sockets.
"""

import heapq
import itertools
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.logged import Pace, seconds
from specedge.config import MAX_ROWS_PER_TREE, DraftConfig, EngineConfig, SamplingParams
from specedge.engine.batch import BatchBuilder
from specedge.engine.drafter import Drafter, Session
from specedge.engine.engine import Engine
from specedge.engine.request import Sequence, Verdict
from specedge.engine.speculative import SpeculativeEngine

VOCAB, STATES = 64, 4093  # ids, and (token, position) classes that share a row of logits
CONTEXT = 4096
PEAKED = 3.0  # standard deviation of the target's logits
SEED = 7


class Table:
    """Stands for a Runner: logits by token and position, no K/V."""

    def __init__(self, logits: Tensor, sizes: EngineConfig, rows: int) -> None:
        self.model = SimpleNamespace(config=SimpleNamespace(vocab=VOCAB, eos_ids=()))
        self.sizes, self.device, self.context, self.rows_run = sizes, torch.device("cpu"), CONTEXT, 0
        self._logits, self._k_pos = logits, np.zeros(rows, np.int32)

    def batch(self) -> BatchBuilder:
        return BatchBuilder(self._k_pos)

    def run(self, batch: BatchBuilder) -> Tensor:
        self.rows_run = batch.rows
        b = batch.build(self.device)
        return self._logits[(b.tokens[b.wanted] * 2654435761 + b.positions[b.wanted].long() * 40503) % STATES]

    def commit(self, rows: list[int], pages: list[int], offsets: list[int]) -> None:
        """Nothing to move."""


def tables(error: float) -> tuple[Tensor, Tensor]:
    """Logits of a target and of a draft that is wrong by so much."""
    rng = torch.Generator().manual_seed(SEED)
    target = PEAKED * torch.randn(STATES, VOCAB, generator=rng)
    return target, target + error * PEAKED * torch.randn(STATES, VOCAB, generator=rng)


def drafter(logits: Tensor, config: DraftConfig) -> Drafter:
    config = replace(config, max_sessions=1, engine=EngineConfig(kv_tokens=CONTEXT, max_rows=256))
    return Drafter(Table(logits, config.engine, MAX_ROWS_PER_TREE), config)  # type: ignore[arg-type]


def engine(logits: Tensor, sessions: int, max_rows: int) -> Engine:
    sizes = EngineConfig(kv_tokens=sessions * CONTEXT, max_rows=max_rows, max_sequences=max(256, sessions))
    return Engine(Table(logits, sizes, max_rows))  # type: ignore[arg-type]


def prompt(i: int) -> list[int]:
    return [(i * 7919 + k * k) % VOCAB for k in range(8)]


def accepted(error: float, config: DraftConfig, temperature: float, tokens: int = 1500) -> float:
    """Tokens per round of a draft that is wrong by `error`."""
    target, draft = tables(error)
    both = SpeculativeEngine(engine(target, 1, 512), drafter(draft, config))
    done = both.generate([prompt(0)], SamplingParams(temperature=temperature, max_tokens=tokens, seed=1, ignore_eos=True))[0]
    return done.speculation.tokens_per_round(len(done.token_ids))


def error_for(tokens_per_round: float, config: DraftConfig, temperature: float) -> float:
    """The error of a draft that is accepted so far."""
    low, high = 0.0, 3.0
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if accepted(middle, config, temperature) > tokens_per_round else (low, middle)
    return (low + high) / 2


@dataclass(slots=True, eq=False)
class Edge:
    """One edge in virtual time: the loop of net/edge.py without its sockets."""

    drafter: Drafter
    session: Session
    sequence: Sequence
    inbox: list[Verdict] = field(default_factory=list)
    flying: bool = False
    asleep: bool = False
    rounds: int = 0
    hits: int = 0
    drafting: float = 0.0


@dataclass(frozen=True, slots=True)
class World:
    """What is given: seconds of a pass by rows, of Python around a step and a forward, of a round trip."""

    target: Pace
    draft: Pace
    rtt: float = 0.015
    step_overhead: float = 0.002
    forward_overhead: float = 0.001
    max_rows: int = 512


class Simulation:
    """`sessions` edges against one server."""

    def __init__(self, world: World, sessions: int, config: DraftConfig, error: float, temperature: float) -> None:
        self.world, self.config = world, config
        target, draft = tables(error)
        self.engine = engine(target, sessions, world.max_rows)
        self._table: Any = self.engine.runner
        params = SamplingParams(temperature=temperature, max_tokens=CONTEXT - 64, ignore_eos=True)
        self.edges: list[Edge] = []
        for i in range(sessions):
            each = replace(params, seed=i)
            sequence, own = self.engine.open(prompt(i), each), drafter(draft, config)
            session = own.open(sequence.tokens, sequence.params, sequence.limit)
            assert session is not None
            self.edges.append(Edge(own, session, sequence))
        self._of = {id(e.sequence): e for e in self.edges}
        self._events: list[tuple[float, int, str, Any]] = []
        self._number = itertools.count()
        self._serving = False
        self.steps: list[tuple[float, float, int, int]] = []  # begin, end, rows, tokens

    def run(self, until: float) -> None:
        """Play `until` seconds."""
        for e in self.edges:
            self._at(0.0, "edge", e)
        while self._events and self._events[0][0] < until:
            now, _, kind, what = heapq.heappop(self._events)
            if kind == "edge":
                self._edge(what, now)
            elif kind == "tree":
                e, tree = what
                self.engine.offer(e.sequence, tree)
                self._serve(now)
            elif kind == "served":
                self._serving = False
                for v in what:
                    self._at(now + self.world.rtt / 2, "verdict", v)
                self._serve(now)
            else:
                e = self._of[id(what.sequence)]
                e.inbox.append(what)
                if e.asleep:
                    e.asleep = False
                    self._at(now, "edge", e)

    def _at(self, when: float, kind: str, what: object) -> None:
        heapq.heappush(self._events, (when, next(self._number), kind, what))

    def _serve(self, now: float) -> None:
        if self._serving or not self.engine.busy:
            return
        verdicts = self.engine.step()
        end = now + seconds(self.world.target, self._table.rows_run) + self.world.step_overhead
        self._serving = True
        self.steps.append((now, end, self._table.rows_run, sum(len(v.path) + len(v.tokens) for v in verdicts)))
        self._at(end, "served", verdicts)

    def _edge(self, e: Edge, now: float) -> None:
        for v in e.inbox:
            e.flying = False
            if v.finish:
                return
            e.rounds += 1
            e.hits += e.drafter.verdict(e.session, v.row, list(v.tokens))
        e.inbox.clear()
        if not e.flying and e.drafter.ready(e.session):
            tree = e.drafter.submit(e.session, self.config.tree_size)
            e.flying = True
            self._at(now + self.world.rtt / 2, "tree", (e, tree))
        if e.drafter.grow():
            table: Any = e.drafter.runner
            took = seconds(self.world.draft, table.rows_run) + self.world.forward_overhead
            e.drafting += took
            self._at(now + took, "edge", e)
        else:
            e.asleep = True

    def figures(self, warm: float, until: float) -> dict[str, float]:
        """What is left after `warm` seconds."""
        steps = [s for s in self.steps if s[0] >= warm]
        length = until - warm
        return {
            "tokens_per_s": sum(s[3] for s in steps) / length, "server_idle": 1 - sum(min(s[1], until) - s[0] for s in steps) / length,
            "rows_per_step": statistics.mean(s[2] for s in steps) if steps else 0.0,
            "tokens_per_round": sum(s[3] for s in self.steps) / max(1, sum(e.rounds for e in self.edges)),
            "hit_rate": sum(e.hits for e in self.edges) / max(1, sum(e.rounds for e in self.edges)),
            "edge_idle": 1 - sum(e.drafting for e in self.edges) / len(self.edges) / until,
        }  # fmt: skip


def compare(path: Path, run_for: float) -> Iterable[str]:
    """A line per cell of a real run's file: its tokens per second, and those in virtual time with its own times and acceptance."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    cells: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "cell" and line.get("drafter") and not line["void"]:
            cells.setdefault(line["cell"], []).append(line)
    for name, group in cells.items():
        first = group[0]
        config = DraftConfig(**first["drafter"])
        per_round = statistics.median(x["tokens_per_round"] for x in group)
        rates = [x["tokens_per_s"] for x in group]
        world = World([(1, first["step_ms"] / 1e3), (1000, first["step_ms"])], first["draft_pace"], first["rtt"] / 1e3)
        error = error_for(per_round, config, first["temperature"])
        s = Simulation(world, first["sessions"], config, error, first["temperature"])
        s.run(run_for)
        found = s.figures(run_for / 10, run_for)
        real = statistics.median(rates)
        spread = (max(rates) - min(rates)) / 2 / real
        yield f"{name}: {real:.1f} tokens/s ± {spread:.0%}, simulated {found['tokens_per_s']:.1f} ({found['tokens_per_s'] / real - 1:+.0%})"
