"""Server: two threads and a socket on loopback, around a tiny random target.

Whatever strangers send, whoever vanishes or does not read, and however many edges come at once: every honest edge gets exactly the ids that
Engine.generate gives. Addresses, draining and the end of the threads are here too; the rules of single messages are in test_sessions.py.
"""

import contextlib
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
import zmq

from specedge.config import DraftConfig, SamplingParams
from specedge.engine import request
from specedge.engine.engine import Engine
from specedge.net import wire
from specedge.net.edge import Edge
from specedge.net.server import ListenError, Server, is_private
from specedge.net.sessions import Peer
from specedge.net.wire import (
    Cancel,
    Close,
    Draft,
    Error,
    GoAway,
    Hello,
    Lease,
    Message,
    Open,
    Opened,
    Prompt,
    Verdict,
    Welcome,
    encode,
    pack_ids,
    unpack_ids,
)
from tests.helpers import TINY, check_empty, drafter, engine, random_model

PATIENCE = 60.0  # seconds until a test gives up; nothing here takes more than a few
X, Y = bytes([1]) * 16, bytes([2]) * 16
PROMPT = [7, 3, 9, 50, 100, 2]
VOCAB, CONTEXT = TINY["vocab_size"], TINY["max_position_embeddings"]
GREEDY = wire.Sampling(0.0, 0)
T = TypeVar("T")


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition, not for a time."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE:.0f} s"
        time.sleep(0.005)


def background(call: Callable[..., T], *arguments: object) -> "Future[T]":
    """Call it in a thread that nobody has to wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future


def threads() -> set[threading.Thread]:
    """Those of servers that are alive."""
    return {t for t in threading.enumerate() if t.name in ("specedge-engine", "specedge-network")}


@contextlib.contextmanager
def serving(target: Engine) -> Iterator[Server]:
    """A server over `target`; afterwards its threads are gone and nothing is left in the engine."""
    before = threads()
    with Server(target, model=b"m" * 32) as server:
        yield server
        until(lambda: len(server._sessions) == 0, "the end of all sessions")
    assert threads() == before
    check_empty(target)


@pytest.fixture
def server(model: Path) -> Iterator[Server]:
    with serving(engine(model)) as s:
        yield s


class Raw:
    """A DEALER that sends what it is told; it has said HELLO unless told otherwise."""

    def __init__(self, server: Server, hello: bool = True, **options: int) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(server.endpoint)
        if hello:
            self.send(Hello("raw", b""))
            assert isinstance(self.receive(), Welcome)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def send(self, *parts: bytes | Message) -> None:
        self.socket.send_multipart([encode(p) if isinstance(p, Message) else p for p in parts])

    def receive(self) -> Message:
        assert self.socket.poll(int(PATIENCE * 1000)), "no answer"
        (frame,) = self.socket.recv_multipart()
        return wire.decode(frame)

    def silent(self) -> bool:
        """Whether the server says nothing of its own: what is said after this question is not an answer to something older."""
        self.send(Hello("are you there?", b""))
        return isinstance(self.receive(), Welcome)

    def open(self, session: bytes = X, tokens: list[int] = PROMPT, most: int = 12, sampling: wire.Sampling = GREEDY) -> None:
        self.send(Open(session, pack_ids(tokens), len(tokens), len(tokens), sampling, [], most))
        assert self.receive() == Opened(session, len(tokens))

    def text(self, session: bytes = X, number: int = 1, base: int = len(PROMPT)) -> list[int]:
        """Have a text decoded alone, as a stream, to its end."""
        self.send(Draft(session, number, base, b"", b"", CONTEXT))
        ids: list[int] = []
        while True:
            m = self.receive()
            assert isinstance(m, Verdict) and (m.session, m.round, m.base) == (session, number, base + len(ids))
            ids += unpack_ids(m.tokens).tolist()
            if m.finish:
                return ids


@contextlib.contextmanager
def honest_edge(server: Server, oracle: Engine) -> Iterator[None]:
    """An edge that generates text after text meanwhile, at least one of them from begin to end; all must be right."""
    params = SamplingParams(temperature=0.8, max_tokens=12, seed=11)
    want = oracle.generate([PROMPT], params)[0].token_ids
    got: list[list[int]] = []
    enough = threading.Event()

    def generate() -> None:
        with Edge(server.address) as edge:
            while not enough.is_set():
                got.append(edge.generate([PROMPT], params)[0].token_ids)

    running = background(generate)
    try:
        until(lambda: got or running.done(), "the first text")
        yield
        before = len(got)
        until(lambda: len(got) > before + 1 or running.done(), "a text after all that")
    finally:
        enough.set()
    running.result(PATIENCE)
    assert all(ids == want for ids in got)


# ----------------------------------------------------------------------------------------------------------------------
# texts


def test_eight_edges_at_once(model: Path, oracle: Engine, server: Server, tmp_path: Path) -> None:
    """With and without drafts, good and hopeless ones, each with a prompt and parameters of its own."""
    other, config = random_model(tmp_path / "draft", seed=8), DraftConfig(max_sessions=1)
    drafts = [None if i % 3 == 0 else drafter((model, other)[i % 3 - 1], config) for i in range(8)]
    prompts = [[(13 * i + 5 * j) % VOCAB for j in range(1 + 11 * i)] for i in range(8)]
    params = [SamplingParams(temperature=(0.0, 0.8, 1.3)[i // 3], max_tokens=10 + i, seed=i) for i in range(8)]
    together = threading.Barrier(8)

    def one(i: int) -> list[int]:
        with Edge(server.address, drafts[i]) as edge:
            together.wait(PATIENCE)
            return edge.generate([prompts[i]], params[i])[0].token_ids

    running = [background(one, i) for i in range(8)]
    got = [r.result(PATIENCE) for r in running]
    assert got == [oracle.generate([prompts[i]], params[i])[0].token_ids for i in range(8)]


def test_a_text_is_streamed(oracle: Engine, server: Server) -> None:
    """One round, a verdict for every token: on the wire, and in the pieces that an edge gives out."""
    want = oracle.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids
    with Raw(server) as raw:
        raw.open()
        assert raw.text() == want
        raw.send(Close(X))
        assert raw.silent()
    with Edge(server.address) as edge:
        chunks = list(edge.stream(PROMPT, SamplingParams(max_tokens=12)))
    assert [c.token_ids for c in chunks] == [[i] for i in want]
    assert [c.completion is not None for c in chunks] == [False] * 11 + [True]


def test_two_servers_in_one_process(model: Path, oracle: Engine, server: Server, tmp_path: Path) -> None:
    other = random_model(tmp_path / "other", seed=4)
    params = SamplingParams(temperature=0.8, max_tokens=12, seed=1)
    with serving(engine(other)) as second, Edge(server.address) as one, Edge(second.address) as two:
        assert server.endpoint != second.endpoint
        running = [background(edge.generate, [PROMPT] * 2, params) for edge in (one, two)]
        got = [r.result(PATIENCE) for r in running]
    for completions, e in zip(got, (oracle, engine(other)), strict=True):
        assert [c.token_ids for c in completions] == [e.generate([PROMPT], params)[0].token_ids] * 2
    assert got[0][0].token_ids != got[1][0].token_ids


def test_a_session_belongs_to_one_connection(oracle: Engine, server: Server) -> None:
    """To the last that opened it: without keys all connections are one account."""
    texts = [oracle.generate([PROMPT], SamplingParams(0.8, 12, seed))[0].token_ids for seed in (1, 2)]
    with Raw(server) as one, Raw(server) as two:
        for raw, seed in ((one, 1), (two, 2)):
            raw.open(sampling=wire.Sampling(0.8, seed))
        one.send(Draft(X, 1, len(PROMPT), b"", b"", CONTEXT))
        answer = one.receive()
        assert isinstance(answer, Error) and (answer.code, answer.session) == ("session", X)
        assert two.text() == texts[1] != texts[0]
        two.send(Close(X))
        assert two.silent()


# ----------------------------------------------------------------------------------------------------------------------
# strangers


def mangled(rng: random.Random) -> Iterator[bytes]:
    """Frames that are none: random bytes of every allowed size and of others, and right frames with a wrong byte."""
    for size in (512, 512, 512, 2048, 65536, 0, 1, 15, 16, 511, 513, 1000, 65535):
        yield rng.randbytes(size)
    right = encode(Draft(X, 1, 6, pack_ids([1, 2, 3]), bytes(3), 0))
    for at in (0, 4, 6, 7, 8, 12, 16, 18, 400, 511):
        yield right[:at] + bytes([right[at] ^ 0x55]) + right[at + 1 :]


def test_random_bytes(oracle: Engine, server: Server) -> None:
    """Each is answered by one ERROR with a sentence, before HELLO and after it, and costs an honest edge nothing."""
    with honest_edge(server, oracle):
        for hello in (False, True):
            with Raw(server, hello) as raw:
                for frame in mangled(random.Random(5)):
                    raw.send(frame)
                    answer = raw.receive()
                    assert isinstance(answer, Error) and (answer.code, answer.session) == ("frame", wire.NO_SESSION)
                    assert len(answer.text.split()) > 3
                assert raw.silent()


def test_a_message_is_one_frame(oracle: Engine, server: Server) -> None:
    """Also that of a client which puts an empty frame before it, as REQ does."""
    hello = encode(Hello("raw", b""))
    with honest_edge(server, oracle), Raw(server, hello=False) as raw:
        for parts in ([hello, hello], [b"", hello], [hello, b""], [b""] * 50):
            raw.send(*parts)
            answer = raw.receive()
            assert isinstance(answer, Error) and answer.code == "frame" and f"{len(parts)} frames" in answer.text
        assert raw.silent()


def test_right_frames_of_wrong_types(oracle: Engine, server: Server) -> None:
    """What only servers say, and what needs a session: an ERROR with a sentence for each; CANCEL and CLOSE of nothing are not answered."""
    only_servers: list[Message] = [
        Welcome("b", b"", b"", 1, [], wire.Limits(1, 1, 1), 1, wire.Load(0, 0, 0)), Opened(X, 1),
        Verdict(X, 1, 1, b"", 0, 0, 0, 0, 0), Error(X, "code", "text")
    ]  # fmt: skip
    need_session: list[Message] = [Draft(X, 1, 1, b"", b""), Prompt(X, 0, b"")]
    with honest_edge(server, oracle), Raw(server, hello=False) as raw:
        for codes in (("hello", "hello"), ("frame", "session")):
            for code, messages in zip(codes, (only_servers, need_session), strict=True):
                for m in messages:
                    raw.send(m)
                    answer = raw.receive()
                    assert isinstance(answer, Error) and answer.code == code and len(answer.text.split()) > 3
            assert raw.silent()  # is HELLO, the first time
        raw.send(Cancel(X))
        raw.send(Close(X))
        assert raw.silent()


@pytest.mark.parametrize("others", [0, 2])
def test_cancel_frees_at_once(oracle: Engine, server: Server, others: int) -> None:
    """Within a second the session and all of its pages are free, while it is decoded and others are (bench.wire measures how soon: F8)."""
    with contextlib.ExitStack() as stack:
        for _ in range(others):
            stack.enter_context(honest_edge(server, oracle))
        raw = stack.enter_context(Raw(server))
        for number in range(1, 4):
            session = bytes([number + 100]) * 16
            raw.open(session, [number, *range(30)], most=CONTEXT - 31)
            raw.send(Draft(session, 1, 31, b"", b"", CONTEXT))
            for _ in range(3):
                assert isinstance(raw.receive(), Verdict)
            begun = time.monotonic()
            raw.send(Cancel(session))
            while True:
                raw.send(Hello("free?", b""))
                while not isinstance(answer := raw.receive(), Welcome):
                    assert isinstance(answer, Verdict), "of before"
                mine = [key for key in list(server._sessions._table) if key[1] == session]
                if not mine and (others or (answer.load.sessions, answer.load.kv_free) == (0, answer.load.kv_tokens)):
                    break
                assert time.monotonic() - begun < 1


def test_an_oversize_frame_ends_the_connection(oracle: Engine, server: Server) -> None:
    """The next message comes on a new connection, which has not said HELLO."""
    with honest_edge(server, oracle), Raw(server) as raw:
        raw.send(bytes(65537))
        answers: list[Message] = []

        def strange() -> bool:
            raw.send(Prompt(X, 0, b""))
            if raw.socket.poll(100):
                answers.append(raw.receive())
            return bool(answers)

        until(strange, "an answer on the new connection")
        assert isinstance(answers[0], Error) and answers[0].code == "hello"


def test_a_port_scanner(oracle: Engine, server: Server) -> None:
    """Connections that speak something else, or nothing."""
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    with honest_edge(server, oracle), contextlib.ExitStack() as stack:
        for data in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", random.Random(1).randbytes(70_000), b"\xff" + bytes(8) + b"\x7f" + bytes(1000)):
            connection = stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
            with contextlib.suppress(OSError):  # it may be refused half way through
                connection.sendall(data)


def test_a_peer_that_vanishes(oracle: Engine, server: Server) -> None:
    """In the middle of a stream: the first verdict that finds nobody ends its sessions."""
    with honest_edge(server, oracle):
        with Raw(server) as raw:
            raw.open(X, most=400)
            raw.open(Y, most=400)
            raw.send(Draft(X, 1, len(PROMPT), b"", b"", CONTEXT))
            assert isinstance(raw.receive(), Verdict)
            peers = {r.peer for (_, session), r in list(server._sessions._table.items()) if session in (X, Y)}
            assert len(peers) == 1
        until(lambda: not any(r.peer in peers for r in list(server._sessions._table.values())), "the end of both sessions")
        assert peers.isdisjoint(server._sessions._peers)


def test_a_peer_that_does_not_read(oracle: Engine, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks and asks; when nothing more can be stored for it, its sessions end, and nobody has waited for it."""
    monkeypatch.setattr("specedge.net.doorman.SAVED", 1e9)  # else it would not be answered so often
    with honest_edge(server, oracle), Raw(server, RCVHWM=1, RCVBUF=4096, SNDHWM=100_000) as raw:
        long = [1] * 480  # so that answers are long
        raw.open(X, long)
        raw.send(Draft(X, 1, len(long), b"", b"", 0))
        (peer,) = {r.peer for (_, session), r in list(server._sessions._table.items()) if session == X}
        again = encode(Draft(X, 1, 0, b"", b"", 0))

        def gone() -> bool:
            with contextlib.suppress(zmq.Again):
                for _ in range(200):
                    raw.socket.send(again, zmq.NOBLOCK)
            return peer not in server._sessions._peers

        until(gone, "the end of its patience")
        assert not any(r.peer == peer for r in list(server._sessions._table.values()))


def test_a_flood_does_not_stop_the_steps(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that sends as fast as it is served: the engine's thread must come back to the texts."""
    flooded = Server(engine(model))
    served = 0

    def handle(peer: Peer, message: Message, now: float) -> list[tuple[Peer, Message]]:
        nonlocal served
        served += 1
        if served < 20_000:
            flooded._inbox.put((peer, message, 0.0))
        return []

    monkeypatch.setattr(type(flooded._sessions), "handle", lambda self, *rest: handle(*rest))
    try:
        for _ in range(3):
            flooded._inbox.put((Peer(b"peer"), Hello("raw", b""), 0.0))
        flooded._apply(0.0)
        assert served < 20_000
    finally:
        flooded._context.destroy(linger=0)


def test_what_is_said_during_a_long_step_is_no_silence(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 40 s, the lease is 30 s and renewed in time: it is read before anybody lapses. The clock is the test's."""
    slow, peer, sessions, now, looks = Server(engine(model)), Peer(b"peer"), list[int](), 100.0, 0

    def monotonic() -> float:
        nonlocal looks
        looks += 1
        if looks > 100:
            slow._stopping.set()
        return now

    def step(self: Server, most: int) -> list[tuple[Peer, Message]]:
        nonlocal now
        sessions.append(len(self._sessions))
        self._inbox.put((peer, Lease(X), now + 35))
        now += 40
        if len(sessions) == 3:
            self._stopping.set()
        return []

    monkeypatch.setattr("specedge.net.server.time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(Server, "_step", step)
    try:
        for message in (Hello("raw", b""), Open(X, pack_ids(PROMPT), len(PROMPT), len(PROMPT), GREEDY, [], 12)):
            slow._inbox.put((peer, message, now))
        slow._serve()
    finally:
        slow._context.destroy(linger=0)
    assert sessions == [1, 1, 1]


def test_a_fault_in_a_step(oracle: Engine, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every session is told so; the server lives on, and so do its connections."""
    step = server._engine.step

    def fails(most: int) -> list[object]:
        monkeypatch.setattr(server._engine, "step", step)
        raise RuntimeError("out of memory")

    with Raw(server) as raw, Edge(server.address) as edge:
        raw.open()
        until(lambda: not server._engine.busy, "its prompt")
        monkeypatch.setattr(server._engine, "step", fails)
        want = oracle.generate([PROMPT], SamplingParams(max_tokens=12))
        assert edge.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids == want[0].token_ids, "an edge builds its session anew"
        answer = raw.receive()
        assert isinstance(answer, Error) and (answer.session, answer.code) == (X, "internal")
        raw.open()
        assert raw.text() == want[0].token_ids == edge.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids
        raw.send(Close(X))
        assert raw.silent()


def test_an_edge_may_rest(oracle: Engine, server: Server) -> None:
    """An edge whose last text ended long ago begins another one, on the connection that it has."""
    want = oracle.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids
    with Edge(server.address) as edge:
        assert edge.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids == want
        server._sessions.expire(time.monotonic() + 3600)  # from another thread, but an idle engine's thread leaves the table alone
        assert edge.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids == want


# ----------------------------------------------------------------------------------------------------------------------
# the end


def test_stop_drains(model: Path, oracle: Engine) -> None:
    """Everybody is told, what is open goes on to its end, what is new is refused; with the last session both threads end."""
    target = engine(model)
    server = Server(target)
    server.start()
    with Raw(server) as raw:
        raw.open()
        stopping = background(server.stop, PATIENCE)
        told = raw.receive()
        assert isinstance(told, GoAway) and 1000 * (PATIENCE - 5) < told.deadline_ms <= 1000 * PATIENCE
        raw.send(Open(Y, pack_ids(PROMPT), len(PROMPT), len(PROMPT), GREEDY, [], 12))
        answer = raw.receive()
        assert isinstance(answer, Error) and (answer.session, answer.code) == (Y, "draining")
        assert raw.text() == oracle.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids
        assert not stopping.done()
        raw.send(Close(X))
        stopping.result(PATIENCE)
    assert threads() == set()
    check_empty(target)


@pytest.mark.parametrize("hurried", [False, True])
def test_stop_does_not_wait_for_ever(model: Path, hurried: bool) -> None:
    """A session that says nothing holds it up for the time of the drain, or until somebody is in a hurry; then it is told so."""
    server = Server(engine(model))
    server.start()
    hurry = threading.Event()
    with Raw(server) as raw:
        raw.open()
        stopping = background(server.stop, 10 * PATIENCE if hurried else 0.0, hurry)
        if hurried:
            assert isinstance(raw.receive(), GoAway)
            assert not stopping.done()
            hurry.set()
        stopping.result(PATIENCE)
        answer = raw.receive()
        assert isinstance(answer, Error) and (answer.session, answer.code) == (X, "draining")
    assert threads() == set()


def test_the_network_is_served_while_a_step_runs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the engine's thread waits for a device: what comes is read and decoded, and what the step before has found goes out."""
    step, inside, go_on, found_some = server._engine.step, threading.Event(), threading.Event(), itertools.count()

    def slow(most: int) -> list[request.Verdict]:
        found = step(most)
        if found and next(found_some) == 1:
            inside.set()
            assert go_on.wait(PATIENCE)
        return found

    monkeypatch.setattr(server._engine, "step", slow)
    with Raw(server) as raw:
        raw.open()
        raw.send(Draft(X, 1, len(PROMPT), b"", b"", CONTEXT))
        assert inside.wait(PATIENCE)
        assert isinstance(raw.receive(), Verdict)
        for _ in range(3):
            raw.send(Lease(X))
        until(lambda: server._inbox.qsize() == 3, "three decoded messages")
        go_on.set()
        raw.send(Close(X))


def test_stop_during_a_step(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the step takes, its verdicts still go out, and both threads end."""
    server = Server(engine(model))
    step, inside, go_on = server._engine.step, threading.Event(), threading.Event()

    def slow(most: int) -> list[request.Verdict]:
        found = step()
        if found:
            inside.set()
            assert go_on.wait(PATIENCE)
        return found

    monkeypatch.setattr(server._engine, "step", slow)
    server.start()
    with Raw(server) as raw:
        raw.open()
        raw.send(Draft(X, 1, len(PROMPT), b"", b"", CONTEXT))
        assert inside.wait(PATIENCE)
        stopping = threading.Thread(target=server.stop, daemon=True)
        stopping.start()
        stopping.join(0.3)  # three turns of the network's loop, which must not end before the engine's
        assert stopping.is_alive() and len(threads()) == 2
        go_on.set()
        assert isinstance(raw.receive(), Verdict)
        stopping.join(PATIENCE)
        assert threads() == set()


# ----------------------------------------------------------------------------------------------------------------------
# addresses


def test_the_endpoint_is_the_real_one(server: Server) -> None:
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    assert host == "127.0.0.1" and int(port) > 0
    socket.create_connection((host, int(port)), PATIENCE).close()


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://192.0.2.1:7000", "tcp://example.org:7000", "tcp://:7000"])
def test_other_machines_are_kept_out(oracle: Engine, endpoint: str) -> None:
    """The sentence names the address and both remedies; nothing was bound."""
    with pytest.raises(ListenError, match="give --keys, listen on 127.0.0.1, or pass --insecure") as e:
        Server(oracle, endpoint).stop()
    assert str(e.value).startswith(endpoint)


def test_insecure_listens_anywhere(oracle: Engine) -> None:
    """Past the check; this machine does not have the address, which is another sentence."""
    with pytest.raises(ListenError, match=r"cannot listen on tcp://192\.0\.2\.1:7000: "):
        Server(oracle, "tcp://192.0.2.1:7000", insecure=True).stop()


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://127.9.9.9:7000", "tcp://localhost:7000", "tcp://[::1]:0", "ipc:///tmp/x"])
def test_loopback_is_private(endpoint: str) -> None:
    assert is_private(endpoint)


def test_a_port_in_use(oracle: Engine, server: Server) -> None:
    with pytest.raises(ListenError, match=f"cannot listen on {server.endpoint}: Address already in use"):
        Server(oracle, server.endpoint).stop()


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1", "tcp://127.0.0.1:http"])
def test_no_port(oracle: Engine, endpoint: str) -> None:
    with pytest.raises(ListenError, match=f"cannot listen on {endpoint}: "):
        Server(oracle, endpoint).stop()


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:7000", "7000", "inproc://x", "specedge://127.0.0.1:7000"])
def test_no_address_at_all(oracle: Engine, endpoint: str) -> None:
    with pytest.raises(ListenError, match=f"'{endpoint}' is no address to listen on: write it as tcp://HOST:PORT"):
        Server(oracle, endpoint).stop()
