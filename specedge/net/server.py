"""Server: a ROUTER socket in one thread, the engine in another.

The network thread decodes frames and queues them; the engine thread applies them between steps and queues the answers, waking the poller through an
inproc PAIR. All trees that came while a step ran are verified in the next one, unless the pipeline knows better: that is the batching. Knows
nothing of protocol rules (sessions.py) or of models. Invariants: only the network thread touches the ROUTER, only the engine thread touches the
engine; a fault in one request never reaches another; with keys, nothing reaches the engine from a key that is not authorised at that moment.
"""

import contextlib
import ipaddress
import logging
import queue
import socket
import threading
import time
from collections import deque
from pathlib import Path

import zmq

from specedge.config import SpecedgeError
from specedge.engine.cost import ALL
from specedge.engine.engine import Engine
from specedge.engine.pipeline import Pipeline
from specedge.engine.texts import UseError
from specedge.net import wire
from specedge.net.auth import CURVE_EXTRA, LIMITS, Authenticator
from specedge.net.doorman import Doorman
from specedge.net.quota import Quota
from specedge.net.sessions import Peer, Reply, Sessions

log = logging.getLogger(__name__)
INBOX = 256  # messages that may wait for the engine: of the largest size they are 16 MB
LATEST = 128  # of them that are read before the verdicts of a step leave: what has grown meanwhile is among them
IDLE = 0.1  # seconds after which an engine without work looks up
PURPOSE = 12.0  # frames that a verified round makes good: what grew meanwhile comes in up to 8, and a text may begin and end with it
BUSY = 0.9  # of a frame: who waits for a place in a full server has to ask
UNIT = 8192  # bytes that count as a frame: to take 16,000 ids costs the engine's thread as much as ten small messages
Inbound = tuple[Peer, wire.Message | None, float] | frozenset[str]  # and when it came; None: the peer is gone; a set: users who may be here no more


class ListenError(SpecedgeError):
    """An address that cannot be served on."""


def is_private(endpoint: str) -> bool:
    """Whether an endpoint stays on this machine: ipc, or a loopback address."""
    if endpoint.startswith("ipc://"):
        return True
    host = endpoint.removeprefix("tcp://").rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _purpose(message: wire.Busy | wire.Verdict, size: int) -> float:
    """Frames that what it answers makes good; below 0, what it costs. A verdict that nobody has waited for is one of a stream, for which an edge has
    nothing to say; one without rows says again what is known, and may be 128 times as long as the question."""
    if isinstance(message, wire.Busy):
        return BUSY
    return PURPOSE * (message.queue_us > 0 or message.next > 0) if message.verified else -(size // UNIT)


def address(endpoint: str) -> str:
    """What an edge is told of an endpoint that was bound, without the key."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if host in ("0.0.0.0", "[::]"):  # all of this machine's addresses: its name is the best guess at what others call it
        return f"specedge://{socket.gethostname()}:{port}"
    return endpoint.replace("tcp://", "specedge://")


class Server:
    """Serves `engine` on `listen` until `stop`, which must be called even if `start` never was. Binds at construction: `endpoint` then holds the
    real address, and `address` what an Edge is given. `keys`: a directory that `specedge-server keygen` made; only keys that are authorised there are
    served, and all traffic is encrypted. `pipeline`: let sessions take turns, or wait for each other, where that gives more tokens per second; else
    whatever is ready is verified at once. Between `start` and `stop` nobody else can use the engine, which stays open. Or use it as a context
    manager. Raises ListenError for an address that cannot be served on, AuthError for keys that cannot be used."""

    def __init__(
        self, engine: Engine, listen: str = "tcp://127.0.0.1:0", *, model: bytes = b"", keys: str | Path | None = None, insecure: bool = False,
        pipeline: bool = True,
    ) -> None:  # fmt: skip
        if not listen.startswith(("tcp://", "ipc://")):
            raise ListenError(f"{listen!r} is no address to listen on: write it as tcp://HOST:PORT")
        port = listen.rsplit(":", 1)[-1]
        if listen.startswith("tcp://") and not (port == "*" or (port.isdecimal() and int(port) < 65536)):  # libzmq takes it modulo 65536
            raise ListenError(f"cannot listen on {listen}: the port must be a number from 0 to 65535")
        if not (keys or insecure or is_private(listen)):
            raise ListenError(
                f"{listen} can be reached from other machines, and traffic is not encrypted: give --keys, listen on 127.0.0.1, or pass --insecure"
            )
        self._sessions = Sessions(engine, model, quota=self._quota)
        self._engine, self.pipeline = engine, Pipeline(engine.cost) if pipeline else None
        self._inbox: queue.SimpleQueue[Inbound] = queue.SimpleQueue()
        self._outbox: deque[Reply] = deque()
        self._started: queue.SimpleQueue[UseError | None] = queue.SimpleQueue()  # whether the engine could be had
        self._drain: float | None = None  # seconds that the open sessions have, once that is decided
        self._stopping, self._silent = threading.Event(), threading.Event()  # end the engine's thread, then the network's
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._authenticator: Authenticator | None = None
        if keys:
            try:
                self._authenticator = Authenticator(self._context, Path(keys))
            except BaseException:
                self._context.destroy(linger=0)
                raise
            self._router.curve_server, self._router.curve_secretkey = True, self._authenticator.keys.secret
            self._router.zap_domain = b"specedge"
            self._router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # else a dead authenticator would let anybody in (measured)
        most = wire.SIZES[-1] + (CURVE_EXTRA if keys else 0)
        for option, value in (
            (zmq.LINGER, 500), (zmq.MAXMSGSIZE, most), (zmq.ROUTER_MANDATORY, 1), (zmq.SNDHWM, 2048), (zmq.RCVHWM, 64),
            (zmq.HANDSHAKE_IVL, 5000), (zmq.HEARTBEAT_IVL, 5000), (zmq.HEARTBEAT_TIMEOUT, 15000), (zmq.HEARTBEAT_TTL, 20000), (zmq.BACKLOG, 512),
            (zmq.IPV6, "[" in listen),
        ):  # fmt: skip
            self._router.setsockopt(option, value)
        self._doorman = Doorman(self._router)
        try:
            self._router.bind(listen)
        except zmq.ZMQError as e:
            self._context.destroy(linger=0)
            raise ListenError(f"cannot listen on {listen}: {e.strerror}") from None
        self.endpoint: str = self._router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self.address = address(self.endpoint) + (f"/?key={self._authenticator.keys.public}" if self._authenticator else "")
        self._engine_thread = threading.Thread(target=self._engine_loop, name="specedge-engine")
        self._network_thread = threading.Thread(target=self._network_loop, name="specedge-network")

    def start(self) -> None:
        """Begin to serve; returns at once. Raises UseError if the engine is closed or in another thread's hands."""
        self._engine_thread.start()
        if (refused := self._started.get()) is not None:
            raise refused
        if self._authenticator:
            self._authenticator.start()
        self._network_thread.start()

    def stop(self, drain: float = 0.0, hurry: threading.Event | None = None) -> None:
        """Tell all edges to go away and refuse new sessions, serve the open ones for up to `drain` seconds or until `hurry` is set, then end both
        threads."""
        self._drain = drain
        hurry, end = hurry or threading.Event(), time.monotonic() + drain
        while len(self._sessions) and time.monotonic() < end and not hurry.wait(0.02):
            pass
        for event, thread in ((self._stopping, self._engine_thread), (self._silent, self._network_thread)):
            event.set()
            if thread.ident is not None:
                thread.join()
        if self._authenticator:
            self._authenticator.stop()
        self._context.destroy(linger=500)

    def close(self) -> None:
        """Stop at once."""
        self.stop()

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return self._engine_thread.is_alive() and self._network_thread.is_alive()

    def __enter__(self) -> "Server":
        try:
            self.start()
        except UseError:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------------
    # the engine's thread

    def _quota(self, user: str) -> Quota:
        """What the list of keys allows a user by now."""
        grant = self._authenticator.users.get(user) if self._authenticator else None
        return Quota(**{name: most for name in LIMITS if (most := getattr(grant, name, None)) is not None})

    def _engine_loop(self) -> None:
        try:
            with self._engine.guard:
                self._started.put(None)
                self._serve()
        except UseError as e:
            self._started.put(e)

    def _serve(self) -> None:
        wake = self._context.socket(zmq.PAIR)
        wake.connect("inproc://wake")
        expire_at = wait = 0.0
        while not self._stopping.is_set():
            if self._drain is not None and not self._sessions.draining:
                self._reply(wake, self._sessions.drain(time.monotonic(), self._drain))
            self._reply(wake, self._apply(wait))
            if (now := time.monotonic()) > expire_at:  # only now: what was said during a long step is no silence
                self._sessions.expire(now)
                expire_at = now + 1.0
            self._sessions.settle(now)
            wait = IDLE
            if self._engine.busy:
                wait, most = self._pace()
                if wait <= 0:
                    self._reply(wake, self._step(most))
        self._reply(wake, self._sessions.end("draining", "the server has shut down: connect to another one"))
        wake.close(linger=0)

    def _reply(self, wake: zmq.Socket[bytes], replies: list[Reply]) -> None:
        if replies:
            self._outbox.extend(replies)
            with contextlib.suppress(zmq.Again):  # so many wake-ups are under way that one more is not needed
                wake.send(b"", zmq.NOBLOCK)

    def _apply(self, wait: float, most: int = INBOX) -> list[Reply]:
        """Take the messages that have come, but not for ever; wait so many seconds for the first."""
        replies: list[Reply] = []
        try:
            for i in range(most):
                item = self._inbox.get(timeout=wait) if wait > 0 and i == 0 else self._inbox.get_nowait()
                if isinstance(item, frozenset):
                    replies += self._sessions.revoke(item, time.monotonic())
                    continue
                peer, message, came = item
                if message is None:
                    self._sessions.forget(peer, time.monotonic())
                else:
                    replies += self._sessions.handle(peer, message, came)
        except queue.Empty:
            pass
        return replies

    def _pace(self) -> tuple[float, int]:
        """Seconds to wait before the next step, if nothing comes meanwhile, and how many sequences it is for."""
        now = time.monotonic()
        turns = self._engine.turns(now) if self.pipeline else None
        if not turns or not self.pipeline:
            return 0.0, ALL
        when, most = self.pipeline.decide(turns, now)
        return min(when - now, IDLE), most

    def _step(self, most: int) -> list[Reply]:
        begun = time.monotonic()
        try:
            found = self._engine.step(most)
            ended = time.monotonic()
            replies = self._apply(0.0, LATEST)
            return replies + self._sessions.verdicts(found, ended, ended - begun)
        except Exception:
            log.exception("a step failed; all sessions are dropped")
            return self._sessions.end("internal", "the server failed in a step and dropped this session: open it again")

    # ------------------------------------------------------------------------------------------------------------------
    # the network's thread

    def _network_loop(self) -> None:
        wake = self._context.socket(zmq.PAIR)
        wake.bind("inproc://wake")
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(wake, zmq.POLLIN)
        seen = self._authenticator.users if self._authenticator else {}
        while not self._silent.is_set() and (self._authenticator is None or self._authenticator.alive):  # whoever watches `alive` ends the rest
            if self._authenticator and self._authenticator.users is not seen:
                before, seen = seen, self._authenticator.users
                self._inbox.put(gone := frozenset(before.keys() - seen.keys()))
                self._doorman.dismiss(gone, time.monotonic())
            # an engine that is behind leaves the rest to ZeroMQ, whose queues are bounded too
            poller.modify(self._router, zmq.POLLIN if self._inbox.qsize() < INBOX else 0)
            ready = dict(poller.poll(100))
            self._doorman.watch(time.monotonic())
            if wake in ready:
                wake.recv()
            while self._outbox:
                self._send(*self._outbox.popleft())
            if self._router in ready:
                self._receive()
        while self._outbox:
            self._send(*self._outbox.popleft())
        wake.close(linger=0)
        self._doorman.close()
        self._router.close()

    def _send(self, peer: Peer, message: wire.Message) -> None:
        frame = wire.encode(message)
        if isinstance(message, wire.Welcome):
            self._doorman.welcomed(peer.route)
        elif isinstance(message, wire.Busy | wire.Verdict):
            self._doorman.thank(peer.route, peer.user, _purpose(message, len(frame)), time.monotonic())
        try:
            self._router.send_multipart([peer.route, frame], zmq.NOBLOCK)
        except zmq.ZMQError:  # gone, or it does not read: its sessions lapse, nobody waits for it
            self._inbox.put((peer, None, time.monotonic()))

    def _receive(self) -> None:
        now = time.monotonic()
        for _ in range(64):  # then look at the outbox again
            try:
                route, *body = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer, descriptor = Peer(route.bytes, str(body[0].get("User-Id")) if self._authenticator else ""), -1
            with contextlib.suppress(zmq.ZMQError):  # of protocols before ZMTP 3, where a message does not know its connection
                descriptor = body[-1].get(zmq.SRCFD)
            if not self._doorman.hears(descriptor, peer.route, peer.user, max(1.0, sum(map(len, body)) / UNIT), now):
                continue
            if self._authenticator and peer.user not in self._authenticator.users:
                self._doorman.dismiss({peer.user}, now)  # a key that was revoked before it said anything
                continue
            if len(body) != 1:
                self._refuse(peer, f"a message of {len(body)} frames; one is allowed")
                continue
            try:
                message = wire.decode(body[0].bytes)
            except wire.WireError as e:
                self._refuse(peer, str(e))
                continue
            self._inbox.put((peer, message, now))

    def _refuse(self, peer: Peer, why: str) -> None:
        self._send(peer, wire.Error(wire.NO_SESSION, "frame", why[:300]))
