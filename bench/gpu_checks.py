"""What a GPU run does in other processes than its own measurements: it builds the CUDA library, runs the tests marked gpu, and compute-sanitizer.

Each is a command with a limit of time; its result is whether it ended well, and the end of what it printed goes to a log beside the record. Imports
nothing that touches a GPU. As a program (`python -m bench.gpu_checks`) it is what compute-sanitizer watches: every small op, and attention.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu_log import Log

ROOT = Path(__file__).parents[1]
TOOLS = {"memcheck": [], "racecheck": ["sample", "truncate", "gumbel", "adjust", "accept"]}  # and the ops that each watches; []: all


def start(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    """Start a command; what it prints is appended to `output`."""
    with output.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """Exit status of a command; None if it took `limit` seconds, which ends it and all that it started."""
    try:
        return process.wait(max(1.0, limit))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(command: list[str], limit: float, output: Path) -> tuple[int | None, float]:
    """What `finish` says of the command, and how long it took."""
    begun = time.time()
    return finish(start(command, output), limit), time.time() - begun


def last_lines(path: Path, count: int = 3) -> str:
    """The end of a log, on one line."""
    return " / ".join(line.strip() for line in path.read_text(errors="replace").splitlines()[-count:] if line.strip())[-400:]


def check(log: Log, section: str, key: str, command: list[str], end: float, good: tuple[int, ...] = (0,)) -> None:
    """Run a command until `end` at most and record what became of it."""
    if key in log.begun(section):
        return
    log.write(section, begin=key)
    output = log.path.with_name(f"gpu-{section}.log")
    status, seconds = run(command, end - time.time(), output)
    said: dict[str, Any] = {"key": key, "seconds": seconds, "said": last_lines(output)}
    if status not in good:
        what = f"ended with status {status}" if status is not None else f"was stopped after {seconds:.0f} s, its share of the time"
        said["error"] = f"{' '.join(command[:6])} {what}; see {output.name}"
    log.write(section, **said)
    print(f"{section}: {key}: {said.get('error', 'well')} in {seconds:.0f} s: {said['said']}", flush=True)


def build(log: Log, end: float, dry: bool) -> None:
    """The C++ and CUDA libraries, as setup.py makes them, unless the CUDA library is newer than its sources."""
    made, sources = ROOT / "specedge" / "_C_cuda.so", [*ROOT.glob("csrc/**/*.*"), ROOT / "setup.py"]
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if dry or (made.exists() and made.stat().st_mtime > max(s.stat().st_mtime for s in sources)):
        command = [sys.executable, "-c", "print('nothing to build')"]
    check(log, "build", "setup.py", command, end)
    if not dry and not made.exists():
        log.write("build", key="CUDA library", error=f"{made.name} was not made: sampling runs in torch; see gpu-build.log")


def tests(log: Log, end: float, dry: bool) -> None:
    """The tests marked gpu, of the files that have some: others import what a GPU machine may lack."""
    files = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in p.read_text() and "bench" not in p.name)
    spread = ["-n", "4"] if importlib.util.find_spec("xdist") else []  # most of the time goes to compiling kernels
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *spread, *files]
    check(log, "tests", "pytest -m gpu", [*command[:3], "--version"] if dry else command, end)


def sanitize(log: Log, end: float, dry: bool) -> None:
    """memcheck over every op, racecheck over those of csrc/cuda (not in a dry run, where both would be the same). 99: it found something."""
    tool = shutil.which("compute-sanitizer") or next(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)
    if tool is None and not dry:
        log.write("sanitizer", note="compute-sanitizer is not on the PATH: install the CUDA toolkit")
        return
    tools = list(TOOLS.items())[: 1 if dry else None]
    for i, (name, ops) in enumerate(tools):
        watch = [] if dry else [str(tool), "--tool", name, "--error-exitcode", "99"]
        upto = time.time() + (end - time.time()) / (len(tools) - i)
        check(log, "sanitizer", name, [*watch, sys.executable, "-m", "bench.gpu_checks", "cpu" if dry else "cuda", *ops], upto)


def call_ops(device: str, names: list[str]) -> None:
    """Call every op once at a tiny size, or those whose names begin so."""
    import torch

    from bench.common import SHAPES
    from bench.gpu_ops import captured
    from bench.kernels import attentions, others
    from specedge import kernels

    c, dtype = SHAPES["tiny"], torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        cases = [case for rows in (1, 5) for case in (*others(c, dtype, rows), *captured(c, dtype, rows))] + attentions(c, dtype)
        cases.append(("gumbel", 0, 0, "float32", lambda: kernels.gumbel(1, 1, c.vocab, device)))
        for name, *_, call in cases:
            if not names or name.startswith(tuple(names)):
                call()
                print(name, flush=True)
        if device != "cpu":
            torch.cuda.synchronize()


if __name__ == "__main__":
    call_ops(sys.argv[1], sys.argv[2:])
