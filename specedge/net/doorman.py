"""Doorman: what bounds the connections of a ROUTER, how fast an address may open them, what each may send in one piece, and how often somebody may
ask to no purpose.

ZeroMQ accepts everybody for as long as there are descriptors, and puts a message of many frames together before anybody sees its first. What it
does tell is the descriptor of every connection that comes and goes, and of every message: so a connection can be shut down from here, and for ZeroMQ
its peer hung up; or deafened: the system takes nothing more from it, so that what it sends costs nobody anything, until it is heard again and sends
that once more, as TCP does. Likewise the listening socket: nobody is accepted who has not said anything (edges speak first), and of an address that
opens connections to no purpose only a share. A connection is a stranger until its WELCOME goes out. Where there are no descriptors left, one that has
been silent for long gives up its own: an account's connections are counted while they speak, and else a key could collect them all.
Knows nothing of messages, keys or sessions.
Linux alone says how much a connection has received, and can keep back what comes; elsewhere the former is not bounded, a flood is received to be
dropped, and whoever connects is accepted. Invariant: nothing is shut down or deafened but the very connection that was accepted.
"""

import contextlib
import ctypes
import ipaddress
import math
import os
import resource
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from specedge.net.filters import deafen, guard, hear

STRANGERS, OF_AN_ADDRESS = 512, 64  # at a time; whoever has been one for longest makes room for the next
SPARE = 128  # descriptors that are not for connections
QUIET = 60.0  # seconds without a message or verdict: twice those after which an account is free to have another connection
PIECE = 16_000_000  # bytes without a message: four times what may wait in ZeroMQ and in the system while nobody reads
TURN = 0.1  # seconds between two looks: at who came and went (in heaps: one by one they would wake the thread), and at how much has come
INFO, RECEIVED = 136, 128  # size of struct tcp_info up to the field tcpi_bytes_received, and where that begins
RATE, SAVED = 100.0, 1000.0  # frames to no purpose that an account may send per second, and may save up
MUTE = 1.0  # seconds for which it is not heard when it has sent more
FAREWELL = 1.0  # seconds in which a connection that is to end may read why
KNOCKS, KNOCKS_SAVED = 100.0, 128.0  # connections that an address may open per second without a WELCOME, and may save up
HALVING, HALVINGS = 16, 10  # so many more make the share that is let in half as large; and that at most so many times
TURNED_AWAY = 16  # addresses at a time: the program before and the next count together, and some systems have 20 KB for both
DIAL = 2  # connections that an edge opens for one WELCOME: the first only reads how the server wants to be spoken to
LINUX = sys.platform.startswith("linux")
COOKIES = Path("/proc/sys/net/ipv4/tcp_syncookies")  # without them those who say nothing would use up what Linux has for all who are coming
SILENT = not COOKIES.exists() or COOKIES.read_text().strip() == "0"  # whether a connection may come about that has said nothing
LIBC = ctypes.CDLL(None)  # once: to open it takes 13 us, and a flood of connections is hung up on hundreds of times a second
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Guest:
    """A connection. `received`: its bytes when it last brought a message."""

    name: tuple[object, ...]  # the peer's address and port
    account: object = None  # whose it is, once it has spoken
    received: int = 0
    spoke: bool = False  # since the last look
    heard: float = math.inf  # when it last said something, once it has, or was served
    deaf: float = 0.0  # until when nothing is taken from it; 0: it is heard
    ends: float = math.inf  # when it is shut down


@dataclass(slots=True, eq=False)
class Allowance:
    """What an account may still ask, or an address knock, to no purpose."""

    asked: float = 0.0  # less what a second makes good
    at: float = 0.0  # when that was so
    muted: float = 0.0  # until when it is not heard

    def spend(self, asked: float, now: float, rate: float) -> None:
        self.asked, self.at = max(0.0, max(0.0, self.asked - (now - self.at) * rate) + asked), now


class Doorman:
    """Watches the connections of `router`, in the thread that owns it, which calls `watch` ten times a second or more."""

    def __init__(self, router: "zmq.Socket[bytes]") -> None:
        self._router = router
        router.monitor(address := f"inproc://doorman-{id(self)}", zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._events = router.context.socket(zmq.PAIR)
        self._events.rcvhwm = 0  # else ZeroMQ would stand still where it has more to tell
        self._events.connect(address)
        self._most = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE)
        self._guests: dict[int, Guest] = {}  # by descriptor
        self._strangers: dict[int, bytes] = {}  # their addresses; the oldest first
        self._of: Counter[bytes] = Counter()  # strangers of an address
        self._routes: dict[bytes, int] = {}
        self._allowances: dict[object, Allowance] = {}
        self._knocks: dict[bytes, Allowance] = {}  # of addresses
        self._listener, self._shares = -1, dict[bytes, float]()  # of the SYNs of addresses, that reach the listening socket
        self._next = 0.0
        self._nothing, self._spare = (open(os.devnull, "rb", buffering=0) for _ in range(2))  # noqa: SIM115 (a server that never starts drops them)

    def __len__(self) -> int:
        return len(self._guests)

    def hears(self, descriptor: int, route: bytes, account: object, frames: float, now: float) -> bool:
        """Whether a frame that has come, and counts as `frames`, is to be heard. Every one is taken off what its account, or, without one, its
        connection may ask to no purpose; who asks more is not heard for a while: TCP keeps its frames back, and those that were here already are
        lost."""
        if route not in self._routes:
            self._look()  # it came after what is known
        if (guest := self._guests.get(descriptor)) is None:  # ipc, or gone already
            return True
        guest.spoke, guest.heard, guest.account, self._routes[route] = True, now, account or route, descriptor
        allowance = self._allowances.setdefault(guest.account, Allowance())
        if allowance.muted <= now:
            self._spend(allowance, frames, now)
        if allowance.muted <= now:
            return True
        if LINUX and not guest.deaf:
            guest.deaf = allowance.muted
            self._do(descriptor, deafen)
        return False

    def thank(self, route: bytes, account: object, frames: float, now: float) -> None:
        """A connection was served, and some frames of its account had a purpose; below 0, its questions cost so many more."""
        if guest := self._guests.get(self._routes.get(route, -1)):
            guest.heard = now
        if allowance := self._allowances.get(account or route):
            self._spend(allowance, -frames, now)

    def dismiss(self, accounts: Set[object], now: float) -> None:
        """Shut down what connections these accounts have, when they have had the time to read why."""
        for guest in self._guests.values():
            if guest.account in accounts:
                guest.ends = min(guest.ends, now + FAREWELL)

    def welcomed(self, route: bytes) -> None:
        """A connection is a stranger no more."""
        descriptor = self._routes.get(route, -1)
        if descriptor in self._strangers:
            knocks = self._knocks.setdefault(self._strangers[descriptor], Allowance())
            knocks.spend(-DIAL, knocks.at, KNOCKS)
        self._known(descriptor)

    def watch(self, now: float) -> None:
        """See who came and went, and shut down who is too many, or has sent more than a message can hold and no message."""
        if now < self._next:
            return
        self._next = now + TURN
        self._look()
        for descriptor, guest in list(self._guests.items()):
            if guest.deaf and guest.deaf <= now:
                guest.deaf = 0.0
                self._do(descriptor, hear)
            received = _with(descriptor, _received) or 0 if LINUX else 0
            if guest.ends <= now:
                self._shut(descriptor)
            elif guest.spoke:
                guest.spoke, guest.received = False, received
            elif received - guest.received > PIECE:
                self._shut(descriptor)
        self._turn_away(now)

    def close(self) -> None:
        self._router.disable_monitor()
        self._events.close(linger=0)
        self._spare.close()
        self._nothing.close()

    # ------------------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Take note of who came and went."""
        while self._events.poll(0):
            event = parse_monitor_message(self._events.recv_multipart())
            descriptor = int(event["value"])
            self._gone(descriptor)  # also if its end was not told
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._came(descriptor)
                if descriptor in self._guests and self._listener >= 0:
                    self._do(descriptor, hear)  # the filter of the listening socket, which it inherited
            elif event["event"] == zmq.EVENT_LISTENING and LINUX:
                self._listener = descriptor
                _with(descriptor, lambda s: guard(s, {}, SILENT) if s.family != socket.AF_UNIX else None)

    def _came(self, descriptor: int) -> None:
        name = _with(descriptor, socket.socket.getpeername)
        if not isinstance(name, tuple):  # gone already, or ipc
            return
        self._guests[descriptor], address = Guest(name), _address(str(name[0]))
        self._strangers[descriptor] = address
        self._of[address] += 1
        knocks = self._knocks.setdefault(address, Allowance())
        knocks.spend(1.0, max(knocks.at, self._next - TURN), KNOCKS)
        if self._of[address] > OF_AN_ADDRESS:
            self._shut(next(d for d, a in self._strangers.items() if a == address))
        elif len(self._guests) > self._most and (quiet := self._quietest()) is not None:
            self._shut(quiet)
        elif len(self._strangers) > STRANGERS or len(self._guests) > self._most:
            self._shut(next(iter(self._strangers)))

    def _quietest(self) -> int | None:
        """Of those that were welcomed and have been silent for long, the one that has been for longest."""
        known = [d for d in self._guests if d not in self._strangers]
        quietest = min(known, key=lambda d: self._guests[d].heard, default=None)
        return quietest if quietest is not None and self._next - self._guests[quietest].heard > QUIET else None

    def _known(self, descriptor: int) -> None:
        address = self._strangers.pop(descriptor, None)
        if address is not None:
            self._of[address] -= 1
            if not self._of[address]:
                del self._of[address]

    def _gone(self, descriptor: int) -> None:
        self._known(descriptor)
        if self._guests.pop(descriptor, None) is not None:
            for route in [r for r, d in self._routes.items() if d == descriptor]:
                del self._routes[route]
                self._allowances.pop(route, None)

    def _shut(self, descriptor: int) -> None:
        self._do(descriptor, _hang_up)
        self._gone(descriptor)

    def _do(self, descriptor: int, call: Callable[[socket.socket], None]) -> None:
        """Do it to a connection that was accepted; its descriptor may be somebody else's by now, or in the next moment: so a duplicate is looked at,
        which stays what it is. There is a place for it also when a flood has taken all others."""
        name = self._guests[descriptor].name
        with contextlib.suppress(OSError):
            os.dup2(descriptor, self._spare.fileno(), inheritable=False)
            _with(self._spare.fileno(), lambda s: call(s) if s.getpeername() == name else None)
        os.dup2(self._nothing.fileno(), self._spare.fileno(), inheritable=False)

    def _turn_away(self, now: float) -> None:
        """The more connections of an address came to nothing, the smaller the share of its SYNs that pass: it settles where KNOCKS a second do.
        Shares and not pauses: an honest edge there, which repeats its SYN, has its chance at any time, and what comes does not come in heaps."""
        shares = dict[bytes, float]()
        for address, knocks in list(self._knocks.items()):
            knocks.spend(0.0, now, KNOCKS)
            halvings = (knocks.asked - KNOCKS_SAVED) / HALVING
            if halvings > 0:
                knocks.asked = min(knocks.asked, KNOCKS_SAVED + HALVINGS * HALVING)
                shares[address] = 0.5 ** min(halvings, HALVINGS)
            elif not knocks.asked:
                del self._knocks[address]
        if LINUX and shares != self._shares:
            worst = {a: shares[a] for a in sorted(shares, key=shares.__getitem__)[:TURNED_AWAY]}

            def attach(s: socket.socket) -> dict[bytes, float]:
                guard(s, worst, SILENT)
                return shares

            self._shares = _with(self._listener, attach) or {}  # none: Linux bounds what filters may take; in the next look, then

    @staticmethod
    def _spend(allowance: Allowance, frames: float, now: float) -> None:
        allowance.spend(frames, now, RATE)
        if allowance.asked > SAVED:
            allowance.asked, allowance.muted = SAVED, now + MUTE


def _hang_up(s: socket.socket) -> None:
    """Linux goes on to take what comes for a socket that is shut down, but not for one that was connected to nobody: the peer gets a reset."""
    s.shutdown(socket.SHUT_RDWR)
    if LINUX:
        LIBC.connect(s.fileno(), bytes(16), 16)  # of the family AF_UNSPEC, which Python cannot express


def _received(s: socket.socket) -> int:
    return int(struct.unpack_from("=Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO), RECEIVED)[0])


def _address(host: str) -> bytes:
    """What counts as one: of IPv6 the first 64 bits, for the others are its owner's to choose."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).packed[:8]


def _with(descriptor: int, call: Callable[[socket.socket], T]) -> T | None:
    """What `call` says of a descriptor that belongs to ZeroMQ and is not closed here; None if it is no connection any more."""
    try:
        s = socket.socket(fileno=descriptor)
    except OSError:
        return None
    try:
        return call(s)
    except (OSError, struct.error):
        return None
    finally:
        s.detach()
