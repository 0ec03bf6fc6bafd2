"""The ceilings of a GPU, and every small op beside its floor of bytes.

Ops are those of bench/kernels.py, at the shape of an 8B model. Weights of linear layers take turns, so that they come from memory; the inputs of
the other ops lie in the L2, as they do in a step, where the op before has just written them: floors at the rate of memory may be beaten there.
"""

import itertools
from typing import Any

import numpy as np
import torch

from bench.common import SHAPES
from bench.gpu_lab import Cell, Lab
from bench.kernels import Case, linears, others
from bench.step import machine
from specedge import kernels
from specedge.config import ModelConfig

SIZES = ((8192, 8192, 8192), (4096, 4096, 4096), (2048, 8192, 8192), (512, 8192, 8192), (256, 8192, 8192))  # rows, outputs, inputs
COPY = 2**31  # values of two bytes: 4.3 GB


def captured(c: ModelConfig, dtype: torch.dtype, rows: int) -> list[Case]:
    """The ops that only captured steps use, as a CPU decides on the host: noise of as many positions as rows, and acceptance of a whole chain with
    the commit of its K/V in all layers."""
    table, ids, none = torch.empty(rows, c.vocab), torch.arange(rows, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    fills = torch.stack((torch.ones(rows), ids, ids), 1).long()
    buffer = torch.zeros(c.layers, 2, rows, c.kv_heads, c.head_dim).to(dtype)
    pages = torch.zeros(c.layers, 2, 8, c.kv_heads, 64, c.head_dim).to(dtype)
    segments, pages_of = torch.tensor([[0, rows, 0, rows, 0, 0]], dtype=torch.int32), torch.arange(8, dtype=torch.int32)[None]
    chain = b"".join(((2 << i) - 1).to_bytes(8 * -(-rows // 64), "little") for i in range(rows))
    anc = torch.tensor(np.frombuffer(chain, "<i8").reshape(rows, -1).copy())
    verify = torch.tensor([[0, 1, rows + 1, 0, 0]], dtype=torch.int32)
    return [
        (f"fill_noise x {rows}", 4 * table.numel(), 0, "float32", lambda: kernels.fill_noise(table, fills)),
        (f"accept x {rows}", 2 * buffer.numel() * dtype.itemsize, 0, "float32",
         lambda: kernels.accept(buffer, pages, segments, pages_of, ids.long(), anc, ids.long() + 1, verify, none)),
    ]  # fmt: skip


def ceilings(lab: Lab) -> None:
    """What the device can do: a copy within its memory, read and written bytes counted, and bf16 products of random matrices."""

    def describe() -> dict[str, Any]:
        import triton

        found = {**machine(torch.get_num_threads()), "triton": triton.__version__, "backend": kernels.backend(lab.device)}
        if not lab.dry:
            p = torch.cuda.get_device_properties(0)
            found |= {"gpu": p.name, "cuda": torch.version.cuda, "multiprocessors": p.multi_processor_count, "l2_mb": p.L2_cache_size / 2**20,
                      "memory_gib": p.total_memory / 2**30}  # fmt: skip
        return found

    def copy() -> dict[str, Any]:
        source = torch.randint(0, 2**15, (1000 if lab.dry else COPY,), dtype=torch.int16, device=lab.device)
        target = torch.empty_like(source)
        us = lab.us(lambda: target.copy_(source), 2, 0.3)
        return {"us": us, "gb_per_s": 4 * source.numel() / us / 1e3}

    def product(m: int, n: int, k: int) -> dict[str, Any]:
        if lab.dry:
            m, n, k = m // 256, n // 256, k // 256
        x, w = (torch.randn(rows, k, device=lab.device).to(lab.dtype) for rows in (m, n))
        us = lab.us(lambda: x @ w.T, 8, 0.2)
        return {"us": us, "tflop_per_s": 2 * m * n * k / us / 1e6}

    cells: dict[str, Cell] = {"machine": describe, "copy": copy}
    cells |= {f"matmul {m} x {n} x {k}": lambda m=m, n=n, k=k: product(m, n, k) for m, n, k in SIZES}  # type: ignore[misc]
    lab.each("ceilings", cells)


def ops(lab: Lab) -> None:
    """Norms, rope, activation, commit, sampling at 1 to 512 rows, noise, and the linear layers of the model."""
    c = SHAPES["tiny" if lab.dry else "llama-3.1-8b"]
    cells: dict[str, Cell] = {}
    dtype = torch.float32 if lab.dry else lab.dtype
    with lab.device:
        for rows in (1,) if lab.dry else (64, 16, 1, 256):
            for name, moved, flops, _, call in [*others(c, dtype, rows), *captured(c, dtype, rows)]:
                cells[name] = lambda m=moved, f=flops, call=call: {"moved": m, "flops": f, "us": lab.us(call, 16)}  # type: ignore[misc]
        table, fills = torch.empty(1, c.vocab), torch.tensor([[1, 1, 0]])  # made here: gumbel makes them itself, which no graph can hold
        cells[f"fill_noise {c.vocab}"] = lambda: {"moved": 4 * c.vocab, "flops": 0, "us": lab.us(lambda: kernels.fill_noise(table, fills), 16)}
        lab.each("ops", cells)
        wanted = {f"linear bfloat16 {what} x {rows}" for what in ("qkv", "out", "gate_up", "down", "head") for rows in (1, 16, 64, 512)}
        found = linears(c, "bfloat16", 3 * lab.l2)
        picked = itertools.islice((case for case in found if case[0] in wanted), 2 if lab.dry else None)
        more = {n: lambda m=m, f=f, call=call: {"moved": m, "flops": f, "us": lab.us(call, 8)} for n, m, f, _, call in picked}  # type: ignore[misc]
        lab.each("ops", more)
