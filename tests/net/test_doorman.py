"""Doorman: strangers make room for strangers, who was welcomed stays, and a message without an end is cut off. Around a real server."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from specedge.config import SamplingParams
from specedge.engine.engine import Engine
from specedge.net import doorman as doorman_module
from specedge.net.doorman import OF_AN_ADDRESS, Doorman
from specedge.net.edge import Edge
from specedge.net.server import Server
from specedge.net.wire import Close, Draft, Hello, Lease, Resume, Verdict, Welcome, encode
from tests.helpers import engine
from tests.net.test_server import PROMPT, Raw, X, background, honest_edge, serving, until


@pytest.fixture
def server(model: Path) -> Iterator[Server]:
    with serving(engine(model)) as s:
        yield s


def connect(server: Server) -> socket.socket:
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    return socket.create_connection((host, int(port)), 10)


def closed(s: socket.socket) -> bool:
    """Whether the other side has hung up; greetings are read past."""
    s.settimeout(0.01)
    with contextlib.suppress(TimeoutError, OSError):
        while True:
            if not s.recv(1000):
                return True
    return False


def test_strangers_make_room_for_strangers(server: Server, oracle: Engine) -> None:
    """The oldest of an address goes when there are too many; an edge that was welcomed stays, and one that comes in between is served."""
    with honest_edge(server, oracle), Raw(server) as raw, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(2 * OF_AN_ADDRESS)]
        until(lambda: all(map(closed, silent[:OF_AN_ADDRESS])), "the end of the older half")
        assert not any(map(closed, silent[OF_AN_ADDRESS + 8 :])), "but for a few of those that make room for an edge"
        with Edge(server.address) as edge:
            assert edge.generate([PROMPT], SamplingParams(max_tokens=3))[0].token_ids
        assert raw.silent() and len(server._doorman) <= OF_AN_ADDRESS + 4
    until(lambda: len(server._doorman) == 0, "the end of the others")
    assert not server._doorman._strangers and not server._doorman._of and not server._doorman._routes


def test_there_is_an_end_to_all_strangers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever addresses they come from."""
    monkeypatch.setattr(doorman_module, "STRANGERS", 5)
    with Raw(server) as raw, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(12)]
        until(lambda: sum(map(closed, silent)) == 7, "the end of seven")
        assert raw.silent() and len(server._doorman) == 6


def test_a_message_without_an_end_is_cut_off(server: Server, oracle: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By far before it fills the memory; many messages of that size may come. The frames are made by hand, for a DEALER keeps back what is
    not whole."""
    monkeypatch.setattr(doorman_module, "PIECE", 2_000_000)
    with honest_edge(server, oracle), Raw(server) as fair, connect(server) as s:
        s.sendall(b"\xff" + bytes(8) + b"\x7f\x03\0NULL" + bytes(48))
        s.sendall(b"\4\x1c\5READY\x0bSocket-Type\0\0\0\6DEALER")
        while b"READY" not in s.recv(4096):
            pass
        hello, sent = encode(Hello("raw", b"")), 0
        s.sendall(b"\2" + len(hello).to_bytes(8, "big") + hello)
        until(lambda: len(server._doorman) == 3 and not server._doorman._strangers, "its welcome")
        with contextlib.suppress(ConnectionError):
            while sent < 400_000_000:
                s.sendall(b"\3" + (60_000).to_bytes(8, "big") + bytes(60_000))
                sent += 60_000
                fair.socket.send(bytes(65536))
                time.sleep(0.001)
        assert 2_000_000 < sent < 400_000_000
        while fair.socket.poll(300):
            fair.socket.recv()
        assert fair.silent()


@pytest.mark.parametrize("frame", [encode(Hello("x", b"")), bytes(512), encode(Resume(X)), encode(Draft(X, 1, 0, b"", b"")), encode(Lease(X))])
def test_who_asks_too_often_is_not_heard_for_a_while(
    server: Server, oracle: Engine, frame: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """All kinds of frames that bring nothing on; the others are heard, and so is this connection, later."""
    monkeypatch.setattr(doorman_module, "SAVED", 50.0)
    monkeypatch.setattr(doorman_module, "MUTE", 0.3)
    with Raw(server) as fair, Raw(server, RCVHWM=0) as raw:
        for _ in range(200):
            raw.socket.send(frame)
        until(lambda: muted(server), "silence")
        assert fair.silent()
        while raw.socket.poll(700):
            raw.socket.recv()
        assert raw.silent()
        raw.open()
        assert raw.text() == oracle.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids
        raw.send(Close(X))


def muted(server: Server) -> list[object]:
    return [account for account, a in list(server._doorman._allowances.items()) if a.muted > time.monotonic()]


@pytest.mark.skipif(not doorman_module.LINUX, reason="others cannot be told to take nothing")
def test_what_is_not_heard_is_not_received(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it costs nobody anything; nor is it lost: TCP brings it when the time is over."""
    monkeypatch.setattr(doorman_module, "SAVED", 50.0)
    monkeypatch.setattr(doorman_module, "MUTE", 1000.0)
    with Raw(server) as fair, Raw(server, RCVHWM=0) as raw:
        for _ in range(60):
            raw.socket.send(bytes(512))
        until(lambda: [g for g in list(server._doorman._guests.values()) if g.deaf], "deafness")
        assert fair.silent(), "what came before it has been looked at"
        (descriptor,) = (d for d, g in server._doorman._guests.items() if g.deaf)
        while raw.socket.poll(100):
            raw.socket.recv()
        before = doorman_module._with(descriptor, doorman_module._received)
        raw.send(Hello("is anybody there?", b""))
        assert raw.socket.poll(300) == 0 and before == doorman_module._with(descriptor, doorman_module._received)
        (account,) = muted(server)
        server._doorman._allowances[account].muted = 0.0
        server._doorman._guests[descriptor].deaf = 1.0  # which is past
        assert isinstance(raw.receive(), Welcome)


def test_rounds_and_short_texts_are_no_idle_questions(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are."""
    monkeypatch.setattr(doorman_module, "SAVED", 8.0)
    monkeypatch.setattr(doorman_module, "RATE", 1.0)
    with Raw(server) as raw:
        raw.open(most=200)
        for number in range(1, 101):
            raw.send(Draft(X, number, len(PROMPT) + number - 1, b"", b""))
            assert isinstance(raw.receive(), Verdict)
        raw.send(Close(X))
        for _ in range(50):
            raw.open(most=1)
            assert len(raw.text()) == 1
            raw.send(Close(X))


def test_a_repeated_round_is_an_idle_question(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its answer is the verdict of one that was verified."""
    monkeypatch.setattr(doorman_module, "RATE", 0.0)
    with Raw(server) as raw:
        raw.open()
        for _ in range(20):
            raw.send(Draft(X, 1, len(PROMPT), b"", b""))
            assert isinstance(raw.receive(), Verdict)
        (allowance,) = server._doorman._allowances.values()
        assert allowance.asked == 19, "frames since the verdict that a step found"
        raw.send(Close(X))


def test_many_callers_of_one_edge_are_not_slowed(server: Server, oracle: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen at a time, who send hundreds of frames a second through one connection: what they ask together stays within what one round each saves
    up."""
    monkeypatch.setattr(doorman_module, "RATE", 1.0)
    monkeypatch.setattr(doorman_module, "SAVED", 80.0)
    params = SamplingParams(max_tokens=2)
    want = oracle.generate([PROMPT], params)[0].token_ids
    with Edge(server.address) as edge:
        def call() -> list[list[int]]:
            return [edge.generate([PROMPT], params)[0].token_ids for _ in range(25)]

        texts = [text for caller in [background(call) for _ in range(16)] for text in caller.result(60)]
        assert texts == [want] * 400 and not any(a.muted for a in server._doorman._allowances.values())


def test_only_the_connection_that_came_is_shut_down(server: Server) -> None:
    """A descriptor that has become another's by the time is left alone."""
    one, two = socket.socketpair()
    descriptor = one.fileno()
    with one, two:
        guest = Doorman.__new__(Doorman)
        guest._guests = {one.fileno(): doorman_module.Guest(("192.0.2.1", 7))}
        guest._strangers, guest._routes = {}, {}
        guest._shut(one.fileno())
        two.sendall(b"x")
        assert one.recv(1) == b"x" and not guest._guests
    assert doorman_module._with(descriptor, socket.socket.getpeername) is None
    with open(os.devnull) as f:
        assert doorman_module._with(f.fileno(), socket.socket.getpeername) is None and not f.closed


def test_an_older_protocol_does_not_end_the_server(server: Server) -> None:
    """ZMTP 2, as ZeroMQ 3 spoke it: a message of such a peer does not say from which connection it is."""
    with connect(server) as s:
        s.settimeout(10)
        s.sendall(b"\xff" + bytes(8) + b"\x7f")  # signature; the rest is said when the other side has answered
        assert s.recv(10)
        s.sendall(b"\x01\x05\0\0")  # revision, a DEALER, no identity
        assert s.recv(64)
        frame = encode(Hello("old", b""))
        s.sendall(b"\2" + len(frame).to_bytes(8, "big") + frame)
        seen = b""
        while b"SPEG" not in seen:
            assert (data := s.recv(4096)), seen
            seen += data
    assert server.alive
