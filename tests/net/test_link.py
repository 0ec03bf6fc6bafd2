"""An edge on a bad network, with real sockets: connections break, servers are restarted, go down or are full, and the ids stay those of the target.

A TCP proxy (bench/proxy.py) stands where the network does. Nothing here sleeps for luck: a fault is put where
it hurts by looking at how far the text is.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from bench.proxy import Proxy
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.drafter import Drafter
from specedge.net import link as link_module
from specedge.net import rounds as rounds_module
from specedge.net import wire
from specedge.net.client import Connection, ServerError
from specedge.net.doctor import Finding, examine, examine_all
from specedge.net.edge import Edge
from specedge.net.quota import Quota
from specedge.net.server import Server
from specedge.net.wire import GoAway, Open, Resume
from specedge.text import Tokenizer
from tests.helpers import byte_tokenizer, check_empty, drafter, engine
from tests.net.test_edge import WELCOME, Fake, honest, silent, truth
from tests.net.test_server import PATIENCE, background, until

PROMPT = [7, 3, 9, 50, 100, 2]
SAMPLED = SamplingParams(0.8, 400, seed=5)  # long enough for a fault to find it on its way
MODEL = b"m" * 32
BACKOFF = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]  # of docs/protocol.md, in seconds
LONGEST = link_module.LONGEST  # without what `hasty` makes of it


@pytest.fixture(scope="module")
def want(model: Path) -> list[int]:
    return engine(model).generate([PROMPT], SAMPLED)[0].token_ids


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes tenths; a text that hangs fails within a test's time."""
    monkeypatch.setattr(rounds_module, "RESEND", 0.2)
    monkeypatch.setattr(rounds_module, "PATIENCE", PATIENCE / 2)
    monkeypatch.setattr(link_module, "LONGEST", 0.2)
    monkeypatch.setattr(Connection.__init__, "__defaults__", (None, 1.0))


@contextlib.contextmanager
def serving(model: Path, listen: str = "tcp://127.0.0.1:0", fingerprint: bytes = MODEL) -> Iterator[Server]:
    """A server that is left without sessions."""
    target = engine(model)
    with Server(target, listen, model=fingerprint) as server:
        yield server
        until(lambda: len(server._sessions) == 0, "the end of all sessions")
    check_empty(target)


def draft(model: Path) -> Drafter:
    return drafter(model, DraftConfig(tree_size=7, max_sessions=2, engine=EngineConfig(kv_tokens=4096, max_rows=256)))


def follow(edge: Edge, faults: dict[int, Callable[[], object]]) -> list[int]:
    """The ids of one streamed text; after so many of them, a fault each."""
    ids: list[int] = []
    for chunk in edge.stream(PROMPT, SAMPLED):
        ids += chunk.token_ids
        for at in [n for n in faults if n <= len(ids)]:
            faults.pop(at)()
    assert not faults
    return ids


both = pytest.mark.parametrize("drafting", [False, True], ids=["alone", "drafting"])


@both
def test_a_connection_that_breaks(model: Path, want: list[int], drafting: bool) -> None:
    """Again and again, in the middle of a text: it resumes, on the same server, which is left without a trace."""
    with serving(model) as server, Proxy(server.endpoint) as proxy, Edge(proxy.address, draft(model) if drafting else None) as edge:
        assert follow(edge, {n: proxy.drop for n in (1, 20, 21, 60, 100)}) == want
        assert proxy.connections > 5


def test_the_drafted_tree_survives(model: Path) -> None:
    """The round that awaits its verdict when the connection breaks goes out again with the same tree, on the session that is still there."""
    with Fake(silent) as fake, Proxy(fake.address.replace("specedge", "tcp")) as proxy, Edge(proxy.address, draft(model)) as edge:
        text = background(edge.generate, [[1, 2, 3]], SamplingParams(max_tokens=10, seed=1))
        until(lambda: len(fake.of(wire.Draft)) >= 1, "a round")
        proxy.drop()
        until(lambda: fake.of(Resume), "RESUME")
        fake.script = honest
        fake.answers[Resume] = lambda m: [wire.Resumed(m.session, 3, 0)]
        assert [c.token_ids for c in text.result(PATIENCE)] == [truth(3)]
        first = [m for m in fake.of(wire.Draft) if isinstance(m, wire.Draft) and m.round == 1]
        assert first[0].parents and all(m == first[0] for m in first)
        assert len(fake.of(Open)) == 1


@both
def test_a_server_that_is_restarted(model: Path, want: list[int], drafting: bool) -> None:
    """Without a word, while an edge is half way; and it stays away for a moment."""
    with contextlib.ExitStack() as stack:
        first = Server(engine(model), model=MODEL)
        first.start()
        proxy = stack.enter_context(Proxy(first.endpoint))
        edge = stack.enter_context(Edge(proxy.address, draft(model) if drafting else None))

        def restart() -> None:
            proxy.refuse = True
            proxy.drop()
            first.stop()
            server = stack.enter_context(serving(model))
            proxy.retarget(server.endpoint)
            proxy.refuse = False

        assert follow(edge, {40: restart}) == want


def test_a_server_that_goes_down_sends_its_edges_to_another(model: Path, want: list[int]) -> None:
    """GOAWAY: both texts of the edge go on at the second server, and the first has nothing to wait for."""
    with serving(model) as second:
        first = Server(engine(model), model=MODEL)
        first.start()
        with Edge([first.address, second.address]) as edge:
            other = background(follow, edge, {})
            stopping: list[object] = []
            assert follow(edge, {5: lambda: stopping.append(background(first.stop, PATIENCE))}) == want
            assert other.result(PATIENCE) == want
            stopping[0].result(PATIENCE / 2)  # type: ignore[attr-defined]
            assert edge._link.address == second.address
        check_empty(first._engine)


def test_a_drain_lets_a_text_finish(model: Path, want: list[int]) -> None:
    """An edge that has nowhere to go stays until its text is whole."""
    target = engine(model)
    server = Server(target, model=MODEL)
    server.start()
    with Edge(server.address) as edge:
        stopping: list[object] = []
        assert follow(edge, {5: lambda: stopping.append(background(server.stop, PATIENCE))}) == want
        stopping[0].result(PATIENCE)  # type: ignore[attr-defined]
    check_empty(target)


def test_a_text_that_begins_while_the_server_goes_down_waits_for_the_next(model: Path, want: list[int]) -> None:
    with contextlib.ExitStack() as stack:
        first = Server(engine(model), model=MODEL)
        first.start()
        proxy = stack.enter_context(Proxy(first.endpoint))
        edge = stack.enter_context(Edge(proxy.address))
        going = stack.enter_context(Edge(proxy.address))
        stream = going.stream(PROMPT, SAMPLED)
        got = next(stream).token_ids
        stopping = background(first.stop, PATIENCE)
        until(lambda: first._sessions.draining, "the drain")
        late = background(follow, edge, {})
        assert [*got, *(i for c in stream for i in c.token_ids)] == want
        stopping.result(PATIENCE)
        proxy.retarget(stack.enter_context(serving(model)).endpoint)
        assert late.result(PATIENCE) == want


def test_the_next_server_is_taken_when_one_fails(model: Path, want: list[int]) -> None:
    """Also before the first word was said, and when the one that failed comes never back."""
    with serving(model) as server, Proxy(server.endpoint) as proxy:
        proxy.refuse = True
        with Edge([proxy.address, server.address]) as edge:
            assert edge._link.address == server.address
        proxy.refuse = False
        with Edge([proxy.address, server.address]) as edge:

            def fail() -> None:
                proxy.refuse = True
                proxy.drop()

            assert follow(edge, {50: fail}) == want
            assert edge._link.address == server.address


class Dice:
    """In place of the module random: waits are as short as they may be. `bounds` are the longest that they might have been."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, then: Callable[[int], object] = lambda n: None) -> None:
        self.bounds, self.then = list[float](), then
        monkeypatch.setattr(link_module, "LONGEST", LONGEST)
        monkeypatch.setattr(link_module, "random", self)

    def uniform(self, low: float, high: float) -> float:
        assert low == 0, "full jitter"
        self.bounds.append(high)
        self.then(len(self.bounds))
        return 0.0


def test_attempts_grow_rarer_until_a_server_is_of_use(model: Path, want: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound doubles from 0.1 s up to 10 s, and begins again once the text has moved."""
    with serving(model) as server, Proxy(server.endpoint) as proxy, Edge(proxy.address) as edge:
        dice = Dice(monkeypatch, lambda n: setattr(proxy, "refuse", n < len(BACKOFF)))

        def fail() -> None:
            proxy.refuse = True
            proxy.drop()

        assert follow(edge, {10: fail, 100: proxy.drop}) == want
        assert dice.bounds == pytest.approx([*BACKOFF, 0.1])


def test_a_greeting_alone_is_of_no_use(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lets everybody in and then breaks is not stormed: what counts is an answer about a text."""
    greeting = [WELCOME, GoAway(60_000)]
    with Fake(silent, greeting) as fake, Proxy(fake.address.replace("specedge", "tcp")) as proxy, Edge(proxy.address) as edge:
        dice = Dice(monkeypatch)
        text = background(edge.generate, [[1, 2, 3]], SamplingParams(max_tokens=10, seed=1))
        until(lambda: fake.of(wire.Draft), "a round")
        for n in range(1, 6):
            assert proxy.drop()
            until(lambda: len(dice.bounds) == n and edge._link.up and len(fake.of(Resume)) >= n, "another connection")  # noqa: B023
        assert dice.bounds == pytest.approx(BACKOFF[:5])
        fake.script = honest
        fake.answers[Resume] = lambda m: [wire.Resumed(m.session, 3, 0)]
        assert proxy.drop()
        assert [c.token_ids for c in text.result(PATIENCE)] == [truth(3)]
        assert dice.bounds == pytest.approx(BACKOFF[:6])
        until(lambda: edge._link.up, "the connection")
        assert proxy.drop()
        until(lambda: len(dice.bounds) == 7, "an attempt")
        assert dice.bounds[-1] == pytest.approx(0.1)


def test_a_server_that_says_nothing_any_more(model: Path, want: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection stands, and ZeroMQ's heartbeats are answered, for they prove a process and no program: it is given up all the same."""
    monkeypatch.setattr(link_module, "SILENCE", 0.6)
    with serving(model) as server, Fake(silent) as fake, Edge([fake.address, server.address]) as edge:
        assert edge.generate([PROMPT], replace(SAMPLED, ignore_eos=True))[0].token_ids == want
        assert edge._link.address == server.address and len(fake.of(wire.Draft)) > 1


def test_a_network_that_swallows_everything(model: Path, want: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection stands as far as TCP knows."""
    monkeypatch.setattr(link_module, "SILENCE", 0.6)
    with serving(model) as server, Proxy(server.endpoint) as proxy, Edge([proxy.address, server.address]) as edge:
        assert follow(edge, {10: lambda: setattr(proxy, "silent", True)}) == want


def test_another_model_is_not_taken(model: Path) -> None:
    """A server that comes back with another model ends the text with a sentence; no id of it is given out."""
    with contextlib.ExitStack() as stack:
        first = Server(engine(model), model=MODEL)
        first.start()
        proxy = stack.enter_context(Proxy(first.endpoint))
        edge = stack.enter_context(Edge(proxy.address))

        def change() -> None:
            proxy.drop()
            first.stop()
            proxy.retarget(stack.enter_context(serving(model, fingerprint=b"x" * 32)).endpoint)

        with pytest.raises(ServerError, match="serves another model than .* did: name servers of one model only") as e:
            follow(edge, {10: change})
        assert e.value.code == "model"


def test_no_server_at_all(model: Path) -> None:
    """All failures in one sentence."""
    with Proxy("tcp://127.0.0.1:1") as one, Proxy("tcp://127.0.0.1:1") as two:
        with pytest.raises(ServerError, match=f"none of 2 servers can be used: .*{one.address}.*; .*{two.address}") as e:
            Edge([one.address, two.address])
        assert "\n" not in str(e.value)


def test_patience_ends_when_nobody_comes_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds_module, "PATIENCE", 0.5)
    server = Server(engine(model), model=MODEL)
    server.start()
    with Edge(server.address) as edge:
        with pytest.raises(ServerError, match="^given up after 0 s: no server at specedge://[0-9.:]+: Connection refused; check"):
            follow(edge, {10: server.stop})
        with pytest.raises(ServerError, match="^given up after 0 s: no server at"):
            edge.generate([PROMPT])


def test_a_delay_changes_nothing(model: Path, want: list[int]) -> None:
    with serving(model) as server, Proxy(server.endpoint) as proxy, Edge(proxy.address, draft(model)) as edge:
        proxy.delay = 0.005
        assert edge.generate([PROMPT], replace(SAMPLED, max_tokens=30))[0].token_ids == want[:30]
        until(lambda: len(server._sessions) == 0, "CLOSE, which would be lost with the connection")


def test_a_full_server_is_waited_for(model: Path, want: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """BUSY is no error: more texts than the account may have open come one after the other."""
    monkeypatch.setattr("specedge.net.quota.RETRY_FULL", 20)
    with serving(model) as server:
        server._sessions.quota = lambda _: Quota(sessions=2, in_flight=1)
        with Edge(server.address) as edge:
            assert [c.token_ids for c in edge.generate([PROMPT] * 5, SAMPLED)] == [want] * 5


def test_an_edge_asks_for_no_more_places_than_there_are(model: Path, want: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait at the edge, for however long, and nobody is told BUSY."""
    said: list[wire.Message] = []
    send = Server._send
    monkeypatch.setattr(Server, "_send", lambda self, peer, m: (said.append(m), send(self, peer, m))[1])
    monkeypatch.setattr(rounds_module, "PATIENCE", 0.3)
    with serving(model) as server:
        server._sessions.quota = lambda _: Quota(sessions=2)
        with Edge(server.address) as edge:
            begun = time.monotonic()
            assert [c.token_ids for c in edge.generate([PROMPT] * 12, SAMPLED)] == [want] * 12
            assert time.monotonic() - begun > 0.3, "some have waited for longer than a text may be silent"
    assert not [m for m in said if isinstance(m, wire.Busy)] and len([m for m in said if isinstance(m, wire.Opened)]) == 12


def test_a_rate_is_kept(model: Path) -> None:
    """Texts that would be faster take the time that their account's rate allows, and are whole."""
    params = SamplingParams(max_tokens=60, seed=1)
    with serving(model) as server:
        server._sessions.quota = lambda _: Quota(rows_per_s=60)
        with Edge(server.address) as edge:
            begun = time.monotonic()
            assert len({tuple(c.token_ids) for c in edge.generate([PROMPT] * 4, params)}) == 1
            assert time.monotonic() - begun > (4 * 60 - 120 - 4) / 60, "240 rows, of which 120 were saved up and one a text was owed, at 60 a second"


# ----------------------------------------------------------------------------------------------------------------------
# the doctor


def checks(found: list[Finding]) -> dict[str, bool]:
    return {f.check: f.ok for f in found}


def test_a_healthy_server(model: Path) -> None:
    with serving(model) as server:
        found = examine(server.address, trips=5)
        assert checks(found) == dict.fromkeys(["connection", "model", "tokenizer", "round trip", "load"], True)
        assert all("\n" not in f.text and len(f.text) > 20 for f in found)
        (trip,) = (f.figures for f in found if f.check == "round trip")
        assert 0 < trip["median_ms"] <= trip["worst_ms"] and trip["trips"] == 5  # type: ignore[operator]
        (load,) = (f.figures for f in found if f.check == "load")
        assert load == {"sessions": 0, "max_sessions": 256, "kv_free": 4096, "kv_tokens": 4096}
        small = examine(server.address, draft_vocab=60, trips=1)
        assert any(f.check == "vocabulary" and "knows 60 of the target's 105 ids" in f.text for f in small)
        assert len(server._sessions) == 0


def test_what_the_doctor_finds(model: Path) -> None:
    """One failure, one sentence, named by what is wrong; what lies behind it is not guessed at."""
    other = byte_tokenizer()
    other.add_special_tokens(["<other>"])
    target = engine(model)
    target.tokenizer = Tokenizer(byte_tokenizer())
    with Server(target) as server:
        assert checks(examine(server.address, Tokenizer(byte_tokenizer()).digest(), trips=1))["tokenizer"]
        (found,) = examine(server.address, Tokenizer(other).digest())
        assert (found.check, found.ok) == ("tokenizer", False) and "use a draft with the same vocabulary" in found.text
        closed = server.address
    for address, words in (("nonsense", "is no server address"), (closed, "no server at")):
        (found,) = examine(address)
        assert (found.check, found.ok) == ("connection", False) and words in found.text
    newer = wire.encode(WELCOME)
    with Fake(silent, [newer[:4] + b"\3" + newer[5:]]) as fake:
        (found,) = examine(fake.address)
        assert (found.check, found.ok) == ("version", False) and "update the older side" in found.text
    with Fake(silent, [WELCOME, GoAway(1000)]) as fake:
        assert checks(examine(fake.address, trips=2))["load"] is False
    for load, warns in ((wire.Load(16, 4096, 4096), True), (wire.Load(13, 4096, 4096), False), (wire.Load(1, 400, 4096), True)):
        with Fake(silent, [structs.replace(WELCOME, load=load)]) as fake:
            last = examine(fake.address, trips=1)[-1]
            assert last.ok and ("new texts may have to wait" in last.text) == warns
            assert f"{load.sessions} of 16 sessions are open, and there is room for {load.kv_free} of 4096 tokens" in last.text


def test_servers_of_several_models(model: Path) -> None:
    """The doctor says at once what an edge says when it needs the second server; one that does not answer is not compared."""
    with contextlib.ExitStack() as stack:
        another, words = structs.replace(WELCOME, model=b"x" * 32), structs.replace(WELCOME, tokenizer=b"t" * 32)
        one, two, other, foreign = (stack.enter_context(Fake(silent, [w])).address for w in (WELCOME, WELCOME, another, words))
        found = examine_all([f"{one[:-1]}x", one, two, other, foreign])
        wrong = {server: [f for f in findings if f.check == "same model"] for server, findings in found.items()}
        assert [len(w) for w in wrong.values()] == [0, 0, 0, 1, 1] and all(checks(found[s])["model"] for s in (one, two, other, foreign))
        for (finding,) in (wrong[other], wrong[foreign]):
            assert not finding.ok and "\n" not in finding.text
            assert f"another model than at {one}, " in finding.text and finding.text.endswith("name servers of one model only")


def test_dialling_ends_with_the_edge(model: Path) -> None:
    server = Server(engine(model), model=MODEL)
    server.start()
    edge = Edge(server.address)
    server.stop()
    until(lambda: not edge._link.up, "the loss")
    edge.close()
    until(lambda: not [t for t in threading.enumerate() if t.name == "specedge-dial"], "the end of the dialling")
