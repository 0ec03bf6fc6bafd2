"""Who gets how many rows of the next step: a pure function of what every sequence wants.

There is no prefill, decode or verify phase. A sequence has a chain of tokens without K/V that ends in its root, and perhaps a tree below the
root; it is given rows from the front of that list. Knows nothing of tensors, clocks or sockets. Invariants: the rows of a step never
pass `max_rows`; accounts take turns, and within an account whoever has waited longest goes first, so nobody waits for ever.
"""

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from specedge.config import MAX_ROWS_PER_TREE

CHUNK_BESIDE_TREES = 64  # prompt rows in a step that also verifies: a joining prompt must not hold up the rounds of others


@dataclass(frozen=True, slots=True)
class Want:
    """`chain` tokens without K/V, the root last; `token`: its next token is wanted; `nodes` below the root; `account`: who pays for the rows."""

    chain: int
    token: bool
    nodes: int = 0
    account: Hashable = None

    @property
    def rows(self) -> int:
        return self.chain + self.nodes if self.token else self.chain - 1


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


def schedule(wants: Sequence[Want], max_rows: int, ahead: dict[Hashable, int] | None = None) -> list[Grant]:
    """Divide `max_rows` rows among `wants`, which come in order of waiting time, longest first. `ahead` is the state of `turns`, for the next step.

    First those whose next token is in reach, then prompt chunks. A tree that does not fit any more waits whole; one that would not fit an
    empty step is cut, which is safe because every prefix of a tree is a tree.
    """
    ahead = {} if ahead is None else ahead
    order = turns(wants, ahead)
    grants = _divide(wants, order, max_rows)
    _settle(wants, grants, ahead)
    return grants


def turns(wants: Sequence[Want], ahead: dict[Hashable, int]) -> list[int]:
    """The order in which `wants` are served: deficit round robin. The turn goes to the account that has had the fewest rows, `ahead` of the
    one furthest behind, and within it to the longest wait. Who was not kept waiting before has no credit from it: it begins with the last."""
    queues: dict[Hashable, deque[int]] = {}
    for i, want in enumerate(wants):
        queues.setdefault(want.account, deque()).append(i)
    first = min(ahead.values(), default=0)
    heap = [(ahead.get(account, first), queue[0], queue) for account, queue in queues.items()]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        rows, i, queue = heapq.heappop(heap)
        order.append(queue.popleft())
        if queue:
            heapq.heappush(heap, (rows + min(wants[i].rows, MAX_ROWS_PER_TREE), queue[0], queue))
    return order


def _settle(wants: Sequence[Want], grants: list[Grant], ahead: dict[Hashable, int]) -> None:
    """Charge what was granted to the accounts that are still owed something; the others have had all that they wanted."""
    had = {g.index: g.rows for g in grants}
    waiting = {w.account for i, w in enumerate(wants) if had.get(i, 0) < w.rows}
    first = min(ahead.values(), default=0)
    total = {a: ahead.get(a, first) + sum(rows for i, rows in had.items() if wants[i].account == a) for a in waiting}
    ahead.clear()
    ahead.update({a: rows - min(total.values()) for a, rows in total.items()})


def _divide(wants: Sequence[Want], order: list[int], max_rows: int) -> list[Grant]:
    grants: list[Grant] = []
    free = max_rows
    answers = {i: _answer(i, wants[i], max_rows) for i in order}
    owed = min(CHUNK_BESIDE_TREES, sum(wants[i].chain - 1 for i, answer in answers.items() if answer is None))
    for grant in answers.values():
        if grant is not None and grant.rows <= free - (owed if grants else 0):  # the rounds of many must not starve a prompt
            grants.append(grant)
            free -= grant.rows
    if grants:
        free = min(free, CHUNK_BESIDE_TREES)
    for i in order:
        chain = min(wants[i].chain - 1, free)  # the root stays behind: its row makes the token
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
