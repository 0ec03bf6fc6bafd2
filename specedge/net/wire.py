"""Frames: the only bytes that cross the network between an edge and a server.

A message is one frame: a 16-byte header {magic, major, minor, type, flags, body length, zero}, a msgpack body, zeros up to 512,
2,048 or 65,536 bytes. The size of a frame therefore says next to nothing about its content. Bodies are typed array-like structs with
bounds: a decoder reads exactly one of them or raises WireError with a sentence. Minor versions may add trailing fields, which older
decoders ignore; another major version is refused. This file knows nothing of sockets, sessions or models, and imports no torch.
"""

import struct
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from specedge.tree import GROWN, MAX_NODES, TokenTree

MAGIC = b"SPEG"
MAJOR, MINOR = 2, 0
HEADER = struct.Struct("<4sBBBBII")
SIZES = (512, 2048, 65536)
CHUNK = 16000  # token ids in one PROMPT or VERDICT frame: 64,000 bytes, which leaves room for the other fields
FIRST = 12000  # token ids in OPEN, which also has stop ids and up to 12 kB of logit bias

U8 = Annotated[int, Meta(ge=0, lt=2**8)]
U16 = Annotated[int, Meta(ge=0, lt=2**16)]
U32 = Annotated[int, Meta(ge=0, lt=2**32)]
U64 = Annotated[int, Meta(ge=0)]  # msgpack holds no more than 64 bits, and msgspec takes no larger bound
SessionId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Digest = Annotated[bytes, Meta(max_length=32)]
TokenBytes = Annotated[bytes, Meta(max_length=4 * CHUNK)]  # little-endian u32 ids
Text = Annotated[str, Meta(max_length=300)]

FINISH = ("", "stop", "length")  # Verdict.finish: not finished, a stop id closed the text, max_tokens did


class WireError(ValueError):
    """A frame that is not one of ours; the message is a sentence that may be sent back."""


class Message(msgspec.Struct, array_like=True):
    """Base of all bodies."""


class Sampling(Message):
    """How the server samples: SamplingParams without what belongs to the text side, in the same ranges."""

    temperature: Annotated[float, Meta(ge=0, le=2)]
    seed: U64
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    min_tokens: U32 = 0
    bias_ids: Annotated[bytes, Meta(max_length=4 * 1024)] = b""  # little-endian u32
    bias_values: Annotated[bytes, Meta(max_length=8 * 1024)] = b""  # little-endian float64, one for each id


class Limits(Message):
    """What an edge may ask for."""

    max_nodes: U8
    max_context: U32  # prompt and output together
    max_sessions: U32  # at a time


class Load(Message):
    """How busy the server is."""

    sessions: U32
    kv_free: U32  # tokens whose K/V could be kept beside what is held now
    kv_tokens: U32  # and in all


class Hello(Message):
    """Edge -> server, first on every connection."""

    build: Text
    tokenizer: Digest  # sha256 of the draft's token table; empty: no draft, nothing to compare


class Welcome(Message):
    """Server -> edge: what is served here."""

    build: Text
    model: Digest  # fingerprint of the target
    tokenizer: Digest
    vocab: U32
    eos_ids: Annotated[list[U32], Meta(max_length=64)]
    limits: Limits
    lease_ms: U32  # a session that is silent for longer is closed
    load: Load
    pass_us: U32 = 0  # what a step of up to `knee` rows takes; 0: not known yet
    row_ns: U32 = 0  # and every further row
    knee: U16 = 0


class Open(Message):
    """Edge -> server: a session of `length` known tokens, of which the first `prompt_len` are the prompt; `tokens` are the first of them. The next
    round is `round` + 1: a rebuilt session counts on, so that late answers of its earlier life are known by their number."""

    session: SessionId
    tokens: Annotated[bytes, Meta(max_length=4 * FIRST)]
    length: U32
    prompt_len: U32
    sampling: Sampling
    stop_ids: Annotated[list[U32], Meta(max_length=128)]
    max_tokens: U32  # counted from prompt_len
    round: U32 = 0
    batch: Annotated[int, Meta(ge=0, lt=2)] = 0  # 1: be served with rows that cost others nothing


class Prompt(Message):
    """Edge -> server: more of the known tokens, from `offset`."""

    session: SessionId
    offset: U32
    tokens: TokenBytes


class Opened(Message):
    """Server -> edge: all `length` tokens are there and the session runs."""

    session: SessionId
    length: U32


class Draft(Message):
    """Edge -> server: a tree below token `base - 1`, the root. Decode alone while the text is shorter than `run_until`."""

    session: SessionId
    round: U32
    base: U32
    tokens: Annotated[bytes, Meta(max_length=4 * MAX_NODES)]
    parents: Annotated[bytes, Meta(max_length=MAX_NODES)]
    run_until: U32 = 0
    ahead: U8 = 0  # nodes of the trees with which the server may begin further rounds by itself, from what GROWN tells; 0: it may not


class Grown(Message):
    """Edge -> server: nodes that have grown since the DRAFT, or the round, `since`. `first` is the number of the first of them."""

    session: SessionId
    since: U32
    first: U16
    tokens: Annotated[bytes, Meta(max_length=4 * GROWN)]
    parents: Annotated[bytes, Meta(max_length=2 * GROWN)]  # little-endian u16 numbers
    steps: Annotated[bytes, Meta(max_length=GROWN)]  # how much less likely than its parent each is, in 1/32 of a natural logarithm


class Verdict(Message):
    """Server -> edge: `tokens` extend the text from `base`: the accepted path of the tree and the token that closes it, or what an edge lacks that is
    behind."""

    session: SessionId
    round: U32
    base: U32
    tokens: TokenBytes
    verified: U16  # rows that the server ran for this answer
    finish: Annotated[int, Meta(ge=0, lt=len(FINISH))]
    row_budget: U8  # nodes worth sending next time
    queue_us: U32
    verify_us: U32
    rows: U16 = 0  # of the step: `verified`, and those of other sessions; 0: nobody says
    next: U32 = 0  # the round that the server has begun by itself; 0: it waits for the next DRAFT
    since: U32 = 0  # the round of which on the nodes of GROWN are numbered
    nodes: U8 = 0  # of the tree of the round `next`


class Cancel(Message):
    """Edge -> server: drop the session and free what it holds."""

    session: SessionId


class Close(Message):
    """Edge -> server: the session has ended well; free what it holds."""

    session: SessionId


class Lease(Message):
    """Edge -> server: the session is silent, but wanted."""

    session: SessionId


class Resume(Message):
    """Edge -> server, on a new connection: is the session still there?"""

    session: SessionId


class Resumed(Message):
    """Server -> edge: it is, and belongs to this connection now. `length` tokens are committed, `round` was the last that came."""

    session: SessionId
    length: U32
    round: U32


class NeedPrefill(Message):
    """Server -> edge: it was here lately; open it again with all its tokens, whose K/V may still be cached."""

    session: SessionId


class Gone(Message):
    """Server -> edge: it is not known here; open it with all its tokens."""

    session: SessionId


class Busy(Message):
    """Server -> edge: not now. OPEN it again, or send `round` again if that is not 0, after `retry_ms` milliseconds or more."""

    session: SessionId
    retry_ms: U32
    text: Text
    round: U32 = 0


class GoAway(Message):
    """Server -> edge: the server ends in `deadline_ms` milliseconds. Running sessions may finish here until then; new ones must go elsewhere."""

    deadline_ms: U32


class Error(Message):
    """Server -> edge: what was wrong, in one sentence. `session` is zero where none was meant, `round` where it answers none."""

    session: SessionId
    code: Annotated[str, Meta(max_length=32)]
    text: Text
    round: U32 = 0


TYPES: dict[type[Message], int] = {
    Hello: 1, Welcome: 2, Open: 3, Prompt: 4, Opened: 5, Draft: 6, Verdict: 7, Cancel: 8, Close: 9, Lease: 10, Resume: 11, Resumed: 12,
    NeedPrefill: 13, Gone: 14, Error: 15, Busy: 16, GoAway: 17, Grown: 18,
}  # fmt: skip
NO_SESSION = bytes(16)

_encode = msgspec.msgpack.Encoder().encode
_decoders = {number: msgspec.msgpack.Decoder(kind).decode for kind, number in TYPES.items()}
M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The frame of a message. Raises ValueError if it does not fit the largest one."""
    body = _encode(message)
    used = HEADER.size + len(body)
    size = next((s for s in SIZES if s >= used), None)
    if size is None:
        raise ValueError(f"a {type(message).__name__} of {used} bytes does not fit a frame of {SIZES[-1]}")
    header = HEADER.pack(MAGIC, MAJOR, MINOR, TYPES[type(message)], 0, len(body), 0)
    return header + body + bytes(size - used)


def decode(frame: bytes) -> Message:
    """The message in a frame. Raises WireError, and nothing else, for anything that is not exactly one."""
    if len(frame) not in SIZES:
        raise WireError(f"a frame of {len(frame)} bytes; frames have {', '.join(map(str, SIZES))}")
    magic, major, _minor, number, flags, length, zero = HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise WireError("the frame does not begin with SPEG")
    if major != MAJOR:
        raise WireError(f"protocol version {major} is spoken there, {MAJOR}.{MINOR} here: update the older side")
    if flags or zero:
        raise WireError("reserved header fields are not zero")
    used = HEADER.size + length
    if used > len(frame):
        raise WireError(f"the header promises a body of {length} bytes in a frame of {len(frame)}")
    if len(frame) != next(s for s in SIZES if s >= used):
        raise WireError(f"a body of {length} bytes does not belong in a frame of {len(frame)}")
    if frame.count(0, used) != len(frame) - used:
        raise WireError("the padding is not zero")
    decoder = _decoders.get(number)
    if decoder is None:
        raise WireError(f"message type {number} is unknown")
    try:
        return decoder(frame[HEADER.size : used])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as e:
        raise WireError(f"the body of message type {number} is malformed: {str(e)[:200]}") from None


def pack_ids(ids: "NDArray[np.uint32] | list[int]") -> bytes:
    """Token ids as little-endian u32 bytes."""
    return np.asarray(ids, dtype="<u4").tobytes()


def unpack_ids(data: bytes) -> NDArray[np.uint32]:
    """The ids in little-endian u32 bytes `[n]`; WireError if the length is no multiple of 4."""
    if len(data) % 4:
        raise WireError(f"{len(data)} bytes are not a list of 4-byte token ids")
    return np.frombuffer(data, dtype="<u4").astype(np.uint32)


def unpack_tree(draft: Draft) -> TokenTree:
    """The tree of a DRAFT, unchecked but for its lengths (`TokenTree.check` does the rest)."""
    return TokenTree(unpack_ids(draft.tokens), np.frombuffer(draft.parents, np.uint8))


def unpack_nodes(grown: Grown) -> tuple[list[int], list[int], list[int]]:
    """Tokens, parents and steps of a GROWN; WireError if they are not equally many."""
    tokens = unpack_ids(grown.tokens).tolist()
    if not 2 * len(tokens) == len(grown.parents) == 2 * len(grown.steps):
        raise WireError(f"{len(tokens)} tokens, {len(grown.parents)} bytes of parents and {len(grown.steps)} steps do not go together")
    return tokens, np.frombuffer(grown.parents, "<u2").tolist(), list(grown.steps)
