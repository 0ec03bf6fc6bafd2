"""One forward pass by number of rows and context: decoding of 1, 4 and 16 sequences, trees of 8 to 64 rows, a prompt of 512.

    python -m bench.step --shape 0.5b --dtype bfloat16

Random weights, K/V of zeros: the time does not depend on values. Each line: the floor (weights and K/V once at the streaming rate, or the
products at the GEMM rate, whichever takes longer), the time, the share.
"""

import argparse
import json
import platform

import torch

from bench.common import SHAPES, ceilings, median_ms, random_runner, weight_bytes
from specedge import kernels
from specedge.config import EngineConfig
from specedge.engine.runner import Runner, choose

CASES = [
    *(("decode", b, 1, ctx) for b in (1, 4, 16) for ctx in (128, 1024, 4096)),
    *(("tree", 1, rows, ctx) for rows in (8, 16, 32, 64) for ctx in (128, 1024, 4096)),
    ("prompt", 1, 512, 0),
]


def step(runner: Runner, kind: str, sequences: int, rows: int, context: int) -> None:
    """One pass of `rows` rows for each of `sequences` sequences behind `context` tokens."""
    batch, pages = runner.batch(), runner.sizes.pages
    need = -(-context // runner.sizes.page_size)
    for s in range(sequences):
        first = batch.rows
        # a tree of two chains below its root: what matters for time is how many rows there are and that they are no chunk
        anc = None if kind != "tree" else [1 | sum(1 << j for j in range(1, i + 1) if j % 2 == i % 2) for i in range(rows)]
        positions = [context + (i if kind != "tree" else (i + 1) // 2) for i in range(rows)]
        wanted = [rows - 1] if kind == "prompt" else list(range(rows))
        table = [(s * need + i) % pages for i in range(need)]
        batch.add([1] * rows, positions, list(range(first, first + rows)), (first, rows), context, table, anc, wanted)
    runner.run(batch)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--shape", choices=SHAPES, default="0.5b")
    p.add_argument("--device", choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--seconds", type=float, default=2.0, help="time spent on each case")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = choose(args.device, args.dtype)
    c = SHAPES[args.shape]
    roof = ceilings(device)
    size, weights = dtype.itemsize, weight_bytes(c, dtype.itemsize)
    print(f"{platform.machine()}, {args.threads} threads, {kernels.backend(device)}; {args.shape} in {args.dtype}: {weights / 1e9:.2f} GB of weights")
    print(f"ceilings: streaming sum {roof['stream_gb_per_s']:.1f} GB/s, bf16 GEMM {roof['gemm_gflop_per_s']:.0f} GFLOP/s")
    runner = random_runner(c, EngineConfig(kv_tokens=65536 if args.shape == "60m" else 16384, max_rows=512), device, dtype)
    print(f"{'case':<22}{'floor ms':>10}{'ms':>10}{'share':>8}")
    results = []
    for kind, sequences, rows, context in CASES:
        total = sequences * rows
        heads = total if kind != "prompt" else 1  # rows that pass through the output head
        flops = 2 * (weights / size - c.vocab * c.hidden) * total + 2 * c.vocab * c.hidden * heads
        flops += 4 * total * (context + rows) * c.heads * c.head_dim * c.layers
        moved = weights + sequences * context * c.kv_bytes_per_token(size)
        floor = max(moved / roof["stream_gb_per_s"] / 1e6, flops / roof["gemm_gflop_per_s"] / 1e6)
        took = median_ms(lambda k=kind, s=sequences, r=rows, x=context: step(runner, k, s, r, x), args.seconds)  # type: ignore[misc]
        print(f"{f'{kind} {sequences} x {rows} @ {context}':<22}{floor:>10.2f}{took:>10.2f}{floor / took:>8.0%}", flush=True)
        results.append({"kind": kind, "sequences": sequences, "rows": rows, "context": context, "floor_ms": floor, "ms": took})
    print(json.dumps({"shape": args.shape, "dtype": args.dtype, "device": str(device), "threads": args.threads, **roof, "cases": results}))


if __name__ == "__main__":
    main()
