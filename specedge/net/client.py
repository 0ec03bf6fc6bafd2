"""Connection: one edge's DEALER socket, its addresses, its handshake, its count of bytes.

Sends and receives typed messages; knows nothing of rounds, trees or models. Invariant: used by the thread that made it.
"""

import socket
import time
from urllib.parse import urlsplit

import zmq

from specedge import __version__
from specedge.config import SpecedgeError
from specedge.net import wire


class ServerError(SpecedgeError):
    """A server that cannot be reached, does not answer, or refuses; `code` is the protocol's, where there is one."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


def endpoint(address: str) -> tuple[str, int]:
    """Host and port of `specedge://host:port`."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
        if parts.scheme == "specedge" and host and port and host.encode("idna"):
            return host, port
    except ValueError:  # UnicodeError, of names that no host can have, is one too
        pass
    raise ServerError(f"{address!r} is no server address: write it as specedge://HOST:PORT")


class Connection:
    """A connection to the server at `specedge://host:port`, made and greeted within `timeout` seconds or ServerError."""

    def __init__(self, address: str, tokenizer: bytes, timeout: float = 5.0) -> None:
        host, port = endpoint(address)
        self.address, self._tokenizer = address, tokenizer
        try:  # a plain connection first: ZeroMQ retries in silence where there is nothing to connect to
            socket.create_connection((host, port), timeout).close()
        except OSError as e:
            raise ServerError(f"no server at {address}: {e.strerror or e}; check the address and that specedge-server runs") from None
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 500), (zmq.MAXMSGSIZE, wire.SIZES[-1]), (zmq.SNDHWM, 64), (zmq.RCVHWM, 2048), (zmq.IMMEDIATE, 1), (zmq.HANDSHAKE_IVL, 5000),
            (zmq.HEARTBEAT_IVL, 5000), (zmq.HEARTBEAT_TIMEOUT, 15000), (zmq.HEARTBEAT_TTL, 20000), (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 10000), (zmq.IPV6, 1), (zmq.SNDTIMEO, int(timeout * 1000)),
        ):  # fmt: skip
            self.socket.setsockopt(option, value)
        try:
            self.socket.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
            self.welcome = self._welcomed(timeout)
            self.socket.setsockopt(zmq.SNDTIMEO, 1000)  # from here on a full or lost connection is a fault
        except BaseException:
            self.close()
            raise

    def greet(self) -> None:
        """Say HELLO, which may be repeated at any time."""
        self.send(wire.Hello(f"specedge {__version__}", self._tokenizer))

    def _welcomed(self, timeout: float) -> wire.Welcome:
        strange = ServerError(f"{self.address} does not answer as a specedge server within {timeout:.0f} s: check the port")
        end = time.monotonic() + timeout
        try:
            self.greet()
        except ServerError:
            raise strange from None
        while (left := end - time.monotonic()) > 0:
            if self.socket.poll(int(left * 1000) + 1):
                for message, _size in self.receive():
                    if isinstance(message, wire.Welcome):
                        return message
                    if isinstance(message, wire.Error):
                        raise ServerError(f"the server at {self.address} refuses: {message.text}", message.code)
        raise strange

    def send(self, message: wire.Message) -> int:
        """Send a message; returns the bytes of its frame."""
        frame = wire.encode(message)
        try:
            self.socket.send(frame)
        except zmq.Again:
            raise ServerError(f"the connection to {self.address} is lost: check the network and that specedge-server runs") from None
        return len(frame)

    def receive(self) -> list[tuple[wire.Message, int]]:
        """All messages that have come, each with the bytes of its frame; a frame that is not ours is a ServerError."""
        messages: list[tuple[wire.Message, int]] = []
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                if len(frames) != 1:
                    raise wire.WireError(f"a message of {len(frames)} frames; one is allowed")
                messages.append((wire.decode(frames[0]), len(frames[0])))
            except wire.WireError as e:
                raise ServerError(f"{self.address} does not speak this protocol: {e}") from None

    def close(self) -> None:
        """Close the socket, giving frames on their way half a second."""
        self._context.destroy(linger=500)
