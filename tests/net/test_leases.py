"""Leases, resumption and quotas: the rules of docs/protocol.md for sessions that are silent, come back, or are too many, by plain calls.

A session may lose its connection, its lease or its place; whoever owns it gets it back, or is told in one message what to do, and nobody else
notices. What is refused or lapses leaves nothing in the engine.
"""

from collections.abc import Iterator

import msgspec
import pytest

from specedge.engine.engine import Engine
from specedge.net import wire
from specedge.net.quota import BURST, WAIT, Bucket, Quota
from specedge.net.sessions import MEMORY, REMEMBERED, TAKES, Peer, Sessions
from specedge.net.wire import (
    Busy,
    Cancel,
    Close,
    Draft,
    Error,
    Gone,
    Hello,
    Lease,
    Message,
    NeedPrefill,
    Opened,
    Prompt,
    Resume,
    Resumed,
    Verdict,
    Welcome,
    pack_ids,
    unpack_ids,
)  # fmt: skip
from tests.helpers import check_empty, engine, random_model
from tests.net.test_sessions import ADA, BOB, CONTEXT, GREEDY, MAX_NODES, PROMPT, SAMPLED, VOCAB, Desk, X, Y, Z, drafting, likely, opening, refused

AGAIN = Peer(b"\0ada2", "ada")  # another connection of ada's
LEASE = 30.0
V, W = (bytes([i]) * 16 for i in (4, 5))  # further sessions


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """The engine under the sessions, and the oracle."""
    path = random_model(tmp_path_factory.mktemp("target"), seed=3)
    return engine(path, kv_tokens=1024, page_size=16, max_rows=MAX_NODES + 1), engine(path, kv_tokens=1024, page_size=16)


@pytest.fixture
def desk(models: tuple[Engine, Engine]) -> Iterator[Desk]:
    """Two connections of ada and one of bob have said HELLO. Afterwards nothing may be left."""
    desk = Desk(*models, Sessions(models[0]))
    desk.hello(ADA, AGAIN, BOB)
    yield desk
    for peer in (ADA, AGAIN, BOB):
        desk.sessions.forget(peer, desk.now)
    assert len(desk.sessions) == 0
    assert all((u.sessions, u.kv_tokens, u.in_flight, u.connections) == (0, 0, 0, 0) for u in desk.sessions._usage.values())
    check_empty(desk.engine)


def lapse(desk: Desk, seconds: float = LEASE + 1) -> None:
    desk.now += seconds
    for peer in (ADA, AGAIN, BOB):
        desk.hello(peer)
    desk.sessions.expire(desk.now)


# ----------------------------------------------------------------------------------------------------------------------
# leases


def test_a_lease_is_told_and_kept_alive(desk: Desk) -> None:
    (welcome,) = desk.say(Hello("test", b""))
    assert isinstance(welcome, Welcome) and welcome.lease_ms == 1000 * LEASE
    desk.open(X)
    desk.open(Y)
    for _ in range(3):
        lapse(desk, LEASE - 1)
        assert desk.say(Lease(X)) == []
    assert desk.say(Lease(Z)) == [], "an unknown one is not worth an answer"
    assert list(desk.sessions._table) == [("ada", X)]
    assert desk.finish(X) == desk.ids()


def test_a_lapsed_session_leaves_its_pages_to_the_cache(desk: Desk) -> None:
    """What was computed is found again when its owner opens it with all its tokens, and only by its owner."""
    prompt = [(5 * i + 1) % VOCAB for i in range(100)]
    desk.open(X, prompt, max_tokens=40)
    desk.draft(X, 1, until=len(prompt) + 20)
    desk.run()
    known = list(desk.texts[X])
    lapse(desk)
    check_empty(desk.engine)
    assert desk.say(Resume(X), AGAIN) == [NeedPrefill(X)]
    assert desk.say(Resume(X), BOB) == [Gone(X)]
    hits = desk.engine.pool.hits
    desk.open(X, known, AGAIN, prompt_len=len(prompt), max_tokens=40, round=1)
    desk.texts[X] = list(known)
    assert known[len(prompt) :] + desk.finish(X, 2, AGAIN) == desk.ids(prompt, most=40)
    assert desk.engine.pool.hits - hits == 112, "119 of 120 tokens had their K/V, in seven full pages"
    hits = desk.engine.pool.hits
    desk.open(X, known, BOB, prompt_len=len(prompt), max_tokens=40)
    desk.finish(X, 1, BOB)
    assert desk.engine.pool.hits == hits


def test_what_lapsed_is_forgotten_in_the_end(desk: Desk) -> None:
    desk.open(X)
    lapse(desk)
    assert desk.say(Resume(X)) == [NeedPrefill(X)]
    lapse(desk, MEMORY + 1)
    assert desk.say(Resume(X)) == [Gone(X)]
    for i in range(REMEMBERED + 10):
        desk.sessions._lapse(("ada", i.to_bytes(16, "big")), desk.now)
    assert len(desk.sessions._lapsed) == REMEMBERED


def test_a_session_that_ended_by_itself_is_gone(desk: Desk) -> None:
    for last in (Close(X), Cancel(X), Cancel(X)):
        if isinstance(last, Close):
            desk.open(X)
        desk.say(last)
        assert desk.say(Resume(X)) == [Gone(X)]


def test_half_a_prompt_must_be_sent_again(desk: Desk) -> None:
    assert desk.say(opening(first=pack_ids(PROMPT[:2]))) == []
    assert desk.say(Resume(X), AGAIN) == [NeedPrefill(X)]
    desk.open(X, peer=AGAIN)
    assert desk.finish(X, peer=AGAIN) == desk.ids()


# ----------------------------------------------------------------------------------------------------------------------
# connections


def test_a_session_goes_over_to_the_connection_that_resumes_it(desk: Desk) -> None:
    """With the round in flight, whose verdict comes to the new one, and again when it is repeated there. The old one has no say any more."""
    ids = desk.ids()
    desk.open(X)
    desk.draft(X, 1, likely(ids[:2]))
    assert desk.say(Resume(X), AGAIN) == [Resumed(X, len(PROMPT), 1)]
    assert desk.say(drafting(X, 1), AGAIN)[0].tokens == b"", "a sign of life"  # type: ignore[attr-defined]
    ((peer, verdict),) = desk.step()
    assert peer == AGAIN and isinstance(verdict, Verdict) and len(verdict.tokens) == 4 * 3
    assert desk.say(drafting(X, 1), AGAIN) == [msgspec.structs.replace(verdict, verified=0, rows=0)]
    refused(desk.say(drafting(X, 2, len(PROMPT) + 3)), "session", X, 2)
    refused(desk.say(Prompt(X, 0, b"")), "session")
    assert desk.say(Lease(X)) == []
    desk.sessions.forget(ADA, desk.now)
    assert desk.say(Resume(X), AGAIN) == [Resumed(X, len(PROMPT) + 3, 1)]
    desk.texts[X] += ids[:3]
    assert desk.finish(X, 2, AGAIN) == ids[3:]


def test_nobody_reaches_the_session_of_another_account(desk: Desk) -> None:
    desk.open(X)
    desk.draft(X, 1)
    before = desk.sessions._table["ada", X]
    assert desk.say(Resume(X), BOB) == [Gone(X)]
    for m in (Cancel(X), Close(X), Lease(X)):
        assert desk.say(m, BOB) == []
    refused(desk.say(drafting(X), BOB), "session", X, 1)
    other = opening(X, [3, 4], sampling=GREEDY)
    assert desk.say(other, BOB) == [Opened(X, 2)]
    assert desk.sessions._table["ada", X] is before and before.flying
    assert [(peer, m.session) for peer, m in desk.step() if isinstance(m, Verdict)] == [(ADA, X)]


def test_a_session_may_be_ended_from_every_connection_of_its_account(desk: Desk) -> None:
    desk.open(X)
    desk.draft(X, 1)
    assert desk.say(Cancel(X), AGAIN) == [] == desk.say(Cancel(X), ADA)
    assert len(desk.sessions) == 0 and desk.step() == []


def test_open_from_another_connection_takes_over(desk: Desk) -> None:
    """What the old life had in flight brings nothing any more, and its rounds are not taken for those of the new one."""
    ids = desk.ids()
    desk.open(X)
    desk.draft(X, 1)
    desk.run()
    desk.draft(X, 2, likely(ids[1:3]))
    desk.open(X, PROMPT + ids[:1], AGAIN, prompt_len=len(PROMPT), round=1)
    assert desk.step() == []
    old = desk.say(drafting(X, 1), AGAIN)  # a late copy of the round before: answered from the text, as any repeat
    assert isinstance(old[0], Verdict) and (old[0].round, unpack_ids(old[0].tokens).tolist()) == (1, ids[:1])
    refused(desk.say(drafting(X, 3, len(PROMPT) + 1), AGAIN), "round", X, 3)
    assert desk.finish(X, 2, AGAIN) == ids[1:]


def test_blind_repeats_change_nothing(desk: Desk) -> None:
    """OPEN and PROMPT arrive twice, at once and late, and the text is the same."""
    first, second = opening(first=pack_ids(PROMPT[:2])), Prompt(X, 2, pack_ids(PROMPT[2:]))
    assert desk.say(first) == desk.say(first) == []
    assert desk.say(second) == [Opened(X, len(PROMPT))]
    assert desk.say(second) == [] and desk.say(first) == [Opened(X, len(PROMPT))]
    desk.texts[X] = list(PROMPT)
    desk.draft(X, 1)
    desk.run()
    assert desk.say(first) == [Opened(X, len(PROMPT))] and desk.say(second) == []
    assert desk.finish(X, 2) == desk.ids()[1:]


def test_a_connection_that_breaks_lets_its_sessions_lapse(desk: Desk) -> None:
    desk.open(X)
    desk.draft(X, 1, until=CONTEXT)
    desk.step()
    desk.sessions.forget(ADA, desk.now)
    check_empty(desk.engine)
    assert desk.say(Resume(X), AGAIN) == [NeedPrefill(X)]


# ----------------------------------------------------------------------------------------------------------------------
# quotas


def limit(desk: Desk, user: str, **quota: int) -> None:
    desk.sessions.quota = lambda u: Quota(**quota) if u == user else Quota()
    desk.hello(ADA, BOB)


def busy(replies: list[Message], session: bytes = X, number: int = 0) -> Busy:
    assert len(replies) == 1 and isinstance(replies[0], Busy), replies
    assert (replies[0].session, replies[0].round) == (session, number)
    return replies[0]


def test_sessions_of_an_account(desk: Desk) -> None:
    limit(desk, "ada", sessions=1)
    (welcome,) = desk.say(Hello("test", b""))
    assert isinstance(welcome, Welcome) and welcome.limits.max_sessions == 1
    desk.open(X)
    assert busy(desk.say(opening(Y)), Y).text == "all 1 sessions of this account are taken"
    desk.open(Y, peer=BOB)
    desk.open(X, [1, 2], AGAIN)  # rebuilt, not one more
    desk.say(Close(X))
    desk.open(Y)


def test_tokens_of_an_account(desk: Desk) -> None:
    """At their longest; a text that can never fit is not told to wait."""
    limit(desk, "ada", kv_tokens=40)
    desk.open(X)  # 6 and 12
    desk.open(Y)
    assert "40 tokens" in busy(desk.say(opening(Z)), Z).text
    refused(desk.say(opening(Z, max_tokens=100)), "quota", Z)
    desk.open(Z, peer=BOB)
    desk.say(Cancel(X))
    desk.open(Z)


def test_rounds_in_flight_of_an_account(desk: Desk) -> None:
    limit(desk, "ada", in_flight=1)
    desk.open(X)
    desk.open(Y)
    assert desk.draft(X, 1) == []
    busy(desk.draft(Y, 1), Y, 1)
    assert len(desk.run()) == 1
    assert desk.draft(Y, 1) == [] and len(desk.run()) == 1


def test_connections_of_an_account(desk: Desk) -> None:
    """One that has nothing open makes way, for the server does not see it end."""
    limit(desk, "ada", connections=2)
    third = Peer(b"third", "ada")
    desk.open(X)
    desk.open(Y, peer=AGAIN)
    assert busy(desk.say(Hello("test", b""), third), wire.NO_SESSION).text.startswith("all 2 connections")
    refused(desk.say(opening(Z), third), "hello", Z)
    desk.say(Close(Y), AGAIN)
    desk.hello(third)
    refused(desk.say(opening(Z), AGAIN), "hello", Z)
    desk.sessions.forget(third, desk.now)


def test_a_changed_quota_needs_no_greeting(desk: Desk) -> None:
    """The server says so to all accounts when the list of keys has changed, and whoever never greets again would keep what was allowed before."""
    desk.open(X)
    desk.sessions.quota = lambda user: Quota(sessions=1)
    assert desk.sessions.revoke(set(), desk.now) == []
    assert busy(desk.say(opening(Y)), Y).text.startswith("all 1 sessions of this account")


def test_no_account_keeps_the_others_out(desk: Desk) -> None:
    """Places that are all taken go to whoever has fewer, until they are shared: from the session that has not moved for longest."""
    desk.sessions.max_sessions = 3
    for session in (X, Y, Z):
        desk.open(session)
        desk.now += 1
    desk.draft(X, 1)
    desk.run()  # now Y has not moved for longest
    desk.now += 1
    opened, (to, evicted) = desk.sessions.handle(BOB, opening(W), desk.now)
    assert to == ADA and opened == (BOB, Opened(W, len(PROMPT)))
    refused([evicted], "session", Y)
    assert desk.say(Resume(Y)) == [NeedPrefill(Y)] and desk.say(Resume(X)) == [Resumed(X, len(PROMPT) + 1, 1)]
    assert busy(desk.say(opening(Y)), Y).text.startswith("all 3 sessions of this server"), "ada has her share"
    assert busy(desk.say(opening(V), BOB), V).text.startswith("all 3 sessions of this server"), "bob would have no fewer than ada"
    assert desk.say(Cancel(W), BOB) == [] and desk.say(opening(Y)) == [Opened(Y, len(PROMPT))]
    assert busy(desk.say(opening(W), BOB), W).text.startswith("all 3 sessions of this server"), "he took a place less than a second ago, and left it"
    desk.now += TAKES
    assert desk.sessions.handle(BOB, opening(W), desk.now)[:1] == [(BOB, Opened(W, len(PROMPT)))]


def test_what_asks_for_no_row_moves_nothing(desk: Desk) -> None:
    """Rounds behind the text are answered at once: they would keep a session from making room for those that wait for pages."""
    desk.open(X)
    desk.draft(X, 1)
    desk.run()
    moved = desk.sessions._table["ada", X].moved
    desk.now += 1
    assert [type(m) for m in desk.draft(X, 2, base=len(PROMPT))] == [Verdict]
    assert desk.sessions._table["ada", X].moved == moved
    desk.draft(X, 3)
    assert desk.sessions._table["ada", X].moved == desk.now
    desk.run()


def test_rows_are_metered(desk: Desk) -> None:
    """Who has used more than its rate waits until it is paid for, the others do not; a long wait is told in milliseconds."""
    limit(desk, "ada", rows_per_s=10)
    desk.sessions.settle(desk.now)
    desk.open(X, most := PROMPT, max_tokens=60)
    desk.open(Y, most, BOB, max_tokens=60)
    desk.draft(X, 1, until=CONTEXT)
    desk.draft(Y, 1, until=CONTEXT, peer=BOB)
    desk.sessions.settle(desk.now)
    while desk.engine.busy:  # the clock stands still
        for _, m in desk.step():
            assert isinstance(m, Verdict)
            desk.take(m)
        desk.sessions.settle(desk.now)
    assert len(desk.texts[Y]) == len(PROMPT) + 60, "bob has no limit"
    assert len(desk.texts[X]) == len(PROMPT) + BURST * 10 + 1, "what was saved up, and the row that overdrew it"
    steps = 0
    while len(desk.texts[X]) < len(PROMPT) + 60:
        desk.now += 0.05
        desk.sessions.settle(desk.now)
        for _, m in desk.step():
            assert isinstance(m, Verdict)
            desk.take(m)
        steps += 1
    assert 76 <= steps <= 80, "39 tokens at 10 a second"
    assert desk.texts[X] == desk.texts[Y]


def test_a_long_wait_is_told(desk: Desk) -> None:
    limit(desk, "ada", prompt_tokens_per_s=5)
    desk.open(X, [(3 * i + 2) % VOCAB for i in range(120)])
    desk.sessions.settle(desk.now)
    while desk.engine.busy:
        desk.step()
        desk.sessions.settle(desk.now)
    owed = desk.sessions._usage["ada"].wait
    assert owed > WAIT
    assert abs(busy(desk.draft(X, 1), X, 1).retry_ms - 1000 * owed) <= 1
    busy(desk.say(opening(Y)), Y)
    desk.open(Y, peer=BOB)
    desk.now += owed
    desk.sessions.settle(desk.now)
    assert desk.draft(X, 1) == []


def test_a_bucket() -> None:
    b = Bucket()
    assert b.settle(10, 0, 0.0) == 0 and b.settle(10, 20, 0.0) == 0, "two seconds are saved up"
    assert b.settle(10, 25, 0.0) == 0.5 and b.settle(10, 25, 0.5) == 0
    assert b.settle(10, 25, 1000.0) == 0 and b.settle(10, 50, 1000.0) == 0.5, "no more than two seconds are"
    assert b.settle(0, 1000, 1000.0) == 0 and b.settle(10, 1000, 1000.0) == 0, "what was used without a limit is not charged later"


def test_errors_of_a_connection_leave_the_session_of_another(desk: Desk) -> None:
    desk.open(X)
    refused(desk.say(opening(X, max_tokens=10**6), AGAIN), "length")
    refused(desk.say(Opened(X, 1), AGAIN), "frame")
    refused(desk.say(Draft(X, 1, 9999, b"", b""), AGAIN), "session", X, 1)
    assert not any(isinstance(m, Error) for m in desk.draft(X, 1))
    desk.run()
    assert desk.finish(X, 2) == desk.ids(sampling=SAMPLED)[1:]
