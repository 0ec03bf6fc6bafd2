"""AsyncEngine: the requests of many asyncio tasks, batched into the steps of one engine.

    async with AsyncEngine(engine) as served:
        async for chunk in served.stream("def fibonacci(n):", SamplingParams(max_tokens=64)): ...

One worker thread holds the engine from beginning to end; tasks, of one event loop or of several, reach it through a queue, and what comes of their
texts goes back through their loops. Knows nothing of rows or drafts. Invariant: a task that leaves, however it does, ends its text.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import Self

from specedge.config import SamplingParams, SpecedgeError
from specedge.engine.request import Chunk, Completion
from specedge.engine.texts import Text, TextEngine, UseError

log = logging.getLogger(__name__)


class StepError(SpecedgeError):
    """A step that failed, and with it every text that was in the making."""


@dataclass(slots=True, eq=False)
class Request:
    """One text on its way. The task's side is `inbox`, which requests may share; `text` belongs to the worker."""

    prompt: str | list[int]
    params: SamplingParams  # with a seed
    inbox: "Inbox"
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    text: Text | None = None


Inbox = asyncio.Queue[tuple[Request, Chunk | Exception]]


class AsyncEngine:
    """Serves the asyncio tasks of this process with an Engine or a SpeculativeEngine, which nobody else can use until `close` and which stays open
    then. Raises UseError if the engine is closed or in another thread's hands. Close it, or use it in an `async with`."""

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[tuple[Request, bool] | None] = queue.SimpleQueue()  # (request, begin or end); None: close
        self._closing = threading.RLock()  # nothing is put behind the None; a generator may be collected, and end its text, inside of it
        self._closed = False
        self._live: list[Request] = []
        started: queue.SimpleQueue[UseError | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._run, args=(started,), name="specedge-async", daemon=True)
        self._worker.start()
        if (refused := started.get()) is not None:
            raise refused

    # ------------------------------------------------------------------------------------------------------------------
    # the tasks' side

    async def generate(self, prompts: str | Iterable[str | list[int]], params: SamplingParams | None = None) -> list[Completion]:
        """Complete all prompts, with each other and with those of other tasks; order, seeds and errors as in Engine.generate. Raises StepError if a
        step fails, UseError once this is closed. A task that is cancelled ends its texts."""
        params = params or SamplingParams()
        inbox, requests, done = Inbox(), list[Request](), dict[Request, Completion]()
        try:
            for p in [prompts] if isinstance(prompts, str) else prompts:
                requests += [self._begin(p, each, inbox) for each in params.each()]
            while len(done) < len(requests):
                request, item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                if item.completion:
                    done[request] = item.completion
            return [done[r] for r in requests]
        finally:
            for r in requests:
                self._tell(r, False)

    async def stream(self, prompt: str | list[int], params: SamplingParams | None = None) -> AsyncGenerator[Chunk]:
        """Complete one prompt piece by piece; the last chunk holds the completion. Closing the generator, or cancelling the task, ends the text.
        Errors as in `generate`, and ValueError if params.n is not 1."""
        inbox = Inbox()
        request = self._begin(prompt, (params or SamplingParams()).single(), inbox)
        try:
            while True:
                _, item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.completion:
                    return
        finally:
            self._tell(request, False)

    async def close(self) -> None:
        """End what is in the making, each with a UseError, and give the engine back, open as it was. A second call does nothing."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        await asyncio.to_thread(self._worker.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _begin(self, prompt: str | list[int], params: SamplingParams, inbox: Inbox) -> Request:
        request = Request(prompt, params, inbox)
        if not self._tell(request, True):
            raise UseError("this AsyncEngine is closed: make another one over the engine")
        return request

    def _tell(self, request: Request, begin: bool) -> bool:
        """Queue a command for the worker; False: there is none any more."""
        with self._closing:
            if not self._closed:
                self._commands.put((request, begin))
            return not self._closed

    # ------------------------------------------------------------------------------------------------------------------
    # the worker

    def _run(self, started: "queue.SimpleQueue[UseError | None]") -> None:
        try:
            with self._engine.guard:
                started.put(None)
                while self._take():
                    self._advance()
        except UseError as e:
            started.put(e)

    def _take(self) -> bool:
        """Take the commands that have come, or wait for one if there is nothing else to do; False: it was the last."""
        while not self._live or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                self._fail(UseError("this AsyncEngine was closed before the text was finished"))
                return False
            request, begin = command
            if not begin:
                self._end(request)
                continue
            try:
                request.text = self._engine.begin(self._engine.encode(request.prompt), request.params)
                self._live.append(request)
            except Exception as e:  # of this request alone
                self._send(request, e)
        return True

    def _advance(self) -> None:
        """One step, and its chunks to their tasks."""
        try:
            self._engine.advance()
        except Exception as e:
            log.exception("a step failed; its texts are ended")
            self._fail(StepError(f"a step of the engine failed ({type(e).__name__}: {e}), and this text with it: ask again"))
        for request in list(self._live):
            text = request.text
            assert text is not None
            if text.output.completion:
                self._end(request)  # first: who has its last chunk finds nothing left behind
            for chunk in text.chunks:
                self._send(request, chunk)
            text.chunks.clear()

    def _fail(self, error: SpecedgeError) -> None:
        """End every text with an error of this kind, each task with one of its own: a traceback grows where it is raised."""
        failed = list(self._live)
        for request in failed:
            self._end(request)
        for request in failed:
            self._send(request, type(error)(*error.args))

    def _send(self, request: Request, item: Chunk | Exception) -> None:
        try:
            request.loop.call_soon_threadsafe(request.inbox.put_nowait, (request, item))
        except RuntimeError:  # its loop is closed, so nobody waits any more
            self._end(request)

    def _end(self, request: Request) -> None:
        if request in self._live:
            self._live.remove(request)
            assert request.text is not None
            self._engine.end(request.text)
