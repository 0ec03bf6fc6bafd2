"""Filters: what Linux drops of what comes for a socket, before it costs anybody here anything.

Classic BPF (SO_ATTACH_FILTER), which needs no rights: a program sees every packet of a TCP socket from its TCP header on, and says how much of it may
pass. To attach one replaces the one before. A connection inherits that of the socket it was accepted from. Knows packets and sockets only, not
whose they are.
"""

import ctypes
import socket
import struct
from collections.abc import Mapping

ATTACH, DETACH = 26, 27  # SO_ATTACH_FILTER, SO_DETACH_FILTER
IP, RANDOM = 0xFFF00000, 0xFFFFF038  # where the IP header begins (SKF_NET_OFF), and 32 random bits (SKF_AD_OFF + SKF_AD_RANDOM)
LOAD, LOAD_BYTE, LENGTH, AND, SHIFT, TO_X, EQUAL, EQUAL_X, AT_LEAST, RETURN = 0x20, 0x30, 0x80, 0x54, 0x74, 0x07, 0x15, 0x1D, 0x35, 0x06
ALL = 0xFFFFFFFF
Instruction = tuple[int, int, int, int]  # what to do, how many to skip if a test holds, how many if not, and with which number


def deafen(s: socket.socket) -> None:
    """Take nothing from it."""
    _attach(s, [(RETURN, 0, 0, 0)])


def guard(s: socket.socket, shares: Mapping[bytes, float], silent: bool) -> None:
    """Of the connections that these addresses (4 bytes of IPv4, or the first 8 of IPv6) ask a listening socket for, let a random share come about:
    the other SYNs are dropped, and TCP repeats them after a second. Unless `silent`, no connection at all comes about before it brings data: the end
    of a handshake is dropped if it has none, and any data ends the handshake as well. Linux remembers so many, and makes cookies for more. FIN and
    RST are dropped: a connection that has come about stays until it is heard, so that it can be asked whose it is."""
    data: list[Instruction] = [  # whether there is something behind the header, whose length is four bits, of words of four bytes
        (LOAD_BYTE, 0, 0, 12), (SHIFT, 0, 0, 2), (AND, 0, 0, 0x3C), (TO_X, 0, 0, 0), (LENGTH, 0, 0, 0), (EQUAL_X, 1, 0, 0),
    ] * (not silent)  # fmt: skip
    n = len(data)
    head: list[Instruction] = [(LOAD_BYTE, 0, 0, 13), (AND, 0, 0, 0x07), (EQUAL, n + 3, 0, 0x02), (EQUAL, 0, n + 1, 0)]  # of FIN, SYN and RST
    rules = [i for address, share in shares.items() for i in _rule(address, share)]
    _attach(s, [*head, *data, (RETURN, 0, 0, ALL), (RETURN, 0, 0, 0), *rules, (RETURN, 0, 0, ALL)])


def hear(s: socket.socket) -> None:
    """Take everything again."""
    s.setsockopt(socket.SOL_SOCKET, DETACH, 0)


def _rule(address: bytes, share: float) -> list[Instruction]:
    version, at = (0x40, 12) if len(address) == 4 else (0x60, 8)
    code: list[Instruction] = [(LOAD, 0, 0, RANDOM), (AT_LEAST, 0, 1, int(share * ALL)), (RETURN, 0, 0, 0), (RETURN, 0, 0, ALL)]
    for i in reversed(range(0, len(address), 4)):
        code = [(LOAD, 0, 0, IP + at + i), (EQUAL, 0, len(code), int.from_bytes(address[i : i + 4], "big")), *code]
    return [(LOAD_BYTE, 0, 0, IP), (AND, 0, 0, 0xF0), (EQUAL, 0, len(code), version), *code]


def _attach(s: socket.socket, code: list[Instruction]) -> None:
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in code))
    s.setsockopt(socket.SOL_SOCKET, ATTACH, struct.pack("@HP", len(code), ctypes.addressof(program)))
