"""Engine: the target model serving many sequences; `step` is the program.

    engine = Engine.from_pretrained("path/to/model")
    engine.generate(["def fibonacci(n):"], SamplingParams(max_tokens=64))

A sequence is opened with its tokens, then driven by trees (`offer`) or by itself (`run_until`); every step verifies what is ready and computes
prompts beside it. Knows nothing of draft models or sockets. One thread at a time may use it, which a guard sees to; `cancel` alone may come from
any. Invariant: the text of a sequence is a function of model, tokens, parameters and seed alone.
"""

import time
from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path

from specedge.config import EngineConfig, SamplingParams, is_batch
from specedge.engine.admission import Admission
from specedge.engine.batch import BatchBuilder
from specedge.engine.cost import ALL, CostModel
from specedge.engine.graphs import make_verifier
from specedge.engine.hub import locate
from specedge.engine.line import Line
from specedge.engine.pages import PagePool
from specedge.engine.pipeline import Turn
from specedge.engine.request import Account, Output, Sequence, Verdict
from specedge.engine.runner import Runner
from specedge.engine.scheduler import LEAST, Grant, Want, owed_to_prompts, schedule, turns
from specedge.engine.texts import Guard, RequestError, Text, TextEngine, alone
from specedge.engine.verify import Found, Job
from specedge.text import Tokenizer
from specedge.tree import EMPTY, TokenTree


class Engine(TextEngine):
    """A runner and the sequences that share it. `eos_ids` end a text unless its parameters say otherwise. `cost` is what it has learned of the time
    of its steps. Close it, or use it in a `with`."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None = None, eos_ids: tuple[int, ...] = ()) -> None:
        self.runner, self.tokenizer, self.eos_ids = runner, tokenizer, eos_ids
        self.vocab = runner.model.config.vocab
        self.pool = PagePool(runner.sizes.pages, runner.sizes.page_size)
        # on a GPU many rows are nearly free: an H200 has its balance at 183 rows, smaller ones at 64 or more
        self.cost = CostModel() if runner.device.type == "cpu" else CostModel(share=1 / 128, knee=64)
        self.admission = Admission(self.cost)
        self._verify = make_verifier(runner, tokenizer.size if tokenizer else self.vocab)
        self.line = Line(self.pool, runner.sizes.max_sequences)
        self.rows = 0  # of the last step
        self._waited = True  # for the last step, when it ended
        self._stepped = (0.0, 0.0)  # when the last step that counts for the rhythm began and ended; zeros: nobody has been here since
        self._everybody = Account()  # pays where nobody is named
        self._credit: dict[Hashable, float] = {}  # the scheduler's: rows that accounts are owed
        self._texts: dict[Sequence, Text] = {}
        self.guard = Guard()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | None = None, dtype: str | None = None, sizes: EngineConfig | None = None,
        revision: str | None = None, progress: bool = False,
    ) -> "Engine":  # fmt: skip
        """Load a Hugging Face model directory, or a hub id at a `revision`. Device: cuda or cpu, the first there is; dtype: float32, bfloat16,
        float16, or int8, int4 (weights alone), by default float32 on a CPU and bfloat16 on CUDA. Raises HubError, ModelError, TokenizerError or
        DeviceError, each one sentence."""
        sizes, path = sizes or EngineConfig(), locate(path, revision)
        runner = Runner.load(path, sizes, sizes.max_rows, device, dtype, progress)
        return cls(runner, Tokenizer.from_dir(path, runner.model.config.vocab), runner.model.config.eos_ids)

    # ------------------------------------------------------------------------------------------------------------------
    # sequences

    @alone
    def open(
        self, tokens: list[int], params: SamplingParams, prompt_len: int | None = None, stop: frozenset[int] | None = None,
        account: Account | None = None, priority: str = "interactive",
    ) -> Sequence:  # fmt: skip
        """A sequence of known tokens whose first `prompt_len` (all, if None) are the prompt. Its K/V is computed from the next step on.

        `stop`: the ids that end it, in place of eos_ids and params.stop_ids. `account`: who pays for it, and shares its pages. `priority`: a batch
        sequence has rows that cost interactive ones nothing, and is the first to be preempted. Raises RequestError if it can never be served.
        """
        if not tokens:
            raise RequestError("the prompt holds no tokens, at least one is needed")
        if min(tokens) < 0 or max(tokens) >= self.vocab:
            raise RequestError(f"token {max(tokens) if min(tokens) >= 0 else min(tokens)} is outside the vocabulary of {self.vocab}")
        if any(i >= self.vocab for i, _ in params.logit_bias):
            raise RequestError(f"logit_bias names token {max(i for i, _ in params.logit_bias)}, outside the vocabulary of {self.vocab}")
        if stop is None:
            stop = frozenset(params.stop_ids if params.ignore_eos else (*params.stop_ids, *self.eos_ids))
        prompt_len = len(tokens) if prompt_len is None else prompt_len
        sequence = Sequence(list(tokens), prompt_len, params.with_seed(), stop, account or self._everybody, is_batch(priority))
        if sequence.limit > self.runner.context:
            asked = f"{sequence.prompt_len} prompt tokens and max_tokens {params.max_tokens}"
            raise RequestError(f"{asked} exceed the context of {self.runner.context}: shorten one of them")
        if not 0 < sequence.prompt_len <= len(tokens) < sequence.limit:
            raise RequestError(f"{len(tokens)} known tokens do not lie between the prompt of {sequence.prompt_len} and the limit of {sequence.limit}")
        self.line.join(sequence, time.monotonic())
        return sequence

    @alone
    def offer(self, sequence: Sequence, tree: TokenTree, at: float | None = None) -> None:
        """Have `tree` verified below the root of `sequence` in one of the next steps, in place of one that was not yet. `at`: when it came
        (time.monotonic), if not now. Raises TreeError if it is no tree over the vocabulary."""
        tree.check(self.vocab)
        if sequence.tree is None:
            sequence.offered = time.monotonic() if at is None else at
            if sequence.answered:
                gap = max(0.0, sequence.offered - sequence.answered)
                self.admission.returned(gap)
                sequence.rhythm.returned(gap)
        sequence.tree = tree

    @alone
    def run_until(self, sequence: Sequence, length: int) -> None:
        """Decode alone while the text is shorter than `length` tokens, prompt included; 0 stops that."""
        sequence.run_until = length

    def cancel(self, sequence: Sequence) -> None:
        """Forget `sequence` and free what it holds; one that has ended already is left as it is. Any thread may: beside a step of another one it is
        done before the next."""
        self.guard.soon(lambda: self._cancel(sequence))

    def _cancel(self, sequence: Sequence) -> None:
        self.line.leave(sequence)
        self._texts.pop(sequence, None)

    @property
    def busy(self) -> bool:
        """Whether a step would find work."""
        return self.guard.behind or any(not s.idle for s in self.line.running) or self.line.admissible(time.monotonic()) is not None

    @property
    def starved(self) -> bool:
        """Whether somebody waits for pages who could be served with them."""
        return self.line.next() is not None and self.line.admissible(time.monotonic()) is None

    def park(self, sequence: Sequence) -> None:
        """Take the pages of a sequence that is idle, until it wants something: then they are found in the cache, or computed again."""
        if sequence in self.line.running and sequence.idle:
            self.line.preempt(sequence, time.monotonic())

    # ------------------------------------------------------------------------------------------------------------------
    # the step

    def step(self, most: int = ALL) -> list[Verdict]:
        """One forward pass: schedule -> run -> sample -> accept -> commit -> emit. At most `most` sequences get a token in it."""
        with self.guard.step():
            return self._step(most)

    def _step(self, most: int) -> list[Verdict]:
        begun = time.monotonic()
        self.guard.catch_up()
        self.line.admit(begun)
        running = [s for s in self.line.running if not s.held]
        batch, jobs, at_work = self.runner.batch(), list[Job](), list[Sequence]()
        expected = any(not t.ready for t in self._turns(running, begun))
        wants, order = self._wants(running, most)
        for grant in schedule(wants, self.runner.sizes.max_rows, self._credit, self.cost, most, expected, order):
            s = running[grant.index]
            tree = self._tree(s, grant)
            if self.line.reserve(s, s.computed + grant.chain + int(tree.depths().max()), at_work, begun):
                at_work.append(s)
                jobs.append(self._add(batch, s, grant, tree))
        if not jobs:
            return []
        context = sum(job.sequence.computed for job in jobs)
        try:
            found = self._verify(batch, jobs)
        except BaseException:  # Ctrl-C too: there may be places in the cache for noise that was never drawn
            self._verify.forget()
            raise
        verdicts = [v for job, f in zip(jobs, found, strict=True) if (v := self._extend(job, f)) is not None]
        self.rows = batch.rows
        self._learn(jobs, found, batch.rows, context, begun)
        for v in verdicts:
            if v.sequence in self._texts:
                text = self._texts[v.sequence]
                text.take(v)
                if text.output.completion and not v.finish:  # by a stop string
                    self.line.leave(v.sequence)
        return verdicts

    def turns(self, now: float) -> list[Turn] | None:
        """Who is ready for a step or expected soon, for a Pipeline; None if there is work for which nobody has to be waited: an interactive
        prompt, or that of batch sequences while no other is ready."""
        running = [s for s in self.line.running if not s.held]
        if self.guard.behind or any(s.pending > 1 and not s.batch for s in running) or self.line.admissible(now) is not None:
            return None
        found = list(self._turns(running, now))
        return found if any(t.ready for t in found) else None

    def _turns(self, running: list[Sequence], now: float) -> Iterator[Turn]:
        return (t for s in running if not s.batch and (t := s.turn(now, self.admission.gap)) is not None)

    def _wants(self, running: list[Sequence], most: int) -> tuple[list[Want], list[int]]:
        """What each wants of the next step, of its tree the nodes that are worth their rows beside those of the others whose turn it is; and the
        order of their turns."""
        wants = [Want(s.pending, s.wants_token, len(s.tree) if s.tree is not None else 0, s.account, s.batch) for s in running]
        order = turns(wants, self._credit)
        ready = [i for i in order if wants[i].token and wants[i].chain <= LEAST]  # else it is a prompt
        ready = [i for i in ready if not wants[i].batch][:most] or ready
        if self.runner.sizes.admission and any(wants[i].nodes for i in ready):
            rows = sum(wants[i].chain for i in ready)
            prompts = sum(w.chain - 1 for w in wants if not w.batch and (not w.token or w.chain > LEAST))
            most_rows = self.runner.sizes.max_rows
            chosen = self.admission.choose(
                [running[i].acceptance for i in ready], [wants[i].nodes for i in ready], rows, len(ready),
                sum(running[i].computed for i in ready), most_rows - rows - owed_to_prompts(prompts, most_rows),
            )  # fmt: skip
            for i, nodes in zip(ready, chosen, strict=True):
                wants[i] = replace(wants[i], nodes=nodes)
        return wants, order

    def _learn(self, jobs: list[Job], found: list[Found | None], rows: int, context: int, begun: float) -> None:
        """Remember how long the step took and what was accepted. A step for batch alone, while there are others, is part of the pause between theirs:
        nobody of them has waited."""
        now, (before, ended) = time.monotonic(), self._stepped
        waited = any(job.grant.token for job in jobs) or self._verify.waits
        if waited and self._waited:  # else a device is still at this step, or was at the one before
            self.cost.observe(rows, context, now - begun)
        self._waited = waited
        if not all(job.sequence.batch for job in jobs) or all(s.batch for s in self.line.running):
            if ended:
                self.admission.paused(begun - ended, ended - before)
            self._stepped = (begun, now) if self.line.running or self.line.waiting else (0.0, 0.0)
        answered = [(job, f.path) for job, f in zip(jobs, found, strict=True) if f is not None]
        for job, path in answered:
            job.sequence.answered = now
            job.sequence.rhythm.verified(job.grant.chain + len(job.tree), len(path) + 1)
        drafted = [(job, path) for job, path in answered if job.sequence not in self._texts]  # those are decoded alone to their end
        if self.runner.sizes.admission and drafted:
            known = [job.sequence.acceptance for job, _ in drafted]
            self.admission.learn(known, [len(job.tree) for job, _ in drafted], [path for _, path in drafted])
            self.admission.plan(known, len(answered), context, self.runner.sizes.max_rows - len(answered))

    def _tree(self, s: Sequence, grant: Grant) -> TokenTree:
        """What of the offered tree is verified: the granted nodes, up to the first that lies too deep to be accepted or to have a page. Nobody is
        preempted for the depth of a tree: its prefix will do."""
        if s.tree is None or s.table is None:
            return EMPTY
        pages = (self.pool.available + len(s.table.pages)) * self.pool.page_size - s.computed - grant.chain
        tree = s.tree.cut(grant.nodes)
        return tree.cut(_within(tree, min(s.limit - len(s.tokens), max(0, pages) + 1)))

    def _add(self, batch: BatchBuilder, s: Sequence, grant: Grant, tree: TokenTree) -> Job:
        """Put the granted rows into the batch: a chain of the text and, below its last row, the tree."""
        assert s.table is not None
        depths = tree.depths()[1:]
        chain = s.tokens[s.computed : s.computed + grant.chain]
        root = s.computed + grant.chain - 1
        anc = None
        if len(tree):
            below = (1 << (grant.chain - 1)) - 1
            anc = [(1 << i + 1) - 1 for i in range(grant.chain - 1)] + [below | a << (grant.chain - 1) for a in tree.ancestors()]
        first, rows = batch.rows, grant.chain + len(tree)
        s.account.prompt += max(0, s.computed + grant.chain - grant.token - max(s.computed, s.read))
        s.account.verified += grant.token + len(tree)
        batch.add(
            tokens=chain + tree.tokens.tolist(),
            positions=[*range(s.computed, root + 1), *(root + depths).tolist()],
            slots=list(range(first, first + rows)),
            keys=(first, rows),
            prefix=s.computed,
            pages=s.table.pages,
            anc=anc,
            wanted=list(range(grant.chain - 1, rows)) if grant.token else [],
        )
        return Job(s, grant, tree, first)

    def _extend(self, job: Job, found: Found | None) -> Verdict | None:
        """Extend the text by what was found; the K/V of it is in the pages already."""
        s, verdict = job.sequence, None
        kept = job.grant.chain
        if found is not None:
            base = len(s.tokens)
            kept += len(found.path)
            tokens = (*(int(job.tree.tokens[r - 1]) for r in found.path), found.last)
            s.tokens += tokens
            s.tree, s.finish = None, found.finish
            verdict = Verdict(s, base, tokens, job.grant.chain + len(job.tree), found.finish, found.logprobs)
        else:
            s.since = time.monotonic()  # its turn has yet to begin
        assert s.table is not None
        s.computed += kept
        s.table.fill(s.tokens, s.computed)
        if s.finish:
            self.line.leave(s)
        elif verdict is not None:
            self.line.served(s)
        return verdict

    # ------------------------------------------------------------------------------------------------------------------
    # texts

    @alone
    def begin(self, tokens: list[int], params: SamplingParams) -> Text:
        """Begin one text, which the engine decodes alone. Raises RequestError if it can never be served."""
        params = params.with_seed()
        output = Output(self.tokenizer, len(tokens), params)
        sequence = self.open(tokens, params)
        self.run_until(sequence, sequence.limit)
        text = self._texts[sequence] = Text(sequence, output)
        return text

    @alone
    def advance(self) -> None:
        """One step."""
        self.make_room()
        self.step()

    def make_room(self) -> None:
        """Where nobody can take a step for want of pages, whoever is idle gives some up."""
        if not self.busy and self.starved:
            self.park(max((s for s in self.line.running if s.idle), key=lambda s: s.order))

    def end(self, text: Text) -> None:
        """Forget a text, finished or not, and free what it holds. Any thread may."""
        self.cancel(text.sequence)

    def close(self) -> None:
        """End every text and let go of pages and weights; whatever is called afterwards raises UseError, and so does this while another thread uses
        the engine. A second call does nothing."""
        if not self.guard.closed:
            with self.guard:
                self.guard.catch_up()
                for s in [*self.line.waiting, *self.line.running, *self._texts]:
                    self._cancel(s)
                self.guard.closed = True
                del self.runner, self._verify


def _within(tree: TokenTree, room: int) -> int:
    """How many nodes come before the first of depth `room` or more: with `room` tokens left to add, none of those can be accepted."""
    deep = tree.depths()[1:] >= room
    return int(deep.argmax()) if deep.any() else len(tree)
