"""Sessions: what the server knows of every edge's texts, and the rules of the protocol.

Decoded messages go in, engine calls and answers come out; there is no socket, thread or clock of its own in here, so every rule is tested with plain
calls. One thread, the engine's, uses it. Invariants: nothing unchecked reaches the engine; a round is answered once with one meaning, however
often it is sent; an error ends the session that it names and touches no other; nobody reaches the session of another account.
docs/protocol.md is the specification.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from specedge import __version__
from specedge.config import PRIORITIES
from specedge.engine import request
from specedge.engine.cost import Law
from specedge.engine.engine import Engine
from specedge.engine.mirror import Mirror, catch_up, go_on
from specedge.engine.texts import RequestError
from specedge.net import checks, wire
from specedge.net.checks import Refused
from specedge.net.quota import RETRY_FULL, Full, Quota, Usage
from specedge.net.sampling import unpack_sampling
from specedge.net.wire import Error, Message
from specedge.tree import MAX_NODES, TreeError

log = logging.getLogger(__name__)
SURVIVABLE = ("round", "base", "session")  # errors that leave their session as it was
MEMORY, REMEMBERED = 600.0, 4096  # for so many seconds, and so many of them, sessions that have lapsed are known
TAKES = 1.0  # seconds between two places that an account takes from others
PAUSE = 2.0  # seconds without a round, longer than between two, after which a session makes room for those that wait
Key = tuple[str, bytes]  # (user, session)


def _cost(law: Law | None) -> tuple[int, int, int]:
    """The last fields of WELCOME: microseconds of a step, nanoseconds of a row beyond the knee, the knee; zeros as long as nothing is known."""
    return (max(1, min(int(law.base * 1e6), 2**32 - 1)), min(int(law.slope * 1e9), 2**32 - 1), law.knee) if law else (0, 0, 0)


class Peer(NamedTuple):
    """One connection: the name that ROUTER gave it, and the public key that it has proven to hold, "" without keys. A user is an account."""

    route: bytes
    user: str = ""


Reply = tuple[Peer, Message]


def _check_base(s: request.Sequence, m: wire.Draft) -> None:
    if m.base > len(s.tokens):
        raise Refused("base", f"the text has {len(s.tokens)} tokens here, round {m.round} builds on {m.base}")


@dataclass(slots=True, eq=False)
class Remote:
    """A session of one edge."""

    peer: Peer  # the connection that drives it
    usage: Usage
    opened: wire.Open
    heard: float  # when it last said something
    moved: float  # when it was opened, or last had a round or a verdict
    tokens: list[int]  # what has come of its known tokens
    round: int  # the last one that was taken
    sequence: request.Sequence | None = None  # in the engine, once all have
    flying: bool = False  # that round awaits its verdict
    taken: float = 0.0  # when it came
    last: wire.Verdict | None = None  # its answer, or that of the round before where the server has begun this one by itself
    ahead: bool = False  # its edge says what grows
    missing: int = 0  # a round that has begun without the DRAFT that was asked for, and without a word, as long as that may come
    base: int = 0  # length of the text when the present one began
    mirror: Mirror | None = None  # of what the edge says to grow since the last whole tree
    unasked: bool = False  # the server has begun this round by itself

    @property
    def kv_tokens(self) -> int:
        return self.opened.prompt_len + self.opened.max_tokens


@dataclass(slots=True)
class Sessions:
    """The table of sessions over one engine. `lease` seconds of silence let a session lapse."""

    engine: Engine
    model: bytes = b""
    max_sessions: int = 256
    lease: float = 30.0
    quota: Callable[[str], Quota] = lambda _user: Quota()
    _ends: float | None = None  # when the server does
    _peers: dict[Peer, float] = field(default_factory=dict)  # who has said HELLO, and when it was last heard
    _table: dict[Key, Remote] = field(default_factory=dict)
    _owner: dict[request.Sequence, Remote] = field(default_factory=dict)
    _lapsed: OrderedDict[Key, float] = field(default_factory=OrderedDict)  # when they did, the latest last
    _usage: dict[str, Usage] = field(default_factory=dict)  # of every account that was ever here: as many as there are keys
    _told: list[Reply] = field(default_factory=list)  # what others must hear of a message

    @property
    def _max_nodes(self) -> int:
        return min(MAX_NODES, self.engine.runner.sizes.max_rows - 1)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def draining(self) -> bool:
        return self._ends is not None

    def handle(self, peer: Peer, message: Message, now: float) -> list[Reply]:
        """Take one message of `peer`; `now` in seconds of any steady clock. The answers may be for others, too."""
        told = self._told = []
        return [*((peer, m) for m in self._answers(peer, message, now)), *told]

    def _answers(self, peer: Peer, message: Message, now: float) -> list[Message]:
        session, number = getattr(message, "session", wire.NO_SESSION), 0 if isinstance(message, wire.Open) else getattr(message, "round", 0)
        try:
            return self._dispatch(peer, message, now)
        except Refused as e:
            if e.code not in SURVIVABLE:
                self._drop_own(peer, session)
            return [Error(session, e.code, e.text[:300], number)]
        except Full as e:
            return [wire.Busy(session, e.retry_ms, e.text[:300], number)]
        except Exception:
            log.exception("a %s failed", type(message).__name__)
            self._drop_own(peer, session)
            return [Error(session, "internal", "the server failed on this session and dropped it: open it again")]

    def verdicts(self, found: list[request.Verdict], now: float, spent: float) -> list[Reply]:
        """Messages for what a step of `spent` seconds found."""
        owned = [(r, v) for v in found if (r := self._owner.get(v.sequence))]
        begun = go_on(self.engine, [(v, None if r.usage.must_ask else r.mirror) for r, v in owned], now)
        return [(r.peer, self._verdict(r, v, now, spent, on)) for (r, v), on in zip(owned, begun, strict=True)]

    def settle(self, now: float) -> None:
        """Charge every account for what it used, before the next step."""
        for usage in self._usage.values():
            usage.settle(now)

    def drain(self, now: float, seconds: float) -> list[Reply]:
        """Take no new sessions from now on, and tell every edge how long the others have."""
        self._ends = now + seconds
        return [(peer, self._goaway(now)) for peer in self._peers]

    def end(self, code: str, text: str) -> list[Reply]:
        """Drop every session, telling its edge why."""
        lost = list(self._table.items())
        for key, _ in lost:
            self._drop(key)
        return [(r.peer, Error(key[1], code, text)) for key, r in lost]

    def expire(self, now: float) -> None:
        """Let lapse what has been silent for longer than its lease, forget peers that have nothing open, and take the pages of whoever pauses while
        others wait for some, the longest pause first; a lease that is renewed is no round. Whoever awaits a verdict need not speak of that session,
        but its connection must have said something: a batch round may wait for as long as interactive ones fill every step."""
        for key in [k for k, r in self._table.items() if now - max(r.heard, self._peers.get(r.peer, 0.0) if r.flying else 0.0) > self.lease]:
            self._lapse(key, now)
        for peer in [p for p in self._idle() if now - self._peers[p] > self.lease]:
            self.forget(peer, now)
        pausing = sorted((r for r in self._table.values() if now - r.moved > PAUSE), key=lambda r: r.moved)
        while pausing and self.engine.starved:
            if (s := pausing.pop(0).sequence) is not None:
                self.engine.park(s)
        while self._lapsed and now - next(iter(self._lapsed.values())) > MEMORY:
            self._lapsed.popitem(last=False)

    def revoke(self, users: Set[str], now: float) -> list[Reply]:
        """End every session of keys that are authorised no more, and forget their connections, telling both why. What the others may use is read
        anew, for the list of keys has changed."""
        for user, usage in self._usage.items():
            usage.quota = self.quota(user)
        text = "this key is not authorised any more, it was revoked or has expired: ask the operator of the server"
        told: list[Reply] = []
        for key in [k for k in self._table if k[0] in users]:
            told.append((self._table[key].peer, Error(key[1], "key", text)))
            self._drop(key)
        for peer in [p for p in self._peers if p.user in users]:
            told.append((peer, Error(wire.NO_SESSION, "key", text)))
            self.forget(peer, now)
        return told

    def forget(self, peer: Peer, now: float) -> None:
        """Let lapse all sessions of a peer that is gone."""
        if self._peers.pop(peer, None) is not None:
            self._usage[peer.user].connections -= 1
        for key in [k for k, r in self._table.items() if r.peer == peer]:
            self._lapse(key, now)

    # ------------------------------------------------------------------------------------------------------------------

    def _dispatch(self, peer: Peer, message: Message, now: float) -> list[Message]:
        if isinstance(message, wire.Hello):
            return self._hello(peer, message, now)
        if peer not in self._peers:
            raise Refused("hello", "the first message of a connection must be HELLO")
        self._peers[peer] = now
        if isinstance(message, wire.Open):
            return self._open(peer, message, now)
        if not isinstance(message, wire.Prompt | wire.Draft | wire.Grown | wire.Cancel | wire.Close | wire.Lease | wire.Resume):
            raise Refused("frame", f"{type(message).__name__} is not for a server")
        key = (peer.user, message.session)
        if isinstance(message, wire.Cancel | wire.Close):
            self._drop(key)
            return []
        remote = self._table.get(key)
        if isinstance(message, wire.Resume):
            return [self._resume(peer, key, remote, now)]
        if remote is None or remote.peer != peer:
            if isinstance(message, wire.Lease | wire.Grown):
                return []
            raise Refused("session", "this connection has no such session open: resume it, or open it with its tokens")
        remote.heard = now
        if isinstance(message, wire.Lease):
            return []
        if isinstance(message, wire.Grown):
            return self._grown(remote, message, now)
        return self._prompt(remote, message) if isinstance(message, wire.Prompt) else self._draft(remote, message, now)

    def _idle(self) -> list[Peer]:
        """Connections that have nothing open."""
        busy = {r.peer for r in self._table.values()}
        return [p for p in self._peers if p not in busy]

    def _hello(self, peer: Peer, m: wire.Hello, now: float) -> list[Message]:
        e, pool = self.engine, self.engine.pool
        tokenizer = e.tokenizer.digest() if e.tokenizer else b""
        if m.tokenizer and tokenizer and m.tokenizer != tokenizer:
            raise Refused("tokenizer", "the draft's tokenizer is not the target's: use a draft with the same vocabulary, or none")
        quota = self.quota(peer.user)
        usage = self._usage.setdefault(peer.user, Usage(quota, request.Account(peer.user.encode())))
        usage.quota = quota  # which may be another one by now
        if peer not in self._peers:
            if usage.connections >= quota.connections > 0 and (idle := [p for p in self._idle() if p.user == peer.user]):
                self.forget(min(idle, key=self._peers.__getitem__), now)  # it may have ended long ago; if not, it says HELLO again
            usage.connect()
        self._peers[peer] = now
        limits = wire.Limits(self._max_nodes, e.runner.context, min(self.max_sessions, quota.sessions or self.max_sessions))
        load = wire.Load(len(self._table), pool.available * pool.page_size, pool.total * pool.page_size)
        build, lease = f"specedge {__version__}", int(self.lease * 1000)
        welcome = wire.Welcome(build, self.model, tokenizer, e.vocab, list(e.eos_ids), limits, lease, load, *_cost(e.cost.law))
        return [welcome, self._goaway(now)] if self.draining else [welcome]

    def _open(self, peer: Peer, m: wire.Open, now: float) -> list[Message]:
        key, usage = (peer.user, m.session), self._usage[peer.user]
        old = self._table.get(key)
        if old is not None and old.peer == peer and old.opened == m:  # came twice
            old.heard = now
            return [wire.Opened(m.session, m.length)] if old.sequence is not None else []
        if self.draining:
            raise Refused("draining", "this server is shutting down: connect to another one")
        if not 0 < m.prompt_len <= m.length < m.prompt_len + m.max_tokens:
            raise Refused("length", f"{m.length} known tokens, {m.prompt_len} of them the prompt, do not go with max_tokens {m.max_tokens}")
        if m.prompt_len + m.max_tokens > self.engine.runner.context:
            asked = f"{m.prompt_len} prompt tokens and max_tokens {m.max_tokens}"
            raise Refused("length", f"{asked} exceed this server's context of {self.engine.runner.context}: shorten one of them")
        remote = Remote(peer, usage, m, now, now, [], m.round)
        self._drop(key)  # an earlier life of it
        self._admit(remote, now)
        self._table[key] = remote
        usage.sessions += 1
        usage.kv_tokens += remote.kv_tokens
        return self._known(remote, checks.ids(m.tokens, self.engine.vocab))

    def _admit(self, r: Remote, now: float) -> None:
        """Raise unless there is a place for one more session, by what it may need at most."""
        if r.kv_tokens > (most := r.usage.quota.kv_tokens) > 0:
            raise Refused("quota", f"prompt and max_tokens make {r.kv_tokens} tokens, this account may hold {most}: shorten one of them")
        r.usage.check_session(r.kv_tokens)
        if len(self._table) >= self.max_sessions and not self._yield_place(r, now):
            raise Full(f"all {self.max_sessions} sessions of this server are taken", RETRY_FULL)

    def _yield_place(self, r: Remote, now: float) -> bool:
        """Where every place is taken, the account that has most of them gives one up, if it has more than whoever asks would have: that of the
        session which has not moved for longest, one that awaits its verdict last. Its edge is told, opens it again, and waits for a place if need
        be. Else one key could keep all others out; and so it could by taking places only to leave them, but for a place a second at most."""
        most = max(self._usage.values(), key=lambda u: u.sessions)
        if most.sessions <= r.usage.sessions + 1 or now - r.usage.took < TAKES:
            return False
        checks.ids(r.opened.tokens, self.engine.vocab)  # nobody loses a place to what will be refused
        r.usage.took = now
        key = min((r.flying, r.moved, k) for k, r in self._table.items() if r.usage is most)[2]
        self._told.append((self._table[key].peer, Error(key[1], "session", "another account needed the place of this session: open it again")))
        self._lapse(key, now)
        return True

    def _prompt(self, r: Remote, m: wire.Prompt) -> list[Message]:
        ids = checks.ids(m.tokens, self.engine.vocab)
        if r.opened.length >= m.offset + len(ids) and ids == r.tokens[m.offset : m.offset + len(ids)]:
            return []  # came twice
        if m.offset != len(r.tokens):
            raise Refused("offset", f"PROMPT starts at {m.offset}, but {len(r.tokens)} of {r.opened.length} tokens are here")
        return self._known(r, ids)

    def _known(self, r: Remote, ids: list[int]) -> list[Message]:
        """Take more known tokens; open the sequence when the last has come."""
        if len(r.tokens) + len(ids) > r.opened.length:
            raise Refused("offset", f"more than the {r.opened.length} tokens that OPEN announced")
        r.tokens += ids
        if len(r.tokens) < r.opened.length:
            return []
        o = r.opened
        try:
            params = unpack_sampling(o.sampling, o.max_tokens)
            r.sequence = self.engine.open(r.tokens, params, o.prompt_len, frozenset(o.stop_ids), r.usage.payer, PRIORITIES[o.batch])
        except RequestError as e:
            raise Refused("length", str(e)) from None
        except ValueError as e:
            raise Refused("sampling", str(e)) from None
        self._owner[r.sequence] = r
        return [wire.Opened(o.session, o.length)]

    def _resume(self, peer: Peer, key: Key, r: Remote | None, now: float) -> Message:
        """Hand a session over to the connection that asks for it, or say what has become of it."""
        if r is None or r.sequence is None:
            return wire.NeedPrefill(key[1]) if r is not None or key in self._lapsed else wire.Gone(key[1])
        r.peer, r.heard = peer, now
        return wire.Resumed(key[1], len(r.sequence.tokens), r.round)

    def _draft(self, r: Remote, m: wire.Draft, now: float) -> list[Message]:
        s = r.sequence
        if s is None:
            raise Refused("offset", f"{len(r.tokens)} of {r.opened.length} tokens are here: send the rest before a round")
        # an edge may not know how far the server has gone by itself; every round has brought a token, so one that has them all begins another
        behind = r.ahead and 0 < m.round <= r.round
        new = m.round == r.round + 1 or (behind and not r.flying and not s.finish and m.base == len(s.tokens))
        if m.round == r.missing > 0 or (0 < m.round < r.missing and m.base == r.base):  # less where verdicts were lost: then its number holds
            if not m.ahead:
                return self._left(r, m)
            if r.flying and m.base == r.base:
                return self._overtaken(r, m, now)
        if not new and (behind or m.round == r.round > 0):
            return self._repeat(r, m)
        if r.flying or not new:
            raise Refused("round", f"round {m.round} came, but round {r.round} {'awaits its verdict' if r.flying else 'was the last'}")
        _check_base(s, m)
        tree = checks.tree(m, self.engine.vocab)
        r.usage.check_round()
        r.round, r.base, r.missing, r.taken, r.ahead, r.mirror, r.unasked = m.round, m.base, 0, now, m.ahead > 0, None, False
        if not s.finish:
            self.engine.run_until(s, min(m.run_until, s.limit))
        if m.base < len(s.tokens) or s.finish:
            return [self._catch_up(r, m.round, m.base)]
        self.engine.offer(s, tree, now)
        r.mirror = Mirror(tree, m.round, m.ahead) if m.ahead and not s.alone else None
        r.moved = now  # not before: what asks for no row moves nothing
        self._fly(r, True)
        return []

    def _overtaken(self, r: Remote, m: wire.Draft, now: float) -> list[Message]:
        """Take the tree that was asked for, of a round that has begun without it. It is verified in place of the other, if that is not yet, and its
        rows number the nodes from here on."""
        assert r.sequence is not None
        tree = checks.tree(m, self.engine.vocab)
        r.round, r.missing, r.unasked, r.mirror = m.round, 0, False, Mirror(tree, m.round, m.ahead)
        if r.sequence.tree is not None:
            self.engine.offer(r.sequence, tree, now)
        return []

    def _left(self, r: Remote, m: wire.Draft) -> list[Message]:
        """An edge goes on without drafts, which does not know how far the server has gone by itself: from here on all is the answer to this round."""
        assert r.sequence is not None
        s = r.sequence
        _check_base(s, m)
        r.round, r.missing, r.ahead, r.mirror, r.unasked = m.round, 0, False, None, False
        if not s.finish:
            self.engine.run_until(s, min(m.run_until, s.limit))
        if m.base == len(s.tokens):
            return []
        s.tree = None  # of a round that the edge does not know of
        self._fly(r, False)
        return [self._catch_up(r, m.round, m.base)]

    def _grown(self, r: Remote, m: wire.Grown, now: float) -> list[Message]:
        """Take what has grown at the edge, if the server may go on with it; and go on, if that was all that was missing."""
        if r.mirror is None or r.sequence is None:
            return []
        try:
            r.mirror.add(m.since, m.first, *checks.nodes(m, self.engine.vocab))
        except TreeError as e:
            raise Refused("tree", str(e)) from None
        if not r.flying and not r.usage.must_ask and catch_up(self.engine, r.sequence, r.mirror, now):
            self._begun(r, now)
            r.missing = r.round
        return []

    def _begun(self, r: Remote, now: float) -> None:
        """The server has begun a round by itself."""
        assert r.mirror is not None and r.sequence is not None
        r.round, r.base, r.taken, r.unasked = r.mirror.round, len(r.sequence.tokens), now, True
        self._fly(r, True)

    def _repeat(self, r: Remote, m: wire.Draft) -> list[Message]:
        """The answer to a round that was answered before: the same one, or all that is known by now; nothing, if that is nothing new."""
        assert r.sequence is not None
        if r.flying and r.sequence.tree is None:
            return []  # it has been verified, and its verdict goes out in a moment
        _check_base(r.sequence, m)
        if r.last is not None and r.last.base == m.base and r.last.round == m.round:
            return [r.last]
        return [self._catch_up(r, m.round, m.base)]

    def _catch_up(self, r: Remote, number: int, base: int) -> wire.Verdict:
        """The answer to round `number`: all tokens from `base` on, for an edge that is behind; as many as one frame holds."""
        assert r.sequence is not None
        tokens = r.sequence.tokens[base : base + wire.CHUNK]
        finish = r.sequence.finish if base + len(tokens) == len(r.sequence.tokens) else ""
        return wire.Verdict(
            r.opened.session, number, base, wire.pack_ids(tokens), 0, wire.FINISH.index(finish), self._budget(r), 0, 0, 0, *self._next(r)
        )  # fmt: skip

    @staticmethod
    def _next(r: Remote) -> tuple[int, int, int]:
        """The last fields of a VERDICT, after which its edge knows: the round that the server has begun by itself, since when nodes are numbered as
        now, and the nodes of its tree."""
        tree = r.sequence.tree if r.sequence is not None and r.unasked and r.flying else None
        if r.mirror is None or tree is None:
            return (0, 0, 0)
        if r.missing == r.round:
            r.missing, r.mirror.late = 0, False
        return (r.round, r.mirror.since, len(tree))

    def _verdict(self, r: Remote, v: request.Verdict, now: float, spent: float, on: bool) -> wire.Verdict:
        """`on`: whether the next round has begun."""
        r.heard = r.moved = now  # whoever is being served is not silent
        number, asked = r.round, r.flying
        queue = max(0.0, now - r.taken - spent) if asked else 0.0
        self._fly(r, False)
        if on:
            self._begun(r, now)
        elif v.finish or r.usage.must_ask:
            r.mirror = None
        message = wire.Verdict(
            r.opened.session, number, v.base, wire.pack_ids(list(v.tokens)), min(v.verified, 2**16 - 1),
            wire.FINISH.index(v.finish), self._budget(r), min(int(queue * 1e6), 2**32 - 1), min(int(spent * 1e6), 2**32 - 1),
            min(self.engine.rows, 2**16 - 1), *self._next(r),
        )  # fmt: skip
        if asked:
            r.last = replace(message, verified=0, rows=0)  # when it comes again nothing will have been run for it
        return message

    def _budget(self, r: Remote) -> int:
        """Nodes worth offering next time, by what the engine has learned."""
        assert r.sequence is not None
        return min(self._max_nodes, r.sequence.acceptance.budget)

    def _goaway(self, now: float) -> Message:
        assert self._ends is not None
        return wire.GoAway(max(0, int((self._ends - now) * 1000)))

    def _fly(self, r: Remote, flying: bool) -> None:
        r.usage.in_flight += flying - r.flying
        r.flying = flying

    def _lapse(self, key: Key, now: float) -> None:
        """Drop a session whose edge is silent, and remember that there was one. Its full pages stay in the prefix cache, as all do."""
        self._drop(key)
        self._lapsed[key] = now
        if len(self._lapsed) > REMEMBERED:
            self._lapsed.popitem(last=False)

    def _drop_own(self, peer: Peer, session: bytes) -> None:
        """Drop a session if this connection drives it."""
        key = (peer.user, session)
        if key in self._table and self._table[key].peer == peer:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self._lapsed.pop(key, None)
        r = self._table.pop(key, None)
        if r is None:
            return
        self._fly(r, False)
        r.usage.sessions -= 1
        r.usage.kv_tokens -= r.kv_tokens
        if r.sequence is not None:
            self._owner.pop(r.sequence, None)
            self.engine.cancel(r.sequence)
