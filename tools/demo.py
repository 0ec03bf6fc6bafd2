"""The demo: a server and an edge as two processes on this machine, with fresh keys, then the target alone as the judge.

    make demo

It shows that the system works and loses nothing, not how fast it is: both models share the cores of one machine, and are tiny.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROMPT = "def fibonacci(n):"
SEED, TEMPERATURE, TOKENS = "7", "0.7", "160"
BIN = Path(sysconfig.get_paths()["scripts"])
ALONE = """
import json, sys
from specedge import Engine, SamplingParams
from specedge.cli import DEMO
prompt, seed, temperature, tokens = sys.argv[1:]
engine = Engine.from_pretrained(DEMO / "target", device="cpu")
done = engine.generate([prompt], SamplingParams(temperature=float(temperature), max_tokens=int(tokens), seed=int(seed)))[0]
print(json.dumps(done.token_ids))
"""
# One thread each: server and edge share this machine's cores here, and two OpenMP teams on the same cores slow each other down.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def make_keys(home: Path) -> None:
    """Keys of a server in `home`, and one of an edge, home/edge.secret, that is authorised there."""
    edge = subprocess.run([BIN / "specedge-edge", "keygen", home / "edge.secret"], check=True, capture_output=True, text=True)
    for arguments in (["keygen", home], ["authorize", home, edge.stdout.strip(), "--name", "demo"]):
        subprocess.run([BIN / "specedge-server", *arguments], check=True, capture_output=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as home:
        make_keys(Path(home))
        return show(Path(home))


def show(home: Path) -> int:
    """Run server, edge and judge; print what came of it."""
    serve = [BIN / "specedge-server", "serve", "--demo", "--device", "cpu", "--keys", home]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline().split()
        if len(ready) != 2 or ready[0] != "ready":
            print("the server did not start: see its message above", file=sys.stderr)
            return 1
        print(f"server: {ready[1]}\nedge: {PROMPT!r}, temperature {TEMPERATURE}, seed {SEED}, {TOKENS} tokens\n")
        print(PROMPT, end="", flush=True)
        command = [BIN / "specedge-edge", "generate", "--demo", "--server", ready[1], "--key", home / "edge.secret", "--prompt", PROMPT]
        options = ["--max-tokens", TOKENS, "--temperature", TEMPERATURE, "--seed", SEED, "--device", "cpu", "--json", "--echo"]
        edge = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        if edge.returncode:
            return 1
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    record = json.loads(edge.stdout)
    s, tokens = record["speculation"], len(record["token_ids"])
    print(f"\n{'rounds':<28}{s['rounds']:>8}\n{'tokens per round':<28}{s['tokens_per_round']:>8.2f}")
    print(f"{'hits (root was drafted)':<28}{s['hits']:>8} of {s['hits'] + s['misses']}")
    print(f"{'bytes per token, up':<28}{s['bytes_up'] / tokens:>8.0f}\n{'bytes per token, down':<28}{s['bytes_down'] / tokens:>8.0f}\n")
    print("the same prompt and seed by the target alone, in its own process: ", end="", flush=True)
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, PROMPT, SEED, TEMPERATURE, TOKENS], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    if alone.returncode or json.loads(alone.stdout) != record["token_ids"]:
        print("DIFFERENT")
        return 1
    print("identical")
    print("This demo shows correctness, not speed: that is measured by `python -m bench.step` (see README).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
