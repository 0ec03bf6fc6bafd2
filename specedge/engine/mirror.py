"""Mirror: the server's copy of a tree that grows at an edge, so that the next step need not wait for the network.

An edge sends a tree and, while it is verified, the nodes that its growth adds. When a verdict moves the root to one of those nodes the server has the
next tree already and verifies it in the very next step, while the verdict is on its way: neither a round trip nor a draft forward is waited for.
Nodes are known by numbers that count on from the last whole tree, so what an edge sent before it knew of a verdict is understood after it.

`go_on` decides who goes on so. Whoever has a tree does. Whoever has none, because the verdict was not foreseen, goes on with the root alone if there
is a step for others anyway: its row costs next to nothing there, brings a token, and the tree that is grown meanwhile is as good. But not twice in a
row, or where a round trip takes longer than a step no tree would ever come in time (12 tokens a second for 22, in virtual time).

Knows nothing of messages, models or clocks. Invariant: what is held is a tree below its root; nodes elsewhere are forgotten, and so is whatever
names one of them as its parent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from specedge.engine.engine import Engine
from specedge.engine.request import Verdict
from specedge.tree import EMPTY, MAX_NODES, NUMBERS, TokenTree, TreeError, make_tree

HELD = 1024  # nodes at a time: of more, those that come last are forgotten; honest edges had up to 580


@dataclass(slots=True)
class Node:
    token: int
    cost: int  # the lower, the likelier; never below its parent's
    children: dict[int, int] = field(default_factory=dict)  # token -> number


class Mirror:
    """Rows 1..N of the `tree` of round `round` are nodes 1..N, 0 is its root. Further trees have at most `most` nodes."""

    def __init__(self, tree: TokenTree, round: int, most: int = MAX_NODES) -> None:
        self.round, self.most = round, most  # the one whose tree is verified
        self.bare = False  # whether that has no more than its root, since nobody knew better
        self._number(tree)

    def _number(self, tree: TokenTree) -> None:
        self.since = self.round  # the round of which on nodes are numbered so
        self.next = 1  # number of the next node
        self._nodes: dict[int, Node] = {0: Node(-1, 0)}
        self._root = 0
        self._rows = list(range(len(tree) + 1))  # numbers of the tree that is verified, by its rows
        for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
            self._add(token, parent, 0)

    @property
    def size(self) -> int:
        """Nodes below the root."""
        return len(self._nodes) - 1

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

    def _add(self, token: int, parent: int, step: int) -> None:
        above = self._nodes.get(parent)
        if above is not None and token not in above.children and len(self._nodes) <= HELD:
            above.children[token] = self.next
            self._nodes[self.next] = Node(token, above.cost + step)
        self.next += 1

    def move(self, row: int, token: int) -> bool:
        """The path to `row` of the tree that was verified was accepted and `token` follows: make that node the root. False if it is not here."""
        root = self._nodes[self._rows[row]].children.get(token)
        if root is None:
            return False
        kept, stack = dict[int, Node](), [root]
        while stack:
            number = stack.pop()
            kept[number] = self._nodes[number]
            stack.extend(kept[number].children.values())
        self._nodes, self._root = kept, root
        return True

    def begin(self, known: bool) -> None:
        """The next round, below the present root or, if that was not `known`, below one without children, the first of new numbers."""
        self.round += 1
        if not known:
            self._number(EMPTY)
        self.bare = not self.size

    def tree(self, most: int) -> TokenTree:
        """The best nodes below the root, `most` at most, in falling order of score: from now on the tree that is verified."""
        best = sorted((n.cost, number) for number, n in self._nodes.items() if number != self._root)[: min(most, self.most)]
        self._rows = [self._root, *(number for _, number in best)]
        row = {number: i for i, number in enumerate(self._rows)}
        parent = {child: row[number] for number in self._rows for child in self._nodes[number].children.values()}
        return make_tree([self._nodes[n].token for n in self._rows[1:]], [parent[n] for n in self._rows[1:]])


def go_on(engine: Engine, found: Sequence[tuple[Verdict, Mirror | None]], now: float) -> list[TokenTree | None]:
    """Begin the next round of those that can go on: offers their trees and returns them, None for whoever waits for its edge. `found`: what a step
    found, with the copy of each edge's tree, if it sends what grows."""
    ahead = [m is not None and not v.finish and not v.sequence.alone and v.sequence.acceptance.budget > 0 for v, m in found]
    known = [can and m is not None and m.move(v.row, v.tokens[-1]) for can, (v, m) in zip(ahead, found, strict=True)]
    trees = [known[i] and m is not None and m.size > 0 for i, (_, m) in enumerate(found)]
    step = any(trees) or any(s.wants_token and not s.held and not s.batch for s in engine.line.running)
    offered: list[TokenTree | None] = []
    for i, (v, m) in enumerate(found):
        offered.append(None)
        if m is None or not ahead[i] or not (trees[i] or (step and not m.bare)):
            continue
        m.begin(known[i])
        offered[-1] = tree = m.tree(v.sequence.acceptance.budget)
        engine.offer(v.sequence, tree, now)
    return offered
