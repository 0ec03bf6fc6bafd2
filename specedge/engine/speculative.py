"""SpeculativeEngine: draft and verify in one process, with the ids of the target alone.

It is the co-located form of the system, the baseline of every comparison, and the shortest program that shows how drafter and engine work together.
Knows nothing of sockets. Draft and target take turns here, so nothing grows while a verdict is in flight.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from specedge.config import DraftConfig, EngineConfig, SamplingParams, SpecedgeError
from specedge.engine.drafter import Drafter, Session
from specedge.engine.engine import Engine
from specedge.engine.request import Chunk, Completion, Output, Sequence, Verdict


class PairError(SpecedgeError):
    """A draft that does not speak the target's tokens."""


@dataclass(slots=True, eq=False)
class Text:
    """One text: its sequence in the engine, its session in the drafter (None: no room there), and what has come of it."""

    sequence: Sequence
    session: Session | None
    output: Output
    offered: int = 0  # nodes under verification
    chunks: list[Chunk] = field(default_factory=list)


class SpeculativeEngine:
    """`target` and `draft` are model directories, or an Engine and a Drafter that are loaded already, one of these for each SpeculativeEngine."""

    def __init__(
        self, target: str | Path | Engine, draft: str | Path | Drafter, config: DraftConfig | None = None, *,
        device: str | None = None, dtype: str | None = None, sizes: EngineConfig | None = None, progress: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(target, Engine):
            target = Engine.from_pretrained(target, device=device, dtype=dtype, sizes=sizes, progress=progress)
        if isinstance(draft, Drafter) and config is not None:
            raise ValueError("config is given, but the Drafter has its own already: leave one of them out")
        if not isinstance(draft, Drafter):
            draft = Drafter.from_pretrained(draft, config, device=device, dtype=dtype, progress=progress)
        self.engine, self.drafter = target, draft
        ours, theirs = self.engine.tokenizer, self.drafter.tokenizer
        if ours and theirs and ours.digest() != theirs.digest():
            raise PairError("draft and target have different tokenizers: a draft must share the target's vocabulary")
        self._texts: dict[Sequence, Text] = {}

    def generate(self, prompts: str | Iterable[str | list[int]], params: SamplingParams | None = None) -> list[Completion]:
        """Complete all prompts, batched; ids as Engine.generate gives them."""
        texts: list[Text] = []
        try:
            for p in [prompts] if isinstance(prompts, str) else prompts:
                texts.append(self._start(p, params or SamplingParams()))
            while any(t.output.completion is None for t in texts):
                self._round()
            return [t.output.completion for t in texts if t.output.completion is not None]
        finally:
            for t in texts:
                self._end(t)

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None) -> Generator[Chunk]:
        """Complete one prompt piece by piece; the last chunk holds the completion. Dropping the iterator cancels the text."""
        text = self._start(prompt, params or SamplingParams())
        try:
            while text.output.completion is None or text.chunks:
                if text.chunks:
                    yield text.chunks.pop(0)
                else:
                    self._round()
        finally:
            self._end(text)

    def _start(self, prompt: str | list[int], params: SamplingParams) -> Text:
        params, tokens = params.with_seed(), self.engine.encode(prompt)
        assert params.seed is not None
        output = Output(self.engine.tokenizer, len(tokens), params.seed, params.stop)
        sequence = self.engine.open(tokens, params)
        session = self.drafter.open(sequence.tokens, sequence.params, sequence.limit, sequence.stop, self.engine.vocab)
        if session is None:
            self.engine.run_until(sequence, sequence.limit)
        text = Text(sequence, session, output)
        self._texts[sequence] = text
        return text

    def _round(self) -> None:
        """Grow the trees that nobody waits for yet, offer them, verify them."""
        drafting = [t for t in self._texts.values() if t.session and t.sequence.tree is None]
        while any(t.session and not self.drafter.ready(t.session) for t in drafting) and self.drafter.grow():
            pass
        for text in drafting:
            assert text.session is not None
            tree = self.drafter.submit(text.session, self.drafter.config.tree_size)
            text.offered = len(tree)
            self.engine.offer(text.sequence, tree)
        for verdict in self.engine.step():
            if verdict.sequence in self._texts:  # else the engine's own caller gets it
                self._take(self._texts[verdict.sequence], verdict)

    def _take(self, text: Text, verdict: Verdict) -> None:
        s = text.output.speculation
        s = replace(s, rounds=s.rounds + 1, drafted=s.drafted + text.offered, accepted=s.accepted + len(verdict.path))
        if text.session is not None and not verdict.finish:
            hit = self.drafter.verdict(text.session, verdict.row, list(verdict.tokens))
            s = replace(s, hits=s.hits + hit, misses=s.misses + (not hit))
        text.output.speculation = s
        text.chunks.append(text.output.add((*verdict.path, *verdict.tokens), verdict.finish))
        if text.output.completion:
            self._end(text)

    def _end(self, text: Text) -> None:
        if self._texts.pop(text.sequence, None) is not None:
            self.engine.cancel(text.sequence)
            if text.session is not None:
                self.drafter.close(text.session)
