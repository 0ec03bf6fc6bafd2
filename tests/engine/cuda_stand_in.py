"""Enough of torch.cuda to run graphs.py on a CPU as it runs on a GPU: pinned buffers, events, capture and replay.

A captured graph is the last program that ran inside its capture; a replay runs that again and writes its results where the captured ones lie, as a
GPU does. Order is checked: nothing may be fetched without a wait, and a host buffer that is being copied may not be packed again.
"""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch


class Event:
    """Knows whether it was waited for since it was recorded."""

    recorded, waited = 0, 0

    def record(self) -> None:
        self.recorded += 1

    def synchronize(self) -> None:
        self.waited = self.recorded


class Graph:
    """`again`: runs the captured program; set by `StandIn.graph`."""

    def __init__(self) -> None:
        self.again: Any = None
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for there, new in zip(self.outputs, self.again(), strict=True):
            there.copy_(new)


class StandIn:
    """Takes the place of the module torch in graphs.py."""

    def __init__(self, room: int = 10**9, error: Exception | None = None) -> None:
        """`room`: graphs that can be captured before there is an `error`."""
        self.captured: list[Graph] = []
        self.events: list[Event] = []
        self.streams = 0
        self._room, self._error = room, error
        self.last: Any = None  # what ran last: a function and its results
        self._side = stream = SimpleNamespace(wait_stream=lambda _: None)
        self.cuda = SimpleNamespace(
            Event=self._event, CUDAGraph=Graph, graph=self.graph, graph_pool_handle=lambda: 1, Stream=self._made,
            current_stream=lambda _=None: stream, stream=self._stream,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, pin_memory: bool = False, device: Any = None, **more: Any) -> torch.Tensor:
        return torch.zeros(*size, **more)

    def empty(self, *size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        assert pin_memory, "a copy to memory that is not pinned waits"
        return torch.empty(*size, **more)

    def _event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def _made(self, _: Any) -> Any:
        self.streams += 1
        return self._side

    @contextmanager
    def _stream(self, _: Any) -> Any:
        yield

    @contextmanager
    def graph(self, graph: Graph, pool: Any) -> Any:
        assert pool == 1, "all graphs share one pool"
        if len(self.captured) >= self._room and self._error:
            raise self._error
        yield
        graph.again, graph.outputs = self.last
        self.captured.append(graph)
