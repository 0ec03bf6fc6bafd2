"""Sessions: every rule of docs/protocol.md by plain calls over a tiny random target, with a clock that the test moves.

A second engine, which never sees a session, says what the text must be. Whatever is refused, dropped or broken: the other session goes on to
exactly those ids, and nothing of the first is left in the engine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from msgspec.structs import replace

from specedge.config import SamplingParams
from specedge.engine.cost import ENOUGH, CostModel
from specedge.engine.engine import Engine
from specedge.engine.pages import PageTable
from specedge.net import wire
from specedge.net.quota import Quota
from specedge.net.sessions import PAUSE, Peer, Sessions
from specedge.net.wire import (
    Busy,
    Cancel,
    Close,
    Draft,
    Error,
    GoAway,
    Grown,
    Hello,
    Lease,
    Message,
    Open,
    Opened,
    Prompt,
    Verdict,
    Welcome,
    pack_ids,
    unpack_ids,
)
from specedge.text import Tokenizer
from specedge.tree import EMPTY, TokenTree, make_tree
from tests.helpers import TINY, check_empty, engine, random_model

ADA, BOB = Peer(b"\0ada!", "ada"), Peer(b"\0bob!", "bob")
X, Y, Z = (bytes([i]) * 16 for i in (1, 2, 3))  # sessions
MODEL, NONE = b"m" * 32, wire.NO_SESSION
VOCAB = TINY["vocab_size"]
CONTEXT = TINY["max_position_embeddings"]
MAX_NODES = 47  # the engine's steps hold 48 rows, one of them the root
PROMPT = [7, 3, 9, 50, 100, 2]
SAMPLED = wire.Sampling(0.8, 1234567)
GREEDY = wire.Sampling(0.0, 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """The engine under the sessions, and the oracle."""
    path = random_model(tmp_path_factory.mktemp("target"), seed=3)
    return engine(path, kv_tokens=1024, page_size=16, max_rows=MAX_NODES + 1), engine(path, kv_tokens=1024, page_size=16)


@dataclass
class Desk:
    """One table of sessions, its clock, and short forms of the messages. `text` is what an honest client has collected of a session."""

    engine: Engine
    oracle: Engine
    sessions: Sessions
    now: float = 100.0
    texts: dict[bytes, list[int]] = field(default_factory=dict)
    known: ClassVar[dict[str, list[int]]] = {}

    def say(self, message: Message, peer: Peer = ADA) -> list[Message]:
        replies = self.sessions.handle(peer, message, self.now)
        assert {p for p, _ in replies} <= {peer}, "an answer went to somebody else"
        for _, reply in replies:
            wire.decode(wire.encode(reply))
            assert not isinstance(reply, Error) or 10 < len(reply.text) <= 300
        return [m for _, m in replies]

    def hello(self, *peers: Peer) -> None:
        for peer in peers:
            assert [type(m) for m in self.say(Hello("test", b""), peer)] == [Welcome]

    def open(self, session: bytes = X, tokens: list[int] = PROMPT, peer: Peer = ADA, **changes: object) -> None:
        """Open a session and see it opened; its tokens are PROMPT and its text 12 tokens long unless told otherwise."""
        assert self.say(opening(session, tokens, **changes), peer) == [Opened(session, len(tokens))]
        self.texts[session] = list(tokens)

    def draft(
        self, session: bytes = X, number: int = 1, tree: TokenTree = EMPTY, *, base: int = -1, until: int = 0, peer: Peer = ADA
    ) -> list[Message]:  # fmt: skip
        """Send a round, on the end of the text unless told otherwise."""
        base = len(self.texts[session]) if base < 0 else base
        return self.say(Draft(session, number, base, pack_ids(tree.tokens), tree.parents.tobytes(), until), peer)

    def step(self) -> list[tuple[Peer, Message]]:
        return self.sessions.verdicts(self.engine.step(), self.now, 0.0)

    def run(self) -> list[Verdict]:
        """Step until nothing is left to do; takes what came into the texts."""
        found: list[Verdict] = []
        while self.engine.busy:
            for _, m in self.step():
                assert isinstance(m, Verdict)
                found.append(m)
                self.take(m)
        return found

    def take(self, m: Verdict) -> None:
        text = self.texts[m.session]
        assert m.base == len(text)
        text += unpack_ids(m.tokens).tolist()

    def finish(self, session: bytes = X, number: int = 1, peer: Peer = ADA) -> list[int]:
        """Run a session alone to its end; returns its output."""
        known = len(self.texts[session])
        assert self.draft(session, number, until=CONTEXT, peer=peer) == []
        self.run()
        return self.texts[session][known:]

    def ids(self, tokens: list[int] = PROMPT, sampling: wire.Sampling = SAMPLED, most: int = 12, stop: tuple[int, ...] = ()) -> list[int]:
        """What the target alone says; asked once."""
        key = str((tokens, sampling, most, stop))
        if key not in self.known:
            params = SamplingParams(sampling.temperature, most, sampling.seed, stop)
            self.known[key] = self.oracle.generate([tokens], params)[0].token_ids
        return self.known[key]


@pytest.fixture
def desk(models: tuple[Engine, Engine]) -> Iterator[Desk]:
    """ADA and BOB have said HELLO. Afterwards everything is cancelled, and nothing may be left."""
    desk = Desk(*models, Sessions(models[0], MODEL, lease=600.0))
    desk.hello(ADA, BOB)
    yield desk
    desk.sessions.forget(ADA, desk.now)
    desk.sessions.forget(BOB, desk.now)
    assert len(desk.sessions) == 0
    check_empty(desk.engine)


def opening(session: bytes = X, tokens: list[int] = PROMPT, first: bytes | None = None, **changes: object) -> Open:
    """An OPEN of `tokens` that is right, but for `changes`; `first` are those that come with it."""
    message = Open(session, pack_ids(tokens) if first is None else first, len(tokens), len(tokens), SAMPLED, [], 12)
    for name, value in changes.items():
        assert hasattr(message, name)
        setattr(message, name, value)
    return message


def drafting(session: bytes = X, number: int = 1, base: int = len(PROMPT), tokens: list[int] | bytes = b"", parents: list[int] = []) -> Draft:  # noqa: B006
    return Draft(session, number, base, tokens if isinstance(tokens, bytes) else pack_ids(tokens), bytes(parents))


def refused(replies: list[Message], code: str, session: bytes = X, number: int = 0) -> None:
    assert len(replies) == 1 and isinstance(replies[0], Error), replies
    assert (replies[0].code, replies[0].session, replies[0].round) == (code, session, number), replies


def likely(ids: list[int]) -> TokenTree:
    """A tree whose first branch is `ids`, with a wrong guess beside each of them."""
    tokens, parents, at = list[int](), list[int](), 0
    for i in ids:
        tokens += [(i + 1) % VOCAB, i]
        parents += [at, at]
        at = len(tokens)
    return make_tree(tokens, parents)


# ----------------------------------------------------------------------------------------------------------------------
# HELLO


FIRST = [opening(), Prompt(X, 0, b""), drafting(), Cancel(X), Close(X), Verdict(X, 1, 1, b"", 0, 0, 0, 0, 0), Error(X, "code", "text")]


@pytest.mark.parametrize("message", FIRST, ids=lambda m: type(m).__name__)
def test_hello_comes_first(models: tuple[Engine, Engine], message: Message) -> None:
    desk = Desk(*models, Sessions(models[0], MODEL))
    desk.hello(BOB)  # opens the door for BOB alone
    refused(desk.say(message), "hello", X, getattr(message, "round", 0))
    assert len(desk.sessions) == 0
    check_empty(desk.engine)


def test_welcome_says_what_is_served(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.engine, "eos_ids", (5, 104))
    (welcome,) = desk.say(Hello("test", b""))
    assert isinstance(welcome, Welcome) and welcome.build.startswith("specedge ")
    limits = wire.Limits(MAX_NODES, CONTEXT, 256)
    assert welcome == Welcome(welcome.build, MODEL, b"", VOCAB, [5, 104], limits, 600_000, wire.Load(0, 1024, 1024))
    assert desk.say(Hello("again", b"")) == [welcome]


def test_welcome_says_what_rows_cost_once_that_is_known(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.engine, "cost", cost := CostModel())
    for n in [1, 2, 4, 8, 16, 32] * ENOUGH:
        cost.observe(n, 0, 0.08 + 0.002 * max(0, n - 8))
    assert (law := cost.law) is not None
    (welcome,) = desk.say(Hello("test", b""))
    assert isinstance(welcome, Welcome)
    assert (welcome.pass_us, welcome.row_ns, welcome.knee) == (int(law.base * 1e6), int(law.slope * 1e9), law.knee)
    assert 75_000 < welcome.pass_us < 85_000 and 1_500_000 < welcome.row_ns < 2_500_000


def test_tokenizers_must_be_the_same(models: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(*models, Sessions(models[0], MODEL))
    assert [type(m) for m in desk.say(Hello("test", b"d" * 32), BOB)] == [Welcome]  # a target without a tokenizer has nothing to compare
    monkeypatch.setattr(desk.engine, "tokenizer", SimpleNamespace(digest=lambda: b"t" * 32))
    refused(desk.say(Hello("test", b"d" * 32)), "tokenizer", NONE)
    refused(desk.say(opening()), "hello")  # a refused HELLO opens no door
    for digest in (b"", b"t" * 32):
        (welcome,) = desk.say(Hello("test", digest))
        assert isinstance(welcome, Welcome) and welcome.tokenizer == b"t" * 32
    desk.open()
    desk.sessions.forget(ADA, desk.now)


def test_hello_is_cheap(models: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger that says nothing but HELLO must not keep the engine's thread busy."""
    reads: list[dict[str, int]] = []

    def get_vocab(with_added_tokens: bool) -> dict[str, int]:
        reads.append({"a": 0, "b": 1})
        return reads[-1]

    monkeypatch.setattr(models[0], "tokenizer", Tokenizer(SimpleNamespace(get_vocab=get_vocab)))
    desk = Desk(*models, Sessions(models[0], MODEL))
    reads.clear()
    desk.hello(ADA, ADA, BOB)
    assert len(reads) <= 1


# ----------------------------------------------------------------------------------------------------------------------
# OPEN and PROMPT


def test_a_prompt_in_pieces(desk: Desk) -> None:
    """OPENED comes with the last token and not before, for two sessions whose pieces come in turns."""
    prompts = {X: list(range(10, 30)), Y: list(range(60, 40, -1))}
    pieces = [(0, 0), (0, 7), (7, 8), (8, 19), (19, 20)]  # the first is what OPEN holds
    for at, end in pieces:
        for session, tokens in prompts.items():
            piece = pack_ids(tokens[at:end])
            first = opening(session, tokens, first=piece)
            said = desk.say(Prompt(session, at, piece) if end else first)
            assert said == ([Opened(session, 20)] if end == 20 else [])
    for session, tokens in prompts.items():
        desk.texts[session] = tokens.copy()
        assert desk.finish(session) == desk.ids(tokens)


def test_a_round_may_follow_at_once(desk: Desk) -> None:
    """Without waiting for OPENED, let alone for the prompt to be computed, which here takes three steps."""
    tokens = [i % VOCAB for i in range(100)]
    desk.open(X, tokens)
    ids = desk.ids(tokens)
    assert desk.draft(X, 1, likely(ids[:3])) == []
    assert [desk.step(), desk.step()] == [[], []]
    (verdict,) = desk.run()
    assert (verdict.base, unpack_ids(verdict.tokens).tolist(), verdict.finish) == (100, ids[:4], 0)
    assert desk.texts[X] == tokens + ids[:4]


def test_the_text_goes_on_where_another_session_left_it(desk: Desk) -> None:
    """max_tokens counts from prompt_len, also for what is known of the output."""
    ids = desk.ids()
    desk.open(X, PROMPT + ids[:5], prompt_len=len(PROMPT))
    assert desk.finish() == ids[5:]


def test_stop_ids_and_no_others_end_a_text(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = desk.ids()
    stop = next(i for i in ids[2:] if i not in ids[:2])
    monkeypatch.setattr(desk.engine, "eos_ids", (ids[0],))
    desk.open(X, stop_ids=[stop])
    assert desk.draft(until=CONTEXT) == []
    found = desk.run()
    assert desk.texts[X] == PROMPT + ids[: ids.index(stop) + 1]
    assert [m.finish for m in found] == [0] * (len(found) - 1) + [wire.FINISH.index("stop")]


def test_max_tokens_end_a_text(desk: Desk) -> None:
    desk.open(X, sampling=GREEDY)
    desk.draft(until=2**32 - 1)
    found = desk.run()
    assert [m.finish for m in found] == [0] * 11 + [wire.FINISH.index("length")]
    assert desk.texts[X] == PROMPT + desk.ids(sampling=GREEDY)


# ----------------------------------------------------------------------------------------------------------------------
# rounds


def test_rounds_rise_by_one(desk: Desk) -> None:
    """Any other number is an ERROR round that leaves the session and its text as they were."""
    ids = desk.ids()
    desk.open()
    for wrong in (0, 2, 2**32 - 1):
        refused(desk.draft(X, wrong), "round", X, wrong)
    assert desk.draft(X, 1, likely(ids[:2])) == []
    for wrong in (0, 2, 3):  # 2 would be the next, but round 1 is in flight
        refused(desk.draft(X, wrong), "round", X, wrong)
    assert [unpack_ids(m.tokens).tolist() for m in desk.run()] == [ids[:3]]
    assert desk.draft(X, 2) == []
    desk.run()
    for wrong in (0, 1, 4):
        refused(desk.draft(X, wrong), "round", X, wrong)
    assert desk.finish(X, 3) == ids[4:]


def nothing_new(number: int, base: int, finish: int = 0) -> Verdict:
    """A sign of life."""
    return Verdict(X, number, base, b"", 0, finish, MAX_NODES, 0, 0)


def test_a_repeat_in_flight_brings_a_sign_of_life(desk: Desk) -> None:
    """It changes nothing: one verdict comes, of the tree that came first."""
    ids = desk.ids()
    desk.open()
    assert desk.draft(X, 1, likely(ids[:2])) == []
    for tree in (likely(ids[:2]), EMPTY, likely([ids[0]])):
        assert desk.draft(X, 1, tree) == [nothing_new(1, len(PROMPT))]
    (verdict,) = desk.run()
    assert verdict.verified == len(PROMPT) + 4 and desk.texts[X] == PROMPT + ids[:3]


def test_a_repeat_is_answered_by_the_same_verdict(desk: Desk) -> None:
    """Whatever tree comes with it; with another base by all that is known from there; also when the text is finished."""
    ids = desk.ids()
    desk.open(max_tokens=4)
    desk.draft(X, 1, likely(ids[:1]))
    (first,) = desk.run()
    assert (unpack_ids(first.tokens).tolist(), first.verified, first.finish) == (ids[:2], len(PROMPT) + 2, 0)
    for tree in (likely(ids[:1]), EMPTY, make_tree([200], [9])):
        assert desk.draft(X, 1, tree, base=first.base) == [replace_verdict(first, verified=0)]
    (rest,) = desk.draft(X, 1, base=first.base + 1)
    assert rest == replace_verdict(first, base=first.base + 1, tokens=pack_ids(ids[1:2]), verified=0)
    assert desk.draft(X, 1, base=first.base + 2) == [nothing_new(1, first.base + 2)]
    refused(desk.draft(X, 1, base=first.base + 3), "base", X, 1)
    desk.draft(X, 2, likely(ids[2:4]))
    (last,) = desk.run()
    assert last.finish == wire.FINISH.index("length") and desk.texts[X] == PROMPT + ids[:4]
    assert desk.draft(X, 2, base=last.base) == [replace_verdict(last, verified=0)]
    assert desk.draft(X, 2, base=last.base + 1) == [replace_verdict(last, base=last.base + 1, tokens=pack_ids(ids[3:4]), verified=0)]
    assert not desk.engine.busy


def replace_verdict(m: Verdict, **changes: object) -> Verdict:
    """`m` with changes, and the times and rows of an answer that was known already."""
    values = {name: getattr(m, name) for name in m.__struct_fields__} | {"queue_us": 0, "verify_us": 0, "rows": 0} | changes
    return Verdict(**values)


def test_a_repeat_while_the_server_decodes_alone(desk: Desk) -> None:
    """The base says what the client has; it gets all tokens from there, and the stream goes on behind them."""
    ids = desk.ids()
    desk.open()
    desk.draft(X, 1, until=CONTEXT)
    for _ in range(6):
        desk.step()
    assert desk.draft(X, 1, base=len(PROMPT) + 6) == [nothing_new(1, len(PROMPT) + 6)]
    for have in (0, 1, 3):
        (m,) = desk.draft(X, 1, base=len(PROMPT) + have)
        assert isinstance(m, Verdict) and (m.round, m.base, m.finish) == (1, len(PROMPT) + have, 0)
        assert unpack_ids(m.tokens).tolist() == (ids[have:6] if have else ids[:1])  # the first base had a verdict, which comes again
    desk.texts[X] += ids[:6]
    assert [m.base for m in desk.run()] == [len(PROMPT) + i for i in range(6, 12)]
    assert desk.texts[X] == PROMPT + ids


def test_a_client_that_is_behind_catches_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new round below the committed length: its tree is ignored, all tokens come, as many as a frame holds, `finish` with the last."""
    monkeypatch.setattr(wire, "CHUNK", 5)
    ids = desk.ids()
    desk.open()
    desk.finish()
    got: list[int] = []
    for number, have in enumerate((0, 5, 10), 2):
        (m,) = desk.draft(X, number, likely(ids[have : have + 2]), base=len(PROMPT) + have)
        assert isinstance(m, Verdict) and (m.round, m.base, m.verified) == (number, len(PROMPT) + have, 0)
        assert wire.FINISH[m.finish] == ("length" if have == 10 else "")
        got += unpack_ids(m.tokens).tolist()
    assert got == ids and not desk.engine.busy
    (m,) = desk.draft(X, 5, base=0)
    assert isinstance(m, Verdict) and unpack_ids(m.tokens).tolist() == PROMPT[:5]


def test_a_base_above_the_text_changes_nothing(desk: Desk) -> None:
    """The same round with the right base is welcome afterwards."""
    desk.open()
    for base in (len(PROMPT) + 1, 2**32 - 1):
        refused(desk.draft(X, 1, base=base, until=CONTEXT), "base", X, 1)
        assert desk.run() == []
    assert desk.finish() == desk.ids()


def test_a_new_round_replaces_run_until(desk: Desk) -> None:
    ids = desk.ids()
    desk.open()
    desk.draft(X, 1, until=len(PROMPT) + 4)
    assert [(m.round, m.base) for m in desk.run()] == [(1, len(PROMPT) + i) for i in range(4)]
    desk.draft(X, 2, likely(ids[4:6]), until=CONTEXT)
    desk.step()  # brings ids[4:7]; from here on the server is alone
    for _ in range(2):
        desk.step()
    (m,) = desk.draft(X, 3, base=len(PROMPT) + 4)
    assert isinstance(m, Verdict) and (m.round, unpack_ids(m.tokens).tolist()) == (3, ids[4:9])
    assert not desk.engine.busy, "run_until 0 ends it"
    desk.texts[X] += ids[4:9]
    assert desk.finish(X, 4) == ids[9:]


def test_a_round_after_the_end_is_answered(desk: Desk) -> None:
    """The text is over: whatever comes is answered with what is known, and nothing waits for a verdict that never comes."""
    desk.open()
    desk.finish()
    (m,) = desk.draft(X, 2, likely([1]))
    assert m == nothing_new(2, len(desk.texts[X]), wire.FINISH.index("length"))
    desk.sessions.expire(desk.now + 601)
    assert len(desk.sessions) == 0, "it counts as a round in flight for ever"


def test_times_of_a_verdict(desk: Desk) -> None:
    """queue_us: from the arrival of the round to the step; verify_us: the step. What the server decodes alone was not waited for."""
    desk.open()
    desk.draft(X, 1, until=len(PROMPT) + 2)
    times = []
    for _ in range(2):
        times += [(m.queue_us, m.verify_us) for _, m in desk.sessions.verdicts(desk.engine.step(), desk.now + 0.75, 0.25) if isinstance(m, Verdict)]
    assert times == [(500_000, 250_000), (0, 250_000)]


def test_rows_of_a_verdict(desk: Desk) -> None:
    """Those that were verified for this session, and those of the whole step."""
    desk.open(X)
    desk.open(Y)
    desk.draft(X, 1, likely([1, 2]))
    desk.draft(Y, 1, likely([1, 2, 3, 4]))
    found = {m.session: (m.verified, m.rows) for _, m in desk.sessions.verdicts(desk.engine.step(), desk.now, 0.1) if isinstance(m, Verdict)}
    assert sum(own for own, _ in found.values()) == found[X][1] == found[Y][1] and found[X][0] < found[Y][0]


# ----------------------------------------------------------------------------------------------------------------------
# rounds ahead


def growing(desk: Desk, ids: list[int], right: int = 2) -> None:
    """A session whose first tree has the first `right` of `ids`, each behind a wrong guess, and goes on growing."""
    desk.open()
    tree = likely(ids[:right])
    assert desk.say(Draft(X, 1, len(PROMPT), pack_ids(tree.tokens), tree.parents.tobytes(), 0, MAX_NODES)) == []


def grown(ids: list[int], first: int = 5, parent: int = 4, since: int = 1) -> Grown:
    """A chain of `ids` below node `parent`."""
    parents = [parent, *range(first, first + len(ids) - 1)]
    return Grown(X, since, first, pack_ids(ids), b"".join(p.to_bytes(2, "little") for p in parents), bytes(len(ids)))


def test_the_server_goes_on_with_what_has_grown(desk: Desk) -> None:
    """Without another DRAFT, to the end of the chain."""
    ids = desk.ids()
    growing(desk, ids)
    assert desk.say(grown(ids[2:5])) == [] and desk.say(grown(ids[5:9], 8, 7)) == []
    ((_, first),) = desk.step()
    assert isinstance(first, Verdict) and unpack_ids(first.tokens).tolist() == ids[:3]
    assert (first.round, first.next, first.since, first.nodes) == (1, 2, 1, 6) and desk.engine.busy
    desk.take(first)
    refused(desk.draft(X, 3), "round", number=3)
    ((_, second),) = desk.step()
    assert isinstance(second, Verdict) and (second.round, second.next) == (2, 0) and not desk.engine.busy
    assert unpack_ids(second.tokens).tolist() == ids[3:10] and second.verified == 7
    desk.take(second)
    assert desk.finish(X, 3) == ids[10:] and desk.texts[X] == PROMPT + ids


def test_nodes_may_come_while_the_server_is_ahead(desk: Desk) -> None:
    """Numbers stay what they were, whatever the root is by then; below what is gone nothing counts."""
    ids = desk.ids()
    growing(desk, ids)
    desk.say(grown(ids[2:5]))
    desk.step()
    wrong = (ids[5] + 1) % VOCAB
    assert desk.say(grown([wrong], 8, 1)) == [], "below a wrong guess of the first tree, which is gone"
    assert desk.say(grown(ids[5:8], 9, 7)) == []
    ((_, second),) = desk.step()
    assert isinstance(second, Verdict) and unpack_ids(second.tokens).tolist() == ids[3:6] and (second.next, second.since, second.nodes) == (3, 1, 2)
    ((_, third),) = desk.step()
    assert isinstance(third, Verdict) and unpack_ids(third.tokens).tolist() == ids[6:9] and third.next == 0


def test_beside_others_a_round_begins_with_the_root_alone(desk: Desk) -> None:
    """Then nodes are numbered from there on; and not three times in a row."""
    ids = desk.ids()
    growing(desk, ids)
    desk.open(Y, peer=BOB)
    desk.draft(Y, until=CONTEXT, peer=BOB)
    verdicts = [m for p, m in desk.step() if p == ADA]
    assert [(m.next, m.since, m.nodes) for m in verdicts if isinstance(m, Verdict)] == [(2, 2, 0)]
    assert desk.say(grown(ids[3:5])) == [], "that was of the numbers before"
    assert desk.say(grown(ids[3:6], 1, 0, since=2)) == []
    verdicts = [m for p, m in desk.step() if p == ADA]
    assert [(unpack_ids(m.tokens).tolist(), m.next, m.since, m.nodes) for m in verdicts if isinstance(m, Verdict)] == [(ids[3:4], 3, 2, 2)]
    verdicts = [m for p, m in desk.step() if p == ADA]
    assert [(unpack_ids(m.tokens).tolist(), m.next, m.nodes) for m in verdicts if isinstance(m, Verdict)] == [(ids[4:7], 4, 0)]
    verdicts = [m for p, m in desk.step() if p == ADA]
    assert [(unpack_ids(m.tokens).tolist(), m.next, m.since) for m in verdicts if isinstance(m, Verdict)] == [(ids[7:8], 5, 5)]
    verdicts = [m for p, m in desk.step() if p == ADA]
    assert [(unpack_ids(m.tokens).tolist(), m.next) for m in verdicts if isinstance(m, Verdict)] == [(ids[8:9], 0)]


def behind(desk: Desk, ids: list[int]) -> None:
    """A session whose verdict was not foreseen, though the nodes were on their way."""
    growing(desk, ids)
    ((_, first),) = desk.step()
    assert isinstance(first, Verdict) and first.next == 0 and not desk.engine.busy
    desk.take(first)
    refused(desk.draft(X, 3), "round", number=3)


def test_a_root_that_was_on_its_way(desk: Desk) -> None:
    """The round begins with what has come by then, the DRAFT that was asked for takes its place, and the next is the one behind that."""
    ids = desk.ids()
    behind(desk, ids)
    assert desk.say(grown(ids[2:3])) == [] and not desk.engine.busy, "of the root alone there is nothing to verify"
    assert desk.say(grown(ids[3:5], 6, 5)) == [] and desk.engine.busy
    assert desk.say(wire.Resume(X)) == [wire.Resumed(X, len(PROMPT) + 3, 2)]
    tree = likely(ids[3:6])
    late = Draft(X, 2, len(PROMPT) + 3, pack_ids(tree.tokens), tree.parents.tobytes(), 0, MAX_NODES)
    assert desk.say(late) == [] and desk.say(grown(ids[6:8], 7, 6, since=2)) == []
    (life,) = desk.say(late)
    assert isinstance(life, Verdict) and (life.tokens, life.next) == (b"", 0), "now it is there"
    ((_, second),) = desk.step()
    assert isinstance(second, Verdict) and unpack_ids(second.tokens).tolist() == ids[3:7]
    assert (second.round, second.verified, second.next, second.since, second.nodes) == (2, 7, 3, 2, 1)


def test_a_tree_that_comes_too_late(desk: Desk) -> None:
    """While another is verified in its place it says how nodes are numbered; after the verdict it is a repeat."""
    ids = desk.ids()
    behind(desk, ids)
    desk.say(grown(ids[2:5]))
    tree = likely(ids[3:6])
    late = Draft(X, 2, len(PROMPT) + 3, pack_ids(tree.tokens), tree.parents.tobytes(), 0, MAX_NODES)
    found = desk.engine.step()
    assert desk.say(late) == [] and desk.say(grown(ids[6:8], 7, 6, since=2)) == []
    ((_, second),) = desk.sessions.verdicts(found, desk.now, 0.0)
    assert isinstance(second, Verdict) and unpack_ids(second.tokens).tolist() == ids[3:6] and (second.verified, second.next) == (3, 3)
    assert (second.since, second.nodes) == (2, 2)
    assert desk.say(late) == [replace_verdict(second, verified=0)]


def test_a_round_that_began_late_and_was_foreseen(desk: Desk) -> None:
    """Its edge, which was asked for a tree, numbers its nodes anew; one that has missed the verdict is told all the same."""
    ids = desk.ids()
    behind(desk, ids)
    desk.say(grown(ids[2:5]))
    desk.say(grown(ids[5:8], 8, 7))
    (told,) = desk.draft(X, 1, base=len(PROMPT))
    assert isinstance(told, Verdict) and (unpack_ids(told.tokens).tolist(), told.next) == (ids[:3], 0), "as it was said before"
    ((_, second),) = desk.step()
    assert isinstance(second, Verdict) and unpack_ids(second.tokens).tolist() == ids[3:6]
    assert (second.next, second.since, second.nodes) == (3, 3, 2)
    desk.take(second)
    assert desk.say(grown(ids[6:9], 1, 0, since=3)) == []
    ((_, third),) = desk.step()
    assert isinstance(third, Verdict) and (unpack_ids(third.tokens).tolist(), third.next) == (ids[6:9], 0)


def test_a_late_round_may_be_left_to_the_server(desk: Desk) -> None:
    """The edge, which knows nothing of it, asks for a stream."""
    ids = desk.ids()
    behind(desk, ids)
    desk.say(grown(ids[2:5]))
    assert desk.draft(X, 2, until=CONTEXT) == []
    assert {m.round for m in desk.run()} == {2} and desk.texts[X] == PROMPT + ids


@pytest.mark.parametrize("when", ["between a step and its verdicts", "after it", "after the next has begun"])
def test_a_late_round_is_left_to_the_server_after_all(desk: Desk, when: str) -> None:
    """Whatever has become of it by then: all that follows answers the round that the edge knows."""
    ids = desk.ids()
    behind(desk, ids)
    desk.say(grown(ids[2:5]))
    if when == "after the next has begun":
        desk.say(grown(ids[5:8], 8, 7))
    base, found = len(PROMPT) + 3, desk.engine.step()
    if when == "between a step and its verdicts":
        (told,) = desk.draft(X, 2, base=base, until=CONTEXT)
        desk.sessions.verdicts(found, desk.now, 0.0)
    else:
        ((_, second),) = desk.sessions.verdicts(found, desk.now, 0.0)
        assert isinstance(second, Verdict) and second.next == (3 if when == "after the next has begun" else 0)
        (told,) = desk.draft(X, 2, base=base, until=CONTEXT)
    assert isinstance(told, Verdict) and (told.round, told.base, unpack_ids(told.tokens).tolist(), told.next) == (2, base, ids[3:6], 0)
    desk.take(told)
    assert {m.round for m in desk.run()} == {2} and desk.texts[X] == PROMPT + ids


def test_who_leaves_late_rounds_behind_may_draft_again(desk: Desk) -> None:
    """What is told reaches its `run_until`: the server waits for a tree, and has none of its own in the way."""
    ids = desk.ids()
    behind(desk, ids)
    desk.say(grown(ids[2:5]))
    desk.say(grown(ids[5:8], 8, 7))
    ((_, second),) = desk.step()
    assert isinstance(second, Verdict) and second.next == 3
    (told,) = desk.draft(X, 2, base=len(PROMPT) + 3, until=len(PROMPT) + 4)
    desk.take(told)
    assert desk.texts[X] == PROMPT + ids[:6] and not desk.engine.busy
    assert desk.draft(X, 3, likely(ids[6:8])) == []
    ((_, third),) = desk.step()
    assert isinstance(third, Verdict) and (third.round, unpack_ids(third.tokens).tolist(), third.verified) == (3, ids[6:9], 5)


@pytest.mark.parametrize("until", [0, CONTEXT])
def test_a_late_round_of_an_edge_that_lost_verdicts(desk: Desk, until: int) -> None:
    """Its numbers are behind; what it says builds on all tokens, so it is of that round, whose number is then what the edge takes it for."""
    ids = desk.ids()
    growing(desk, ids)
    desk.say(grown(ids[2:5]))
    lost = [m for _ in range(2) for _, m in desk.step()]
    assert [(m.round, m.next) for m in lost if isinstance(m, Verdict)] == [(1, 2), (2, 0)]
    (told,) = desk.draft(X, 1, base=len(PROMPT))
    assert isinstance(told, Verdict) and (told.round, unpack_ids(told.tokens).tolist(), told.next) == (1, ids[:6], 0)
    desk.take(told)
    assert desk.say(grown(ids[5:8], 8, 7)) == [] and desk.engine.busy
    if until:
        assert desk.draft(X, 2, until=until) == []
        assert {m.round for m in desk.run()} == {2} and desk.texts[X] == PROMPT + ids
        return
    tree = likely(ids[6:8])
    assert desk.say(Draft(X, 2, len(desk.texts[X]), pack_ids(tree.tokens), tree.parents.tobytes(), 0, MAX_NODES)) == []
    ((_, third),) = desk.step()
    assert isinstance(third, Verdict) and (third.round, unpack_ids(third.tokens).tolist(), third.verified) == (2, ids[6:9], 5)
    desk.take(third)
    assert desk.finish(X, 3) == ids[9:]


def test_a_repeat_of_a_late_round_that_was_told_is_no_tree(desk: Desk) -> None:
    """An edge that has missed verdicts knows of it, and goes on with what the server has."""
    ids = desk.ids()
    growing(desk, ids)
    desk.step()
    desk.say(grown(ids[2:6]))
    (told,) = desk.draft(X, 1, base=len(PROMPT) + 1)
    assert isinstance(told, Verdict) and (unpack_ids(told.tokens).tolist(), told.next, told.nodes) == (ids[1:3], 2, 3)
    tree = Draft(X, 2, len(PROMPT) + 3, b"", b"", 0, MAX_NODES)
    assert [m.next for m in desk.say(tree) if isinstance(m, Verdict)] == [2]
    assert desk.say(grown(ids[6:8], 9, 8)) == []
    ((_, second),) = desk.step()
    assert isinstance(second, Verdict) and unpack_ids(second.tokens).tolist() == ids[3:7] and (second.next, second.since, second.nodes) == (3, 1, 1)


def test_nobody_who_has_to_take_turns_begins_late(desk: Desk) -> None:
    desk.sessions.quota = lambda _: Quota(in_flight=1)
    desk.hello(ADA)
    desk.open(Y)
    ids = desk.ids()
    behind(desk, ids)
    assert desk.say(grown(ids[2:5])) == [] and not desk.engine.busy


def test_an_edge_that_missed_verdicts_is_told_all(desk: Desk) -> None:
    """Whether the server is still ahead or waits; a repeat of the round that it is at brings a sign of life."""
    ids = desk.ids()
    growing(desk, ids)
    desk.say(grown(ids[2:6]))
    ((_, first),) = desk.step()
    assert isinstance(first, Verdict) and first.next == 2
    assert desk.draft() == [replace_verdict(first, verified=0, rows=0)]
    assert [(m.round, m.tokens, m.next) for m in desk.draft(X, 2, base=len(PROMPT) + 3) if isinstance(m, Verdict)] == [(2, b"", 2)]
    found = desk.engine.step()
    assert desk.draft() == [], "its verdict is on its way"
    ((_, second),) = desk.sessions.verdicts(found, desk.now, 0.0)
    assert desk.draft(X, 2, base=len(PROMPT) + 3) == [replace_verdict(second, verified=0, rows=0)]
    for number in (1, 2):
        (told,) = desk.draft(X, number, base=len(PROMPT))
        assert isinstance(told, Verdict) and (told.round, told.base, told.next) == (number, len(PROMPT), 0)
        assert unpack_ids(told.tokens).tolist() == ids[:7]
    assert desk.say(wire.Resume(X)) == [wire.Resumed(X, len(PROMPT) + 7, 2)]
    desk.texts[X] += ids[:7]
    refused(desk.draft(X, 4), "round", number=4)
    assert desk.draft(X, 2, likely(ids[7:9])) == [], "the round behind that which it knew to be answered: it has all tokens, so this is a new one"
    assert [(m.round, m.next) for m in desk.run()] == [(2, 0)] and desk.texts[X] == PROMPT + ids[:10]


def test_a_sign_of_life_says_where_the_server_is(desk: Desk) -> None:
    """Of a round that was asked for, nothing; of one that was not, its number, and how large its tree is."""
    ids = desk.ids()
    growing(desk, ids)
    (life,) = desk.draft()
    assert isinstance(life, Verdict) and (life.tokens, life.next, life.since, life.nodes) == (b"", 0, 0, 0)
    desk.say(grown(ids[2:6]))
    desk.step()
    (life,) = desk.draft(X, 2, base=len(PROMPT) + 3)
    assert isinstance(life, Verdict) and (life.tokens, life.next, life.since, life.nodes) == (b"", 2, 1, 3)
    (told,) = desk.draft(X, 1, base=len(PROMPT) + 1)
    assert isinstance(told, Verdict) and (unpack_ids(told.tokens).tolist(), told.next, told.since, told.nodes) == (ids[1:3], 2, 1, 3)


@pytest.mark.parametrize(("first", "since", "next_"), [(5, 1, 2), (6, 1, 0), (4, 1, 0), (5, 2, 0), (5, 0, 0)])
def test_what_does_not_follow_is_dropped(desk: Desk, first: int, since: int, next_: int) -> None:
    """Right nodes with the wrong numbers, of a session that is not here, or from somebody else."""
    ids = desk.ids()
    growing(desk, ids)
    message = replace(grown(ids[2:5]), first=first, since=since)
    assert desk.say(replace(message, session=Y)) == [] == desk.say(message, BOB) == desk.say(message)
    ((_, verdict),) = desk.step()
    assert isinstance(verdict, Verdict) and verdict.next == next_


@pytest.mark.parametrize("message", [
    grown([VOCAB]), grown([1], parent=5), grown([1], parent=65535), Grown(X, 1, 5, pack_ids([1]), bytes(1), bytes(1)),
    Grown(X, 1, 5, pack_ids([1]), bytes(2), b""), Grown(X, 1, 5, b"abc", bytes(2), bytes(1)),
])  # fmt: skip
def test_what_is_no_tree_ends_the_session(desk: Desk, message: Grown) -> None:
    growing(desk, desk.ids())
    refused(desk.say(message), "tree")
    assert len(desk.sessions) == 0 and desk.run() == []


@pytest.mark.parametrize(("quota", "next_"), [(Quota(in_flight=1), 0), (Quota(in_flight=2), 2), (Quota(rows_per_s=1), 0), (Quota(rows_per_s=99), 2)])
def test_accounts_that_take_turns_or_owe_have_to_ask(models: tuple[Engine, Engine], quota: Quota, next_: int) -> None:
    """Else the first of two sessions would be in flight for good, and the other one told BUSY."""
    desk = Desk(*models, Sessions(models[0], MODEL, quota=lambda _: quota))
    desk.hello(ADA)
    ids = desk.ids()
    desk.open(Y)
    growing(desk, ids)
    desk.say(grown(ids[2:5]))
    desk.sessions.settle(desk.now)
    found = desk.engine.step()
    desk.sessions.settle(desk.now)
    ((_, verdict),) = desk.sessions.verdicts(found, desk.now, 0.0)
    assert isinstance(verdict, Verdict) and verdict.next == next_
    desk.sessions.forget(ADA, desk.now)
    check_empty(desk.engine)


def test_only_who_says_so_is_taken_ahead(desk: Desk) -> None:
    """Not a session without `ahead`, nor one that the server writes alone."""
    ids = desk.ids()
    desk.open()
    desk.draft(tree=likely(ids[:2]))
    assert desk.say(grown(ids[2:5])) == [] and [m.next for m in desk.run()] == [0]
    assert desk.say(Draft(X, 2, len(PROMPT) + 3, b"", b"", len(PROMPT) + 5, 1)) == []
    assert desk.say(grown(ids[4:6], 1, 0, since=2)) == [] and [m.next for m in desk.run()] == [0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# what ends a session, and only that one

FAULTS: dict[str, tuple[str, list[Message], list[Message]]] = {  # name: (code, what goes before, the message that is wrong)
    "parents missing": ("tree", [opening()], [drafting(tokens=[1, 2], parents=[0])]),
    "tokens missing": ("tree", [opening()], [drafting(tokens=[1], parents=[0, 1])]),
    "half a token": ("tree", [opening()], [drafting(tokens=b"\1\0\0\0\2\0", parents=[0])]),
    "own parent": ("tree", [opening()], [drafting(tokens=[1, 2], parents=[0, 2])]),
    "parent behind": ("tree", [opening()], [drafting(tokens=[1, 2, 3], parents=[3, 0, 0])]),
    "node outside": ("tree", [opening()], [drafting(tokens=[1, VOCAB], parents=[0, 1])]),
    "twins": ("tree", [opening()], [drafting(tokens=[1, 2, 1], parents=[0, 0, 0])]),
    "token in OPEN": ("token", [], [opening(X, [1, VOCAB])]),
    "token in PROMPT": ("token", [opening(first=pack_ids([1]))], [Prompt(X, 1, pack_ids([2**32 - 1]))]),
    "no prompt": ("length", [], [opening(prompt_len=0)]),
    "no tokens at all": ("length", [], [opening(X, [])]),
    "prompt too long": ("length", [], [opening(prompt_len=len(PROMPT) + 1)]),
    "nothing to generate": ("length", [], [opening(max_tokens=0)]),
    "finished already": ("length", [], [opening(prompt_len=1, max_tokens=len(PROMPT) - 1)]),
    "context": ("length", [], [opening(max_tokens=CONTEXT - len(PROMPT) + 1)]),
    "context by far": ("length", [], [opening(max_tokens=2**32 - 1)]),
    "gap in the prompt": ("offset", [opening(first=pack_ids(PROMPT[:2]))], [Prompt(X, 3, pack_ids(PROMPT[3:]))]),
    "prompt twice, and not the same": ("offset", [opening(first=pack_ids(PROMPT[:2]))], [Prompt(X, 0, pack_ids(PROMPT[1:3]))]),
    "OPEN with too many": ("offset", [], [opening(length=len(PROMPT) - 1, prompt_len=1)]),
    "PROMPT with too many": ("offset", [opening(first=pack_ids(PROMPT[:2]))], [Prompt(X, 2, pack_ids(PROMPT))]),
    "PROMPT after all": ("offset", [opening()], [Prompt(X, len(PROMPT), pack_ids([1]))]),
    "round before all": ("offset", [opening(first=pack_ids(PROMPT[:2]))], [drafting()]),
    "half a token in OPEN": ("frame", [], [opening(first=b"\1\0\0\0\2")]),
    "half a token in PROMPT": ("frame", [opening(first=b"")], [Prompt(X, 0, b"\1\0\0")]),
    "OPENED": ("frame", [opening()], [Opened(X, 3)]),
    "VERDICT": ("frame", [opening()], [Verdict(X, 0, 1, b"", 0, 0, 0, 0, 0)]),
    "ERROR": ("frame", [opening()], [Error(X, "code", "a text that is long enough")]),
    "PROMPT unknown": ("session", [], [Prompt(X, 0, b"")]),
    "DRAFT unknown": ("session", [], [drafting()]),
    "DRAFT after CANCEL": ("session", [opening(), Cancel(X)], [drafting()]),
    "DRAFT after CLOSE": ("session", [opening(), Close(X)], [drafting()]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_its_session_alone(desk: Desk, name: str) -> None:
    """At once and for good; what another session of the same peer has in flight is answered as if nothing had been."""
    code, before, (wrong,) = FAULTS[name]
    desk.open(Y)
    assert desk.draft(Y, 1, likely(desk.ids()[:2])) == []
    for message in before:
        assert all(isinstance(m, Opened) for m in desk.say(message))
    refused(desk.say(wrong), code, X, getattr(wrong, "round", 0))
    assert len(desk.sessions) == 1
    refused(desk.say(drafting()), "session", X, 1)
    assert [unpack_ids(m.tokens).tolist() for m in desk.run()] == [desk.ids()[:3]]
    assert desk.finish(Y, 2) == desk.ids()[3:]
    desk.say(Close(Y))
    check_empty(desk.engine)
    desk.open(X)  # the name is free again
    assert desk.finish(X) == desk.ids()


def test_a_fault_during_a_round_ends_that_round(desk: Desk) -> None:
    """A round in flight, and a prompt that is computed: neither brings a verdict any more."""
    for until in (0, CONTEXT):
        desk.open(X, [(11 * i + bool(until)) % VOCAB for i in range(100)])  # not what a page of an earlier text holds
        assert desk.draft(until=until) == []
        desk.step()
        assert desk.engine.busy
        refused(desk.say(Prompt(X, 1000, b"")), "offset")
        check_empty(desk.engine)
        assert desk.step() == []


def test_welcome_is_not_for_a_server(desk: Desk) -> None:
    refused(desk.say(Welcome("b", b"", b"", 1, [], wire.Limits(1, 1, 1), 1, wire.Load(0, 0, 0))), "frame", NONE)


def test_a_full_house(desk: Desk) -> None:
    desk.sessions.max_sessions = 2
    desk.open(X)
    desk.open(X, peer=BOB)
    (busy,) = desk.say(opening(Y))
    assert busy == Busy(Y, 1000, "all 2 sessions of this server are taken")
    refused(desk.say(drafting(Y)), "session", Y, 1)
    assert len(desk.sessions) == 2
    desk.say(Close(X), BOB)
    desk.open(Y)
    assert desk.finish(Y) == desk.ids()


def test_a_server_that_goes_down(desk: Desk) -> None:
    """Every edge is told, also who comes later. What is open may end; what is new is refused."""
    desk.open(X)
    assert desk.say(opening(Y, first=pack_ids(PROMPT[:1]))) == []
    assert desk.sessions.drain(desk.now, 10) == [(ADA, GoAway(10_000)), (BOB, GoAway(10_000))]
    desk.now += 4
    assert [m for m in desk.say(Hello("late", b""), Peer(b"late", "ada")) if not isinstance(m, Welcome)] == [GoAway(6_000)]
    refused(desk.say(opening(Z)), "draining", Z)
    assert desk.say(Prompt(Y, 1, pack_ids(PROMPT[1:]))) == [Opened(Y, len(PROMPT))]
    desk.texts[Y] = list(PROMPT)
    assert desk.finish(X) == desk.finish(Y) == desk.ids()


def test_the_order_of_the_checks(desk: Desk) -> None:
    """Of several faults the first in the order of the protocol is named."""
    everything = opening(X, [VOCAB], prompt_len=0)
    desk.sessions._usage["ada"].quota = Quota(kv_tokens=1)
    desk.sessions.max_sessions = 0
    desk.sessions.drain(desk.now, 9)
    refused(desk.say(everything), "draining")
    desk.sessions._ends = None
    refused(desk.say(everything), "length")
    refused(desk.say(opening(X, [VOCAB])), "quota")
    desk.hello(ADA)
    assert [type(m) for m in desk.say(opening(X, [VOCAB]))] == [Busy]
    desk.sessions.max_sessions = 9
    refused(desk.say(opening(X, [VOCAB])), "token")
    everything = drafting(X, 9, 999, [VOCAB], [7])
    refused(desk.say(everything), "session", X, 9)
    assert desk.say(opening(first=b"")) == []
    refused(desk.say(everything), "offset", X, 9)
    desk.open(X)
    refused(desk.say(everything), "round", X, 9)
    refused(desk.say(drafting(X, 1, 999, [VOCAB], [7])), "base", X, 1)
    refused(desk.say(drafting(X, 1, len(PROMPT), [VOCAB], [7])), "tree", X, 1)


# ----------------------------------------------------------------------------------------------------------------------
# how sessions end


@pytest.mark.parametrize("last", [Cancel(X), Close(X)], ids=["CANCEL", "CLOSE"])
@pytest.mark.parametrize("state", ["unknown", "half a prompt", "waiting", "computing", "in flight", "alone", "between rounds", "finished"])
def test_cancel_and_close_free_at_once(desk: Desk, last: Message, state: str) -> None:
    """Without an answer and without a step in between."""
    if state == "half a prompt":
        assert desk.say(opening(first=pack_ids(PROMPT[:2]))) == []
    elif state != "unknown":
        # not what a page of an earlier text holds
        desk.open(X, [(i + 2 + isinstance(last, Close)) % VOCAB for i in range(100)] if state == "computing" else PROMPT)
    if state in ("computing", "in flight", "alone", "between rounds", "finished"):
        desk.draft(until=0 if state in ("between rounds", "in flight") else CONTEXT)
    if state == "computing":
        assert desk.step() == []
    if state == "alone":
        assert len(desk.step()) == len(desk.step()) == 1
    if state in ("between rounds", "finished"):
        desk.run()
    assert desk.say(last) == []
    assert len(desk.sessions) == 0
    check_empty(desk.engine)
    assert desk.step() == []


def test_silence_ends_a_session(desk: Desk) -> None:
    """Of any kind, unless a round of it is in flight: then it is the server that is silent, and any word of its connection keeps it."""
    desk.open(X)
    desk.open(X, peer=BOB)
    assert desk.say(opening(Z, first=b"")) == []  # never gets its tokens
    desk.now += 300
    desk.hello(BOB)  # says nothing about a session
    assert desk.say(opening(Y, first=b"")) == [] and desk.say(Prompt(Y, 0, pack_ids(PROMPT[:1]))) == []
    desk.draft(X, 1)
    desk.now += 300
    desk.sessions.expire(desk.now)
    assert len(desk.sessions) == 4  # 600 s are not longer than 600 s
    desk.now += 1
    desk.sessions.expire(desk.now)
    assert len(desk.sessions) == 2
    refused(desk.draft(X, 1, peer=BOB), "session", X, 1)
    for _ in range(20):
        desk.now += 599
        desk.hello(ADA)
        desk.sessions.expire(desk.now)
    assert len(desk.sessions) == 1, "the session in flight stays"
    assert len(desk.run()) == 1


def test_a_round_of_a_dead_edge_does_not_stay_in_flight(desk: Desk) -> None:
    """No step takes it, as with a batch round while interactive ones fill every step; nobody would be told of the end of its connection."""
    desk.open(X)
    desk.open(Y, peer=BOB)
    desk.draft(X, 1)
    desk.draft(Y, 1, peer=BOB)
    for _ in range(3):
        desk.now += 300
        desk.hello(BOB)
        desk.sessions.expire(desk.now)
    assert [key for key in desk.sessions._table] == [("bob", Y)]
    assert len(desk.step()) == 1
    desk.say(Cancel(Y), BOB)
    check_empty(desk.engine)


def test_a_message_is_a_sign_of_life(desk: Desk) -> None:
    desk.open(X)
    desk.draft(X, 1)
    (verdict,) = desk.run()
    for _ in range(3):
        desk.now += 599
        assert desk.draft(X, 1, base=verdict.base) == [replace_verdict(verdict, verified=0)]
        desk.sessions.expire(desk.now)
    assert len(desk.sessions) == 1
    desk.now += 601
    desk.sessions.expire(desk.now)
    assert len(desk.sessions) == 0
    check_empty(desk.engine)


def test_a_long_stream_is_not_silence(desk: Desk) -> None:
    desk.open(X)
    desk.draft(X, 1, until=CONTEXT)
    for _ in range(12):
        for _, m in desk.step():
            assert isinstance(m, Verdict)
            desk.take(m)
        desk.now += 100
        desk.sessions.expire(desk.now)
    assert desk.texts[X] == PROMPT + desk.ids()


def test_a_lease_counts_from_the_verdict(desk: Desk) -> None:
    desk.open(X)
    desk.draft(X, 1)
    desk.now += 3000  # a queue
    desk.run()
    desk.sessions.expire(desk.now + 1)
    assert desk.finish(X, 2) == desk.ids()[1:]


def test_a_peer_without_sessions_is_forgotten(desk: Desk) -> None:
    """After the same time; it says HELLO again and is as welcome as before. One that has sessions stays."""
    desk.open(X)
    desk.draft(X, 1)
    desk.now += 400
    assert desk.say(Cancel(Y), BOB) == []  # a sign of life
    for seconds in (600, 601):
        desk.now += seconds - 300
        assert desk.say(Lease(X)) == []
        desk.now += 300
        desk.sessions.expire(desk.now)
        if seconds == 600:
            desk.open(Y, peer=BOB)
            desk.say(Close(Y), BOB)
    refused(desk.say(opening(Y), BOB), "hello", Y)
    desk.hello(BOB)
    desk.open(Y, peer=BOB)
    assert [m.session for m in desk.run()] == [X]


def test_a_peer_that_is_gone(desk: Desk) -> None:
    desk.open(X)
    desk.draft(X, 1)
    desk.open(Y)
    desk.draft(Y, 1, until=CONTEXT)
    desk.open(X, peer=BOB)
    assert len(desk.step()) == 2
    desk.sessions.forget(ADA, desk.now)
    assert len(desk.sessions) == 1
    refused(desk.say(drafting(X, 2)), "hello", X, 2)
    assert desk.finish(X, peer=BOB) == desk.ids()
    desk.sessions.forget(BOB, desk.now)
    check_empty(desk.engine)
    desk.sessions.forget(Peer(b"nobody"), desk.now)


def test_a_key_that_is_revoked(desk: Desk) -> None:
    """Whatever it has open, on all its connections; each is told for every session and once for itself, and is a stranger from then on."""
    one, two, other = Peer(b"1", "ann"), Peer(b"2", "ann"), Peer(b"3", "eve")
    desk.hello(one, two, other)
    desk.open(X, peer=one)
    desk.open(Y, peer=one)
    desk.open(X, peer=other)
    desk.draft(X, 1, until=CONTEXT, peer=one)
    told = [(peer, m.session, m.code) for peer, m in desk.sessions.revoke({"ann", "sid"}, desk.now) if isinstance(m, Error)]
    assert sorted(told) == sorted([(one, X, "key"), (one, Y, "key"), (one, NONE, "key"), (two, NONE, "key")])
    assert desk.sessions.revoke({"ann"}, desk.now) == [] and len(desk.sessions) == 1
    refused(desk.say(drafting(X, 2), one), "hello", X, 2)
    assert desk.finish(X, peer=other) == desk.ids()
    desk.sessions.forget(other, desk.now)


def test_a_key_shares_what_it_has_computed_with_itself(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a prompt that one connection left serve another of the same key, and nobody else; without keys all are one account."""
    tokens, shared, begin = [i % VOCAB for i in range(40)], [], desk.engine.pool.open

    def spy(tokens: list[int], salt: bytes) -> tuple[PageTable, int]:
        table, found = begin(tokens, salt)
        shared.append(found)
        return table, found

    monkeypatch.setattr(desk.engine.pool, "open", spy)
    for peer in (Peer(b"1", "ann"), Peer(b"2", "ann"), Peer(b"2", "eve"), Peer(b"2"), Peer(b"3")):
        desk.hello(peer)
        desk.open(X, tokens, peer)
        assert desk.finish(X, 1, peer) == desk.ids(tokens)
        desk.say(Close(X), peer)
    assert shared == [0, 32, 0, 0, 32]


def test_sessions_belong_to_their_peer(desk: Desk) -> None:
    """Another peer can neither drive nor end one, and may use the same name for its own."""
    ids = desk.ids()
    desk.open(X)
    desk.draft(X, 1, likely(ids[:2]))
    refused(desk.say(drafting(X, 1), BOB), "session", X, 1)
    refused(desk.say(Prompt(X, 0, b""), BOB), "session")
    refused(desk.say(Opened(X, 1), BOB), "frame")
    assert desk.say(Cancel(X), BOB) == [] and desk.say(Close(X), BOB) == []
    assert [(peer, unpack_ids(m.tokens).tolist()) for peer, m in desk.step() if isinstance(m, Verdict)] == [(ADA, ids[:3])]
    desk.texts[X] += ids[:3]
    other = wire.Sampling(0.8, 99)
    assert desk.say(opening(X, sampling=other), BOB) == [Opened(X, len(PROMPT))]
    mine = desk.texts.pop(X)
    desk.texts[X] = list(PROMPT)
    assert desk.finish(X, 1, BOB) == desk.ids(sampling=other)
    desk.texts[X] = mine
    assert desk.finish(X, 2) == ids[3:]


# ----------------------------------------------------------------------------------------------------------------------
# faults of the server


@pytest.mark.parametrize("call", ["open", "offer", "run_until"])
def test_a_fault_of_the_engine_ends_one_session(desk: Desk, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real: Callable[..., object] = getattr(desk.engine, call)

    def fails(first: object, *rest: object) -> object:
        tokens = first if isinstance(first, list) else first.tokens  # type: ignore[attr-defined]
        if tokens[0] == 66:
            raise RuntimeError("secret path /root/model")
        return real(first, *rest)

    monkeypatch.setattr(desk.engine, call, fails)
    desk.open(Y)
    assert desk.draft(Y) == []
    said = desk.say(opening(X, [66, 1]))
    if call != "open":
        assert said == [Opened(X, 2)]
        said = desk.say(drafting(X, 1, 2))
    assert isinstance(said[0], Error) and "secret" not in said[0].text
    refused(said, "internal")
    assert len(desk.sessions) == 1 and len(desk.run()) == 1
    assert desk.finish(Y, 2) == desk.ids()[1:]


def test_all_sessions_may_be_ended(desk: Desk) -> None:
    """Each of them is told why; the server goes on with an empty engine, and peers need not say HELLO again."""
    desk.open(X)
    desk.draft(X, 1)
    desk.open(Y, peer=BOB)
    assert desk.say(opening(Z, first=b"")) == []
    told = desk.sessions.end("internal", "something broke")
    assert {(peer, m.session, m.text) for peer, m in told if isinstance(m, Error) and m.code == "internal"} == {
        (ADA, X, "something broke"), (BOB, Y, "something broke"), (ADA, Z, "something broke")
    }  # fmt: skip
    assert len(told) == 3
    assert len(desk.sessions) == 0
    check_empty(desk.engine)
    desk.open(X)
    assert desk.finish() == desk.ids()


LONG = [7 * i % VOCAB for i in range(44)]  # three of four pages of 16, and one to spare for whoever runs


def test_a_session_that_waits_for_pages(models: tuple[Engine, Engine]) -> None:
    """It is opened and its round is taken; it runs as soon as another one has ended."""
    small = Engine(models[0].runner)
    small.pool = small.line.pool = type(small.pool)(4, 16)
    desk = Desk(small, models[1], Sessions(small, MODEL))
    desk.hello(ADA)
    desk.open(X, LONG)
    desk.open(Y)
    desk.draft(X, 1)
    desk.draft(Y, 1, until=CONTEXT)
    assert [m.session for _, m in desk.step() if isinstance(m, Verdict)] == [X]
    assert desk.step() == []
    desk.say(Cancel(X))
    desk.run()
    assert desk.texts[Y] == PROMPT + desk.ids()
    desk.say(Close(Y))
    check_empty(small)


def test_who_pauses_makes_room(models: tuple[Engine, Engine]) -> None:
    """A session that holds all pages and is silent, with leases renewed or not, loses them to those that wait, not its text; one between two rounds
    loses nothing."""
    small = Engine(models[0].runner)
    small.pool = small.line.pool = type(small.pool)(4, 16)
    desk = Desk(small, models[1], Sessions(small, MODEL, lease=600.0))
    desk.hello(ADA)
    desk.open(X, LONG)
    desk.draft(X, 1)
    desk.run()
    desk.open(Y)
    desk.draft(Y, 1, until=CONTEXT)
    desk.now += PAUSE
    desk.sessions.expire(desk.now)
    assert not small.busy and small.starved, "it may be about to draft"
    desk.now += 0.1
    desk.say(Lease(X))
    desk.sessions.expire(desk.now)
    desk.run()
    assert desk.texts[Y] == PROMPT + desk.ids()
    desk.say(Close(Y))
    assert not small.busy and small.line.waiting, "nobody asked for it"
    assert desk.finish(X, 2) == desk.ids(LONG)[1:]
    desk.say(Close(X))
    check_empty(small)


def test_an_engine_that_can_do_nothing_is_not_busy(models: tuple[Engine, Engine]) -> None:
    small = Engine(models[0].runner)
    small.pool = small.line.pool = type(small.pool)(4, 16)
    first = small.open(LONG, SamplingParams(max_tokens=10))
    second = small.open(PROMPT, SamplingParams(max_tokens=10))
    while small.line.running == [] or small.line.running[0].pending > 1:
        small.step()
    assert not small.busy
    small.cancel(first)
    assert small.busy
    small.cancel(second)
    check_empty(small)


def test_what_is_opened_can_be_served(models: tuple[Engine, Engine], tmp_path_factory: pytest.TempPathFactory) -> None:
    """100 tokens of K/V are one page of 64: a text of 80 does not fit, and would stand before all others for ever."""
    small = engine(random_model(tmp_path_factory.mktemp("odd"), seed=3), kv_tokens=100, page_size=64)
    desk = Desk(small, models[1], Sessions(small, MODEL))
    (welcome,) = desk.say(Hello("test", b""))
    assert isinstance(welcome, Welcome) and welcome.limits.max_context == 64
    refused(desk.say(opening(max_tokens=74)), "length")
    desk.open(Y)
    assert desk.finish(Y) == desk.ids()


# ----------------------------------------------------------------------------------------------------------------------
# an honest client on a bad network


@dataclass(eq=False)
class Client:
    """One text of an edge, with the rules of docs/protocol.md; `up` and `down` are messages on their way."""

    id: bytes
    peer: Peer
    text: list[int]
    goal: list[int]  # the whole text, as the target alone gives it
    round: int = 0
    tree: TokenTree | None = None  # None: no round is open
    answered: bool = False  # a verdict of the round has come; more may follow
    until: int = 0
    up: list[Message] = field(default_factory=list)
    down: list[Message] = field(default_factory=list)

    @property
    def message(self) -> Draft:
        """The present round, on what the text is by now."""
        assert self.tree is not None
        return Draft(self.id, self.round, len(self.text), pack_ids(self.tree.tokens), self.tree.parents.tobytes(), self.until)

    def take(self, m: Message) -> None:
        if isinstance(m, Error):
            assert m.code in ("round", "base"), m  # a late copy of an older round; everything else would be a fault of the server
        if not isinstance(m, Verdict) or self.tree is None or m.round != self.round or m.base != len(self.text) or not m.tokens:
            return
        self.text += unpack_ids(m.tokens).tolist()
        self.answered = True
        if len(self.text) >= self.until:
            self.tree = None
        assert (wire.FINISH[m.finish] != "") == (len(self.text) == len(self.goal)), m


class Machine(RuleBasedStateMachine):
    """Texts of several edges while messages are delayed, repeated, lost and overtake each other, and some are cancelled."""

    clients = Bundle("clients")
    engines: tuple[Engine, Engine]

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(*self.engines, Sessions(self.engines[0], MODEL))
        self.desk.hello(ADA, BOB)
        self.alive: list[Client] = []
        self.names = count(1)

    @staticmethod
    def prompt(length: int) -> list[int]:
        return [(length + 7 * i) % VOCAB for i in range(length)]

    def deliver(self, c: Client, m: Message) -> None:
        c.down += self.desk.say(m, c.peer)

    @rule(
        target=clients, length=st.sampled_from([1, 6, 60]), seed=st.sampled_from([0, 5, 2**64 - 1]), most=st.sampled_from([1, 9, 30]),
        piece=st.sampled_from([4, 70]), peer=st.sampled_from([ADA, BOB]), known=st.sampled_from([0, 3]),
    )  # fmt: skip
    def open(self, length: int, seed: int, most: int, piece: int, peer: Peer, known: int) -> Client:
        sampling = wire.Sampling(0.8 if seed else 0.0, seed)
        goal = self.prompt(length) + self.desk.ids(self.prompt(length), sampling, most)
        tokens = goal[: length + min(known, most - 1)]
        c = Client(next(self.names).to_bytes(16, "big"), peer, tokens, goal)
        self.deliver(c, Open(c.id, pack_ids(tokens[:piece]), len(tokens), length, sampling, [], most))
        for at in range(piece, len(tokens), piece):
            self.deliver(c, Prompt(c.id, at, pack_ids(tokens[at : at + piece])))
        assert c.down == [Opened(c.id, len(tokens))]
        c.down.clear()
        self.alive.append(c)
        return c

    @rule(c=clients, right=st.integers(0, 12), more=st.integers(0, 12))
    def draft(self, c: Client, right: int, more: int) -> None:
        """A new round, if the last one was answered, perhaps while the server still decodes alone: a tree of which a part is right."""
        if (c.tree is None or c.answered) and len(c.text) < len(c.goal):
            c.round, c.tree, c.answered = c.round + 1, likely(c.goal[len(c.text) :][:right]), False
            c.until = min(len(c.text) + more, len(c.goal))
            c.up.append(c.message)

    @rule(c=clients)
    def repeat(self, c: Client) -> None:
        if c.tree is not None:
            c.up.append(c.message)

    @rule(c=clients, which=st.integers(0, 3), again=st.booleans())
    def send(self, c: Client, which: int, again: bool) -> None:
        """Some message of those on their way up arrives, and perhaps will a second time."""
        if c.up and c in self.alive:
            m = c.up[which % len(c.up)] if again else c.up.pop(which % len(c.up))
            self.deliver(c, m)

    @rule(c=clients, which=st.integers(0, 3), fate=st.sampled_from(["arrives", "arrives", "arrives twice", "is lost"]))
    def receive(self, c: Client, which: int, fate: str) -> None:
        if c.down:
            m = c.down.pop(which % len(c.down))
            for _ in range({"arrives": 1, "arrives twice": 2, "is lost": 0}[fate]):
                c.take(m)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            for peer, m in self.desk.step():
                assert isinstance(m, Verdict)
                (c,) = (c for c in self.alive if c.id == m.session)
                assert c.peer == peer
                c.down.append(m)

    @rule(c=consumes(clients))
    def cancel(self, c: Client) -> None:
        self.deliver(c, Cancel(c.id))
        self.alive.remove(c)

    @invariant()
    def sound(self) -> None:
        self.desk.engine.pool.check()
        for c in self.alive:
            assert c.text == c.goal[: len(c.text)]

    def teardown(self) -> None:
        """Little by little the network gets well: every text comes to its end, and nothing is left behind."""
        try:
            for c in self.alive:
                for m in [*c.up]:
                    self.deliver(c, m)
            for i in range(50):
                for c in self.alive:
                    if i < 6:
                        c.down = c.down[1::2]  # every other message is lost
                    while c.down:
                        c.take(c.down.pop(0))
                    if len(c.text) < len(c.goal):
                        if c.tree is None:
                            c.round, c.tree, c.until = c.round + 1, EMPTY, len(c.goal)
                        self.deliver(c, c.message)
                self.step(8)
                if i >= 6 and all(c.text == c.goal for c in self.alive):
                    break
            assert [c.text for c in self.alive] == [c.goal for c in self.alive]
            for c in self.alive:
                self.deliver(c, Close(c.id))
            assert len(self.desk.sessions) == 0
            check_empty(self.desk.engine)
        finally:
            self.desk.sessions.forget(ADA, self.desk.now)
            self.desk.sessions.forget(BOB, self.desk.now)


def test_honest_clients_get_their_text(models: tuple[Engine, Engine]) -> None:
    Machine.engines = models
    run_state_machine_as_test(Machine, settings=settings(max_examples=20, stateful_step_count=40, deadline=None, database=None))
