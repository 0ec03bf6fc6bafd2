"""Edge: drafts here, has the server verify, gives out the target's own text.

    edge = Edge("specedge://127.0.0.1:7000", "path/to/draft")
    edge.generate(["def fibonacci(n):"], SamplingParams(max_tokens=64))

One worker thread owns the socket and the drafter; callers reach it through queues. It looks for verdicts between any two draft forwards,
submits every tree that is ready, and otherwise keeps growing, also while verdicts are in flight. A text without a draft session is decoded
by the server alone and streamed. Invariant: the edge owns its text; what the server says is checked against it before it is believed.
"""

import contextlib
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import zmq

from specedge.config import DraftConfig, SamplingParams, SpecedgeError
from specedge.engine.drafter import Drafter, Session
from specedge.engine.request import Chunk, Completion, Output
from specedge.net import wire
from specedge.net.client import Connection, ServerError
from specedge.net.sampling import pack_sampling
from specedge.text import Tokenizer
from specedge.tree import EMPTY, TokenTree

log = logging.getLogger(__name__)
RESEND = 3.0  # seconds without a verdict after which a round is sent again; servers answer a repeated round as they did before
PATIENCE = 60.0  # seconds without a word about a text after which it fails


@dataclass(slots=True, eq=False)
class Text:
    """One text. The caller's side is `inbox`; everything else belongs to the worker."""

    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    output: Output
    inbox: "queue.SimpleQueue[Chunk | SpecedgeError]" = field(default_factory=queue.SimpleQueue)
    id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    session: Session | None = None
    round: int = 0
    sent: TokenTree | None = None  # awaits its verdict
    alone: bool = False  # the server decodes by itself and streams
    budget: int = 0  # nodes that the server wants at most
    heard: float = 0.0
    resend: float = 0.0


class Edge:
    """A connection to `server`, and a draft model if one is given: a directory, or a loaded Drafter.

    `tokenizer`: a directory, or a Tokenizer; by default the draft's. Without either, prompts are lists of ids and texts are empty. `key`: a file
    that `specedge-edge keygen` made; servers whose address names their own key ask for it. Raises ServerError, AuthError, ModelError,
    TokenizerError or DeviceError, each one sentence. Thread-safe. Close it, or use it as a context manager: that closes a draft that was loaded
    here, too; a Drafter that was given stays open.
    """

    def __init__(
        self, server: str, draft: str | Path | Drafter | None = None, *, tokenizer: str | Path | Tokenizer | None = None,
        key: str | Path | None = None, config: DraftConfig | None = None, device: str | None = None, dtype: str | None = None,
        progress: bool = False,
    ) -> None:  # fmt: skip
        if isinstance(draft, Drafter) and config is not None:
            raise ValueError("config is given, but the Drafter has its own already: leave one of them out")
        self._loaded: Drafter | None = None
        if isinstance(draft, str | Path):
            draft = self._loaded = Drafter.from_pretrained(draft, config, device=device, dtype=dtype, progress=progress)
        if isinstance(tokenizer, str | Path):
            tokenizer = Tokenizer.from_dir(Path(tokenizer))
        self._drafter = draft
        self.tokenizer = tokenizer or (draft.tokenizer if draft else None)
        if draft and draft.tokenizer and self.tokenizer and draft.tokenizer.digest() != self.tokenizer.digest():
            raise ServerError("the draft has another tokenizer than the one that was named: a draft must share the server's vocabulary")
        self._address, self._key = server, key
        self._commands: queue.SimpleQueue[tuple[Text, bool]] = queue.SimpleQueue()  # (text, begin or cancel)
        self._knock, self._door = socket.socketpair()  # wakes the worker's poll
        self._knock.setblocking(False)
        self._texts: dict[bytes, Text] = {}
        self._closing = False
        self._failure: SpecedgeError | None = None  # why the worker ended, unless it was told to
        started: queue.SimpleQueue[wire.Welcome | BaseException] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._run, args=(started,), name="specedge-edge", daemon=True)
        self._worker.start()
        answer = started.get()
        if isinstance(answer, BaseException):
            self._worker.join()
            raise answer
        self.welcome = answer

    # ------------------------------------------------------------------------------------------------------------------
    # the caller's side

    def generate(self, prompts: str | Iterable[str | list[int]], params: SamplingParams | None = None) -> list[Completion]:
        """Complete all prompts at once; ids, order and seeds of several completions as the target alone gives them (Engine.generate). Raises the
        first ServerError, and ValueError for log-probabilities, which do not cross the network."""
        params = params or SamplingParams()
        texts: list[Text] = []
        try:
            for p in [prompts] if isinstance(prompts, str) else prompts:
                texts += [self._begin(p, each) for each in params.each()]
            return [c.completion for t in texts for c in self._chunks(t) if c.completion]
        finally:
            for t in texts:
                self._tell(t, False)

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None) -> Generator[Chunk]:
        """Complete one prompt piece by piece; the last chunk holds the completion. Dropping the iterator cancels the text. Errors as in `generate`,
        and ValueError if params.n is not 1."""
        text = self._begin(prompt, (params or SamplingParams()).single())
        try:
            yield from self._chunks(text)
        finally:
            self._tell(text, False)

    def close(self) -> None:
        """Cancel what is in the making, disconnect, and let go of a draft that was loaded here; use raises ServerError from then on."""
        self._closing = True
        self._wake()
        self._worker.join()
        if self._loaded is not None:
            self._loaded.close()

    def __enter__(self) -> "Edge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, prompt: str | list[int], params: SamplingParams) -> Text:
        if params.logprobs is not None:
            raise ValueError(f"logprobs is {params.logprobs}, but must be None here: only token ids cross the network; ask an Engine for them")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ServerError("there is no tokenizer here: name a draft, or a tokenizer, or give the prompt as token ids")
            prompt = self.tokenizer.encode(prompt)
        if not prompt:
            raise ServerError("the prompt holds no tokens, at least one is needed")
        if not all(isinstance(i, int) and 0 <= i < 2**32 for i in prompt):
            raise ServerError("the prompt holds something that is no token id")
        if self._closing:
            raise self._failure or ServerError("this edge is closed")
        assert params.seed is not None
        text = Text(list(prompt), len(prompt), params, Output(self.tokenizer, len(prompt), params.seed, params.stop))
        self._tell(text, True)
        return text

    def _chunks(self, text: Text) -> Iterator[Chunk]:
        while True:
            try:
                item = text.inbox.get(timeout=1.0)
            except queue.Empty:
                if not self._worker.is_alive() and text.inbox.empty():  # in this order: its last word may have come since
                    raise ServerError("this edge is closed") from None
                continue
            if isinstance(item, SpecedgeError):
                raise item
            yield item
            if item.completion:
                return

    def _tell(self, text: Text, begin: bool) -> None:
        self._commands.put((text, begin))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # a full pipe will wake it as well, a closed one has nobody to wake
            self._knock.send(b"\0")

    # ------------------------------------------------------------------------------------------------------------------
    # the worker

    def _run(self, started: "queue.SimpleQueue[wire.Welcome | BaseException]") -> None:
        digest = self.tokenizer.digest() if self.tokenizer else b""
        try:
            self._connection = Connection(self._address, digest, self._key)
        except BaseException as e:
            started.put(e)
            return
        started.put(self._connection.welcome)
        try:
            self._loop()
        except Exception as e:
            self._failure = e if isinstance(e, SpecedgeError) else ServerError(f"the edge failed: {type(e).__name__}: {e}")
            for text in list(self._texts.values()):
                self._fail(text, self._failure)
        finally:
            self._closing = True
            with contextlib.suppress(ServerError):
                for text in list(self._texts.values()):
                    text.inbox.put(ServerError("this edge was closed"))
                    self._end(text, wire.Cancel(text.id))
            self._connection.close()
            self._knock.close()
            self._door.close()

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._connection.socket, zmq.POLLIN)
        poller.register(self._door, zmq.POLLIN)
        while not self._closing:
            self._take_commands()
            for message, size in self._connection.receive():
                self._handle(message, size)
            self._chase()  # only now: after a stall the verdict may have been waiting in the socket
            for text in list(self._texts.values()):
                if text.sent is None and (text.session is None or (self._drafter and self._drafter.ready(text.session))):
                    self._submit(text)
            grew = self._grow()
            ready = dict(poller.poll(0 if grew else self._patience()))
            if self._door.fileno() in ready:
                self._door.recv(4096)

    def _grow(self) -> bool:
        """One draft forward, if there is something to draft. A draft that fails is given up, and the server decodes alone: drafts are never in the
        way of a text."""
        try:
            return self._drafter is not None and self._drafter.grow()
        except Exception:
            log.exception("drafting failed; going on without drafts")
            for text in self._texts.values():
                text.session = None
            self._drafter = None
            return False

    def _take_commands(self) -> None:
        while True:
            try:
                text, begin = self._commands.get_nowait()
            except queue.Empty:
                return
            if begin:
                self._open(text)
            elif text.id in self._texts:
                self._end(text, wire.Cancel(text.id))

    def _open(self, text: Text) -> None:
        """Send the whole prompt, and begin to draft."""
        w, p = self._connection.welcome, text.params
        stop = sorted({*p.stop_ids, *(() if p.ignore_eos else w.eos_ids)})
        assert p.seed is not None
        first = wire.Open(
            text.id, wire.pack_ids(text.tokens[: wire.FIRST]), len(text.tokens), text.prompt_len, pack_sampling(p), stop, p.max_tokens
        )
        if not self._texts:  # the server forgets who was idle, and ZeroMQ reconnects in silence: greet again
            self._connection.greet()
        self._texts[text.id] = text
        self._send(text, first)
        for at in range(wire.FIRST, len(text.tokens), wire.CHUNK):
            self._send(text, wire.Prompt(text.id, at, wire.pack_ids(text.tokens[at : at + wire.CHUNK])))
        text.budget = w.limits.max_nodes
        if self._drafter is not None and self._drafter.config.tree_size:
            text.session = self._drafter.open(text.tokens, p, text.prompt_len + p.max_tokens, frozenset(stop), w.vocab)

    def _submit(self, text: Text) -> None:
        """Send the next round: the tree, or, where nothing can be drafted any more, leave to decode alone."""
        tree = EMPTY
        if text.session is not None and self._drafter is not None:
            if text.session.exhausted:
                self._drafter.cancel(text.session)
                text.session = None
            else:
                tree = self._drafter.submit(text.session, min(self._drafter.config.tree_size, text.budget))
        text.alone = text.session is None
        text.round, text.sent, text.heard = text.round + 1, tree, time.monotonic()
        self._send_round(text)

    def _send_round(self, text: Text) -> None:
        assert text.sent is not None
        until = text.prompt_len + text.params.max_tokens if text.alone else 0
        tree = text.sent
        text.resend = time.monotonic() + RESEND
        self._send(text, wire.Draft(text.id, text.round, len(text.tokens), wire.pack_ids(tree.tokens), tree.parents.tobytes(), until))

    def _handle(self, message: wire.Message, size: int) -> None:
        text = self._texts.get(getattr(message, "session", b""))
        if text is None:
            if isinstance(message, wire.Welcome) and message.model != self._connection.welcome.model:
                raise ServerError(f"{self._connection.address} serves another model than before: connect again")
            if isinstance(message, wire.Error) and message.session == wire.NO_SESSION:
                raise ServerError(f"the server refuses: {message.text}", message.code)
            return  # of a text that has ended
        text.heard = time.monotonic()
        text.resend = text.heard + RESEND
        s = text.output.speculation
        text.output.speculation = replace(s, bytes_down=s.bytes_down + size)
        if isinstance(message, wire.Verdict):
            self._verdict(text, message)
        elif isinstance(message, wire.Error):
            self._give_up(text, ServerError(f"the server refuses: {message.text}", message.code))

    def _verdict(self, text: Text, m: wire.Verdict) -> None:
        """Check a verdict against the text and the tree, and take what is new of it."""
        known = len(text.tokens)
        if text.sent is None or m.round != text.round or m.base != known:
            return  # of a round that is answered, or a gap, which the next resend closes
        if not (m.row or m.tokens or m.finish):
            return  # nothing new yet: the server lives, and has the round
        try:
            tokens = wire.unpack_ids(m.tokens).tolist()
            path = [int(text.sent.tokens[r - 1]) for r in text.sent.path(m.row)]
        except (wire.WireError, IndexError):
            tokens, path = [], []
        if not tokens or max(tokens) >= self._connection.welcome.vocab or known + len(path) + len(tokens) > text.prompt_len + text.params.max_tokens:
            self._give_up(text, ServerError("the server sent a verdict that does not continue this text"))
            return
        s = text.output.speculation
        s = replace(s, rounds=s.rounds + 1, drafted=s.drafted + len(text.sent), accepted=s.accepted + len(path))
        if text.session is not None and self._drafter is not None and not m.finish:
            hit = self._drafter.verdict(text.session, m.row, tokens)
            s = replace(s, hits=s.hits + hit, misses=s.misses + (not hit))
        text.output.speculation = s
        text.budget = m.row_budget
        text.tokens += path + tokens
        text.sent = EMPTY if text.alone else None
        chunk = text.output.add(path + tokens, wire.FINISH[m.finish])
        text.inbox.put(chunk)
        if chunk.completion:  # perhaps before the server knows: stop strings are looked for here
            self._end(text, wire.Close(text.id))

    def _send(self, text: Text, message: wire.Message) -> None:
        size = self._connection.send(message)
        s = text.output.speculation
        text.output.speculation = replace(s, bytes_up=s.bytes_up + size)

    def _end(self, text: Text, last: wire.Message) -> None:
        """Forget a text here and on the server."""
        if self._texts.pop(text.id, None) is not None:
            if text.session is not None and self._drafter is not None:
                self._drafter.cancel(text.session)
            self._send(text, last)

    def _fail(self, text: Text, error: SpecedgeError) -> None:
        """End a text that the server holds no more, or that it cannot be told of."""
        text.inbox.put(error)
        if self._texts.pop(text.id, None) is not None and text.session is not None and self._drafter is not None:
            self._drafter.cancel(text.session)

    def _give_up(self, text: Text, error: SpecedgeError) -> None:
        """End a text that the server may still hold."""
        text.inbox.put(error)
        self._end(text, wire.Cancel(text.id))

    def _patience(self) -> int:
        """Milliseconds until the next round may have to be sent again."""
        flying = [t.resend for t in self._texts.values() if t.sent is not None]
        return max(0, int((min(flying) - time.monotonic()) * 1000) + 1) if flying else 60_000

    def _chase(self) -> None:
        """Send rounds again that nobody answers, and give up on those that stay unanswered."""
        now = time.monotonic()
        for text in list(self._texts.values()):
            if text.sent is None or now < text.resend:
                continue
            if now - text.heard > PATIENCE:
                at = self._connection.address
                self._give_up(text, ServerError(f"{at} has not answered for {PATIENCE:.0f} s: check the network and the server"))
            else:
                self._send_round(text)

