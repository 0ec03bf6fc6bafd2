"""A program: the launches of the Triton ops, compiled for an NVIDIA GPU that is not there. Prints one JSON line per kernel.

`python -m tests.kernels.compiled 90 CASE...`. The ops are called as on a GPU, with CPU tensors; a driver that names the GPU stands in, and a
launch ends after its compilation. So what is compiled is what the ops launch: the same tiles, constants and alignments.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from specedge.kernels import triton_pointwise, triton_prefix, triton_rows

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Driver:
    """Just enough of a driver to compile."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def facts(kernel: Any) -> dict[str, Any]:
    """What the compiler made of a kernel."""
    bin_folder = Path(inspect.getfile(triton)).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([bin_folder / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([bin_folder / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    kinds = re.findall(r"\b(wgmma|mma)\S*?\.(m\d+n\d+k\d+)", kernel.asm["ptx"])
    return {
        "name": kernel.name,
        "warps": kernel.metadata.num_warps,
        "registers": int(numbers["REG"]),
        "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]) + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": kernel.metadata.shared,
        "mma": sorted({f"{kind}.{shape}" for kind, shape in kinds}),
        "warps_along_keys": sorted({int(n) for n in re.findall(r"#mma\d* = .*warpsPerCTA = \[\d+, (\d+)\]", kernel.asm["ttgir"])}),
        "fma": len(re.findall(r"\bFFMA\b", sass)),
        "async_copies": len(re.findall(r"\bLDGSTS\b", sass)),
    }


def attention(dtype: str, dim: int, group: int, rows: int, segments: int, page: int, window: int) -> None:
    """Both launches of attention, in a bucket of `rows` rows and `segments` segments, with tables of 512 pages."""
    kv_heads, kind, i32 = 8, DTYPES[dtype], torch.int32
    q, rows_kv = torch.zeros(rows, kv_heads * group, dim, dtype=kind), torch.zeros(2, rows, kv_heads, dim, dtype=kind)
    pages_kv = torch.zeros(2, 8, kv_heads, page, dim, dtype=kind)
    at, anc = torch.zeros(rows, dtype=i32), torch.zeros(rows, 1, dtype=torch.int64)
    segments_, table = torch.zeros(segments, 6, dtype=i32), torch.zeros(segments, 512, dtype=i32)
    triton_rows.attention(q, rows_kv, pages_kv, segments_, table, at, at, anc, dim**-0.5, window)


def pointwise(dtype: str, hidden: int, ffn: int, heads: int, kv_heads: int, dim: int) -> None:
    """The launches between matrix products and attention, for 16 rows."""
    kind = DTYPES[dtype]
    x, weight = torch.zeros(16, hidden, dtype=kind), torch.zeros(hidden, dtype=kind)
    triton_pointwise.rms_norm(x, weight, 1e-6)
    triton_pointwise.add_rms_norm(x, x, weight, 1e-6)
    triton_pointwise.silu_mul(torch.zeros(16, 2 * ffn, dtype=kind))
    qkv, rows_kv = torch.zeros(16, (heads + 2 * kv_heads) * dim, dtype=kind), torch.zeros(2, 16, kv_heads, dim, dtype=kind)
    angles, at, norm = torch.zeros(64, dim // 2), torch.zeros(16, dtype=torch.int32), torch.zeros(dim, dtype=kind)
    triton_pointwise.rope_write(qkv, angles, angles, at, at, rows_kv, heads)
    triton_pointwise.norm_rope_write(qkv, norm, norm, 1e-6, angles, angles, at, at, rows_kv, heads)


def main(arch: int, cases: list[str]) -> None:
    triton.runtime.driver.set_active(Driver(arch))
    triton_prefix.has_wgmma = triton_rows.has_wgmma = lambda _: arch == 90
    run = JITFunction.run
    made: dict[int, Any] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in made:
            made[id(kernel)] = kernel
            shape = {k: v for k, v in kwargs.items() if isinstance(v, int)}
            print(json.dumps({"case": case, **facts(kernel), **shape}), flush=True)

    JITFunction.run = compile_only
    for case in cases:
        op, *args = case.split(",")
        {"attention": attention, "pointwise": pointwise}[op](*(int(a) if a.isdigit() else a for a in args))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
