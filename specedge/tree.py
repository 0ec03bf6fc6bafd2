"""TokenTree: the tokens that an edge drafted below the root of its session.

Row 0 is the root, the last committed token; it is not in the arrays. Rows 1..N are the nodes, in falling order of score, each
with a parent in an earlier row, so that a cycle cannot be written down and every prefix of the list is a tree. Knows nothing of
scores, models or the wire; numpy only, so that a machine without torch can decode it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_NODES = 255  # with the root 256 rows: four ancestor words, and a parent fits one byte
NUMBERS = 1 << 16  # of nodes that follow a tree and each other before there is a whole tree again
GROWN = 64  # of them that are told at a time: a frame of the smallest size, like all others of a round


class TreeError(ValueError):
    """A list of tokens and parents that is no tree; the message says which row and why."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """`tokens [N]` uint32 and `parents [N]` uint8: node i + 1 carries `tokens[i]` and hangs below row `parents[i]`."""

    tokens: NDArray[np.uint32]
    parents: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.tokens)

    def check(self, vocab: int) -> None:
        """Raise TreeError unless this is a tree over ids below `vocab` whose siblings differ."""
        n = len(self.tokens)
        if n != len(self.parents):
            raise TreeError(f"{n} tokens but {len(self.parents)} parents")
        if n > MAX_NODES:
            raise TreeError(f"{n} nodes, at most {MAX_NODES} are allowed")
        if n == 0:
            return
        wrong = self.parents > np.arange(n)
        if wrong.any():
            i = int(wrong.argmax())
            raise TreeError(f"row {i + 1} names row {int(self.parents[i])} as its parent, which is not before it")
        if int(self.tokens.max()) >= vocab:
            i = int((self.tokens >= vocab).argmax())
            raise TreeError(f"row {i + 1} carries token {int(self.tokens[i])}, which is outside the vocabulary of {vocab}")
        edges = self.parents.astype(np.uint64) << np.uint64(32) | self.tokens
        if len(np.unique(edges)) < n:
            i = int(np.setdiff1d(np.arange(n), np.unique(edges, return_index=True)[1])[0])
            raise TreeError(f"row {i + 1} carries token {int(self.tokens[i])}, like an earlier child of row {int(self.parents[i])}")

    def cut(self, nodes: int) -> "TokenTree":
        """The first `nodes` nodes: again a tree, and the best one of that size."""
        return TokenTree(self.tokens[:nodes], self.parents[:nodes])

    def depths(self) -> NDArray[np.int32]:
        """Depth of every row `[N + 1]`; the root has 0."""
        depth = np.zeros(len(self) + 1, np.int32)
        for i, parent in enumerate(self.parents.tolist(), 1):
            depth[i] = depth[parent] + 1
        return depth

    def ancestors(self) -> list[int]:
        """For every row `[N + 1]` a bit set as an int: bit j is set if row j is this row or an ancestor of it."""
        seen = [1]
        for i, parent in enumerate(self.parents.tolist(), 1):
            seen.append(seen[parent] | 1 << i)
        return seen

    def path(self, row: int) -> list[int]:
        """Rows from the root (not included) down to `row` (included)."""
        rows = []
        while row:
            rows.append(row)
            row = int(self.parents[row - 1])
        return rows[::-1]

    def texts(self) -> list[tuple[int, ...]]:
        """The tokens from below the root down to every row `[N + 1]`; the root's are none."""
        found: list[tuple[int, ...]] = [()]
        for token, parent in zip(self.tokens.tolist(), self.parents.tolist(), strict=True):
            found.append((*found[parent], token))
        return found

    def children(self) -> list[dict[int, int]]:
        """For every row `[N + 1]` its children: token -> row."""
        below: list[dict[int, int]] = [{} for _ in range(len(self) + 1)]
        for i, (token, parent) in enumerate(zip(self.tokens.tolist(), self.parents.tolist(), strict=True), 1):
            below[parent][token] = i
        return below


def make_tree(tokens: list[int], parents: list[int]) -> TokenTree:
    """A TokenTree from Python lists (values must fit their types; call `check` for the rest)."""
    return TokenTree(np.array(tokens, np.uint32), np.array(parents, np.uint8))


EMPTY = make_tree([], [])
