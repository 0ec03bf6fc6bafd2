"""Pace: what drafting and verifying cost in time, measured, and what follows from it.

The verdict on n nodes takes around + verify(n + 1 rows): the server says how long it verified, and what is left of the time between tree and verdict
is `around`, the round trip and the queue. Knows nothing of trees, sockets, or of what time it is: durations are told. The same sums serve an edge
and the co-located engine, whose `around` is next to nothing.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from specedge.engine.cost import CostModel

RECENT = 15  # rounds whose median `around` is: one that was sent again, or met a reconnect, does not count
STEADY = 0.05  # weight of the latest in a running mean
FORGET = 0.9  # of what a text's earlier rounds count, with every round


@dataclass(frozen=True, slots=True)
class Served:
    """How a tree was verified: in a step of `seconds` over `rows` rows, as far as is known; `others` of them belong to other texts."""

    seconds: float
    rows: int
    others: int = 0


class Pace:
    """One for all texts that are drafted on one device and verified by one server."""

    def __init__(self) -> None:
        self.draft, self.verify = CostModel(), CostModel()
        self._around: deque[float] = deque(maxlen=RECENT)
        self.kept = 0.0  # share of verdicts lately whose next root had been grown from

    @property
    def known(self) -> bool:
        """Whether a round has been timed."""
        return bool(self._around)

    @property
    def around(self) -> float:
        """Seconds between tree and verdict in which the tree is not verified."""
        return median(self._around) if self._around else 0.0

    def answered(self, around: float) -> None:
        """The verdict on a tree came `around` seconds later than the step that verified it took."""
        self._around.append(max(0.0, around))

    def rooted(self, grown: bool) -> None:
        """A verdict's next root had been grown from, or not."""
        self.kept += STEADY * (grown - self.kept)

    def away(self, rows: int, context: int) -> float:
        """Seconds until the verdict on a tree that makes a step of `rows` rows."""
        return self.around + self.verify.predict(rows, context)


@dataclass(slots=True)
class Rate:
    """Tokens per second of one text, over its last rounds."""

    rounds: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    outside: float = 0.0  # of these, not spent on verifying

    def add(self, tokens: int, seconds: float, verifying: float) -> None:
        """A round of `seconds`, from verdict to verdict."""
        if self.rounds > 3:  # whatever held this one up will hardly do so again
            seconds = min(seconds, 5 * self.seconds / self.rounds)
        self.rounds, self.tokens = FORGET * self.rounds + 1, FORGET * self.tokens + tokens
        self.seconds = FORGET * self.seconds + seconds
        self.outside = FORGET * self.outside + max(0.0, seconds - verifying)

    @property
    def per_second(self) -> float:
        """0: not known yet."""
        return self.tokens / self.seconds if self.seconds else 0.0


def optimum(scores: Sequence[float], outside: float, verify: CostModel, others: int, context: int) -> int:
    """How many of the nodes, whose `scores` fall, make the most tokens per second: the n of the largest (1 + their sum) / (outside + verify)."""
    tokens, best, size = 1.0, 0.0, 0
    for n in range(len(scores) + 1):
        tokens += scores[n - 1] if n else 0.0
        ratio = tokens / (outside + verify.predict(others + n + 1, context))
        if ratio > best * (1 + 1e-9):
            best, size = ratio, n
    return size


def beyond(nodes: int, verify: CostModel, others: int) -> int:
    """How many to send where `nodes` are best: twice as many and one where nobody knows what so many rows take, for that they pay would never be
    found out."""
    return nodes if verify.told or others + nodes + 1 < verify.largest else 2 * nodes + 1


def gain(scores: Sequence[float], rows: Sequence[float], usual: Sequence[float], nodes: int) -> float:
    """What a forward over candidates of scores `rows` will add to the sum of the `nodes` best, now `scores`, if their children are accepted as
    `usual` for their ranks: those that get among the best take the places of the worst."""
    children = [p * a for p in rows for a in usual]
    return sum(sorted([*scores, *children])[-nodes:]) - sum(scores) if nodes else 0.0
