"""Engine, drafter and runner as they ship, with a log beside them: what bench/serve.py measures with.

Nothing of the product knows of this; each class here calls the method that it wraps and writes down when. Times are those of time.monotonic, one
clock for all processes of a machine. The rules of the paper that the product does not have, to compare with, are here too.
"""

import ctypes
import time
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from specedge.config import DraftConfig, ModelConfig, SamplingParams
from specedge.engine.batch import BatchBuilder
from specedge.engine.cost import ALL
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine
from specedge.engine.growing import Node, Session
from specedge.engine.model import Abandoned, Decoder
from specedge.engine.request import Sequence, Verdict
from specedge.engine.runner import Runner
from specedge.engine.sampler import Key, NoiseCache
from specedge.text import Tokenizer
from specedge.tree import TokenTree

Pace = list[tuple[int, float]]  # (rows, seconds) of a forward, rising


def seconds(pace: Pace, rows: int) -> float:
    """Time of a forward of `rows` rows: linear between the measured ones, and beyond the last in proportion."""
    sizes = [r for r, _ in pace]
    if rows >= sizes[-1]:
        return pace[-1][1] * rows / sizes[-1]
    i = bisect_left(sizes, rows)
    if sizes[i] == rows or i == 0:
        return pace[i][1]
    (r0, t0), (r1, t1) = pace[i - 1], pace[i]
    return t0 + (t1 - t0) * (rows - r0) / (r1 - r0)


def sharpen_sleep() -> None:
    """Have the calling thread's sleeps end within microseconds instead of 50: prctl(PR_SET_TIMERSLACK, 1). The threads that it starts inherit it."""
    ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)


class LoggedRunner(Runner):
    """A runner that remembers the rows of its last pass."""

    rows_run = 0

    def run(self, batch: BatchBuilder, stop: Callable[[], bool] | None = None) -> Tensor:
        self.rows_run = batch.rows
        return super().run(batch, stop)


def layer_ends(shape: ModelConfig) -> list[float]:
    """The shares of a pass after which its layers end, by their weights; what is left is the head's."""
    c = shape
    layer = c.hidden * c.head_dim * 2 * (c.heads + c.kv_heads) + 3 * c.hidden * c.ffn
    return [(i + 1) * layer / (c.layers * layer + c.vocab * c.hidden) for i in range(c.layers)]


class PacedRunner(Runner):
    """A small model that takes the time of a large one: it computes, then sleeps until `pace` says that the large one would be done. It can be
    stopped where the large one could: when one of its layers ends (`ends`, in shares of a pass)."""

    def __init__(self, model: Decoder, sizes: object, rows: int, pace: Pace, ends: list[float]) -> None:
        super().__init__(model, sizes, rows)  # type: ignore[arg-type]
        self.pace, self.ends = pace, ends
        self.late: list[float] = []  # seconds that each forward took too long
        self.paced = 0.0  # seconds that they should have taken

    def run(self, batch: BatchBuilder, stop: Callable[[], bool] | None = None) -> Tensor:
        takes, begun = seconds(self.pace, batch.rows), time.monotonic()
        logits = super().run(batch)
        for end in self.ends if stop else ():
            time.sleep(max(0.0, begun + end * takes - time.monotonic()))
            if stop and stop():
                raise Abandoned
        time.sleep(max(0.0, begun + takes - time.monotonic()))
        self.paced += takes
        self.late.append(time.monotonic() - begun - takes)
        return logits


class LoggedEngine(Engine):
    """An engine that writes down its steps: (begin, end, rows, [(sequence, base, rows, tokens)]) and the prompt of each sequence by its number."""

    def __init__(self, runner: LoggedRunner, tokenizer: Tokenizer | None, eos_ids: tuple[int, ...]) -> None:
        super().__init__(runner, tokenizer, eos_ids)
        self.steps: list[tuple[float, float, int, list[tuple[int, int, int, int]]]] = []
        self.prompts: dict[int, list[int]] = {}

    def open(self, tokens: list[int], params: SamplingParams, prompt_len: int | None = None, *args: object, **kwargs: object) -> Sequence:
        sequence = super().open(tokens, params, prompt_len, *args, **kwargs)  # type: ignore[arg-type]
        self.prompts[sequence.number] = tokens[: sequence.prompt_len]
        return sequence

    def step(self, most: int = ALL) -> list[Verdict]:
        assert isinstance(self.runner, LoggedRunner)
        self.runner.rows_run = 0
        begun = time.monotonic()
        verdicts = super().step(most)
        found = [(v.sequence.number, v.base, v.verified, len(v.tokens)) for v in verdicts]
        if self.runner.rows_run:
            self.steps.append((begun, time.monotonic(), self.runner.rows_run, found))
        return verdicts


class LoggedDrafter(Drafter):
    """A drafter that writes down its forwards (begin, end, trees that were waited for), submits (time, nodes) and verdicts (time, hit, what the
    paper's single guess would have been worth, tokens)."""

    def __init__(self, runner: Runner, config: DraftConfig, tokenizer: Tokenizer | None) -> None:
        super().__init__(runner, config, tokenizer)
        self.grows: list[tuple[float, float, bool]] = []
        self.submits: list[tuple[float, int]] = []
        self.verdicts: list[tuple[float, bool, bool, int]] = []
        self.begun: list[float] = []  # verdicts with which the server had begun the next round by itself

    def grow(self, stop: Callable[[], bool] | None = None) -> bool:
        waited = any(s.submitted is None for s in self._sessions)
        begun = time.monotonic()
        grown = super().grow(stop)
        if grown:
            self.grows.append((begun, time.monotonic(), waited))
        return grown

    def submit(self, session: Session, nodes: int) -> TokenTree:
        tree = super().submit(session, nodes)
        self.submits.append((time.monotonic(), len(tree)))
        return tree

    def verdict(self, session: Session, tokens: list[int], *more: object) -> bool:
        came, guess = time.monotonic(), single_guess(session)
        guessed = guess is not None and tokens == guess.path()
        hit = super().verdict(session, tokens, *more)  # type: ignore[arg-type]
        if more[1:2] not in ((), (None,)):
            self.begun.append(came)
        self.verdicts.append((came, hit, guessed, len(tokens)))
        return hit


class Silence(NoiseCache):
    """No noise at all, where a drafter asks for that of the target."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        super().__init__(vocab, device, 1)
        self.table.zero_()

    def assign(self, keys: list[Key]) -> tuple[dict[Key, int], list[tuple[int, int, int]]]:
        return dict.fromkeys(keys, 0), []


class IndependentDrafter(LoggedDrafter):
    """Scores by the draft's probabilities alone, as if the target's noise were not known: trees of the likeliest tokens, as in SpecExec."""

    def __init__(self, runner: Runner, config: DraftConfig, tokenizer: Tokenizer | None) -> None:
        super().__init__(runner, config, tokenizer)
        self._score._sampler.noise = Silence(runner.model.config.vocab, runner.device)


def single_guess(session: Session) -> Node | None:
    """What the paper's proactive drafting would have bet on: the likeliest (leaf of the submitted tree, token below it); None if no leaf has been
    expanded."""
    submitted = session.submitted or []
    inner = {id(n.parent) for n in submitted}
    leaves = [n for n in submitted if id(n) not in inner] or [session.root]
    below = [c for leaf in leaves for c in leaf.children.values()]
    return max(below, key=lambda n: n.score, default=None)
