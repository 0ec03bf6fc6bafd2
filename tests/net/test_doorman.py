"""Doorman: strangers make room for strangers, who was welcomed stays, an address that floods is let in less, and a message without an end is cut off.
Around a real server."""

import contextlib
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from specedge.config import SamplingParams
from specedge.engine.engine import Engine
from specedge.net import doorman as doorman_module
from specedge.net import server as server_module
from specedge.net.client import Connection
from specedge.net.doorman import DIAL, OF_AN_ADDRESS, Doorman, _address, _with
from specedge.net.edge import Edge
from specedge.net.filters import ATTACH, guard, hear
from specedge.net.server import Server
from specedge.net.wire import Close, Draft, Error, Hello, Lease, Message, Resume, Verdict, Welcome, encode
from tests.helpers import engine
from tests.net.test_server import PROMPT, Raw, X, background, honest_edge, serving, until

linux = pytest.mark.skipif(not doorman_module.LINUX, reason="others cannot be told to take nothing")


@pytest.fixture
def server(model: Path) -> Iterator[Server]:
    with serving(engine(model)) as s:
        yield s


def connect(server: Server) -> socket.socket:
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    return socket.create_connection((host, int(port)), 10)


def stranger(server: Server) -> socket.socket:
    """One that has said as much as it takes to be accepted."""
    s = connect(server)
    s.sendall(b"\xff")
    return s


def closed(s: socket.socket) -> bool:
    """Whether the other side has hung up; greetings are read past."""
    s.settimeout(0.01)
    with contextlib.suppress(TimeoutError, OSError):
        while True:
            if not s.recv(1000):
                return True
    return False


def test_strangers_make_room_for_strangers(server: Server, oracle: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of an address goes when there are too many; an edge that was welcomed stays, and one that comes in between is served."""
    monkeypatch.setattr(doorman_module, "KNOCKS_SAVED", 1e9)
    with honest_edge(server, oracle), Raw(server) as raw, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(stranger(server)) for _ in range(2 * OF_AN_ADDRESS)]
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
        silent = [stack.enter_context(stranger(server)) for _ in range(12)]
        until(lambda: sum(map(closed, silent)) == 7, "the end of seven")
        assert raw.silent() and len(server._doorman) == 6


@pytest.mark.skipif(doorman_module.SILENT, reason="the system does not keep them back")
def test_who_says_nothing_is_not_accepted(server: Server) -> None:
    """Nor who hangs up without a word; whoever speaks in the end is accepted, and then nothing of what it sends is kept back."""
    with Raw(server) as raw, contextlib.ExitStack() as stack:
        until(lambda: unfiltered(server) == 1, "an open way")
        quiet = [stack.enter_context(connect(server)) for _ in range(2 * OF_AN_ADDRESS)]
        for s in quiet[1:]:
            s.close()
        for _ in range(3):
            time.sleep(doorman_module.TURN)
            assert raw.silent() and len(server._doorman) == 1
        quiet[0].sendall(b"\xff")
        until(lambda: unfiltered(server) == 2, "the one that spoke")
        quiet[0].close()
        until(lambda: len(server._doorman) == 1, "its end")


def unfiltered(server: Server) -> int:
    """Connections without a filter: for one of several instructions the question is too short, and is refused."""
    return [_with(d, lambda s: s.getsockopt(socket.SOL_SOCKET, ATTACH)) for d in list(server._doorman._guests)].count(0)


WAYS = {
    "IPv4": ("tcp://127.0.0.1:0", "127.0.0.1", "127.0.0.2"), "IPv4 beside IPv6": ("tcp://[::]:0", "127.0.0.1", "127.0.0.2"),
    "IPv6": ("tcp://[::]:0", "::1", "127.0.0.1"),
}  # fmt: skip


@linux
@pytest.mark.parametrize("way", WAYS)
def test_an_address_that_floods_is_let_in_less(model: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a random few; another address connects at once, a connection that stands does not notice, and when the flood is over all are let in."""
    monkeypatch.setattr(doorman_module, "KNOCKS", 0.0)
    monkeypatch.setattr(doorman_module, "KNOCKS_SAVED", 20.0)
    monkeypatch.setattr(doorman_module, "HALVING", 1)
    listen, here, elsewhere = WAYS[way]
    if here == "::1" and not has_ipv6():
        pytest.skip("no IPv6 here")
    with Server(engine(model), listen, model=b"m" * 32, insecure=True) as server, contextlib.ExitStack() as stack:
        server.endpoint = server.endpoint.replace("[::]", "[::1]" if here == "::1" else "127.0.0.1")
        port = int(server.endpoint.rpartition(":")[2])

        def dial(source: str) -> socket.socket:
            s = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET))
            s.bind((source, 0))
            s.setblocking(False)
            s.connect_ex(("::1" if ":" in source else "127.0.0.1", port))
            with contextlib.suppress(OSError):
                s.send(b"\xff")
            return s

        raw = stack.enter_context(Raw(server, IPV6=1))
        for _ in range(20 + 15):
            dial(here)
        until(lambda: min(server._doorman._shares.values(), default=1.0) < 0.5**9, "a share of next to nothing")
        late = [dial(here) for _ in range(200)]
        before = time.monotonic()
        assert connected(dial(elsewhere)) and sum(map(connected, late)) < 10 and raw.silent()
        assert time.monotonic() - before < 0.9, "before a SYN is repeated"
        monkeypatch.setattr(doorman_module, "KNOCKS", 1e9)
        until(lambda: not server._doorman._shares, "the end of the flood")
        assert connected(dial(here)) and raw.silent()
        until(lambda: not server._doorman._knocks, "an empty book")


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as s:
        s.bind(("::1", 0))
        return True
    return False


def connected(s: socket.socket) -> bool:
    """On loopback that is so at once, or a SYN has been dropped."""
    with contextlib.suppress(OSError):
        return bool(s.getpeername())
    return False


@linux
def test_edges_that_are_welcomed_are_no_flood(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many come, and though each connects twice. Those that are not welcomed count, though they are gone before anybody could look."""
    monkeypatch.setattr(doorman_module, "KNOCKS", 0.0)
    for _ in range(20):
        Connection(server.address, b"").close()
    until(lambda: len(server._doorman) == 0, "the end of all")
    assert all(a.asked <= DIAL for a in server._doorman._knocks.values())
    for _ in range(5):
        with stranger(server) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a RST
    until(lambda: any(a.asked >= 5 for a in server._doorman._knocks.values()), "five in the book")


@linux
def test_the_share_that_is_let_in_is_random() -> None:
    """And is that of its address: all others are let in, also those whose address differs in one bit."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener, contextlib.ExitStack() as stack:
        guard(listener, {bytes([127, 0, 0, 1]): 0.5, bytes([127, 0, 0, 3]): 0.0, bytes([127, 0, 0, 1, 0, 0, 0, 0]): 0.0}, silent=True)
        let_in = Counter[str]()
        for host in ["127.0.0.1"] * 200 + ["127.0.0.2"] * 50 + ["127.0.0.3"] * 50:
            s = stack.enter_context(socket.socket())
            s.bind((host, 0))
            s.setblocking(False)
            s.connect_ex(listener.getsockname())
            let_in[host] += connected(s)
        assert 50 < let_in["127.0.0.1"] < 150 and let_in["127.0.0.2"] == 50 and let_in["127.0.0.3"] == 0
        hear(listener)
        assert connected(stack.enter_context(socket.create_connection(listener.getsockname(), 10)))
    if has_ipv6():  # where 0.0.0.0 would stand there are zeros in ::1
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            guard(listener, {bytes(4): 0.0}, silent=True)
            with socket.create_connection(listener.getsockname()[:2], 0.9) as s:
                assert connected(s)


@linux
@pytest.mark.parametrize("silent", [False, True])
def test_an_end_waits_until_it_is_heard(silent: bool) -> None:
    """So it can be asked whose a connection was that came and went in one moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        guard(listener, {}, silent)
        with socket.create_connection(listener.getsockname(), 10) as client:
            client.sendall(b"\xff")
            there, _ = listener.accept()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a RST
        with there:
            there.setblocking(False)
            assert there.recv(9) == b"\xff" and there.getpeername()
            with pytest.raises(BlockingIOError):
                there.recv(9)
            hear(there)
            there.send(b"is anybody there?")
            with pytest.raises(ConnectionResetError):
                there.recv(9)
        with socket.create_connection(listener.getsockname(), 10) as client:
            client.send(b"\xff", socket.MSG_MORE)  # goes out with the FIN
        with pytest.raises(BlockingIOError):
            there, _ = listener.accept()
            with there:
                there.setblocking(False)
                there.recv(9)


def test_an_address_is_one_whatever_the_socket() -> None:
    assert _address("::ffff:192.0.2.7") == _address("192.0.2.7") == bytes([192, 0, 2, 7])
    assert _address("2001:db8::1") == _address("2001:db8::2:3") == bytes([0x20, 1, 0x0D, 0xB8, 0, 0, 0, 0]) != _address("2001:db8:0:1::1")
    assert _address("fe80::1%eth0") == bytes([0xFE, 0x80, 0, 0, 0, 0, 0, 0])


def test_a_message_without_an_end_is_cut_off(server: Server, oracle: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By far before it fills the memory; many messages of that size may come. The frames are made by hand, for a DEALER keeps back what is
    not whole."""
    monkeypatch.setattr(doorman_module, "PIECE", 2_000_000)
    monkeypatch.setattr(doorman_module, "SAVED", 1e9)  # how many messages may come is not asked here: 125 of that size are a flood
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


@linux
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
        while isinstance(answer := raw.receive(), Error):
            pass  # to frames that were still on their way when deafness set in
        assert isinstance(answer, Welcome)


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


def test_long_frames_and_long_answers_count_for_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bytes that they make the server look at, or send: a repeat of 512 bytes may ask for 64 KiB."""
    monkeypatch.setattr(doorman_module, "RATE", 0.0)
    monkeypatch.setattr(server_module, "UNIT", 256)
    with Raw(server) as raw:
        raw.open(tokens=[7] * 100, most=400)
        raw.text(base=100)

        def cost(frame: bytes | Message) -> float:
            (allowance,) = server._doorman._allowances.values()
            allowance.asked = 0.0
            raw.send(frame)
            raw.receive()
            return allowance.asked

        assert cost(bytes(2048)) == 8
        assert [cost(Draft(X, 1, 100 + n, b"", b"")) for n in (399, 1)] == [2 + 2, 2 + 8], "of one id, and of 399"
        raw.send(Close(X))


def test_a_stream_makes_nothing_good(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for its first verdict: an edge says nothing for the others, and could flood with what they saved up."""
    monkeypatch.setattr(doorman_module, "RATE", 0.0)
    with Raw(server) as raw:
        raw.open(most=100)
        (allowance,) = server._doorman._allowances.values()
        allowance.asked = 500.0
        assert len(raw.text()) == 100
        assert allowance.asked == 500 + 1 - server_module.PURPOSE
        raw.send(Close(X))


def test_who_is_silent_for_long_makes_room_where_there_is_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """For nobody counts its connection any more. Not as long as there is room, nor whoever has spoken or was served lately."""
    with Raw(server), Raw(server) as second, Raw(server) as third:
        third.open(most=200)
        guests, routes = server._doorman._guests, server._doorman._routes
        silent = next(iter(routes))
        for descriptor in list(guests):
            guests[descriptor].heard -= 1000.0
        assert second.silent() and len(third.text()) == 200
        with stranger(server):
            until(lambda: len(server._doorman) == 4, "one more, for whom there is room")
            monkeypatch.setattr(server._doorman, "_most", 4)
            with stranger(server):
                until(lambda: silent not in routes and len(guests) == 4, "the end of the one that is silent")
                assert second.silent() and third.silent() and len(server._doorman._strangers) == 2
            monkeypatch.setattr(server._doorman, "_most", 3)
            with stranger(server):
                until(lambda: len(guests) == 3, "the end of a stranger, for nobody is silent")
                assert second.silent() and third.silent()
        third.send(Close(X))


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
        guest._nothing, guest._spare = (open(os.devnull, "rb", buffering=0) for _ in range(2))  # noqa: SIM115
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
