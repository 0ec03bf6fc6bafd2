"""bench/serve.py runs from end to end and means what it says: ids compared, figures from logs by hand, the network's delay and rate."""

import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import serve, simulate
from bench.cells import breakdown, figures, rounds, windows
from bench.claims import claims, group, report
from bench.logged import IndependentDrafter, LoggedDrafter, seconds, single_guess
from bench.serve import Results, conclude
from bench.simulate import Simulation, World, co_located, play
from bench.timeline import draw, perfetto
from bench.wan import Network, Wan
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.runner import Runner

ROOT = Path(__file__).parents[1]
MODES = list(serve.MODES)
TWO = f"{MODES[-1]} x2 T 0.7, rtt 15"


@contextmanager
def echo() -> Iterator[str]:
    """A server that sends back what comes; yields host:port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    s = listening.accept()[0]
                except OSError:
                    return
                with s:
                    try:
                        while piece := s.recv(65536):
                            s.sendall(piece)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def call(wan: Wan, data: bytes, times: int) -> list[float]:
    """Seconds until all of `data` has come back, one after the other on one connection."""
    host, port = wan.address.split(":")
    took = []
    with socket.create_connection((host, int(port)), 5) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(times):
            begun, left = time.monotonic(), len(data)
            s.sendall(data)
            while left:
                left -= len(s.recv(65536))
            took.append(time.monotonic() - begun)
    return took


def test_the_network_delays_and_takes_its_time() -> None:
    with echo() as target, Wan(target, Network(rtt=20)) as wan:
        took = call(wan, b"x" * 512, 15)
        assert 0.0195 <= min(took) < 0.2
        assert len(wan.log) == 30 and sum(up for _, _, up, _, _ in wan.log) == 15
        assert all(left - came >= 0.0095 for came, left, *_ in wan.log)
    with echo() as target, Wan(target, Network(rtt=0, up=8)) as wan:  # 1 MB/s
        assert call(wan, bytes(100_000), 1)[0] >= 0.099
        assert sum(size for _, _, up, size, _ in wan.log if up) == 100_000


def test_jitter_keeps_the_order() -> None:
    data = bytes(i % 251 for i in range(40_000))
    with echo() as target, Wan(target, Network(rtt=2, jitter=5)) as wan:
        host, port = wan.address.split(":")
        with socket.create_connection((host, int(port)), 5) as s:
            for at in range(0, len(data), 1000):
                s.sendall(data[at : at + 1000])
            back = b""
            while len(back) < len(data):
                back += s.recv(65536)
        assert back == data


def test_a_dropped_connection_is_reset_and_the_next_one_works() -> None:
    with echo() as target, Wan(target, Network(rtt=1)) as wan:
        host, port = wan.address.split(":")
        with socket.create_connection((host, int(port)), 5) as s:
            s.sendall(b"a")
            assert s.recv(1) == b"a"
            wan.drop()
            with pytest.raises(ConnectionResetError):
                s.recv(1)
        assert call(wan, b"b", 1)


def test_a_forward_takes_the_time_between_the_measured_ones() -> None:
    pace = [(1, 0.010), (4, 0.010), (8, 0.018)]
    assert [seconds(pace, n) for n in (1, 2, 4, 6, 8)] == pytest.approx([0.010, 0.010, 0.010, 0.014, 0.018])
    assert seconds(pace, 16) == pytest.approx(0.036)


def logs() -> dict[str, Any]:
    """Two edges that alternate: steps of 100 ms, 4 tokens a verdict of 8 rows, 8 ms each way, every second verdict a hit."""
    steps, edges = [], [{"grows": [], "submits": [], "verdicts": [], "late": [0.0], "paced": 0.25} for _ in range(2)]
    wire = []
    spoken = {"rounds": 10, "hits": 5, "misses": 5, "bytes_up": 512, "bytes_down": 512}
    records: list[dict[str, Any]] = [{"ttft": ttft, "started": 0.0, "times": [], "ids": [], "speculation": spoken} for ttft in (0.3, 0.5)]
    for k in range(20):
        e, begun = k % 2, 1.0 + k * 0.1
        sent = begun - 0.020
        edges[e]["submits"].append((sent, 7))
        edges[e]["grows"].append((sent - 0.030, sent, True))
        wire += [(sent, sent + 0.008, True, 512, e), (begun + 0.1, begun + 0.108, False, 512, e)]
        steps.append((begun, begun + 0.1, 8, [(e, 96 + 4 * (k // 2), 8, 4)]))
        edges[e]["verdicts"].append((begun + 0.110, k // 2 % 2 == 0, k < 4, 3))
        records[e]["times"].append((begun + 0.110, 4))
        records[e]["ids"] += [k] * 4
    server = {"steps": steps, "prompts": {0: [1], 1: [2]}, "grows": [], "cpu": 2.0}
    return {"records": [records], "server": server, "edges": edges, "wire": wire, "prompts": [[[1], [2]]]}


def test_figures_are_those_of_the_log() -> None:
    log = logs()
    log["edges"][0]["verdicts"].insert(0, (-1.0, True, True, 3))  # of a text that does not count
    assert windows(log["records"]) == [(pytest.approx(1.210), pytest.approx(2.910))]
    found = figures(log["records"], log["server"], log["edges"], (3.60, 0.36))
    assert found["tokens_per_s"] == pytest.approx(17 * 4 / 1.7) and found["bound_tokens_per_s"] == pytest.approx(40)
    assert found["tpot_ms"] == pytest.approx(1.8 / 39 * 1e3) and found["gap_p50_ms"] == pytest.approx(200)
    assert found["ttft_ms"] == pytest.approx(400)
    assert found["tokens_per_row"] == pytest.approx(0.5) and found["tokens_per_round"] == pytest.approx(4)
    assert found["server_idle"] == pytest.approx(0, abs=1e-9)
    assert found["forward_overhead_ms"] == pytest.approx((0.6 - 0.5) / 20 * 1e3)
    assert found["single_guess_rate"] == pytest.approx(0.2) and found["hit_rate"] == 0.5
    assert found["dollars_per_million"] == pytest.approx(4.32 / 3600 / 40 * 1e6)
    server = {**log["server"], "grows": [(1.0, 1.55, True)]}
    assert figures(log["records"], server, [], (1, 1))["server_drafting"] == pytest.approx(0.34 / 1.7)


def test_a_round_is_found_again_in_the_log() -> None:
    log = logs()
    log["server"]["steps"].append((3.0, 3.1, 1, [(1, 136, 1, 1)]))  # without a tree: the server decodes alone
    log["edges"][1]["verdicts"].append((3.11, False, False, 0))
    found = rounds(log)
    assert len(found) == 20 and {r.edge for r in found} == {0, 1} and all(r.tokens == 4 and r.nodes == 7 for r in found)
    parts = breakdown(found)
    assert {k: round(v, 3) for k, v in parts.items()} == {
        "draft after a hit": 70.0, "draft after a miss": 70.0, "up": 8.0, "queue": 12.0, "verify": 100.0, "down": 8.0, "unseen at the edge": 2.0
    }  # fmt: skip


def test_a_round_that_nobody_asked_for_is_found_too() -> None:
    """Its tree was at the server when its step began; of what comes before a step it says nothing."""
    log = logs()
    last = max(v[0] for v in log["edges"][1]["verdicts"])
    log["edges"][1]["begun"] = [last]
    log["server"]["steps"].append((3.0, 3.1, 9, [(1, 136, 9, 3)]))
    log["edges"][1]["verdicts"].append((3.11, True, False, 0))
    *asked, unasked = rounds(log)
    assert len(asked) == 20 and all(r.asked for r in asked)
    assert (unasked.asked, unasked.sent, unasked.arrived, unasked.begun, unasked.nodes, unasked.tokens) == (False, 3.0, 3.0, 3.0, 8, 3)
    assert {k: round(v, 3) for k, v in breakdown([*asked, unasked]).items() if k in ("up", "queue")} == {"up": 8.0, "queue": 12.0}


def test_the_timeline_shows_every_round_of_its_span() -> None:
    svg = draw(logs(), "a & b", seconds=10)
    assert svg.count("+4</text>") == 16 and "a &amp; b" in svg and "nan" not in svg
    spans = [e for e in perfetto(logs())["traceEvents"] if e["ph"] == "X"]
    assert sum(e["name"] == "verify" for e in spans) == 20 and all(e["dur"] >= 0 for e in spans)


def line(cell: str, void: str = "", **values: float) -> dict[str, Any]:
    keys = figures(logs()["records"], logs()["server"], logs()["edges"], (1, 1))
    named: dict[str, Any] = dict.fromkeys(keys)
    return {"cell": cell, "void": void, **named, **values}


def test_claims_are_judged_by_medians_without_void_cells() -> None:
    lines = [line("co-located x1 T 0.7", tokens_per_s=10.0, tpot_ms=100.0)]
    lines += [line(TWO, tokens_per_s=v, bound_tokens_per_s=24.0, tpot_ms=80.0) for v in (22.0, 23.0, 24.0)]
    lines.append(line(TWO, "too busy", tokens_per_s=1.0, bound_tokens_per_s=1.0, tpot_ms=1.0))
    found = {claim: (reached, verdict) for claim, _, reached, verdict in claims(group(lines), [], MODES, 15.0)}
    assert found["server tokens/s over the bound of the run, 2 edges, T 0.7"] == ("0.958", "reached")
    assert found["server tokens/s, 2 edges against 1 co-located session, T 0.7"] == ("2.30 (bound 2.40)", "reached")
    assert found["TPOT, 2 edges / 1 co-located session, T 0.7"] == ("0.800", "reached")
    assert found["TPOT at RTT 50 ms, 2 edges / 1 co-located session, T 0.7"][1] == "not measured"
    text = report(lines, ["prompt 3"], MODES, 15.0)
    assert "1 of 4 void: too busy" in text and "23.0 ± 1.0" in text and "| missed |" in text.splitlines()[-2]


def submitted(kind: type[LoggedDrafter], seed: int) -> tuple[LoggedDrafter, Any, Any]:
    """A drafter of `kind` over the shipped draft, its one session and the tree that it has submitted."""
    sizes = EngineConfig(kv_tokens=512, max_rows=64)
    runner = Runner.load(ROOT / "specedge" / "demo" / "draft", sizes, 256, "cpu", "float32", False)
    own = kind(runner, DraftConfig(tree_size=12, depth=4, max_sessions=1, engine=sizes), None)  # as many forwards whatever they take
    session = own.open([9, 200, 31, 7], SamplingParams(temperature=0.9, seed=seed, max_tokens=64), 68)
    assert session is not None
    while not own.ready(session):
        own.grow()
    return own, session, own.submit(session, 12)


def test_a_draft_without_the_noise_does_not_know_the_seed() -> None:
    trees = {kind: [submitted(kind, seed)[2].tokens.tolist() for seed in (1, 2)] for kind in (LoggedDrafter, IndependentDrafter)}
    assert trees[IndependentDrafter][0] == trees[IndependentDrafter][1] and trees[LoggedDrafter][0] != trees[LoggedDrafter][1]


def test_the_single_guess_is_the_likeliest_token_below_a_leaf() -> None:
    own, session, tree = submitted(LoggedDrafter, 1)
    for _ in range(4):
        own.grow()
    guess = single_guess(session)
    nodes = session.submitted
    inner = {id(n.parent) for n in nodes}
    assert guess.parent in nodes and id(guess.parent) not in inner and guess not in nodes
    assert guess.score == max(n.score for n in session.nodes if n.parent in nodes and id(n.parent) not in inner)
    own.verdict(session, guess.path())
    assert own.verdicts[-1][1:3] == (True, True) and own.submits[-1][1] == len(tree) and len(own.grows) >= 5


def test_virtual_time_follows_its_world() -> None:
    def at(sessions: int = 1, ahead: bool = False, **changes: Any) -> dict[str, float]:
        world = replace(World([(1, 0.1), (1000, 0.1)], [(1, 0.01), (300, 0.01)]), **changes)
        return play(world, sessions, DraftConfig(tree_size=15, ahead=ahead), 5.0)

    near, far = at(), at(rtt=0.4)
    assert near["tokens_per_round"] > at(error=3.0)["tokens_per_round"]
    assert near["server_idle"] < far["server_idle"] and near["tokens_per_s"] > far["tokens_per_s"]
    assert far["server_idle"] >= 0.4 / (0.4 + 0.102) * 0.9  # one session: nothing to do while its messages travel
    assert at(sessions=3)["tokens_per_s"] > 1.8 * near["tokens_per_s"]  # rows cost nothing here: all three share a step
    ahead = at(rtt=0.1, ahead=True)
    assert ahead["tokens_per_s"] > 1.1 * at(rtt=0.1)["tokens_per_s"] and ahead["server_idle"] < 0.1 / 0.2 * 0.9  # it begins rounds by itself


def test_a_server_drafts_for_itself_in_virtual_time() -> None:
    """Forward by forward, then a pass: the tokens of a round over the time of both."""
    world = World([(1, 0.1), (1000, 0.1)], [(1, 0.02), (300, 0.02)], step_overhead=0.0, forward_overhead=0.0)
    rate, tokens = co_located(world, 2, 7, 1)
    assert rate == pytest.approx(tokens / 0.14, rel=0.1) and 1.2 < tokens < 3.01
    assert co_located(replace(world, error=3.0), 2, 7, 1)[1] < tokens < co_located(world, 6, 31, 1)[1]


def test_prompts_can_be_read_before_virtual_time_counts() -> None:
    """Then the first step of a text has one row of it, and a tree."""
    first = {}
    for cached in (False, True):
        played = Simulation(World([(1, 0.1), (1000, 0.1)], [(1, 0.01), (300, 0.01)], text=8, prompt=129, cached=cached), 1, DraftConfig(tree_size=3))
        played.run(math.inf, 1)
        first[cached] = next(rows for *_, rows, answers in played.steps if answers)
    assert first[True] <= 4 < first[False]


def test_virtual_time_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--sessions", "1", "2", "--seconds", "2"])
    simulate.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["1"]["tokens_per_s"] < found["2"]["tokens_per_s"]


def test_an_engine_finds_out_what_rows_cost() -> None:
    """In its first text of 64 tokens, from a prior by which a row costs an eighth of a step."""
    rows = {}
    for last in (0.1, 2.1):
        played = Simulation(World([(1, 0.1), (64, last)], [(1, 0.01), (300, 0.01)], text=64), 1, DraftConfig())
        played.run(math.inf, 2)
        assert played.engine.cost.confident
        rows[last] = played.figures()["rows_per_step"]
    assert rows[0.1] > 3 * rows[2.1], rows


def test_a_run_in_virtual_time_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a simulated run, as bench/serve.py would write them, agree with what is played by its times and acceptance."""
    monkeypatch.setattr(simulate, "RUNS", 1)
    monkeypatch.setattr(simulate, "FITS", 1)
    given = {"target": [(1, 0.1), (64, 0.1)], "draft": [(1, 0.01), (300, 0.01)], "rtt": 0.01, "pipeline": True, "admission": True}
    played = Simulation(World(**given | {"rtt": 0.1}, text=32, prompt=simulate.READ), 1, DraftConfig(tree_size=7))
    played.run(math.inf, 2)
    found = played.figures() | {"step_ms": 102.0, "forward_overhead_ms": 1.0, "round_ms": {"up": 50.0, "down": 50.0, "unseen at the edge": 0.0}}
    cell = {"kind": "cell", "cell": "a", "void": "", "world": given, "temperature": 0.7, "sessions": 1, "conditions": {"tokens": 32}}
    plain = {"kind": "cell", "cell": "b", "void": "", "world": None, "rows_per_step": 1.0, "step_ms": 102.0}
    file = tmp_path / "cells.jsonl"
    file.write_text("\n".join(json.dumps(c) for c in (cell | {"drafter": {"tree_size": 7, "ahead": True}} | found, plain)))
    *_, line = simulate.compare(file, "")
    assert line.startswith("| a |") and "(+0%)" in line and line.endswith("| agrees |"), line


def test_two_modes_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cells.jsonl"
    command = [
        sys.executable, "-m", "bench.serve", "--pair", "narrow", "--sessions", "1", "--temperatures", "0.7", "--modes", MODES[0], MODES[-1],
        "--tokens", "16", "--waves", "1", "--repetitions", "1", "--baseline", "0", "7", "--no-claims", "--rtt", "2", "--out", str(out),
        "--timeline", str(tmp_path / "t.svg"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    plain, drafted = answer["cells"]
    assert plain["ids"] == drafted["ids"] and len(plain["ids"]) == 1 and answer["wrong"] == []
    assert plain["tokens_per_round"] <= 1.01 < drafted["tokens_per_round"] and drafted["rows_per_step"] > 2
    assert "<svg" in (tmp_path / "t.svg").read_text()
    assert conclude(answer["cells"], 2.0, {}) == 0
    drafted["ids"] = dict.fromkeys(drafted["ids"], "another text")
    assert conclude(answer["cells"], 2.0, {}) == 1 and "ids differ: prompt" in capsys.readouterr().out


def test_a_run_resumes_where_conditions_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells.jsonl"
    results = Results(path, {"commit": "a", "modes": (1, 2)})
    results.add({"kind": "cell", "cell": "x", "repetition": 0, "ids": {}})
    assert Results(path, {"commit": "a", "modes": (1, 2)}).find(kind="cell", cell="x", repetition=0)
    assert not Results(path, {"commit": "a", "modes": (1, 2)}).find(kind="cell", cell="x", repetition=1)
    assert not Results(path, {"commit": "b", "modes": (1, 2)}).lines
