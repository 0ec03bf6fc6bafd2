"""Everything that is to be known of the GPU path, in one unattended run of less than nine minutes on one GPU without a network.

    python -m bench.gpu --out bench/results            # or: make bench-gpu
    python -m bench.gpu --quick                        # two minutes
    python -m bench.gpu --only ceilings attention      # some sections
    python -m bench.gpu --dry-run --out /tmp/dry       # every path of this program on a CPU: tiny sizes, made-up times

It builds the CUDA library, runs the tests marked gpu, measures ceilings, attention beside its peers, steps of whole models, small ops, a profile, and
has compute-sanitizer look at the kernels. Results: OUT/gpu.jsonl as they come, OUT/gpu.md at the end, with the targets and a verdict on each.

Every section is a process of its own with a share of the time; what it does not use is the next one's. A section that dies is started again
behind the cell that killed it. The exit status is 0 if nothing failed: a missed target is a result and no failure, a skipped cell neither.
"""

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import gpu_checks
from bench.gpu_log import Log
from bench.gpu_report import page, table, targets

SHARES = {  # seconds, in the order in which they run
    "build": 55, "tests": 70, "peers": 30, "ceilings": 12, "attention": 140, "step": 105, "ops": 25, "flex": 28, "sanitizer": 40,
}  # fmt: skip
QUICK = {"build": 35, "peers": 25, "ceilings": 10, "attention": 30, "step": 20}
NEEDS = {"attention": {"peers", "ceilings"}, "step": {"ceilings"}, "ops": {"ceilings"}, "flex": {"ceilings"}}
HERE = {"build": gpu_checks.build, "tests": gpu_checks.tests, "sanitizer": gpu_checks.sanitize}  # sections that are other programs anyway
STARTS = 4  # of a section: it dies three times before it is given up
GRACE = 15.0  # seconds beyond its end after which a section is killed: a cell that was begun may end
ROOT = Path(__file__).parents[1]


def device_section(log: Log, name: str, end: float, quick: bool, dry: bool) -> None:
    """Run a section of measurements in this process."""
    from bench.gpu_lab import Lab

    lab = Lab(log, end, dry)
    if name == "attention":
        from bench.gpu_attention import attention

        attention(lab, quick)
    elif name == "flex":
        from bench.gpu_attention import flex

        flex(lab)
    elif name == "step":
        from bench.gpu_step import steps

        steps(lab, quick)
    else:
        from bench import gpu_ops

        (gpu_ops.ceilings if name == "ceilings" else gpu_ops.ops)(lab)


def dry_patch() -> None:
    """Have Triton's interpreter take one-element arrays of numpy 2.4 for indices, as tests/kernels/conftest.py does."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = mended


def worker(args: argparse.Namespace) -> None:
    """This process measures `args.worker`; an error is one of its section."""
    if args.dry_run:
        dry_patch()
    log = Log(args.out / "gpu.jsonl")
    failed = False
    for name in args.worker:
        try:
            device_section(log, name, args.until, args.quick, args.dry_run)
        except Exception as error:  # the sections themselves catch those of their cells
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            failed = True
            if not log.lost(name):
                log.write(name, key="the section", error=f"{type(error).__name__}: {error}"[:300])
    raise SystemExit(int(failed))


def supervise(log: Log, names: Sequence[str], command: list[str], end: float) -> None:
    """Run `command`, which measures the sections `names` until `end`; again if it dies after it has begun a new cell."""
    output = log.path.with_name("gpu.log")
    for _ in range(STARTS):
        before = {name: log.begun(name) for name in names}
        status, seconds = gpu_checks.run(command, end - time.time() + GRACE, output)
        if status == 0:
            return
        what = f"ended with status {status}" if status is not None else f"hung and was killed after {seconds:.0f} s"
        print(f"{' '.join(names)}: its process {what}; see {output.name}", flush=True)
        log.write(names[0], key="the process", error=f"it {what}; {gpu_checks.last_lines(output)}")
        if all(log.begun(name) == before[name] for name in names) or time.time() > end:
            return


def choose(only: Sequence[str] | None, quick: bool) -> dict[str, int]:
    """The sections to run and their shares of the time; those that others need are among them."""
    shares = {**SHARES, **QUICK} if quick else SHARES
    names = set(only or (QUICK if quick else SHARES))
    names |= {need for name in names for need in NEEDS.get(name, ())}
    return {name: share for name, share in shares.items() if name in names}


def measure(args: argparse.Namespace, log: Log, begun: float) -> None:
    """All sections in turn. FlashInfer, if it is there, is compiled beside the sections that time nothing."""
    shares = choose(args.only, args.quick)
    total = args.seconds or sum(shares.values())
    ends = {name: begun + total * sum(list(shares.values())[: i + 1]) / sum(shares.values()) for i, name in enumerate(shares)}
    flags = [*(["--quick"] if args.quick else []), *(["--dry-run"] if args.dry_run else [])]
    base = [sys.executable, "-m", "bench.gpu", "--out", str(args.out), *flags]
    measured = [name for name in shares if name not in HERE and name != "peers"]
    peers = None
    if "peers" in shares:
        command = [sys.executable, "-m", "bench.gpu_peers", str(log.path), str(ends["peers"]), *flags]
        peers = gpu_checks.start(command, log.path.with_name("gpu-peers.log"))
    try:
        for name, end in ends.items():
            since = time.time()
            if name in HERE:
                HERE[name](log, end, args.dry_run)
            elif name == "peers":
                if peers and gpu_checks.finish(peers, end - time.time()) is None:
                    log.write("peers", note="FlashInfer was still being compiled when its time was over")
            elif not args.dry_run:
                supervise(log, [name], [*base, "--until", str(end), "--worker", name], end)
            elif name == measured[0]:  # one process for all: starting one takes longer than measuring
                supervise(log, measured, [*base, "--until", str(begun + total), "--worker", *measured], begun + total)
            records = log.read(name)
            failed, late = sum("error" in r for r in records), sum(len(r.get("skipped", ())) for r in records)
            print(f"{name}: {len(log.results(name))} results, {failed} failed, {late} skipped, {time.time() - since:.0f} s", flush=True)
    finally:
        if peers:
            gpu_checks.finish(peers, 0)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of gpu.jsonl, gpu.md and logs")
    p.add_argument("--seconds", type=float, help=f"time for all of it; default {sum(SHARES.values())}, {sum(QUICK.values())} with --quick")
    p.add_argument("--quick", action="store_true", help="fewer sections and cells")
    p.add_argument("--only", nargs="+", choices=SHARES, help="some sections")
    p.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, with made-up times: exercises this program")
    p.add_argument("--worker", nargs="+", choices=SHARES, help=argparse.SUPPRESS)
    p.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    args.out = args.out.resolve()
    if args.worker:
        worker(args)
    if not args.dry_run:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            p.error("this machine has no NVIDIA driver: --dry-run exercises the program on a CPU")
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(ROOT / "build"))
    begun = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("gpu*.log"):
        old.unlink()
    log = Log(args.out / "gpu.jsonl")
    log.path.unlink(missing_ok=True)
    log.write("run", key="command", arguments=sys.argv[1:] if argv is None else list(argv), dry=args.dry_run)
    measure(args, log, begun)
    (args.out / "gpu.md").write_text(page(log))
    errors = [r for r in log.read() if "error" in r and r["section"] != "peers"]
    for r in errors:
        print(f"failed: {r['section']}: {r.get('key')}: {r['error']}")
    print("\n".join(table("target | reached | verdict", targets(log))))
    print(f"{time.time() - begun:.0f} s; {args.out / 'gpu.md'}")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
