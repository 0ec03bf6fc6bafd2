"""bench/step.py and bench/kernels.py run from end to end, so that they cannot rot; what they measure is not looked at."""

import json
import subprocess
import sys
from pathlib import Path

from specedge import kernels

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "bench.step", "--shape", "tiny", "--quick", "--device", "cpu", "--seconds", "0", "--rounds", "1"]


def test_step_times_ours_and_a_peer(tmp_path: Path) -> None:
    out = tmp_path / "results" / "step.jsonl"
    run = subprocess.run([*COMMAND, "--peers", "transformers", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.splitlines()[-1])
    assert answer == json.loads(out.read_text())
    assert [(len(case["turns_ms"]["bfloat16"]), len(case["turns_ms"]["transformers"])) for case in answer["cases"]] == [(1, 1)] * 5, run.stdout


def test_kernels_times_every_op() -> None:
    """But for those that only captured steps use, which bench/gpu_ops.py has."""
    command = [sys.executable, "-m", "bench.kernels", "--shape", "tiny", "--seconds", "0", "--quick", "--threads", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    cases = json.loads(run.stdout.splitlines()[-1])["cases"]
    names = [case["op"] for case in cases]
    assert len(set(names)) == len(names) and all(case["us"] > 0 and case["floor_us"] > 0 for case in cases)
    assert {name.split()[0] for name in names} == {"linear", *kernels.__all__} - {"backend", "accept", "fill_noise"}
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        assert {name.split()[2] for name in names if name.startswith(f"linear {dtype} ")} == {
            "qkv", "out", "gate_up", "gated", "down", "head", "logits",
        }  # fmt: skip
    assert {"attention tree 32 @ 1024", "attention tree 32 @ 4096"} <= set(names)
