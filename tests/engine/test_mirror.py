"""The server's copy of a growing tree against a list of paths, and who goes on without being asked."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specedge.engine.admission import Acceptance
from specedge.engine.mirror import BARE, HELD, Mirror, catch_up, go_on
from specedge.tree import EMPTY, NUMBERS, TokenTree, TreeError, make_tree
from tests.net.test_sessions import likely

NODES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 30), st.integers(0, 9)), max_size=12)


class Paths:
    """What a Mirror says it does, by the tokens from the first root down to every node."""

    def __init__(self) -> None:
        self.path: dict[int, tuple[int, ...] | None] = {0: ()}  # by number; None: it is not there
        self.cost: dict[tuple[int, ...], tuple[int, int]] = {(): (0, 0)}  # with the number

    def add(self, token: int, parent: int, step: int) -> None:
        number, above = len(self.path), self.path[parent]
        new = None if above is None or above not in self.cost or (*above, token) in self.cost else (*above, token)
        self.path[number] = new
        if new is not None and above is not None:
            self.cost[new] = (self.cost[above][0] + step, number)

    def move(self, root: tuple[int, ...]) -> None:
        self.cost = {p: c for p, c in self.cost.items() if p[: len(root)] == root}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NODES, st.integers(1, 9), st.integers(0, 99), st.integers(0, 3)), max_size=8))
def test_the_best_nodes_below_the_root(rounds: list[tuple[list[tuple[int, int, int]], int, int, int]]) -> None:
    """Grow, take a tree of so many nodes, accept a row of it and a token, and again: numbers stay, what is elsewhere is gone."""
    mirror, paths, root = Mirror(EMPTY, 1), Paths(), ()
    tree = EMPTY
    for nodes, most, row, token in rounds:
        first = mirror.next
        nodes = [(t, p % (first + i), s) for i, (t, p, s) in enumerate(nodes)]
        mirror.add(1, first, [n[0] for n in nodes], [n[1] for n in nodes], [n[2] for n in nodes])
        for node in nodes:
            paths.add(*node)
        tokens = (*tree.texts()[row % (len(tree) + 1)], token)
        known = (*root, *tokens) in paths.cost
        assert mirror.move(tokens) == known and mirror.next == len(paths.path)
        if not known:
            assert mirror.size == len(mirror.begin(most)) == 0 and mirror.next == 1
            return
        root += tokens
        paths.move(root)
        assert mirror.size == len(paths.cost) - 1
        tree = mirror.begin(most)
        tree.check(4)
        below = sorted((c, p) for p, c in paths.cost.items() if p != root)[:most]
        assert [root + t for t in tree.texts()[1:]] == [p for _, p in below]


def test_rows_of_a_whole_tree_are_the_first_numbers() -> None:
    mirror = Mirror(make_tree([5, 6, 7], [0, 1, 1]), 4)
    mirror.add(mirror.since, mirror.next, [8, 9, 9], [2, 4, 3], [1, 1, 1])
    assert (mirror.since, mirror.round, mirror.next, mirror.size) == (4, 4, 7, 6)
    assert mirror.move([5, 6, 8])
    assert mirror.begin(9).tokens.tolist() == [9] and (mirror.since, mirror.round, mirror.bare) == (4, 5, 0)
    mirror.add(mirror.since, mirror.next, [3, 3], [6, 5], [0, 0])  # the first below what is gone
    assert mirror.size == 2 and mirror.begin(9).parents.tolist() == [0, 1]
    assert not mirror.move([9, 4]) and mirror.size == 0
    assert len(mirror.begin(9)) == 0 and (mirror.since, mirror.round, mirror.next, mirror.bare) == (7, 7, 1, 1)
    assert not mirror.move([9]) and len(mirror.begin(9)) == 0 and mirror.bare == 2


def test_a_root_that_comes_later() -> None:
    """As soon as it is here it is the root; and after a round that has begun so the edge numbers its nodes anew."""
    mirror = Mirror(make_tree([5, 6], [0, 1]), 4)
    assert not mirror.move([5, 6, 7, 8])
    mirror.add(4, 3, [7, 9], [2, 2], [1, 0])
    assert mirror.size == 0
    mirror.add(4, 5, [1, 8, 2, 3], [4, 3, 6, 7], [1, 1, 0, 2])
    assert mirror.size == 2
    engine, sequence = Engine(), Sequence(Acceptance(budget=31))
    assert catch_up(engine, sequence, mirror, 1.0) and engine.offers == [(sequence, [2, 3])]  # type: ignore[arg-type]
    assert (mirror.round, mirror.since, mirror.late) == (5, 4, True)
    assert mirror.move([2]) and mirror.begin(9).tokens.tolist() == [3]
    assert (mirror.round, mirror.since, mirror.next, mirror.late) == (6, 6, 1, False)


@pytest.mark.parametrize("how", [{"alone": True}, {"budget": 0}])
def test_who_does_not_catch_up(how: dict[str, Any]) -> None:
    """Nor does who has no more than the root: the tree that was asked for is on its way."""
    engine, mirror, bare = Engine(), ahead(5, 6), ahead(5)
    assert mirror.move([5]) and bare.move([5])
    (verdict, _) = found(5, None, **how)
    assert not catch_up(engine, verdict.sequence, mirror, 1.0)  # type: ignore[arg-type]
    assert not catch_up(engine, Sequence(Acceptance()), bare, 1.0) and not engine.offers  # type: ignore[arg-type]


def test_what_cannot_be_is_refused_whole() -> None:
    mirror = Mirror(EMPTY, 1)
    for parents in ([1], [0, 2], [0, NUMBERS - 1]):
        with pytest.raises(TreeError, match=r"node \d+ names node \d+ as its parent, which is not before it"):
            mirror.add(mirror.since, mirror.next, [1] * len(parents), parents, [0] * len(parents))
    mirror.next = NUMBERS - 1
    with pytest.raises(TreeError, match="pass the last number 65535"):
        mirror.add(mirror.since, mirror.next, [1, 2], [0, 0], [0, 0])
    assert mirror.size == 0
    mirror.add(mirror.since, mirror.next, [1], [0], [0])
    assert mirror.size == 1


def test_what_is_not_next_is_dropped() -> None:
    mirror = Mirror(make_tree([5], [0]), 3)
    for since, first in ((2, 2), (4, 2), (3, 1), (3, 3)):
        mirror.add(since, first, [7], [1], [0])
    assert (mirror.size, mirror.next) == (1, 2)


def test_memory_is_bounded() -> None:
    mirror = Mirror(EMPTY, 1)
    for i in range(2 * HELD):
        mirror.add(mirror.since, mirror.next, [i], [0], [0])
    assert mirror.size == HELD


@dataclass(eq=False)
class Sequence:
    acceptance: Acceptance
    alone: bool = False
    finish: str = ""
    wants_token: bool = False
    held: bool = False
    batch: bool = False


class Engine:
    """Takes offers."""

    def __init__(self, *running: Sequence) -> None:
        self.line = SimpleNamespace(running=running)
        self.offers: list[tuple[Sequence, list[int]]] = []

    def offer(self, sequence: Sequence, tree: TokenTree, at: float) -> None:
        self.offers.append((sequence, tree.tokens.tolist()))


def found(token: int, mirror: Mirror | None, **how: Any) -> tuple[Any, Mirror | None]:
    """A verdict whose root is followed by `token`."""
    finish = how.pop("finish", "")
    sequence = Sequence(Acceptance(budget=how.pop("budget", 31)), finish=finish, **how)
    return SimpleNamespace(sequence=sequence, tokens=(token,), finish=finish), mirror


def ahead(*tokens: int, most: int = 31) -> Mirror:
    """A chain."""
    mirror = Mirror(EMPTY, 1, most)
    mirror.add(1, 1, list(tokens), list(range(len(tokens))), [1] * len(tokens))
    return mirror


def sizes(*verdicts: tuple[Any, Mirror | None], running: tuple[Sequence, ...] = ()) -> list[int | None]:
    engine = Engine(*running)
    begun = go_on(engine, verdicts, 1.0)  # type: ignore[arg-type]
    offers = iter(engine.offers)
    assert [v.sequence for (v, _), on in zip(verdicts, begun, strict=True) if on] == [s for s, _ in engine.offers]
    return [len(next(offers)[1]) if on else None for on in begun]


def test_who_goes_on() -> None:
    """Whoever has a tree; and beside others whoever has none, with the root alone."""
    assert sizes(found(5, ahead(5, 6, 7))) == [2]
    assert sizes(found(5, ahead(5, 6, 7), budget=1)) == [1] == sizes(found(5, ahead(5, 6, 7, most=1)))
    assert sizes(found(5, ahead(6))) == sizes(found(5, ahead(5))) == sizes(found(5, None)) == [None]
    assert sizes(found(5, ahead(5, 6)), found(5, ahead(6)), found(5, ahead(5)), found(5, None)) == [1, 0, 0, None]
    other = Sequence(Acceptance(), wants_token=True)
    assert sizes(found(5, ahead(6)), running=(other,)) == [0]
    for idle in (Sequence(Acceptance()), replace(other, held=True), replace(other, batch=True)):
        assert sizes(found(5, ahead(6)), running=(idle,)) == [None]


@pytest.mark.parametrize("how", [{"finish": "stop"}, {"alone": True}, {"budget": 0}])
def test_who_never_does(how: dict[str, Any]) -> None:
    assert sizes(found(5, ahead(5, 6), **how), found(5, ahead(5, 6))) == [None, 1]


def test_nobody_goes_on_bare_for_long() -> None:
    """Where a round trip takes longer than a step no tree would ever come in time."""
    mirror, other = ahead(6), ahead(*[5] * 9)
    for i in range(BARE):
        assert sizes(found(5, mirror), found(5, other)) == [0, 8 - i] and (mirror.since, mirror.next) == (2 + i, 1)
    assert sizes(found(5, mirror), found(5, other)) == [None, 8 - BARE]
    mirror, other = ahead(6), ahead(*[5] * 9)
    sizes(found(5, mirror), found(5, other))
    mirror.add(mirror.since, mirror.next, [5, 7, 7], [0, 1, 2], [0, 0, 0])
    assert sizes(found(5, mirror), found(5, other)) == [2, 7]
    for _ in range(BARE):
        assert sizes(found(9, mirror), found(5, other))[0] == 0, "a round with a tree lies between"


def test_the_offered_tail_of_a_tree_is_known_too() -> None:
    """A node that was cut by the server can be the next root."""
    mirror = Mirror(likely([1, 2, 3]), 1)
    assert mirror.move([1, 2]) and mirror.begin(9).tokens.tolist() == [4, 3]
