"""What a Drafter holds of a text: its nodes, and the tree that they make.

Knows nothing of models, times or how trees grow. Invariant: a node's parent comes before it and is at least as likely.
"""

import math
from dataclasses import dataclass, field

from specedge.config import MAX_ROWS_PER_TREE, SamplingParams
from specedge.engine.calibration import Calibration
from specedge.engine.pace import Rate
from specedge.engine.pages import PageTable
from specedge.tree import GROWN

WORTHY = math.log(1e-3)  # a node that is reached more seldom is not told of: 5e-3 sends a third and costs 5 % of tokens/s, in virtual time
STEPS, STEEP = 32, 255  # into which a natural logarithm of likelihood is divided on the wire, and the most of them


@dataclass(slots=True, eq=False)
class Node:
    """A drafted token. `score`: log of the estimated probability that verification reaches it, relative to some older root."""

    token: int
    parent: "Node | None"
    score: float
    order: int  # of creation: a parent comes before its children
    depth: int  # below the root of its creation
    rank: int = 0  # among its siblings, by what the draft thinks of them
    log_p: float = 0.0  # which is this
    slot: int = -1  # row of the session's region in the row buffer; -1 while unexpanded
    number: int = 0  # by which a server knows it; 0: it does not, or this is the root
    seen: int = 0  # bit set of the slots of this node and its ancestors, once expanded
    children: "dict[int, Node]" = field(default_factory=dict)

    def path(self) -> list[int]:
        """Tokens from below the root down to this node."""
        tokens, node = list[int](), self
        while node.parent is not None:
            tokens.append(node.token)
            node = node.parent
        return tokens[::-1]


@dataclass(slots=True, eq=False)
class Session:
    """One text on the edge: its tokens, the tree below the last of them, and the region of the row buffer that it owns."""

    tokens: list[int]
    params: SamplingParams
    prompt_len: int
    limit: int  # length at which the text ends at the latest
    stop: frozenset[int]
    vocab: int  # of the target: other ids are not for it
    table: PageTable
    base: int  # first row of its region
    root: Node
    calibration: Calibration
    computed: int = 0
    free: list[int] = field(default_factory=lambda: list(range(MAX_ROWS_PER_TREE)))  # a heap: low slots first keep the key range short
    heap: list[tuple[float, int, Node]] = field(default_factory=list)  # unexpanded nodes, best first
    nodes: list[Node] = field(default_factory=list)  # all below the root
    best: list[float] = field(default_factory=list)  # scores of as many of the best nodes as a tree may have, rising
    submitted: list[Node] | None = None  # nodes of the tree whose verdict is awaited; none of one that the server has made by itself
    told: int = 0  # nodes that a server has been told of since they were last numbered
    told_at: float = 0.0  # when it was told last
    tellings: int = 0  # since the last verdict
    unasked: bool = False  # the server has begun the round that is awaited by itself
    asleep: bool = False  # nothing is drafted
    forwards: int = 0  # that grew the present tree
    size: int = 7  # nodes of the last tree
    others: int = 0  # rows of other texts in the step that verified it
    sent: float = 0.0  # when it was submitted
    since: float | None = None  # the last verdict
    rate: Rate = field(default_factory=Rate)

    @property
    def live(self) -> int:
        """Rows in the row buffer."""
        return MAX_ROWS_PER_TREE - len(self.free)

    @property
    def exhausted(self) -> bool:
        """Whether the draft's context is used up, so that nothing can be drafted."""
        return len(self.tokens) >= self.limit

    def number(self, best: list[Node]) -> None:
        """Begin anew to number nodes: a server has `best` and the root."""
        for node in (self.root, *self.nodes):
            node.number = 0
        for i, node in enumerate(best, 1):
            node.number = i
        self.told = len(best)

    def news(self) -> list[tuple[int, int, int]]:
        """The nodes that a server should know of and does not, the likeliest first, GROWN at most: (token, number of the parent, steps by which it is
        less likely). From now on it does, by the numbers that come next."""
        least, found = self.root.score + WORTHY, []
        for node in sorted((n for n in self.nodes if not n.number and n.score >= least), key=lambda n: (-n.score, n.order))[:GROWN]:
            assert node.parent is not None
            self.told += 1
            node.number = self.told
            found.append((node.token, node.parent.number, min(STEEP, round(STEPS * (node.parent.score - node.score)))))
        return found
