"""Sampling: the token of a row is a function of its logits, its path of tokens, the parameters, the seed and its position.

Per row, in this order: logit bias, min_tokens, repetition, frequency and presence penalties along the row's own path, times 1/T, min_p, top_k,
top_p, plus shared noise, argmax. The noise of a (seed, position) is drawn once and serves every row that samples that position, in this step and
in later ones. Knows nothing of sequences or trees: it is told paths. The formulas are in kernels/reference.py.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specedge import kernels
from specedge.config import SamplingParams
from specedge.engine.request import Logprobs

Key = tuple[int, int]  # (seed, position of the token being sampled)


@dataclass(frozen=True, slots=True)
class Ask:
    """Rows of one text: after `tokens`, each row follows one of `paths` and samples the token behind it."""

    params: SamplingParams  # with a seed
    tokens: list[int]
    prompt_len: int
    stop: frozenset[int]
    paths: Sequence[Sequence[int]]

    @property
    def keys(self) -> "list[Key | None]":
        """The noise of every row; None: greedy, no noise."""
        p = self.params
        if p.greedy:
            return [None] * len(self.paths)
        assert p.seed is not None
        return [(p.seed, len(self.tokens) + len(path)) for path in self.paths]


@dataclass(frozen=True, slots=True)
class Draw:
    """What the ops need to know about the rows of some asks; letters as in kernels/reference.py."""

    rows: Tensor  # [n, 4] int32
    penalties: Tensor  # [n, 3] float32
    edits: Tensor  # [E, 3] int32
    bias: Tensor  # [E] float32
    paths: Tensor  # [P] int32
    inv_temperature: Tensor  # [n] float32, rounded once from float64; 1 for greedy rows
    log_min_p: Tensor  # [n] float32
    top_k: Tensor  # [n] int32
    top_p: Tensor  # [n] float64
    noise_row: Tensor  # [n] int32: of the noise table, -1 for greedy rows
    fills: Tensor  # [m, 3] int64: noise that the table lacks
    filters: bool = True  # whether a row may have one
    noisy: bool = True  # whether a row may have noise


class NoiseCache:
    """Noise rows by key in `table [m, V]`, the least recently used forgotten first."""

    def __init__(self, vocab: int, device: torch.device, capacity: int = 64) -> None:
        self.table = torch.empty((capacity, vocab), device=device)
        self._slots: OrderedDict[Key, int] = OrderedDict()

    def assign(self, keys: list[Key]) -> tuple[dict[Key, int], list[tuple[int, int, int]]]:
        """Where the noise of each key is in the table, and what must be filled in first: seed, position, row."""
        wanted = dict.fromkeys(keys)
        for key in wanted:
            if key in self._slots:
                self._slots.move_to_end(key)
        capacity = len(self.table)
        if len(wanted) > capacity:
            self.table = torch.cat((self.table, self.table.new_empty((len(wanted) * 2 - capacity, self.table.shape[1]))))
        fills = []
        for key in wanted:
            if key not in self._slots:
                free = len(self._slots)
                slot = free if free < len(self.table) else self._slots.popitem(last=False)[1]
                self._slots[key] = slot
                fills.append(((key[0] + 2**63) % 2**64 - 2**63, key[1], slot))
        return {key: self._slots[key] for key in wanted}, fills

    def forget(self) -> None:
        """Nothing is in the table."""
        self._slots.clear()


class Sampler:
    """Samples rows of logits over a vocabulary whose ids at or above `limit` never win; `noise`: rows that it remembers, to begin with."""

    def __init__(self, vocab: int, limit: int, device: torch.device, noise: int = 64) -> None:
        self.noise = NoiseCache(vocab, device, noise)
        self.limit = min(limit, vocab)
        self._vocab, self._device = vocab, device

    @torch.inference_mode()
    def __call__(self, logits: Tensor, asks: list[Ask]) -> list[int]:
        """The token of every row of `logits [n, V]`, which it may change; the rows of the asks come one behind the other."""
        ids: list[int] = self.sample(logits, self.draw(asks)).tolist()
        return ids

    def draw(self, asks: list[Ask], looser: bool = False) -> Draw:
        """The asks on the device. `looser`: as a draft does, which keeps somewhat more."""
        arrays = self.arrays(asks, looser)
        filters, noisy = any(a.params.filters and not a.params.greedy for a in asks), bool((arrays["noise_row"] >= 0).any())
        return Draw(**{name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}, filters=filters, noisy=noisy)

    def fill(self, fills: np.ndarray) -> None:
        """Fill in noise that `arrays` has given a place to, if nothing else will."""
        kernels.fill_noise(self.noise.table, torch.from_numpy(fills).to(self._device))

    def sample(self, logits: Tensor, draw: Draw) -> Tensor:
        """The token of every row `[n]` int64. Waits for nothing, so it can be captured."""
        kernels.fill_noise(self.noise.table, draw.fills)
        return kernels.sample(self.process(logits, draw), self.noise.table, draw.noise_row, draw.inv_temperature, self.limit)

    def score(self, logits: Tensor, draw: Draw, tau: float, best: int) -> tuple[Tensor, Tensor]:
        """For a draft: values and ids `[n, best]` of the best of log_softmax((log q + g) / tau) in every row, q being the processed distribution."""
        kernels.fill_noise(self.noise.table, draw.fills)
        log_q = (self.process(logits, draw)[:, : self.limit] * draw.inv_temperature[:, None]).log_softmax(-1)
        if draw.noisy:
            noise = self.noise.table[draw.noise_row.clamp(min=0).long(), : self.limit]
            log_q = torch.where(draw.noise_row[:, None] >= 0, ((log_q + noise) / tau).log_softmax(-1), log_q)
        values, ids = log_q.topk(min(best, self.limit))
        return values, ids

    def process(self, logits: Tensor, draw: Draw) -> Tensor:
        """Bias, mask, penalise and truncate `logits [n, V]`; not yet times 1/T."""
        kernels.adjust(logits, draw.rows, draw.penalties, draw.edits, draw.bias, draw.paths)
        if not draw.filters:
            return logits
        return kernels.truncate(logits, draw.inv_temperature, draw.log_min_p, draw.top_k, draw.top_p, self.limit)

    def arrays(self, asks: list[Ask], looser: bool = False) -> dict[str, np.ndarray]:
        """The fields of a Draw, on the host. The noise that is wanted gets its place in the table: it must be filled in before the next call."""
        rows, edits, paths = list[tuple[int, int, int, int]](), list[Edits](), list[int]()
        first = 0
        for ask in asks:
            edits.append(edits_of(ask, self._vocab))
            end = first + len(edits[-1].bias)
            for path in ask.paths:
                at = len(paths)
                if first < end:
                    paths += path
                rows.append((first, end, at, len(paths)))
            first = end
        each = [ask.params for ask in asks for _ in ask.paths]
        kept = [(0.0, 0, 1.0) if p.greedy else p.looser if looser else p.kept for p in each]
        keys = [key for ask in asks for key in ask.keys]
        where, fills = self.noise.assign([key for key in keys if key is not None])
        return {
            "rows": np.array(rows, np.int32).reshape(-1, 4),
            "penalties": np.array([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in each], np.float32).reshape(-1, 3),
            "edits": np.concatenate([np.zeros((0, 3), np.int32), *(e.edits for e in edits)]),
            "bias": np.concatenate([np.zeros(0, np.float32), *(e.bias for e in edits)]),
            "paths": np.array(paths, np.int32),
            "inv_temperature": np.array([1.0 if p.greedy else 1.0 / p.temperature for p in each], np.float32),
            "log_min_p": torch.tensor([k[0] for k in kept], dtype=torch.float32).log().numpy(),  # torch's everywhere, so that bits are equal
            "top_k": np.array([k[1] for k in kept], np.int32),
            "top_p": np.array([k[2] for k in kept], np.float64),
            "noise_row": np.array([-1 if key is None else where[key] for key in keys], np.int32),
            "fills": np.array(fills, np.int64).reshape(-1, 3),
        }

    @torch.inference_mode()
    def logprobs(self, logits: Tensor, tokens: list[int], k: int) -> tuple[Logprobs, ...]:
        """For every row of `logits [n, V]`, which nothing has processed, what the model thought of its token and of the `k` likeliest (-1: all). Each
        row is computed by itself, so that its bits do not depend on the others."""
        found = []
        k = self.limit if k < 0 else min(k, self.limit)
        for row, token in zip(logits[:, : self.limit], tokens, strict=True):
            log_p, top = row.log_softmax(-1), list[tuple[int, float]]()
            if k:
                ids = (row >= row.topk(k).values[-1]).nonzero()[:, 0]  # at least k: of equals the smaller ids are wanted, topk gives any
                ids = ids[row[ids].sort(descending=True, stable=True).indices[:k]]
                top = list(zip(ids.tolist(), log_p[ids].tolist(), strict=True))
            found.append(Logprobs(token, float(log_p[token]), tuple(top)))
        return tuple(found)


class Edits(NamedTuple):
    """What changes single logits of an ask's rows, as `reference.adjust` takes it."""

    edits: np.ndarray  # [E, 3] int32
    bias: np.ndarray  # [E] float32


NOTHING = Edits(np.zeros((0, 3), np.int32), np.zeros(0, np.float32))


def edits_of(ask: Ask, vocab: int) -> Edits:
    """Bias, stop ids that cannot win before min_tokens tokens have come, and, with penalties, all tokens of the text and the paths."""
    p, text = ask.params, list[int]()
    missing = ask.prompt_len + p.min_tokens - len(ask.tokens)
    held = sorted(ask.stop) if missing > 0 else []
    if p.penalises:
        text = [*ask.tokens, *(token for path in ask.paths for token in path)]
    if not text and not held and not p.logit_bias:
        return NOTHING
    token = np.unique(np.array([*text, *held, *(i for i, _ in p.logit_bias)], np.int64))
    token = token[token < vocab]  # a draft may know fewer ids than the target
    edits, bias = np.stack((token, np.full_like(token, -1), np.zeros_like(token)), 1).astype(np.int32), np.zeros(len(token), np.float32)
    if p.penalises:
        edits[np.isin(token, ask.tokens[: ask.prompt_len]), 1] = 0
        times = np.bincount(np.array(ask.tokens[ask.prompt_len :], np.int64), minlength=vocab)[token]
        edits[times > 0, 1] = times[times > 0]
    edits[np.isin(token, held), 2] = missing
    value = dict(p.logit_bias)
    bias[:] = [value.get(i, 0.0) for i in token.tolist()]
    return Edits(edits, bias)
