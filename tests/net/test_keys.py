"""Server and Edge with keys: who is authorised is served, encrypted and with the same ids; everybody else gets one sentence and nothing more.

A revoked or expired key loses what it has open at once, others notice nothing, and a dead authenticator admits nobody. Around a tiny random target.
"""

import contextlib
import logging
import re
import socket
import time
from collections.abc import Iterator
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Self

import pytest
import zmq

from bench.proxy import Proxy
from specedge.config import DraftConfig, SamplingParams
from specedge.engine.engine import Engine
from specedge.net import auth, wire
from specedge.net.auth import Authenticator, AuthError, authorize, generate, load, revoke
from specedge.net.client import Connection, ServerError
from specedge.net.doctor import examine
from specedge.net.edge import Edge
from specedge.net.quota import Quota
from specedge.net.server import Server
from specedge.net.wire import Draft, Error, Hello, Verdict
from tests.helpers import check_empty, drafter, engine
from tests.net.test_auth import FUTURE
from tests.net.test_server import CONTEXT, GREEDY, PATIENCE, PROMPT, VOCAB, Raw, X, background, threads, until

LONG = SamplingParams(max_tokens=500)  # takes a while


class Keyed(Raw):
    """A Raw that has keys."""

    def __init__(self, server: Server, key: Path, hello: bool = True) -> None:
        own, serverkey = load(key), bytes.fromhex(server.address.partition("key=")[2])
        super().__init__(server, hello, CURVE_SERVERKEY=serverkey, CURVE_PUBLICKEY=bytes.fromhex(own.public), CURVE_SECRETKEY=own.secret)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Keys of a server, and of three edges, ann, bob and eve, of whom the first two are authorised."""
    generate(tmp_path / auth.SECRET)
    for name in ("ann", "bob", "eve"):
        public = generate(tmp_path / name)
        if name != "eve":
            authorize(tmp_path, public, name=name)
    return tmp_path


@contextlib.contextmanager
def serving(model: Path, home: Path, listen: str = "tcp://127.0.0.1:0") -> Iterator[Server]:
    before, target = threads(), engine(model)
    with Server(target, listen, keys=home) as server:
        yield server
        until(lambda: len(server._sessions) == 0, "the end of all sessions")
    assert threads() == before and server._authenticator and not server._authenticator.alive
    check_empty(target)


@pytest.fixture
def server(model: Path, home: Path) -> Iterator[Server]:
    with serving(model, home) as s:
        yield s


def refused(address: str, key: Path | None, sentence: str) -> ServerError:
    """An edge is told what is wrong, in one sentence that names the server in short."""
    with pytest.raises(ServerError, match=sentence) as e:
        Edge(address, key=key)
    assert "\n" not in str(e.value) and "?key=" not in str(e.value).replace("/?key=...", "") and address.partition("/?")[0] in str(e.value)
    return e.value


# ----------------------------------------------------------------------------------------------------------------------
# who is served


def test_the_ids_are_those_of_the_target(model: Path, oracle: Engine, server: Server, home: Path) -> None:
    """With a draft and without; the long prompt goes in a frame of the largest size, which encryption makes larger still."""
    assert re.fullmatch(r"specedge://127\.0\.0\.1:[0-9]+/\?key=[0-9a-f]{64}", server.address)
    params, prompts = SamplingParams(temperature=0.8, max_tokens=12, seed=5), [PROMPT, [i % VOCAB for i in range(CONTEXT - 12)]]
    want = [c.token_ids for c in oracle.generate(prompts, params)]
    draft = drafter(model, DraftConfig(max_sessions=2))
    with Edge(server.address, draft, key=home / "ann") as edge, Edge(server.address, key=str(home / "bob")) as alone:
        running = [background(e.generate, prompts, params) for e in (edge, alone)]
        assert [[c.token_ids for c in r.result(PATIENCE)] for r in running] == [want, want]


def test_frames_of_the_largest_size(server: Server, home: Path) -> None:
    """Both ways; what the connection lets through beyond it for the encryption's sake is refused by name."""
    with Keyed(server, home / "ann") as raw:
        raw.open(tokens=[1] * (CONTEXT - 1), most=1)
        raw.send(Draft(X, 1, CONTEXT - 1, b"", b""))
        assert isinstance(raw.receive(), Verdict)
        raw.send(Draft(X, 1, 0, b"", b""))
        answer = raw.receive()
        assert isinstance(answer, Verdict) and len(wire.encode(answer)) == wire.SIZES[-1]
        raw.send(wire.Close(X))
        raw.send(bytes(wire.SIZES[-1]))
        answer = raw.receive()
        assert isinstance(answer, Error) and "does not begin with SPEG" in answer.text
    connection, known = Connection(server.address, b"", home / "bob"), wire.pack_ids([1] * (CONTEXT - 1))
    connection.send(wire.Open(X, known, CONTEXT - 1, CONTEXT - 1, GREEDY, [], 1))
    connection.send(Draft(X, 1, 0, b"", b""))
    got: list[int] = []
    until(lambda: got.extend(size for _, size in connection.receive()) or wire.SIZES[-1] in got, "a frame of the largest size")
    connection.send(wire.Cancel(X))
    connection.close()


def test_a_connection_knows_its_key(server: Server, home: Path) -> None:
    with Keyed(server, home / "ann"):
        assert [p.user for p in server._sessions._peers] == [load(home / "ann").public]


def test_a_key_that_is_not_authorised(server: Server, home: Path) -> None:
    """The sentence holds the public key, which the operator needs; nothing of the attempt reaches the engine's thread."""
    e = refused(server.address, home / "eve", f"does not know this key: have its operator authorise {load(home / 'eve').public}")
    assert e.code == "key" and not server._sessions._peers


def test_a_server_with_another_key(server: Server, home: Path) -> None:
    address, _, _ = server.address.partition("?")
    refused(f"{address}?key={load(home / 'bob').public}", home / "ann", "has another key than the address says: copy the address")
    assert not server._sessions._peers


def test_plain_text_and_keys_do_not_mix(model: Path, server: Server, home: Path) -> None:
    plain, _, query = server.address.partition("/?")
    refused(plain, home / "ann", r"takes encrypted connections only: use the whole address, with /\?key=")
    with Server(engine(model)) as other:
        refused(f"{other.address}/?{query}", home / "ann", r"does not encrypt, but the address names its key: check who listens there, or leave out")
        with Edge(other.address, key=home / "ann") as edge:  # the default key of a person who also uses servers without
            assert edge.generate([PROMPT])[0].token_ids


def test_an_edge_without_a_key(server: Server, home: Path) -> None:
    refused(server.address, None, "serves known keys only: make one with `specedge-edge keygen`")
    with pytest.raises(AuthError, match=f"there is no key at {home}/nobody"):
        Edge(server.address, key=home / "nobody")
    (home / "ann").chmod(0o644)
    with pytest.raises(AuthError, match="others may read"):
        Edge(server.address, key=home / "ann")


@pytest.mark.parametrize("change", ["the server's key", "no keys", "another key file"])
def test_a_wrong_key_met_on_the_way_back_is_said_at_once(
    model: Path, server: Server, home: Path, tmp_path_factory: pytest.TempPathFactory, change: str
) -> None:  # fmt: skip
    """No retries until patience ends, where none can help."""
    other = tmp_path_factory.mktemp("other")
    generate(other / auth.SECRET)
    if change == "another key file":
        (other / auth.SECRET).write_bytes((home / auth.SECRET).read_bytes())
    sentence = {"the server's key": "has another key than", "no keys": "does not encrypt", "another key file": "does not know this key"}[change]
    with Proxy(server.endpoint) as proxy, Server(engine(model), keys=None if change == "no keys" else other) as second:
        with Edge(f"{proxy.address}/?{server.address.partition('/?')[2]}", key=home / "ann") as edge:
            stream = edge.stream(PROMPT, LONG)
            next(stream)
            proxy.retarget(second.endpoint)
            proxy.drop()
            with pytest.raises(ServerError, match=sentence) as e:
                list(stream)
            assert e.value.code
        server._sessions._ends = 0.0  # its session lapses with the lease only


def test_nobody_listens(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    refused(f"specedge://127.0.0.1:{port}/?key={'a' * 64}", home / "ann", "no server at .*: Connection refused; check the address")


@pytest.mark.parametrize(
    ("what", "check", "sentence"),
    [
        ("not authorised", "key", "does not know this key: have its operator authorise EVE$"),
        ("no key", "key", "serves known keys only: make one with `specedge-edge keygen`, and have it authorised there$"),
        ("no file", "key", "there is no key at HOME/nobody: make one with keygen$"),
        ("a directory", "key", "HOME is no file: put one there, or name another$"),
        ("others may read it", "key", "others may read HOME/ann: run chmod 600 on it, and make sure that nobody did$"),
        ("another server", "key", "has another key than the address says: copy the address that it printed again$"),
        ("plain to CURVE", "connection", r"takes encrypted connections only: use the whole address, with /\?key=..., that the server printed$"),
        ("CURVE to plain", "connection", r"does not encrypt, but the address names its key: check who listens there, or leave out /\?key=...$"),
    ],
)
def test_what_the_doctor_says_of_keys(model: Path, server: Server, home: Path, what: str, check: str, sentence: str) -> None:
    """One failure: one finding, one sentence, one remedy, under the name of what is wrong."""
    plain, _, query = server.address.partition("/?")
    (home / "ann").chmod(0o644 if what == "others may read it" else 0o600)
    address, key = {
        "not authorised": (server.address, home / "eve"), "no key": (server.address, None), "no file": (server.address, home / "nobody"),
        "a directory": (server.address, home), "another server": (f"{plain}/?key={load(home / 'eve').public}", home / "ann"),
        "plain to CURVE": (plain, home / "ann"),
    }.get(what, (server.address, home / "ann"))  # fmt: skip
    with Server(engine(model)) if what == "CURVE to plain" else contextlib.nullcontext() as other:
        (found,) = examine(f"{other.address}/?{query}" if other else address, key=key)
    want = sentence.replace("EVE", load(home / "eve").public).replace("HOME", str(home))
    assert (found.check, found.ok) == (check, False) and re.search(want, found.text), found
    assert "\n" not in found.text and ". " not in found.text and query not in found.text
    assert not server._sessions._peers


def test_the_doctor_does_not_mix_accounts(server: Server, home: Path) -> None:
    """WELCOME counts the sessions of the whole server, and limits those of this key: a key that may have two is not full because others have five."""
    authorize(home, load(home / "eve").public, name="eve", sessions="2")
    with Keyed(server, home / "bob") as bob:
        for i in range(5):
            bob.send(wire.Open(bytes([i + 1]) * 16, wire.pack_ids(PROMPT), len(PROMPT), len(PROMPT), GREEDY, [], 12))
            assert isinstance(bob.receive(), wire.Opened)
        for name, most in (("eve", 2), ("ann", 256)):
            *_, last = examine(server.address, key=home / name, trips=2)
            assert last.check == "load" and last.ok
            assert last.text.startswith(f"the server has 5 sessions open, this key may have {most} of its own, and there is room for ")
            assert "may have to wait" not in last.text and (last.figures["sessions"], last.figures["max_sessions"]) == (5, most)
        for i in range(5):
            bob.send(wire.Close(bytes([i + 1]) * 16))
        assert bob.silent()


@pytest.mark.parametrize("query", ["?key=abc", "?key=", "?key", "?x=1", "?kee=KEY", "?key=KEY&key=KEY", "x?key=KEY", "?key=secret:KEY"])
def test_no_address(home: Path, query: str) -> None:
    with pytest.raises(ServerError, match="is no server address: write it as specedge://HOST:PORT, or with /"):
        Edge(f"specedge://127.0.0.1:1/{query.replace('KEY', 'a' * 64)}", key=home / "ann")


# ----------------------------------------------------------------------------------------------------------------------
# revoking


@pytest.mark.parametrize("how", ["revoke", "delete", "expire", "edit"])
def test_a_key_that_is_revoked_loses_its_sessions(
    oracle: Engine, server: Server, home: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """In the middle of a text and within 2 s; its edge is told why. Somebody else's text goes on, unless the whole list is gone."""
    want = oracle.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids
    if how == "expire":
        revoke(home, "ann")
        authorize(home, load(home / "ann").public, name="ann", expires=str(FUTURE.date()))
    with Edge(server.address, key=home / "ann") as edge, Keyed(server, home / "bob") as bob:
        bob.open()
        stream = edge.stream(PROMPT, LONG)
        next(stream)
        path, begun = home / auth.LIST, time.monotonic()
        if how == "revoke":
            revoke(home, "ann")
        elif how == "delete":
            path.unlink()
        elif how == "expire":
            class Later(datetime):
                @classmethod
                def now(cls, tz: tzinfo | None = None) -> Self:
                    return cls(2199, 1, 2, tzinfo=tz)

            monkeypatch.setattr(auth, "datetime", Later)
        else:
            path.write_text(path.read_text().replace("name=ann", "name=ann and a mistake"))
        with pytest.raises(ServerError, match="the server refuses: this key is not authorised any more, it was revoked or has expired") as e:
            list(stream)
        assert time.monotonic() - begun < 2, "the promise of SECURITY.md, with room"
        assert e.value.code == "key" and load(home / "ann").public not in {user for user, _ in server._sessions._table}
        if how == "delete":
            answer = bob.receive()
            assert isinstance(answer, Error) and (answer.session, answer.code) == (X, "key")
        else:
            assert bob.text() == want
            bob.send(wire.Close(X))
        refused(server.address, home / "ann", "does not know this key")


def test_a_revoked_key_is_not_heard(oracle: Engine, server: Server, home: Path) -> None:
    """It is told why, whatever it says then is dropped, and its connection ends, also one on which nothing was said before; others stay. Once it is
    authorised again, it is heard again."""
    with Keyed(server, home / "ann") as ann, Keyed(server, home / "ann", hello=False) as late, Keyed(server, home / "bob") as bob:
        until(lambda: len(server._doorman) == 3, "three connections")
        monitor = late.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        revoke(home, "ann")
        told = ann.receive()
        assert isinstance(told, Error) and (told.session, told.code) == (wire.NO_SESSION, "key")
        for message in (Hello("ann", b""), bytes(512), Draft(X, 1, 1, b"", b"")):
            ann.send(message)
            late.send(message)
        assert bob.silent() and ann.socket.poll(200) == late.socket.poll(0) == 0
        assert [p.user for p in server._sessions._peers] == [load(home / "bob").public]
        until(lambda: len(server._doorman) == 1, "the end of two connections")
        assert bob.silent() and monitor.poll(0)
        authorize(home, load(home / "ann").public, name="ann")
    with Keyed(server, home / "ann") as ann:
        ann.open()
        assert ann.text() == oracle.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids
        ann.send(wire.Close(X))


def test_a_revoked_key_is_taken_elsewhere(model: Path, oracle: Engine, server: Server, home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The next server knows it still: the text goes on there, with the same ids."""
    other = tmp_path_factory.mktemp("other")
    generate(other / auth.SECRET)
    authorize(other, load(home / "ann").public, name="ann")
    with serving(model, other) as second, Edge([server.address, second.address], key=home / "ann") as edge:
        stream = edge.stream(PROMPT, LONG)
        ids = next(stream).token_ids
        revoke(home, "ann")
        ids += [i for chunk in stream for i in chunk.token_ids]
        assert ids == oracle.generate([PROMPT], LONG)[0].token_ids and edge._link.address == second.address.partition("/?")[0]


def test_an_edge_waits_for_a_connection(oracle: Engine, server: Server, home: Path) -> None:
    """Its key may have one, and another edge uses it: it says so little that the key is not muted, and goes on once there is room."""
    authorize(home, load(home / "ann").public, name="ann", connections="1")
    until(lambda: server._quota(load(home / "ann").public).connections == 1, "the new limit")
    params = SamplingParams(max_tokens=12)
    with Edge(server.address, key=home / "ann") as first, Keyed(server, home / "ann") as second:
        second.open()  # `first`, which has nothing open, made way
        waiting = background(first.generate, [PROMPT], params)
        until(lambda: any("all 1 connections" in t.rounds.why for t in first._texts.values()), "what holds it up")
        with pytest.raises(TimeoutError):
            waiting.result(2.5)
        second.send(wire.Close(X))
        (done,) = waiting.result(PATIENCE)
    assert done.token_ids == oracle.generate([PROMPT], params)[0].token_ids and done.speculation.bytes_up < 30 * 512


def test_a_flood_of_one_key_is_one_flood(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several connections, and over those that come after; other keys are heard."""
    monkeypatch.setattr("specedge.net.doorman.SAVED", 50.0)
    monkeypatch.setattr("specedge.net.doorman.RATE", 0.0)
    monkeypatch.setattr("specedge.net.doorman.MUTE", 1000.0)
    with Keyed(server, home / "bob") as bob:
        for flood in (7, 7, 20):
            with Keyed(server, home / "ann") as one, Keyed(server, home / "ann") as two:
                for raw in (one, two):
                    for _ in range(flood):
                        raw.send(wire.Lease(X))
                if flood == 7:
                    assert one.silent() and two.silent()
                else:
                    until(lambda: server._doorman._allowances[load(home / "ann").public].muted, "silence")
        with Keyed(server, home / "ann", hello=False) as late:
            late.send(Hello("ann", b""))
            assert bob.silent() and late.socket.poll(200) == 0


def test_an_edge_that_rests_is_told_too(server: Server, home: Path) -> None:
    """It had nothing open; what begins after that fails for the reason, and not because the edge is closed."""
    with Edge(server.address, key=home / "ann") as edge:
        assert edge.generate([PROMPT], SamplingParams(max_tokens=2))[0].token_ids
        revoke(home, "ann")
        until(lambda: edge._closing, "the word of the server")
        for _ in range(2):
            with pytest.raises(ServerError, match="the server refuses: this key is not authorised any more"):
                edge.generate([PROMPT])


def test_a_key_is_authorised_while_the_server_runs(oracle: Engine, server: Server, home: Path) -> None:
    """A handshake looks at the list as it is at that moment."""
    for _ in range(3):
        refused(server.address, home / "eve", "does not know this key")
        authorize(home, load(home / "eve").public, name="eve", sessions="2", kv_tokens="4096")
        with Edge(server.address, key=home / "eve") as edge:
            assert edge.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids
            assert server._authenticator and server._authenticator.users[load(home / "eve").public].kv_tokens == 4096
        revoke(home, "eve")


def test_limits_of_a_key(oracle: Engine, server: Server, home: Path) -> None:
    """Texts beyond its sessions come one after the other, one that can never fit is refused, and other keys have theirs. The next greeting
    brings what was changed."""
    eve, params = load(home / "eve").public, SamplingParams(max_tokens=12)
    authorize(home, eve, name="eve", sessions="1", kv_tokens=str(len(PROMPT) + 12))
    want = oracle.generate([PROMPT], params)[0].token_ids
    with Edge(server.address, key=home / "eve") as edge, Edge(server.address, key=home / "ann") as ann:
        assert (edge.welcome.limits.max_sessions, ann.welcome.limits.max_sessions) == (1, 256)
        assert [c.token_ids for c in edge.generate([PROMPT] * 2, params)] == [want] * 2
        with pytest.raises(ServerError, match="this account may hold 18: shorten one of them") as e:
            edge.generate([PROMPT], SamplingParams(max_tokens=13))
        assert e.value.code == "quota"
        assert ann.generate([PROMPT], SamplingParams(max_tokens=13))[0].token_ids[:12] == want
        authorize(home, eve, name="eve")
        until(lambda: server._authenticator and server._authenticator.users[eve].kv_tokens is None, "the new limits")
        assert edge.generate([PROMPT], SamplingParams(max_tokens=13))[0].token_ids[:12] == want


def test_every_limit_reaches_the_table(server: Server, home: Path) -> None:
    """What is said of a key in the list is its quota from its next greeting on; what is not said is as for anybody."""
    said = dict(zip(auth.LIMITS, range(1, 7), strict=True))
    for limits in (said, {}):
        authorize(home, public := load(home / "ann").public, name="ann", **{name: str(n) for name, n in limits.items()})
        until(lambda: server._quota(public) == Quota(**limits), "the new list")  # noqa: B023
        with Keyed(server, home / "ann") as raw:
            assert server._sessions._usage[public].quota == Quota(**limits)
            assert raw.silent()


@pytest.mark.parametrize("drafting", [False, True])
def test_a_key_comes_back(model: Path, oracle: Engine, server: Server, home: Path, drafting: bool) -> None:
    """On another connection, to the same sessions, also under CURVE."""
    want, ids = oracle.generate([PROMPT], LONG)[0].token_ids, list[int]()
    with Proxy(server.endpoint) as proxy:
        address = f"{proxy.address}/?{server.address.partition('/?')[2]}"
        with Edge(address, drafter(model, DraftConfig(max_sessions=1)) if drafting else None, key=home / "ann") as edge:
            for chunk in edge.stream(PROMPT, LONG):
                if not ids or len(ids) < 40 <= len(ids) + len(chunk.token_ids):
                    assert proxy.drop()
                ids += chunk.token_ids
            assert ids == want and proxy.connections > 2
            until(lambda: len(server._sessions) == 0, "CLOSE")


def test_a_list_that_cannot_be_read_stays(server: Server, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said once. Whoever could exhaust the server's descriptors would otherwise end all sessions."""
    path, authenticator = home / auth.LIST, server._authenticator
    assert authenticator
    with Keyed(server, home / "ann") as ann, caplog.at_level(logging.ERROR, "specedge.net.auth"):
        path.chmod(0o666)
        until(lambda: caplog.records, "a complaint")
        with Edge(server.address, key=home / "bob") as edge:
            assert edge.generate([PROMPT])[0].token_ids
        assert ann.silent() and len(authenticator.users) == 2
        assert [r.getMessage() for r in caplog.records] == [
            f"cannot read the list of keys: others may change {path}: run chmod go-w on it, and make sure that nobody did"
        ]
        path.chmod(0o600)
        path.write_text("broken\n" + path.read_text())
        until(lambda: len(caplog.records) > 1, "another complaint")
        assert caplog.records[-1].getMessage().startswith(f"{path}, line 1: 'broken' is no public key") and len(authenticator.users) == 2


# ----------------------------------------------------------------------------------------------------------------------
# the authenticator


@pytest.mark.parametrize("busy", [False, True])
def test_an_authenticator_that_dies_is_noticed(
    server: Server, home: Path, busy: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """The server serves nobody any more, rather than everybody or nobody new; `alive` says so, upon which the command ends."""
    with Keyed(server, home / "ann") as ann:
        if busy:
            ann.open(most=400)
            ann.send(Draft(X, 1, len(PROMPT), b"", b"", CONTEXT))
        assert server.alive

        def fails(self: Authenticator) -> list[str]:
            raise RuntimeError("no memory")

        monkeypatch.setattr(Authenticator, "_refresh", fails)
        until(lambda: not server.alive, "the end of the network's thread")
        with pytest.raises(ServerError):
            Connection(server.address, b"", home / "bob", 1.0)
    assert "the authenticator failed" in caplog.text
    server._sessions._ends = 0.0  # what is open has nobody to end it but stop(), which the fixture comes to
    server.stop()


def test_without_an_authenticator_nobody_comes_in(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if nobody noticed that it is gone."""
    monkeypatch.setattr(Authenticator, "alive", True)
    assert server._authenticator
    server._authenticator.stop()
    with pytest.raises(ServerError, match="has another key than the address says"):  # which is how it looks from outside
        Edge(server.address, key=home / "ann")
    assert not server._sessions._peers
    monkeypatch.undo()


def test_keys_that_cannot_be_used(oracle: Engine, home: Path, tmp_path: Path) -> None:
    """Before anything is bound."""
    path = home / auth.LIST
    for wrong, sentence in (
        (lambda: path.write_text("broken\n"), f"{path}, line 1: 'broken' is no public key"),
        (lambda: path.chmod(0o660), "cannot read the list of keys: others may change"),
        (lambda: (home / auth.SECRET).chmod(0o640), f"others may read {home / auth.SECRET}"),
        (lambda: (home / auth.SECRET).unlink(), f"there is no key at {home / auth.SECRET}: make one with keygen"),
    ):
        wrong()
        with pytest.raises(AuthError, match=re.escape(sentence)):
            Server(oracle, keys=home).stop()


def test_with_keys_it_listens_anywhere(model: Path, home: Path) -> None:
    with serving(model, home, "tcp://0.0.0.0:0") as server:
        port = server.endpoint.rpartition(":")[2]
        host, _, query = server.address.removeprefix("specedge://").partition(f":{port}/?")
        assert host == socket.gethostname()
        with Edge(f"specedge://127.0.0.1:{port}/?{query}", key=home / "ann") as edge:
            assert edge.generate([PROMPT])[0].token_ids


def test_nobody_is_known_yet(model: Path, tmp_path: Path) -> None:
    """A new directory has no list, and its server serves nobody until it has."""
    generate(tmp_path / auth.SECRET)
    public = generate(tmp_path / "ann")
    with serving(model, tmp_path) as server:
        refused(server.address, tmp_path / "ann", "does not know this key")
        authorize(tmp_path, public, name="ann")
        with Edge(server.address, key=tmp_path / "ann") as edge:
            assert edge.generate([PROMPT])[0].token_ids


def test_the_wire_is_not_plain(server: Server, home: Path) -> None:
    """What passes a relay between the two holds no frame of the protocol."""
    seen = bytearray()
    host, _, port = server.endpoint.removeprefix("tcp://").partition(":")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def relay(there: socket.socket, back: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := there.recv(65536):
                    seen.extend(data)
                    back.sendall(data)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    one, two = listening.accept()[0], socket.create_connection((host, int(port)))
                    background(relay, one, two)
                    background(relay, two, one)

        background(serve)
        address = f"specedge://127.0.0.1:{listening.getsockname()[1]}/{server.address.rpartition('/')[2]}"
        with Edge(address, key=home / "ann") as edge:
            assert edge.generate([PROMPT], SamplingParams(max_tokens=12))[0].token_ids
        listening.shutdown(socket.SHUT_RDWR)
    assert b"CURVE" in seen and len(seen) > 13 * 512 and wire.MAGIC not in seen


def test_heartbeats_pass_the_encryption(server: Server, home: Path) -> None:
    """A quiet connection is kept: its beats are commands of their own, which the encryption must let through."""
    with Keyed(server, home / "ann", hello=False) as raw:
        monitor = raw.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        for option in (zmq.HEARTBEAT_IVL, zmq.HEARTBEAT_TIMEOUT):
            raw.socket.setsockopt(option, 50)
        raw.socket.connect(server.endpoint)  # a second connection, to which the options apply
        assert monitor.poll(500) == 0
        raw.socket.disable_monitor()
