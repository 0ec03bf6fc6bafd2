"""Mirror: the server's copy of a tree that grows at an edge, so that the next step need not wait for the network.

An edge sends a tree and, while it is verified, the nodes that its growth adds. When a verdict moves the root to one of those nodes the server has the
next tree already and verifies it in the very next step, while the verdict is on its way: neither a round trip nor a draft forward is waited for.
Nodes are known by numbers that count on from the last whole tree, so what an edge sent before it knew of a verdict is understood after it.

`go_on` decides who goes on so. Whoever has a tree does. Whoever has none, because the verdict was not foreseen, goes on with the root alone if there
is a step for others anyway: its row costs next to nothing there, brings a token, and the tree that is grown meanwhile is as good. But not more than
`BARE` times in a row, or where a round trip takes longer than a step no tree would ever come in time (12 tokens a second for 22, in virtual time).
Whoever waits for its edge may still be spared the way back: `catch_up`, when what was on the wire by then has brought the new root.

Knows nothing of messages, models or clocks. Invariant: what is held is a tree below its root; nodes elsewhere are forgotten, and so is whatever
names one of them as its parent.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from specedge.engine import request
from specedge.engine.engine import Engine
from specedge.tree import EMPTY, MAX_NODES, NUMBERS, TokenTree, TreeError, make_tree

HELD = 1024  # nodes at a time: of more, those that come last are forgotten; honest edges had up to 580
BARE = 2  # once and twice are alike at 15 ms; at 50, passes of 70 ms, twice brings 2 to 4 % to 2 sessions and 7 to 4, in virtual time


@dataclass(slots=True)
class Node:
    token: int
    cost: int  # the lower, the likelier; never below its parent's
    children: dict[int, int] = field(default_factory=dict)  # token -> number


class Mirror:
    """Rows 1..N of the `tree` of round `round` are nodes 1..N, 0 is its root. Further trees have at most `most` nodes."""

    def __init__(self, tree: TokenTree, round: int, most: int = MAX_NODES) -> None:
        self.round, self.most = round, most  # the one whose verdict is awaited, or was given last
        self.late = False  # whether that began without a word: the edge, which was asked for a tree, numbers its nodes anew
        self.bare = 0  # rounds in a row that had no more than their root, since nobody knew better
        self._number(tree)

    def _number(self, tree: TokenTree) -> None:
        self.since = self.round  # the round of which on nodes are numbered so
        self.next = 1  # number of the next node
        self._nodes: dict[int, Node] = {0: Node(-1, 0)}
        self._root = 0
        self._missing: Sequence[int] = ()  # tokens from the root down to the next one, as long as that is not here
        for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
            self._add(token, parent, 0)

    @property
    def size(self) -> int:
        """Nodes below the root."""
        return 0 if self._missing else len(self._nodes) - 1

    def add(self, since: int, first: int, tokens: list[int], parents: list[int], steps: list[int]) -> None:
        """Nodes `first` and on, numbered since round `since`, a parent before its children, each of `steps` more cost than its parent. If they are
        not the next ones, they come too late or after a loss and are dropped. Raises TreeError, and adds none, for a parent that is not before its
        child, or for more nodes than there are numbers."""
        if (since, first) != (self.since, self.next):
            return
        if self.next + len(tokens) > NUMBERS:
            raise TreeError(f"{len(tokens)} nodes from number {self.next} on pass the last number {NUMBERS - 1}")
        for number, parent in enumerate(parents, self.next):
            if parent >= number:
                raise TreeError(f"node {number} names node {parent} as its parent, which is not before it")
        for token, parent, step in zip(tokens, parents, steps, strict=True):
            self._add(token, parent, step)
        if self._missing:
            self.move(self._missing)

    def _add(self, token: int, parent: int, step: int) -> None:
        above = self._nodes.get(parent)
        if above is not None and token not in above.children and len(self._nodes) <= HELD:
            above.children[token] = self.next
            self._nodes[self.next] = Node(token, above.cost + step)
        self.next += 1

    def move(self, tokens: Sequence[int]) -> bool:
        """These follow the root: make the last of them the root. False if it is not here; then it becomes the root as soon as it is."""
        root = self._root
        for token in tokens:
            below = self._nodes[root].children.get(token)
            if below is None:
                self._missing = tokens
                return False
            root = below
        kept, stack = dict[int, Node](), [root]
        while stack:
            number = stack.pop()
            kept[number] = self._nodes[number]
            stack.extend(kept[number].children.values())
        self._nodes, self._root, self._missing = kept, root, ()
        return True

    def begin(self, most: int) -> TokenTree:
        """The next round: its tree, of the best nodes below the root, `most` at most, in falling order of score. Below a root that is not here there
        are none; then, and after a round that was late, that root is node 0 of new numbers."""
        self.round += 1
        tree = EMPTY if self._missing else self._best(min(most, self.most))
        self.bare = 0 if len(tree) else self.bare + 1
        if self._missing or self.late:
            self._number(EMPTY)
        self.late = False
        return tree

    def _best(self, most: int) -> TokenTree:
        best = heapq.nsmallest(most, ((n.cost, number) for number, n in self._nodes.items() if number != self._root))
        numbers = [self._root, *(number for _, number in best)]
        row = {number: i for i, number in enumerate(numbers)}
        parent = {child: row[number] for number in numbers for child in self._nodes[number].children.values()}
        return make_tree([self._nodes[n].token for n in numbers[1:]], [parent[n] for n in numbers[1:]])


def go_on(engine: Engine, found: Sequence[tuple[request.Verdict, Mirror | None]], now: float) -> list[bool]:
    """Begin the next round of those that can go on, by offering their trees; False for whoever waits for its edge. `found`: what a step found, with
    the copy of each edge's tree, if it sends what grows."""
    going = list[Mirror | None]()  # the copies of those that may
    for v, m in found:
        if m is not None and not v.finish:
            m.move(v.tokens)
        going.append(m if _may(v.sequence) else None)
    step = any(m is not None and m.size for m in going) or any(s.wants_token and not s.held and not s.batch for s in engine.line.running)
    begun = [m is not None and (m.size > 0 or (step and m.bare < BARE)) for m in going]
    for (v, _), m, on in zip(found, going, begun, strict=True):
        if m is not None and on:
            engine.offer(v.sequence, m.begin(v.sequence.acceptance.budget), now)
    return begun


def catch_up(engine: Engine, sequence: request.Sequence, mirror: Mirror, now: float) -> bool:
    """The same for one that waits for its edge, if the root of its next round has come meanwhile, and something below it. (A round trip of 50 ms:
    3 % more tokens a second for one and two sessions with passes of 70 ms; of 100 ms 4 to 12 %, in virtual time.)"""
    if not mirror.size or not _may(sequence):
        return False
    engine.offer(sequence, mirror.begin(sequence.acceptance.budget), now)
    mirror.late = True
    return True


def _may(s: request.Sequence) -> bool:
    """Whether it can do with a tree."""
    return not s.finish and not s.alone and s.acceptance.budget > 0
