"""TokenTree against brute force: which lists are trees, what a fault is called, and every walk over a tree."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specedge.tree import EMPTY, MAX_NODES, TokenTree, TreeError, make_tree

VOCAB = 6


def faulty_rows(tokens: list[int], parents: list[int], vocab: int) -> set[int]:
    """Rows that keep the list from being a tree, found one by one."""
    seen, wrong = set(), set()
    for row, (token, parent) in enumerate(zip(tokens, parents, strict=True), 1):
        if parent >= row or token >= vocab or (parent, token) in seen:
            wrong.add(row)
        seen.add((parent, token))
    return wrong


def up(tree: TokenTree, row: int) -> list[int]:
    """Rows from `row` up to the root, root included."""
    walk = [row]
    while walk[-1] != 0:
        walk.append(int(tree.parents[walk[-1] - 1]))
    return walk


@st.composite
def lists(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Short lists of which about half are trees: parents at most one row too far, tokens at most one too large."""
    n = draw(st.integers(0, 12))
    kind = draw(st.sampled_from(["distinct", "any"]))
    tokens = draw(st.lists(st.integers(0, VOCAB), min_size=n, max_size=n) if kind == "any" else st.permutations(range(n)))
    return tokens, [draw(st.integers(0, row + (kind == "any"))) for row in range(n)]


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Trees of any size and shape: chains, stars and what lies between."""
    n = draw(st.integers(0, MAX_NODES) | st.integers(0, 10))
    reach = draw(st.integers(1, n + 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low = np.maximum(0, np.arange(n) - reach + 1)
    parents = rng.integers(low, np.arange(n) + 1)
    tokens, used = [], set()
    for parent in parents.tolist():
        token = int(rng.integers(3))
        while (parent, token) in used:
            token += 1
        used.add((parent, token))
        tokens.append(token)
    return make_tree(tokens, parents.tolist())


@settings(max_examples=400, deadline=None)
@given(lists(), st.integers(1, 12))
@example(([0], [0]), 1)
@example(([1], [0]), 1)
@example(([0], [1]), 1)
@example(([0, 0], [0, 0]), 1)
@example(([0, 0, 0], [0, 1, 1]), 1)
def test_check_accepts_exactly_the_trees(arrays: tuple[list[int], list[int]], vocab: int) -> None:
    wrong = faulty_rows(*arrays, vocab)
    if not wrong:
        make_tree(*arrays).check(vocab)
        return
    with pytest.raises(TreeError) as e:
        make_tree(*arrays).check(vocab)
    named = re.search(r"\brow (\d+)", str(e.value))
    assert named and int(named[1]) in wrong, f"'{e.value}' names none of the rows {wrong}"


@settings(max_examples=60, deadline=None)
@given(trees(), st.integers(0, 300))
def test_every_cut_is_a_tree_and_a_prefix(tree: TokenTree, n: int) -> None:
    vocab = int(tree.tokens.max(initial=0)) + 1
    tree.check(vocab)
    cut = tree.cut(n)
    cut.check(vocab)
    assert len(cut) == min(n, len(tree))
    assert cut.tokens.tolist() == tree.tokens.tolist()[:n] and cut.parents.tolist() == tree.parents.tolist()[:n]
    assert cut.ancestors() == tree.ancestors()[: n + 1] and cut.depths().tolist() == tree.depths().tolist()[: n + 1]


@settings(max_examples=60, deadline=None)
@given(trees())
def test_walks_match_brute_force(tree: TokenTree) -> None:
    walks = [up(tree, row) for row in range(len(tree) + 1)]
    assert tree.ancestors() == [sum(1 << row for row in walk) for walk in walks]
    assert tree.depths().tolist() == [len(walk) - 1 for walk in walks] and tree.depths().dtype == np.int32
    assert [tree.path(row) for row in range(len(tree) + 1)] == [walk[-2::-1] for walk in walks]


@settings(max_examples=60, deadline=None)
@given(trees())
def test_children_lead_down_the_paths(tree: TokenTree) -> None:
    below = tree.children()
    assert len(below) == len(tree) + 1 and sum(map(len, below)) == len(tree)
    for row in range(1, len(tree) + 1):
        assert below[int(tree.parents[row - 1])][int(tree.tokens[row - 1])] == row
        at = 0
        for step in tree.path(row):
            at = below[at][int(tree.tokens[step - 1])]
        assert at == row


# ---- by hand ----


def test_a_tree_written_out() -> None:
    #  root 0 - 1(7) - 2(8)
    #                - 4(9) - 5(8)
    #         - 3(9)
    tree = make_tree([7, 8, 9, 9, 8], [0, 1, 0, 1, 4])
    tree.check(10)
    assert tree.depths().tolist() == [0, 1, 2, 1, 2, 3]
    assert tree.ancestors() == [0b1, 0b11, 0b111, 0b1001, 0b10011, 0b110011]
    assert tree.path(5) == [1, 4, 5] and tree.path(3) == [3] and tree.path(0) == []
    assert tree.children() == [{7: 1, 9: 3}, {8: 2, 9: 4}, {}, {}, {8: 5}, {}]


def test_the_empty_tree() -> None:
    EMPTY.check(1)
    assert len(EMPTY) == 0 and EMPTY.ancestors() == [1] and EMPTY.depths().tolist() == [0] and EMPTY.children() == [{}]
    assert EMPTY.tokens.dtype == np.uint32 and EMPTY.parents.dtype == np.uint8


@pytest.mark.parametrize("shape", [lambda row: row, lambda row: 0, lambda row: row // 2])
def test_255_nodes_are_a_tree_and_256_are_not(shape: Callable[[int], int]) -> None:
    parents = [shape(row) for row in range(MAX_NODES)]
    tree = make_tree(list(range(MAX_NODES)), parents)
    tree.check(MAX_NODES)
    assert tree.ancestors()[-1].bit_length() == 256
    with pytest.raises(TreeError, match="256 nodes, at most 255"):
        make_tree(list(range(MAX_NODES + 1)), [*parents, 0]).check(1000)


@pytest.mark.parametrize(
    ("tokens", "parents", "words"),
    [
        ([5], [1], "row 1 names row 1 as its parent"),
        ([5, 6], [0, 2], "row 2 names row 2 as its parent"),
        ([5, 6, 7], [0, 3, 0], "row 2 names row 3 as its parent"),
        ([5, 6, 7], [0, 255, 255], "row 2 names row 255 as its parent"),
        ([5, 6, 5], [0, 0, 0], "row 3 "),
        ([5, 6, 6, 6], [0, 1, 0, 1], "row 4 "),
        ([5, 100], [0, 1], "row 2 .*100"),
        ([2**32 - 1, 5], [0, 1], "row 1 .*4294967295"),
    ],
)
def test_a_fault_names_its_row(tokens: list[int], parents: list[int], words: str) -> None:
    with pytest.raises(TreeError, match=words):
        make_tree(tokens, parents).check(100)


@pytest.mark.parametrize("token", [99, 100, 2**31, 2**32 - 1])
def test_the_vocabulary_is_a_sharp_limit(token: int) -> None:
    tree = make_tree([0, token], [0, 0])
    tree.check(token + 1)
    with pytest.raises(TreeError, match=f"{token}.*vocabulary of {token}"):
        tree.check(token)


def test_large_ids_are_not_taken_for_other_parents() -> None:
    for bit in range(16, 32):
        make_tree([5, 1 << bit, 0, (1 << bit) - 1], [0, 0, 1, 2]).check(2**32)


@pytest.mark.parametrize(("tokens", "parents"), [([1], []), ([], [0]), ([1, 2], [0, 1, 2])])
def test_lengths_must_agree(tokens: list[int], parents: list[int]) -> None:
    with pytest.raises(TreeError, match=f"{len(tokens)} tokens but {len(parents)} parents"):
        make_tree(tokens, parents).check(10)


@pytest.mark.parametrize(("tokens", "parents"), [([-1], [0]), ([2**32], [0]), ([1], [-1]), ([1], [256])])
def test_values_beyond_their_types_are_refused(tokens: list[int], parents: list[int]) -> None:
    with pytest.raises(OverflowError):
        make_tree(tokens, parents)
