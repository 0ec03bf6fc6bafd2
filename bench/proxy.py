"""A bad network: a TCP proxy between an edge and a server that drops, delays and swallows, and counts and changes what passes.

Two threads a connection copy bytes, one each way. `target` may be changed at any time, so a server may be restarted on another port behind the same
address. With a `fate` it reads ZMTP 3 (RFC 23) and hands every frame that is no command to it; of what is in a frame it knows nothing.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

UP, DOWN = 0, 1  # to the server, to the edge
Fate = Callable[[int, bytes], list[bytes]]  # (way, frame with its header) -> the frames that go on in its place


class Proxy:
    """Listens on loopback and forwards to `target` (host, port)."""

    def __init__(self, endpoint: str, fate: Fate | None = None) -> None:
        self.retarget(endpoint)
        self.fate = fate
        self.bytes = [0, 0]  # that went each way
        self.delay = 0.0  # seconds that every piece of up to 64 kB is held, each way
        self.refuse = False  # new connections are closed at once
        self.silent = False  # bytes go nowhere, and nobody is told
        self.connections = 0  # so far
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"specedge://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._thread.start()

    def retarget(self, endpoint: str) -> None:
        """Forward new connections to the server at `endpoint`, as tcp://HOST:PORT."""
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self.target = (host, int(port))

    def drop(self) -> int:
        """Break all connections, as a router that forgets does: with a reset. Returns how many there were."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for s in pair:
                with contextlib.suppress(OSError):
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    s.shutdown(socket.SHUT_RDWR)
                s.close()
        return len(pairs)

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()
        self.drop()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listening.accept()[0]
            except OSError:
                return
            self.connections += 1
            try:
                if self.refuse:
                    raise ConnectionRefusedError
                far = socket.create_connection(self.target, 5)
            except OSError:
                near.close()
                continue
            for s in (near, far):
                with contextlib.suppress(OSError):
                    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.append((near, far))
            for way, (a, b) in enumerate(((near, far), (far, near))):
                threading.Thread(target=self._copy, args=(way, a, b), name="proxy-copy", daemon=True).start()

    def _copy(self, way: int, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):  # of a socket that was dropped before it was read
            for piece in self._pieces(way, source):
                if self.delay:
                    time.sleep(self.delay)
                if not self.silent:
                    sink.sendall(piece)
                    self.bytes[way] += len(piece)
        for s in (source, sink):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def _pieces(self, way: int, source: socket.socket) -> Iterator[bytes]:
        """What comes, as it goes on."""
        if self.fate is None:
            while piece := source.recv(65536):
                yield piece
            return
        with source.makefile("rb") as stream:
            for size in (10, 1, 53):  # ZeroMQ says each part of its greeting in answer to the one before
                yield _exactly(stream, size)
            while True:
                flags = _exactly(stream, 1)
                length = _exactly(stream, 8 if flags[0] & 2 else 1)
                frame = flags + length + _exactly(stream, int.from_bytes(length, "big"))
                yield from [frame] if flags[0] & 4 else self.fate(way, frame)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
