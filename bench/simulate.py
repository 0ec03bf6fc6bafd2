"""The real engine, scheduler, pipeline and drafters in virtual time: a thousand edges on a laptop.

    python -m bench.simulate --sessions 1 2 4 8 1000
    python -m bench.simulate --like build/serve.jsonl      # with the times and the acceptance of a real run, and compared with it

Only the models are stand-ins, tables of logits by token and position, and the clock: a pass takes the time that was measured for its rows, a message
half a round trip. What is drafted, admitted, verified, kept and thrown away is decided by the classes that ship. The draft's table is the target's
plus noise, as much of it as gives the acceptance asked for. Knows nothing of processes or sockets.
"""

import argparse
import heapq
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import specedge.engine.engine as engine_module
from bench.logged import Pace, seconds
from specedge.config import MAX_ROWS_PER_TREE, DraftConfig, EngineConfig, SamplingParams
from specedge.engine.batch import BatchBuilder
from specedge.engine.drafter import Drafter, Session
from specedge.engine.engine import Engine
from specedge.engine.pace import Served
from specedge.engine.pipeline import Pipeline
from specedge.engine.request import Sequence, Verdict
from specedge.engine.scheduler import ALL

VOCAB, STATES = 64, 4093  # ids, and (token, position) classes that share a row of logits
CONTEXT = 4096  # tokens that a text may have
PEAKED = 3.0  # standard deviation of the target's logits
SEED = 7


@dataclass(slots=True)
class Clock:
    """Seconds so far; has what the engine takes from the module `time`."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


class Table:
    """Stands for a Runner: logits by token and position, no K/V. A pass puts the clock on, if there is one, by the time that its rows take."""

    def __init__(self, logits: Tensor, sizes: EngineConfig, rows: int, pace: Pace, overhead: float, clock: Clock | None = None) -> None:
        self.model = SimpleNamespace(config=SimpleNamespace(vocab=VOCAB, eos_ids=()))
        self.sizes, self.device, self.context = sizes, torch.device("cpu"), CONTEXT
        self.rows_run, self.took = 0, 0.0  # of the last pass
        self._logits, self._k_pos, self._pace, self._overhead, self._clock = logits, np.zeros(rows, np.int32), pace, overhead, clock

    def batch(self) -> BatchBuilder:
        return BatchBuilder(self._k_pos)

    def run(self, batch: BatchBuilder) -> Tensor:
        self.rows_run, self.took = batch.rows, seconds(self._pace, batch.rows) + self._overhead
        if self._clock:
            self._clock.now += self.took
        b = batch.build(self.device)
        return self._logits[(b.tokens[b.wanted] * 2654435761 + b.positions[b.wanted].long() * 40503) % STATES]

    def commit(self, rows: list[int], pages: list[int], offsets: list[int]) -> None:
        """Nothing to move."""


def tables(error: float) -> tuple[Tensor, Tensor]:
    """Logits of a target and of a draft that is wrong by so much."""
    rng = torch.Generator().manual_seed(SEED)
    target = PEAKED * torch.randn(STATES, VOCAB, generator=rng)
    return target, target + error * PEAKED * torch.randn(STATES, VOCAB, generator=rng)


@dataclass(frozen=True, slots=True)
class World:
    """What is given: seconds of a pass by its rows, what Python adds to it, seconds of a round trip, and what is switched on."""

    target: Pace
    draft: Pace
    rtt: float = 0.015
    step_overhead: float = 0.002
    forward_overhead: float = 0.001
    temperature: float = 0.7
    pipeline: bool = True
    admission: bool = True
    max_rows: int = 512


@dataclass(slots=True, eq=False)
class Edge:
    """One edge: the loop of net/edge.py without its sockets and its autopilot."""

    drafter: Drafter
    session: Session
    sequence: Sequence
    table: Table
    clock: Clock  # its own: a forward that begins now ends later
    inbox: list[tuple[Verdict, int, float]] = field(default_factory=list)  # with row budgets and the seconds of their steps
    budget: int = MAX_ROWS_PER_TREE
    flying: bool = False
    asleep: bool = False
    looks: int = 0  # that are due: only the latest counts
    rounds: int = 0
    hits: int = 0
    drafting: float = 0.0


class Simulation:
    """`sessions` edges against one server."""

    def __init__(self, world: World, sessions: int, config: DraftConfig, error: float) -> None:
        self.world, self.config, self.clock = world, replace(config, max_sessions=1), Clock()
        target, draft = tables(error)
        sizes = EngineConfig(kv_tokens=sessions * CONTEXT, max_rows=world.max_rows, max_sequences=max(256, sessions), admission=world.admission)
        self._table = Table(target, sizes, world.max_rows, world.target, world.step_overhead, self.clock)
        self.engine = Engine(self._table)  # type: ignore[arg-type]
        self._pipeline = Pipeline(self.engine.cost) if world.pipeline else None
        self.edges = [self._open(i, draft) for i in range(sessions)]
        self._of = {id(e.sequence): e for e in self.edges}
        self._events: list[tuple[float, int, str, Any]] = []
        self._number = itertools.count()
        self._serving = False
        self.steps: list[tuple[float, float, int, int]] = []  # begin, end, rows, tokens

    def _open(self, i: int, logits: Tensor) -> Edge:
        params = SamplingParams(temperature=self.world.temperature, max_tokens=CONTEXT - 64, ignore_eos=True, seed=i)
        sizes = EngineConfig(kv_tokens=CONTEXT, max_rows=256)
        clock = Clock()
        table = Table(logits, sizes, MAX_ROWS_PER_TREE, self.world.draft, self.world.forward_overhead, clock)
        own = Drafter(table, replace(self.config, engine=sizes), None, clock.monotonic)  # type: ignore[arg-type]
        sequence = self.engine.open([(i * 7919 + k * k) % VOCAB for k in range(8)], params)
        session = own.open(sequence.tokens, sequence.params, sequence.limit)
        assert session is not None
        return Edge(own, session, sequence, table, clock)

    def run(self, until: float) -> None:
        """Play `until` seconds."""
        real, engine_module.time = engine_module.time, self.clock  # type: ignore[assignment]
        try:
            for edge in self.edges:
                self._at(0.0, "edge", (edge, 0))
            while self._events and self._events[0][0] < until:
                self.clock.now, _, kind, what = heapq.heappop(self._events)
                getattr(self, f"_{kind}")(what)
        finally:
            engine_module.time = real

    def _at(self, when: float, kind: str, what: object) -> None:
        heapq.heappush(self._events, (when, next(self._number), kind, what))

    def _tree(self, what: tuple[Edge, Any]) -> None:
        edge, tree = what
        self.engine.offer(edge.sequence, tree, self.clock.now)
        self._look(None)

    def _look(self, _: None) -> None:
        """What the server's thread does between messages."""
        if self._serving or not self.engine.busy:
            return
        now, most = self.clock.now, ALL
        if self._pipeline and (turns := self.engine.turns(now)):
            when, most = self._pipeline.decide(turns, now)
            if when > now:
                self._at(when, "look", None)
                return
        verdicts = self.engine.step(most)
        end = self.clock.now
        if end == now:  # nothing was granted
            return
        self._serving = True
        self.steps.append((now, end, self._table.rows_run, sum(len(v.path) + len(v.tokens) for v in verdicts)))
        self._at(end, "served", (verdicts, end - now))

    def _served(self, what: tuple[list[Verdict], float]) -> None:
        self._serving = False
        for v in what[0]:
            self._at(self.clock.now + self.world.rtt / 2, "verdict", (v, v.sequence.acceptance.budget, what[1]))
        self._look(None)

    def _verdict(self, what: tuple[Verdict, int, float]) -> None:
        edge = self._of[id(what[0].sequence)]
        edge.inbox.append(what)
        if edge.asleep:
            self._edge((edge, edge.looks))

    def _edge(self, what: tuple[Edge, int]) -> None:
        e, look = what
        if look != e.looks:  # a verdict has woken it since
            return
        e.looks, e.clock.now = e.looks + 1, self.clock.now
        for v, budget, spent in e.inbox:
            e.flying, e.budget = False, budget
            if v.finish:
                return
            e.rounds += 1
            e.hits += e.drafter.verdict(e.session, v.row, list(v.tokens), Served(spent, v.verified))
        e.inbox.clear()
        if not e.flying and e.drafter.ready(e.session):
            tree = e.drafter.submit(e.session, e.drafter.size(e.session, e.budget))
            e.flying = True
            self._at(self.clock.now + self.world.rtt / 2, "tree", (e, tree))
        pause = e.drafter.pause()
        e.asleep = bool(pause) or not e.drafter.grow()
        if not e.asleep:
            e.drafting += e.table.took
        if pause or not e.asleep:
            self._at(self.clock.now + (pause or e.table.took), "edge", (e, e.looks))

    def figures(self, warm: float, until: float) -> dict[str, float]:
        """What came after `warm` seconds."""
        steps = [s for s in self.steps if s[0] >= warm]
        length, rounds = until - warm, max(1, sum(e.rounds for e in self.edges))
        return {
            "tokens_per_s": sum(s[3] for s in steps) / length, "server_idle": 1 - sum(min(s[1], until) - s[0] for s in steps) / length,
            "rows_per_step": statistics.mean(s[2] for s in steps) if steps else 0.0,
            "tokens_per_round": sum(s[3] for s in self.steps) / rounds, "hit_rate": sum(e.hits for e in self.edges) / rounds,
            "edge_idle": 1 - sum(e.drafting for e in self.edges) / len(self.edges) / until,
        }  # fmt: skip


def play(world: World, sessions: int, config: DraftConfig, error: float, until: float) -> dict[str, float]:
    """The figures of `until` seconds, without the first fifth, in which the engine learns."""
    simulation = Simulation(world, sessions, config, error)
    simulation.run(until)
    return simulation.figures(until / 5, until)


def error_for(tokens_per_round: float, world: World, sessions: int, config: DraftConfig, until: float) -> float:
    """The error of a draft that is accepted so far."""
    low, high = 0.0, 3.0
    for _ in range(7):
        middle = (low + high) / 2
        better = play(world, sessions, config, middle, until)["tokens_per_round"] > tokens_per_round
        low, high = (middle, high) if better else (low, middle)
    return (low + high) / 2


def compare(path: Path, until: float) -> Iterator[str]:
    """A line for each cell with edges in the file of a real run: its tokens per second, and those in virtual time by its times and acceptance."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    cells: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "cell" and line["world"] and not line["void"]:
            cells.setdefault(line["cell"], []).append(line)
    for name, group in cells.items():
        first = group[0]
        config, world = DraftConfig(**first["drafter"]), World(**first["world"], temperature=first["temperature"])
        spent = statistics.median(x["step_ms"] for x in group) / 1e3 - seconds(world.target, round(first["rows_per_step"]))
        world = replace(world, step_overhead=max(0.0, spent), forward_overhead=statistics.median(x["forward_overhead_ms"] for x in group) / 1e3)
        error = error_for(statistics.median(x["tokens_per_round"] for x in group), world, first["sessions"], config, until / 3)
        rates = [x["tokens_per_s"] for x in group]
        real, ours = statistics.median(rates), play(world, first["sessions"], config, error, until)
        spread = (max(rates) - min(rates)) / 2 / real
        agrees = abs(ours["tokens_per_s"] / real - 1) <= max(0.10, spread)
        yield (
            f"{name}: real {real:.1f} tokens/s ± {spread:.0%}, idle {first['server_idle']:.0%}, hits {first['hit_rate']:.0%}; simulated "
            f"{ours['tokens_per_s']:.1f} ({ours['tokens_per_s'] / real - 1:+.0%}), idle {ours['server_idle']:.0%}, hits {ours['hit_rate']:.0%}: "
            f"{'agrees' if agrees else 'differs'}"
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8, 64, 1000])
    p.add_argument("--target-ms", type=float, nargs=3, default=[85.0, 105.0, 1200.0], metavar="MS", help="of a pass of 1, 64 and 1024 rows")
    p.add_argument("--draft-ms", type=float, default=12.0, help="of a draft forward")
    p.add_argument("--rtt", type=float, default=15.0, help="milliseconds")
    p.add_argument("--temperature", type=float, default=0.7)
    p.add_argument("--nodes", type=int, default=31)
    p.add_argument("--error", type=float, default=0.3, help="of the draft's logits, in standard deviations of the target's")
    p.add_argument("--seconds", type=float, default=20.0, help="to play")
    p.add_argument("--no-pipeline", dest="pipeline", action="store_false")
    p.add_argument("--like", type=Path, help="file of a real run: take its times and acceptance, and compare")
    args = p.parse_args()
    if args.like:
        print(*compare(args.like, args.seconds), sep="\n")
        return
    target = [(rows, ms / 1e3) for rows, ms in zip((1, 64, 1024), args.target_ms, strict=True)]
    draft = [(1, args.draft_ms / 1e3), (256, args.draft_ms / 1e3)]
    world = World(target, draft, args.rtt / 1e3, temperature=args.temperature, pipeline=args.pipeline)
    found = {}
    for n in args.sessions:
        found[n] = play(world, n, DraftConfig(tree_size=args.nodes), args.error, args.seconds)
        print(f"{n} sessions: " + ", ".join(f"{name} {value:.3g}" for name, value in found[n].items()), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
