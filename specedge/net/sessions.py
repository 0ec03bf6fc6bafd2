"""Sessions: what the server knows of every edge's texts, and the rules of the protocol.

Decoded messages go in, engine calls and answers come out; there is no socket, thread or clock of its own in here, so every rule is tested with plain
calls. One thread, the engine's, uses it. Invariants: nothing unchecked reaches the engine; a round is answered once with one meaning, however
often it is sent; an error ends the session that it names and touches no other. docs/protocol.md is the specification.
"""

import logging
from collections.abc import Set
from dataclasses import dataclass, field
from typing import NamedTuple

from specedge import __version__
from specedge.engine import request
from specedge.engine.engine import Engine
from specedge.engine.texts import RequestError
from specedge.net import wire
from specedge.net.sampling import unpack_sampling
from specedge.net.wire import Error, Message
from specedge.tree import MAX_NODES, TreeError

log = logging.getLogger(__name__)
SURVIVABLE = ("round", "base")  # errors that leave their session as it was


class Peer(NamedTuple):
    """One connection: the name that ROUTER gave it, and the public key that it has proven to hold, "" without keys."""

    route: bytes
    user: str = ""


Reply = tuple[Peer, Message]


class Refused(Exception):
    """A message that breaks a rule: the code and the sentence to answer it with."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


@dataclass(slots=True, eq=False)
class Remote:
    """A session of one edge."""

    peer: Peer
    opened: wire.Open
    heard: float  # when it last said something
    tokens: list[int]  # what has come of its known tokens
    sequence: request.Sequence | None = None  # in the engine, once all have
    round: int = 0  # the last one that was taken
    flying: bool = False  # that round awaits its verdict
    taken: float = 0.0  # when it came
    last: wire.Verdict | None = None  # its answer


@dataclass(slots=True)
class Sessions:
    """The table of sessions over one engine. `lease` seconds of silence close a session."""

    engine: Engine
    model: bytes = b""
    max_sessions: int = 256
    lease: float = 600.0
    draining: bool = False
    _peers: dict[Peer, float] = field(default_factory=dict)  # who has said HELLO, and when it was last heard
    _table: dict[tuple[Peer, bytes], Remote] = field(default_factory=dict)
    _owner: dict[request.Sequence, Remote] = field(default_factory=dict)

    @property
    def _max_nodes(self) -> int:
        return min(MAX_NODES, self.engine.runner.sizes.max_rows - 1)

    def __len__(self) -> int:
        return len(self._table)

    def handle(self, peer: Peer, message: Message, now: float) -> list[Reply]:
        """Take one message of `peer`; `now` in seconds of any steady clock."""
        session = getattr(message, "session", wire.NO_SESSION)
        try:
            return [(peer, m) for m in self._dispatch(peer, message, now)]
        except Refused as e:
            if e.code not in SURVIVABLE:
                self._drop((peer, session))
            return [(peer, Error(session, e.code, e.text[:300], getattr(message, "round", 0)))]
        except Exception:
            log.exception("a %s failed", type(message).__name__)
            self._drop((peer, session))
            return [(peer, Error(session, "internal", "the server failed on this session and dropped it: open it again"))]

    def verdicts(self, found: list[request.Verdict], now: float, spent: float) -> list[Reply]:
        """Messages for what a step of `spent` seconds found."""
        return [(r.peer, self._verdict(r, v, now, spent)) for v in found if (r := self._owner.get(v.sequence))]

    def end(self, code: str, text: str) -> list[Reply]:
        """Drop every session, telling its edge why."""
        lost = list(self._table.items())
        for key, _ in lost:
            self._drop(key)
        return [(r.peer, Error(key[1], code, text)) for key, r in lost]

    def expire(self, now: float) -> None:
        """Close what has been silent for longer than its lease, and forget peers that have nothing open."""
        for key in [k for k, r in self._table.items() if now - r.heard > self.lease and not r.flying]:
            self._drop(key)
        busy = {peer for peer, _ in self._table}
        self._peers = {p: heard for p, heard in self._peers.items() if p in busy or now - heard <= self.lease}

    def revoke(self, users: Set[str]) -> list[Reply]:
        """End every session of keys that are authorised no more, and forget their connections, telling both why."""
        text = "this key is not authorised any more, it was revoked or has expired: ask the operator of the server"
        told: list[Reply] = [(peer, Error(session, "key", text)) for peer, session in self._table if peer.user in users]
        for peer in [p for p in self._peers if p.user in users]:
            told.append((peer, Error(wire.NO_SESSION, "key", text)))
            self.forget(peer)
        return told

    def forget(self, peer: Peer) -> None:
        """Close all sessions of a peer that is gone."""
        self._peers.pop(peer, None)
        for key in [k for k in self._table if k[0] == peer]:
            self._drop(key)

    # ------------------------------------------------------------------------------------------------------------------

    def _dispatch(self, peer: Peer, message: Message, now: float) -> list[Message]:
        if isinstance(message, wire.Hello):
            return [self._hello(peer, message, now)]
        if peer not in self._peers:
            raise Refused("hello", "the first message of a connection must be HELLO")
        self._peers[peer] = now
        if isinstance(message, wire.Open):
            return self._open(peer, message, now)
        if not isinstance(message, wire.Prompt | wire.Draft | wire.Cancel | wire.Close):
            raise Refused("frame", f"{type(message).__name__} is not for a server")
        key = (peer, message.session)
        if isinstance(message, wire.Cancel | wire.Close):
            self._drop(key)
            return []
        remote = self._table.get(key)
        if remote is None:
            raise Refused("session", "this session is not open here: open it with its tokens")
        remote.heard = now
        return self._prompt(remote, message) if isinstance(message, wire.Prompt) else self._draft(remote, message, now)

    def _hello(self, peer: Peer, m: wire.Hello, now: float) -> Message:
        tokenizer = self.engine.tokenizer.digest() if self.engine.tokenizer else b""
        if m.tokenizer and tokenizer and m.tokenizer != tokenizer:
            raise Refused("tokenizer", "the draft's tokenizer is not the target's: use a draft with the same vocabulary, or none")
        self._peers[peer] = now
        limits = wire.Limits(self._max_nodes, self.engine.runner.context, self.max_sessions)
        build, pool, e = f"specedge {__version__}", self.engine.pool, self.engine
        load = wire.Load(len(self._table), pool.available * pool.page_size, pool.total * pool.page_size)
        return wire.Welcome(build, self.model, tokenizer, e.vocab, list(e.eos_ids), limits, int(self.lease * 1000), load)

    def _open(self, peer: Peer, m: wire.Open, now: float) -> list[Message]:
        if self.draining:
            raise Refused("draining", "this server is shutting down: connect to another one")
        key = (peer, m.session)
        if key in self._table:
            raise Refused("session", "a session of this name is open already")
        if len(self._table) >= self.max_sessions:
            raise Refused("full", f"all {self.max_sessions} sessions of this server are taken: try again later")
        if not 0 < m.prompt_len <= m.length < m.prompt_len + m.max_tokens:
            raise Refused("length", f"{m.length} known tokens, {m.prompt_len} of them the prompt, do not go with max_tokens {m.max_tokens}")
        if m.prompt_len + m.max_tokens > self.engine.runner.context:
            asked = f"{m.prompt_len} prompt tokens and max_tokens {m.max_tokens}"
            raise Refused("length", f"{asked} exceed this server's context of {self.engine.runner.context}: shorten one of them")
        remote = self._table[key] = Remote(peer, m, now, [])
        return self._known(remote, m.tokens)

    def _prompt(self, r: Remote, m: wire.Prompt) -> list[Message]:
        if r.sequence is not None or m.offset != len(r.tokens):
            raise Refused("offset", f"PROMPT starts at {m.offset}, but {len(r.tokens)} of {r.opened.length} tokens are here")
        return self._known(r, m.tokens)

    def _known(self, r: Remote, data: bytes) -> list[Message]:
        """Take more known tokens; open the sequence when the last has come."""
        ids = self._ids(data)
        if len(r.tokens) + len(ids) > r.opened.length:
            raise Refused("offset", f"more than the {r.opened.length} tokens that OPEN announced")
        r.tokens += ids
        if len(r.tokens) < r.opened.length:
            return []
        o = r.opened
        try:
            params = unpack_sampling(o.sampling, o.max_tokens)
            account = request.Account(r.peer.user.encode() or r.peer.route)  # what one key has computed serves its other connections too
            r.sequence = self.engine.open(r.tokens, params, o.prompt_len, frozenset(o.stop_ids), account)
        except RequestError as e:
            raise Refused("length", str(e)) from None
        except ValueError as e:
            raise Refused("sampling", str(e)) from None
        self._owner[r.sequence] = r
        return [wire.Opened(o.session, o.length)]

    def _draft(self, r: Remote, m: wire.Draft, now: float) -> list[Message]:
        s = r.sequence
        if s is None:
            raise Refused("offset", f"{len(r.tokens)} of {r.opened.length} tokens are here: send the rest before a round")
        if m.round == r.round and r.round:
            return self._repeat(r, m)
        if r.flying or m.round != r.round + 1:
            raise Refused("round", f"round {m.round} came, but round {r.round} {'awaits its verdict' if r.flying else 'was the last'}")
        if m.base > len(s.tokens):
            raise Refused("base", f"the text has {len(s.tokens)} tokens here, round {m.round} builds on {m.base}")
        try:
            tree = wire.unpack_tree(m)
            tree.check(self.engine.vocab)
        except (TreeError, wire.WireError) as e:
            raise Refused("tree", f"{e}") from None
        r.round, r.taken = m.round, now
        if not s.finish:
            self.engine.run_until(s, min(m.run_until, s.limit))
        if m.base < len(s.tokens) or s.finish:
            return [self._catch_up(r, m.base)]
        self.engine.offer(s, tree)
        r.flying = True
        return []

    def _repeat(self, r: Remote, m: wire.Draft) -> list[Message]:
        """The answer to a round that was answered before: the same one, or all that is known by now; nothing, if that is nothing new."""
        assert r.sequence is not None
        known = len(r.sequence.tokens)
        if m.base > known:
            raise Refused("base", f"the text has {known} tokens here, round {m.round} builds on {m.base}")
        if r.last is not None and r.last.base == m.base and r.last.round == m.round:
            return [r.last]
        return [self._catch_up(r, m.base)]

    def _catch_up(self, r: Remote, base: int) -> wire.Verdict:
        """All tokens from `base` on, for an edge that is behind; as many as one frame holds."""
        assert r.sequence is not None
        tokens = r.sequence.tokens[base : base + wire.CHUNK]
        finish = r.sequence.finish if base + len(tokens) == len(r.sequence.tokens) else ""
        return wire.Verdict(r.opened.session, r.round, base, 0, wire.pack_ids(tokens), 0, wire.FINISH.index(finish), self._max_nodes, 0, 0)

    def _verdict(self, r: Remote, v: request.Verdict, now: float, spent: float) -> wire.Verdict:
        r.heard = now  # whoever is being served is not silent
        queue = max(0.0, now - r.taken - spent) if r.flying else 0.0
        message = wire.Verdict(
            r.opened.session, r.round, v.base, v.row, wire.pack_ids(list(v.tokens)), min(v.verified, 2**16 - 1),
            wire.FINISH.index(v.finish), self._max_nodes, min(int(queue * 1e6), 2**32 - 1), min(int(spent * 1e6), 2**32 - 1),
        )  # fmt: skip
        if r.flying:
            r.last = message
        r.flying = False
        return message

    def _ids(self, data: bytes) -> list[int]:
        try:
            ids = wire.unpack_ids(data)
        except wire.WireError as e:
            raise Refused("frame", str(e)) from None
        if len(ids) and int(ids.max()) >= self.engine.vocab:
            raise Refused("token", f"token {int(ids.max())} is outside the vocabulary of {self.engine.vocab}")
        return [int(i) for i in ids]

    def _drop(self, key: tuple[Peer, bytes]) -> None:
        remote = self._table.pop(key, None)
        if remote is not None and remote.sequence is not None:
            self._owner.pop(remote.sequence, None)
            self.engine.cancel(remote.sequence)
