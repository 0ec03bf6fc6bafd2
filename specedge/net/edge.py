"""Edge: drafts here, has the server verify, gives out the target's own text.

    edge = Edge("specedge://127.0.0.1:7000", "path/to/draft")
    edge.generate(["def fibonacci(n):"], SamplingParams(max_tokens=64))

One worker thread owns the link and the drafter; callers reach it through queues. It looks for verdicts between any two draft forwards,
submits every tree that is ready, and otherwise keeps growing, also while verdicts are in flight or the connection is lost. A text without a draft
session is decoded by the server alone and streamed, and so is, for a while, one whose drafts do not pay. What is said to the server about a text is
in rounds.py, how a server is reached in link.py.
Invariant: the edge owns its text; what the server says is checked against it before it is believed.
"""

import contextlib
import logging
import math
import queue
import socket
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import zmq

from specedge.config import DraftConfig, SamplingParams, SpecedgeError, is_batch
from specedge.engine.autopilot import FIRST, SMALL, Autopilot
from specedge.engine.cost import Law
from specedge.engine.drafter import Drafter, check_given
from specedge.engine.growing import Session
from specedge.engine.request import Chunk, Completion, Output
from specedge.engine.texts import UseError
from specedge.net import wire
from specedge.net.client import ServerError
from specedge.net.link import Link
from specedge.net.rounds import Rounds, Step
from specedge.text import Tokenizer
from specedge.tree import EMPTY, MAX_NODES

log = logging.getLogger(__name__)
READING = 4  # tokens that are left to the server at a time while a draft reads what has been written without it


@dataclass(slots=True, eq=False)
class Text:
    """One text. The caller's side is `inbox`; everything else belongs to the worker."""

    rounds: Rounds
    output: Output
    inbox: "queue.SimpleQueue[Chunk | SpecedgeError]" = field(default_factory=queue.SimpleQueue)
    session: Session | None = None
    heard: float | None = None  # when the last verdict came
    streaming: bool = False  # it was one of this round, in which others follow
    placed: bool = False  # it has been told of to a server: before, it waits here for one of the places that there are

    @property
    def id(self) -> bytes:
        return self.rounds.id

    @property
    def alone(self) -> bool:
        """Whether this round is one of those that the server writes by itself."""
        return self.rounds.until > 0


class Edge:
    """A link to `server`, or to one of several that serve the same model, and a draft model if one is given: a directory, a hub id at a
    `draft_revision`, or a loaded Drafter.

    `tokenizer`: a directory, or a Tokenizer; by default the draft's. Without either, prompts are lists of ids and texts are empty. `key`: a file
    that `specedge-edge keygen` made; servers whose address names their own key ask for it. Raises ServerError, AuthError, ModelError,
    TokenizerError or DeviceError, each one sentence, and UseError for a Drafter in use. Thread-safe. Close it, or use it as a context
    manager: that closes a draft that was loaded here, too; a Drafter that was given stays open, and may be given to another Edge from then on.
    """

    def __init__(
        self, server: str | Sequence[str], draft: str | Path | Drafter | None = None, *, tokenizer: str | Path | Tokenizer | None = None,
        key: str | Path | None = None, config: DraftConfig | None = None, device: str | None = None, dtype: str | None = None,
        draft_revision: str | None = None, progress: bool = False,
    ) -> None:  # fmt: skip
        check_given(draft, config=config, draft_revision=draft_revision)
        self._loaded: Drafter | None = None
        if isinstance(draft, str | Path):
            draft = self._loaded = Drafter.from_pretrained(
                draft, config, device=device, dtype=dtype, revision=draft_revision, progress=progress
            )  # fmt: skip
        if isinstance(tokenizer, str | Path):
            tokenizer = Tokenizer.from_dir(Path(tokenizer))
        self._drafter = draft
        self._pilot = Autopilot() if draft and draft.config.autopilot and draft.config.depth is None else None
        self.tokenizer = tokenizer or (draft.tokenizer if draft else None)
        if draft and draft.tokenizer and self.tokenizer and draft.tokenizer.digest() != self.tokenizer.digest():
            raise ServerError("the draft has another tokenizer than the one that was named: a draft must share the server's vocabulary")
        if draft and draft.closed:
            raise UseError("this Drafter is closed: load it again")
        self._servers, self._key = [server] if isinstance(server, str) else list(server), key
        self._commands: queue.SimpleQueue[tuple[Text, bool]] = queue.SimpleQueue()  # (text, begin or cancel)
        self._knock, self._door = socket.socketpair()  # wakes the worker's poll
        self._knock.setblocking(False)
        self._texts: dict[bytes, Text] = {}
        self._moved = 0.0  # when a text last got on
        self._greeted = 0.0  # when HELLO was last said because the server asked for it
        self._closing = False
        self._failure: SpecedgeError | None = None  # why the worker ended, unless it was told to
        started: queue.SimpleQueue[wire.Welcome | BaseException] = queue.SimpleQueue()
        lock = draft.lock if draft else threading.Lock()
        if not lock.acquire(blocking=False):
            raise UseError("this Drafter is in the hands of another Edge: close that one, or load a Drafter for each")
        self._worker = threading.Thread(target=self._run, args=(started, lock), name="specedge-edge", daemon=True)
        self._worker.start()
        answer = started.get()
        if isinstance(answer, BaseException):
            self._worker.join()
            raise answer
        self.welcome = answer

    # ------------------------------------------------------------------------------------------------------------------
    # the caller's side

    def generate(
        self, prompts: str | Iterable[str | list[int]], params: SamplingParams | None = None, *, priority: str = "interactive"
    ) -> list[Completion]:  # fmt: skip
        """Complete all prompts at once; ids, order and seeds of several completions as the target alone gives them (Engine.generate). `priority`:
        "batch" asks for no more than what the server's interactive texts leave of its time. Raises the first ServerError, and ValueError for
        another priority and for log-probabilities, which do not cross the network."""
        params = params or SamplingParams()
        texts: list[Text] = []
        try:
            for p in [prompts] if isinstance(prompts, str) else prompts:
                texts += [self._begin(p, each, priority) for each in params.each()]
            return [c.completion for t in texts for c in self._chunks(t) if c.completion]
        finally:
            for t in texts:
                self._tell(t, False)

    def stream(
        self, prompt: str | list[int], params: SamplingParams | None = None, *, priority: str = "interactive"
    ) -> Generator[Chunk]:  # fmt: skip
        """Complete one prompt piece by piece; the last chunk holds the completion. Dropping the iterator cancels the text. Errors as in `generate`,
        and ValueError if params.n is not 1."""
        text = self._begin(prompt, (params or SamplingParams()).single(), priority)
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

    def _begin(self, prompt: str | list[int], params: SamplingParams, priority: str) -> Text:
        batch = is_batch(priority)
        if params.logprobs is not None:
            raise ValueError(f"logprobs is {params.logprobs}, but must be None here: only token ids cross the network; ask an Engine for them")
        if not isinstance(prompt, str | list):
            raise ServerError(f"{str(prompt)[:60]!r} is no prompt: give a string or a list of token ids, and several of them as a list")
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
        w = self.welcome
        stop = sorted({*params.stop_ids, *(() if params.ignore_eos else w.eos_ids)})
        rounds = Rounds(list(prompt), len(prompt), params, stop, w.vocab, w.limits.max_nodes, time.monotonic(), batch)
        text = Text(rounds, Output(self.tokenizer, len(prompt), params))
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

    def _run(self, started: "queue.SimpleQueue[wire.Welcome | BaseException]", lock: threading.Lock) -> None:
        try:
            digest = self.tokenizer.digest() if self.tokenizer else b""
            self._link = Link(self._servers, digest, self._key, self._wake)
        except BaseException as e:
            lock.release()
            started.put(e)
            return
        self._expect(self._link.welcome)
        started.put(self._link.welcome)
        try:
            self._loop()
        except Exception as e:
            self._failure = e if isinstance(e, SpecedgeError) else ServerError(f"the edge failed: {type(e).__name__}: {e}")
            for text in list(self._texts.values()):
                text.inbox.put(self._failure)
        finally:
            self._closing = True
            for text in list(self._texts.values()):
                text.inbox.put(ServerError("this edge was closed"))
                self._end(text, wire.Cancel(text.id))
            self._link.close()
            self._knock.close()
            self._door.close()
            lock.release()

    def _loop(self) -> None:
        while not self._closing:
            self._take_commands()
            if self._link.arrived():
                self._expect(self._link.welcome)
                for text in self._texts.values():
                    text.rounds.connect(self._link.address, time.monotonic())
            for message, size in self._link.receive():
                self._handle(message, size)
            for text in self._places():
                with self._guarded(text):
                    if text.rounds.sent is None and self._ready(text):
                        self._submit(text)
                self._speak(text)  # only now: after a stall the verdict may have been waiting in the socket
                self._tell_growth(text)
            pause = self._drafter.pause() if self._drafter is not None else 60.0
            self._rest(pause or (0.0 if self._grow() else 60.0))

    def _expect(self, w: wire.Welcome) -> None:
        """Believe the server about what rows cost there, as long as no round has shown it."""
        if self._drafter is not None and w.pass_us:
            self._drafter.pace.verify.tell(Law(w.pass_us / 1e6, w.row_ns / 1e9, w.knee))

    def _places(self) -> list[Text]:
        """The texts that are spoken of: as many as the server takes of this account, the first that came."""
        texts = list(self._texts.values())[: max(1, self._link.welcome.limits.max_sessions)]
        for text in texts:
            if not text.placed:
                text.placed, text.rounds.heard = True, time.monotonic()
        return texts

    def _rest(self, seconds: float) -> None:
        """Wait for something to happen, or for the next moment at which a text has something to say."""
        if self._link.up:
            seconds = min([seconds, *(t.rounds.next - time.monotonic() for t in self._places())])
        elif self._texts:
            seconds = min(seconds, 1.0)  # patience may end
        poller = zmq.Poller()
        for socket_ in (self._door, *self._link.sockets()):
            poller.register(socket_, zmq.POLLIN)
        ready = dict(poller.poll(math.ceil(max(0.0, seconds) * 1000)))
        if self._door.fileno() in ready:
            self._door.recv(4096)

    def _grow(self) -> bool:
        """One draft forward, if there is something to draft; False: nothing has changed. A draft that fails is given up, and the server decodes
        alone: drafts are never in the way of a text."""
        try:
            return self._drafter is not None and self._drafter.grow(self._called)
        except Exception:
            log.exception("drafting failed; going on without drafts")
            for text in self._texts.values():
                self._leave(text)  # a Drafter that was given may serve another Edge
            self._drafter = None
            return True  # texts that waited for their trees are the server's now: 10 s would pass before they say anything else

    def _called(self) -> bool:
        """Whether a server or a caller has said something."""
        return self._link.pending or not self._commands.empty()

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
        """Begin to draft; the text is sent by `_speak`."""
        if not self._texts:  # the server forgets who was idle: greet again
            self._link.greet()
        self._texts[text.id] = text
        r = text.rounds
        if self._link.up:
            r.connect(self._link.address, time.monotonic())
        if self._drafter is not None and self._drafter.config.tree_size:
            with self._guarded(text):
                text.session = self._drafter.open(r.tokens, r.params, r.limit, frozenset(r.stop), r.vocab)
                self._steer(text)

    def _steer(self, text: Text) -> None:
        """Decide who writes on: draft and server together, or, while a round is no better than a step, the server alone."""
        if text.session is not None and self._drafter is not None:
            alone = self._alone(text) > 0
            if alone != text.session.asleep:
                self._drafter.sleep(text.session, alone)

    def _alone(self, text: Text) -> int:
        """Tokens to leave to the server; 0: draft."""
        if self._pilot is None:
            return 0
        return FIRST if text.rounds.budget == 0 else self._pilot.alone

    def _ready(self, text: Text) -> bool:
        """Whether the next round may begin: with a tree, or without, where nothing is drafted or the draft still has much to read."""
        if text.session is None or self._drafter is None:
            return True
        return text.rounds.budget == 0 or self._drafter.behind(text.session) or self._drafter.ready(text.session)

    def _submit(self, text: Text) -> None:
        """Begin the next round: the tree, or, where nothing is drafted, leave to decode alone."""
        tree, r, until = EMPTY, text.rounds, 0
        r.ahead = 0
        if text.session is not None and text.session.exhausted:
            self._leave(text)
        if text.session is None or self._drafter is None:
            until = r.limit
        elif text.session.asleep:
            until = len(r.tokens) + max(1, self._alone(text))
        elif self._drafter.behind(text.session):
            until = len(r.tokens) + READING
        else:
            most = SMALL if self._pilot is not None and self._pilot.on_trial else MAX_NODES
            tree = self._drafter.submit(text.session, self._drafter.size(text.session, min(most, r.budget)))
            if self._drafter.tells:
                r.ahead = min(most, self._drafter.config.tree_size)
        r.offer(tree, until, time.monotonic())
        text.streaming = False

    def _speak(self, text: Text) -> None:
        """Say what is due, and give up on a text that has not moved for too long."""
        now = time.monotonic()
        try:
            text.rounds.check_patience(now, self._link.why, self._moved)
        except ServerError as e:
            self._give_up(text, e)
            return
        if self._link.up:
            for message in text.rounds.speak(now, self._link.welcome.lease_ms / 1000):
                self._send(text, message)

    def _tell_growth(self, text: Text) -> None:
        """Say what has grown while a verdict is awaited, unless the text is better off without drafts: then the server has to come to an end."""
        if self._link.up and text.session is not None and self._drafter is not None and text.rounds.tells and not self._alone(text):
            with self._guarded(text):
                first, nodes = self._drafter.more(text.session)
                if nodes:
                    self._send(text, text.rounds.grown(first, nodes))

    def _handle(self, message: wire.Message, size: int) -> None:
        draining = isinstance(message, wire.GoAway) or (isinstance(message, wire.Error) and message.code == "draining")
        if draining and self._link.others:
            for session in self._texts:  # they go on elsewhere, and must not hold this server up
                self._link.send(wire.Cancel(session))
            self._link.lose(ServerError(f"{self._link.address} is going down"), elsewhere=True)
            return
        if isinstance(message, wire.Welcome):
            self._expect(message)
        text = self._texts.get(getattr(message, "session", b""))
        refused = isinstance(message, wire.Error) and (message.session == wire.NO_SESSION or (message.code == "key" and self._link.others))
        if isinstance(message, wire.Error) and refused:
            self._link.lose(ServerError(f"the server refuses: {message.text}", message.code))
            return
        if isinstance(message, wire.Busy) and message.session == wire.NO_SESSION:  # no place for this connection, so for none of its texts
            for text in self._places():
                text.rounds.take(message, time.monotonic())
            return
        if text is None:
            return  # of a text that has ended
        s = text.output.speculation
        text.output.speculation = replace(s, bytes_down=s.bytes_down + size)
        if isinstance(message, wire.Error) and message.code == "hello" and time.monotonic() - self._greeted >= 1:
            self._greeted = time.monotonic()  # a server that has no place for this connection says so each time, and counts
            self._link.greet()
        try:
            step = text.rounds.take(message, time.monotonic())
        except ServerError as e:
            self._give_up(text, e)
            return
        if step is not None:
            self._advance(text, step)

    def _advance(self, text: Text, step: Step) -> None:
        """Take what a verdict brought."""
        self._moved = time.monotonic()
        s = text.output.speculation
        s = replace(s, rounds=s.rounds + 1, drafted=s.drafted + step.nodes, accepted=s.accepted + step.accepted)
        if text.session is not None and self._drafter is not None and not step.finish:
            with self._guarded(text):
                hit = self._drafter.verdict(text.session, step.tokens, step.served, step.ahead, step.anew)
                if not text.alone:
                    s = replace(s, hits=s.hits + hit, misses=s.misses + (not hit))
                self._learn(text, step)
        text.output.speculation = s
        chunk = text.output.add(step.tokens, step.finish)
        text.inbox.put(chunk)
        if chunk.completion:  # perhaps before the server knows: stop strings are looked for here
            self._end(text, wire.Close(text.id))

    def _learn(self, text: Text, step: Step) -> None:
        """Tell the autopilot how fast this text goes on, and follow it where a round has ended."""
        assert text.session is not None and self._drafter is not None
        now, before = time.monotonic(), text.heard
        text.heard = now
        if self._pilot is not None and step.served is not None:  # else it was caught up with after a loss
            seconds = None if before is None else now - before
            if not text.alone:
                self._pilot.drafted(len(step.tokens), None if self._drafter.trying else seconds, step.served.seconds)
            elif text.session.asleep:  # else the draft reads, and verdicts wait for its forwards: these times say nothing
                self._pilot.streamed(len(step.tokens), seconds if text.streaming else None)
                text.streaming = True
        if text.rounds.sent is None:
            self._steer(text)

    def _send(self, text: Text, message: wire.Message) -> None:
        size = self._link.send(message)
        s = text.output.speculation
        text.output.speculation = replace(s, bytes_up=s.bytes_up + size)

    @contextlib.contextmanager
    def _guarded(self, text: Text) -> Iterator[None]:
        """Whatever fails in drafting one text costs that text its drafts: the server decodes it alone from here on, and others notice nothing."""
        try:
            yield
        except Exception:
            log.exception("drafting a text failed; it goes on without drafts")
            self._leave(text)
            self._wake()  # it may have waited for a tree

    def _leave(self, text: Text) -> None:
        """Draft for a text no more."""
        session, text.session = text.session, None
        if session is not None and self._drafter is not None:
            try:
                self._drafter.cancel(session)
            except Exception:
                log.exception("a draft session could not be ended")

    def _end(self, text: Text, last: wire.Message) -> None:
        """Forget a text here and on the server."""
        if self._texts.pop(text.id, None) is not None:
            self._leave(text)
            if text.rounds.known:
                self._send(text, last)

    def _give_up(self, text: Text, error: SpecedgeError) -> None:
        text.inbox.put(error)
        self._end(text, wire.Cancel(text.id))
