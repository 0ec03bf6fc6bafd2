"""The drafter against recorded texts, in virtual time: calibration, tokens per round, hits, and what the submit rule is worth.

    python -m bench.drafting [--texts 12] [--tokens 128] [--draft-ms 2] [--around-ms 15] [--verify-ms 14] [--row-ms 0.1]

The target writes every text once; because noise is shared, any tree is then verified by walking the text, so a cell costs draft forwards only. A
forward takes --draft-ms, and a tenth of that for each row; a verdict comes --around-ms, --verify-ms and --row-ms a row after its tree. Also measured
here: the single guess, what a rule would hit that drafts ahead for one outcome only.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import specedge
from specedge.cli import DEMO
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.batch import BatchBuilder
from specedge.engine.drafter import Drafter, Session
from specedge.engine.engine import Engine
from specedge.engine.model import Abandoned
from specedge.engine.pace import Served
from specedge.engine.runner import Runner

TEMPERATURES, NODES = (0.0, 0.7, 1.0), (7, 15, 31)
PREFIX = 96


@dataclass(slots=True)
class World:
    """Virtual time, and how long things take in it."""

    draft: float
    around: float
    verify: float
    row: float
    now: float = 0.0

    def served(self, nodes: int) -> float:
        return self.verify + self.row * (nodes + 1)


@dataclass(slots=True)
class Tally:
    """What was counted over some texts."""

    rounds: int = 0
    tokens: int = 0
    rows: int = 0
    hits: int = 0
    guesses: int = 0  # rounds that a single guess would have hit
    forwards: int = 0
    seconds: float = 0.0
    tried: int = 0
    brier: list[float] = field(default_factory=lambda: [0.0, 0.0])  # raw, calibrated
    loss: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def judge(self, p: float, which: int, accepted: bool) -> None:
        p = min(max(p, 1e-6), 1 - 1e-6)
        self.brier[which] += (p - accepted) ** 2
        self.loss[which] -= math.log(p if accepted else 1 - p)


class PacedRunner(Runner):
    """A runner whose passes take virtual time."""

    world: World

    def run(self, batch: BatchBuilder, stop: Callable[[], bool] | None = None) -> torch.Tensor:
        takes, begun = self.world.draft * (1 + 0.1 * batch.rows), self.world.now
        for i in range(self.model.config.layers if stop else 0):
            self.world.now = begun + takes * (i + 1) / self.model.config.layers
            if stop and stop():
                raise Abandoned
        self.world.now = begun + takes
        return super().run(batch)


def drafter(path: Path, config: DraftConfig, world: World) -> Drafter:
    runner = PacedRunner.load(path, config.engine, config.max_sessions * 256, "cpu", None, False)
    assert isinstance(runner, PacedRunner)
    runner.world = world
    return Drafter(runner, config, clock=lambda: world.now)


def replay(d: Drafter, world: World, prompt: list[int], output: list[int], params: SamplingParams, t: Tally) -> None:
    """Draft `output` as an edge does."""
    text = prompt + output
    s = d.open(prompt, params, len(text) + 1)
    assert s is not None
    begun, known = world.now, len(prompt)
    while len(s.tokens) < len(text):
        while not d.ready(s) and d.grow():
            t.forwards += 1
        tree = d.submit(s, d.size(s, 255))
        row, at, children = 0, len(s.tokens), tree.children()
        while at + 1 < len(text) and text[at] in children[row]:
            row, at = children[row][text[at]], at + 1
        guess = single_guess(s)
        right = guess == (row, text[at])
        arrival = world.now + world.around + world.served(len(tree))
        while world.now < arrival:
            if pause := d.pause():
                world.now = min(arrival, world.now + pause)
            elif not d.grow(lambda arrival=arrival: world.now >= arrival):  # type: ignore[misc]
                world.now = max(world.now, arrival)
        judge(s, text, t)
        hit = d.verdict(s, text[len(s.tokens) : at + 1], Served(world.served(len(tree)), len(tree) + 1))
        t.rounds, t.rows, t.hits, t.guesses = t.rounds + 1, t.rows + len(tree) + 1, t.hits + hit, t.guesses + right
    t.tokens += len(s.tokens) - known
    t.seconds += world.now - begun
    d.cancel(s)


def single_guess(s: Session) -> tuple[int, int] | None:
    """The likeliest (row, token) such that the verdict ends at the row with that token, as far as the tree knows when it is sent: the best node
    that was not submitted and whose parent was."""
    assert s.submitted is not None
    row = {id(n): i for i, n in enumerate(s.submitted, 1)} | {id(s.root): 0}
    outside = [n for n in s.nodes if id(n) not in row and id(n.parent) in row]
    if not outside:
        return None
    best = max(outside, key=lambda n: n.score)
    return row[id(best.parent)], best.token


def judge(s: Session, text: list[int], t: Tally) -> None:
    """Compare what was thought of the children along the text with what they came to."""
    node, at = s.root, len(s.tokens)
    while node is not None and node.slot >= 0 and at < len(text):
        for child in node.children.values():
            accepted = child.token == text[at]
            t.judge(math.exp(child.log_p), 0, accepted)
            t.judge(math.exp(child.score - node.score), 1, accepted)
            t.tried += 1
        following = node.children.get(text[at])
        if following is None:
            return
        node, at = following, at + 1


def prompts(engine: Engine, count: int) -> Iterator[list[int]]:
    """PREFIX tokens from the middle of files that training held back."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    from train_demo import held_back, library_files

    files = [f for f in library_files() if held_back(f)]
    for file in files[:: max(1, len(files) // count)][:count]:
        ids = engine.encode(file.read_text(encoding="utf-8"))
        if len(ids) > 2 * PREFIX:
            yield ids[len(ids) // 2 - PREFIX : len(ids) // 2]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--texts", type=int, default=12)
    p.add_argument("--tokens", type=int, default=128)
    for name, value in (("draft", 2.0), ("around", 15.0), ("verify", 14.0), ("row", 0.1)):
        p.add_argument(f"--{name}-ms", type=float, default=value)
    p.add_argument("--grid", action="store_true", help="also search depth and size, which takes a few minutes")
    args = p.parse_args()
    engine = Engine.from_pretrained(DEMO / "target", device="cpu")
    begins = list(prompts(engine, args.texts))

    def cell(make: Callable[[World], Drafter], temperature: float, around: float = args.around_ms) -> Tally:
        world, t = World(args.draft_ms / 1e3, around / 1e3, args.verify_ms / 1e3, args.row_ms / 1e3), Tally()
        params = SamplingParams(temperature, args.tokens, seed=7)
        with make(world) as d:
            for prompt in begins:
                replay(d, world, prompt, texts[temperature][tuple(prompt)], params, t)
        return t

    def config(**changes: object) -> DraftConfig:
        return DraftConfig(max_sessions=1, engine=EngineConfig(kv_tokens=4096, max_rows=256), **changes)  # type: ignore[arg-type]

    texts = {t: dict(zip(map(tuple, begins), (c.token_ids for c in written(engine, begins, t, args.tokens)), strict=True)) for t in TEMPERATURES}
    print("| T | nodes | tokens per round | hits | a single guess | Brier raw / calibrated | log loss raw / calibrated |\n" + "|---" * 7 + "|")
    for temperature in TEMPERATURES:
        for nodes in NODES:
            t = cell(lambda w, n=nodes: drafter(DEMO / "draft", config(tree_size=n, depth=7), w), temperature)  # type: ignore[misc]
            brier, loss = (" / ".join(f"{x / t.tried:.4f}" for x in each) for each in (t.brier, t.loss))
            print(
                f"| {temperature} | {nodes} | {t.tokens / t.rounds:.2f} | {t.hits / t.rounds:.3f} | {t.guesses / t.rounds:.3f} | {brier} | {loss} |",
                flush=True,
            )
    print("\n| T | around ms | depth x nodes | tokens/s | tokens per round | rows per round | forwards per round |\n" + "|---" * 7 + "|")
    grid = [(depth, size) for depth in (1, 2, 3, 4, 6, 8, 10) for size in (4, 8, 16, 31)] if args.grid else [(4, 31), (8, 16)]
    for temperature in TEMPERATURES:
        for around in (0.0, args.around_ms):
            cells = {
                f"{depth} x {size}": cell(lambda w, d=depth, s=size: drafter(DEMO / "draft", config(tree_size=s, depth=d), w), temperature, around)  # type: ignore[misc]
                for depth, size in grid
            }
            name = max(cells, key=lambda n: cells[n].tokens / cells[n].seconds)
            rule = cell(lambda w: drafter(DEMO / "draft", config(), w), temperature, around)
            for label, t in ((name, cells[name]), ("by the rule", rule)):
                rest = " | ".join(f"{x / t.rounds:.2f}" for x in (t.tokens, t.rows, t.forwards))
                print(f"| {temperature} | {around:.0f} | {label} | {t.tokens / t.seconds:.1f} | {rest} |", flush=True)


def written(engine: Engine, begins: list[list[int]], temperature: float, tokens: int) -> list[specedge.Completion]:
    """What the target writes."""
    found: list[specedge.Completion] = []
    for at in range(0, len(begins), 8):
        found += engine.generate(begins[at : at + 8], SamplingParams(temperature, tokens, seed=7))
    return found


if __name__ == "__main__":
    main()
