"""Every op of a step on a CPU by itself, beside its floor: linear layers by dtype and rows, attention, and the small ones.

    python -m bench.kernels --shape 0.5b --dtypes bfloat16 int8

Of a linear layer `gated` is gate and up with their product, as models run them, and `logits` the head into the buffer of a runner. What captured
steps of a GPU use beside these (accept, fill_noise) is in gpu_ops.py. Weights take turns, 256 MB of them, so that they come from DRAM and not from
a cache. Each line: the floor (bytes at the streaming rate, or products at the GEMM rate of their kind, whichever takes longer; integers at twice
the bf16 rate, as the instructions are), the time, the share.
"""

import argparse
import itertools
import json
from collections.abc import Callable

import torch

from bench.common import SHAPES, ceilings, median_ms
from specedge import kernels
from specedge.config import ModelConfig
from specedge.engine.runner import DTYPES
from specedge.kernels.linear import Linear

ROWS = (1, 4, 8, 16, 32, 64, 512)
ROTATE = 256e6  # bytes: two cores of a Xeon with 480 MB of L3 for all read 64 MB at 48 GB/s, 256 MB and more at 25
WIDTH = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 4.5 / 8}  # bytes of a weight
RATE = {"float32": ("float32_gflop_per_s", 1), "bfloat16": ("gemm_gflop_per_s", 1), "int8": ("gemm_gflop_per_s", 2), "int4": ("gemm_gflop_per_s", 2)}
Case = tuple[str, float, float, str, Callable[[], object]]  # name, bytes, operations, of which kind, one call


def linears(c: ModelConfig, name: str, rotate: float = ROTATE) -> list[Case]:
    """The layers of shape `c` with weights of dtype `name`, `rotate` bytes of which take turns."""
    dtype, bits = DTYPES[name]
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    cases: list[Case] = []
    sizes = {
        "qkv": (q + 2 * kv, c.hidden), "out": (c.hidden, q), "gate_up": (2 * c.ffn, c.hidden), "down": (c.hidden, c.ffn),
        "head": (c.vocab, c.hidden), "gated": (2 * c.ffn, c.hidden),
    }  # fmt: skip
    for what, (n, k) in sizes.items():
        weight, gated = (torch.randn(n, k) / k**0.5).to(dtype), what == "gated"
        size = n * k * WIDTH[name]
        turns = itertools.cycle([Linear(weight, bits=bits, gated=gated) for _ in range(1 + int(rotate / size))])
        for rows in ROWS if what != "head" else ROWS[:-1]:
            x, flops = torch.randn(rows, k).to(dtype), 2 * rows * n * k
            moved = size + rows * ((n // 2 if gated else n) + k) * dtype.itemsize
            cases.append((f"linear {name} {what} x {rows}", moved, flops, name, lambda t=turns, x=x: next(t)(x)))  # type: ignore[misc]
            if what == "head":
                logits, moved = torch.empty(rows, n), size + rows * (4 * n + k * dtype.itemsize)
                call = lambda t=turns, x=x, to=logits: next(t)(x, to)  # type: ignore[misc] # noqa: E731
                cases.append((f"linear {name} logits x {rows}", moved, flops, name, call))
    return cases


def attentions(c: ModelConfig, dtype: torch.dtype, rotate: float = ROTATE) -> list[Case]:
    """Rows over a context, as a chunk, or as a tree of two chains that ancestor words describe; the K/V of `rotate` bytes take turns as those of
    layers do."""
    cases: list[Case] = []
    kind = "bfloat16" if dtype == torch.bfloat16 and kernels.backend() == "cpp amx" else "float32"  # others multiply on vectors
    chunks, trees = ((1, 128), (1, 1024), (1, 4096), (32, 1024), (512, 0)), ((32, 1024), (32, 4096))
    for rows, context, tree in [*((*case, False) for case in chunks), *((*case, True) for case in trees)]:
        pages, q = -(-context // 64), torch.randn(rows, c.heads, c.head_dim).to(dtype)
        per_layer = 2 * max(1, pages) * c.kv_heads * 64 * c.head_dim
        store = torch.randn(1 + int(rotate / per_layer / dtype.itemsize), 2, max(1, pages), c.kv_heads, 64, c.head_dim).to(dtype)
        rows_kv = torch.randn(2, rows, c.kv_heads, c.head_dim).to(dtype)
        segments = torch.tensor([[0, rows, 0, rows, context, int(not tree)]], dtype=torch.int32)
        depth = [(i + 1) // 2 if tree else i for i in range(rows)]
        seen = [1 | sum(1 << j for j in range(1, i + 1) if j % 2 == i % 2) if tree else 0 for i in range(rows)]
        table, pos = torch.arange(max(1, pages), dtype=torch.int32)[None], torch.tensor([context + d for d in depth], dtype=torch.int32)
        anc, turns = torch.tensor(seen, dtype=torch.int64)[:, None], itertools.cycle(store)
        keys = rows * context + sum(d + 1 for d in depth)
        moved = (2 * (context + rows) * c.kv_heads + 2 * rows * c.heads) * c.head_dim * dtype.itemsize
        call = lambda q=q, r=rows_kv, t=turns, s=segments, b=table, p=pos, a=anc: kernels.attention(q, r, next(t), s, b, p, p, a, 0.1, 0)  # type: ignore[misc] # noqa: E731
        cases.append((f"attention {'tree ' if tree else ''}{rows} @ {context}", moved, 4 * keys * c.heads * c.head_dim, kind, call))
    return cases


def others(c: ModelConfig, dtype: torch.dtype, rows: int) -> list[Case]:
    """The small ops, in cache as they are in a step; edits of 256 tokens a row."""
    size = dtype.itemsize
    x, gates = torch.randn(rows, c.hidden).to(dtype), torch.randn(rows, 2 * c.ffn).to(dtype)
    norm, of_head, width = torch.ones(c.hidden).to(dtype), torch.ones(c.head_dim).to(dtype), (c.heads + 2 * c.kv_heads) * c.head_dim
    qkv, rows_kv = torch.randn(rows, width).to(dtype), torch.zeros(2, rows, c.kv_heads, c.head_dim).to(dtype)
    angle, index = torch.randn(rows, c.head_dim // 2), torch.arange(rows, dtype=torch.int32)
    logits, noise, ones = torch.randn(rows, c.vocab) * 3, torch.randn(1, c.vocab), torch.ones(rows)
    zeros, half = torch.zeros(rows, dtype=torch.int32), torch.full((rows,), 0.9, dtype=torch.float64)
    buffer, at = torch.zeros(c.layers, 2, rows, c.kv_heads, c.head_dim).to(dtype), torch.arange(rows)
    pages = torch.zeros(c.layers, 2, 4, c.kv_heads, 64, c.head_dim).to(dtype)
    edits = torch.stack((torch.arange(256), torch.ones(256), torch.zeros(256)), 1).int()
    texts, penalties = torch.tensor([[0, 256, 0, 0]] * rows, dtype=torch.int32), torch.full((rows, 3), 1.1)
    edited, bias, none = torch.randn(rows, c.vocab), torch.zeros(256), torch.zeros(1, dtype=torch.int32)
    rope = (angle, angle, index, index, rows_kv, c.heads)
    return [
        (f"rms_norm x {rows}", 2 * x.numel() * size, 0, "float32", lambda: kernels.rms_norm(x, norm, 1e-6)),
        (f"add_rms_norm x {rows}", 4 * x.numel() * size, 0, "float32", lambda: kernels.add_rms_norm(x, x, norm, 1e-6)),
        (f"silu_mul x {rows}", 1.5 * gates.numel() * size, 0, "float32", lambda: kernels.silu_mul(gates)),
        (f"rope_write x {rows}", 2 * qkv.numel() * size, 0, "float32", lambda: kernels.rope_write(qkv, *rope)),
        (f"norm_rope_write x {rows}", 2 * qkv.numel() * size, 0, "float32",
         lambda: kernels.norm_rope_write(qkv, of_head, of_head, 1e-6, *rope)),
        (f"commit x {rows}", 2 * buffer.numel() * size, 0, "float32", lambda: kernels.commit(buffer, pages, at, at // 64, at % 64)),
        (f"adjust x {rows}", 8 * rows * 256, 0, "float32", lambda: kernels.adjust(edited, texts, penalties, edits, bias, none)),
        (f"sample x {rows}", 4 * (logits.numel() + c.vocab), 0, "float32", lambda: kernels.sample(logits, noise, zeros, ones, c.vocab)),
        (f"truncate x {rows}", 8 * logits.numel(), 0, "float32", lambda: kernels.truncate(logits, ones, ones * -4.6, zeros + 50, half, c.vocab)),
    ]  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--shape", choices=SHAPES, default="0.5b")
    p.add_argument("--dtypes", nargs="+", choices=WIDTH, default=list(WIDTH), help="of linear layers; the first is that of the other ops")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--seconds", type=float, default=0.2, help="time spent on each case")
    p.add_argument("--quick", action="store_true", help="small ceilings, and weights from caches: to see that it works")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    c, dtype, rotate = SHAPES[args.shape], DTYPES[args.dtypes[0]][0], 0.0 if args.quick else ROTATE
    roof = ceilings(torch.device("cpu"), *((0.0, 10**6, 256) if args.quick else ()))
    print(f"{args.threads} threads, {kernels.backend()}; shapes of {args.shape}")
    rates = f"bf16 {roof['gemm_gflop_per_s']:.0f}, float32 {roof['float32_gflop_per_s']:.0f} GFLOP/s"
    print(f"ceilings: streaming sum {roof['stream_gb_per_s']:.1f} GB/s, GEMM {rates}")
    print(f"{'op':<32}{'floor us':>10}{'us':>10}{'share':>8}")
    results = []

    def show(cases: list[Case]) -> None:
        for name, moved, flops, kind, call in cases:
            rate, times = RATE[kind]
            floor = max(moved / roof["stream_gb_per_s"] / 1e3, flops / roof[rate] / times / 1e3)
            took = median_ms(call, args.seconds) * 1e3
            print(f"{name:<32}{floor:>10.1f}{took:>10.1f}{floor / took:>8.0%}", flush=True)
            results.append({"op": name, "floor_us": floor, "us": took})

    for name in args.dtypes:
        show(linears(c, name, rotate))
    show(attentions(c, dtype, rotate))
    for rows in (1, 64):
        show(others(c, dtype, rows))
    show([(f"gumbel {c.vocab}", 4 * c.vocab, 0, "float32", lambda: kernels.gumbel(1, 1, c.vocab))])
    print(json.dumps({"shape": args.shape, "threads": args.threads, "backend": kernels.backend(), **roof, "cases": results}))


if __name__ == "__main__":
    main()
