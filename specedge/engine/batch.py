"""StepBatch: the flat tensors of one forward pass, and their builder.

Rows of a segment come from one sequence: a chunk of its text, or rows of a tree. Knows nothing of sequences, pools or models; engine and
drafter both build their passes here. Invariant: everything is made on the host and moves to the device once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specedge.engine.buckets import Bucket


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Letters as in kernels/reference.py; `wanted [n]` are the rows whose logits are asked for."""

    tokens: Tensor  # [R] int64
    positions: Tensor  # [R] int32
    slots: Tensor  # [R] int32: rows of the row buffer
    segments: Tensor  # [B, 6] int32
    page_table: Tensor  # [B, M] int32
    k_pos: Tensor  # [rows] int32, over the whole row buffer
    anc: Tensor  # [R, W] int64
    wanted: Tensor  # [n] int64


class BatchBuilder:
    """Collects segments; `k_pos [rows]` int32 holds the positions of all rows in the row buffer and is updated by `add`."""

    def __init__(self, k_pos: np.ndarray) -> None:
        self._k_pos = k_pos
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._slots: list[int] = []
        self._segments: list[tuple[int, int, int, int, int, int]] = []
        self._tables: list[list[int]] = []
        self._anc: list[int] = []
        self._wanted: list[int] = []
        self._words = 1

    @property
    def rows(self) -> int:
        return len(self._tokens)

    @property
    def shape(self) -> Bucket:
        """The bucket that it would fill."""
        return Bucket(len(self._tokens), len(self._segments), len(self._wanted), max(1, *map(len, self._tables)))

    def add(
        self, tokens: list[int], positions: list[int], slots: list[int], keys: tuple[int, int], prefix: int, pages: list[int],
        anc: list[int] | None, wanted: list[int],
    ) -> None:  # fmt: skip
        """A segment: its rows (tokens, absolute positions, row-buffer slots), the row-buffer range `keys` (first, count) and the `prefix` tokens in
        `pages` that they see, ancestor bit sets relative to `keys` (None: causal), and which of the rows need logits."""
        q0 = self.rows
        self._tokens += tokens
        self._positions += positions
        self._slots += slots
        self._segments.append((q0, len(tokens), *keys, prefix, anc is None))
        self._tables.append(pages)
        self._anc += anc if anc is not None else [0] * len(tokens)
        self._wanted += [q0 + i for i in wanted]
        if anc is not None:
            self._words = max(self._words, (keys[1] + 63) // 64)
        self._k_pos[slots] = positions

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields of a StepBatch, on the host."""
        table = np.zeros((len(self._tables), max(1, *map(len, self._tables))), np.int32)
        for i, pages in enumerate(self._tables):
            table[i, : len(pages)] = pages
        bits = b"".join(a.to_bytes(8 * self._words, "little") for a in self._anc)
        anc = np.frombuffer(bits, "<i8").reshape(self.rows, self._words).copy()

        return {
            "tokens": np.array(self._tokens, np.int64),
            "positions": np.array(self._positions, np.int32),
            "slots": np.array(self._slots, np.int32),
            "segments": np.array(self._segments, np.int32),
            "page_table": table,
            "k_pos": self._k_pos.copy(),
            "anc": anc,
            "wanted": np.array(self._wanted, np.int64),
        }

    def build(self, device: torch.device) -> StepBatch:
        """The batch on `device`."""
        return StepBatch(**{name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in self.arrays().items()})
