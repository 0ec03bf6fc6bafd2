"""One engine of a benchmark in a process of its own: it sleeps on a pipe while the others run.

Threads of one engine that spin or are pinned would slow the next on few cores; apart, and taking turns, none can. Knows of engines only
that they prepare and step (`bench.peers.Peer`).
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from bench.peers import Peer
from specedge.config import SpecedgeError

Case = tuple[str, int, int, int]  # kind, sequences, rows, context
CONTEXT = multiprocessing.get_context("spawn")


class Column:
    """The engine that `make` builds, with `threads` threads. ImportError: its package is missing; SpecedgeError: it did not start."""

    def __init__(self, name: str, make: Callable[[], Peer], threads: int) -> None:
        self.name = name
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs, make, threads), daemon=True)
        self._process.start()
        theirs.close()
        try:
            answer = self._pipe.recv()
        except EOFError:
            answer = SpecedgeError(self._end())
        if isinstance(answer, Exception):
            raise answer
        self.version: str = answer

    def turn(self, case: Case, seconds: float) -> float | str:
        """Median milliseconds of its steps in about `seconds`, the first only if it is alone; or a sentence that says why there is none."""
        try:
            self._pipe.send((case, seconds))
            answer: float | str = self._pipe.recv()
        except (EOFError, OSError):
            return self._end()
        return answer if isinstance(answer, float) else f"{self.name} cannot do {case}: {answer}"

    def _end(self) -> str:
        self._process.join()
        return f"{self.name} ended with code {self._process.exitcode} (-9: no memory left; name fewer columns)"


def _serve(pipe: Connection, make: Callable[[], Peer], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        peer = make()
    except Exception as error:
        pipe.send(error if isinstance(error, ImportError) else SpecedgeError(f"{type(error).__name__}: {error}"))
        return
    pipe.send(peer.version)
    before = None
    while True:
        try:
            case, seconds = pipe.recv()
        except EOFError:
            return
        try:
            if case != before:
                _turn(peer, case, 0)  # fills caches, grows buffers
            before = case
            pipe.send(_turn(peer, case, seconds))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _turn(peer: Peer, case: Case, seconds: float) -> float:
    def once() -> float:
        peer.prepare(*case)
        begun = time.perf_counter()
        peer.step(*case)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) * 1e3

    end = time.perf_counter() + seconds
    times = [once()]
    while time.perf_counter() < end:
        times.append(once())
    return statistics.median(times[1:] or times)
