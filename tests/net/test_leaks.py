"""F5: sessions that are opened, drafted, cancelled, resumed, left and lapse in any order: nothing of them stays.

A plain random walk over one table of sessions and one engine; what an account uses is counted again from the table, pages from their tables.
"""

import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from specedge.net import wire
from specedge.net.quota import Quota
from specedge.net.sessions import Peer, Sessions
from specedge.net.wire import Cancel, Close, Draft, Grown, Hello, Lease, Open, Prompt, Resume
from tests.helpers import check_empty, engine, random_model, random_tree

LONG = pytest.param(1_000_000, marks=[pytest.mark.full, pytest.mark.timeout(1800)])
VOCAB = 12  # so few that guesses come true
USERS = ("ann", "bob", "eve")


def audit(sessions: Sessions) -> None:
    """The books are right."""
    sessions.engine.pool.check()
    for user, usage in sessions._usage.items():
        mine = [r for (u, _), r in sessions._table.items() if u == user]
        assert (usage.sessions, usage.kv_tokens, usage.in_flight) == (len(mine), sum(r.kv_tokens for r in mine), sum(r.flying for r in mine))
        assert usage.connections == sum(p.user == user for p in sessions._peers)
    alive = {r.sequence for r in sessions._table.values() if r.sequence is not None}
    assert set(sessions._owner) == alive and {*sessions.engine.line.running, *sessions.engine.line.waiting} <= alive
    assert len(sessions._lapsed) <= 4096


@pytest.mark.parametrize("operations", [20_000, LONG])
def test_nothing_stays(tmp_path: Path, operations: int) -> None:
    target = engine(random_model(tmp_path, seed=3, num_hidden_layers=1, vocab_size=VOCAB), kv_tokens=768, page_size=16, max_rows=48)
    sessions = Sessions(target, lease=5.0, max_sessions=24, quota=lambda _: Quota(sessions=12, in_flight=8, connections=4))
    rng, trees, seen, now, names = random.Random(operations), np.random.default_rng(1), Counter[str](), 0.0, 0
    peers, ids = list[Peer](), [bytes([i]) * 16 for i in range(1, 31)]
    begun = time.monotonic()
    for done in range(operations):
        now += 0.01
        what = rng.choices(
            ["connect", "open", "draft", "grown", "cancel", "close", "resume", "lease", "vanish", "expire", "revoke", "fail", "step"],
            [3, 12, 30, 30, 5, 3, 4, 2, 3, 3, 0.2, 0.1, 30],
        )[0]
        seen[what] += 1
        if what == "step":
            for v in sessions.verdicts(target.step() if target.busy else [], now, 0.0):
                seen[type(v[1]).__name__] += 1
                seen["ahead"] += isinstance(v[1], wire.Verdict) and v[1].next > 0
        elif what == "expire":
            now += rng.choice([0.1, 3.0, 6.0])
            sessions.expire(now)
        elif what == "revoke":
            sessions.revoke({user := rng.choice(USERS)}, now)
            peers = [p for p in peers if p.user != user]
        elif what == "fail":
            sessions.end("internal", "a step failed")
        elif what == "connect" or not peers:
            names += 1
            peers.append(Peer(names.to_bytes(4, "big"), rng.choice(USERS)))
            sessions.handle(peers[-1], Hello("x", b""), now)
        elif what == "vanish":
            sessions.forget(peers.pop(rng.randrange(len(peers))), now)
        else:
            peers = [p for p in peers if p in sessions._peers or rng.random() < 0.1]  # the others were forgotten
            peer, session = rng.choice(peers or list(sessions._peers) or [Peer(b"nobody", "ann")]), rng.choice(ids)
            if what in ("draft", "grown") and sessions._table and rng.random() < 0.9:
                user, session = rng.choice(list(sessions._table))
                peer = sessions._table[user, session].peer
            r = sessions._table.get((peer.user, session))
            if r is not None and rng.random() < 0.9:
                peer = r.peer
            if what == "open":
                known = [(i * 7 + rng.randrange(2)) % VOCAB for i in range(rng.choice([1, 20, 60, 200]))]
                sent = rng.choice([len(known), len(known), len(known) // 2])
                messages: list[wire.Message] = [
                    Open(session, wire.pack_ids(known[:sent]), len(known), len(known), wire.Sampling(0.8, 1), [3], rng.choice([1, 20, 90])),
                    *([Prompt(session, sent, wire.pack_ids(known[sent:]))] if rng.random() < 0.8 else []),
                ]
            elif what == "draft":
                tree = random_tree(trees, rng.choice([0, 3, 20]), 0.5, [1, 2], VOCAB)
                length = len(r.sequence.tokens) if r is not None and r.sequence is not None else 1
                number = r.round + rng.choice([1, 1, 1, 1, 0, 2]) if r is not None else 1
                base = rng.choice([length] * 6 + [max(0, length - 1), length + 1])
                nodes, until, ahead = wire.pack_ids(tree.tokens), rng.choice([0, 0, length + 9]), rng.choice([0, 9, 31, 31])
                messages = [Draft(session, number, base, nodes, tree.parents.tobytes(), until, ahead)]
            elif what == "grown":
                m, n = r.mirror if r is not None else None, rng.choice([1, 4, 16])
                since, first = (m.since, m.next + rng.choice([0] * 9 + [1])) if m is not None else (1, 1)
                parents = b"".join(rng.randrange(max(0, first - 8), first + i).to_bytes(2, "little") for i in range(n))
                messages = [Grown(session, since, first, wire.pack_ids([rng.randrange(VOCAB) for _ in range(n)]), parents, bytes(n))]
                late = r is not None and not r.flying
            else:
                messages = [{"cancel": Cancel, "close": Close, "resume": Resume, "lease": Lease}[what](session)]
            for m in messages:
                for _, answer in sessions.handle(peer, m, now):
                    seen[type(answer).__name__] += 1
                    assert not isinstance(answer, wire.Error) or answer.code != "internal", answer
            seen["late"] += what == "grown" and late and r is not None and r.flying
        if done % 10 == 0:
            audit(sessions)
        seen["most sessions"] = max(seen["most sessions"], len(sessions))
    print(dict(seen), f"{operations} operations in {time.monotonic() - begun:.0f} s")
    kinds = ("Opened", "Verdict", "Busy", "Error", "Resumed", "NeedPrefill", "Gone", "ahead", "late")
    assert all(seen[kind] for kind in kinds) and seen["most sessions"] > 9
    for peer in peers:
        sessions.forget(peer, now)
    audit(sessions)
    assert len(sessions) == 0 and not sessions._owner and all(u.connections == 0 for u in sessions._usage.values())
    check_empty(target)
