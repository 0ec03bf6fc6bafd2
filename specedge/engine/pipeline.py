"""Pipeline: when to step, and with how many trees, so that tokens per second rise over whole cycles.

Every session goes round: verdict, draft and network (its gap), tree, wait, verify. A step with more trees shares the weights' bytes, but whoever is
ready first waits for the last, and the server has nothing to do while all draft. Where rows cost much, taking turns is better: half of the
sessions are verified while the others draft. No rule that looks at the next step alone finds both: it neither splits a batch that is ready, nor
counts the return of those left out (up to 23 % lost when the gap is shorter than a step).

So the family of rules is "wait until `need` trees are ready, then take `most`": (1, all) steps at once, (all, all) waits for everybody, (m, m) makes
groups that take turns. Each is played forward from the present state, with every session's own gap, spread, rows and tokens and the predicted time
of every step, until some rounds have passed; the best rate wins. Whatever the rule, no tree waits longer than a step with all of them would
take: within that time it could have been verified and gone again.

Knows nothing of sockets, sequences or clocks. Invariant: while a tree is ready the server is never idle
for more than `HARD` seconds.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specedge.engine.cost import CostModel

HARD = 0.5  # seconds that a tree may be kept waiting for others
EVERY = 32  # decisions after which another rule may be chosen; at once, and after 4, 8, 16, when more than 1 in `CROWD` sessions came or went
CROWD = 8
ROUNDS, WARM = 16, 5  # rounds of every session that are played, and how many of them come before it counts
PLAYED = 384  # rounds of all sessions together at most: to choose takes 0.2 ms for 2 sessions, 1.3 for 8, 5 for 64
MARGIN = 0.01  # by which a rule must beat the one in force
LATE = 4.0  # spreads, and a quarter of a step, after which an expected tree is waited for no more
WEIGHT = 0.2  # of the latest in running means
JITTER = np.clip(np.random.default_rng(0).standard_normal(1021), -2, 2).tolist()
SIZES = sorted({m << i for i in range(12) for m in (1, 3)} | {5, 7})  # of groups


@dataclass(slots=True)
class Rhythm:
    """Running means of one session: seconds from a verdict to its next tree, how far they scatter, rows and tokens of a round."""

    gap: float = -1.0  # not known yet
    spread: float = 0.0
    rows: float = 1.0
    tokens: float = 1.0

    def returned(self, gap: float) -> None:
        """Its tree came `gap` seconds after the verdict before."""
        if self.gap <= 0:  # of a gap of 0, as of a tree that was there before the verdict, no mean would ever rise
            self.gap, self.spread = gap, gap / 4
            return
        gap = min(gap, 4 * self.gap + 4 * self.spread)
        self.spread += WEIGHT * (abs(gap - self.gap) - self.spread)
        self.gap += WEIGHT * (gap - self.gap)

    def verified(self, rows: int, tokens: int) -> None:
        """A round took `rows` rows and brought `tokens` tokens."""
        self.rows += WEIGHT * (rows - self.rows)
        self.tokens += WEIGHT * (tokens - self.tokens)


@dataclass(frozen=True, slots=True)
class Turn:
    """A session at some moment: its tree is `ready` since `at`, or expected then, and will read `context` tokens of K/V."""

    ready: bool
    at: float
    rhythm: Rhythm
    context: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """Wait until `need` trees are ready, then take `most`."""

    need: int
    most: int


class Pipeline:
    """Chooses a rule and follows it."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.rule = Rule(1, 1 << 30)
        self._sessions, self._every, self._left = 0, EVERY, 0
        self._idle: float | None = None  # since when the server waits though a tree is ready

    def decide(self, turns: Sequence[Turn], now: float) -> tuple[float, int]:
        """When to step, `now` at the earliest, if nothing else happens, and how many trees to take then. `turns`: everybody who is ready or
        expected."""
        self._left -= 1
        changed = CROWD * abs(len(turns) - self._sessions) > self._sessions
        if changed or self._left <= 0:
            self._every = EVERY // CROWD if changed else min(2 * self._every, EVERY)
            self._sessions, self._left = len(turns), self._every
            self.rule = self._choose(turns, now)
        missing = min(self.rule.need, len(turns)) - sum(t.ready for t in turns)
        patience = self._patience(turns)
        self._idle = now if self._idle is None else self._idle
        coming = sorted((t.at, t.at + LATE * t.rhythm.spread + patience / 4) for t in turns if not t.ready)
        coming = [(at, latest) for at, latest in coming if latest > now]
        if 0 < missing <= len(coming) and coming[missing - 1][0] <= self._idle + patience and now < self._idle + patience:
            return min(coming[missing - 1][1], self._idle + patience), self.rule.most
        self._idle = None
        return now, self.rule.most

    def _patience(self, turns: Sequence[Turn]) -> float:
        return min(HARD, self.cost.predict(math.ceil(sum(t.rhythm.rows for t in turns)), sum(t.context for t in turns)))

    def _choose(self, turns: Sequence[Turn], now: float) -> Rule:
        n = len(turns)
        at_once = Rule(1, 1 << 30)
        if n < 2:
            return at_once
        rules = [at_once, *(Rule(m, m) for m in SIZES if m < n), Rule(n, n)]
        rates = [self._rate(rule, turns, now) for rule in rules]
        best = max(range(len(rules)), key=lambda i: rates[i])
        for rule in (self.rule, at_once):
            if rule in rules and rates[rules.index(rule)] * (1 + MARGIN) >= rates[best]:
                return rule
        return rules[best]

    def _rate(self, rule: Rule, turns: Sequence[Turn], now: float) -> float:
        """Tokens per second if `rule` is followed from now on."""
        n, patience = len(turns), self._patience(turns)
        coming = [(max(now, t.at), i) for i, t in enumerate(turns) if not t.ready]
        heapq.heapify(coming)
        ready = deque(sorted((t.at, i) for i, t in enumerate(turns) if t.ready))
        total = min(ROUNDS * n, max(PLAYED, 4 * n))
        warm = total * WARM // ROUNDS
        played, tokens, begun, draws, idle = 0, 0.0, now, 0, now
        while played < total:
            while coming and coming[0][0] <= now:
                ready.append(heapq.heappop(coming))
            if not ready:
                now = idle = coming[0][0]
                continue
            if len(ready) < min(rule.need, n) and coming and coming[0][0] <= idle + patience:
                now = coming[0][0]
                continue
            group = [ready.popleft()[1] for _ in range(min(rule.most, len(ready)))]
            now += self.cost.predict(math.ceil(sum(turns[i].rhythm.rows for i in group)), sum(turns[i].context for i in group))
            before, idle = played, now
            for i in group:
                r = turns[i].rhythm
                draws += 1
                heapq.heappush(coming, (now + max(0.0, r.gap + 1.25 * r.spread * JITTER[draws % len(JITTER)]), i))
                played += 1
                tokens += r.tokens if before >= warm else 0.0
            if before < warm:
                begun = now
        return tokens / max(now - begun, 1e-9)
