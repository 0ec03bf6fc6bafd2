"""Autopilot on one machine: tokens per second through a real server, in alternation with plain decoding and with drafting at any price.

    python -m bench.autopilot [--texts 6] [--tokens 200] [--repeat 3]

The shipped target is paced: a pass takes --step-ms and --row-ms for each row, so that steps cost what they do with a large model and rows are
dear, as on a CPU. Drafts: the shipped one; noise, a model of random weights; slow, the shipped one at --slow-ms a forward. Prints the median of the
repetitions and their range, relative to plain decoding in the same repetition. Ids are compared.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from bench.common import rewrite
from specedge.cli import DEMO
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.batch import BatchBuilder
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine
from specedge.engine.runner import Runner
from specedge.net.edge import Edge
from specedge.net.server import Server
from specedge.text import Tokenizer

PROMPTS = ["def fibonacci(n):", "import os\n\n\nclass Reader:\n    def __init__(self, path):\n", "    for i in range(", "try:\n    import json\n"]


class PacedRunner(Runner):
    """A runner that waits out what a larger model would take longer."""

    base = row = 0.0

    def run(self, batch: BatchBuilder, stop: Callable[[], bool] | None = None) -> torch.Tensor:
        end = time.perf_counter() + self.base + self.row * batch.rows
        logits = super().run(batch)  # not stopped: what it waits out is no layers
        time.sleep(max(0.0, end - time.perf_counter()))
        return logits


def paced(path: Path, sizes: EngineConfig, rows: int, base: float, row: float) -> PacedRunner:
    runner = PacedRunner.load(path, sizes, rows, "cpu", None, False)
    assert isinstance(runner, PacedRunner)
    runner.base, runner.row = base, row
    return runner


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, kind, value in (
        ("texts", int, 6), ("tokens", int, 200), ("repeat", int, 3), ("step-ms", float, 10.0), ("row-ms", float, 0.4), ("slow-ms", float, 40.0),
        ("temperature", float, 0.0),
    ):  # fmt: skip
        p.add_argument(f"--{name}", type=kind, default=value)
    p.add_argument("--drafts", nargs="+", choices=("shipped", "noise", "slow"), default=["shipped", "noise", "slow"])
    args = p.parse_args()
    sizes = EngineConfig(kv_tokens=4096, max_rows=256)
    tokenizer = Tokenizer.from_dir(DEMO / "target")
    target = Engine(paced(DEMO / "target", sizes, 256, args.step_ms / 1e3, args.row_ms / 1e3), tokenizer, (0,))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(args.texts)]
    with tempfile.TemporaryDirectory() as folder, Server(target) as server:
        noise = rewrite(DEMO / "draft", Path(folder), lambda t: torch.randn_like(t) * t.float().std().to(t.dtype))  # it knows nothing
        drafts = {"shipped": (DEMO / "draft", 0.0), "noise": (noise, 0.0), "slow": (DEMO / "draft", args.slow_ms / 1e3)}

        def run(name: str, autopilot: bool) -> tuple[float, list[list[int]], int]:
            """Tokens per second, the ids, and rounds."""
            draft = None
            if name != "plain":
                config = DraftConfig(max_sessions=1, autopilot=autopilot, engine=sizes)
                draft = Drafter(paced(drafts[name][0], sizes, 256, drafts[name][1], 0.0), config, tokenizer)
            with Edge(server.address, draft, tokenizer=tokenizer) as edge:
                begun, ids, rounds = time.perf_counter(), list[list[int]](), 0
                for i, prompt in enumerate(prompts):
                    done = edge.generate(prompt, SamplingParams(args.temperature, args.tokens, seed=i, ignore_eos=True))[0]
                    ids.append(done.token_ids)
                    rounds += done.speculation.rounds
                return sum(map(len, ids)) / (time.perf_counter() - begun), ids, rounds

        for name in args.drafts:
            ratios: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(args.repeat):
                plain, want, _ = run("plain", False)
                for autopilot in ratios:
                    rate, ids, _ = run(name, autopilot)
                    assert ids == want
                    ratios[autopilot].append(rate / plain)
            found = {
                "draft": name, "temperature": args.temperature,
                **{
                    f"{'with' if on else 'without'} autopilot / plain": [round(x, 3) for x in (median(each), min(each), max(each))]
                    for on, each in ratios.items()
                },
            }  # fmt: skip
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
