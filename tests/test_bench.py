"""bench/step.py runs from end to end, so that it cannot rot; what it measures is not looked at."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "bench.step", "--shape", "tiny", "--quick", "--device", "cpu", "--seconds", "0", "--rounds", "1"]


def test_step_times_ours_and_a_peer(tmp_path: Path) -> None:
    out = tmp_path / "results" / "step.jsonl"
    run = subprocess.run([*COMMAND, "--peers", "transformers", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.splitlines()[-1])
    assert answer == json.loads(out.read_text())
    assert [(len(case["turns_ms"]["bfloat16"]), len(case["turns_ms"]["transformers"])) for case in answer["cases"]] == [(1, 1)] * 5, run.stdout
