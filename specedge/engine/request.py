"""The nouns of an engine: a sequence, the verdict of a step on it, and what a caller gets.

Knows nothing of tensors or schedules, and imports no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from specedge.config import SamplingParams
from specedge.engine.admission import Acceptance
from specedge.engine.pages import PageTable
from specedge.engine.pipeline import Rhythm, Turn
from specedge.text import Detokenizer, Tokenizer
from specedge.tree import TokenTree

PLAIN = Rhythm(gap=0.0)  # of a sequence that decodes by itself
LOST = 0.1  # seconds, and a gap, and four spreads, after which a tree that was expected is so no more


@dataclass(slots=True, eq=False)
class Account:
    """Who pays for rows: sequences of one account share the K/V of common beginnings, and accounts take turns where rows are scarce. Whoever keeps
    the accounts reads what they have used and may make them wait."""

    name: bytes = b""  # salts its pages
    verified: int = 0  # rows of roots and nodes so far
    prompt: int = 0  # rows of prompts so far
    verified_held: bool = False  # no more of these rows until what was used is paid for
    prompt_held: bool = False


@dataclass(slots=True, eq=False)
class Sequence:
    """One text in the making. Tokens 0 .. computed-1 have their K/V in pages; the last token is the root, which never has."""

    tokens: list[int]
    prompt_len: int  # max_tokens counts from here
    params: SamplingParams  # with a seed
    stop: frozenset[int]  # ids that end the text
    account: Account
    batch: bool = False  # takes what others leave
    number: int = 0  # of arrival, from 1
    order: int = 0  # in the line
    keys: list[bytes] = field(default_factory=list)  # of the full pages that its known tokens begin with
    table: PageTable | None = None  # None while it waits for admission
    computed: int = 0
    read: int = 0  # tokens that had their K/V before it was preempted: they are computed again, but not paid for
    since: float = 0.0  # when it began to wait for pages; when its turn began, once it has them
    tree: TokenTree | None = None  # offered and not yet verified
    run_until: int = 0  # decode alone while the text is shorter
    finish: str = ""  # "stop" or "length" once it has ended
    parked: bool = False  # its pages were taken while it was idle
    acceptance: Acceptance = field(default_factory=Acceptance)  # how its drafts have fared
    rhythm: Rhythm = field(default_factory=Rhythm)  # how its rounds follow each other
    offered: float = 0.0  # when its tree came
    answered: float = 0.0  # when its last verdict was given; 0: never

    @property
    def limit(self) -> int:
        """Length at which max_tokens ends the text."""
        return self.prompt_len + self.params.max_tokens

    @property
    def pending(self) -> int:
        """Tokens without K/V, the root among them."""
        return len(self.tokens) - self.computed

    @property
    def held(self) -> bool:
        """Whether its account has to wait."""
        return self.account.prompt_held if max(self.computed, self.read) < len(self.tokens) - 1 else self.account.verified_held

    @property
    def alone(self) -> bool:
        """Whether it decodes by itself."""
        return len(self.tokens) < self.run_until

    @property
    def wants_token(self) -> bool:
        return not self.finish and (self.tree is not None or self.alone)

    def turn(self, now: float, usual: float) -> Turn | None:
        """Its place in the rounds of all: ready, expected, or neither. `usual`: the gap of others, for one that had its first verdict only now."""
        rhythm = self.rhythm if self.rhythm.gap >= 0 else replace(self.rhythm, gap=usual, spread=usual / 4)
        if self.wants_token:
            return Turn(True, self.answered if self.alone else self.offered, PLAIN if self.alone else rhythm, self.computed)
        due = self.answered + rhythm.gap
        lost = not self.answered or now - due > LOST + rhythm.gap + 4 * rhythm.spread
        return None if lost or self.finish else Turn(False, due, rhythm, self.computed)

    @property
    def idle(self) -> bool:
        """Whether it would take no rows now."""
        return self.held or not (self.wants_token or self.pending > 1)

    @property
    def wants_pages(self) -> bool:
        """Whether it would run if it had pages."""
        return not self.held and (not self.parked or (self.wants_token and not self.account.verified_held))


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of probabilities where one token was chosen: its own, and the `top` likeliest as (id, logarithm), best first, the smaller id
    among equals. They are the log_softmax of the model's own logits over the ids of the tokenizer: before bias, penalties, temperature and
    filters, so they say what the model thinks, whatever the token was drawn with."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step found: `tokens` extend the text from length `base` on, a path of the offered tree and the token that closes it."""

    sequence: Sequence
    base: int
    tokens: tuple[int, ...]
    verified: int  # rows that were run for it
    finish: str
    logprobs: tuple[Logprobs, ...] | None = None  # of `tokens`, if the parameters ask for them


@dataclass(frozen=True, slots=True)
class Speculation:
    """How a text came about. Bytes are those of whole frames, both zero where no network was involved."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    hits: int = 0
    misses: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def tokens_per_round(self, tokens: int) -> float:
        """`tokens` over the rounds that they took."""
        return tokens / self.rounds if self.rounds else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished text. `token_ids` holds the id that closed it, `text` does not show it; `finish_reason` is stop, length or cancelled; `logprobs`
    has one entry for each of `token_ids`, or is None if the parameters do not ask for it."""

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    seed: int
    speculation: Speculation = field(default_factory=Speculation)
    logprobs: list[Logprobs] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a text in the making, with the `logprobs` of its `token_ids`; the last one carries the whole as `completion`."""

    text: str
    token_ids: list[int]
    completion: Completion | None = None
    logprobs: list[Logprobs] | None = None


def walk(tree: TokenTree, sampled: list[int], stop: frozenset[int], room: int) -> tuple[int, list[int], int, str]:
    """Follow the sampled tokens down the tree: (last accepted row, tokens of its path, closing token, finish).

    `sampled [N + 1]` is the token of every row, `room >= 1` how many tokens may still be added. The walk ends at the first row whose token is a
    stop id, is the last that there is room for, or belongs to no child; that token closes the verdict.
    """
    children = tree.children()
    row, path = 0, list[int]()
    while True:
        token = sampled[row]
        if token in stop:
            return row, path, token, "stop"
        if len(path) + 1 == room:
            return row, path, token, "length"
        below = children[row].get(token)
        if below is None:
            return row, path, token, ""
        row = below
        path.append(token)


class Output:
    """Gathers the tokens of one text, whose parameters have a seed, as they are committed and turns them into chunks."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_tokens: int, params: SamplingParams) -> None:
        assert params.seed is not None
        if params.stop and tokenizer is None:
            raise ValueError("stop is a list of strings, which needs a tokenizer: name one, or use stop_ids")
        self._detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._stop, self._min_tokens = params.stop, params.min_tokens
        self._text = ""
        self._least = 0  # characters of the first min_tokens tokens: a stop string must end behind them
        self._shown = 0  # characters given out; the rest may be the beginning of a stop string
        self._prompt_tokens, self._seed = prompt_tokens, params.seed
        self.token_ids: list[int] = []
        self._logprobs: list[Logprobs] | None = None
        self.speculation = Speculation()
        self.completion: Completion | None = None

    def add(self, tokens: Iterable[int], finish: str, logprobs: Iterable[Logprobs] | None = None) -> Chunk:
        """The next tokens, perhaps with their log-probabilities; with `finish` they are the last ones, and the closing id of a stop is not shown. A
        stop string ends the text as well, at the token behind the first min_tokens that completes it: what comes after is dropped, so that the
        result does not depend on how tokens were grouped."""
        ids, before = list(tokens), len(self.token_ids)
        for group in [[i] for i in ids] if self._stop else [ids]:
            last = bool(finish) and len(self.token_ids) + len(group) == before + len(ids)
            self.token_ids += group
            if self._detokenizer:
                self._text += self._detokenizer.add(group[:-1] if last and finish == "stop" else group)
                self._text += self._detokenizer.finish() if last else ""
            if len(self.token_ids) <= self._min_tokens:
                self._least = len(self._text)
            found = [at for s in self._stop if (at := self._text.find(s, max(0, self._shown - len(s), self._least - len(s) + 1))) >= 0]
            if found:
                self._text, finish = self._text[: min(found)], "stop"
                break
        held = 0 if finish else max((n for s in self._stop for n in range(1, len(s)) if self._text.endswith(s[:n])), default=0)
        text, self._shown = self._text[self._shown : len(self._text) - held], len(self._text) - held
        new = self.token_ids[before:]
        found_logprobs = None if logprobs is None else list(logprobs)[: len(new)]
        if found_logprobs is not None:
            self._logprobs = (self._logprobs or []) + found_logprobs
        if finish:
            self.completion = Completion(
                self._text, self.token_ids, finish, self._prompt_tokens, self._seed, self.speculation, self._logprobs
            )  # fmt: skip
        return Chunk(text, new, self.completion, found_logprobs)
