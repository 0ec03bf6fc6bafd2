"""Rounds against Sessions: the two sides of the protocol, without sockets, over a network that does everything networks do.

Messages are lost, repeated, overtake each other and arrive after their connection has ended; connections break unseen, leases end, the server is
restarted, goes down, is full and stumbles, texts are cancelled. The text of every edge is at every moment a beginning of what the target alone gives,
and when the network gets well all of them are whole and nothing is left in the engine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from msgspec.structs import replace

from specedge.config import SamplingParams
from specedge.engine.engine import Engine
from specedge.net import rounds as rounds_module
from specedge.net.client import ServerError
from specedge.net.quota import Quota
from specedge.net.rounds import PATIENCE, PLACE, REBUILDS, RESEND, Rounds
from specedge.net.sessions import Peer, Sessions
from specedge.net.wire import (
    Busy,
    Cancel,
    Close,
    Draft,
    Error,
    Gone,
    Grown,
    Hello,
    Lease,
    Message,
    NeedPrefill,
    Open,
    Opened,
    Prompt,
    Resume,
    Resumed,
    Verdict,
    pack_ids,
)
from specedge.tree import EMPTY, TokenTree, make_tree
from tests.helpers import check_empty, engine, random_model
from tests.net.test_sessions import VOCAB, likely

GREEDY = SamplingParams(max_tokens=10, seed=1)
LEASE = 30.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """The engine under the sessions, and the oracle."""
    path = random_model(tmp_path_factory.mktemp("target"), seed=3)
    return engine(path, kv_tokens=2048, page_size=16, max_rows=48), engine(path, kv_tokens=1024, page_size=16)


def begin(tokens: list[int] | None = None, params: SamplingParams = GREEDY, now: float = 0.0) -> Rounds:
    tokens = tokens or [1, 2, 3]
    return Rounds(tokens, len(tokens), params.with_seed(), [], VOCAB, 255, now)


# ----------------------------------------------------------------------------------------------------------------------
# single answers


@pytest.fixture
def opened() -> Iterator[Rounds]:
    """A text whose first round is under way on server a."""
    r = begin()
    r.connect("a", 0.0)
    r.offer(make_tree([5, 6], [0, 1]), 0, 0.0)
    assert [type(m) for m in r.speak(0.0, LEASE)] == [Open, Draft]
    assert r.speak(RESEND - 0.01, LEASE) == [] and r.next == RESEND
    yield r


def verdict(r: Rounds, number: int = 1, base: int = 3, tokens: tuple[int, ...] = (9,)) -> Verdict:
    return Verdict(r.id, number, base, pack_ids(list(tokens)), 3, 0, 31, 0, 0)


def kinds(r: Rounds, now: float) -> list[type[Message]]:
    return [type(m) for m in r.speak(now, LEASE)]


def test_the_same_is_said_again(opened: Rounds) -> None:
    again = opened.speak(RESEND, LEASE)
    assert again == opened.speak(2 * RESEND, LEASE) == [Draft(opened.id, 1, 3, pack_ids([5, 6]), bytes([0, 1]), 0)]


def test_a_round_survives_a_reconnect(opened: Rounds) -> None:
    """The tree that awaits its verdict goes out again as it was."""
    opened.connect("a", 5.0)
    assert opened.speak(5.0, LEASE) == [Resume(opened.id)] == opened.speak(5.0 + RESEND, LEASE)
    opened.take(Resumed(opened.id, 3, 0), 9.0)
    assert opened.speak(9.0, LEASE) == [Draft(opened.id, 1, 3, pack_ids([5, 6]), bytes([0, 1]), 0)]
    step = opened.take(verdict(opened, tokens=(5, 6, 9)), 9.5)
    assert step is not None and (step.tokens, step.accepted, step.finish, step.nodes) == ([5, 6, 9], 2, "", 2)
    assert opened.tokens == [1, 2, 3, 5, 6, 9]


@pytest.mark.parametrize("answer", [NeedPrefill, Gone])
def test_a_session_is_rebuilt(opened: Rounds, answer: type[NeedPrefill]) -> None:
    opened.take(verdict(opened), 1.0)
    opened.offer(EMPTY, 0, 1.0)
    opened.connect("a", 5.0)
    opened.speak(5.0, LEASE)
    opened.take(answer(opened.id), 6.0)
    first, draft = opened.speak(6.0, LEASE)
    assert isinstance(first, Open) and (first.tokens, first.prompt_len, first.round) == (pack_ids([1, 2, 3, 9]), 3, 1)
    assert isinstance(draft, Draft) and (draft.round, draft.base) == (2, 4)
    opened.take(answer(opened.id), 7.0)  # once more, late
    assert kinds(opened, 7.0) == []


def test_another_server_is_not_asked(opened: Rounds) -> None:
    opened.connect("b", 5.0)
    assert kinds(opened, 5.0) == [Open, Draft]


@pytest.mark.parametrize(("length", "number"), [(2, 1), (3, 2), (9, 9)])
def test_a_session_that_is_elsewhere_is_rebuilt(opened: Rounds, length: int, number: int) -> None:
    opened.connect("a", 5.0)
    opened.speak(5.0, LEASE)
    opened.take(Resumed(opened.id, length, number), 6.0)
    assert kinds(opened, 6.0) == [Open, Draft]


def test_busy_is_respected(opened: Rounds) -> None:
    """With a random part on top; what had followed at once and was refused does not matter."""
    opened.take(Busy(opened.id, 2000, "full"), 1.0)
    opened.take(Error(opened.id, "session", "not open here", 1), 1.0)
    assert 3.0 <= opened.next <= 5.0 and kinds(opened, 2.99) == []
    assert kinds(opened, 5.0) == [Open, Draft]
    opened.take(Busy(opened.id, 2000, "full", 1), 6.0)
    assert kinds(opened, 7.99) == [] and kinds(opened, 10.0) == [Draft]
    assert len({(opened.take(Busy(opened.id, 2000, "full", 1), 20.0), opened.next) for _ in range(9)}) > 1


def test_the_end_is_told_to_who_may_know_the_beginning(opened: Rounds) -> None:
    """Also while it looks as if the server had nothing: a late error may say so, and the last verdict be on its way."""
    assert not begin().known
    opened.take(Error(opened.id, "session", "not open here"), 1.0)
    opened.take(Busy(opened.id, 2000, "full"), 1.0)
    assert opened.known
    opened.connect("a", 2.0)
    assert opened.known
    opened.connect("b", 2.0)
    assert not opened.known


def test_old_errors_do_not_matter(opened: Rounds) -> None:
    opened.take(verdict(opened), 1.0)
    opened.offer(EMPTY, 0, 1.0)
    opened.speak(1.0, LEASE)
    for code in ("round", "base", "session", "tree"):
        opened.take(Error(opened.id, code, "of a late copy", 1), 2.0)
    assert kinds(opened, 2.0) == []


@pytest.mark.parametrize("code", ["session", "round", "base", "offset", "internal"])
def test_rebuilding_has_an_end(opened: Rounds, code: str) -> None:
    """And what is new in the text begins the count anew."""
    now, base = 1.0, 3
    for _ in range(2):
        for _ in range(REBUILDS):
            opened.take(Error(opened.id, code, "no", opened.round), now)
            now += 10
            assert kinds(opened, now) == [Open, Draft]
        opened.take(verdict(opened, opened.round, base), now)
        opened.offer(EMPTY, 0, now)
        base += 1
        opened.speak(now, LEASE)
    with pytest.raises(ServerError, match="the server refuses: no") as e:
        for _ in range(REBUILDS + 1):
            opened.take(Error(opened.id, code, "no"), now)
            now += 10
            opened.speak(now, LEASE)
    assert e.value.code == code


@pytest.mark.parametrize("code", ["token", "length", "tree", "quota", "sampling", "frame", "something new"])
def test_what_a_repeat_cannot_help_ends_the_text(opened: Rounds, code: str) -> None:
    with pytest.raises(ServerError, match="the server refuses: no") as e:
        opened.take(Error(opened.id, code, "no"), 1.0)
    assert e.value.code == code


def test_a_slow_draft_keeps_its_lease(opened: Rounds) -> None:
    opened.take(verdict(opened), 1.0)
    assert kinds(opened, 4.0) == [Lease] and opened.next == 4.0 + LEASE / 3
    opened.check_patience(1000.0, "", 0.0)
    opened.offer(EMPTY, 0, 1000.0)
    assert kinds(opened, 1000.0) == [Draft]


def test_patience(opened: Rounds) -> None:
    opened.check_patience(PATIENCE, "", 0.0)
    with pytest.raises(ServerError, match="^a has not answered for 60 s: check the network and the server$"):
        opened.check_patience(PATIENCE + 1, "", PATIENCE)
    with pytest.raises(ServerError, match="^given up after 60 s: no connection$"):
        opened.check_patience(PATIENCE + 1, "no connection", PATIENCE)
    opened.take(Opened(opened.id, 3), 50.0)
    opened.check_patience(PATIENCE + 1, "", 0.0)


def test_who_waits_for_a_place_waits_longer(opened: Rounds) -> None:
    """While the server says so, and from the moment on when a text of the same edge last moved; who is told nothing any more waits as ever."""
    told = 0.0
    while told < PLACE:
        opened.take(Busy(opened.id, 1000, "too many people here"), told := told + 10)
        opened.check_patience(told, "", 0.0)
    opened.check_patience(PLACE + 1, "", 5.0)
    with pytest.raises(ServerError, match="^given up after 600 s: too many people here$"):
        opened.check_patience(PLACE + 1, "", 0.5)
    with pytest.raises(ServerError, match="^given up after 60 s: too many people here$"):
        opened.check_patience(told + PATIENCE + 1, "", told)


def test_who_is_told_to_come_back_in_minutes_does(opened: Rounds) -> None:
    """As accounts are that have used up their rate."""
    opened.take(Busy(opened.id, 200_000, "used up"), 1.0)
    assert opened.next > 200
    for now in (PATIENCE + 2, opened.next, opened.next + RESEND):
        opened.check_patience(now, "", 0.0)
    with pytest.raises(ServerError, match="used up$"):
        opened.check_patience(opened.next + PATIENCE, "", 0.0)


def test_a_stream_that_goes_on_behind_a_gap_is_asked_for_what_is_missing() -> None:
    r = begin()
    r.connect("a", 0.0)
    r.offer(EMPTY, 13, 0.0)
    assert kinds(r, 0.0) == [Open, Draft]
    assert r.take(verdict(r), 1.0) is not None
    for i in range(6):
        assert r.take(verdict(r, base=5 + i), 1.5 + i / 2) is None
    assert r.speak(1.0 + RESEND, LEASE) == [Draft(r.id, 1, 4, b"", b"", 13)]


def test_a_server_that_goes_down_is_asked_again_later(opened: Rounds) -> None:
    opened.take(Error(opened.id, "draining", "going down"), 1.0)
    assert kinds(opened, 1.9) == [] and kinds(opened, 3.0) == [Open, Draft]


def test_who_was_forgotten_asks(opened: Rounds) -> None:
    opened.take(Error(opened.id, "hello", "who are you", 1), 1.0)
    assert kinds(opened, 1.0) == [Resume]
    opened.take(Error(opened.id, "hello", "who are you"), 1.1)
    assert kinds(opened, 2.05) == [] and kinds(opened, 3.1) == [Resume], "the server had no place for the HELLO in between"


def test_a_long_text_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds_module.wire, "CHUNK", 7)
    monkeypatch.setattr(rounds_module.wire, "FIRST", 5)
    r = begin(list(range(20)))
    r.connect("a", 0.0)
    assert [(type(m), getattr(m, "offset", 0)) for m in r.speak(0.0, LEASE)] == [(Open, 0), (Prompt, 5), (Prompt, 12), (Prompt, 19)]


def test_the_server_decodes_for_a_while(models: tuple[Engine, Engine]) -> None:
    """It stops where it was told to; the next round is a tree, and one behind it leaves the rest to the server."""
    target, oracle = models
    goal = [1, 2, 3, *oracle.generate([[1, 2, 3]], GREEDY)[0].token_ids]
    sessions, peer, r = Sessions(target), Peer(b"1"), begin()
    sessions.handle(peer, Hello("test", b""), 0.0)
    r.connect("a", 0.0)

    def go(tree: TokenTree, until: int, steps: int) -> None:
        r.offer(tree, until, 0.0)
        for m in r.speak(0.0, LEASE):
            for _, answer in sessions.handle(peer, m, 0.0):
                r.take(answer, 0.0)
        for _ in range(steps):
            for _, answer in sessions.verdicts(target.step(), 0.0, 0.01):
                r.take(answer, 0.0)
        assert r.sent is None and r.tokens == goal[: len(r.tokens)] and not target.busy

    go(EMPTY, 6, 3)
    assert len(r.tokens) == 6
    go(likely(goal[6:8]), 0, 1)
    assert len(r.tokens) == 9
    go(EMPTY, 10, 1)
    go(EMPTY, 99, 3)
    assert r.tokens == goal and r.round == 4
    assert [type(a) for _, a in sessions.handle(peer, Close(r.id), 0.0)] == []
    check_empty(target)


# ----------------------------------------------------------------------------------------------------------------------
# rounds that the server begins


def test_a_round_that_the_server_has_begun(opened: Rounds) -> None:
    """It is awaited like one that was asked for, and when its verdict is late the same is asked again."""
    opened.ahead = 31
    step = opened.take(replace(verdict(opened, tokens=(5, 6, 9)), next=2, since=1, nodes=7), 1.0)
    assert step is not None and (step.tokens, step.accepted, step.ahead, step.anew) == ([5, 6, 9], 2, 7, False)
    assert (opened.round, opened.since, opened.tells) == (2, 1, True) and opened.speak(1.0, LEASE) == []
    assert opened.grown(3, [(8, 2, 10), (9, 3, 255)]) == Grown(opened.id, 1, 3, pack_ids([8, 9]), bytes([2, 0, 3, 0]), bytes([10, 255]))
    assert opened.speak(1.0 + RESEND, LEASE) == [Draft(opened.id, 2, 6, b"", b"", 0, 31)]
    step = opened.take(replace(verdict(opened, 2, 6, tokens=(8, 4)), next=3, since=3), 5.0)
    assert step is not None and (step.tokens, step.accepted, step.nodes, step.ahead, step.anew) == ([8, 4], 1, 7, 0, True)
    step = opened.take(verdict(opened, 3, 8), 6.0)
    assert step is not None and step.ahead is None and opened.sent is None and not opened.tells
    opened.offer(EMPTY, 0, 6.0)
    assert (opened.round, opened.since) == (4, 4) and opened.tokens == [1, 2, 3, 5, 6, 9, 8, 4, 9]


def test_a_round_that_the_server_has_begun_late(opened: Rounds) -> None:
    """After the verdict before said that it waits: the answer is taken before a tree was sent, is awaited no more, and later ones are waited for."""
    opened.ahead = 31
    opened.take(verdict(opened), 1.0)
    assert opened.sent is None
    for wrong in (verdict(opened, 3, 4), verdict(opened, 2, 5), replace(verdict(opened, 2, 4), verified=0)):
        assert opened.take(wrong, 1.5) is None
    step = opened.take(replace(verdict(opened, 2, 4, (7, 8)), next=3, since=3), 2.0)
    assert step is not None and (step.tokens, step.accepted, step.nodes, step.ahead, step.anew) == ([7, 8], 1, 2, 0, True)
    assert (opened.round, opened.tokens, opened.tells) == (3, [1, 2, 3, 9, 7, 8], True) and opened.next == 2.0 + RESEND
    opened.take(verdict(opened, 3, 6), 3.0)
    assert opened.sent is None
    opened.take(verdict(opened, 4, 7), 4.0)
    opened.ahead = 0
    assert opened.take(verdict(opened, 5, 8), 5.0) is None, "nobody asked for it"
    opened.offer(EMPTY, 0, 5.0)
    assert (opened.round, opened.since) == (5, 5)


def test_verdicts_that_were_lost_while_the_server_went_on(opened: Rounds) -> None:
    """The answer to the last round that is known holds all tokens since, and where the server is by now."""
    opened.ahead = 31
    opened.connect("a", 5.0)
    opened.speak(5.0, LEASE)
    opened.take(Resumed(opened.id, 9, 4), 6.0)
    assert kinds(opened, 6.0) == [Draft]
    step = opened.take(replace(verdict(opened, tokens=(5, 6, 9, 8)), verified=0, next=4, since=4), 7.0)
    assert step is not None and (step.tokens, step.accepted, step.ahead, step.anew) == ([5, 6, 9, 8], 0, 0, True)
    assert (opened.round, opened.tokens) == (4, [1, 2, 3, 5, 6, 9, 8])


def test_what_grows_is_said_only_behind_its_round(opened: Rounds) -> None:
    """Not to another server, of which nobody knows what it takes, nor to one that was rebuilt, nor while a round is put off."""
    assert not opened.tells
    opened.ahead = 31
    assert opened.tells
    opened.take(Busy(opened.id, 100, "too many", 1), 1.0)
    assert not opened.tells
    assert kinds(opened, 2.0) == [Draft] and opened.tells
    opened.connect("a", 3.0)
    assert not opened.tells and kinds(opened, 3.0) == [Resume] and not opened.tells
    opened.take(Resumed(opened.id, 3, 1), 4.0)
    assert not opened.tells and kinds(opened, 4.0) == [Draft] and opened.tells
    opened.connect("b", 5.0)
    assert kinds(opened, 5.0) == [Open, Draft] and not opened.tells
    opened.take(verdict(opened), 6.0)
    opened.ahead = 31
    opened.offer(EMPTY, 0, 6.0)
    assert not opened.tells and kinds(opened, 6.0) == [Draft] and opened.tells
    opened.connect("b", 7.0)
    opened.speak(7.0, LEASE)
    opened.take(Gone(opened.id), 8.0)
    assert kinds(opened, 8.0) == [Open, Draft] and not opened.tells


def test_nobody_who_did_not_ask_is_taken_ahead(opened: Rounds) -> None:
    step = opened.take(replace(verdict(opened), next=2, since=2), 1.0)
    assert step is not None and step.ahead is None and opened.sent is None and opened.round == 1


# ----------------------------------------------------------------------------------------------------------------------
# everything at once


@dataclass(eq=False)
class Client:
    """One text, its present connection, and what is on its way on this and on earlier ones."""

    rounds: Rounds
    goal: list[int]
    user: str
    peer: Peer
    finished: bool = False
    told: int = 0  # nodes that have numbers
    chain: dict[int, int] = field(default_factory=dict)  # numbers of the nodes that carry the goal's tokens, by their indices; the root is one
    up: list[tuple[Peer, Message]] = field(default_factory=list)
    down: list[Message] = field(default_factory=list)

    def number(self, right: int) -> None:
        """A tree as `likely` makes it: every second node is right."""
        root = len(self.rounds.tokens) - 1
        self.told = 2 * right
        self.chain = {root + i: 2 * i for i in range(right + 1)}


class Machine(RuleBasedStateMachine):
    clients = Bundle("clients")
    engines: tuple[Engine, Engine]
    truths: dict[str, list[int]] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.engine, self.oracle = self.engines
        self.now = 0.0
        self.names = count(1)
        self.alive: list[Client] = []
        self.broken: set[Peer] = set()
        self.serve()

    def serve(self) -> None:
        self.sessions = Sessions(self.engine, lease=LEASE, quota=lambda _: Quota(sessions=3, in_flight=2, rows_per_s=60))

    def truth(self, prompt: list[int], params: SamplingParams) -> list[int]:
        key = str((prompt, params))
        if key not in self.truths:
            self.truths[key] = prompt + self.oracle.generate([prompt], params)[0].token_ids
        return self.truths[key]

    # -- what the network does --

    def connect(self, c: Client) -> None:
        """A new connection, greeted at once: the network has no power over greetings that anybody would notice."""
        c.peer = Peer(next(self.names).to_bytes(4, "big"), c.user)
        self.deliver(c.peer, Hello("test", b""))
        c.rounds.connect("server", self.now)

    def deliver(self, peer: Peer, m: Message) -> None:
        for to, answer in self.sessions.handle(peer, m, self.now):
            self.post(to, answer)

    def post(self, peer: Peer, m: Message) -> None:
        """What a server sends arrives at the present connection of its client, or nowhere."""
        if peer in self.broken:
            self.sessions.forget(peer, self.now)
            return
        for c in self.alive:
            if c.peer == peer and getattr(m, "session", c.rounds.id) == c.rounds.id:
                c.down.append(m)

    def speak(self, c: Client) -> None:
        c.up += [(c.peer, m) for m in c.rounds.speak(self.now, LEASE)]

    def take(self, c: Client, m: Message) -> None:
        if c.finished or c not in self.alive:
            return
        if isinstance(m, Error) and m.code == "hello":
            self.deliver(c.peer, Hello("test", b""))
        try:
            step = c.rounds.take(m, self.now)
        except ServerError as e:  # only after as many failures in a row as a text may have
            assert e.code in rounds_module.REBUILD and c.rounds._rebuilds > REBUILDS
            self.alive.remove(c)
            self.deliver(c.peer, Cancel(c.rounds.id))
            return
        if step is not None:
            c.finished = bool(step.finish)
            if step.ahead is not None and step.anew:
                c.number(0)
        assert c.finished == (len(c.rounds.tokens) == len(c.goal))

    @rule(
        target=clients, length=st.sampled_from([1, 6, 60]), seed=st.sampled_from([0, 5]), most=st.sampled_from([1, 9, 30]),
        user=st.sampled_from(["ada", "bob"]),
    )  # fmt: skip
    def begin(self, length: int, seed: int, most: int, user: str) -> Client:
        prompt = [(length + 7 * i) % VOCAB for i in range(length)]
        params = SamplingParams(0.8 if seed else 0.0, most, seed)
        c = Client(begin(list(prompt), params, self.now), self.truth(prompt, params), user, Peer(b""))
        self.alive.append(c)
        self.connect(c)
        return c

    @rule(c=clients, right=st.integers(0, 12), alone=st.sampled_from([0, 0, 1, 4, 99]), ahead=st.sampled_from([0, 3, 31]))
    def draft(self, c: Client, right: int, alone: int, ahead: int) -> None:
        """A tree, perhaps one that goes on growing, or leave the next `alone` tokens to the server."""
        if c.rounds.sent is None and not c.finished:
            known, c.rounds.ahead = len(c.rounds.tokens), ahead
            ids = [] if alone else c.goal[known:][:right]
            c.rounds.offer(likely(ids), known + alone if alone else 0, self.now)
            c.number(len(ids))

    @rule(c=clients, most=st.integers(1, 5))
    def grow(self, c: Client, most: int) -> None:
        """The right nodes behind the last one, and a wrong one beside each."""
        if c.rounds.tells and not c.finished:
            at, first, nodes = max(c.chain), c.told + 1, list[tuple[int, int, int]]()
            for i in range(at + 1, min(at + 1 + most, len(c.goal))):
                nodes += [((c.goal[i] + 1) % VOCAB, c.chain[i - 1], 40), (c.goal[i], c.chain[i - 1], 3)]
                c.chain[i] = c.told = c.told + 2
            c.up.append((c.peer, c.rounds.grown(first, nodes)))

    @rule(c=clients)
    def say(self, c: Client) -> None:
        self.speak(c)

    @rule(c=clients, which=st.integers(0, 3), fate=st.sampled_from(["arrives", "arrives", "arrives", "arrives, and stays", "is lost"]))
    def up(self, c: Client, which: int, fate: str) -> None:
        if c.up:
            peer, m = c.up[which % len(c.up)]
            if fate != "arrives, and stays":
                c.up.remove((peer, m))
            if fate != "is lost" and c in self.alive:
                self.deliver(peer, m)

    @rule(c=clients, which=st.integers(0, 3), fate=st.sampled_from(["arrives", "arrives", "arrives twice", "is lost"]))
    def down(self, c: Client, which: int, fate: str) -> None:
        if c.down:
            m = c.down.pop(which % len(c.down))
            for _ in range({"arrives": 1, "arrives twice": 2, "is lost": 0}[fate]):
                self.take(c, m)

    @rule(c=clients, seen=st.booleans(), kept=st.booleans())
    def reconnect(self, c: Client, seen: bool, kept: bool) -> None:
        """`seen`: the server finds out when it next sends there. `kept`: messages of the old connection still come in."""
        if seen:
            self.broken.add(c.peer)
        if not kept:
            c.up.clear()
            c.down.clear()
        self.connect(c)

    @rule(times=st.integers(1, 4), between=st.booleans())
    def step(self, times: int, between: bool = False) -> None:
        for _ in range(times):
            self.now += 0.01
            self.sessions.settle(self.now)
            found = self.engine.step()
            for c in self.alive if between else ():
                if c.up:  # what came during the step is read before its verdicts leave
                    self.deliver(*c.up.pop(0))
            for peer, m in self.sessions.verdicts(found, self.now, 0.01):
                self.post(peer, m)

    @rule(seconds=st.sampled_from([0.5, 3.1, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.sessions.expire(self.now)

    @rule()
    def stumble(self) -> None:
        for peer, m in self.sessions.end("internal", "a step failed"):
            self.post(peer, m)

    @rule(down=st.booleans())
    def restart(self, down: bool) -> None:
        """With a drain that is too short for everybody, or without a word."""
        told = [*self.sessions.drain(self.now, 1.0), *self.sessions.end("draining", "the server is going down")]
        for peer, m in told if down else []:
            self.post(peer, m)
        self.serve()
        for c in self.alive:
            self.connect(c)

    @rule(c=consumes(clients))
    def cancel(self, c: Client) -> None:
        if c in self.alive:
            self.alive.remove(c)
            self.deliver(c.peer, Cancel(c.rounds.id))

    @invariant()
    def sound(self) -> None:
        self.engine.pool.check()
        for c in self.alive:
            assert c.rounds.tokens == c.goal[: len(c.rounds.tokens)]
        for user, usage in self.sessions._usage.items():
            mine = [r for (u, _), r in self.sessions._table.items() if u == user]
            assert (usage.sessions, usage.kv_tokens, usage.in_flight) == (len(mine), sum(r.kv_tokens for r in mine), sum(r.flying for r in mine))

    def teardown(self) -> None:
        """The network gets well: every text comes to its end, and nothing is left behind."""
        try:
            for c in self.alive:
                c.up.clear()
                c.down.clear()
            for _ in range(200):
                for c in self.alive:
                    if c.rounds.sent is None and not c.finished:
                        c.rounds.offer(EMPTY, c.rounds.limit, self.now)
                    if not c.finished:
                        self.speak(c)
                    while c.up:
                        self.deliver(*c.up.pop(0))
                self.step(8)
                for c in list(self.alive):
                    while c.down:
                        self.take(c, c.down.pop(0))
                    if c.finished:
                        self.deliver(c.peer, Close(c.rounds.id))
                self.now += 0.7
                self.sessions.expire(self.now)
                if all(c.finished for c in self.alive):
                    break
            assert [c.rounds.tokens for c in self.alive] == [c.goal for c in self.alive]
            for _ in range(100):  # late messages may have opened sessions of texts that were cancelled: they end with their leases
                self.step(8)
                self.now += 1.0
                self.sessions.expire(self.now)
            assert len(self.sessions) == 0
            check_empty(self.engine)
        finally:
            self.sessions.end("internal", "the end")


def test_texts_come_through_whatever_happens(models: tuple[Engine, Engine]) -> None:
    Machine.engines = models
    run_state_machine_as_test(Machine, settings=settings(max_examples=25, stateful_step_count=50, deadline=None, database=None))


@pytest.mark.full
def test_texts_come_through_at_length(models: tuple[Engine, Engine]) -> None:
    Machine.engines = models
    run_state_machine_as_test(Machine, settings=settings(max_examples=400, stateful_step_count=80, deadline=None, database=None))
