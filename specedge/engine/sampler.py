"""Sampling with shared noise: the token of a row is a function of its logits, its temperature, the seed and its position.

The noise of a (seed, position) is drawn once and serves every row that samples that position, in this step and in later ones. Knows nothing of
sequences or trees. The formulas are in kernels/reference.py.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from specedge import kernels

Key = tuple[int, int]  # (seed, position of the token being sampled)


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
        self._limit = min(limit, vocab)
        self._device = device

    @torch.inference_mode()
    def __call__(self, logits: Tensor, keys: list[Key | None], temperatures: list[float]) -> list[int]:
        """The token of every row of `logits [n, V]`; a key of None is a greedy row."""
        table, where = self.noise.rows([k for k in keys if k is not None])
        noise_row = torch.tensor([-1 if k is None else where[k] for k in keys], dtype=torch.int32, device=self._device)
        factors = [1.0 if k is None else 1.0 / t for k, t in zip(keys, temperatures, strict=True)]
        inverse = torch.tensor(factors, dtype=torch.float32, device=self._device)  # rounded once from float64
        ids: list[int] = kernels.sample(logits, table, noise_row, inverse, self._limit).tolist()
        return ids
