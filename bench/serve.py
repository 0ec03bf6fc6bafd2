"""All modes of serving side by side: the target alone, drafting beside it, and drafting on edges, in the same run and with the same ids.

    make bench-serve                        # everything; resumes cell by cell from build/serve.jsonl
    python -m bench.serve --quick           # at most 15 minutes
    python -m bench.serve --quick --sweep rtt --timeline build/timeline.svg

The shipped pair is widened to shapes of real cost (bench/widen.py). On a CPU the server has one core, which the draft shares in the co-located mode.
Each edge stands for a machine of its own: on the other core it runs the shipped draft, which has the same ids, and waits out the rest of the wide
one's time, measured beforehand. A cell whose edge core is over 70 % busy is void. The network between is bench/wan.py. Ids must be the same in all
modes, or the exit status is 1.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.cells import Record, breakdown, digest, figures, rounds
from bench.claims import report
from bench.common import SHAPES, rewrite
from bench.logged import seconds
from bench.roles import EdgeRole, Role, ServerRole, Setup, pin
from bench.step import machine
from bench.timeline import draw, perfetto
from bench.wan import Network, Wan
from specedge.cli import DEMO
from specedge.config import DraftConfig, EngineConfig, ModelConfig, SamplingParams

ROOT = Path(__file__).parents[1]
BUSY = 0.70  # of the edges' core: above it they are no machines of their own any more
FOREIGN = 0.10  # of the server's core, taken by others: above it the server is slower than it was
PREFIX = 129  # tokens of a prompt: two full pages and the root
FIXED = 6  # draft forwards of the cells whose trees have a given number of nodes
WARM = 64  # tokens of the texts with which a cell begins and that do not count: engine and drafters believe what they see after 24 passes
SMALL = ModelConfig(1024, 28, 16, 8, 64, 3072, 151936, 1e-6, 1e4, 8192, True)  # 0.6 B
PAIRS: dict[str, tuple[ModelConfig | None, ModelConfig | None]] = {  # target and draft; the ratio of their forwards is the paper's, 0.12 to 0.18
    "narrow": (None, None),  # as shipped, for a test of this program
    "0.5b": (SHAPES["0.5b"], ModelConfig(768, 10, 12, 2, 64, 2560, 32000, 1e-6, 1e4, 8192, True)),  # the draft has 97 M
    "1.5b": (SHAPES["1.5b"], ModelConfig(1024, 14, 16, 2, 64, 3584, 32000, 1e-6, 1e4, 8192, True)),  # the draft has 220 M
    "8b": (ModelConfig(4096, 36, 32, 8, 128, 12288, 151936, 1e-6, 1e6, 8192, False), SMALL),
    "14b": (ModelConfig(5120, 40, 40, 8, 128, 17408, 151936, 1e-6, 1e6, 8192, False), SMALL),
}
GRID = [(depth, size) for size in (4, 8, 16, 32, 64) for depth in (1, 2, 4, 7, 10) if depth <= size]  # of the co-located baseline
SWEEPS = {  # name: networks beside the one of the run
    "rtt": [Network(rtt) for rtt in (0.0, 15.0, 50.0, 100.0)],
    "jitter": [Network(15.0, jitter) for jitter in (0.0, 5.0, 15.0)],
    "uplink": [Network(15.0, up=up) for up in (1.0, 10.0, 0.0)],
}


@dataclass(frozen=True, slots=True)
class Mode:
    """Who drafts (nobody, server, edge), and what is switched on."""

    drafts: str
    proactive: bool = False  # growth in flight: DraftConfig.proactive
    pipeline: bool = False  # pipeline-aware batching: Server(pipeline=...)
    ahead: bool = False  # what grows is told, and the server begins rounds by itself: DraftConfig.ahead


MODES = {  # each edge mode has all of the one before it
    "autoregressive": Mode("nobody"),
    "co-located": Mode("server"),
    "edge": Mode("edge"),
    "+ growth in flight": Mode("edge", proactive=True),
    "+ pipeline-aware": Mode("edge", proactive=True, pipeline=True),
    "+ rounds ahead": Mode("edge", proactive=True, pipeline=True, ahead=True),
}
ALL_ON = list(MODES)[-1]


@dataclass(frozen=True, slots=True)
class Cell:
    """One set of conditions. `nodes`: of every tree, after FIXED forwards, and all are verified; 0: drafter and server decide.
    `shared`: whether the drafts know the target's noise."""

    mode: str
    sessions: int
    temperature: float
    network: Network
    nodes: int = 0
    shared: bool = True

    @property
    def name(self) -> str:
        n = self.network
        parts = [f"{self.mode} x{self.sessions} T {self.temperature:g}"]
        if MODES[self.mode].drafts != "server":
            extra = {"jitter": n.jitter, "up": n.up, "down": n.down}
            parts.append(f"rtt {n.rtt:g}" + "".join(f" {name} {value:g}" for name, value in extra.items() if value))
        return ", ".join(parts + [f"{self.nodes} nodes"] * bool(self.nodes) + ["independent noise"] * (not self.shared))


def core_times() -> list[tuple[int, int]]:
    """Busy and all jiffies of cores 0 and 1 so far."""
    found = []
    with open("/proc/stat") as file:
        for line in file:
            if line.startswith(("cpu0 ", "cpu1 ")):
                ticks = [int(f) for f in line.split()[1:9]]
                found.append((sum(ticks) - ticks[3] - ticks[4], sum(ticks)))
    return found


class Bench:
    """The processes, and the texts that they have made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.most = max([*args.sessions, 2])
        target, draft = PAIRS[args.pair]
        cores = (0, 1) if args.device == "cpu" else (None, None)
        kv = max(4096, (self.most + 1) * (PREFIX + args.tokens + 128))
        dtype = "float32" if args.pair == "narrow" else "bfloat16"
        own = disturbed(ROOT / "build" / f"draft-{args.draft_noise:g}", args.draft_noise) if args.draft_noise else DEMO / "draft"
        self.setup = Setup(DEMO / "target", own, target, draft, args.device, dtype, self.most, kv, *cores)
        pin(self.setup.edge_core)  # the network, which lives in this process, is on the edges' side
        self.server = Role(ServerRole, self.setup)
        self.edges: list[Role] = []
        self.target_pace, self.draft_pace = self.server.ask("measure")
        self.prompts = self._prompts(self.most * args.waves * args.repetitions + max(SEARCHED, self.most))
        self.best: dict[float, DraftConfig] = {}  # of the co-located mode, by temperature

    def close(self) -> None:
        for role in (self.server, *self.edges):
            role.close()

    def _prompts(self, count: int) -> list[list[int]]:
        """PREFIX tokens from the middle of files that the pair has not been trained on."""
        from tools.train_demo import held_back, library_files

        files = [f for f in library_files() if held_back(f)]
        each = self.server.ask("encode", [f.read_text(encoding="utf-8") for f in files])
        cut = [ids[at : at + PREFIX] for part in (0.5, 0.25, 0.75) for ids in each if (at := int(len(ids) * part)) + PREFIX < len(ids)]
        if len(cut) < count:
            raise SystemExit(f"bench.serve: the run wants {count} prompts, and there are {len(cut)}: ask for fewer repetitions, waves or sessions")
        return cut[:count]

    # ------------------------------------------------------------------------------------------------------------------

    def search(self, temperature: float) -> dict[str, Any]:
        """Depth and size at which drafting on the server is fastest. The pair as it ships says how many tokens each of GRID brings, the measured
        times which of them are promising, and these are run in earnest; so is the drafter's own rule."""
        params = SamplingParams(temperature=temperature, max_tokens=min(48, self.args.tokens), ignore_eos=True)
        waves = [[(self.prompts[-1 - i], replace(params, seed=i))] for i in range(SEARCHED)]

        def attempt(depth: int, size: int, narrow: bool) -> tuple[dict[str, Any], float]:
            config = replace(co_located(size), depth=depth) if depth else co_located(size)
            records, log = self.server.ask("colocated", waves, config, narrow)
            found = figures(records, log, [], (1, 1))
            return found, len(log["grows"]) / len(log["steps"])

        tokens, expected = dict[int, float](), dict[tuple[int, int], float]()
        for depth, size in GRID:
            found, forwards = attempt(depth, size, True)
            takes = forwards * (seconds(self.draft_pace, min(8, size)) + PYTHON) + seconds(self.target_pace, size + 1) + PYTHON
            expected[depth, size] = found["tokens_per_round"] / takes
            tokens[size] = max(tokens.get(size, 0.0), found["tokens_per_round"])
        final = sorted(expected, key=lambda key: expected[key])[-FINALISTS:]
        final.append((0, final[-1][1]))
        rates = {key: float(attempt(*key, False)[0]["tokens_per_s"]) for key in final}
        depth, size = max(rates, key=lambda key: rates[key])
        return {
            "depth": depth, "size": size, "tokens_per_s": rates[depth, size], "tokens_per_round": tokens,
            "finalists": {f"{d} x {n}" if d else f"own rule x {n}": rate for (d, n), rate in rates.items()},
        }  # fmt: skip

    def use(self, temperature: float, found: dict[str, Any]) -> None:
        """Take what `search` has found."""
        own = co_located(found["size"])
        self.best[temperature] = replace(own, depth=found["depth"]) if found["depth"] else own

    def run(self, cell: Cell, repetition: int) -> dict[str, Any]:
        """One repetition of a cell: its figures, the digests of its texts, and under "logs" what the figures come from."""
        mode, a = MODES[cell.mode], self.args
        first = repetition * a.waves * self.most
        asked = [[first + w * self.most + s for s in range(cell.sessions)] for w in range(a.waves)]
        params = SamplingParams(temperature=cell.temperature, max_tokens=a.tokens, ignore_eos=True)
        warm = [(self.prompts[-1 - s], replace(params, seed=s, max_tokens=min(WARM, a.tokens))) for s in range(cell.sessions)]
        waves = [warm] + [[(self.prompts[i], replace(params, seed=i)) for i in wave] for wave in asked]
        self._ready(cell.sessions if mode.drafts != "server" else 0)
        before, began = core_times(), time.monotonic()
        edges, wire = list[dict[str, Any]](), list[Any]()
        if mode.drafts == "server":
            records, server = self.server.ask("colocated", waves, replace(self.best[cell.temperature], max_sessions=cell.sessions))
        else:
            records, server, edges, wire = self._over_the_wire(cell, mode, waves)
        records = records[1:]
        busy = [(b1 - b0) / max(1, t1 - t0) for (b0, t0), (b1, t1) in zip(before, core_times(), strict=True)]
        found = figures(records, server, edges if mode.drafts == "edge" else [], (a.server_price, a.edge_price))
        digests = {f"{i} T {cell.temperature:g}": digest(r["ids"]) for w, ns in zip(records, asked, strict=True) for r, i in zip(w, ns, strict=True)}
        logs = {"records": records, "server": server, "edges": edges, "wire": wire, "prompts": [[prompt for prompt, _ in wave] for wave in waves]}
        pinned, void = self.setup.edge_core is not None, ""
        if pinned and mode.drafts == "edge" and busy[1] > BUSY:
            void = f"the edges' core was {busy[1]:.0%} busy"
        if pinned and busy[0] - server["cpu"] / (time.monotonic() - began) > FOREIGN:
            void = "others used the server's core"
        found |= {
            "cell": cell.name, "mode": cell.mode, "sessions": cell.sessions, "temperature": cell.temperature, "repetition": repetition,
            "edge_core_busy": busy[1] if pinned else None, "void": void,
            "drafter": {"tree_size": cell.nodes or a.nodes, "proactive": mode.proactive, "ahead": mode.ahead,
                        "depth": FIXED if cell.nodes else None},
            "world": {"target": self.target_pace, "draft": self.draft_pace, "rtt": cell.network.rtt / 1e3, "pipeline": mode.pipeline,
                      "admission": not cell.nodes, "prompt": PREFIX, "cached": True} if mode.drafts == "edge" else None,
            "round_ms": breakdown(rounds(logs)) if mode.drafts == "edge" else {}, "ids": digests, "logs": logs,
        }  # fmt: skip
        return found

    def _config(self, cell: Cell) -> DraftConfig:
        """How an edge of this cell drafts."""
        own = co_located(cell.nodes or self.args.nodes)
        mode = MODES[cell.mode]
        config = replace(own, max_sessions=1, proactive=mode.proactive, ahead=mode.ahead, autopilot=self.args.autopilot)
        return replace(config, depth=FIXED) if cell.nodes else config

    def _ready(self, edges: int) -> None:
        """Have so many edges up, for their start takes seconds of a core."""
        while len(self.edges) < edges:
            self.edges.append(Role(EdgeRole, self.setup, self.draft_pace))
            self.edges[-1].ask("ready")

    def _over_the_wire(
        self, cell: Cell, mode: Mode, waves: list[list[tuple[list[int], SamplingParams]]]
    ) -> tuple[list[list[Record]], dict[str, Any], list[dict[str, Any]], list[Any]]:  # fmt: skip
        config = self._config(cell) if mode.drafts == "edge" else None
        edges = self.edges[: cell.sessions]
        with Wan(self.server.ask("start", not cell.nodes, mode.pipeline), cell.network) as wan:
            for edge in edges:
                edge.tell("start", wan.address, config, cell.shared)
            for edge in edges:
                edge.hear()
            records = []
            for wave in waves:
                for edge, request in zip(edges, wave, strict=True):
                    edge.tell("read", *request)
                reading = [edge.hear() for edge in edges]
                for edge, request in zip(edges, wave, strict=True):
                    edge.tell("go", *request)
                records.append([edge.hear() | {"ttft": ttft} for edge, ttft in zip(edges, reading, strict=True)])
            for edge in edges:
                edge.tell("stop")
            logs = [edge.hear() for edge in edges]
        return records, self.server.ask("stop"), logs, wan.log


def disturbed(folder: Path, noise: float) -> Path:
    """A draft about as good as those of the paper: the target itself, every matrix of it disturbed by
    `noise` times its deviation. What it costs is the widened shape's affair."""
    return rewrite(DEMO / "target", folder, lambda t: (t.float() + noise * t.float().std() * torch.randn(t.shape)).to(t.dtype) if t.dim() > 1 else t)


SEARCHED, FINALISTS = 4, 4  # texts of the search, and what is run in earnest
PYTHON = 2e-3  # seconds that it adds to a forward, for the search's first guess


def co_located(nodes: int) -> DraftConfig:
    """A drafter of trees of `nodes`, by its own rule of depth; where it does not pay the figures must show that, so no autopilot."""
    return DraftConfig(tree_size=nodes, proactive=False, autopilot=False, engine=EngineConfig(kv_tokens=4096, max_rows=256))


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """What one repetition runs, modes in alternation; then what single claims need, and the sweep."""
    network, seen = Network(args.rtt, args.jitter, args.up, args.down), set[Cell]()
    plan = [Cell(mode, n, t, network) for t in args.temperatures for n in args.sessions for mode in args.modes]
    if args.claims:
        plan += [Cell(ALL_ON, 2, t, network, 31) for t in args.temperatures]
        plan += [Cell(ALL_ON, 2, t, network, 31, shared) for t in (0.7, 1.0) for shared in (True, False)]
        plan.append(Cell(ALL_ON, 2, 0.7, replace(network, rtt=50.0)))
    if args.sweep:
        plan += [Cell(mode, 2, 0.7, each) for each in SWEEPS[args.sweep] for mode in args.modes if MODES[mode].drafts == "edge"]
    for cell in plan:
        if cell not in seen:
            seen.add(cell)
            yield cell


class Results:
    """The lines of a file that were made under the same conditions, and room for more."""

    def __init__(self, path: Path | None, conditions: dict[str, Any]) -> None:
        self._path, self._conditions = path, json.loads(json.dumps(conditions))
        self.lines: list[dict[str, Any]] = []
        if path and path.exists():
            every = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            self.lines = [line for line in every if line["conditions"] == self._conditions]

    def find(self, **wanted: object) -> dict[str, Any] | None:
        return next((line for line in self.lines if all(line.get(k) == v for k, v in wanted.items())), None)

    def add(self, line: dict[str, Any]) -> None:
        line = {"conditions": self._conditions} | line
        self.lines.append(line)
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def differences(results: list[dict[str, Any]]) -> list[str]:
    """Sentences on texts that were not the same everywhere."""
    seen: dict[str, dict[str, list[str]]] = {}
    for r in results:
        for text, d in r["ids"].items():
            seen.setdefault(text, {}).setdefault(d, []).append(r["cell"])
    return [f"prompt {text}: {'; '.join(f'{d} in {sorted(set(cells))}' for d, cells in ds.items())}" for text, ds in seen.items() if len(ds) > 1]


def conclude(lines: list[dict[str, Any]], rtt: float, facts: dict[str, Any]) -> int:
    """Print what was found, as tables and as a last line of JSON; returns the exit status."""
    wrong = differences(lines)
    print(report(lines, wrong, list(MODES), rtt))
    print(json.dumps({**facts, "wrong": wrong, "cells": lines}))
    return 1 if wrong else 0


def measure(bench: Bench, results: Results, args: argparse.Namespace) -> None:
    """Everything that is not there yet."""
    for t in sorted({c.temperature for c in cells(args)}):
        found = results.find(kind="search", temperature=t)
        if found is None:
            depth, size = args.baseline or (0, 31)
            given = args.baseline or t not in args.temperatures
            found = {"depth": depth, "size": size} if given else bench.search(t)
            found |= {"kind": "search", "temperature": t}
            results.add(found)
        bench.use(t, found)
        print(f"co-located at T {t:g}: {json.dumps({k: found[k] for k in found if k not in ('kind', 'conditions')})}", flush=True)
    for repetition in range(args.repetitions):
        for cell in cells(args):
            if results.find(kind="cell", cell=cell.name, repetition=repetition) is None:
                found = bench.run(cell, repetition)
                del found["logs"]
                results.add({"kind": "cell"} | found)
                print(
                    f"{time.strftime('%T')} {cell.name} #{repetition}: {found['tokens_per_s']:.1f} tokens/s of {found['bound_tokens_per_s']:.1f}, "
                    f"TPOT {found['tpot_ms']:.1f} ms" + f", void: {found['void']}" * bool(found["void"]), flush=True,
                )  # fmt: skip


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the server")
    p.add_argument("--pair", choices=PAIRS, help="shapes of target and draft; default 0.5b on a CPU, 8b on a GPU")
    p.add_argument("--quick", action="store_true", help="fewer and shorter texts: at most 15 minutes on a CPU")
    p.add_argument("--sessions", type=int, nargs="+", help="default 1 2 4 8")
    p.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.0])
    p.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--tokens", type=int, help="of each text")
    p.add_argument("--waves", type=int, help="texts that a session runs one after the other in a cell")
    p.add_argument("--repetitions", type=int)
    p.add_argument("--nodes", type=int, default=31, help="of the edges' trees at most")
    p.add_argument("--draft-noise", type=float, default=0.0, metavar="S", help="draft with the target's own weights and noise of S deviations")
    p.add_argument("--baseline", type=int, nargs=2, metavar=("DEPTH", "SIZE"), help="of the co-located mode, not searched; depth 0: its own rule")
    p.add_argument("--autopilot", action="store_true", help="let edges leave texts to the server where drafts do not pay, as they ship")
    p.add_argument("--no-claims", dest="claims", action="store_false", help="leave out the cells that single claims need")
    p.add_argument("--sweep", choices=SWEEPS)
    p.add_argument("--rtt", type=float, default=15.0, help="milliseconds")
    p.add_argument("--jitter", type=float, default=0.0, help="milliseconds each way at most")
    p.add_argument("--up", type=float, default=0.0, help="Mbit/s from an edge; 0: no limit")
    p.add_argument("--down", type=float, default=0.0, help="Mbit/s to an edge; 0: no limit")
    p.add_argument("--server-price", type=float, default=4.05, help="dollars an hour; default: the paper's A100 of 40 GB")
    p.add_argument("--edge-price", type=float, default=0.35, help="dollars an hour; default: the paper's RTX 4090")
    p.add_argument("--out", type=Path, help="file of results, from which a run resumes; default build/serve.jsonl, none with --quick")
    p.add_argument("--timeline", type=Path, help="draw two edges with everything on as SVG")
    p.add_argument("--perfetto", type=Path, help="the same as a trace for ui.perfetto.dev")
    args = p.parse_args()
    args.pair = args.pair or ("0.5b" if args.device == "cpu" else "8b")
    args.sessions = args.sessions or ([1, 2] if args.quick else [1, 2, 4, 8])
    args.tokens = args.tokens or (48 if args.quick else 96)
    args.waves = args.waves or (1 if args.quick else 2)
    args.repetitions = args.repetitions or (2 if args.quick else 3)
    args.out = args.out or (None if args.quick else ROOT / "build" / "serve.jsonl")
    return args


def main() -> None:
    args = arguments()
    described = machine(1)
    described.pop("date")
    print(", ".join(f"{k} {v}" for k, v in described.items()))
    fixed = ("device", "pair", "draft_noise", "tokens", "waves", "nodes", "baseline", "autopilot", "server_price", "edge_price")
    results = Results(args.out, {**described, "prompts": max([*args.sessions, 2]), **{k: getattr(args, k) for k in fixed}})
    bench = Bench(args)
    try:
        ratio = seconds(bench.draft_pace, 8) / seconds(bench.target_pace, 32)
        paces = {"target": bench.target_pace, "draft": bench.draft_pace}
        for name, pace in paces.items():
            print(f"{name}, ms by rows: " + ", ".join(f"{rows}: {s * 1e3:.1f}" for rows, s in pace))
        print(f"a draft forward of 8 rows takes {ratio:.2f} of a target's of 32")
        measure(bench, results, args)
        if args.timeline or args.perfetto:
            cell = Cell(ALL_ON, 2, args.temperatures[0], Network(args.rtt))
            logs = bench.run(cell, 0)["logs"]
            if args.timeline:
                title = f"Two edges, one server: everything on, RTT {args.rtt:g} ms, T {cell.temperature:g}"
                args.timeline.write_text(draw(logs, title))
            if args.perfetto:
                args.perfetto.write_text(json.dumps(perfetto(logs)))
    finally:
        bench.close()
    lines = [line for line in results.lines if line["kind"] == "cell"]
    sys.exit(conclude(lines, args.rtt, {**described, "ratio": ratio, "paces": paces}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("bench.serve: interrupted; the same command goes on from the file of results, if there is one") from None
