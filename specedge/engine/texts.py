"""Texts: completions and streams over an engine that advances many sequences at once.

Engine and SpeculativeEngine say how a text begins, how all of them advance and how one ends; what callers use is written here, once. Knows nothing
of rows, pages or drafts. Invariants: a text is ended whatever becomes of its caller, so nothing stays behind; one thread at a time gets in.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from threading import RLock
from typing import Concatenate, ParamSpec, Self, TypeVar

from tqdm import tqdm

from specedge.config import SamplingParams, SpecedgeError
from specedge.engine.request import Chunk, Completion, Output, Sequence, Verdict
from specedge.text import Tokenizer

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound="TextEngine")
BAR_AFTER = 1.0  # seconds after which prompts that are still being read get a bar


class RequestError(SpecedgeError, ValueError):
    """A request that this engine cannot serve: too long, outside the vocabulary, or without a prompt."""


class UseError(SpecedgeError, RuntimeError):
    """An engine that is closed, or that another thread is using."""


class Guard:
    """Lets one thread in at a time, as often as it likes, and nobody once it is closed: a sentence instead of corruption. `shared`: who is inside of
    that one is inside of both, but each is closed by itself."""

    def __init__(self, shared: "Guard | None" = None) -> None:
        self.closed = False
        self._room: Room = Room() if shared is None else shared._room

    def __enter__(self) -> None:
        if not self._room.lock.acquire(blocking=False):
            raise UseError("another thread is using this engine: let it finish, or share the engine through an AsyncEngine or a Server")
        if self.closed:
            self._room.lock.release()
            raise UseError("this engine is closed: load it again")

    def __exit__(self, *_: object) -> None:
        self._room.lock.release()

    def soon(self, action: Callable[[], None]) -> None:
        """Run `action` now if no other thread is inside and no step under way, else leave it to the next step: what must neither wait nor fail, as
        cancelling. A thread may ask in the middle of its own step, for Python collects a dropped stream wherever it likes."""
        if self._room.lock.acquire(blocking=False):
            try:
                if not self._room.steps:
                    return action()
            finally:
                self._room.lock.release()
        self._room.owed.append(action)

    @property
    def behind(self) -> bool:
        """Whether something was left to do."""
        return bool(self._room.owed)

    def catch_up(self) -> None:
        """Do what was left to do."""
        while self._room.owed:
            self._room.owed.popleft()()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Be inside, in a step: what is asked `soon` waits until it has ended."""
        with self:
            self._room.steps += 1
            try:
                yield
            finally:
                self._room.steps -= 1
                if not self._room.steps:
                    self.catch_up()


@dataclass(slots=True)
class Room:
    """What guards share: who is inside, in how many steps (of a SpeculativeEngine, and of the Engine in it), and what is put off meanwhile."""

    lock: RLock = field(default_factory=RLock)
    owed: deque[Callable[[], None]] = field(default_factory=deque)
    steps: int = 0


def alone(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """Have a method of an engine run under its guard."""

    @wraps(method)
    def guarded(self: E, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.guard:
            return method(self, *args, **kwargs)

    return guarded


@dataclass(slots=True, eq=False)
class Text:
    """One text in the making, and the chunks of it that nobody has taken yet."""

    sequence: Sequence
    output: Output
    chunks: list[Chunk] = field(default_factory=list)

    def take(self, verdict: Verdict) -> None:
        """Add what a step has found."""
        self.chunks.append(self.output.add(verdict.tokens, verdict.finish, verdict.logprobs))


class TextEngine(ABC):
    """What Engine and SpeculativeEngine have in common. Close it, or use it as a context manager."""

    tokenizer: Tokenizer | None
    guard: Guard  # held by the thread that uses the engine; who drives it for long holds it all the while

    @abstractmethod
    def begin(self, tokens: list[int], params: SamplingParams) -> Text:
        """Begin one text on the ids of a prompt. Raises RequestError if it can never be served."""

    @abstractmethod
    def advance(self) -> None:
        """One step of all texts; what comes of it stands in their chunks."""

    @abstractmethod
    def end(self, text: Text) -> None:
        """Forget a text, finished or not, and free what it holds."""

    @abstractmethod
    def close(self) -> None:
        """End every text and let go of pages and weights; whatever is called afterwards raises UseError. Raises it too if another thread uses the
        engine now. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Ids of a prompt, which may be ids already. Raises RequestError, and TokenizerError for a string that is not Unicode."""
        if not isinstance(prompt, str):
            if not isinstance(prompt, list) or not all(isinstance(i, int) for i in prompt):
                raise RequestError(f"{str(prompt)[:60]!r} is no prompt: give a string or a list of token ids, and several of them as a list")
            return prompt
        if self.tokenizer is None:
            raise RequestError("this engine has no tokenizer: give the prompt as token ids")
        return self.tokenizer.encode(prompt)

    def generate(
        self, prompts: str | Iterable[str | list[int]], params: SamplingParams | None = None, *, progress: bool = False
    ) -> list[Completion]:
        """Complete all prompts, batched; one string is one prompt. Completion i of prompt p stands at p * params.n + i, and its seed is the first
        one's plus i. `progress`: a bar on stderr while long prompts are read. Raises RequestError before anything runs if one of them cannot be
        served, UseError if the engine is closed or in another thread's hands."""
        params = params or SamplingParams()
        texts: list[Text] = []
        with self.guard:
            try:
                for tokens in [self.encode(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]:
                    texts += [self.begin(tokens, each) for each in params.each()]
                bar = Bar(texts, progress)
                while any(t.output.completion is None for t in texts):
                    self.advance()
                    bar.update()
                return [t.output.completion for t in texts if t.output.completion is not None]
            finally:
                for t in texts:
                    self.end(t)

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None, *, progress: bool = False) -> Generator[Chunk]:
        """Complete one prompt piece by piece; the last chunk holds the completion. Dropping the iterator cancels the text. Several streams of one
        engine may be mixed: a step of one advances all. Errors as in `generate`, and ValueError if params.n is not 1."""
        text = self.begin(self.encode(prompt), (params or SamplingParams()).single())
        bar = Bar([text], progress)
        try:
            while text.output.completion is None or text.chunks:
                if text.chunks:
                    yield text.chunks.pop(0)
                else:
                    self.advance()
                    bar.update()
        finally:
            self.end(text)


class Bar:
    """A bar on stderr: how many tokens of the prompts have been read. It comes after BAR_AFTER seconds, and goes when all have been."""

    def __init__(self, texts: list[Text], show: bool) -> None:
        self._sequences = [t.sequence for t in texts]
        self._total = sum(s.prompt_len for s in self._sequences)
        self._bar = tqdm(total=self._total, desc="reading", unit="token", disable=not show, leave=False, delay=BAR_AFTER)

    def update(self) -> None:
        """After a step."""
        if not self._bar.disable:
            read = sum(min(s.computed, s.prompt_len) for s in self._sequences)
            self._bar.update(max(0, read - self._bar.n))  # a preempted prompt is read again
            if read == self._total:
                self._bar.close()
