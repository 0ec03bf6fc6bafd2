"""Who gets how many rows of the next step: a pure function of what every sequence wants.

There is no prefill, decode or verify phase. A sequence has a chain of tokens without K/V that ends in its root, and perhaps a tree below the
root; it is given rows from the front of that list. Knows nothing of tensors, clocks or sockets. Invariants: the rows of a step never
pass `max_rows`; whoever has waited longest goes first, so nobody waits for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from specedge.config import MAX_ROWS_PER_TREE

CHUNK_BESIDE_TREES = 64  # prompt rows in a step that also verifies: a joining prompt must not hold up the rounds of others


@dataclass(frozen=True, slots=True)
class Want:
    """`chain` tokens without K/V, the root last; `token`: its next token is wanted; `nodes` below the root."""

    chain: int
    token: bool
    nodes: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """Rows for want number `index`: the first `chain` of its chain and, if that reaches the root, `nodes` nodes."""

    index: int
    chain: int
    token: bool
    nodes: int = 0

    @property
    def rows(self) -> int:
        return self.chain + self.nodes


def schedule(wants: Sequence[Want], max_rows: int) -> list[Grant]:
    """Divide `max_rows` rows among `wants`, which come in order of waiting time, longest first.

    First those whose next token is in reach, then prompt chunks. A tree that does not fit any more waits whole; one that would not fit an
    empty step is cut, which is safe because every prefix of a tree is a tree.
    """
    grants: list[Grant] = []
    free = max_rows
    answers = [_answer(i, want, max_rows) for i, want in enumerate(wants)]
    owed = min(CHUNK_BESIDE_TREES, sum(want.chain - 1 for want, answer in zip(wants, answers, strict=True) if answer is None))
    for grant in answers:
        if grant is not None and grant.rows <= free - (owed if grants else 0):  # the rounds of many must not starve a prompt
            grants.append(grant)
            free -= grant.rows
    if grants:
        free = min(free, CHUNK_BESIDE_TREES)
    for i, want in enumerate(wants):
        chain = min(want.chain - 1, free)  # the root stays behind: its row makes the token
        if chain > 0 and answers[i] is None:
            grants.append(Grant(i, chain, False))
            free -= chain
    return grants


def _answer(index: int, want: Want, max_rows: int) -> Grant | None:
    """The grant that answers `want` with a token, or None if more of its prompt must be computed first."""
    if not want.token or want.chain > max_rows:
        return None
    if want.nodes == 0:
        return Grant(index, want.chain, True)
    room = min(MAX_ROWS_PER_TREE, max_rows) - want.chain
    if room < want.nodes and want.chain > 1:
        return None  # the rest of the prompt first, then the root with the whole tree
    return Grant(index, want.chain, True, min(want.nodes, room))
