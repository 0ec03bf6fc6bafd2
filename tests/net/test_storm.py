"""F2: edges and a server in a storm, with real sockets: every text that comes to its end is the one of the undisturbed run.

Between each edge and the server stands a proxy that loses, repeats and reorders single frames, delays and breaks connections, swallows what passes.
The server is killed and restarted, or drained and restarted; edges are killed and restarted. Only greetings are let through, for a lost one costs a
second and shows nothing more than a lost connection does.
"""

import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from bench.proxy import DOWN, UP, Proxy
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine
from specedge.net import link as link_module
from specedge.net import rounds as rounds_module
from specedge.net.client import Connection
from specedge.net.edge import Edge
from specedge.net.server import Server
from tests.helpers import check_empty, drafter, random_model, runner
from tests.net.test_server import until

TEXTS = [([7, 3, 9, 50, 100, 2], SamplingParams(0.8, 120, seed=s)) for s in (1, 2)] + [
    (list(range(1, 90)), SamplingParams(0.0, 150)), ([5], SamplingParams(1.2, 90, seed=9, repetition_penalty=1.2)),
]  # fmt: skip
GREETINGS = (1, 2)  # types of HELLO and WELCOME
ODDS = 0.01  # of each fate of a frame
LONG = pytest.param(300, marks=[pytest.mark.full, pytest.mark.timeout(1800)])


class Meddler:
    """Loses, repeats and reorders frames, and counts what it did."""

    def __init__(self, seed: int, seen: Counter[str]) -> None:
        self._rng, self._seen = random.Random(seed), seen
        self._held: list[bytes | None] = [None, None]

    def __call__(self, way: int, frame: bytes) -> list[bytes]:
        assert way in (UP, DOWN)
        if frame[9 + 6] in GREETINGS:  # behind ZMTP's 9 bytes: our frames are long ones
            return [frame]
        held, self._held[way] = self._held[way], None
        if held is not None:
            return [frame, held]
        fate = self._rng.random()
        if fate < ODDS:
            self._seen["frame lost"] += 1
            return []
        if fate < 2 * ODDS:
            self._seen["frame twice"] += 1
            return [frame, frame]
        if fate < 3 * ODDS:
            self._seen["frame after the next"] += 1
            self._held[way] = frame
            return []
        return [frame]


class User:
    """One edge and its proxy: text after text, all of them compared."""

    def __init__(self, number: int, endpoint: str, draft: Drafter | None, want: list[list[int]], seen: Counter[str]) -> None:
        self.proxy = Proxy(endpoint, Meddler(number, seen))
        self._draft, self._want, self._seen, self._number = draft, want, seen, number
        self._enough, self._killed = threading.Event(), threading.Event()
        self.wrong: list[object] = []
        self._thread = threading.Thread(target=self._live, name="user", daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """Its edge goes without a word to the server."""
        self._killed.set()

    def stop(self) -> None:
        self._enough.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _live(self) -> None:
        try:
            while not self._enough.is_set():
                self._killed.clear()
                edge = Edge(self.proxy.address, self._draft)
                while not self._killed.is_set() and not self._enough.is_set():
                    self._text(edge)
                if self._killed.is_set():
                    self.proxy.silent = True
                edge.close()
                self.proxy.drop()
                self.proxy.silent = False
        except Exception as e:
            if "no server at" in str(e) or "does not answer" in str(e) or "is lost" in str(e):  # a new edge met a fault: as a user, begin again
                self._seen["edges that met a fault"] += 1
                if not self._enough.is_set():
                    time.sleep(0.05)
                    self._live()
            else:
                self.wrong.append(e)

    def _text(self, edge: Edge) -> None:
        i = (self._number + self._seen["texts"]) % len(TEXTS)
        ids: list[int] = []
        for chunk in edge.stream(*TEXTS[i]):
            ids += chunk.token_ids
            if ids != self._want[i][: len(ids)]:
                self.wrong.append((i, ids))
            if self._killed.is_set():
                self._seen["texts cut short"] += 1
                return
        if ids == self._want[i]:
            self._seen["texts"] += 1
        else:
            self.wrong.append((i, ids))


@pytest.mark.parametrize("faults", [24, LONG])
def test_every_text_survives_the_storm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: int) -> None:
    monkeypatch.setattr(rounds_module, "RESEND", 0.15)
    monkeypatch.setattr(link_module, "LONGEST", 0.2)
    monkeypatch.setattr(link_module, "SILENCE", 0.5)
    monkeypatch.setattr(Connection.__init__, "__defaults__", (None, 1.0))
    path, other = random_model(tmp_path / "target", seed=3), random_model(tmp_path / "draft", seed=8)
    target, rng, seen = runner(path, page_size=16), random.Random(faults), Counter[str]()
    want = [Engine(target).generate([p], params)[0].token_ids for p, params in TEXTS]

    def serve() -> Server:
        server = Server(Engine(target), model=b"m" * 32)
        server._sessions.lease = 3.0
        server.start()
        return server

    server = serve()
    config = DraftConfig(tree_size=7, max_sessions=2, engine=EngineConfig(kv_tokens=4096, max_rows=256))
    users = [User(i, server.endpoint, d, want, seen) for i, d in enumerate([None, drafter(path, config), drafter(other, config)])]
    begun, done = time.monotonic(), 0
    try:
        while done < faults:
            time.sleep(rng.uniform(0.02, 0.2))
            what = rng.choice(["drop", "drop", "drop all", "delay", "swallow", "kill server", "drain server", "kill edge"])
            seen[what] += 1
            done += 1
            user = rng.choice(users)
            if what == "drop":
                user.proxy.drop()
            elif what == "drop all":
                for u in users:
                    u.proxy.drop()
            elif what == "delay":
                user.proxy.delay = rng.choice([0.0, 0.002, 0.01])
            elif what == "swallow":
                user.proxy.silent = True
                time.sleep(rng.uniform(0.0, 0.8))
                user.proxy.silent = False  # what was lost stays lost, and the rest of a frame would be noise:
                user.proxy.drop()
            elif what == "kill edge":
                user.kill()
            else:
                if what == "kill server":
                    for u in users:
                        u.proxy.refuse = True
                        u.proxy.drop()
                server.stop(rng.choice([0.0, 0.1]) if what == "drain server" else 0.0)
                for u in users:
                    u.proxy.drop()
                time.sleep(rng.uniform(0.0, 0.2))
                server = serve()
                for u in users:
                    u.proxy.retarget(server.endpoint)
                    u.proxy.refuse = False
        for u in users:
            u.proxy.fate = lambda _way, frame: [frame]
            u.proxy.delay = 0.0
            u.proxy.drop()
        texts = seen["texts"]
        until(lambda: seen["texts"] > texts + 3 or any(u.wrong for u in users), "texts after the storm")
    finally:
        for u in users:
            u.stop()
            u.proxy.__exit__()
        until(lambda: len(server._sessions) == 0, "the end of all sessions")
        server.stop()
    print(dict(seen), f"{done} faults and {sum(n for k, n in seen.items() if 'frame' in k)} of frames in {time.monotonic() - begun:.0f} s")
    assert not any(u.wrong for u in users), [u.wrong[:1] for u in users]
    check_empty(server._engine)
