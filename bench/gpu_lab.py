"""What the sections of a GPU run share: the device, the time left, the record, and how a call is timed.

A time is that of one call inside a CUDA graph of several, events around each replay, median over replays: launch costs of Python stay out, gaps
between kernels stay in, as in the engine's steps. Inputs that a step reads from memory are rotated by the caller over at least three times the L2;
nothing is flushed. In a dry run the device is the CPU, sizes are tiny, every call runs once and times are made up.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu_log import Log
from specedge.config import brief

STUB_US = 10.0  # the time of everything in a dry run
Cell = Callable[[], dict[str, Any]]  # runs a cell and returns its results


class DeviceLost(Exception):
    """The device answers no more in this process: an error of a kernel stays until the process ends."""


class Lab:
    """A device that may be used until `end` (as `time.time()`), and the record of what was seen."""

    def __init__(self, log: Log, end: float, dry: bool) -> None:
        self.log, self.end, self.dry = log, end, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float16 if dry else torch.bfloat16  # Triton's interpreter multiplies no bfloat16
        self.l2 = 1024 if dry else torch.cuda.get_device_properties(0).L2_cache_size
        self.section = ""

    def left(self) -> float:
        """Seconds."""
        return self.end - time.time()

    def sync(self) -> None:
        """Wait for the device; raises what went wrong there."""
        if not self.dry:
            torch.cuda.synchronize()

    def each(self, section: str, cells: Mapping[str, Cell]) -> None:
        """Run the cells that were not begun before, in order, while there is time; an error of one costs it alone. DeviceLost: nothing will run."""
        self.section, late, begun = section, [], self.log.begun(section)
        for key, run in cells.items():
            if key in begun:
                continue
            if self.left() <= 0:
                late.append(key)
                continue
            self.log.write(section, begin=key)
            try:
                result = run()
                self.sync()
            except Exception as error:
                self.log.write(section, key=key, error=f"{type(error).__name__}: {brief(error)}")
                print(f"{section}: {key} failed: {type(error).__name__}: {brief(error)}", flush=True)
                try:
                    self.sync()
                except Exception as lost:
                    raise DeviceLost(brief(lost)) from None
            else:
                self.log.write(section, key=key, **result)
                print(f"{section}: {key}: {summary(result)}", flush=True)
        if late:
            self.log.write(section, skipped=late)
            print(f"{section}: no time was left for {len(late)} cells", flush=True)

    def us(self, call: Callable[[], object], calls: int = 8, seconds: float = 0.08) -> float:
        """Microseconds of one call, from graphs of `calls`."""
        call()
        if self.dry:
            return STUB_US
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    call()
            play: Callable[[], object] = graph.replay
        except RuntimeError as error:  # it waits for the device, or allocates outside of torch
            torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails may stay on its own
            torch.cuda.synchronize()
            self.log.write(self.section, note=f"a call that cannot be captured was timed with its launches: {brief(error)}")

            def play() -> None:
                for _ in range(calls):
                    call()

        return self._replays(play, seconds) / calls

    def _replays(self, play: Callable[[], object], seconds: float) -> float:
        for _ in range(2):
            play()
        torch.cuda.synchronize()
        times: list[float] = []
        stop = time.perf_counter() + seconds
        while len(times) < 5 or (time.perf_counter() < stop and len(times) < 200):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            play()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def copies(self, size: float, most: int = 96) -> int:
        """How many inputs of `size` bytes must take turns so that none is found in the L2."""
        return max(1, min(2 if self.dry else most, -(-3 * self.l2 // max(1, int(size)))))

    def rotated(self, call: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> float:
        """Microseconds of `call` over inputs that take turns."""
        turns = itertools.cycle(inputs)
        return self.us(lambda: call(next(turns)), max(4, len(inputs)))


def summary(result: dict[str, Any]) -> str:
    """The numbers of a result, on one line."""
    flat = {**result, **result.get("peers_us", {})}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in flat.items() if isinstance(v, float | int | str))[:300]


def distance(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; infinite where a value is missing."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    return error if error == error else float("inf")
