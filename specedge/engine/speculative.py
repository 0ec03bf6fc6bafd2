"""SpeculativeEngine: draft and verify in one process, with the ids of the target alone.

It is the co-located form of the system, the baseline of every comparison, and the shortest program that shows how drafter and engine work together.
Knows nothing of sockets. Draft and target take turns here, so nothing grows while a verdict is in flight.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from specedge.config import DraftConfig, EngineConfig, SamplingParams, SpecedgeError
from specedge.engine.drafter import Drafter, check_given
from specedge.engine.engine import Engine
from specedge.engine.growing import Session
from specedge.engine.pace import Served
from specedge.engine.request import Output, Sequence, Verdict
from specedge.engine.texts import Guard, Text, TextEngine, UseError, alone


class PairError(SpecedgeError):
    """A draft that does not speak the target's tokens."""


@dataclass(slots=True, eq=False)
class DraftedText(Text):
    """A text and its session in the drafter (None: no room there)."""

    session: Session | None = None
    offered: int = 0  # nodes under verification


class SpeculativeEngine(TextEngine):
    """`target` and `draft` are model directories or hub ids, at a `revision` and a `draft_revision`, or an Engine and a Drafter that are loaded
    already, one of these for each SpeculativeEngine.

    Raises HubError, ModelError, TokenizerError or DeviceError, each one sentence, and PairError for a draft that does not fit. Close it, or use it as
    a context manager: that closes what it has loaded itself; what was given stays open.
    """

    def __init__(
        self, target: str | Path | Engine, draft: str | Path | Drafter, config: DraftConfig | None = None, *,
        device: str | None = None, dtype: str | None = None, sizes: EngineConfig | None = None, revision: str | None = None,
        draft_revision: str | None = None, progress: bool = False,
    ) -> None:  # fmt: skip
        if isinstance(target, Engine) and revision is not None:
            raise ValueError("revision is given, but the Engine is loaded already: leave one of them out")
        check_given(draft, config=config, draft_revision=draft_revision)
        self._loaded: list[Engine | Drafter] = []
        if not isinstance(target, Engine):
            target = Engine.from_pretrained(target, device=device, dtype=dtype, sizes=sizes, revision=revision, progress=progress)
            self._loaded.append(target)
        if not isinstance(draft, Drafter):
            draft = Drafter.from_pretrained(draft, config, device=device, dtype=dtype, revision=draft_revision, progress=progress)
            self._loaded.append(draft)
        self.engine, self.drafter, self.tokenizer = target, draft, target.tokenizer
        ours, theirs = target.tokenizer, draft.tokenizer
        if ours and theirs and ours.digest() != theirs.digest():
            raise PairError("draft and target have different tokenizers: a draft must share the target's vocabulary")
        self._texts: dict[Sequence, DraftedText] = {}
        self.guard = Guard(target.guard)  # who holds it holds the target's

    @alone
    def begin(self, tokens: list[int], params: SamplingParams) -> Text:
        """Begin one text, with a session in the drafter if there is room. Raises RequestError if it can never be served."""
        self._check_drafter()
        params = params.with_seed()
        output = Output(self.tokenizer, len(tokens), params)
        sequence = self.engine.open(tokens, params)
        session = self.drafter.open(sequence.tokens, sequence.params, sequence.limit, sequence.stop, self.engine.vocab)
        if session is None:
            self.engine.run_until(sequence, sequence.limit)
        text = self._texts[sequence] = DraftedText(sequence, output, session=session)
        return text

    def _check_drafter(self) -> None:
        if self.drafter.closed:
            raise UseError("the drafter of this engine is closed: load it again")

    def advance(self) -> None:
        """Grow the trees that nobody waits for yet, offer them, verify them."""
        with self.guard.step():
            self._check_drafter()
            self._advance()

    def _advance(self) -> None:
        drafting = [(t, t.session) for t in self._texts.values() if t.session and t.sequence.tree is None]
        for text, session in drafting:
            unwanted = text.sequence.acceptance.budget == 0
            if unwanted != session.asleep:
                self.drafter.sleep(session, unwanted)
        while not self.drafter.ready(*(session for _, session in drafting)) and self.drafter.grow():
            pass
        for text, session in drafting:
            tree = self.drafter.submit(session, self.drafter.size(session, text.sequence.acceptance.budget))
            text.offered = len(tree)
            self.engine.offer(text.sequence, tree)
        self.engine.make_room()
        begun = time.perf_counter()
        verdicts = self.engine.step()
        seconds, rows = time.perf_counter() - begun, self.engine.rows
        for verdict in verdicts:
            if verdict.sequence in self._texts:  # else the engine's own caller gets it
                self._take(self._texts[verdict.sequence], verdict, Served(seconds, rows, rows - verdict.verified))

    def _take(self, text: DraftedText, verdict: Verdict, served: Served) -> None:
        s = text.output.speculation
        s = replace(s, rounds=s.rounds + 1, drafted=s.drafted + text.offered, accepted=s.accepted + len(verdict.tokens) - 1)
        if text.session is not None and not verdict.finish:
            hit = self.drafter.verdict(text.session, list(verdict.tokens), served)
            s = replace(s, hits=s.hits + hit, misses=s.misses + (not hit))
        text.output.speculation = s
        text.take(verdict)
        if text.output.completion:
            self._end(text)

    def end(self, text: Text) -> None:
        """Forget a text, finished or not, and free what it holds. Any thread may."""
        self.guard.soon(lambda: self._end(text))

    def _end(self, text: Text) -> None:
        known = self._texts.pop(text.sequence, None)
        if known is not None:
            self.engine.cancel(known.sequence)
            if known.session is not None:
                self.drafter.cancel(known.session)

    def close(self) -> None:
        """End every text and close the models that were loaded here; `begin` raises UseError from then on. Raises it itself while another thread uses
        the engine. A second call does nothing."""
        if not self.guard.closed:
            with self.guard:
                for text in list(self._texts.values()):
                    self._end(text)
                self.guard.closed = True
            for model in self._loaded:
                model.close()
