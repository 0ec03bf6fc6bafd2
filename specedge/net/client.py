"""Connection: one edge's DEALER socket, its address, its handshake, its count of bytes.

Sends and receives typed messages; knows nothing of rounds, trees or models. Invariants: used by one thread at a time; if the address names a key,
only its holder is spoken to, and never in plain text; once broken it stays so, though ZeroMQ would connect again in silence: to the server that would
be somebody else.
"""

import socket
import time
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import zmq
from zmq.utils.monitor import recv_monitor_message

from specedge import __version__
from specedge.config import SpecedgeError
from specedge.net import wire
from specedge.net.auth import CURVE_EXTRA, AuthError, load, public_key


class ServerError(SpecedgeError):
    """A server that cannot be reached, does not answer, or refuses. `code` says what it refuses: a word of the protocol, "protocol" itself, "address"
    for one that does not fit the server, or "server key" where its key looks like another one; without a code the same may go well the next time."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


def endpoint(address: str) -> tuple[str, int, str]:
    """Host, port and public key, "" without one, of `specedge://host:port/?key=...`."""
    try:
        parts = urlsplit(address)
        host, port, query = parts.hostname, parts.port, parse_qsl(parts.query, keep_blank_values=True)
        right = parts.scheme == "specedge" and parts.path in ("", "/") and [name for name, _ in query] in ([], ["key"])
        if right and host and port and host.encode("idna"):
            return host, port, public_key(query[0][1]) if query else ""
    except (ValueError, AuthError):  # UnicodeError, of names that no host can have, is a ValueError too
        pass
    raise ServerError(f"{address!r} is no server address: write it as specedge://HOST:PORT, or with /?key=... as the server prints it")


def mechanism(host: str, port: int, timeout: float) -> bytes:
    """How a ZeroMQ server at this address wants to be spoken to: NULL, in plain text, CURVE, or b"" if it is something else. OSError.

    Two sides that do not agree only see each other hang up, or not even that, depending on who was first (of 40 attempts 29 in one way, 11 in the
    other). So this reads the server's greeting (ZMTP 3, RFC 23), which it sends after the first 11 bytes of ours, and leaves."""
    end = time.monotonic() + timeout
    with socket.create_connection((host, port), timeout) as s:
        greeting = b""
        try:
            s.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
            while len(greeting) < 32 and (left := end - time.monotonic()) > 0:
                s.settimeout(left)
                more = s.recv(32 - len(greeting))
                if not more:
                    break
                greeting += more
        except OSError:
            return b""
    return greeting[12:].rstrip(b"\0") if len(greeting) == 32 and greeting[0] == 0xFF else b""


class Connection:
    """A connection to the server at `address`, made and greeted within `timeout` seconds or ServerError. `key`: the file of the edge's secret key,
    which an address with a key asks for; AuthError if it cannot be used. `address` is afterwards the short form, without the key."""

    def __init__(self, address: str, tokenizer: bytes, key: str | Path | None = None, timeout: float = 5.0) -> None:
        host, port, server_key = endpoint(address)
        self.address, self._tokenizer = address.partition("/?")[0], tokenizer
        if server_key and key is None:
            raise ServerError(f"{self.address} serves known keys only: make one with `specedge-edge keygen`, and have it authorised there", "key")
        own = load(Path(key)) if server_key and key is not None else None
        try:  # a plain connection first: ZeroMQ retries in silence where there is nothing to connect to
            found = mechanism(host, port, timeout)
        except OSError as e:
            raise ServerError(f"no server at {self.address}: {e.strerror or e}; check the address and that specedge-server runs") from None
        self._strange = ServerError(f"{self.address} does not answer as a specedge server within {timeout:.0f} s: check the port")
        if found not in (b"NULL", b"CURVE"):
            raise self._strange
        if found == b"CURVE" and not own:
            text = f"{self.address} takes encrypted connections only: use the whole address, with /?key=..., that the server printed"
            raise ServerError(text, "address")
        if found == b"NULL" and own:
            text = f"{self.address} does not encrypt, but the address names its key: check who listens there, or leave out /?key=..."
            raise ServerError(text, "address")
        most = wire.SIZES[-1] + (CURVE_EXTRA if own else 0)
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 500), (zmq.MAXMSGSIZE, most), (zmq.SNDHWM, 64), (zmq.RCVHWM, 2048), (zmq.IMMEDIATE, 1), (zmq.HANDSHAKE_IVL, 5000),
            (zmq.HEARTBEAT_IVL, 5000), (zmq.HEARTBEAT_TIMEOUT, 15000), (zmq.HEARTBEAT_TTL, 20000), (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 10000), (zmq.IPV6, 1), (zmq.SNDTIMEO, int(timeout * 1000)),
        ):  # fmt: skip
            self.socket.setsockopt(option, value)
        if own:
            self.socket.curve_serverkey, self.socket.curve_publickey = bytes.fromhex(server_key), bytes.fromhex(own.public)
            self.socket.curve_secretkey = own.secret
        self._monitor = self.socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED
        )
        self.sockets = (self.socket, self._monitor)  # to poll
        self._early: list[tuple[wire.Message, int]] = []  # came with the greeting
        try:
            self.socket.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
            self._shake_hands(timeout, own.public if own else "")
            self.welcome = self.ask(timeout)
            self.socket.setsockopt(zmq.SNDTIMEO, 1000)  # from here on a full or lost connection is a fault
        except BaseException:
            self.close()
            raise

    def greet(self) -> None:
        """Say HELLO, which may be repeated at any time."""
        self.send(wire.Hello(f"specedge {__version__}", self._tokenizer))

    def _shake_hands(self, timeout: float, key: str) -> None:
        """Wait until the connection stands; whatever the monitor says from then on means that it broke. A refusal is an event and nothing else: the
        socket itself would be silent for ever."""
        end, broken = time.monotonic() + timeout, 0
        while (left := end - time.monotonic()) > 0:
            if not self._monitor.poll(int(left * 1000) + 1):
                continue
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise ServerError(f"the server at {self.address} does not know this key: have its operator authorise {key}", "key")
            broken += event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            if broken == 2 and key:  # once may have been the network
                text = f"the server at {self.address} has another key than the address says: copy the address that it printed again"
                raise ServerError(text, "server key")
        raise self._strange

    def ask(self, timeout: float = 5.0) -> wire.Welcome:
        """Say HELLO and wait for the answer, forgetting what comes before it."""
        end = time.monotonic() + timeout
        self.greet()
        while (left := end - time.monotonic()) > 0:
            if self.socket.poll(int(left * 1000) + 1):
                messages = self.receive()
                for i, (message, _size) in enumerate(messages):
                    if isinstance(message, wire.Welcome):
                        self._early = messages[i + 1 :]
                        return message
                    if isinstance(message, wire.Error):
                        raise ServerError(f"the server at {self.address} refuses: {message.text}", message.code)
                    if isinstance(message, wire.Busy):
                        raise ServerError(f"the server at {self.address} is busy: {message.text}")
        raise self._strange

    def send(self, message: wire.Message) -> int:
        """Send a message; returns the bytes of its frame."""
        frame = wire.encode(message)
        if self._monitor.poll(0):
            raise self._lost()
        try:
            self.socket.send(frame)
        except zmq.Again:
            raise self._lost() from None
        return len(frame)

    @property
    def pending(self) -> bool:
        """Whether there is something to receive."""
        return bool(int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def receive(self) -> list[tuple[wire.Message, int]]:
        """All messages that have come, each with the bytes of its frame. ServerError for a frame that is not ours and, when there is nothing left
        to read, for a connection that broke."""
        messages, self._early = self._early, []
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                if len(frames) != 1:
                    raise wire.WireError(f"a message of {len(frames)} frames; one is allowed")
                messages.append((wire.decode(frames[0]), len(frames[0])))
            except wire.WireError as e:
                raise ServerError(f"{self.address} does not speak this protocol: {e}", "protocol") from None
        if not messages and self._monitor.poll(0):
            raise self._lost()
        return messages

    def _lost(self) -> ServerError:
        return ServerError(f"the connection to {self.address} is lost: check the network and that specedge-server runs")

    def close(self) -> None:
        """Close the socket, giving frames on their way half a second."""
        self._context.destroy(linger=500)
