"""bench/gpu.py from end to end in a dry run, and what an unattended run rests on: deaths, deadlines, verdicts, what a GPU machine need not have."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, gpu_checks, gpu_report, gpu_step
from bench.gpu_log import Log

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton", reason="triton is not installed: pip install triton")


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "gpu.jsonl")


def test_a_dry_run_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a flashinfer that computes in torch, so that the arguments of its calls are tried too: a form that is wrong would have no time."""
    shutil.copy(ROOT / "tests" / "flashinfer_stub.py", tmp_path / "flashinfer.py")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    status = gpu.main(["--dry-run", "--out", str(tmp_path / "out")])
    log = Log(tmp_path / "out" / "gpu.jsonl")
    assert status == 0, (capsys.readouterr().out, gpu_report.missing(log), (tmp_path / "out" / "gpu.log").read_text())
    for section in gpu.SHARES:
        assert log.results(section) and not log.lost(section), section
    models, steps = ("llama-3.1-8b", "qwen3-0.6b", "qwen3-14b"), log.results("step")
    assert all(f"{m} step {case}" in steps for m in models for case in ("decode 1 x 1 @ 64", "verify 2 x 3 @ 64"))
    assert all(r["moved"] > 0 and r["flops"] > 0 for r in steps.values())
    peers = {name: us for r in log.results("attention").values() for name, us in r["peers_us"].items()}
    assert set(peers) == {"torch sdpa", *(f"flashinfer {f}" for f in ("one call", "decode", "two parts fa2", "two parts fa3"))}
    assert all(isinstance(us, float) for us in peers.values()), peers
    assert gpu_report.missing(log) == []
    watched = (tmp_path / "out" / "gpu-sanitizer.log").read_text().splitlines()
    assert all(any(line.startswith(op) for line in watched) for op in gpu_checks.TOOLS["racecheck"]), watched
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "dry run" in text and all(f"## {part}" in text for part in ("Targets", "Attention", "Steps", "Profile", "Ops", "Checks"))


def test_it_runs_where_packages_of_the_network_are_missing(tmp_path: Path) -> None:
    """On a machine with a GPU and torch alone: no zmq, no msgspec."""
    code = (
        "import sys\n"
        "for name in ('zmq', 'msgspec', 'openvino', 'gguf', 'llama_cpp'): sys.modules[name] = None\n"
        "import bench.gpu, bench.gpu_attention, bench.gpu_ops, bench.gpu_peers, bench.gpu_step\n"
        "assert 'specedge.net' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr


CRASHES = """
import os, sys
from pathlib import Path
from bench.gpu_log import Log
log = Log(Path(sys.argv[1]))
for key in "abc":
    if key not in log.begun("ops"):
        log.write("ops", begin=key)
        if key == "b":
            os._exit(3)
        log.write("ops", key=key, us=1.0)
"""


def test_a_section_that_dies_goes_on_behind_the_cell(log: Log) -> None:
    gpu.supervise(log, ["ops"], [sys.executable, "-c", CRASHES, str(log.path)], time.time() + 60)
    assert list(log.results("ops")) == ["a", "c"] and log.lost("ops") == {"b"}
    why = gpu_report.missing(log)
    assert [w[:2] for w in why] == [("ops", "the process"), ("ops", "b")] and "status 3" in why[0][2]


def test_a_section_that_hangs_is_killed_and_not_tried_again(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    gpu.supervise(log, ["ops"], [sys.executable, "-c", "import time; time.sleep(600)"], time.time())
    (record,) = log.read("ops")
    assert "hung" in record["error"]


def test_a_check_that_fails_or_takes_too_long_is_recorded(log: Log) -> None:
    gpu_checks.check(log, "tests", "bad", [sys.executable, "-c", "print('so it is'); raise SystemExit(5)"], time.time() + 60)
    gpu_checks.check(log, "tests", "long", [sys.executable, "-c", "import time; time.sleep(600)"], time.time() + 1)
    bad, long = (r for r in log.read("tests") if "key" in r)
    assert "status 5" in bad["error"] and "so it is" in bad["said"] and "stopped" in long["error"]


def test_cells_behind_the_deadline_are_named(log: Log) -> None:
    from bench.gpu_lab import Lab

    lab = Lab(log, time.time() + 60, dry=True)

    def late() -> dict[str, Any]:
        lab.end = 0.0
        return {"us": 1.0}

    def wrong() -> dict[str, Any]:
        raise ValueError("no")

    lab.each("ops", {"wrong": wrong, "late": late, "skipped": late})
    assert list(log.results("ops")) == ["late"]
    assert [m[1:] for m in gpu_report.missing(log)] == [("wrong", "ValueError: no"), ("skipped", "no time was left")]
    lab.each("ops", {"wrong": late, "late": late})
    assert len(log.results("ops")) == 1  # what was begun is not begun again


def test_the_time_is_below_nine_minutes() -> None:
    assert sum(gpu.SHARES.values()) + gpu.GRACE + 15 <= 540  # one section that hangs, and the page
    assert sum(gpu.QUICK.values()) <= 120
    assert list(gpu.choose(["attention"], False)) == ["peers", "ceilings", "attention"] and list(gpu.choose(None, True)) == list(gpu.QUICK)
    assert list(gpu.choose(None, False)) == list(gpu.SHARES)


def test_the_grid_of_steps_is_whole() -> None:
    """Decoding and 16, 32 and 64 rows, each for 1, 4 and 16 sequences of the large models; time goes to what targets speak of first."""
    assert {("decode" if r == 1 else "verify", b, r, 1024) for b in (1, 4, 16) for r in (1, 16, 32, 64)} <= set(gpu_step.BIG)
    small = [b * r <= 64 for kind, b, r, n in gpu_step.BIG if n == 1024]
    assert all(small[:5])


def cell(rows: int, group: int, us: float, prefix_us: float, peer: float | str) -> dict[str, Any]:
    return {"shape": {"batch": 8, "length": 4096, "rows": rows, "group": group}, "us": us, "prefix_us": prefix_us, "prefix_moved": 3.6e12,
            "prefix_flops": 5e14, "moved": 4e12, "flops": 1e15, "distance": 1e-3, "peers_us": {"flashinfer one call": peer}}  # fmt: skip


def test_verdicts(log: Log) -> None:
    assert {t.verdict for t in gpu_report.targets(log)} == {"open"}
    log.write("ceilings", key="copy", gb_per_s=4000.0)
    log.write("ceilings", key="matmul", us=1.0, tflop_per_s=1000.0)
    log.write("attention", key="a", **cell(32, 4, 1.2e6, 1e6, 1.8e6))  # 0.9 of the copy
    log.write("attention", key="b", **cell(64, 4, 1.2e6, 1e6, 0.9e6))  # 0.5 of the product
    log.write("step", key="llama-3.1-8b decode 1 x 1 @ 64", case=["decode", 1, 1, 64], moved=4e9, flops=1.0, us=1300.0, run_us=2000.0)
    log.write("step", key="qwen3-0.6b verify 1 x 8 @ 64", case=["verify", 1, 8, 64], moved=4e9, flops=1.0, us=1900.0, run_us=2000.0)
    assert [t.verdict for t in gpu_report.targets(log)] == ["reached", "missed", "reached", "missed", "missed", "reached"]
    text = gpu_report.page(log)
    assert "0.90 (a) at worst" in text and "1.30 (llama" in text
    log.write("attention", key="c", **cell(64, 4, 1e6, 1e6, "RuntimeError: none"))
    assert "flashinfer one call: RuntimeError: none" in gpu_report.page(log)


def test_a_line_that_a_death_cut_off_is_passed_over(log: Log) -> None:
    log.write("ops", key="a", us=1.0)
    with log.path.open("a") as file:
        file.write(json.dumps({"section": "ops"})[:9])
    assert list(log.results("ops")) == ["a"]
