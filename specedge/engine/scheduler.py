"""Who gets how many rows of the next step: a pure function of what every sequence wants.

There is no prefill, decode or verify phase. A sequence has a chain of tokens without K/V that ends in its root, and perhaps a tree below the
root; it is given rows from the front of that list. Knows nothing of tensors, clocks or sockets. Invariants: the rows of a step never
pass `max_rows`; accounts take turns, and within an account whoever has waited longest goes first, so nobody who is not batch waits for ever.
"""

import heapq
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from specedge.config import MAX_ROWS_PER_TREE
from specedge.engine.cost import ALL, CostModel

CHUNK_BESIDE_TREES = 64  # prompt rows in a step that also verifies, as long as the time of a step is not known
LONG = 2.0  # seconds that a step of prompts alone takes at most: whoever connects is answered between steps, and gives up after 5
STALL = 4  # empty steps that a step of prompts alone may take while rounds of others are expected
LEAST = 16  # such rows at least, however many are verified: no prompt starves


@dataclass(frozen=True, slots=True)
class Want:
    """`chain` tokens without K/V, the root last; `token`: its next token is wanted; `nodes` below the root; `account`: who pays for the rows;
    `batch`: it takes what others leave."""

    chain: int
    token: bool
    nodes: int = 0
    account: Hashable = None
    batch: bool = False

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


def schedule(
    wants: Sequence[Want], max_rows: int, credit: dict[Hashable, float] | None = None, cost: CostModel | None = None, most: int = ALL,
    expected: bool = False, order: list[int] | None = None,
) -> list[Grant]:  # fmt: skip
    """Divide `max_rows` rows among `wants`, which come in order of waiting time, longest first. `credit`: what accounts are owed of earlier steps; it
    is brought up to date. `cost`: what is known of the time of a step. `most`: sequences, batch apart, that get a token in it. `expected`: somebody
    else who is not batch may come while it runs, for whose sake prompts alone take no step of more than `STALL` times an empty one. `order`: whose
    turn it is, where that has been found already: trees that were cut since must not change it.

    First those whose next token is in reach, then prompt chunks. A tree that does not fit any more waits whole; one that would not fit an
    empty step, less what is owed to prompts, is cut, which is safe because every prefix of a tree is a tree. Last come those who are batch: beside
    others, and while others are expected, they have the rows under the knee that are left, to which their trees are cut; else the whole step.
    """
    credit = {} if credit is None else credit
    order = turns(wants, credit) if order is None else order
    grants = _divide(wants, [i for i in order if not wants[i].batch], max_rows, cost, most, expected)
    free = max_rows - sum(g.rows for g in grants)
    if grants or expected:
        free = min(free, (cost.knee if cost else 0) - (max_rows - free))
    grants += _fill(wants, [i for i in order if wants[i].batch], free)
    _settle(wants, grants, max_rows, credit)
    return grants


def turns(wants: Sequence[Want], credit: dict[Hashable, float]) -> list[int]:
    """The order in which `wants` are served: the turn goes to the account that is owed most, and within it to the longest wait."""
    queues: dict[Hashable, deque[int]] = {}
    for i, want in enumerate(wants):
        queues.setdefault(want.account, deque()).append(i)
    heap = [(-credit.get(account, 0), queue[0], queue) for account, queue in queues.items()]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        owed, i, queue = heapq.heappop(heap)
        order.append(queue.popleft())
        if queue:
            heapq.heappush(heap, (owed + min(wants[i].rows, MAX_ROWS_PER_TREE), queue[0], queue))
    return order


def _settle(wants: Sequence[Want], grants: list[Grant], max_rows: int, credit: dict[Hashable, float]) -> None:
    """Deficit round robin: every account has a right to its fair share of a step. Who is kept waiting is owed what it did not get of it, or owes
    what it got beyond, a step at most. What all of them are owed is forgotten: nobody could have had it, least of all who comes later. Who had all
    that it wanted begins anew. Batch is owed nothing."""
    had, wanted, waiting = Counter[Hashable](), Counter[Hashable](), set[Hashable]()
    granted = {g.index: g.rows for g in grants}
    for i, want in enumerate(wants):
        if want.rows and not want.batch:
            rows = granted.get(i, 0)
            had[want.account] += rows
            wanted[want.account] += want.rows
            if rows < want.rows:
                waiting.add(want.account)
    share = fair_share(max_rows, list(wanted.values()))
    owed = {a: credit.get(a, 0) + share - had[a] for a in waiting}
    idle = max(0, min(owed.values(), default=0))
    credit.clear()
    credit.update({a: max(-max_rows, min(n - idle, max_rows)) for a, n in owed.items()})


def fair_share(rows: int, wanted: Sequence[int]) -> float:
    """The most that anybody gets of `rows` under max-min fairness: who wants less has what is `wanted`, all others have this."""
    least = sorted(wanted)
    return max(((rows - sum(least[:i])) / (len(least) - i) for i in range(len(least))), default=rows)


def chunk(rows: int, answers: int, prompts: int, cost: CostModel | None) -> int:
    """Prompt rows beside `rows` rows that answer `answers` sequences, while `prompts` prompts wait. They fill what is free under the knee; beyond it
    a prompt gets the time that each of the others has, and all prompts together no more than all others, so that a step takes at most twice its time;
    but `LEAST` rows in any case."""
    if cost is None or not cost.confident:
        return CHUNK_BESIDE_TREES
    time = min(1.0, prompts / answers) * cost.predict(rows, 0)
    return max(LEAST, cost.room(rows, time))


def chunk_alone(expected: bool, cost: CostModel | None) -> int:
    """Prompt rows of a step without answers: a whole step, but for `expected` and `LONG`."""
    if cost is None or not cost.confident:
        return ALL
    time = cost.predict(1, 0)
    return max(LEAST, cost.room(0, min(LONG - time, (STALL - 1) * time) if expected else LONG - time))


def owed_to_prompts(waiting: int, max_rows: int) -> int:
    """Rows of a step that trees leave to `waiting` rows of prompts."""
    return min(CHUNK_BESIDE_TREES, max_rows // 2, waiting)


def _divide(wants: Sequence[Want], order: list[int], max_rows: int, cost: CostModel | None, most: int, expected: bool) -> list[Grant]:
    grants: list[Grant] = []
    answers = {i: _answer(i, wants[i], max_rows) for i in order}
    rooted = [g.rows for g in answers.values() if g is not None and g.chain == 1][:most]  # of those who have computed all but their roots
    longest = chunk(sum(rooted), len(rooted), 1, cost) if rooted else chunk_alone(expected, cost)
    answers = {i: g if g is not None and g.chain - 1 <= longest else None for i, g in answers.items()}  # the others are prompts
    owed = owed_to_prompts(sum(wants[i].chain - 1 for i, answer in answers.items() if answer is None), max_rows)
    free = max_rows - owed  # the rounds of others must not starve a prompt
    answers = {i: g if g is not None and g.chain <= free else None for i, g in answers.items()}
    for grant in answers.values():
        if grant is not None and len(grants) < most:
            if not grants and grant.rows > free:
                grant = replace(grant, nodes=free - grant.chain)
            if grant.rows <= free:
                grants.append(grant)
                free -= grant.rows
    free += owed
    prompts = [i for i in order if answers[i] is None and wants[i].chain > 1]
    if prompts:
        free = min(free, chunk(max_rows - free, len(grants), len(prompts), cost) if grants else chunk_alone(expected, cost))
    for i in prompts:
        chain = min(wants[i].chain - 1, free)  # the root stays behind: its row makes the token
        if chain > 0:
            grants.append(Grant(i, chain, False))
            free -= chain
    return grants


def _fill(wants: Sequence[Want], order: list[int], free: int) -> list[Grant]:
    """Divide `free` rows among those who are batch."""
    grants: list[Grant] = []
    for i in order:
        if free <= 0:
            break
        grant = _answer(i, wants[i], free) or Grant(i, min(wants[i].chain - 1, free), False)
        if grant.rows:
            grants.append(grant)
            free -= grant.rows
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
