"""Admission: how many nodes of every tree are worth their rows, and what that is judged by.

Trees come in falling score order and without scores, so the server learns survival by rank: how often the node of rank i lies on the accepted
path. Every prefix of a tree is a tree, so whatever is admitted, the text is the same. A step that answers B sequences and admits a set A of nodes
brings B + sum of survival(A) tokens, and it takes T(rows, context). Chosen is the set that maximises

    G = (B + sum of survival(A)) / (away + T(rows, context))

which is to admit a node while survival >= G x dT/drow; up to the knee of T that is all of them, and where rows cost much it may be none.

Why `away`: what counts is tokens per second over the whole cycle of a session, not over the step. If somebody waits whenever a step ends, a longer
step delays everybody, the server's time is all there is, and away = 0. If the server has to wait for its edges, a longer step delays only those
in it, whose cycle is away (draft, network) + T: judged by the step alone, a lone session would be refused nodes that cost it 1 ms of a cycle of
100. In between, away counts with the share of steps after which the server had to wait. G is that of the best set itself, found by trying all sizes
(Dinkelbach's fixed point in one scan): the steps of a steady state are alike, so the rate of this one is the price of its time.

Knows nothing of tensors, sockets or clocks: times are told. Invariant: what is admitted is a prefix of what was offered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specedge.engine.cost import CostModel
from specedge.tree import MAX_NODES

EDGES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29, 38, 50, 65, 85, 110, 143, 186, MAX_NODES + 1]  # ranks that begin a class, and the end
WIDTH = np.diff(EDGES)  # [C] ranks in a class, whose survival is taken to be one
CLASS = np.repeat(np.arange(len(WIDTH)), WIDTH)  # [MAX_NODES] of rank i + 1
GUESS = 0.7 / np.sqrt(np.array(EDGES[:-1]) * (np.array(EDGES[1:]) - 1.0)) ** 0.8  # [C] before anything was seen: 3.8 tokens of 31 nodes
TRIED = np.array([np.bincount(CLASS[:n], minlength=len(WIDTH)) for n in range(MAX_NODES + 1)], float)  # [n, C] nodes that a tree of n tries
PRIOR, OWN = 4.0, 3.0  # nodes that the guess, and the survival over all sessions, weigh
SLOW, FAST = 0.999, 0.98  # what is left of the memory of all sessions, of one, after a round; with nodes, for the former
EXPLORE = 32  # every so many rounds, and after 1, 2, 4, 8 and 16, a session may have twice as many nodes and one more, but
FEW = 7  # so many in those first ones: else ranks that are refused could never be learned, nor that a new draft is better than those before
# Of the time since it last did so, that may take this share of a lone session's; of B in a step each has 1/B of the time, and keeps B waiting, so it
# is 1/B^2. Where rows are dear (1.5B, Zen 4, in virtual time, texts of 64 tokens) 1, 2, 4 sessions have 12.9, 21.4, 29.5 tokens/s so, without a limit
# 12.9, 20.7, 27.5, without exploring 12.2, 21.8, 29.5; where they are cheap all are within 3 %.
SPENT = 0.1
STEADY = 0.05  # weight of the latest in running means
QUEUED = 1 / 16  # a pause shorter than this share of the step before is none: somebody was waiting already
MOST = 4096  # nodes over which budgets are computed: sorting them takes 0.3 ms


@dataclass(slots=True, eq=False)
class Acceptance:
    """What is known of one session's drafts, by class of rank."""

    hits: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(WIDTH)))
    tries: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(WIDTH)))
    rounds: int = 0
    explored: int = 0  # the last round that was there to learn
    exploring: bool = False  # whether the next one is
    budget: int = MAX_NODES  # nodes worth offering in the next round

    @property
    def due(self) -> bool:
        """Whether it is time for a round that is there to learn."""
        return self.rounds - self.explored >= min(max(1, self.explored), EXPLORE)


def admit(curves: Sequence[NDArray[np.float64]], rows: int, answers: int, context: int, cost: CostModel, away: float, limit: int) -> list[int]:
    """How many nodes of every tree make the best step. `curves`: the survival of each tree's nodes, never rising; beside them the step has `rows`
    rows, answers `answers` sequences and reads `context` tokens; at most `limit` nodes are admitted."""
    survival = np.concatenate([*curves, np.zeros(0)])
    order = np.argsort(-survival, kind="stable")[: max(0, limit)]  # among equals whoever comes first; no curve rises, so each set is one of prefixes
    gain = answers + np.concatenate([[0.0], np.cumsum(survival[order])])
    rate = gain / (away + cost.times(rows + np.arange(len(gain)), context))
    best = len(rate) - 1 - int(np.argmax(rate[::-1]))  # the most among equals
    owner = np.repeat(np.arange(len(curves)), [len(c) for c in curves])[order[:best]]
    return [int(n) for n in np.bincount(owner, minlength=len(curves))]


class Admission:
    """The survival over all sessions and the rhythm of the server, learned on line."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._hits, self._tries = np.zeros(len(WIDTH)), np.zeros(len(WIDTH))
        self.gap = 0.0  # mean seconds from a verdict to the next tree
        self._queued = 0.0  # share of steps before which the server had nothing to wait for

    @property
    def away(self) -> float:
        """Seconds of a session's cycle that pass whatever the length of a step."""
        return self.gap * (1 - self._queued)

    def returned(self, gap: float) -> None:
        """A session's tree came `gap` seconds after the verdict before."""
        self.gap += STEADY * (min(gap, 4 * self.gap) - self.gap) if self.gap else gap

    def paused(self, pause: float, step: float) -> None:
        """`pause` seconds lie between the step before, which took `step` seconds, and this one."""
        self._queued += STEADY * ((pause < QUEUED * step) - self._queued)

    def curves(self, sessions: Sequence[Acceptance]) -> NDArray[np.float64]:
        """Survival by rank `[sessions, MAX_NODES]`, never rising: a session's own counts, shrunk to those of all sessions, and these to a guess."""
        shared = (self._hits + PRIOR * GUESS) / (self._tries + PRIOR)
        hits = np.array([s.hits for s in sessions]).reshape(len(sessions), len(WIDTH))
        tries = np.array([s.tries for s in sessions]).reshape(len(sessions), len(WIDTH))
        by_class = np.minimum.accumulate((hits + OWN * shared) / (tries + OWN), axis=1)
        return np.asarray(np.minimum(by_class, 1.0)[:, CLASS])

    def choose(self, sessions: Sequence[Acceptance], offered: Sequence[int], rows: int, answers: int, context: int, limit: int) -> list[int]:
        """Nodes admitted of trees of `offered` nodes; the other arguments as in `admit`. A session that explores has the nodes of its budget,
        whose price `plan` has looked at: by a law that takes rows never seen for dear not even sure ones would pay."""
        curves = [curve[:n] for curve, n in zip(self.curves(sessions), offered, strict=True)]
        found = admit(curves, rows, answers, context, self.cost, self.away, limit)
        free = limit - sum(found)
        for i, s in enumerate(sessions):
            if s.exploring and (more := min(free, min(s.budget, offered[i]) - found[i])) > 0:
                found[i], free = found[i] + more, free - more
        return found

    def learn(self, sessions: Sequence[Acceptance], admitted: Sequence[int], accepted: Sequence[Sequence[int]]) -> None:
        """What a step taught: of the first `admitted` nodes of every session's tree those of ranks `accepted` were on its path."""
        hit, tried = np.zeros((len(sessions), len(WIDTH))), TRIED[np.array(admitted)]
        owner, rank = np.repeat(np.arange(len(sessions)), [len(a) for a in accepted]), np.array([i - 1 for a in accepted for i in a], int)
        np.add.at(hit, (owner, CLASS[rank]), 1)
        hits = FAST * np.array([s.hits for s in sessions]) + hit
        tries = FAST * np.array([s.tries for s in sessions]) + tried
        for i, s in enumerate(sessions):
            if admitted[i] and s.exploring:  # an edge that streams has no nodes, and may hear no budget but that of every 32nd round
                s.explored = s.rounds
            s.hits, s.tries, s.rounds = hits[i], tries[i], s.rounds + 1
        kept = SLOW ** sum(n > 0 for n in admitted)  # else those who decode alone would wipe out what drafts have taught
        self._hits, self._tries = kept * self._hits + hit.sum(0), kept * self._tries + tried.sum(0)

    def plan(self, sessions: Sequence[Acceptance], answers: int, context: int, limit: int) -> None:
        """Say what each session may offer in its next round, if it meets the company of this one: set their budgets. `answers`, `context` and `limit`
        are those of the step, as in `admit`."""
        most = min(MAX_NODES, max(8, MOST // max(1, len(sessions))))
        found = admit([c[:most] for c in self.curves(sessions)], answers, answers, context, self.cost, self.away, limit)
        rows = answers + sum(found)
        for s, n in zip(sessions, found, strict=True):
            more = self._affordable(s, rows, answers, context) if s.due else 0
            s.budget = min(MAX_NODES, n + more, max(2 * n + 1, FEW if s.explored < EXPLORE else 0))
            s.exploring = s.budget > n

    def _affordable(self, session: Acceptance, rows: int, answers: int, context: int) -> int:
        """Nodes that a session may have for learning, beyond those that pay in a step of `rows` rows: as many as it likes where no pass of so many
        was seen, for then they teach what rows cost as well (where they are cheap and prompts short that is worth 3 and 6 % at 2 and 4 sessions)."""
        if rows >= self.cost.largest:
            return MAX_NODES
        seconds = SPENT * (session.rounds - session.explored) * self.cost.predict(rows, context) / max(1, answers) ** 2
        return min(MAX_NODES, self.cost.room(rows, seconds))
