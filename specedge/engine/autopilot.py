"""Autopilot: whether drafting pays, or the server had better decode alone for a while.

Both ways are measured in tokens per second, round trips and draft time included: the server's own rate while it streams, the drafts' rate while
there are rounds. Drafting has `TRIAL` rounds to show that it pays; if it does not, the server goes on alone for a number of tokens that grows with
every failure. Knows nothing of texts, sockets or clocks: durations are told. Invariant: of all tokens, a share that shrinks as the failures go on
is spent on trials, so a useless draft costs nothing in the long run, and a draft that gets better is found out.
"""

import math

FIRST, GROWTH, LONGEST = 32, 4, 8192  # tokens that are left to the server after the first failure, each further one, and at most
TRIAL = 8  # rounds after which the rates are compared as they are
DOUBT = 1.5  # before: drafting fails if its rate is below the server's even times 1 + DOUBT / sqrt(rounds)
WORSE, BETTER = 0.95, 1.03  # than the server: drafting is left after a trial; its failures are forgiven. Between them things stay as they are
FORGET = 0.97  # of what earlier rounds and tokens count, with every new one
OUTAGE = 5  # times the usual: whatever held the network up for longer says nothing of either way
LOOK = 8  # tokens that are left to it once, after a first trial that went well: what it can do alone is not known before
SMALL = 7  # nodes of a tree on trial, which may be in vain


class Autopilot:
    """One for all texts between one draft and one server: what one text taught holds for the next."""

    def __init__(self) -> None:
        self._plain = [0.0, 0.0]  # tokens, seconds: of the server alone
        self._drafted = [0.0, 0.0, 0.0]  # tokens, seconds, rounds: with drafts, since they were last taken up
        self._rounds = self._tried = self._accepted = 0  # since then: rounds whose time is known, all rounds, tokens of these
        self._floor = math.inf  # the shortest step that the server has told of: alone it is not slower
        self._pause = FIRST
        self._alone = 0  # tokens that are still to come from the server

    @property
    def alone(self) -> int:
        """Tokens to leave to the server now; 0: draft."""
        return max(0, self._alone)

    @property
    def on_trial(self) -> bool:
        """Whether drafting has yet to show that it pays after it did not."""
        return self._pause > FIRST and self._rounds < TRIAL

    def streamed(self, tokens: int, seconds: float | None) -> None:
        """`tokens` came from the server alone, `seconds` after those before; None: they were the first."""
        if seconds is not None:
            if self._plain[0] > 8:
                seconds = min(seconds, OUTAGE * tokens * self._plain[1] / self._plain[0])
            self._plain = [FORGET**tokens * self._plain[0] + tokens, FORGET**tokens * self._plain[1] + seconds]
        self._alone -= tokens

    def drafted(self, tokens: int, seconds: float | None, step: float) -> None:
        """A round brought `tokens`, `seconds` after those before; None: nobody knows, or it was there to learn what rows cost and is no measure. The
        server's step took `step` seconds, 0: it did not say."""
        if self._alone > 0:  # another text's last tree came back after the decision
            return
        self._tried += 1
        self._accepted += tokens - 1
        self._floor = min(self._floor, step or math.inf)
        if seconds is not None:
            self._rounds += 1
            if self._drafted[2] > 3:
                seconds = min(seconds, OUTAGE * self._drafted[1] / self._drafted[2])
            self._drafted = [FORGET * old + new for old, new in zip(self._drafted, (tokens, seconds, 1), strict=True)]
        if seconds is not None and self._rounds == TRIAL and not self._plain[1] and self._pays():
            self._alone = LOOK
        elif not self._pays():
            self._alone = self._pause
            self._pause = min(LONGEST, GROWTH * self._pause)
            self._drafted, self._rounds, self._tried, self._accepted = [0.0, 0.0, 0.0], 0, 0, 0

    def _pays(self) -> bool:
        if self._tried >= (2 if self.on_trial else 3) and self._accepted == 0:
            return False  # a round for every token: the server needs no trip for that
        tokens, seconds, rounds = self._drafted
        plain = self._plain[0] / self._plain[1] if self._plain[1] else 1 / self._floor
        if not rounds:
            return True
        if (1 + SMALL) * rounds / seconds < plain:
            return False  # so slow that not even good drafts could make up for it
        if self._rounds < 3:
            return True
        ratio = tokens / seconds / plain
        if self._rounds < TRIAL:
            return ratio * (1 + DOUBT / math.sqrt(self._rounds)) > 1
        if ratio > BETTER and self._plain[1]:
            self._pause = FIRST
        return ratio > WORSE
