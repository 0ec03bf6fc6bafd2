"""A bad network: a TCP proxy between an edge and a server that drops, delays and swallows.

Two threads a connection copy bytes, one each way. `target` may be changed at any time, so a server may be restarted on another port behind the same
address. Knows nothing of ZeroMQ or of frames; whole bytes in order is all it promises, as TCP does.
"""

import contextlib
import socket
import struct
import threading
import time


class Proxy:
    """Listens on loopback and forwards to `target` (host, port)."""

    def __init__(self, endpoint: str) -> None:
        self.retarget(endpoint)
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
            with self._lock:
                self._pairs.append((near, far))
            for a, b in ((near, far), (far, near)):
                a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._copy, args=(a, b), name="proxy-copy", daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                if self.delay:
                    time.sleep(self.delay)
                if not self.silent:
                    sink.sendall(piece)
        for s in (source, sink):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
