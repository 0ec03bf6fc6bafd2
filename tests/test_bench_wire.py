"""bench/wire.py runs from end to end, so that it cannot rot; of what it measures only what does not depend on the machine is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def measure(*names: str) -> dict[str, dict[str, object]]:
    command = [sys.executable, "-m", "bench.wire", "--quick", "--only", *names]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    found: dict[str, dict[str, object]] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_frames_have_one_size_and_a_round_is_small() -> None:
    """F7 and F12: under encryption an observer sees one length, both ways, in a run of drafted texts; a round is far below the paper's."""
    line = measure("F7")
    assert {"cpu", "arch", "threads", "torch", "commit", "date"} <= set(line) and all(line.values()), "as bench/results/README.md says of every line"
    traffic = line["F7"]
    for name in ("frames_up", "frames_down", "frames_up_ahead", "frames_down_ahead"):
        assert list(traffic[name]) == ["554"], "512, 33 of encryption, 9 of ZMTP"  # type: ignore[call-overload]
    assert traffic["bytes_per_round"] < 2000 and traffic["times_less"] > 50  # type: ignore[operator]
    assert traffic["bytes_per_round_ahead"] < 8000 and traffic["times_less_ahead"] > 17  # type: ignore[operator]


@pytest.mark.full
def test_the_others_run() -> None:
    found = measure("F3", "F4", "F6", "F8", "F9", "F10")
    assert found["F9"]["texts_that_differ"] == 0
    assert found["F10"]["worst_ms"] < 2000  # type: ignore[operator]
    assert len(found["F4"]) == 10, "seven attacks, two kinds of arrivals, and memory"
