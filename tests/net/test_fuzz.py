"""F1: frames that nobody should send, by the million, to a decoder with the table of sessions behind it and through a server's socket.

Nothing but answers comes of them: no exception, no memory, no page; and the honest session in the same table, or edge on the same server, gets the
ids of the target. FUZZ_FRAMES sets the number for the long form.
"""

import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zmq

from specedge.config import SamplingParams
from specedge.net import wire
from specedge.net.sessions import Peer, Sessions
from specedge.net.wire import Cancel, Close, Draft, Error, Grown, Hello, Lease, Open, Prompt, Resume, Verdict, encode
from specedge.tree import TokenTree
from tests.helpers import check_empty, engine, random_tree
from tests.net.test_server import CONTEXT, GREEDY, PROMPT, Raw, honest_edge, serving
from tests.net.test_wire import mutated, noise, structured

LONG = pytest.param(int(os.environ.get("FUZZ_FRAMES", "2000000")), marks=[pytest.mark.full, pytest.mark.timeout(1800)])
SESSIONS = [bytes([i]) * 16 for i in range(6)]
VOCAB = 105


def valid(rng: random.Random) -> bytes:
    """A right frame with sense in it, though hardly at the right moment."""
    session = rng.choice(SESSIONS)
    n = rng.choice([1, 3, 40, 200])
    ids = wire.pack_ids([rng.randrange(VOCAB + (rng.random() < 0.02)) for _ in range(n)])
    tree = random_tree(np.random.default_rng(rng.randrange(50)), rng.choice([0, 1, 9, 30]), 0.5, [1, 2, 3], VOCAB)
    base, number = rng.choice([n, n, n + 1, rng.randrange(2**32)]), rng.choice([1, 2, rng.randrange(2**32)])
    sampling = wire.Sampling(rng.random(), rng.randrange(2**64))
    parents = b"".join(rng.randrange(rng.choice([1, len(tree) + 1, 2**16])).to_bytes(2, "little") for _ in range(min(n, wire.GROWN)))
    messages: list[wire.Message] = [
        Open(session, ids, n, rng.choice([n, n, n, 1, n + 1]), sampling, [3], rng.choice([1, 9, 400])),
        Prompt(session, rng.choice([0, n, rng.randrange(2**32)]), ids),
        Draft(session, number, base, wire.pack_ids(tree.tokens), tree.parents.tobytes(), rng.choice([0, 0, 60]), rng.choice([0, 0, 9, 255])),
        Grown(session, number, rng.choice([1, len(tree) + 1, 2**16 - 1]), ids[: 4 * min(n, wire.GROWN)], parents, bytes(min(n, wire.GROWN))),
        Cancel(session), Close(session), Lease(session), Resume(session), Hello("fuzz", b""),
    ]  # fmt: skip
    return encode(rng.choice(messages))


MAKERS: list[Callable[[random.Random], bytes]] = [structured, mutated, noise, valid]


def megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


@pytest.mark.parametrize("frames", [15_000, LONG])
def test_frames_of_all_kinds_in_front_of_the_sessions(model: Path, frames: int) -> None:
    """What a decoder takes is handled, and the engine steps now and then; one honest text after the other goes on in between."""
    target, rng, seen = engine(model, page_size=16, max_rows=64), random.Random(frames), Counter[str]()
    params = SamplingParams(0.0, 40, seed=0)
    want = engine(model).generate([PROMPT], params)[0].token_ids
    sessions, honest, stranger = Sessions(target, lease=1.0), Peer(b"honest", "ann"), Peer(b"stranger", "eve")
    now, text, least = 0.0, list[int](), 0.0
    sessions.handle(honest, Hello("honest", b""), now)
    begun = time.monotonic()
    for i in range(frames):
        now += 1e-4
        frame = rng.choice(MAKERS)(rng)
        try:
            message = wire.decode(frame)
        except wire.WireError:
            seen["refused"] += 1
        else:
            for peer, answer in sessions.handle(stranger, message, now):
                encode(answer)
                assert peer == stranger and (not isinstance(answer, Error) or answer.code != "internal"), (message, answer)
                seen[answer.code if isinstance(answer, Error) else type(answer).__name__] += 1
        if i % 50 == 0:
            if not text:
                sessions.handle(honest, Open(bytes(15) + b"h", wire.pack_ids(PROMPT), 6, 6, GREEDY, [], 40), now)
                sessions.handle(honest, Draft(bytes(15) + b"h", 1, 6, b"", b"", CONTEXT), now)
            for peer, m in sessions.verdicts(target.step(), now, 0.0):
                encode(m)
                if peer == honest:
                    assert isinstance(m, Verdict)
                    text += wire.unpack_ids(m.tokens).tolist()
                    if m.finish:
                        assert text == want
                        seen["honest texts"] += 1
                        text = []
                        sessions.handle(honest, Close(bytes(15) + b"h"), now)
            sessions.expire(now)
        if i == frames // 3:
            least = megabytes()
    print(dict(seen), f"{frames} frames in {time.monotonic() - begun:.0f} s, memory grew by {megabytes() - least:.1f} MB in the last two thirds")
    assert megabytes() - least < 8
    assert seen["refused"] > frames / 3 and seen["honest texts"] >= frames // 10_000 and seen["Verdict"] and seen["Opened"]
    assert all(seen[code] for code in ("session", "round", "base", "length", "token", "offset"))
    for peer in (honest, stranger):
        sessions.forget(peer, now)
    assert len(sessions) == 0
    check_empty(target)


@pytest.mark.parametrize("frames", [1_500, pytest.param(100_000, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
def test_frames_of_all_kinds_through_a_socket(model: Path, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an honest edge on the same server all the while, and a third of the messages in several frames."""
    monkeypatch.setattr("specedge.net.doorman.SAVED", 1e9)  # all of them are to be heard
    target, oracle, rng, least, answered = engine(model), engine(model), random.Random(7), 0.0, 0
    with serving(target) as server, honest_edge(server, oracle), Raw(server, SNDHWM=0, RCVHWM=0) as raw:
        for i in range(frames):
            parts = [rng.choice(MAKERS)(rng) for _ in range(rng.choice([1, 1, 2]))]
            raw.send(*parts)
            while raw.socket.poll(0 if i % 100 else 20):
                raw.socket.recv_multipart(zmq.NOBLOCK)
                answered += 1
            if i == frames // 3:
                least = megabytes()
        grown = megabytes() - least
        while raw.socket.poll(500):  # what was sent is being answered
            raw.socket.recv_multipart()
        raw.send(Hello("the end", b""))
        for _, session in list(server._sessions._table):
            raw.send(Cancel(session))
    print(f"{frames} messages, {answered} answers, memory grew by {grown:.1f} MB in the last two thirds")
    assert answered > frames / 3 and grown < 16


def test_the_fuzz_makes_trees() -> None:
    rng = random.Random(1)
    trees = [m for m in (wire.decode(valid(rng)) for _ in range(300)) if isinstance(m, Draft)]
    assert any(len(t.parents) > 3 for t in trees) and all(isinstance(wire.unpack_tree(t), TokenTree) for t in trees)
