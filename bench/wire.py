"""What the wire costs and how soon it recovers: handshakes, bytes, cancelling, draining, revoking, faults, frame sizes.

    python -m bench.wire [--quick] [--only F3 F6 ...] [--out FILE]

Servers are processes of the real command on the shipped models, on loopback, with keys unless it is said otherwise; only where a server is to vanish
within microseconds (F3) it is one in this process. Each figure names how often it was measured, its median and its worst.
"""

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.attacks import attacked
from bench.house import House
from bench.proxy import Proxy
from bench.step import machine
from specedge.cli import DEMO
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine
from specedge.net import wire
from specedge.net.auth import authorize, load, revoke
from specedge.net.client import Connection, ServerError
from specedge.net.edge import Edge
from specedge.net.server import Server

Figures = dict[str, object]
PAPER = 136_000  # bytes a round: ids, positions, slots and a mask of 32 x 2,048 + 32 x 32 half floats
PROMPT = [7, 3, 9, 50, 100, 2]
TEXT = SamplingParams(0.8, 400, seed=5, ignore_eos=True)
MODEL = b"m" * 32


def spread(times: list[float], unit: float = 1e3) -> Figures:
    """Median and worst of seconds, in milliseconds."""
    return {"n": len(times), "median_ms": round(statistics.median(times) * unit, 2), "worst_ms": round(max(times) * unit, 2)}


def drafter(sessions: int = 1, ahead: bool = True) -> Drafter:
    config = DraftConfig(max_sessions=sessions, ahead=ahead, engine=EngineConfig(kv_tokens=4096, max_rows=256))
    return Drafter.from_pretrained(DEMO / "draft", config, device="cpu")


def target() -> Engine:
    return Engine.from_pretrained(DEMO / "target", device="cpu", sizes=EngineConfig(kv_tokens=4096))


# ----------------------------------------------------------------------------------------------------------------------
# F3


def recovery(quick: bool) -> Figures:
    """The longest pause in a stream after a fault in its middle; without one it is the worst gap between two tokens. An edge that is restarted: from
    its start to the first token, the prompt's pages being cached."""
    times = 3 if quick else 25
    engine, params = target(), replace(TEXT, max_tokens=120)
    want = engine.generate([PROMPT], params)[0].token_ids
    cases: dict[str, Callable[[], float]] = {
        "undisturbed": lambda: _broken(engine, want, params, ""), "connection lost": lambda: _broken(engine, want, params, "drop"),
        "server restarted": lambda: _broken(engine, want, params, "restart"), "another server": lambda: _broken(engine, want, params, "elsewhere"),
        "edge restarted": lambda: _reborn(engine, want, params),
    }  # fmt: skip
    figures: Figures = {name: spread([case() for _ in range(times)]) for name, case in cases.items()}
    if not quick:
        figures["network swallows all"] = spread([_broken(engine, want, params, "silence") for _ in range(2)])
    return figures


def _broken(engine: Engine, want: list[int], params: SamplingParams, fault: str) -> float:
    ids, pause = list[int](), 0.0
    with contextlib.ExitStack() as stack:
        first = Server(engine, model=MODEL)
        first.start()
        stack.callback(first.stop)
        proxy = stack.enter_context(Proxy(first.endpoint))
        others = [stack.enter_context(Server(target(), model=MODEL)).address] if fault in ("elsewhere", "silence") else []
        edge = stack.enter_context(Edge([proxy.address, *others]))
        before = 0.0
        for chunk in edge.stream(PROMPT, params):
            now = time.monotonic()
            pause, before = max(pause, now - before) if before else 0.0, now
            ids += chunk.token_ids
            if len(ids) < 40 or not fault:
                continue
            if fault == "silence":
                proxy.silent = True
            else:
                proxy.refuse = fault != "drop"
                proxy.drop()
            if fault == "restart":
                first.stop()
                proxy.retarget(stack.enter_context(Server(engine, model=MODEL)).endpoint)
                proxy.refuse = False
            fault, pause, before = "", 0.0, now
    assert ids == want
    return pause


def _reborn(engine: Engine, want: list[int], params: SamplingParams) -> float:
    with Server(engine) as server:
        dead = Edge(server.address)
        stream = dead.stream(PROMPT, params)
        next(stream)
        begun = time.monotonic()
        with Edge(server.address) as edge:
            ids, took = list[int](), 0.0
            for chunk in edge.stream(PROMPT, params):
                took = took or time.monotonic() - begun
                ids += chunk.token_ids
        dead.close()
    assert ids == want
    return took


# ----------------------------------------------------------------------------------------------------------------------
# F6, F8, F10


def handshakes(quick: bool) -> Figures:
    """From nothing to WELCOME, one after the other, and the server's processor time for each beyond what it takes when idle."""
    times, figures = 20 if quick else 400, Figures()
    with House() as house:
        key = house.key("ann")
        for name, keys in (("CURVE", True), ("plain", False)):
            server = house.serve(keys=keys)
            idle, begun = server.cpu, time.monotonic()
            time.sleep(0.2 if quick else 2.0)
            idle = (server.cpu - idle) / (time.monotonic() - begun)
            took, cpu, begun = list[float](), server.cpu, time.monotonic()
            for _ in range(times):
                at = time.monotonic()
                connection = Connection(server.address, b"", key if keys else None)
                took.append(time.monotonic() - at)
                connection.close()
            cpu = server.cpu - cpu - idle * (time.monotonic() - begun)
            figures[name] = {**spread(took), "server_cpu_ms": round(cpu / times * 1e3, 2)}
    return figures


def cancelling(quick: bool) -> Figures:
    """From CANCEL, sent, to WELCOME, received, that counts the session and its pages as free: alone, and beside four texts that are decoded."""
    times, figures = 5 if quick else 100, Figures()
    with House() as house:
        server, key = house.serve(), house.key("ann")
        for others in (0, 4):
            with Edge(server.address, key=house.key(f"bob{others}")) as edge:
                streams = [edge.stream(PROMPT, replace(TEXT, max_tokens=1000, seed=i)) for i in range(others)]
                for s in streams:
                    next(s)
                connection, took = Connection(server.address, b"", key), list[float]()
                for i in range(times):
                    session = i.to_bytes(16, "big")
                    known = [i % 97, *range(100, 300)]
                    sampling = wire.Sampling(0.8, 5)
                    connection.send(wire.Open(session, wire.pack_ids(known), len(known), len(known), sampling, [], 300))
                    connection.send(wire.Draft(session, 1, len(known), b"", b"", 500))
                    seen = 0
                    while seen < 3:
                        connection.socket.poll(1000)
                        seen += sum(isinstance(m, wire.Verdict) for m, _ in connection.receive())
                    at = time.monotonic()
                    connection.send(wire.Cancel(session))
                    while (load := connection.ask().load).sessions > others or (not others and load.kv_free < load.kv_tokens):
                        pass
                    took.append(time.monotonic() - at)
                connection.close()
            figures[f"beside {others}"] = spread(took)
    return figures


def revoking(quick: bool) -> Figures:
    """From the call that changes the list to the sentence at an edge in the middle of a text."""
    took = list[float]()
    with House() as house:
        server, key = house.serve(), house.key("ann")
        for _ in range(3 if quick else 40):
            with Edge(server.address, key=key) as edge:
                stream = edge.stream(PROMPT, replace(TEXT, max_tokens=1000))
                next(stream)
                at = time.monotonic()
                revoke(house.home, "ann")
                try:
                    list(stream)
                except ServerError as e:
                    assert e.code == "key"
                took.append(time.monotonic() - at)
            authorize(house.home, load(key).public, name="ann")
    return spread(took)


# ----------------------------------------------------------------------------------------------------------------------
# F7, F12


def traffic(quick: bool) -> Figures:
    """Bytes of drafted texts of 31 nodes a round, whole, openings and acknowledgements of ZeroMQ included, as they pass on the network: of rounds
    that an edge asks for, and where it tells what grows."""
    asked, ahead = _traffic(quick, False), _traffic(quick, True)
    return asked | {f"{name}_ahead": value for name, value in ahead.items() if name != "paper_bytes_per_round"}


def _traffic(quick: bool, ahead: bool) -> Figures:
    sizes: tuple[Counter[int], Counter[int]] = (Counter(), Counter())

    def note(way: int, frame: bytes) -> list[bytes]:
        sizes[way][len(frame)] += 1
        return [frame]

    with House() as house:
        server, key = house.serve(), house.key("ann")
        drafts, pinned = drafter(ahead=ahead), server.address.partition("/?")[2]
        with Proxy(server.endpoint, note) as proxy, Edge(f"{proxy.address}/?{pinned}", drafts, key=key) as edge:
            for drafted in (sizes[0], sizes[1]):
                drafted.clear()
            before, params = list(proxy.bytes), SamplingParams(0.0, 40 if quick else 400, ignore_eos=True)
            texts = [edge.generate([p], params)[0] for p in ("def fibonacci(n):", "The history of")]
            tokens, rounds = sum(len(t.token_ids) for t in texts), sum(t.speculation.rounds for t in texts)
            passed = sum(proxy.bytes) - sum(before)
    return {
        "tokens": tokens, "rounds": rounds, "bytes_per_round": round(passed / rounds), "bytes_per_token": round(passed / tokens),
        "paper_bytes_per_round": PAPER, "times_less": round(PAPER * rounds / passed), "frames_up": dict(sizes[0]), "frames_down": dict(sizes[1]),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# F9


def draining(quick: bool) -> Figures:
    """SIGTERM to one of two servers under eight texts, drafted and not: how many ids differ from those of an undisturbed engine, how long the process
    takes to end, and the longest pause of a text."""
    engine, params, differing, ends, pauses = target(), replace(TEXT, max_tokens=400), 0, list[float](), list[float]()
    want = [engine.generate([PROMPT], replace(params, seed=i))[0].token_ids for i in range(8)]
    with House() as house:
        key, second = house.key("ann"), house.serve()
        for _ in range(1 if quick else 6):
            first = house.serve()
            with Edge([first.address, second.address], drafter(4), key=key) as drafting, Edge([first.address, second.address], key=key) as plain:
                texts = [(drafting, plain)[i % 2].stream(PROMPT, replace(params, seed=i)) for i in range(8)]
                got: list[list[int]] = [next(t).token_ids for t in texts]
                running = [threading.Thread(target=_follow, args=(t, ids, pauses)) for t, ids in zip(texts, got, strict=True)]
                for thread in running:
                    thread.start()
                at = time.monotonic()
                assert first.terminate() == 0
                ends.append(time.monotonic() - at)
                for thread in running:
                    thread.join()
            differing += sum(a != b for a, b in zip(got, want, strict=True))
    return {"texts": len(ends) * 8, "texts_that_differ": differing, "process_ends": spread(ends), "longest_pause": spread(pauses)}


def _follow(text: "contextlib.AbstractContextManager[object] | object", ids: list[int], pauses: list[float]) -> None:
    before, pause = time.monotonic(), 0.0
    for chunk in text:  # type: ignore[attr-defined]
        now = time.monotonic()
        pause, before = max(pause, now - before), now
        ids += chunk.token_ids
    pauses.append(pause)


FIGURES: dict[str, tuple[str, Callable[[bool], Figures]]] = {
    "F3": ("recovery", recovery), "F4": ("honest rounds beside an attacker", attacked), "F6": ("handshake", handshakes),
    "F7": ("bytes, and F12 frame sizes", traffic), "F8": ("cancel to free", cancelling), "F9": ("drain", draining), "F10": ("revoke", revoking),
}  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs")
    p.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="F3", help="these figures")
    p.add_argument("--out", type=Path, help="append the JSON line to this file")
    args = p.parse_args()
    found: Figures = {}
    for name in args.only:
        title, measure = FIGURES[name]
        begun = time.monotonic()
        found[name] = measure(args.quick)
        print(f"{name} {title} ({time.monotonic() - begun:.0f} s)")
        for what, figure in found[name].items():  # type: ignore[attr-defined]
            print(f"    {what:28} {figure}", flush=True)
    line = json.dumps({"bench": "wire", "quick": args.quick, **machine(torch.get_num_threads()), **found})
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as f:
            print(line, file=f)
    print(line)


if __name__ == "__main__":
    sys.exit(main())
