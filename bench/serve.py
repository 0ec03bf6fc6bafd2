"""All modes of serving side by side: the target alone, drafting beside it, and drafting on edges, in the same run and with the same ids.

    make bench-serve            # everything, resumed cell by cell from build/serve.jsonl
    python -m bench.serve --quick
    python -m bench.serve --quick --sweep rtt --timeline build/timeline.svg

The shipped pair is widened to shapes of real cost (bench/widen.py). On a CPU the server has one core, and in the co-located mode the draft shares it; each
edge stands for a machine of its own: on the other core it runs the shipped draft, which has the same ids, and waits out the rest of the wide one's time,
measured beforehand. A cell whose edge core is over 70 % busy is void. The network between is bench/wan.py.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.cells import Record, digest, figures
from bench.common import SHAPES
from bench.logged import Pace, seconds
from bench.roles import EdgeRole, Role, ServerRole, Setup
from bench.step import machine
from bench.wan import Network, Wan
from specedge.config import DraftConfig, EngineConfig, ModelConfig, SamplingParams

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "specedge" / "demo"
BUSY = 0.70  # of the edges' core: above it they are no machines of their own any more
PREFIX = 96  # tokens of a prompt
PAIRS: dict[str, tuple[ModelConfig | None, ModelConfig | None]] = {  # target and draft; the ratio of their forwards is the paper's, 0.12 to 0.18
    "narrow": (None, None),  # for a test of this program
    "0.5b": (SHAPES["0.5b"], ModelConfig(640, 10, 10, 2, 64, 2048, 32000, 1e-6, 1e4, 8192, True)),
    "8b": (ModelConfig(4096, 36, 32, 8, 128, 12288, 151936, 1e-6, 1e6, 8192, False), ModelConfig(1024, 28, 16, 8, 64, 3072, 151936, 1e-6, 1e4, 8192, True)),
    "14b": (ModelConfig(5120, 40, 40, 8, 128, 17408, 151936, 1e-6, 1e6, 8192, False), ModelConfig(1024, 28, 16, 8, 64, 3072, 151936, 1e-6, 1e4, 8192, True)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mode:
    """Who drafts, and what is switched on: options of DraftConfig and of Server."""

    drafts: str  # nobody, server, edge
    draft: dict[str, object]
    server: dict[str, object]


MODES = {
    "autoregressive": Mode("nobody", {}, {}),
    "co-located": Mode("server", {"proactive": False}, {}),
    "edge": Mode("edge", {"proactive": False}, {}),
    "+ growth in flight": Mode("edge", {"proactive": True}, {}),
}
ALL_ON = list(MODES)[-1]


@dataclass(frozen=True, slots=True)
class Cell:
    """One set of conditions."""

    mode: str
    sessions: int
    temperature: float
    network: Network
    shared: bool = True  # noise

    @property
    def name(self) -> str:
        n = self.network
        extra = f" jitter {n.jitter:g}" * bool(n.jitter) + f" up {n.up:g}" * bool(n.up) + " independent noise" * (not self.shared)
        return f"{self.mode} x{self.sessions} T {self.temperature:g} rtt {n.rtt:g}{extra}"


def core_times(core: int) -> tuple[int, int]:
    """Busy and all jiffies of a core so far."""
    with open("/proc/stat") as file:
        fields = next(line.split()[1:] for line in file if line.startswith(f"cpu{core} "))
    ticks = [int(f) for f in fields[:8]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


class Bench:
    """The processes, and what they have measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        target, draft = PAIRS[args.pair]
        cores = (0, 1) if args.device == "cpu" else (None, None)
        kv = (max(args.sessions) + 1) * (PREFIX + args.tokens + 128)
        dtype = "float32" if args.pair == "narrow" else "bfloat16"
        self.setup = Setup(DEMO / "target", DEMO / "draft", target, draft, args.device, dtype, max(args.sessions), max(4096, kv), *cores)
        self.server = Role(ServerRole, self.setup)
        self.edges: list[Role] = []
        self.target_pace, self.draft_pace = self.server.ask("measure")
        self.prompts = self._prompts(max(args.sessions) * args.waves * args.repetitions)
        self.ids: dict[tuple[int, float], dict[str, str]] = {}  # (prompt, temperature): digest by cell
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
            raise SystemExit(f"bench.serve: the run wants {count} prompts, and there are {len(cut)}: ask for fewer repetitions or waves")
        return cut[:count]

    # ------------------------------------------------------------------------------------------------------------------

    def run(self, cell: Cell, repetition: int) -> dict[str, Any]:
        """One repetition of a cell: its figures, and under "logs" what they come from."""
        mode, a = MODES[cell.mode], self.args
        first = repetition * a.waves * max(a.sessions)
        asked = [[first + w * max(a.sessions) + s for s in range(cell.sessions)] for w in range(a.waves)]
        params = SamplingParams(temperature=cell.temperature, max_tokens=a.tokens, ignore_eos=True)
        waves = [[(self.prompts[i], replace(params, seed=i)) for i in wave] for wave in asked]
        before = [core_times(c) for c in (0, 1)] if self.setup.server_core is not None else []
        if mode.drafts == "server":
            config = replace(self.best[cell.temperature], max_sessions=cell.sessions)
            records, server = self.server.ask("colocated", waves, config)
            edges, wire = [], []
        else:
            config = None
            if mode.drafts == "edge":
                config = DraftConfig(tree_size=a.nodes, depth=a.depth, max_sessions=1, engine=EngineConfig(kv_tokens=4096, max_rows=256), **mode.draft)  # type: ignore[arg-type]
            records, server, edges, wire = self._over_the_wire(cell, mode, waves, config)
        busy = [(b1 - b0) / max(1, t1 - t0) for (b0, t0), (b1, t1) in zip(before, [core_times(c) for c in (0, 1)], strict=False)]
        for wave, numbers in zip(records, asked, strict=True):
            for record, i in zip(wave, numbers, strict=True):
                self.ids.setdefault((i, cell.temperature), {})[f"{cell.name} #{repetition}"] = digest(record["ids"])
        found = figures(records, server, edges if mode.drafts == "edge" else [], (a.server_price, a.edge_price))
        found |= {"cell": cell.name, "repetition": repetition, "server_core_busy": busy[0] if busy else None, "edge_core_busy": busy[1] if busy else None}
        found["void"] = bool(busy) and mode.drafts == "edge" and busy[1] > BUSY
        found["logs"] = {"records": records, "server": server, "edges": edges, "wire": wire}
        return found

    def _over_the_wire(
        self, cell: Cell, mode: Mode, waves: list[list[tuple[list[int], SamplingParams]]], config: DraftConfig | None
    ) -> tuple[list[list[Record]], dict[str, Any], list[dict[str, Any]], list[Any]]:  # fmt: skip
        while len(self.edges) < cell.sessions:
            self.edges.append(Role(EdgeRole, self.setup, self.draft_pace))
        edges = self.edges[: cell.sessions]
        with Wan(self.server.ask("start", mode.server), cell.network) as wan:
            for edge in edges:
                edge.tell("start", wan.address, config, cell.shared)
            for edge in edges:
                edge.hear()
            records = []
            for wave in waves:
                for edge, request in zip(edges, wave, strict=True):
                    edge.tell("go", *request)
                records.append([edge.hear() for edge in edges])
            for edge in edges:
                edge.tell("stop")
            logs = [edge.hear() for edge in edges]
        return records, self.server.ask("stop"), logs, wan.log

    def different(self) -> list[str]:
        """Sentences on texts that were not the same everywhere."""
        return [
            f"prompt {i} at T {t:g}: " + ", ".join(f"{cell} {d}" for cell, d in cells.items())
            for (i, t), cells in self.ids.items() if len(set(cells.values())) > 1
        ]  # fmt: skip


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """What is run, in the order of one repetition."""
    for temperature in args.temperatures:
        for sessions in args.sessions:
            for mode in args.modes:
                yield Cell(mode, sessions, temperature, Network(args.rtt, args.jitter, args.up, args.down))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the server")
    p.add_argument("--pair", choices=PAIRS, help="shapes of target and draft; default 0.5b on a CPU, 8b on a GPU")
    p.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    p.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--tokens", type=int, default=64, help="of each text")
    p.add_argument("--waves", type=int, default=2, help="texts that a session runs one after the other in a cell")
    p.add_argument("--repetitions", type=int, default=3)
    p.add_argument("--nodes", type=int, default=31)
    p.add_argument("--depth", type=int, default=12)
    p.add_argument("--rtt", type=float, default=15.0)
    p.add_argument("--jitter", type=float, default=0.0)
    p.add_argument("--up", type=float, default=0.0)
    p.add_argument("--down", type=float, default=0.0)
    p.add_argument("--server-price", type=float, default=4.05)
    p.add_argument("--edge-price", type=float, default=0.35)
    args = p.parse_args()
    args.pair = args.pair or ("0.5b" if args.device == "cpu" else "8b")
    bench = Bench(args)
    print({r: round(t * 1e3, 1) for r, t in bench.target_pace}, {r: round(t * 1e3, 1) for r, t in bench.draft_pace})
    for t in args.temperatures:
        bench.best[t] = DraftConfig(tree_size=args.nodes, depth=args.depth, engine=EngineConfig(kv_tokens=4096, max_rows=256), proactive=False)
    for rep in range(args.repetitions):
        for cell in cells(args):
            t = time.time()
            r = bench.run(cell, rep)
            r.pop("logs")
            print(f"{time.time() - t:.1f}s", json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()}), flush=True)
    print(*bench.different(), sep="\n")
    bench.close()


if __name__ == "__main__":
    main()
