"""One forward pass by number of rows and context, beside its floor and beside other engines.

Decoding of 1, 4 and 16 sequences, verification of 8 to 64 rows, a prompt of 512:

    python -m bench.step --shape 0.5b --dtype bfloat16 float32 --out bench/results/step.jsonl

Random weights, K/V of zeros: the time does not depend on values. Every engine has a process of its own and they take turns in every case: a
change of the machine's speed in mid-run (one's memory flips between 45 and 77 GB/s) meets them all, the floor among them. A figure is the median
over rounds, and the ratio to a peer that of their rounds in pairs. The floor: weights and K/V once at the streaming rate, or the products at the
GEMM rate, whichever takes longer.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path

import torch

from bench.column import Case, Column
from bench.common import SHAPES, gemm_ceiling, random_runner, stream_ceiling, weight_bytes
from bench.peers import NAMES, make_peer
from specedge import __version__, kernels
from specedge.config import EngineConfig, ModelConfig, SpecedgeError
from specedge.engine.batch import BatchBuilder
from specedge.engine.runner import Runner, choose

CASES: list[Case] = []
for _context in (128, 1024, 4096):  # contexts in turn, because one peer fills its cache by running the tokens
    CASES += [("decode", b, 1, _context) for b in (1, 4, 16)] + [("verify", 1, rows, _context) for rows in (8, 16, 32, 64)]
CASES.append(("prompt", 1, 512, 0))
QUICK: list[Case] = [("decode", 1, 1, 128), ("decode", 4, 1, 128), ("verify", 1, 16, 128), ("verify", 1, 32, 1024), ("prompt", 1, 512, 0)]
WIDTH: dict[str, float] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 4.5 / 8}  # bytes of a weight by dtype
ROOT = Path(__file__).parents[1]


class Ours:
    """A runner with pages for `sequences` of `tokens` tokens each."""

    def __init__(self, c: ModelConfig, device: str, dtype: str, sequences: int, tokens: int) -> None:
        where, kind, bits = choose(device, dtype)
        self.version = f"specedge {__version__}, {kernels.backend(where)}"
        self.runner = random_runner(c, EngineConfig(kv_tokens=sequences * -(-tokens // 64) * 64, max_rows=512), where, kind, bits)

    def prepare(self, kind: str, sequences: int, rows: int, context: int) -> None:
        """Nothing: a pass never writes to pages."""

    def step(self, kind: str, sequences: int, rows: int, context: int) -> None:
        self.runner.run(case_batch(self.runner, (kind, sequences, rows, context)))


def case_batch(runner: Runner, case: Case) -> BatchBuilder:
    """The batch of a case; its sequences hold the first pages."""
    kind, sequences, rows, context = case
    batch, need = runner.batch(), -(-context // runner.sizes.page_size)
    for s in range(sequences):
        first = batch.rows
        # a tree of two chains below its root: what matters for time is how many rows there are and that they are no chunk
        anc = None if kind != "verify" else [1 | sum(1 << j for j in range(1, i + 1) if j % 2 == i % 2) for i in range(rows)]
        positions = [context + (i if kind != "verify" else (i + 1) // 2) for i in range(rows)]
        wanted = [rows - 1] if kind == "prompt" else list(range(rows))
        table = list(range(s * need, (s + 1) * need))
        batch.add([1] * rows, positions, list(range(first, first + rows)), (first, rows), context, table, anc, wanted)
    return batch


def work(c: ModelConfig, width: float, kv_size: int, case: Case) -> tuple[float, float]:
    """Bytes and operations of a case, with weights of `width` bytes and K/V of `kv_size`: weights and K/V once, every product once."""
    kind, sequences, rows, context = case
    total = sequences * rows
    weights = weight_bytes(c, width)
    heads = total if kind != "prompt" else 1  # rows that pass through the output head
    flops = 2 * (weights / width - c.vocab * c.hidden) * total + 2 * c.vocab * c.hidden * heads
    flops += 4 * total * (context + rows) * c.heads * c.head_dim * c.layers
    return weights + sequences * context * c.kv_bytes_per_token(kv_size), flops


def floor_ms(c: ModelConfig, width: float, kv_size: int, case: Case, gb_per_s: float, gflop_per_s: float) -> float:
    """The least time of a case: its bytes at the streaming rate or its operations at the GEMM rate."""
    moved, flops = work(c, width, kv_size, case)
    return max(moved / gb_per_s, flops / gflop_per_s) / 1e6


def machine(threads: int) -> dict[str, str | int]:
    """What a result depends on besides the code: CPU, threads, time, and the commit (with + where files differ from it)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
        commit = described.stdout.strip() or "unknown"
    except OSError:  # no git here
        commit = "unknown"
    return {"cpu": cpu, "arch": platform.machine(), "threads": threads, "torch": torch.__version__, "commit": commit, "date": time.strftime("%F %T")}


def start(args: argparse.Namespace, c: ModelConfig, device: torch.device, cases: list[Case]) -> dict[str, Column | None]:
    """The columns by name, ours first; None for a peer that is not installed or does not start."""
    sequences, tokens = max(case[1] for case in cases), max(case[3] + case[2] for case in cases)
    kind = choose(str(device), args.dtype[0])[1]  # what peers compute in: their ratios are to our first column
    columns: dict[str, Column | None] = {}
    for name in args.dtype:
        columns[name] = column = Column(name, partial(Ours, c, str(device), name, sequences, tokens), args.threads)
        print(f"{name}: {column.version}", flush=True)
    for name in args.peers:
        try:
            columns[name] = column = Column(name, partial(make_peer, name, c, device, kind, args.threads, sequences, tokens), args.threads)
        except ImportError as error:
            print(f"{name}: {error.name} is not installed and the column stays empty; get it by pip install -e '.[bench]'")
            columns[name] = None
        except SpecedgeError as error:
            print(f"{name}: did not start and the column stays empty: {error}")
            columns[name] = None
        else:
            print(f"{name}: {column.version}", flush=True)
    return columns


def measure(
    columns: dict[str, Column | None], case: Case, stream: torch.Tensor, args: argparse.Namespace
) -> tuple[list[float], dict[str, list[float]], set[str]]:
    """By round: the streaming rates in GB/s, and the milliseconds of each column (none where it cannot do the case); why it cannot."""
    rates: list[float] = []
    turns: dict[str, list[float]] = {name: [] for name in columns}
    notes = set()
    for _ in range(args.rounds):
        rates.append(stream_ceiling(stream, 0))
        for name, column in columns.items():
            took = column.turn(case, args.seconds / args.rounds) if column else None
            if isinstance(took, float):
                turns[name].append(took)
            elif took:
                notes.add(took)
    return rates, turns, notes


def table_row(case: Case, floors: dict[str, float], turns: dict[str, list[float]]) -> str:
    """Ours, which have a floor, and then the peers; ratios are medians over pairs of the same round."""
    kind, sequences, rows, context = case
    row = f"{f'{kind} {sequences} x {rows} @ {context}':<20}"
    ours = next(iter(turns.values()))
    for name, took in turns.items():
        cell = "-"
        if took:
            ms = statistics.median(took)
            cell = f"{ms:.2f} ±{(max(took) - min(took)) / 2 / ms:>3.0%}"
            if name in floors:
                cell += f"{floors[name] / ms:>5.0%}"
            elif len(took) == len(ours):
                cell += f" x{statistics.median(theirs / mine for theirs, mine in zip(took, ours, strict=True)):.2f}"
        row += f"{floors[name]:>8.2f}{cell:>19}" if name in floors else f"{cell:>20}"
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--shape", choices=SHAPES, default="0.5b")
    p.add_argument("--device", choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=WIDTH, nargs="+", default=["bfloat16"], help="ours, a column each; ratios are to the first")
    p.add_argument("--peers", choices=NAMES, nargs="*", help="default: all on a CPU, transformers on a GPU")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--seconds", type=float, default=2.0, help="time spent on each column of each case")
    p.add_argument("--rounds", type=int, default=5, help="turns that the columns take in each case")
    p.add_argument("--quick", action="store_true", help="a few cases, to see that it works")
    p.add_argument("--out", type=Path, help="append the JSON line to this file")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    device, c, cases = choose(args.device, None)[0], SHAPES[args.shape], QUICK if args.quick else CASES
    if args.peers is None:
        args.peers = list(NAMES if device.type == "cpu" else NAMES[:1])

    stream = torch.ones(125_000_000, device=device)
    gb_per_s = stream_ceiling(stream, args.seconds)
    chosen = {name: choose(str(device), name)[1:] for name in args.dtype}  # what is computed and cached, and the bits of weights
    # processors multiply 8-bit integers at twice the rate of bfloat16
    gflop_per_s = {name: gemm_ceiling(device, kind, args.seconds / 2) * (2 if bits else 1) for name, (kind, bits) in chosen.items()}
    described = machine(args.threads)
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    print(f"ceilings: streaming sum {gb_per_s:.1f} GB/s, GEMM " + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in gflop_per_s.items()))
    for name in args.dtype:
        print(f"{args.shape} in {name}: {weight_bytes(c, WIDTH[name]) / 1e9:.2f} GB of weights")
    columns = start(args, c, device, cases)
    versions = {name: column.version for name, column in columns.items() if column}
    print(f"ms, half the range over {args.rounds} rounds in %; ours: share of the floor; peers: times as long as {args.dtype[0]}")
    print(f"{'case':<20}" + "".join(f"{'floor':>8}{name:>19}" for name in args.dtype) + "".join(f"{name:>20}" for name in args.peers))
    results, notes = [], set[str]()
    for case in cases:
        rates, turns, why = measure(columns, case, stream, args)
        gb_per_s = statistics.median(rates)
        floors = {name: floor_ms(c, WIDTH[name], kind.itemsize, case, gb_per_s, gflop_per_s[name]) for name, (kind, _) in chosen.items()}
        print(table_row(case, floors, turns), flush=True)
        notes |= why
        results.append({"case": case, "stream_gb_per_s": rates, "floor_ms": floors, "turns_ms": turns})
    print(*sorted(notes), sep="\n", end="\n" if notes else "")
    answer = json.dumps({"shape": args.shape, "device": str(device), **described, "versions": versions, "gemm_gflop_per_s": gflop_per_s,
                         "cases": results})  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(answer + "\n")
    print(answer)


if __name__ == "__main__":
    try:
        main()
    except SpecedgeError as error:
        raise SystemExit(f"bench.step: {error}") from None
