"""A wide-area network on one machine: a TCP proxy with delay, jitter, a rate in each direction, and connections that drop. No root needed.

    python -m bench.wan 127.0.0.1:7000 --rtt 15 --jitter 2 --up 10 --down 50

Every piece of bytes leaves `rtt / 2` plus up to `jitter` after it came, behind those that came before it, and takes its time on a line of the given
rate. One thread waits in select, whose timeout is in microseconds; asyncio rounds it up to whole milliseconds, which would add half a millisecond
each way. Knows nothing of frames. Invariant: bytes of one direction stay in order, as TCP keeps them.
"""

import argparse
import contextlib
import random
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field

PIECE = 65536
HELD = 4 << 20  # bytes under way in one direction above which its sender is not read any more
LEAD = 50e-6  # seconds that select wakes late, measured


@dataclass(frozen=True, slots=True)
class Network:
    """Milliseconds there and back, milliseconds of jitter each way (uniform from 0), Mbit/s up (towards the server) and down; 0: no limit."""

    rtt: float = 15.0
    jitter: float = 0.0
    up: float = 0.0
    down: float = 0.0


@dataclass(slots=True, eq=False)
class Way:
    """One direction of one connection."""

    source: socket.socket
    sink: socket.socket
    up: bool
    number: int  # of the connection
    queue: "deque[tuple[float, bytes, float]]" = field(default_factory=deque)  # due, bytes, when they came
    held: int = 0
    line_free: float = 0.0
    ended: bool = False  # the source will send no more


class Wan:
    """Listens on a loopback port that the system chooses and forwards to `target` (host:port). A context manager; `address` is its own, host:port.
    `log`: (came, left, up, bytes, connection) of every piece, on the clock of time.monotonic."""

    def __init__(self, target: str, network: Network, seed: int = 0) -> None:
        self.network, self.log = network, list[tuple[float, float, bool, int, int]]()
        host, _, port = target.rpartition(":")
        self._target, self._rng = (host, int(port)), random.Random(seed)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._ways: dict[socket.socket, Way] = {}
        self._connections = 0
        self._knock, self._door = socket.socketpair()
        self._closing = self._dropping = False
        self._thread = threading.Thread(target=self._run, name="wan", daemon=True)
        self._thread.start()

    def drop(self) -> None:
        """Break all connections with a reset."""
        self._dropping = True
        self._knock.send(b"\0")

    def close(self) -> None:
        """Break all connections and stop listening."""
        self._closing = True
        self._knock.send(b"\0")
        self._thread.join()
        for s in (self._listening, self._knock, self._door):
            s.close()

    def __enter__(self) -> "Wan":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing:
            due = min((w.queue[0][0] for w in self._ways.values() if w.queue), default=None)
            timeout = None if due is None else max(0.0, due - time.monotonic() - LEAD)
            reading = [s for s, w in self._ways.items() if not w.ended and w.held < HELD]
            ready = select.select([self._door, self._listening, *reading], [], [], timeout)[0]
            now = time.monotonic()
            for s in ready:
                if s is self._door:
                    self._door.recv(4096)
                elif s is self._listening:
                    self._accept()
                elif s in self._ways:
                    self._take(self._ways[s], now)
            if self._dropping:
                self._dropping = False
                self._break([*self._ways.values()])
            for way in list(self._ways.values()):
                self._give(way)
        self._break([*self._ways.values()])

    def _accept(self) -> None:
        near = self._listening.accept()[0]
        try:
            far = socket.create_connection(self._target, 5)
        except OSError:
            near.close()
            return
        self._connections += 1
        for source, sink, up in ((near, far, True), (far, near, False)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ways[source] = Way(source, sink, up, self._connections)

    def _take(self, way: Way, now: float) -> None:
        try:
            piece = way.source.recv(PIECE)
        except OSError:
            self._break([way])
            return
        way.ended = not piece
        n, rate = self.network, self.network.up if way.up else self.network.down
        way.line_free = max(now, way.line_free) + (len(piece) * 8 / (rate * 1e6) if rate else 0.0)
        due = way.line_free + (n.rtt / 2 + self._rng.uniform(0, n.jitter)) / 1e3
        if way.queue:
            due = max(due, way.queue[-1][0])
        way.queue.append((due, piece, now))
        way.held += len(piece)

    def _give(self, way: Way) -> None:
        """Send what is due. A sink that does not read holds the others up no longer than a second; then its connection is broken."""
        while way.source in self._ways and way.queue and way.queue[0][0] <= time.monotonic() + LEAD:
            _due, piece, came = way.queue.popleft()
            way.held -= len(piece)
            try:
                if piece:
                    self.log.append((came, time.monotonic(), way.up, len(piece), way.number))  # first: whoever has the bytes may look here
                    way.sink.settimeout(1.0)
                    way.sink.sendall(piece)
                else:
                    way.sink.shutdown(socket.SHUT_WR)
                    back = self._ways[way.sink]
                    if back.ended and not back.queue:
                        self._break([way], reset=False)
            except OSError:
                self._break([way])

    def _break(self, ways: list[Way], reset: bool = True) -> None:
        for s in {s for way in ways for s in (way.source, way.sink)}:
            if self._ways.pop(s, None) is not None:
                if reset:
                    with contextlib.suppress(OSError):
                        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                s.close()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("target", help="HOST:PORT of the server")
    p.add_argument("--rtt", type=float, default=15.0, help="milliseconds there and back")
    p.add_argument("--jitter", type=float, default=0.0, help="milliseconds that a piece is late at most, each way")
    p.add_argument("--up", type=float, default=0.0, help="Mbit/s towards the server; 0: no limit")
    p.add_argument("--down", type=float, default=0.0, help="Mbit/s from the server; 0: no limit")
    p.add_argument("--drop-every", type=float, default=0.0, help="break all connections every so many seconds; 0: never")
    args = p.parse_args()
    if ":" not in args.target:
        raise SystemExit(f"bench.wan: {args.target!r} is no target: write it as HOST:PORT")
    with Wan(args.target, Network(args.rtt, args.jitter, args.up, args.down)) as wan:
        print(f"specedge://{wan.address}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(args.drop_every or 3600)
                wan.log.clear()
                if args.drop_every:
                    wan.drop()
                    print("dropped all connections", file=sys.stderr)


if __name__ == "__main__":
    main()
