"""Rounds: what an edge says about one text, when, and what it believes of the answers.

The other side of sessions.py, and like it without socket, thread, model or clock of its own: messages go out and come in. One state machine serves
the first opening, repeats, reconnects, restarted servers and other servers alike, for all of them are answered by saying again what the
server does not know. Invariant: the text grows by nothing but verdicts that continue it, so whatever is lost, late or twice, it is the target's own.
docs/protocol.md is the specification.
"""

import random
import secrets
from dataclasses import dataclass, field

import numpy as np

from specedge.config import SamplingParams
from specedge.engine.pace import Served
from specedge.net import wire
from specedge.net.client import ServerError
from specedge.net.sampling import pack_sampling
from specedge.tree import EMPTY, TokenTree

RESEND = 3.0  # seconds without an answer after which the same is said again; servers answer a repeat as they did before
PATIENCE = 60.0  # seconds without movement after which a text is given up
PLACE = 600.0  # seconds that a text waits for a place where the server is full, from the moment on when a text of this edge last moved
REBUILDS = 5  # of a session without a new token in between, after which its server is believed
WHILE_DRAINING = 1.0  # seconds after which a server that is going down may be another one
REBUILD = ("session", "offset", "round", "base", "internal")  # codes that a session opened anew is the answer to


@dataclass(frozen=True, slots=True)
class Step:
    """What a verdict brought: `tokens`, of which the first `accepted` are a path of the tree. `served`: how it was verified, if that was said."""

    tokens: list[int]
    accepted: int
    finish: str
    nodes: int  # of the tree
    served: Served | None = None
    ahead: int | None = None  # nodes of the next tree, where the server goes on by itself
    anew: bool = False  # and nodes are numbered anew, from its root on


@dataclass(slots=True, eq=False)
class Rounds:
    """The session of one text whose first `prompt_len` tokens are the prompt."""

    tokens: list[int]
    prompt_len: int
    params: SamplingParams  # with a seed
    stop: list[int]
    vocab: int
    budget: int  # nodes that the server wants at most
    heard: float  # when the server last said something that helps
    batch: bool = False  # the server's idle rows will do
    id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    round: int = 0
    sent: TokenTree | None = None  # awaits its verdict
    nodes: int = 0  # of its tree
    since: int = 0  # the round of which on nodes that grow are numbered
    ahead: int = 0  # nodes of the trees with which the server may go on by itself; 0: do not say what grows
    until: int = 0  # the length to which the server decodes by itself, streaming; 0: it does not
    known: bool = False  # the server may have heard of the session, and wants to be told of its end
    why: str = ""  # what holds the text up
    _said: bool = False  # this round has been said on this connection, and not been put off
    _open: bool = False  # the server has, or is about to have, the session
    _asked: bool = False  # it may have it, and was asked
    _server: str = ""  # where it was opened last
    next: float = 0.0  # when `speak` will have something to say
    _rebuilds: int = 0
    _full: float = -PLACE  # when the server last said that it was

    @property
    def limit(self) -> int:
        """Length at which max_tokens ends the text."""
        return self.prompt_len + self.params.max_tokens

    def connect(self, server: str, now: float) -> None:
        """A new connection to `server` stands: ask there for the session, or open it where it has never been."""
        self._open, self._asked, self._said = False, server == self._server, False
        if not self._asked:
            self.ahead = 0  # until the next round: another server knows nothing of what grew until now
        self.known = self.known and self._asked
        self._server, self.next = server, now

    def offer(self, tree: TokenTree, until: int, now: float) -> None:
        """Begin the next round. `until`: the length to which the server is to decode on by itself; 0: no further than the tree."""
        self.round, self.sent, self.until, self._said = self.round + 1, tree, min(until, self.limit), False
        self.since, self.nodes = self.round, len(tree)
        if self._open:
            self.next = self.heard = now

    @property
    def tells(self) -> bool:
        """Whether the server wants to hear what grows."""
        return self.ahead > 0 and self._said and self.sent is not None

    def speak(self, now: float, lease: float) -> list[wire.Message]:
        """What has to be said by now; nothing, most of the time. `lease`: seconds for which the session may be silent."""
        if now < self.next:
            return []
        self.next, self.known = now + RESEND, True
        if self._asked:
            return [wire.Resume(self.id)]
        messages = [] if self._open else self._opening()
        self._open = True
        if self.sent is not None:
            messages.append(self._draft(self.sent))
            self._said = True
        elif not messages:
            messages.append(wire.Lease(self.id))
        if self.sent is None:
            self.next = now + lease / 3
        return messages

    def grown(self, first: int, nodes: list[tuple[int, int, int]]) -> wire.Message:
        """What says that nodes have grown: token, parent and steps of each from number `first` on, up to GROWN of them."""
        tokens, parents = wire.pack_ids([n[0] for n in nodes]), np.array([n[1] for n in nodes], "<u2").tobytes()
        return wire.Grown(self.id, self.since, first, tokens, parents, bytes(n[2] for n in nodes))

    def check_patience(self, now: float, why: str, moved: float) -> None:
        """Raise ServerError if nothing has moved for too long; `why`: what is known of the connection, "" if it stands; `moved`: when any text of
        this edge last has. Who is told BUSY is in a queue and not forgotten: it waits longer, and as long as others of this edge get on."""
        queued = now - self._full <= PATIENCE
        patience, since = (PLACE, max(self.heard, moved)) if queued else (PATIENCE, self.heard)
        if now - since <= patience or (self._open and self.sent is None and not why):  # or it is the edge itself that takes its time
            return
        if reason := why or self.why:
            raise ServerError(f"given up after {patience:.0f} s: {reason}")
        raise ServerError(f"{self._server} has not answered for {patience:.0f} s: check the network and the server")

    def take(self, m: wire.Message, now: float) -> Step | None:
        """Believe a message, as far as it fits. Raises ServerError when the text cannot go on."""
        match m:
            case wire.Verdict():
                return self._verdict(m, now)
            case wire.Opened():
                self.heard = now
            case wire.Resumed() if self._asked:
                self._asked, self.heard = False, now
                # a session that is not where this text left it belongs to a connection that was overtaken
                self._open = m.length >= len(self.tokens) and self.round - 1 <= m.round and (m.round <= self.round or self.ahead > 0)
                self.next = now
            case wire.NeedPrefill() | wire.Gone() if self._asked:
                self._asked, self._open, self.next, self.ahead = False, False, now, 0
            case wire.Busy() if m.round in (0, self.round):
                self.why, self._open, self._said = m.text, self._open and m.round > 0, False
                self.next = now + m.retry_ms / 1000 * random.uniform(1, 2)
                self._full = max(now, self.next - PATIENCE / 2)  # whoever is told to come back in minutes will hear nothing until then
            case wire.Error() if m.round in (0, self.round):
                self._error(m, now)
        return None

    # ------------------------------------------------------------------------------------------------------------------

    def _opening(self) -> list[wire.Message]:
        """OPEN with all tokens; the round that awaits its verdict is the next one."""
        answered = self.round - (self.sent is not None)
        first = wire.pack_ids(self.tokens[: wire.FIRST])
        messages: list[wire.Message] = [
            wire.Open(
                self.id, first, len(self.tokens), self.prompt_len, pack_sampling(self.params), self.stop, self.params.max_tokens, answered,
                int(self.batch),
            )
        ]
        for at in range(wire.FIRST, len(self.tokens), wire.CHUNK):
            messages.append(wire.Prompt(self.id, at, wire.pack_ids(self.tokens[at : at + wire.CHUNK])))
        return messages

    def _draft(self, tree: TokenTree) -> wire.Message:
        return wire.Draft(self.id, self.round, len(self.tokens), wire.pack_ids(tree.tokens), tree.parents.tobytes(), self.until, self.ahead)

    def _verdict(self, m: wire.Verdict, now: float) -> Step | None:
        known = len(self.tokens)
        if self.sent is None and self.ahead and m.verified and (m.round, m.base) == (self.round + 1, known):
            self.round, self.sent, self.nodes = m.round, EMPTY, m.verified - 1  # the server has begun before the tree was ready
        if m.round == self.round:
            self.heard = now
            if m.base <= known:  # what comes behind a gap must not put off the repeat that closes it
                self.next = now + RESEND
        if self.sent is None or m.round != self.round or m.base != known:
            return None  # of a round that is answered, or a gap, which the next repeat closes
        if not (m.tokens or m.finish):
            return None  # nothing new yet: the server lives, and has the round
        try:
            tokens = wire.unpack_ids(m.tokens).tolist()
        except wire.WireError:
            tokens = []
        if not tokens or max(tokens) >= self.vocab or known + len(tokens) > self.limit:
            raise ServerError("the server sent a verdict that does not continue this text")
        accepted = len(tokens) - 1 if m.verified and not self.until else 0
        served = Served(m.verify_us / 1e6, rows := max(m.rows, m.verified), rows - m.verified) if m.verified and m.verify_us else None
        ahead = m.nodes if m.next > self.round and self.ahead and not m.finish else None
        nodes = max(self.nodes, accepted)  # of the tree that was sent, or, of a round that began late, of a larger one
        step = Step(tokens, accepted, wire.FINISH[m.finish], nodes, served, ahead, m.since != self.since)
        self.tokens += tokens
        self.budget, self.why, self._rebuilds = m.row_budget, "", 0
        self.sent = EMPTY if len(self.tokens) < self.until or ahead is not None else None
        if ahead is not None:
            self.round, self.since, self.nodes, self._said = m.next, m.since, m.nodes, True
        return step

    def _error(self, m: wire.Error, now: float) -> None:
        if m.code == "hello":  # forgotten, perhaps with its session
            again = self._asked  # it has no place for this connection, then: HELLO is said again, and takes its time
            self._asked, self._open, self.next = True, False, now + random.uniform(1, 2) * again
        elif m.code == "draining":
            self.why, self._open = m.text, False
            self.next = now + WHILE_DRAINING * random.uniform(1, 2)
        elif m.code not in REBUILD:
            raise ServerError(f"the server refuses: {m.text}", m.code)
        elif self._open:  # else it is known already that the server lacks it
            self._rebuilds += 1
            if self._rebuilds > REBUILDS:
                raise ServerError(f"the server refuses: {m.text}", m.code)
            self._open = False
            self.next = now + (random.uniform(0, 0.05 * 2**self._rebuilds) if self._rebuilds > 1 else 0.0)
