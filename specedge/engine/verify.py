"""What becomes of a step's rows: run -> sample -> accept -> commit, or for a draft run -> score, with the host deciding in between.

This is the path of a CPU, and the reading order of the one that is captured for a GPU (graphs.py), which answers the same. Knows sequences only as
jobs; extends no text. Invariant: pages change by the rows that were kept and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from specedge.engine.batch import BatchBuilder
from specedge.engine.request import Logprobs, Sequence, walk
from specedge.engine.runner import Runner
from specedge.engine.sampler import Ask, Sampler
from specedge.engine.scheduler import Grant
from specedge.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Job:
    """A sequence's share of a step: `grant.rows` rows of the row buffer from `first` on, the tail of which is `tree`."""

    sequence: Sequence
    grant: Grant
    tree: TokenTree
    first: int

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.sequence.limit - len(self.sequence.tokens)

    @property
    def ask(self) -> Ask:
        """How the rows from the root down are sampled."""
        s = self.sequence
        return Ask(s.params, s.tokens, s.prompt_len, s.stop, self.tree.texts())


class Found(NamedTuple):
    """What was found for a job that wants a token: the rows `path` of its tree, from below the root down, are accepted, and `last` follows."""

    path: list[int]
    last: int
    finish: str
    logprobs: tuple[Logprobs, ...] | None = None


class Verifier:
    """Verifies the jobs of a batch."""

    waits = True  # for a step in which nobody wants a token, too

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        self._runner, self._sampler = runner, sampler

    def __call__(self, batch: BatchBuilder, jobs: list[Job]) -> list[Found | None]:
        """One answer for each job, None for those that want no token; the K/V of their chains and accepted rows is in their pages then."""
        logits = self._runner.run(batch)
        asks = [job.ask for job in jobs if job.grant.token]
        before = logits.clone() if any(ask.params.logprobs is not None for ask in asks) else logits  # sampling changes them
        sampled = self._sampler(logits, asks) if asks else []
        found, at = list[Found | None](), 0
        for job in jobs:
            s, path = job.sequence, list[int]()
            answer = None
            if job.grant.token:
                end = at + len(job.tree) + 1
                row, tokens, last, finish = walk(job.tree, sampled[at:end], s.stop, job.room)
                path, k = job.tree.path(row), s.params.logprobs
                logprobs = None if k is None else self._sampler.logprobs(before[at:end][[0, *path]], [*tokens, last], k)
                answer, at = Found(path, last, finish, logprobs), end
            root = job.first + job.grant.chain - 1
            kept = [*range(job.first, root + 1), *(root + r for r in path)]
            assert s.table is not None
            self._runner.commit(kept, *s.table.locate(s.computed, s.computed + len(kept)))
            found.append(answer)
        return found

    def forget(self) -> None:
        """A call was interrupted: what it was about to cache is not there."""
        self._sampler.noise.forget()


class Scorer:
    """Runs a draft's batch and gives `best` children to each of its rows, trusting the draft by `tau`."""

    stops = True  # between two layers, when it is told to

    def __init__(self, runner: Runner, sampler: Sampler, tau: float, best: int) -> None:
        self._runner, self._sampler, self._tau, self._best = runner, sampler, tau, best

    @torch.inference_mode()
    def __call__(
        self, batch: BatchBuilder, asks: list[Ask], stop: Callable[[], bool] | None = None
    ) -> tuple[list[list[float]], list[list[int]]]:  # fmt: skip
        """Values (logarithms of probabilities) and ids of the best children of every row that is asked for. Abandoned if `stop` says so."""
        logits = self._runner.run(batch, stop)
        if not asks:
            return [], []
        values, ids = self._sampler.score(logits, self._sampler.draw(asks, looser=True), self._tau, self._best)
        return values.tolist(), ids.tolist()
