"""Edge: against a server that follows a script, and against a real one.

The scripted server lies, repeats itself, falls silent or hangs up; an edge believes nothing that does not continue its text, drops what comes
twice or late, asks again after a silence, and otherwise ends with a ServerError of one sentence: never with a hang, a traceback or a wrong id.
Behind the real server stands a tiny random target; whatever the draft, the ids are those of Engine.generate.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import zmq

from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine
from specedge.engine.pace import Pace, Served
from specedge.engine.request import Completion
from specedge.engine.texts import UseError
from specedge.net import rounds as rounds_module
from specedge.net import wire
from specedge.net.client import Connection, ServerError
from specedge.net.edge import Edge
from specedge.net.server import Server
from specedge.net.wire import Cancel, Close, Draft, Error, Hello, Message, Open, Opened, Prompt, Verdict, Welcome, encode, pack_ids, unpack_ids
from specedge.text import Tokenizer
from tests.helpers import BYTES, byte_tokenizer, check_empty, drafter, engine, random_model
from tests.net.test_server import PATIENCE, background, until

VOCAB = BYTES
WELCOME = Welcome("fake", b"m" * 32, b"", VOCAB, [256, 0], wire.Limits(255, 4096, 16), 600_000, wire.Load(0, 4096, 4096))
TEN = SamplingParams(max_tokens=10, seed=1)
Answer = Message | bytes


def truth(prompt: int, tokens: int = 10) -> list[int]:
    """Output of the scripted target: the token at index i is (31 i + 7) mod 250, whatever came before it."""
    return [(31 * i + 7) % 250 for i in range(prompt, prompt + tokens)]


class Fake:
    """A ROUTER in a thread. It greets and opens as a server does; a DRAFT is answered by `script`. `heard` is all that came, in order."""

    def __init__(self, script: "Callable[[Fake, Draft], Iterable[Answer]]", greeting: Iterable[Answer] = (WELCOME,)) -> None:
        self.script, self.greeting = script, greeting
        self.answers: dict[type[Message], Callable[[Message], Iterable[Answer]]] = {}  # to what else comes
        self.heard: list[Message] = []
        self.ends: dict[bytes, int] = {}  # of every session, the length of its whole text
        self.first: dict[bytes, int] = {}  # and that of its prompt
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self.address = f"specedge://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> "Fake":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def of(self, kind: type[Message]) -> list[Message]:
        return [m for m in list(self.heard) if isinstance(m, kind)]

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._router.poll(10):
                peer, frame = self._router.recv_multipart()
                message = wire.decode(frame)
                self.heard.append(message)
                for answer in self._answers(message):
                    self._router.send_multipart([peer, answer if isinstance(answer, bytes) else encode(answer)])

    def _answers(self, m: Message) -> Iterable[Answer]:
        if isinstance(m, Hello):
            return self.greeting
        if isinstance(m, Open):
            self.first[m.session], self.ends[m.session] = m.prompt_len, m.prompt_len + m.max_tokens
            return [Opened(m.session, m.length)]
        if type(m) in self.answers:
            return self.answers[type(m)](m)
        return self.script(self, m) if isinstance(m, Draft) else []


def verdict(fake: Fake, m: Draft, count: int = 1, **changes: object) -> Verdict:
    """The next `count` tokens from `base` on, but for `changes`."""
    base = int(changes.get("base", m.base))  # type: ignore[call-overload]
    finish = wire.FINISH.index("length") if base + count >= fake.ends[m.session] else 0
    fields = {
        "session": m.session, "round": m.round, "base": base, "tokens": pack_ids(truth(base, count)), "verified": 1, "finish": finish,
        "row_budget": 255, "queue_us": 0, "verify_us": 0,
    }  # fmt: skip
    return Verdict(**{**fields, **changes})


def honest(fake: Fake, m: Draft) -> Iterator[Answer]:
    """What a server says: one token, and, if it is to decode alone, the others one by one."""
    for base in range(m.base, max(m.base + 1, m.run_until)):
        yield verdict(fake, m, base=base)


def silent(fake: Fake, m: Draft) -> Iterator[Answer]:
    return iter(())


def only_long(bad: Callable[[Fake, Draft], Iterable[Answer]]) -> Callable[[Fake, Draft], Iterable[Answer]]:
    """A server that is bad to the text whose prompt has three tokens, and honest to all others."""
    return lambda fake, m: bad(fake, m) if fake.first[m.session] == 3 else honest(fake, m)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge that asks again after 50 ms."""
    monkeypatch.setattr(rounds_module, "RESEND", 0.05)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that waits half a second for its greeting."""
    monkeypatch.setattr(Connection.__init__, "__defaults__", (0.5,))


@pytest.fixture(autouse=True)
def no_edge_is_left() -> Iterator[None]:
    yield
    until(lambda: not [t for t in threading.enumerate() if t.name == "specedge-edge"], "the end of the edge's threads")


def ends_with(running: "Future[object]", sentence: str, code: str = "") -> None:
    """A caller gets a ServerError of one sentence."""
    with pytest.raises(ServerError, match=sentence) as e:
        running.result(PATIENCE)
    assert e.value.code == code and "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------------------------------
# addresses and greetings


@pytest.mark.parametrize(
    "address",
    [
        "", "127.0.0.1:7000", "tcp://127.0.0.1:7000", "specedge:127.0.0.1:7000", "specedge://", "specedge://127.0.0.1", "specedge://:7000",
        "specedge://127.0.0.1:0", "specedge://127.0.0.1:99999", "specedge://127.0.0.1:http", "specedge://[::1:7000", "specedge://a..b:7000",
    ],
)  # fmt: skip
def test_no_address(address: str) -> None:
    with pytest.raises(ServerError, match="is no server address: write it as specedge://HOST:PORT"):
        Edge(address)


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    with pytest.raises(ServerError, match=f"no server at specedge://127.0.0.1:{port}: Connection refused; check the address"):
        Edge(f"specedge://127.0.0.1:{port}")


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"\xff" * 100])
def test_another_service(impatient: None, says: bytes) -> None:
    """It accepts, says its own thing or nothing, and is not taken for a server."""
    listening = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def serve() -> None:
        while True:  # until `listening` is shut down
            connections.append(listening.accept()[0])
            with contextlib.suppress(OSError):  # the first one is closed at once
                connections[-1].sendall(says)

    serving = background(serve)
    try:
        with pytest.raises(ServerError, match="does not answer as a specedge server within .*: check the port"):
            Edge(f"specedge://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        assert isinstance(serving.exception(PATIENCE), OSError)
        for s in (listening, *connections):
            s.close()


NEWER = bytes(encode(WELCOME)[:4]) + b"\3" + bytes(encode(WELCOME)[5:])


@pytest.mark.parametrize(
    ("greeting", "sentence", "code"),
    [
        ([Error(wire.NO_SESSION, "tokenizer", "use another draft")], "the server at specedge://[0-9.:]+ refuses: use another draft", "tokenizer"),
        ([bytes(512)], "does not speak this protocol: the frame does not begin with SPEG", "protocol"),
        ([NEWER], "does not speak this protocol: protocol version 3 is spoken there", "protocol"),
        ([wire.Busy(bytes(16), 100, "too many are here")], "the server at specedge://[0-9.:]+ is busy: too many are here", ""),
    ],
    ids=["refused", "stranger", "newer", "busy"],
)
def test_a_bad_greeting(greeting: list[Answer], sentence: str, code: str) -> None:
    with Fake(honest, greeting) as fake:
        with pytest.raises(ServerError, match=sentence) as e:
            Edge(fake.address)
        assert e.value.code == code


@pytest.mark.parametrize("greeting", [[], [Opened(bytes(16), 1), Cancel(bytes(16))]], ids=["silent", "confused"])
def test_no_greeting(impatient: None, greeting: list[Answer]) -> None:
    with Fake(honest, greeting) as fake, pytest.raises(ServerError, match="does not answer as a specedge server within .*: check the port"):
        Edge(fake.address)


def test_a_real_server_refuses_a_tokenizer(model: Path) -> None:
    """And takes the same one, or none."""
    target = engine(model)
    target.tokenizer = Tokenizer(byte_tokenizer())
    other = byte_tokenizer()
    other.add_special_tokens(["<other>"])
    with Server(target) as server:
        with pytest.raises(ServerError, match="the draft's tokenizer is not the target's: use a draft with the same vocabulary, or none") as e:
            Edge(server.address, tokenizer=Tokenizer(other))
        assert e.value.code == "tokenizer"
        for tokenizer in (None, Tokenizer(byte_tokenizer())):
            Edge(server.address, tokenizer=tokenizer).close()


# ----------------------------------------------------------------------------------------------------------------------
# texts


def test_what_is_said_for_a_text() -> None:
    """HELLO, and again before a text that follows a pause, OPEN, one DRAFT that leaves the rest to the server, CLOSE; frames are counted."""
    params = SamplingParams(temperature=0.5, max_tokens=10, seed=2**64 - 1, stop_ids=(9, 3))
    with Fake(honest) as fake, Edge(fake.address) as edge:
        assert edge.welcome == WELCOME
        (done,) = edge.generate([[1, 2, 3]], params)
        until(lambda: fake.of(Close), "CLOSE")
    assert (done.token_ids, done.finish_reason, done.prompt_tokens, done.seed, done.text) == (truth(3), "length", 3, 2**64 - 1, "")
    hello, again, opened, draft, close = fake.heard
    assert hello == again
    assert isinstance(hello, Hello) and hello.tokenizer == b""
    assert isinstance(opened, Open) and len(opened.session) == 16
    session = opened.session
    assert opened == Open(session, pack_ids([1, 2, 3]), 3, 3, wire.Sampling(0.5, 2**64 - 1), [0, 3, 9, 256], 10)
    assert (draft, close) == (Draft(session, 1, 3, b"", b"", 13), Close(session))
    assert (done.speculation.bytes_up, done.speculation.bytes_down) == (2 * 512, 11 * 512)
    assert (done.speculation.drafted, done.speculation.accepted, done.speculation.hits, done.speculation.misses) == (0, 0, 0, 0)


def test_eos_may_be_ignored() -> None:
    with Fake(honest) as fake, Edge(fake.address) as edge:
        edge.generate([[1]], SamplingParams(max_tokens=1, stop_ids=(7,), ignore_eos=True))
    assert [m.stop_ids for m in fake.of(Open) if isinstance(m, Open)] == [[7]]


def test_a_seed_is_drawn_and_reported() -> None:
    with Fake(honest) as fake, Edge(fake.address) as edge:
        seeds = [edge.generate([[1]], SamplingParams(0.8, 1))[0].seed for _ in range(2)]
    assert seeds == [m.sampling.seed for m in fake.of(Open) if isinstance(m, Open)]
    assert seeds[0] != seeds[1]


def test_a_stop_id_is_kept_and_not_shown() -> None:
    """A text of characters in pieces: joined, they are the text; the closing id is among the ids only."""
    tokenizer = Tokenizer(byte_tokenizer())
    ids = [*tokenizer.encode("née"), 256]

    def speak(fake: Fake, m: Draft) -> Iterator[Answer]:
        for i, token in enumerate(ids):
            yield verdict(fake, m, base=m.base + i, tokens=pack_ids([token]), finish=int(token == 256))

    with Fake(speak) as fake, Edge(fake.address, tokenizer=tokenizer) as edge:
        chunks = list(edge.stream("hello", TEN))
    done = chunks[-1].completion
    assert done is not None and done.text == "née" == "".join(c.text for c in chunks)
    assert (done.finish_reason, done.prompt_tokens) == ("stop", 5)
    assert [i for c in chunks for i in c.token_ids] == done.token_ids == ids
    assert [c.text for c in chunks] == ["n", "", "é", "e", ""]
    assert {m.tokenizer for m in fake.of(Hello) if isinstance(m, Hello)} == {tokenizer.digest()}


def test_a_long_prompt_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CHUNK", 7)
    monkeypatch.setattr(wire, "FIRST", 7)
    tokens = list(range(20))
    with Fake(honest) as fake, Edge(fake.address) as edge:
        assert edge.generate([tokens], TEN)[0].token_ids == truth(20)
    pieces = [(getattr(m, "offset", 0), unpack_ids(m.tokens).tolist()) for m in fake.heard if isinstance(m, Open | Prompt)]
    assert pieces == [(at, tokens[at : at + 7]) for at in (0, 7, 14)]


# ----------------------------------------------------------------------------------------------------------------------
# what a server should not say

LIES: dict[str, Callable[[Fake, Draft], dict[str, object]]] = {
    "too many tokens": lambda fake, m: {"tokens": pack_ids([1] * 11)},
    "far too many tokens": lambda fake, m: {"tokens": pack_ids([1] * 16_000)},
    "an id outside the vocabulary": lambda fake, m: {"tokens": pack_ids([VOCAB])},
    "the highest id": lambda fake, m: {"tokens": pack_ids([1, 2**32 - 1])},
    "half a token": lambda fake, m: {"tokens": b"\1\0\0\0\2"},
    "a finish without a token": lambda fake, m: {"tokens": b"", "finish": 1},
}


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("name", LIES)
def test_a_lie_ends_the_text(draft: Drafter, name: str, drafting: bool) -> None:
    """That text alone: another one of the same edge, and the next one, are as they should be."""
    lies = only_long(lambda fake, m: [verdict(fake, m, **LIES[name](fake, m))])
    with Fake(lies) as fake, Edge(fake.address, draft if drafting else None) as edge:
        bad, good = background(edge.generate, [[1, 2, 3]], TEN), background(edge.generate, [[1]], TEN)
        ends_with(bad, "the server sent a verdict that does not continue this text")
        assert [c.token_ids for c in good.result(PATIENCE)] == [truth(1)]
        assert edge.generate([[1, 2]], TEN)[0].token_ids == truth(2)
    assert drafting == any(m.parents for m in fake.of(Draft) if isinstance(m, Draft))


@pytest.mark.parametrize("drafting", [False, True])
def test_noise_is_ignored(draft: Drafter, drafting: bool) -> None:
    """Verdicts of other rounds, bases and sessions, answers that came before, errors about nothing of ours: none of them is in the text."""

    def noisy(fake: Fake, m: Draft) -> Iterator[Answer]:
        wrong = pack_ids([99])
        for right in honest(fake, m):
            assert isinstance(right, Verdict)
            for changes in (
                {"round": m.round + 1}, {"round": m.round - 1}, {"round": 2**32 - 1}, {"base": right.base + 1}, {"base": right.base - 1}, {"base": 0},
                {"session": b"?" * 16},
            ):  # fmt: skip
                yield verdict(fake, m, **{"base": right.base, "tokens": wrong, "finish": 1, **changes})
            yield Error(b"?" * 16, "session", "of another session")
            yield Opened(m.session, 3)
            yield WELCOME
            yield Cancel(m.session)
            yield right
            yield right

    with Fake(noisy) as fake, Edge(fake.address, draft if drafting else None) as edge:
        assert [c.token_ids for c in edge.generate([[1, 2, 3], [1]], TEN)] == [truth(3), truth(1)]


GARBAGE = [b"", b"SPEG", bytes(512), b"\xff" * 65536, encode(Close(bytes(16)))[:-1] + b"\1", NEWER]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_ends_the_edge(garbage: bytes) -> None:
    """All its texts get a sentence, and whoever comes later another one."""
    arrived = threading.Event()

    def speak(fake: Fake, m: Draft) -> Iterable[Answer]:
        if fake.first[m.session] == 1:
            arrived.set()
            return []
        return [garbage]

    with Fake(speak) as fake, Edge(fake.address) as edge:
        other = background(edge.generate, [[1]], TEN)
        assert arrived.wait(PATIENCE)
        ends_with(background(edge.generate, [[1, 2, 3]], TEN), f"{fake.address} does not speak this protocol: ", "protocol")
        ends_with(other, f"{fake.address} does not speak this protocol: ", "protocol")
        until(lambda: edge._closing, "the end")
        with pytest.raises(ServerError, match=f"{fake.address} does not speak this protocol: "):
            edge.generate([[1]], TEN)


def test_an_error_ends_its_session() -> None:
    refuses = only_long(lambda fake, m: [Error(m.session, "internal", "the server stumbled", m.round)])
    with Fake(refuses) as fake, Edge(fake.address) as edge:
        bad, good = background(edge.generate, [[1, 2, 3]], TEN), background(edge.generate, [[1]], TEN)
        ends_with(bad, "the server refuses: the server stumbled", "internal")
        assert [c.token_ids for c in good.result(PATIENCE)] == [truth(1)]


def test_an_error_about_no_session_ends_all() -> None:
    with Fake(lambda fake, m: [Error(wire.NO_SESSION, "frame", "that was no frame")]) as fake, Edge(fake.address) as edge:
        with pytest.raises(ServerError, match="the server refuses: that was no frame") as e:
            edge.generate([[1], [2]], TEN)
        assert e.value.code == "frame"


# ----------------------------------------------------------------------------------------------------------------------
# silence


def test_a_round_is_sent_again(hasty: None, draft: Drafter) -> None:
    """The same one, to the byte, until it is answered; its answer is taken once."""
    asked: dict[int, list[Draft]] = {}

    def slow(fake: Fake, m: Draft) -> Iterable[Answer]:
        asked.setdefault(m.round, []).append(m)
        return [] if len(asked[m.round]) < 3 else [verdict(fake, m)] * 2

    with Fake(slow) as fake, Edge(fake.address, draft) as edge:
        (done,) = edge.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
        until(lambda: fake.of(Close), "CLOSE")
    assert done.token_ids == truth(3, 4) and done.speculation.rounds == 4
    assert sorted(asked) == [1, 2, 3, 4]
    assert all(len(same) >= 3 and all(m == same[0] for m in same) for same in asked.values())
    assert done.speculation.bytes_up == 512 * (1 + sum(map(len, asked.values())) + len(fake.of(wire.Grown)))


def test_a_gap_in_a_stream_closes(hasty: None) -> None:
    """A verdict is lost and two change places: the repeated round says where the text ends, and the answer goes on from there."""

    def gaps(fake: Fake, m: Draft) -> Iterable[Answer]:
        if m.base == 3:
            return [verdict(fake, m, base=base) for base in (3, 4, 6, 5, 8, 7)]
        return [verdict(fake, m, fake.ends[m.session] - m.base)]

    with Fake(gaps) as fake, Edge(fake.address) as edge:
        assert edge.generate([[1, 2, 3]], TEN)[0].token_ids == truth(3)
    asked = [m for m in fake.of(Draft) if isinstance(m, Draft)]
    assert len(asked) > 1 and {(m.round, m.run_until) for m in asked} == {(1, 13)}
    assert [m.base for m in asked] == sorted(m.base for m in asked)


def test_nothing_new_is_no_lie(hasty: None) -> None:
    def slow(fake: Fake, m: Draft) -> Iterable[Answer]:
        asked.append(m)
        return [] if len(asked) == 1 else [verdict(fake, m, tokens=b"", verified=0)] if len(asked) < 4 else honest(fake, m)

    asked: list[Draft] = []
    with Fake(slow) as fake, Edge(fake.address) as edge:
        assert edge.generate([[1, 2, 3]], TEN)[0].token_ids == truth(3)


def test_patience_ends(hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the text that hears nothing; one that does goes on."""
    monkeypatch.setattr(rounds_module, "PATIENCE", 1.0)
    with Fake(only_long(silent)) as fake, Edge(fake.address) as edge:
        begun = time.monotonic()
        bad = background(edge.generate, [[1, 2, 3]], TEN)
        assert edge.generate([[1]], TEN)[0].token_ids == truth(1)
        ends_with(bad, f"{fake.address} has not answered for 1 s: check the network and the server")
        assert time.monotonic() - begun > 1.0
        assert len([m for m in fake.of(Draft) if fake.first[m.session] == 3]) > 2  # type: ignore[attr-defined]
        assert edge.generate([[1, 2]], TEN)[0].token_ids == truth(2)


@pytest.mark.parametrize("why", ["a lie", "silence"])
def test_a_text_that_is_given_up_is_cancelled(hasty: None, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr(rounds_module, "PATIENCE", 0.1)
    with Fake(silent if why == "silence" else lambda fake, m: [verdict(fake, m, tokens=b"", finish=1)]) as fake, Edge(fake.address) as edge:
        with pytest.raises(ServerError):
            edge.generate([[1]], TEN)
        with pytest.raises(ServerError):
            edge.generate([[2]], TEN)
        (first, _) = (m.session for m in fake.of(Open) if isinstance(m, Open))
        assert Cancel(first) in fake.heard


def test_a_server_that_goes_away(hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts end with a sentence when the connection stays lost for as long as patience lasts."""
    monkeypatch.setattr(rounds_module, "PATIENCE", 1.0)
    fake = Fake(silent)
    try:
        with Edge(fake.address) as edge:
            texts = [background(edge.generate, [[i]], TEN) for i in (1, 2)]
            until(lambda: len({m.session for m in fake.of(Draft) if isinstance(m, Draft)}) == 2, "both rounds")
            fake.stop()
            for text in texts:
                ends_with(text, f"given up after 1 s: no server at {fake.address}: Connection refused; check the address and that specedge-server")
    finally:
        fake.stop()


def test_a_finished_text_is_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the connection is lost between the last verdict and CLOSE."""
    with Fake(honest) as fake, Edge(fake.address) as edge:
        lose(edge, Close, monkeypatch)
        assert edge.generate([[1]], TEN)[0].token_ids == truth(1)


def lose(edge: Edge, kind: type[Message], monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection of `edge` is found lost when a message of `kind` is sent."""
    connection = edge._link._connection
    assert connection is not None
    send = connection.send

    def fails(message: Message) -> int:
        if isinstance(message, kind):
            raise ServerError("the connection is lost")
        return send(message)

    monkeypatch.setattr(connection, "send", fails)


# ----------------------------------------------------------------------------------------------------------------------
# callers


@pytest.mark.parametrize("end", ["close", "drop"])
def test_dropping_the_iterator_cancels(end: str) -> None:
    """The server hears CANCEL; the edge is as good as new."""

    def two(fake: Fake, m: Draft) -> Iterable[Answer]:
        return list(honest(fake, m))[:2] if fake.first[m.session] == 3 else honest(fake, m)

    with Fake(two) as fake, Edge(fake.address) as edge:
        stream = edge.stream([1, 2, 3], TEN)
        assert not fake.of(Open)  # nothing is done for an iterator that nobody asks
        assert [next(stream).token_ids for _ in range(2)] == [[i] for i in truth(3, 2)]
        if end == "close":
            stream.close()
        del stream
        until(lambda: fake.of(Cancel), "CANCEL")
        assert fake.of(Cancel) == [Cancel(m.session) for m in fake.of(Open) if isinstance(m, Open)]
        assert edge.generate([[1]], TEN)[0].token_ids == truth(1)


def test_close_ends_the_callers() -> None:
    """All of them, with a sentence; the server hears CANCEL of every text; later callers hear that it is closed."""
    with Fake(silent) as fake:
        edge = Edge(fake.address)
        texts = [background(edge.generate, [[i]], TEN) for i in range(3)]
        until(lambda: len(fake.of(Draft)) == 3, "three rounds")
        edge.close()
        for text in texts:
            ends_with(text, "this edge (is|was) closed")
        until(lambda: len(fake.of(Cancel)) == 3, "CANCEL")
        for call in (lambda: edge.generate([[1]]), lambda: next(edge.stream([1]))):
            with pytest.raises(ServerError, match="this edge is closed"):
                call()
        edge.close()


def test_close_while_a_text_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker ends between a caller's look at the edge and its request: the request is answered all the same."""
    with Fake(honest) as fake:
        edge = Edge(fake.address)
        tell = edge._tell

        def late(*args: object) -> None:
            edge.close()
            tell(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(edge, "_tell", late)
        ends_with(background(edge.generate, [[1]], TEN), "this edge (is|was) closed")
        assert not fake.of(Open)


def test_close_on_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """CANCEL cannot be sent: the callers get their sentence nevertheless."""
    with Fake(silent) as fake:
        edge = Edge(fake.address)
        texts = [background(edge.generate, [[i]], TEN) for i in range(3)]
        until(lambda: len(fake.of(Draft)) == 3, "three rounds")
        lose(edge, Cancel, monkeypatch)
        edge.close()
        for text in texts:
            ends_with(text, "this edge (is|was) closed")


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "the prompt holds no tokens"),
        ("text", "there is no tokenizer here: name a draft, or a tokenizer, or give the prompt as token ids"),
        ([1, -1], "the prompt holds something that is no token id"),
        ([2**32], "the prompt holds something that is no token id"),
        (["x"], "the prompt holds something that is no token id"),
        ([1, None], "the prompt holds something that is no token id"),
        ([1] * 7 + [-1], "the prompt holds something that is no token id"),
    ],
)
def test_a_bad_prompt_hurts_nobody_else(monkeypatch: pytest.MonkeyPatch, prompt: list[int], sentence: str) -> None:
    monkeypatch.setattr(wire, "CHUNK", 7)
    monkeypatch.setattr(wire, "FIRST", 7)
    with Fake(honest) as fake, Edge(fake.address) as edge:
        with pytest.raises(ServerError, match=sentence):
            edge.generate([prompt], TEN)
        assert edge.generate([[1]], TEN)[0].token_ids == truth(1)


def test_a_bad_prompt_cancels_those_before_it() -> None:
    with Fake(only_long(silent)) as fake, Edge(fake.address) as edge:
        with pytest.raises(ServerError, match="the prompt holds no tokens"):
            edge.generate([[1, 2, 3], []], TEN)
        assert edge.generate([[1]], TEN)[0].token_ids == truth(1)  # by now the worker has seen all that the first call asked for
        assert [m.session for m in fake.of(Cancel) if isinstance(m, Cancel)] == [s for s, first in fake.first.items() if first == 3]


def test_a_draft_and_a_tokenizer_that_do_not_agree(draft: Drafter, monkeypatch: pytest.MonkeyPatch) -> None:
    other = byte_tokenizer()
    other.add_special_tokens(["<other>"])
    monkeypatch.setattr(draft, "tokenizer", Tokenizer(byte_tokenizer()))
    with Fake(honest) as fake, pytest.raises(ServerError, match="the draft has another tokenizer than the one that was named"):
        Edge(fake.address, draft, tokenizer=Tokenizer(other))


def test_a_draft_belongs_to_one_edge_at_a_time(draft: Drafter) -> None:
    with Fake(honest) as fake:
        with Edge(fake.address, draft), pytest.raises(UseError, match="in the hands of another Edge: close that one, or load a Drafter for each"):
            Edge(fake.address, draft)
        with pytest.raises(ServerError):
            Edge("specedge://127.0.0.1:1", draft)
        with Edge(fake.address, draft) as edge:
            assert edge.generate([[1]], TEN)[0].token_ids == truth(1)


@pytest.mark.parametrize("autopilot", [True, False])
def test_only_an_autopilot_leaves_a_text_to_a_server_that_wants_no_nodes(draft: Drafter, autopilot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one the rounds go on, each a step of the server without a tree, until it wants nodes again."""
    monkeypatch.setattr(draft, "config", replace(draft.config, autopilot=autopilot))

    def poor(fake: Fake, m: Draft) -> Iterator[Answer]:
        for base in range(m.base, max(m.base + 1, m.run_until)):
            yield verdict(fake, m, base=base, row_budget=0 if base < 5 else 6)

    with Fake(poor) as fake, Edge(fake.address, draft) as edge:
        assert edge.generate([[1]], TEN)[0].token_ids == truth(1)
        rounds = [m for m in fake.of(Draft) if isinstance(m, Draft)]
    assert any(m.run_until for m in rounds) == autopilot
    if not autopilot:
        assert [bool(m.tokens) for m in rounds[:5]] == [True, *[False] * 4] and any(m.tokens for m in rounds[5:])


def test_an_edge_believes_what_the_server_says_of_its_rows(draft: Drafter, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first WELCOME that knows; a server that does not know yet leaves the edge to its rounds. What others run in a step is theirs."""

    def crowded(fake: Fake, m: Draft) -> Iterator[Answer]:
        yield verdict(fake, m, verified=3, rows=40, verify_us=50_000)

    for welcome in (WELCOME, msgspec.structs.replace(WELCOME, pass_us=80_000, row_ns=2_000_000, knee=8)):
        monkeypatch.setattr(draft, "pace", Pace())
        monkeypatch.setattr(draft, "_rounds", 0)  # those of this test are not for the others'
        seen = list[Served | None]()
        monkeypatch.setattr(draft, "verdict", lambda *a, inner=draft.verdict, seen=seen: (seen.append(a[2]), inner(*a))[1])
        with Fake(crowded, (welcome,)) as fake, Edge(fake.address, draft) as edge:
            known = draft.pace.verify
            assert known.confident == (welcome.pass_us > 0)
            assert not known.confident or [known.predict(n, 0) for n in (8, 18)] == pytest.approx([0.08, 0.1])
            assert edge.generate([[1]], TEN)[0].token_ids == truth(1)
        assert seen and all(s == Served(0.05, 40, 37) for s in seen)


def test_ids_that_are_no_list_of_prompts(server: Server) -> None:
    with Edge(server.address) as edge, pytest.raises(ServerError, match="'1' is no prompt: give a string or a list of token ids, and several"):
        edge.generate([1, 2, 3])  # type: ignore[list-item]


# ----------------------------------------------------------------------------------------------------------------------
# a real server


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Drafter:
    """A draft for the scripted server; it guesses nothing right."""
    path = random_model(tmp_path_factory.mktemp("draft"), seed=5, vocab_size=VOCAB)
    return drafter(path, DraftConfig(tree_size=6, width=4, max_sessions=3, engine=EngineConfig(kv_tokens=4096, max_rows=64)))


@pytest.fixture
def server(model: Path) -> Iterator[Server]:
    target = engine(model)
    with Server(target) as server:
        yield server
        until(lambda: len(server._sessions) == 0, "the end of all sessions")
    check_empty(target)


DRAFTS: dict[str, dict[str, object] | None] = {  # name: how the draft differs from the target, and its config from the usual one
    "no draft": None,
    "the target itself": {"seed": 3, "depth": 12},
    "the target itself, as it pays": {"seed": 3},
    "a stranger": {"seed": 4},
    "a stranger of another shape": {"seed": 4, "hidden_size": 32, "num_hidden_layers": 1},
    "a small vocabulary": {"seed": 4, "vocab_size": 60},
    "a large vocabulary": {"seed": 4, "vocab_size": 140},
    "a short context": {"seed": 3, "max_position_embeddings": 20},
    "no nodes": {"seed": 3, "tree_size": 0},
    "one node": {"seed": 3, "tree_size": 1},
    "large trees": {"seed": 4, "tree_size": 120, "width": 60, "depth": 4},
    "not proactive": {"seed": 3, "proactive": False},
    "not ahead": {"seed": 3, "ahead": False},
    "room for one": {"seed": 3, "max_sessions": 1},
}


@pytest.mark.parametrize("name", DRAFTS)
def test_the_ids_are_those_of_the_target(server: Server, oracle: Engine, tmp_path: Path, name: str) -> None:
    """Three texts at once, greedy and sampled; then the drafter is as empty as the server."""
    how = DRAFTS[name]
    drafts = None
    if how is not None:
        config = {k: v for k, v in how.items() if k in DraftConfig.__slots__}
        path = random_model(tmp_path / "draft", **{k: v for k, v in how.items() if k not in config})  # type: ignore[arg-type]
        drafts = drafter(path, DraftConfig(**{"engine": EngineConfig(kv_tokens=8192, max_rows=256), **config}))  # type: ignore[arg-type]
    prompts = [[5], [7, 3, 9, 50, 40, 2], [i % 60 for i in range(18)]]
    done: list[Completion] = []
    with Edge(server.address, drafts) as edge:
        for params in (SamplingParams(max_tokens=16), SamplingParams(0.8, 16, seed=7)):
            done += edge.generate(prompts, params)
            assert [c.token_ids for c in done[-3:]] == [c.token_ids for c in oracle.generate(prompts, params)]
    used = [c.speculation for c in done]
    if name == "the target itself":
        assert all(s.tokens_per_round(16) > 2 and s.accepted > 8 for s in used)
    if name in ("no draft", "no nodes"):
        assert all(s.drafted == s.accepted == s.hits == s.misses == 0 for s in used)
    assert all(s.hits + s.misses <= s.rounds <= 16 and s.accepted <= s.drafted and s.bytes_up and s.bytes_down for s in used)
    if drafts is not None:
        drafts.pool.check()
        assert len(drafts.pool._free) == drafts.pool.total and not drafts._sessions


def test_the_server_goes_on_while_the_edge_draws_breath(server: Server, oracle: Engine, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a draft that is the target, and steps that take a while: most rounds are begun by the server, from what had grown; the ids are the same.
    An edge that tells nothing has to ask for every round."""
    step = server._engine.step

    def slow(most: int) -> object:
        time.sleep(0.06)
        return step(most)

    monkeypatch.setattr(server._engine, "step", slow)
    params = SamplingParams(0.8, 40, seed=7)
    want = [c.token_ids for c in oracle.generate([[5], [7, 3, 9]], params)]
    asked, rounds = {True: 0, False: 0}, {True: 0, False: 0}
    for ahead in (True, False):
        drafts = drafter(model, DraftConfig(tree_size=3, ahead=ahead, autopilot=False, engine=EngineConfig(kv_tokens=8192, max_rows=256)))
        with Edge(server.address, drafts) as edge:
            send = edge._link.send

            def count(m: Message, send: Callable[[Message], int] = send, ahead: bool = ahead) -> int:
                asked[ahead] += isinstance(m, Draft)
                assert ahead or not isinstance(m, wire.Grown)
                return send(m)

            monkeypatch.setattr(edge._link, "send", count)
            done = background(edge.generate, [[5], [7, 3, 9]], params).result(PATIENCE)
        assert [c.token_ids for c in done] == want
        rounds[ahead] = sum(c.speculation.rounds for c in done)
        assert all(c.speculation.accepted <= c.speculation.drafted <= 3 * c.speculation.rounds for c in done)
        assert all(c.speculation.tokens_per_round(40) > 2 for c in done)
    assert asked[False] >= rounds[False] and asked[True] < rounds[True] / 2, (asked, rounds)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_server_is_told_what_grows(tmp_path: Path, ahead: bool) -> None:

    def slow(fake: Fake, m: Draft) -> Iterator[Answer]:
        time.sleep(0.03)
        return honest(fake, m)

    draft = drafter(random_model(tmp_path, 1, vocab_size=VOCAB), DraftConfig(tree_size=9, autopilot=False, ahead=ahead))
    with Fake(slow) as fake, Edge(fake.address, draft) as edge:
        (done,) = background(edge.generate, [[1, 2, 3]], SamplingParams(max_tokens=10)).result(PATIENCE)
    assert done.token_ids == truth(3)
    assert {m.ahead for m in fake.of(Draft) if isinstance(m, Draft)} == {9 * ahead} and bool(fake.of(wire.Grown)) == ahead


def test_an_edge_has_many_callers(server: Server, oracle: Engine, model: Path) -> None:
    """Threads that generate, stream and drop, with more texts than the drafter has room for."""
    drafts = drafter(model, DraftConfig(tree_size=7, max_sessions=2, engine=EngineConfig(kv_tokens=8192, max_rows=256)))
    prompts = [[(17 * i + j) % 105 for j in range(1 + 3 * i)] for i in range(6)]
    params = [SamplingParams((0.0, 0.8)[i % 2], 12, seed=i) for i in range(6)]

    def one(i: int) -> list[list[int]]:
        if i == 5:
            stream = edge.stream(prompts[0], params[0])
            next(stream)
            stream.close()
        streamed = [t for c in edge.stream(prompts[i], params[i]) for t in c.token_ids]
        return [streamed, *(c.token_ids for c in edge.generate([prompts[i], prompts[0]], params[i]))]

    with Edge(server.address, drafts) as edge:
        running = [background(one, i) for i in range(6)]
        got = [r.result(PATIENCE) for r in running]
    for i, ids in enumerate(got):
        own, zero = (c.token_ids for c in oracle.generate([prompts[i], prompts[0]], params[i]))
        assert ids == [own, own, zero]


def test_a_slow_server_is_asked_again(server: Server, oracle: Engine, hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take longer than RESEND: every round comes many times, each is answered once, the stream stays whole."""
    step = server._engine.step

    def slow(most: int) -> object:
        time.sleep(0.12)
        return step()

    monkeypatch.setattr(server._engine, "step", slow)
    with Edge(server.address) as edge:
        (done,) = edge.generate([[5, 6]], SamplingParams(max_tokens=5))
    assert done.token_ids == oracle.generate([[5, 6]], SamplingParams(max_tokens=5))[0].token_ids
    assert done.speculation.bytes_up > 4 * 512


def test_nobody_waits_for_a_draft_that_reads_a_long_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server writes by itself meanwhile, and with the draft's help from then on."""
    path, prompt, params = random_model(tmp_path, 1, vocab_size=VOCAB), [i % 97 for i in range(400)], SamplingParams(max_tokens=100, seed=1)
    want = engine(path).generate([prompt], params)[0].token_ids
    draft = drafter(path)
    grow = draft.grow

    def late(stop: Callable[[], bool]) -> bool:
        return any(len(s.tokens) > len(prompt) for s in draft._sessions) and grow(stop)

    monkeypatch.setattr(draft, "grow", late)
    with Server(engine(path)) as server, Edge(server.address, draft) as edge:
        (done,) = background(edge.generate, [prompt], params).result(PATIENCE)
    assert done.token_ids == want and done.speculation.drafted > 0


def test_a_draft_that_fails_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server decodes alone, and the text is the same."""
    path = random_model(tmp_path, 1, vocab_size=VOCAB)
    want = engine(path).generate([[1, 2, 3]], SamplingParams(max_tokens=30, seed=1))[0].token_ids
    draft, calls = drafter(path), iter(range(10**6))
    grow, rest, rests = draft.grow, Edge._rest, list[float]()

    def fail(stop: Callable[[], bool]) -> bool:
        rests.clear()
        if next(calls) == 6:
            raise RuntimeError("the draft is broken")
        return grow(stop)

    def watched(edge: Edge, seconds: float) -> None:
        rests.append(seconds)
        rest(edge, seconds)

    monkeypatch.setattr(draft, "grow", fail)
    monkeypatch.setattr(Edge, "_rest", watched)
    with Server(engine(path)) as server, Edge(server.address, draft) as edge:
        for _ in range(2):
            assert edge.generate([[1, 2, 3]], SamplingParams(max_tokens=30, seed=1))[0].token_ids == want
    assert rests[0] == 0.0, "nobody waits for a tree that will not come"


@pytest.mark.parametrize("name", ["open", "ready", "size", "submit", "verdict", "cancel"])
def test_what_fails_for_one_text_costs_it_its_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The server decodes it alone, its ids are the same, and another text of the edge is drafted all the while, and afterwards."""
    path, params = random_model(tmp_path, 1, vocab_size=VOCAB), SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    want = [c.token_ids for c in engine(path).generate([[1, 2, 3], [4, 5]], params)]
    draft = drafter(path, DraftConfig(max_sessions=2, autopilot=False))
    call, broken = getattr(draft, name), list[object]()

    def fail(first: object, *rest: object) -> object:
        tokens = first if name == "open" else first.tokens  # type: ignore[attr-defined]
        if tokens[:3] == [1, 2, 3]:  # type: ignore[index]
            broken.append(first)
            raise RuntimeError("this text cannot be drafted")
        return call(first, *rest)

    monkeypatch.setattr(draft, name, fail)
    with Server(engine(path)) as server, Edge(server.address, draft) as edge:
        done = background(edge.generate, [[1, 2, 3], [4, 5]], params).result(PATIENCE)
        assert [c.token_ids for c in done] == want and broken
        assert done[1].speculation.drafted > 0 and (name == "cancel" or done[0].speculation.accepted < 38)
        assert edge.generate([[4, 5]], params)[0].token_ids == want[1]
