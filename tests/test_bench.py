"""bench/step.py and bench/kernels.py run from end to end, so that they cannot rot; what they measure is not looked at."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.common import SHAPES, random_runner
from bench.peers import Transformers
from specedge import kernels
from specedge.config import EngineConfig

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


@pytest.mark.parametrize("name", ["0.5b", "1.5b", "qwen3-0.6b", "qwen3-14b"])
def test_both_sides_have_the_same_biases(name: str) -> None:
    """A layer that one side does not compute would be its advantage. Of one layer, small, in the form of the shape."""
    c = replace(SHAPES[name], layers=1, hidden=64, ffn=64, vocab=64, max_positions=64, heads=4, kv_heads=2, head_dim=16)
    ours = random_runner(c, EngineConfig(kv_tokens=64, max_rows=2), torch.device("cpu"), torch.float32).model.weights.layers[0]
    theirs = Transformers(c, torch.device("cpu"), torch.float32).model.model.layers[0]
    a, mlp = theirs.self_attn, theirs.mlp
    pairs = [((a.q_proj, a.k_proj, a.v_proj), ours.qkv), ((a.o_proj,), ours.out), ((mlp.gate_proj,), ours.gate_up), ((mlp.down_proj,), ours.down)]
    for linears, mine in pairs:
        assert [x.bias is not None for x in linears] == [mine.bias is not None] * len(linears)
    assert ours.qkv.bias is None or bool(ours.qkv.bias.any())
