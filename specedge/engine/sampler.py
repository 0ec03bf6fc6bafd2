"""Sampling: the token of a row is a function of its logits, its path of tokens, the parameters, the seed and its position.

Per row, in this order: logit bias, min_tokens, repetition, frequency and presence penalties along the row's own path, times 1/T, min_p, top_k,
top_p, plus shared noise, argmax. The noise of a (seed, position) is drawn once and serves every row that samples that position, in this step and
in later ones. Knows nothing of sequences or trees: it is told paths. The formulas are in kernels/reference.py.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

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


class NoiseCache:
    """Noise rows `[V]` by key, the least recently used forgotten first."""

    def __init__(self, vocab: int, device: torch.device, capacity: int = 64) -> None:
        self._table = torch.empty((capacity, vocab), device=device)
        self._slots: OrderedDict[Key, int] = OrderedDict()

    def rows(self, keys: list[Key]) -> tuple[Tensor, dict[Key, int]]:
        """The table `[m, V]` and where the noise of each key is in it."""
        wanted = dict.fromkeys(keys)
        for key in wanted:
            if key in self._slots:
                self._slots.move_to_end(key)
        capacity, vocab = self._table.shape
        if len(wanted) > capacity:
            self._table = torch.cat((self._table, self._table.new_empty((len(wanted) * 2 - capacity, vocab))))
        for key in wanted:
            if key not in self._slots:
                free = len(self._slots)
                slot = free if free < len(self._table) else self._slots.popitem(last=False)[1]
                self._table[slot] = kernels.gumbel(*key, vocab, self._table.device)
                self._slots[key] = slot
        return self._table, {key: self._slots[key] for key in wanted}


class Sampler:
    """Samples rows of logits over a vocabulary whose ids at or above `limit` never win."""

    def __init__(self, vocab: int, limit: int, device: torch.device) -> None:
        self.noise = NoiseCache(vocab, device)
        self.limit = min(limit, vocab)
        self._device = device

    @torch.inference_mode()
    def __call__(self, logits: Tensor, asks: list[Ask]) -> list[int]:
        """The token of every row of `logits [n, V]`, which it may change; the rows of the asks come one behind the other."""
        logits = self.process(logits, asks)
        keys = [key for ask in asks for key in ask.keys]
        table, where = self.noise.rows([k for k in keys if k is not None])
        noise_row = torch.tensor([-1 if k is None else where[k] for k in keys], dtype=torch.int32, device=self._device)
        ids: list[int] = kernels.sample(logits, table, noise_row, self.inverse_temperatures(asks), self.limit).tolist()
        return ids

    def process(self, logits: Tensor, asks: list[Ask], looser: bool = False) -> Tensor:
        """Bias, mask, penalise and truncate `logits [n, V]`; not yet times 1/T. `looser`: as a draft does, which keeps somewhat more."""
        first = 0
        for ask in asks:
            rows = logits[first : first + len(ask.paths)]
            first += len(ask.paths)
            if bias := [b for b in ask.params.logit_bias if b[0] < rows.shape[1]]:  # a draft may know fewer ids than the target
                ids, values = zip(*bias, strict=True)
                rows[:, list(ids)] += rows.new_tensor(values)
            self._hold_open(rows, ask)
            if ask.params.penalises:
                _penalise(rows, ask)
        if not any(ask.params.filters and not ask.params.greedy for ask in asks):
            return logits
        each = [(0.0, 0, 1.0) if a.params.greedy else a.params.looser if looser else a.params.kept for a in asks for _ in a.paths]
        min_p, top_k, top_p = zip(*each, strict=True)
        return kernels.truncate(
            logits, self.inverse_temperatures(asks), torch.tensor(min_p, dtype=torch.float32, device=self._device),
            torch.tensor(top_k, dtype=torch.int32, device=self._device), torch.tensor(top_p, dtype=torch.float64, device=self._device), self.limit,
        )  # fmt: skip

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

    def inverse_temperatures(self, asks: list[Ask]) -> Tensor:
        """1/T of every row `[n]` float32, rounded once from float64; 1 for greedy rows."""
        each = [1.0 if a.params.greedy else 1.0 / a.params.temperature for a in asks for _ in a.paths]
        return torch.tensor(each, dtype=torch.float32, device=self._device)

    def _hold_open(self, rows: Tensor, ask: Ask) -> None:
        """Stop ids cannot win before min_tokens tokens have come."""
        missing = ask.prompt_len + ask.params.min_tokens - len(ask.tokens)
        early = [i for i, path in enumerate(ask.paths) if len(path) < missing]
        stop = [i for i in sorted(ask.stop) if i < rows.shape[1]]
        if early and stop:
            rows[torch.tensor(early, device=self._device)[:, None], torch.tensor(stop, device=self._device)] = float("-inf")


def _penalise(rows: Tensor, ask: Ask) -> None:
    """Repetition penalty over prompt and output, frequency and presence over the output, each along the row's own path, in place."""
    p, output = ask.params, ask.tokens[ask.prompt_len :]
    ids = sorted({*ask.tokens, *(t for path in ask.paths for t in path)})
    place = {token: i for i, token in enumerate(ids)}
    count = torch.zeros(len(ask.paths), len(ids))
    for token in output:
        count[:, place[token]] += 1
    for row, path in enumerate(ask.paths):
        for token in path:
            count[row, place[token]] += 1
    seen = count > 0
    seen[:, [place[t] for t in {*ask.tokens[: ask.prompt_len]}]] = True
    count, seen, index = count.to(rows.device), seen.to(rows.device), torch.tensor(ids, device=rows.device)
    z = rows[:, index]
    z = torch.where(seen, torch.where(z > 0, z / p.repetition_penalty, z * p.repetition_penalty), z)
    rows[:, index] = z - p.frequency_penalty * count - p.presence_penalty * (count > 0)
