"""The wire: golden bytes of version 2.0, round trips, the bounds of every field, and hostile frames.

`golden/2.0/*.hex` are frames that have been on the network: they are never made anew, a change that breaks them is a new version. The
tables below (MESSAGES, KINDS) repeat the protocol by hand, so that a changed bound or order of fields in wire.py fails here.
FUZZ_FRAMES sets the number of fuzzed frames.
"""

import os
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specedge.net import wire
from specedge.net.wire import (
    Busy,
    Cancel,
    Close,
    Draft,
    Error,
    GoAway,
    Gone,
    Grown,
    Hello,
    Lease,
    Limits,
    Load,
    Message,
    NeedPrefill,
    Open,
    Opened,
    Prompt,
    Resume,
    Resumed,
    Sampling,
    Verdict,
    Welcome,
    WireError,
    decode,
    encode,
    pack_ids,
    unpack_ids,
    unpack_tree,
)
from specedge.tree import GROWN, TreeError

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden" / "2.0"
FUZZ = int(os.environ.get("FUZZ_FRAMES", "20000"))
SIZES = (512, 2048, 65536)
SID = bytes(range(0xA0, 0xB0))
pack = msgspec.msgpack.encode

# name: (struct, number, kind of every field, fields without a default, a message that uses every byte width)
MESSAGES: dict[str, tuple[type[Message], int, tuple[str, ...], int, Message]] = {
    "hello": (Hello, 1, ("text", "digest"), 2, Hello("specedge 0.1.0 é", bytes(range(32)))),
    "welcome": (
        Welcome, 2, ("text", "digest", "digest", "u32", "eos", "limits", "u32", "load", "u32", "u32", "u16"), 8,
        Welcome(
            "specedge 0.1.0", bytes(range(32)), bytes(range(32, 64)), 151_936, [151_645, 2], Limits(63, 32_768, 100), 30_000,
            Load(3, 900_000, 1_000_000), 82_000, 4_500_000, 9,
        ),
    ),
    "open": (
        Open, 3, ("session", "first_tokens", "u32", "u32", "sampling", "stop_ids", "u32", "u32", "batch"), 7,
        Open(
            SID, pack_ids([1, 70_000, 151_935]), 5, 3, Sampling(0.8, 2**64 - 2, 40, 0.95, 0.05, 1.1, 0.5, -0.5, 3, pack_ids([7, 9]), bytes(16)),
            [151_645, 0], 4096, 300, 1,
        ),
    ),
    "prompt": (Prompt, 4, ("session", "u32", "tokens"), 3, Prompt(SID, 16_000, pack_ids(list(range(300, 420))))),
    "opened": (Opened, 5, ("session", "u32"), 2, Opened(SID, 16_120)),
    "draft": (
        Draft, 6, ("session", "u32", "u32", "tree_tokens", "tree_parents", "u32", "u8"), 5,
        Draft(SID, 3, 300, pack_ids([9707, 11, 9707, 151_935]), bytes([0, 1, 1, 2]), 70_000, 31),
    ),
    "verdict": (
        Verdict, 7, ("session", "u32", "u32", "tokens", "u16", "finish", "u8", "u32", "u32", "u16", "u32", "u32", "u8"), 9,
        Verdict(SID, 3, 300, pack_ids([9707, 11]), 5, 0, 31, 250, 70_000, 300, 4, 3, 12),
    ),
    "cancel": (Cancel, 8, ("session",), 1, Cancel(SID)),
    "close": (Close, 9, ("session",), 1, Close(SID)),
    "lease": (Lease, 10, ("session",), 1, Lease(SID)),
    "resume": (Resume, 11, ("session",), 1, Resume(SID)),
    "resumed": (Resumed, 12, ("session", "u32", "u32"), 3, Resumed(SID, 301, 3)),
    "need_prefill": (NeedPrefill, 13, ("session",), 1, NeedPrefill(SID)),
    "gone": (Gone, 14, ("session",), 1, Gone(SID)),
    "busy": (Busy, 16, ("session", "u32", "text", "u32"), 3, Busy(SID, 1500, "all 100 sessions are taken", 3)),
    "goaway": (GoAway, 17, ("u32",), 1, GoAway(30_000)),
    "grown": (
        Grown, 18, ("session", "u32", "u16", "grown_tokens", "grown_parents", "grown_steps"), 6,
        Grown(SID, 3, 5, pack_ids([11, 151_935]), bytes([4, 0, 5, 0]), bytes([22, 255])),
    ),
    "error": (Error, 15, ("session", "code", "text", "u32"), 3, Error(SID, "tree", "row 3 names row 7 as its parent, which is not before it", 3)),  # noqa: E501
}  # fmt: skip

NOT_INT: list[object] = [None, True, 1.0, 1.5, "1", b"1", [], [1], {}, {"a": 1}]
NOT_BYTES: list[object] = [None, False, 0, 1.0, "0123456789abcdef", [], [0] * 16, {}]
NOT_TEXT: list[object] = [None, True, 7, 1.0, b"text", ["text"], {}]
NOT_ARRAY: list[object] = [None, True, 7, 1.0, b"", "", {}]
TOO_LARGE = [-1, -(2**63), 2**32, 2**64 - 1]


def ids(most: int) -> tuple[list[object], list[object]]:
    good: list[object] = [[], [0, 2**32 - 1], [7] * most]
    return good, [*NOT_ARRAY, [7] * (most + 1), [-1], [2**32], [1.0], [None], ["1"], [[]]]


# kind of field: (values at and inside the bounds, values outside them or of another type)
KINDS: dict[str, tuple[list[object], list[object]]] = {
    "u8": ([0, 255], [*NOT_INT, *TOO_LARGE, 256]),
    "u16": ([0, 2**16 - 1], [*NOT_INT, *TOO_LARGE, 2**16]),
    "u32": ([0, 2**32 - 1], [*NOT_INT, *TOO_LARGE]),
    "batch": ([0, 1], [*NOT_INT, *TOO_LARGE, 2, 255]),
    "finish": ([0, 1, 2], [*NOT_INT, *TOO_LARGE, 3, 255]),
    "session": ([bytes(16), b"\xff" * 16], [*NOT_BYTES, b"", bytes(15), bytes(17)]),
    "digest": ([b"", bytes(32)], [*NOT_BYTES, bytes(33)]),
    "tokens": ([b"", bytes(64_000)], [*NOT_BYTES, bytes(64_001)]),
    "first_tokens": ([b"", bytes(48_000)], [*NOT_BYTES, bytes(48_001)]),
    "tree_tokens": ([b"", bytes(1020)], [*NOT_BYTES, bytes(1021)]),
    "grown_tokens": ([b"", bytes(256)], [*NOT_BYTES, bytes(257)]),
    "grown_parents": ([b"", bytes(128)], [*NOT_BYTES, bytes(129)]),
    "grown_steps": ([b"", bytes(64)], [*NOT_BYTES, bytes(65)]),
    "tree_parents": ([b"", bytes(255)], [*NOT_BYTES, bytes(256)]),
    "text": (["", "x" * 300, "\U0001f600" * 300], [*NOT_TEXT, "x" * 301]),
    "code": (["", "x" * 32], [*NOT_TEXT, "x" * 33]),
    "eos": ids(64),
    "stop_ids": ids(128),
    "sampling": (
        [[0, 0], [0.0, 2**64 - 1], [2.0, 1], [2, 1], [1.0, 1, 40, 0.9],
         [1.0, 1, 2**31 - 1, 1, 1, 10, -2, 2, 2**32 - 1, bytes(4096), bytes(8192), "new"]],
        [*NOT_ARRAY, [], [1.0], [-1e-9, 1], [2.0000001, 1], [float("nan"), 1], [float("inf"), 1], [-float("inf"), 1], [10**18, 1],
         [True, 1], ["1", 1], [None, 1], [1.0, -1], [1.0, 1.0], [1.0, None], [1.0, True], [1.0, b"\1" * 8],
         [1.0, 1, -1], [1.0, 1, 2**31], [1.0, 1, 0, 0.0], [1.0, 1, 0, 1.01], [1.0, 1, 0, float("nan")], [1.0, 1, 0, 1.0, -0.1], [1.0, 1, 0, 1.0, 1.1],
         [1.0, 1, 0, 1.0, 0.0, 0.0], [1.0, 1, 0, 1.0, 0.0, 11.0], [1.0, 1, 0, 1.0, 0.0, 1.0, 2.1], [1.0, 1, 0, 1.0, 0.0, 1.0, 0.0, -2.1],
         [1.0, 1, 0, 1.0, 0.0, 1.0, 0.0, 0.0, -1], [1.0, 1, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, bytes(4097)],
         [1.0, 1, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, b"", bytes(8193)]],
    ),
    "limits": (
        [[0, 0, 0], [255, 2**32 - 1, 2**32 - 1], [1, 2, 3, {"new": "field"}]],
        [*NOT_ARRAY, [], [1, 2], [256, 2, 3], [1, 2**32, 3], [1, 2, 2**32], [-1, 2, 3], [1, 2, 3.0]],
    ),
    "load": (
        [[0, 0, 0], [2**32 - 1] * 3, [1, 2, 3, {"new": "field"}]],
        [*NOT_ARRAY, [], [1, 2], [2**32, 2, 3], [1, 2**32, 3], [1, 2, 2**32], [-1, 2, 3], [1, 2, 3.0]],
    ),
}  # fmt: skip

each_message = pytest.mark.parametrize("name", MESSAGES)


def sample(name: str) -> Message:
    return MESSAGES[name][4]


def content(message: Message) -> list[object]:
    """The fields of a message as an untyped decoder sees them."""
    fields = msgspec.msgpack.decode(pack(message))
    assert isinstance(fields, list)
    return fields


def raw(number: int, body: bytes, *, size: int = 0, length: int = -1, magic: bytes = b"SPEG", major: int = 2, minor: int = 0, flags: int = 0, zero: int = 0) -> bytes:  # fmt: skip # noqa: E501
    """A frame made by hand, well-formed unless told otherwise."""
    size = size or next(s for s in SIZES if s >= 16 + len(body))
    header = magic + bytes([major, minor, number, flags]) + struct.pack("<II", len(body) if length < 0 else length, zero)
    return (header + body).ljust(size, b"\0")


def refused(frame: bytes, words: str = "") -> None:
    """`frame` is answered by a WireError with one sentence that an ERROR message can carry."""
    with pytest.raises(WireError, match=words) as e:
        decode(frame)
    text = str(e.value)
    assert 10 < len(text) <= 300 and "\n" not in text
    encode(Error(bytes(16), "frame", text))


# ---- golden bytes ----


@each_message
def test_golden_bytes_both_ways(name: str) -> None:
    message = sample(name)
    stored = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    assert encode(message).hex(" ") == stored.hex(" ")
    assert decode(stored) == message and type(decode(stored)) is type(message)


def test_golden_frames_are_all_there() -> None:
    assert {p.stem for p in GOLDEN.glob("*.hex")} == set(MESSAGES)
    assert {kind: number for kind, number, *_ in MESSAGES.values()} == wire.TYPES, "a message type without a golden frame"
    assert len(bytes.fromhex((GOLDEN / "prompt.hex").read_text())) == 2048, "one golden frame is of the second size"


def test_version_and_sizes() -> None:
    assert (wire.MAGIC, wire.MAJOR, wire.SIZES, wire.HEADER.size) == (b"SPEG", 2, SIZES, 16)
    assert wire.CHUNK == 16_000 and wire.FINISH == ("", "stop", "length") and bytes(16) == wire.NO_SESSION


@each_message
def test_samples_use_every_field_and_no_default(name: str) -> None:
    """A golden frame says something about a field only if its value is not what a decoder would put there anyway."""
    _, _, kinds, required, message = MESSAGES[name]
    fields = content(message)
    assert len(fields) == len(kinds) and all(field not in (0, b"", "", []) for field in fields[required:])


# ---- what fits, and in how much ----

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
session = st.binary(min_size=16, max_size=16)
digest, text = st.binary(max_size=32), st.text(max_size=300)


def ids_up_to(most: int) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=64) | st.integers(0, most).map(lambda n: (b"\x01\x80\x00\xff\x7f" * (n // 5 + 1))[:n])


tokens, first_tokens = ids_up_to(64_000), ids_up_to(48_000)
sampling = st.builds(
    Sampling, st.floats(0, 2), u64, st.integers(0, 2**31 - 1), st.floats(0, 1, exclude_min=True), st.floats(0, 1), st.floats(0.01, 10),
    st.floats(-2, 2), st.floats(-2, 2), u32, st.binary(max_size=4096), st.binary(max_size=8192),
)
ANY_MESSAGE: dict[type[Message], st.SearchStrategy[Message]] = {
    Hello: st.builds(Hello, text, digest),
    Welcome: st.builds(
        Welcome, text, digest, digest, u32, st.lists(u32, max_size=64), st.builds(Limits, u8, u32, u32), u32, st.builds(Load, u32, u32, u32),
        u32, u32, u16,
    ),
    Open: st.builds(Open, session, first_tokens, u32, u32, sampling, st.lists(u32, max_size=128), u32, u32, st.integers(0, 1)),
    Prompt: st.builds(Prompt, session, u32, tokens),
    Opened: st.builds(Opened, session, u32),
    Draft: st.builds(Draft, session, u32, u32, st.binary(max_size=1020), st.binary(max_size=255), u32, u8),
    Verdict: st.builds(Verdict, session, u32, u32, tokens, u16, st.integers(0, 2), u8, u32, u32, u16, u32, u32, u8),
    Cancel: st.builds(Cancel, session),
    Close: st.builds(Close, session),
    Lease: st.builds(Lease, session),
    Resume: st.builds(Resume, session),
    Resumed: st.builds(Resumed, session, u32, u32),
    NeedPrefill: st.builds(NeedPrefill, session),
    Gone: st.builds(Gone, session),
    Busy: st.builds(Busy, session, u32, text, u32),
    GoAway: st.builds(GoAway, u32),
    Grown: st.builds(Grown, session, u32, u16, st.binary(max_size=256), st.binary(max_size=128), st.binary(max_size=64)),
    Error: st.builds(Error, session, st.text(max_size=32), text, u32),
}


@each_message
def test_round_trip(name: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(ANY_MESSAGE[MESSAGES[name][0]])
    def holds(message: Message) -> None:
        frame = encode(message)
        used = 16 + len(pack(message))
        assert len(frame) == min(s for s in SIZES if s >= used) and not any(frame[used:])
        assert decode(frame) == message and type(decode(frame)) is type(message)

    holds()


def test_the_largest_message_within_bounds_fits() -> None:
    biggest = Open(
        SID, bytes(48_000), 2**32 - 1, 2**32 - 1, Sampling(1.5, 2**64 - 1, 2**31 - 1, bias_ids=bytes(4096), bias_values=bytes(8192)),
        [2**32 - 1] * 128, 2**32 - 1, 2**32 - 1,
    )
    assert len(encode(biggest)) == 65536 and decode(encode(biggest)) == biggest
    loud = Error(SID, "\U0001f600" * 32, "\U0001f600" * 300, 2**32 - 1)
    assert decode(encode(loud)) == loud


@pytest.mark.parametrize("size", SIZES)
def test_frame_size_boundaries(size: int) -> None:
    other = 16 + 1 + 18 + 1 + 3  # header, array, session, offset 0, bin16 before the tokens
    full = Prompt(SID, 0, b"\x01" * (size - other))
    assert len(pack(full)) == size - 16
    assert len(encode(full)) == size and encode(full)[-1] == 1
    assert len(encode(Prompt(SID, 0, b"\x01" * (size - other - 1)))) == size
    over = Prompt(SID, 0, b"\x01" * (size - other + 1))
    if size == SIZES[-1]:
        with pytest.raises(ValueError, match="Prompt of 65537 bytes does not fit"):
            encode(over)
        refused(encode(full), "length <= 64000")  # the frame is right, the field is too long
    else:
        assert len(encode(over)) == SIZES[SIZES.index(size) + 1]
        assert decode(encode(full)) == full and decode(encode(over)) == over


@pytest.mark.parametrize("size", SIZES)
def test_a_decoder_reads_a_frame_that_is_exactly_full(size: int) -> None:
    body = pack([SID, b"x" * (size - 16 - 1 - 18 - 3)])  # CLOSE and a trailing field of a later minor version
    assert len(body) == size - 16
    assert decode(raw(9, body, size=size)) == Close(SID)


@pytest.mark.parametrize(("nodes", "most"), [(0, 64), (31, 240), (63, 400)])
def test_a_usual_draft_fits_the_smallest_frame(nodes: int, most: int) -> None:
    tree = pack_ids([151_935 - i for i in range(nodes)]), bytes(range(nodes))
    frame = encode(Draft(SID, 2**32 - 1, 2**32 - 1, *tree, 2**32 - 1, 255))
    (length,) = struct.unpack_from("<I", frame, 8)
    assert len(frame) == 512 and 5 * nodes < 16 + length <= most
    largest = (2**32 - 1, 2**32 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 255)
    assert len(encode(Verdict(SID, 2**32 - 1, 2**32 - 1, pack_ids([1, 2, 3]), 256, 2, 255, *largest))) == 512
    assert len(encode(Grown(SID, 2**32 - 1, 2**16 - 1, bytes(4 * GROWN), bytes(2 * GROWN), bytes(GROWN)))) == 512


def test_ids_are_little_endian_u32() -> None:
    assert pack_ids([1, 0x01020304, 2**32 - 1]).hex() == "0100000004030201ffffffff"
    assert pack_ids(np.array([7], np.uint32)) == pack_ids([7]) and pack_ids([]) == b""
    back = unpack_ids(pack_ids([1, 151_935, 2**32 - 1]))
    assert back.tolist() == [1, 151_935, 2**32 - 1] and back.dtype == np.uint32
    for wrong in ([-1], [2**32]):
        with pytest.raises(OverflowError):
            pack_ids(wrong)
    for short in (1, 2, 3, 5):
        with pytest.raises(WireError, match=f"{short} bytes"):
            unpack_ids(bytes(short))


def test_unpack_tree() -> None:
    draft = sample("draft")
    assert isinstance(draft, Draft)
    tree = unpack_tree(draft)
    assert tree.tokens.tolist() == [9707, 11, 9707, 151_935] and tree.parents.tolist() == [0, 1, 1, 2]
    tree.check(151_936)
    assert len(unpack_tree(Draft(SID, 1, 1, b"", b""))) == 0
    with pytest.raises(WireError, match="5 bytes"):
        unpack_tree(Draft(SID, 1, 1, b"12345", b"\0"))
    with pytest.raises(TreeError, match="1 tokens but 2 parents"):
        unpack_tree(Draft(SID, 1, 1, bytes(4), b"\0\0")).check(9)


# ---- frames that are not ours ----


@pytest.mark.parametrize("size", [0, 1, 15, 16, 35, 511, 513, 1024, 2047, 2049, 65535, 65537, 131072])
def test_another_size_is_refused(size: int) -> None:
    refused((encode(Close(SID)) + bytes(size))[:size], f"a frame of {size} bytes")


def test_bytes_after_the_frame_are_refused() -> None:
    for name in MESSAGES:
        frame = encode(sample(name))
        refused(frame + b"\0", "a frame of")
        refused(frame + frame, "a frame of")
        refused(frame[:-1], "a frame of")


@pytest.mark.parametrize("size", SIZES)
def test_padding_must_be_zero_everywhere(size: int) -> None:
    used = 16 + size // 2 if size > 512 else 16 + 19
    body = pack([SID]) if size == 512 else pack([SID, b"\x01" * (size // 2 - 1 - 18 - 3)])
    good = raw(9, body)
    assert len(good) == size and 16 + len(body) == used and decode(good) == Close(SID)
    places = range(used, size) if size < 65536 else [*range(used, used + 300), *range(used, size, 997), size - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] = 1 << place % 8
        refused(bytes(bad), "padding")


@pytest.mark.parametrize("place", range(4))
def test_bad_magic(place: int) -> None:
    bad = bytearray(encode(Close(SID)))
    bad[place] ^= 0x20
    refused(bytes(bad), "SPEG")


@pytest.mark.parametrize("major", [0, 1, 3, 255])
def test_another_major_version(major: int) -> None:
    refused(raw(9, pack([SID]), major=major), f"version {major} is spoken there, 2.0 here")
    refused(raw(77, b"another format", major=major, flags=9), f"version {major}")


@pytest.mark.parametrize("bit", range(8))
def test_reserved_flags(bit: int) -> None:
    refused(raw(9, pack([SID]), flags=1 << bit), "reserved")
    refused(raw(9, pack([SID]), zero=1 << 4 * bit), "reserved")


def test_lengths_that_do_not_fit_the_frame() -> None:
    body = pack([SID])
    for length in (497, 2048, 65536, 2**31, 2**32 - 1):
        refused(raw(9, body, length=length), f"promises a body of {length} bytes in a frame of 512")
    refused(raw(9, body, length=65521, size=65536), "promises")


def test_lengths_that_do_not_fit_the_body() -> None:
    body = pack([SID])
    for length in range(len(body)):
        refused(raw(9, body[:length]), "malformed")
        refused(raw(9, body, length=length), "padding")
    refused(raw(9, body, length=len(body) + 1), "trailing")
    refused(raw(9, body + body), "trailing")
    refused(raw(9, body + b"\xc0"), "trailing")


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_larger_frame_than_needed(size: int) -> None:
    for name in MESSAGES:
        body = pack(sample(name))
        if 16 + len(body) <= SIZES[SIZES.index(size) - 1]:
            refused(raw(MESSAGES[name][1], body, size=size), "does not belong")


def test_unknown_types() -> None:
    known = {number for _, number, *_ in MESSAGES.values()}
    for number in set(range(256)) - known:
        refused(raw(number, pack([SID])), f"message type {number} is unknown")


@each_message
def test_bounds_and_types_of_every_field(name: str) -> None:
    kind, number, kinds, _, message = MESSAGES[name]
    assert len(kinds) == len(kind.__struct_fields__)
    for i, field in enumerate(kinds):
        fields = content(message)
        good, bad = KINDS[field]
        for value in good:
            fields[i] = value
            assert type(decode(raw(number, pack(fields)))) is kind
        for value in bad:
            fields[i] = value
            refused(raw(number, pack(fields)), f"type {number} is malformed")


@each_message
def test_short_arrays(name: str) -> None:
    kind, number, kinds, required, message = MESSAGES[name]
    fields = content(message)
    for n in range(required):
        refused(raw(number, pack(fields[:n])), "malformed")
    for n in range(required, len(kinds)):
        assert decode(raw(number, pack(fields[:n]))) == kind(*(getattr(message, f) for f in kind.__struct_fields__[:n]))
    for other in (None, 7, {"session": SID}, b"", "text"):
        refused(raw(number, pack(other)), "malformed")


@each_message
@pytest.mark.parametrize("minor", [0, 1, 255])
def test_trailing_fields_of_later_minor_versions_are_ignored(name: str, minor: int) -> None:
    number, message = MESSAGES[name][1], sample(name)
    extra: list[object] = [None, -1, 2.5, "é", b"\0\xff", [[[]]], {"a": [1]}, [1] * 20]
    for n in range(len(extra) + 1):
        assert decode(raw(number, pack(content(message) + extra[:n]), minor=minor)) == message
    if name == "open":
        fields = content(message)
        fields[4] = [*fields[4], *extra]  # type: ignore[misc]
        assert decode(raw(number, pack(fields), minor=minor)) == message


@each_message
def test_deep_nesting_and_huge_headers(name: str) -> None:
    """Neither recursion nor memory follows what a header promises."""
    _, number, _, required, message = MESSAGES[name]
    fields = [pack(field) for field in content(message)]
    huge = [kind + b"\xff" * 4 for kind in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")]  # array, map, bin, str, ext
    bombs = [*huge, b"\x91" * 60_000, b"\x81" * 60_000, b"\x91" * 60_000 + b"\xc0", b"\x81\xa1a" * 20_000 + b"\xc0", b"\xc1", b"\xd4"]
    tracemalloc.start()
    for bomb in bombs:
        refused(raw(number, bomb), "malformed")
        for i in range(required):
            refused(raw(number, bytes([0x90 | len(fields)]) + b"".join(fields[:i]) + bomb), "malformed")
        refused(raw(number, bytes([0x91 + len(fields)]) + b"".join(fields) + bomb), "malformed")
    refused(raw(number, b"\xdd\xff\xff\xff\xff" + b"".join(fields)), "malformed")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24, "the frames themselves, held by the exceptions above, are a few MB"


@pytest.mark.parametrize("text", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"ok \xf8\x88\x80\x80\x80"])
def test_text_that_is_not_utf8(text: bytes) -> None:
    mark, sid, empty = bytes([0xA0 | len(text)]), b"\xc4\x10" + SID, b"\xc4\x00"
    refused(raw(1, b"\x92" + mark + text + empty), "malformed")
    refused(raw(2, b"\x97" + mark + text + empty * 2 + b"\x01\x90\x93\x01\x01\x01\x01"), "malformed")
    refused(raw(15, b"\x93" + sid + mark + text + b"\xa0"), "malformed")
    refused(raw(15, b"\x93" + sid + b"\xa0" + mark + text), "malformed")
    assert decode(raw(15, b"\x93" + sid + b"\xa0\xa2\xc3\xa9")) == Error(SID, "", "é")


# ---- fuzz ----


def any_value(rng: random.Random, depth: int = 0) -> object:
    """A random msgpack value, often close to what a field wants."""
    pick = rng.randrange(12 if depth < 3 else 8)
    if pick < 2:
        return SID if rng.random() < 0.7 else rng.randbytes(rng.randrange(40))
    if pick < 5:
        return rng.choice([0, 1, 2, 3, 255, 256, 2**16, 2**32 - 1, 2**32, 2**63, 2**64 - 1, -1, -(2**63), rng.randrange(1000)])
    if pick < 8:
        return rng.choice([None, True, 0.5, float("nan"), -0.0, "", "é", "x" * rng.randrange(400), b"", bytes(rng.randrange(1100))])
    if pick == 8:
        return {str(i): any_value(rng, depth + 1) for i in range(rng.randrange(3))}
    return [any_value(rng, depth + 1) for _ in range(rng.randrange(5))]


def structured(rng: random.Random) -> bytes:
    """A well-framed body of random fields, or a message with some fields replaced, dropped or added."""
    _, number, kinds, _, message = MESSAGES[rng.choice(list(MESSAGES))]
    if rng.random() < 0.3:
        return raw(number, pack([any_value(rng) for _ in range(rng.randrange(12))]))
    fields = content(message)
    for _ in range(rng.randrange(1, 3)):
        i = rng.randrange(len(fields) + 1)
        value = rng.choice(KINDS[rng.choice(kinds)][rng.randrange(2)]) if rng.random() < 0.5 else any_value(rng)
        fields[i : i + rng.randrange(2)] = [value] * rng.randrange(2) if fields else [value]
    return raw(rng.choice([number, number, number, rng.randrange(16)]), pack(fields)[: 65536 - 16])


def mutated(rng: random.Random) -> bytes:
    """A golden message with bits flipped, bytes cut out or put in; usually framed again, so that the body is reached."""
    _, number, _, _, message = MESSAGES[rng.choice(list(MESSAGES))]
    whole = rng.random() < 0.3
    data = bytearray(encode(message) if whole else pack(message))
    for _ in range(rng.randrange(1, 5)):
        i = rng.randrange(min(len(data), 120))
        pick = rng.randrange(4)
        if pick == 0:
            data[i] ^= 1 << rng.randrange(8)
        elif pick == 1:
            data[i] = rng.choice(b"\x00\x90\x9f\xa0\xc0\xc1\xc4\xc6\xc7\xca\xcb\xcf\xd9\xdc\xdd\xdf\xff")
        elif pick == 2:
            del data[i : i + rng.randrange(1, 4)]
        else:
            data[i:i] = rng.randbytes(rng.randrange(1, 4))
        data = data or bytearray(1)
    return bytes(data) if whole else raw(number, bytes(data))


def noise(rng: random.Random) -> bytes:
    """Random bytes: alone, behind a good header, or at a random length."""
    pick = rng.randrange(3)
    if pick == 0:
        return rng.randbytes(rng.choice([512, 2048]))
    if pick == 1:
        return rng.randbytes(rng.randrange(600))
    return raw(rng.randrange(1, 20), rng.randbytes(rng.randrange(400)))


@pytest.mark.parametrize("maker", [structured, mutated, noise])
def test_fuzz_raises_wire_error_only(maker) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(f"specedge {maker.__name__}")
    accepted = in_body = trees = 0
    for _ in range(FUZZ // 3):
        frame = maker(rng)
        try:
            message = decode(frame)
        except WireError as e:
            in_body += "malformed" in str(e)
            assert 10 < len(str(e)) <= 300
            continue
        accepted += 1
        assert decode(encode(message)) == message, "an accepted message is within bounds and survives a second trip"
        if isinstance(message, Draft):
            try:
                unpack_tree(message).check(151_936)
                trees += 1
            except (WireError, TreeError):
                pass
    share = FUZZ // 3
    assert in_body > share // 5, "the fuzz must reach the decoders of bodies"
    if maker is not noise:
        assert accepted > share // 50 and trees, "and some of it must be accepted"


# ---- the module and the document ----


def test_import_needs_neither_torch_nor_sockets() -> None:
    code = "import sys, specedge.net.wire; print(sorted({'torch', 'zmq', 'tokenizers', 'jinja2', 'safetensors'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


def test_the_module_uses_no_pickle() -> None:
    modules = {value.__name__ for value in vars(wire).values() if isinstance(value, ModuleType)}
    assert modules == {"msgspec", "numpy", "struct"}
    origins = {getattr(value, "__module__", "") or "" for name, value in vars(wire).items() if not name.startswith("__")}
    assert not {o for o in origins if "pickle" in o or "marshal" in o or "dill" in o}
    assert "pickle" not in Path(wire.__file__).read_text()


def section(heading: str) -> str:
    text = (ROOT / "docs" / "protocol.md").read_text()
    found = re.search(rf"^### {heading}\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/protocol.md has no section '### {heading}'"
    return found[1]


@each_message
def test_the_document_lists_every_field_in_order(name: str) -> None:
    kind, number, *_ = MESSAGES[name]
    listed = re.findall(r"^\| `(\w+)` \|", section(rf"{number} {name.upper()}\b[^\n]*"), re.MULTILINE)
    assert listed == list(kind.__struct_fields__)


def test_the_example_of_the_document_is_the_golden_draft() -> None:
    block = re.search(r"```hex\n(.*?)```", (ROOT / "docs" / "protocol.md").read_text(), re.DOTALL)
    assert block
    example = bytes.fromhex("".join(line.split("  ")[0] for line in block[1].splitlines()))
    assert example == (golden := bytes.fromhex((GOLDEN / "draft.hex").read_text()))[: len(example)]
    assert not any(golden[len(example) :]) and len(example) == 16 + len(pack(sample("draft")))
