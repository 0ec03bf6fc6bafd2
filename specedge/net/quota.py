"""What an account may use, and what it uses now.

Counts and rates are apart from the protocol: sessions.py asks before it gives, and answers BUSY with what `Full` says. Knows nothing of messages,
sockets or engines; the clock is the caller's. Invariant: what an account is using is never more than its quota allows, but for the rows of one
step, which are charged once they are known and paid for by waiting.
"""

import math
from dataclasses import dataclass, field

from specedge.engine import request

BURST = 2.0  # seconds of its rate that an account may save up
WAIT = 5.0  # seconds that an account which has overdrawn its rate is made to wait in silence; beyond, it is told
RETRY_FULL, RETRY_ROUND = 1000, 50  # milliseconds after which a place, or room for a round, may be free again


class Full(Exception):
    """Whoever asks comes at a bad time: the sentence, and the milliseconds after which the same may be asked again."""

    def __init__(self, text: str, retry_ms: float) -> None:
        super().__init__(text)
        self.text, self.retry_ms = text, int(retry_ms)


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one account; 0: none."""

    connections: int = 256
    sessions: int = 256
    kv_tokens: int = 0  # prompt and output of all its sessions, at their longest
    in_flight: int = 0  # rounds that await their verdicts
    rows_per_s: int = 0  # roots and nodes that are verified
    prompt_tokens_per_s: int = 0


@dataclass(slots=True)
class Bucket:
    """A token bucket that may be overdrawn: `level` says how much of `rate` units per second is saved up, or owed."""

    level: float = 0.0
    at: float | None = None  # time of the last change
    charged: int = 0  # units that were taken off so far

    def settle(self, rate: int, used: int, now: float) -> float:
        """Charge for what was used since the last time, out of `used` units in all; returns the seconds until nothing is owed."""
        if rate == 0:
            self.charged, self.at = used, None
            return 0.0
        saved = BURST * rate if self.at is None else self.level + (now - self.at) * rate
        self.level, self.at, self.charged = min(saved, BURST * rate) - (used - self.charged), now, used
        return max(0.0, -self.level / rate)


@dataclass(slots=True, eq=False)
class Usage:
    """What an account uses now. `payer` is how the engine knows it."""

    quota: Quota
    payer: request.Account
    connections: int = 0
    sessions: int = 0
    kv_tokens: int = 0
    in_flight: int = 0
    wait: float = 0.0  # seconds until it has paid for what it used
    took: float = -math.inf  # when it last took a place from another account
    _verified: Bucket = field(default_factory=Bucket)
    _prompt: Bucket = field(default_factory=Bucket)

    def connect(self) -> None:
        """One more connection. Raises Full, as those below do."""
        if self.connections >= self.quota.connections > 0:
            raise Full(f"all {self.quota.connections} connections of this account are taken", RETRY_FULL)
        self.connections += 1

    def check_session(self, kv_tokens: int) -> None:
        """Whether there is room for one more session of so many tokens."""
        if self.sessions >= self.quota.sessions > 0:
            raise Full(f"all {self.quota.sessions} sessions of this account are taken", RETRY_FULL)
        if self.kv_tokens + kv_tokens > self.quota.kv_tokens > 0:
            raise Full(f"the open sessions of this account leave too little of its {self.quota.kv_tokens} tokens", RETRY_FULL)
        self._afford()

    def check_round(self) -> None:
        """Whether one more round may begin."""
        if self.in_flight >= self.quota.in_flight > 0:
            raise Full(f"{self.in_flight} rounds of this account await their verdicts already", RETRY_ROUND)
        self._afford()

    def _afford(self) -> None:
        if self.wait > WAIT:
            raise Full(f"this account has used up its rate for the next {self.wait:.0f} s", min(1000 * self.wait, 2**32 - 1))

    @property
    def must_ask(self) -> bool:
        """Whether no round of it may begin unasked: its sessions have to take turns, or it owes something."""
        return 0 < self.quota.in_flight < self.sessions or self.wait > 0

    def settle(self, now: float) -> None:
        """Charge for what the engine has done for this account, and hold it back while it owes something."""
        verified = self._verified.settle(self.quota.rows_per_s, self.payer.verified, now)
        prompt = self._prompt.settle(self.quota.prompt_tokens_per_s, self.payer.prompt, now)
        self.payer.verified_held, self.payer.prompt_held = verified > 0, prompt > 0
        self.wait = max(verified, prompt)
