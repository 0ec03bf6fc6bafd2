"""Every Triton kernel compiles for GPUs that are not here: no spill, not too much shared memory, the instructions that were meant.

What a launch compiles is found by launching it (compiled.py), in a process of its own, for this one has Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")

ROOT = Path(__file__).parents[2]
SHARED = {80: 163, 89: 99, 90: 227}  # KB that a program may have
# op, then its arguments in compiled.py: dtype, D, G, rows, segments, page size, window
# BUCKET: the largest of engine/buckets.py
BUCKET = "attention,bf16,128,4,512,256,64,0"
DECODE, TREE = "attention,bf16,128,4,8,8,64,0", "attention,bf16,128,4,33,1,64,0"
MORE = [
    f"attention,{kind},{dim},{group},{rows},1,{page},{window}"
    for kind, dim, group, rows, page, window in [
        ("bf16", 128, 4, 16, 16, 4096), ("bf16", 128, 8, 64, 32, 0), ("bf16", 128, 5, 64, 128, 4096), ("bf16", 128, 2, 16, 64, 0),
        ("f16", 64, 7, 16, 64, 0),
        ("f16", 64, 1, 200, 16, 99), ("bf16", 96, 1, 16, 64, 0), ("bf16", 96, 4, 64, 16, 99), ("bf16", 256, 2, 64, 64, 0),
        ("f16", 256, 8, 16, 16, 99), ("f32", 64, 4, 16, 64, 0), ("f32", 128, 4, 16, 16, 99),
    ]
]  # fmt: skip
POINTWISE = ["pointwise,bf16,4096,14336,32,8,128", "pointwise,f16,896,4864,14,2,64"]


@pytest.fixture(scope="module", autouse=True)
def ptxas() -> None:
    """Or a skip that says why."""
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this build of triton brings no ptxas: install the wheel from PyPI")


def compiled(arch: int, cases: list[str], cache: Path) -> list[dict[str, Any]]:
    """What became of all kernels that the cases launch; each checked for what none may do."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.compiled", str(arch), *cases]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    for k in kernels:
        assert k["spills"] == 0, k
        assert k["shared"] <= SHARED[arch] * 1024, k
        assert k["async_copies"] > 0 or "KEYS" not in k or k["num_stages"] == 1, k  # keys are fetched ahead of their use
    return kernels


def test_sm_90(tmp_path: Path) -> None:
    decode, rows, tree, *row_ops = compiled(90, [DECODE, TREE, POINTWISE[0]], tmp_path)
    assert (decode["name"], decode["ROWS"], rows["name"], tree["name"], tree["ROWS"]) == ("prefix_kernel", 64, "rows_kernel", "prefix_kernel", 128)
    assert decode["mma"] == ["wgmma.m64n128k16", "wgmma.m64n64k16"]
    # why a row's bits do not depend on the tile: the same instructions, and sums over keys that no two warps share
    assert tree["mma"] == decode["mma"] and tree["warps_along_keys"] == decode["warps_along_keys"] == [1]
    assert rows["mma"] == ["mma.m16n8k16", "wgmma.m64n128k16", "wgmma.m64n32k16"]  # tiles of 16, and of 64 for long segments
    assert [k["fma"] for k in row_ops if k["name"] == "rope_kernel" and not k["NORM"]] == [0]  # or rope_write would not equal the reference


@pytest.mark.parametrize("arch", [80, 89])
def test_without_wgmma(arch: int, tmp_path: Path) -> None:
    decode, rows, tree, *row_ops = compiled(arch, [DECODE, TREE, POINTWISE[0]], tmp_path)
    assert decode["mma"] == rows["mma"] == tree["mma"] == ["mma.m16n8k16"] and (decode["ROWS"], tree["ROWS"]) == (16, 64)
    assert decode["warps_along_keys"] == tree["warps_along_keys"] == [8]  # a row's keys are summed by the same threads
    assert [k["fma"] for k in row_ops if k["name"] == "rope_kernel" and not k["NORM"]] == [0]


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_all(arch: int, tmp_path: Path) -> None:
    for k in compiled(arch, [DECODE, BUCKET, *MORE, *POINTWISE], tmp_path):
        if k["name"] == "prefix_kernel" and "f32" not in k["case"]:
            assert all(m.startswith("wgmma" if arch == 90 else "mma") for m in k["mma"]) and k["mma"], k
            assert not 64 < k["D"] <= 128 or k["warps_along_keys"] == [1 if arch == 90 else 8], k
