"""Honest edges beside one attacker: how long their rounds take with it and without, in turns, on one server (F4; threats T7 to T10).

The server and four honest edges share one core and the attacker has another, so that what is seen is the server's doing and not the scheduler's of a
small machine. An attacker is one key, authorised with LIMITS as an operator would give it, behind a line of LINE bytes per second; strangers, without
a key, have the same line. Honest edges draft 15 nodes a round and think for 30 ms in between.
"""

import contextlib
import multiprocessing
import os
import random
import select
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import zmq

from bench.house import House, Process
from specedge.net import wire
from specedge.net.client import Connection, ServerError

LINE = 1_250_000  # bytes per second: 10 Mbit/s, a good uplink at home
HONEST, NODES, THINK = 4, 15, 0.03
HELD = 1000  # connections of an attacker: what a process may have where nobody raised the limit
LIMITS = {"sessions": "16", "kv_tokens": "8192", "connections": "64", "rows_per_s": "256", "prompt_tokens_per_s": "256"}  # of the attacker's key
SAMPLING = wire.Sampling(0.8, 5)
CONTEXT = multiprocessing.get_context("spawn")
Stop = Callable[[], bool]


def attacked(quick: bool) -> dict[str, object]:
    """For every attack: p99 and median of honest rounds with it and without, and the worst of what the server held: memory, descriptors."""
    figures = dict[str, object]()
    with House() as house:
        keys = [house.key(f"honest{i}") for i in range(HONEST)]
        server = house.serve(core=0)
        key = house.key("mallory", **LIMITS)
        with _child(_honest, 0, server.address, keys) as honest, _child(_attacker, 1, server.address, key) as attacker:
            _ask(honest, 1.0)
            for name in BESIDE:
                figures[name] = beside(server, honest, attacker, name, *((1, 0.5) if quick else (7, 2.8)))
            figures["T10 one message of 300 MB"] = {"more_mb": round(bomb(server, key), 1)}  # now: arrivals use up the ports of this machine
            for name in ARRIVALS:
                attacker.send(name)
                _ask(honest, 0.5)
                figures[f"arrivals: {name}"] = arrivals(server, keys[0], 0.5 if quick else 8.0)
                _end(attacker)
    return figures


def beside(server: Process, honest: Pipe, attacker: Pipe, name: str, turns: int, seconds: float) -> dict[str, object]:
    """Honest rounds with one attack and without, in turns."""
    rounds: dict[bool, list[float]] = {True: [], False: []}
    before, most, descriptors = server.resident_mb, 0.0, 0
    for _ in range(turns):
        rounds[False] += _ask(honest, seconds)
        attacker.send(name)
        _ask(honest, 0.15 * seconds)  # what an attack takes to begin does not count
        rounds[True] += _ask(honest, seconds)
        most, descriptors = max(most, server.resident_mb), max(descriptors, server.descriptors)
        _end(attacker)
        _ask(honest, 0.15 * seconds)
    with_, without = (_p99(rounds[h]) for h in (True, False))
    return {
        "rounds": len(rounds[True]), "p99_ms": round(with_ * 1e3, 2), "p99_ms_without": round(without * 1e3, 2),
        "ratio": round(with_ / without, 3), "median_ratio": round(statistics.median(rounds[True]) / statistics.median(rounds[False]), 3),
        "more_mb": round(most - before, 1), "descriptors": descriptors,
    }  # fmt: skip


def arrivals(server: Process, key: Path, seconds: float) -> dict[str, object]:
    """How long an honest edge takes from nothing to its WELCOME, meanwhile. One that is not let in tries again, as edges do."""
    took, failed, descriptors, end = list[float](), 0, 0, time.monotonic() + seconds
    while not took or time.monotonic() < end:
        at = time.monotonic()
        while time.monotonic() < at + 120:  # then the server is gone, and the figure says so
            try:
                Connection(server.address, b"", key).close()
                break
            except ServerError:
                failed += 1
        took.append(time.monotonic() - at)
        descriptors = max(descriptors, server.descriptors)
        time.sleep(0.05)
    worst, median = max(took) * 1e3, statistics.median(took) * 1e3
    return {"n": len(took), "failed": failed, "median_ms": round(median, 2), "worst_ms": round(worst, 2), "descriptors": descriptors}


def bomb(server: Process, key: Path) -> float:
    """T10: megabytes that a server grows by at most while a message of 5,000 frames comes as fast as this machine carries it."""
    before = most = server.resident_mb
    with contextlib.closing(Connection(server.address, b"", key)) as c:
        c.socket.send_multipart([bytes(60_000)] * 5000, zmq.NOBLOCK)
        end = time.monotonic() + 4.0
        while time.monotonic() < end:
            most = max(most, server.resident_mb)
            time.sleep(0.005)
    return most - before


def _p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


@contextlib.contextmanager
def _child(run: Callable[..., None], core: int, *arguments: object):  # type: ignore[no-untyped-def]
    """`run` in a process of its own; it ends when its pipe does."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_pinned, args=(core, run, theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(5)
        process.kill()
        process.join()


def _pinned(core: int, run: Callable[..., None], *arguments: object) -> None:
    with contextlib.suppress(OSError):  # a machine of one core
        os.sched_setaffinity(0, {core})
    run(*arguments)


def _end(attacker: Pipe) -> None:
    attacker.send("stop")
    attacker.recv()


def _ask(honest: Pipe, seconds: float) -> list[float]:
    honest.send(seconds)
    answer: list[float] = honest.recv()
    return answer


# ----------------------------------------------------------------------------------------------------------------------
# honest edges


class Honest:
    """One edge with one text after the other, a tree a round."""

    def __init__(self, address: str, key: Path, number: int) -> None:
        self.connection = Connection(address, b"", key)
        self._rng, self._texts, self.number = random.Random(number), 0, number
        self.next = 0.0  # when the next round may begin
        self.sent: float | None = None
        self._open()

    def _open(self) -> None:
        self._texts += 1
        self._session, self._round = self._rng.randbytes(16), 0
        known = [self._rng.randrange(100, 300) for _ in range(40)]
        self._length = len(known)
        self.connection.send(wire.Open(self._session, wire.pack_ids(known), 40, 40, SAMPLING, [], 200))

    def draft(self, now: float) -> None:
        self._round += 1
        tokens = wire.pack_ids([self._rng.randrange(100, 300) for _ in range(NODES)])
        self.connection.send(wire.Draft(self._session, self._round, self._length, tokens, bytes(range(NODES))))
        self.sent = now

    def receive(self) -> float | None:
        """Seconds that a round took, if one has ended."""
        for m, _ in self.connection.receive():
            if isinstance(m, wire.Verdict) and self.sent is not None and m.session == self._session:
                now = time.monotonic()
                took, self.sent, self.next = now - self.sent, None, now + THINK * self._rng.uniform(0.8, 1.2)
                self._length += len(m.tokens) // 4
                if m.finish or self._round == 150:
                    self.connection.send(wire.Close(self._session))
                    self._open()
                return took
            if isinstance(m, wire.Error | wire.Busy):
                raise ServerError(m.text)
        return None


def _honest(pipe: Pipe, address: str, keys: list[Path]) -> None:
    edges = [Honest(address, key, i) for i, key in enumerate(keys)]
    poller = zmq.Poller()
    for e in edges:
        poller.register(e.connection.socket, zmq.POLLIN)
    while True:
        try:
            end = time.monotonic() + pipe.recv()
        except EOFError:
            break
        found = list[float]()
        while (now := time.monotonic()) < end or any(e.sent is not None for e in edges):
            for e in edges:
                if e.sent is None and now >= e.next and now < end:
                    e.draft(now)
            wait = min([e.next - now for e in edges if e.sent is None] or [1.0])
            poller.poll(max(1, int(wait * 1000)))
            found += [took for e in edges if (took := e.receive()) is not None]
        pipe.send(found)
        for e in edges:  # not silent while the next turn is prepared
            e.connection.send(wire.Lease(bytes(16)))
    for e in edges:
        e.connection.close()


# ----------------------------------------------------------------------------------------------------------------------
# attackers


def _attacker(pipe: Pipe, address: str, key: Path) -> None:
    with contextlib.suppress(EOFError):
        while True:
            ATTACKS[pipe.recv()](address, key, lambda: pipe.poll(0))
            pipe.recv()
            pipe.send("stopped")


class Line:
    """Lets so many bytes per second pass."""

    def __init__(self, rate: float = LINE) -> None:
        self._rate, self._at = rate, time.monotonic()

    def take(self, size: int) -> None:
        self._at = max(self._at, time.monotonic() - 0.05) + size / self._rate
        time.sleep(max(0.0, self._at - time.monotonic()))


def hold(address: str, key: Path, stop: Stop) -> None:
    """T7: as many sessions as there are to be had, long prompts, nothing asked, and leases renewed."""
    line, sessions = Line(), list[bytes]()
    with contextlib.closing(Connection(address, b"", key)) as c:
        while not stop():
            session = random.randbytes(16)
            known = [random.randrange(100, 300) for _ in range(450)]
            for m in [wire.Open(session, wire.pack_ids(known), 450, 450, SAMPLING, [], 50), *(wire.Lease(s) for s in sessions)]:
                line.take(c.send(m))
            time.sleep(0.05)
            sessions += [m.session for m, _ in c.receive() if isinstance(m, wire.Opened)]


def compute(address: str, key: Path, stop: Stop) -> None:
    """T8: junk trees of the largest size in several sessions, and prompts that are opened and dropped."""
    line, rounds = Line(), dict[bytes, list[int]]()
    with contextlib.closing(Connection(address, b"", key)) as c:
        while not stop():
            if len(rounds) < 8:
                session = random.randbytes(16)
                known = [random.randrange(100, 300) for _ in range(400)]
                line.take(c.send(wire.Open(session, wire.pack_ids(known), 400, 400, SAMPLING, [], 100)))
                rounds[session] = [1, 400]
                line.take(c.send(_junk(session, 1, 400)))
            c.socket.poll(20)
            for m, _ in c.receive():
                if isinstance(m, wire.Verdict) and m.session in rounds:
                    rounds[m.session] = [m.round + 1, m.base + len(m.tokens) // 4]
                    line.take(c.send(_junk(m.session, *rounds[m.session])))
                elif isinstance(m, wire.Busy | wire.Error) and m.session in rounds:
                    c.send(wire.Cancel(m.session))
                    del rounds[m.session]


def _junk(session: bytes, number: int, base: int) -> wire.Message:
    return wire.Draft(session, number, base, wire.pack_ids([random.randrange(100, 300) for _ in range(255)]), bytes(range(255)))


def flood(address: str, key: Path, stop: Stop) -> None:
    """T8: small frames as fast as the line carries them, of the kinds that cost the server most: greetings, repeats, noise."""
    line, session = Line(), random.randbytes(16)
    kinds = [wire.encode(wire.Hello("x", b"")), wire.encode(wire.Draft(session, 1, 0, b"", b"")), bytes(512), wire.encode(wire.Resume(session))]
    with contextlib.closing(Connection(address, b"", key)) as c:
        c.send(wire.Open(session, wire.pack_ids([5] * 100), 100, 100, SAMPLING, [], 50))
        while not stop():
            with contextlib.suppress(zmq.Again):
                c.socket.send(random.choice(kinds), zmq.NOBLOCK)
            line.take(545)
            while c.socket.poll(0):
                c.socket.recv()


def silent(address: str, key: Path, stop: Stop) -> None:
    """T9: connections that say nothing, five hundred more of them a second."""
    _connect(address, stop, 500)


def curt(address: str, key: Path, stop: Stop) -> None:
    """T9: connections that say a byte and no more, five hundred more of them a second."""
    _connect(address, stop, 500, b"\xff")


def crowd(address: str, key: Path, stop: Stop) -> None:
    """T9: connections that say nothing, two thousand more of them a second."""
    _connect(address, stop, 2000)


def elsewhere(address: str, key: Path, stop: Stop) -> None:
    """T9: two thousand a second that say a byte, from another address than honest edges have."""
    _connect(address, stop, 2000, b"\xff", "127.0.0.2")


def _connect(address: str, stop: Stop, rate: float, says: bytes = b"", source: str = "") -> None:
    line = Line(rate)
    with contextlib.closing(Dialler(address, says, source)) as dialler:
        while not stop():
            dialler.dial()
            line.take(1)


class Dialler:
    """Asks for connections and waits for none, so that it keeps its pace whatever becomes of them; on those that come about it `says` something. Has
    HELD at a time, the latest: those that were not let in go on asking, as TCP does, for as long as they are had."""

    def __init__(self, address: str, says: bytes = b"", source: str = "") -> None:
        self.host, _, port = address.partition("/?")[0].removeprefix("specedge://").rpartition(":")
        self.port, self._says, self._source = int(port), says, source
        self._held, self._coming = dict[int, socket.socket](), select.epoll()

    def dial(self) -> None:
        if len(self._held) == HELD:
            self._held.pop(next(iter(self._held))).close()
        s = socket.socket()
        self._held[s.fileno()] = s
        s.setblocking(False)
        if self._source:
            s.bind((self._source, 0))
        s.connect_ex((self.host, self.port))
        if self._says:
            self._coming.register(s, select.EPOLLOUT | select.EPOLLONESHOT)
            for descriptor, _ in self._coming.poll(0):
                with contextlib.suppress(OSError):  # hung up on
                    self._held[descriptor].send(self._says)

    def close(self) -> None:
        self._coming.close()
        for s in self._held.values():
            s.close()


def strangers(address: str, key: Path, stop: Stop) -> None:
    """T9: whole handshakes of keys that nobody knows, a hundred a second, and as many halves. Each whole one has a sixth of a second."""
    public, server_key = zmq.curve_keypair(), bytes.fromhex(address.partition("key=")[2])
    line, context, whole = Line(100), zmq.Context(), deque[zmq.Socket[bytes]]()
    with contextlib.closing(Dialler(address, b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE")) as halves:
        while not stop():
            if len(whole) == 16:
                whole.popleft().close()
            whole.append(s := context.socket(zmq.DEALER))
            s.linger, s.reconnect_ivl, s.curve_serverkey, s.curve_publickey, s.curve_secretkey = 0, -1, server_key, *public
            s.connect(f"tcp://{halves.host}:{halves.port}")
            halves.dial()
            line.take(1)
    context.destroy(linger=0)


def multipart(address: str, key: Path, stop: Stop) -> None:
    """T10: messages of very many frames, each as large as may be. ZeroMQ sends none before it has all, so each is as long as the line takes for a
    second, and goes out at once."""
    line, frame = Line(), bytes(60_000)
    with contextlib.closing(Connection(address, b"", key)) as c:
        while not stop():
            with contextlib.suppress(zmq.ZMQError):
                c.socket.send_multipart([frame] * 20, zmq.NOBLOCK)
            line.take(20 * len(frame))


BESIDE: dict[str, Callable[[str, Path, Stop], None]] = {
    "T7 sessions held": hold, "T8 junk trees and prompts": compute, "T8 frames": flood, "T9 silent connections": silent,
    "T9 connections of a byte": curt, "T9 strangers' handshakes": strangers, "T10 multipart": multipart,
}  # fmt: skip
ARRIVALS: dict[str, Callable[[str, Path, Stop], None]] = {
    "T9 a byte each, 2,000/s elsewhere": elsewhere, "T9 silent connections, 2,000/s": crowd,  # last, for it leaves few ports to this address
}  # fmt: skip
ATTACKS = BESIDE | ARRIVALS
