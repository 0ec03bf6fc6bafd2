"""attention: equal to the reference, and the same bits for a query wherever its keys lie and whatever it is batched with."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specedge import kernels
from specedge.kernels import reference

NAN = float("nan")


@dataclass
class Part:
    """One sequence: its committed keys and values, and the rows of the step."""

    old: Tensor  # [2, prefix, Hkv, D]
    q: Tensor  # [nq, Hq, D]
    q_pos: Tensor  # [nq]
    new: Tensor  # [2, nk, Hkv, D]
    k_pos: Tensor  # [nk]
    seen: Tensor | None = None  # [nq, nk] bool; None is causal


def words(seen: Tensor) -> Tensor:
    """[nq, nk] bool -> ancestor words [nq, ceil(nk / 64)] int64."""
    out = torch.zeros(len(seen), (seen.shape[1] + 63) // 64, dtype=torch.int64)
    for j in range(seen.shape[1]):
        out[:, j // 64] |= seen[:, j].long() << (j % 64)
    return out


def arguments(parts: list[Part], size: int, window: int, seed: int = 0) -> tuple[Any, ...]:
    """Lay the parts out: permuted pages, gaps between rows, NaN in all that belongs to nobody."""
    gen = torch.Generator().manual_seed(seed)
    _, kv_heads, dim = parts[0].new.shape[1:]
    need = [(p.old.shape[1] + size - 1) // size for p in parts]
    order = torch.randperm(sum(need) + 3, generator=gen).tolist()
    pages = torch.full((2, len(order), kv_heads, size, dim), NAN).to(parts[0].q.dtype)
    table = torch.full((len(parts), max(*need, 1) + 1), -7, dtype=torch.int32)
    rows = torch.full((2, sum(len(p.k_pos) + 2 for p in parts), kv_heads, dim), NAN).to(pages.dtype)
    q = torch.full((sum(len(p.q) + 1 for p in parts), *parts[0].q.shape[1:]), NAN).to(pages.dtype)
    q_pos, k_pos = torch.full((len(q),), -9, dtype=torch.int32), torch.full((rows.shape[1],), -9, dtype=torch.int32)
    anc = torch.full((len(q), max((len(p.k_pos) + 63) // 64 for p in parts)), -1, dtype=torch.int64)
    segments, q0, k0 = [], 1, 2
    for b, p in enumerate(parts):
        for i in range(need[b]):
            table[b, i] = order.pop()
            piece = p.old[:, i * size : (i + 1) * size]
            pages[:, table[b, i], :, : piece.shape[1]] = piece.transpose(1, 2)
        nq, nk = len(p.q), len(p.k_pos)
        q[q0 : q0 + nq], q_pos[q0 : q0 + nq] = p.q, p.q_pos
        rows[:, k0 : k0 + nk], k_pos[k0 : k0 + nk] = p.new, p.k_pos
        if p.seen is not None:
            w = words(p.seen)
            anc[q0 : q0 + nq, : w.shape[1]] = w
        segments.append((q0, nq, k0, nk, p.old.shape[1], int(p.seen is None)))
        q0, k0 = q0 + nq + 1, k0 + nk + 2
    return q, rows, pages, torch.tensor(segments, dtype=torch.int32), table, q_pos, k_pos, anc, q.shape[-1] ** -0.5, window


def run(parts: list[Part], size: int = 64, window: int = 0, op: Any = kernels.attention, **extra: Any) -> list[Tensor]:
    """The output of every part; all other rows must be zero."""
    args = arguments(parts, size, window, **extra)
    out = op(*args)
    outputs = [out[s[0] : s[0] + s[1]].clone() for s in args[3].tolist()]
    for s in args[3].tolist():
        out[s[0] : s[0] + s[1]] = 0
    assert not out.any()
    return outputs


def parents_of(n: int, gen: torch.Generator) -> list[int]:
    """A random tree that is deep as well as wide; the root is row 0."""
    return [-1] + [max(0, i - 1 - int(torch.randint(0, 4, (1,), generator=gen))) for i in range(1, n)]


def path(parents: list[int], row: int) -> list[int]:
    out = []
    while row >= 0:
        out.append(row)
        row = parents[row]
    return out[::-1]


def make(kind: str, prefix: int, n: int, group: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Part, list[int]]:
    """A part of `n` rows: "chunk" (causal) or "tree"; with its parents."""
    gen, kv_heads = torch.Generator().manual_seed(seed + 1000 * n + prefix), 2
    tensor = lambda *shape: torch.randn(shape, generator=gen).to(dtype)  # noqa: E731
    old, q, new = tensor(2, prefix, kv_heads, dim), tensor(n, kv_heads * group, dim) * 2, tensor(2, n, kv_heads, dim)
    parents = list(range(-1, n - 1)) if kind == "chunk" else parents_of(n, gen)
    paths = [path(parents, i) for i in range(n)]
    pos = torch.tensor([prefix + len(p) - 1 for p in paths], dtype=torch.int32)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for i, p in enumerate(paths):
        seen[i, p] = True
    return Part(old, q, pos, new, pos, None if kind == "chunk" else seen), parents


def mixed(group: int, dim: int, dtype: torch.dtype) -> list[Part]:
    """Chunks, single rows and trees of odd sizes; contexts none, shorter, longer than a page, not a multiple of one, near the 512 of a chunk."""
    shapes = [("chunk", 0, 17), ("chunk", 130, 1), ("tree", 70, 33), ("chunk", 37, 65), ("tree", 64, 63), ("tree", 0, 2), ("tree", 129, 65)]
    shapes += [("tree", 508, 12), ("chunk", 1090, 2)]
    return [make(kind, prefix, n, group, dim, dtype, seed=i)[0] for i, (kind, prefix, n) in enumerate(shapes)]


def expected(part: Part, window: int) -> Tensor:
    """What the reference makes of a part. It multiplies unseen values by zero, so it gets a layout without NaN: one page of the prefix's length."""
    prefix, dim = part.old.shape[1], part.q.shape[-1]
    pages = part.old.transpose(1, 2)[:, None] if prefix else part.old.new_zeros(2, 1, part.old.shape[2], 1, dim)
    segment = torch.tensor([[0, len(part.q), 0, len(part.k_pos), prefix, int(part.seen is None)]], dtype=torch.int32)
    anc = words(part.seen) if part.seen is not None else torch.zeros(len(part.q), 1, dtype=torch.int64)
    table = torch.zeros(1, 1, dtype=torch.int32)
    return reference.attention(part.q, part.new, pages, segment, table, part.q_pos, part.k_pos, anc, dim**-0.5, window)


SHAPES = [(1, 8), (3, 16), (6, 24), (4, 32), (1, 64), (7, 64), (1, 80), (3, 128), (8, 128), (9, 256), (71, 8), (2, 40)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize(("group", "dim"), SHAPES)
def test_is_the_reference(group: int, dim: int, window: int, dtype: torch.dtype) -> None:
    parts = mixed(group, dim, dtype)
    got = run(parts, 16 if dim % 32 else 64, window)
    for part, out in zip(parts, got, strict=True):
        exact = replace(part, q=part.q.float(), old=part.old.float(), new=part.new.float())
        want = expected(exact, window)
        if dtype == torch.float32:
            torch.testing.assert_close(out, want, rtol=1e-5, atol=5e-6)
        else:  # weights and output are rounded: by at most 2^-8 of each
            exact.new[1].abs_(), exact.old[1].abs_()
            assert ((out - want).abs() <= 2**-8 * (expected(exact, window) + 2 * want.abs()) + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "dim"), SHAPES)
def test_native_is_the_twin(cpp: Any, group: int, dim: int, dtype: torch.dtype) -> None:
    parts = mixed(group, dim, dtype)
    twin = lambda *args: cpp.attention(*args, scalar=True)  # noqa: E731
    for native, plain in zip(run(parts, 16, 40), run(parts, 16, 40, op=twin), strict=True):
        assert torch.equal(native, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "size", "dim"), [(0, 64, 64), (0, 16, 80), (9, 16, 64), (60, 64, 8), (515, 16, 24)])
def test_branches(cpp: Any, window: int, size: int, dim: int, dtype: torch.dtype) -> None:
    """Every node equals the last row of the causal run of its own path, and a single row with that path in pages."""
    for prefix, n in ((75, 40), (0, 70), (64, 200), (509, 20), (1021, 6)):
        tree, parents = make("tree", prefix, n, 3, dim, dtype)
        (out,) = run([tree], size, window)
        chunks, singles = [], []
        for i in range(0, n, 3):
            rows = path(parents, i)
            chunks.append(replace(tree, q=tree.q[rows], q_pos=tree.q_pos[rows], new=tree.new[:, rows], k_pos=tree.k_pos[rows], seen=None))
            old = torch.cat((tree.old, tree.new[:, rows[:-1]]), dim=1)
            singles.append(Part(old, tree.q[i : i + 1], tree.q_pos[i : i + 1], tree.new[:, i : i + 1], tree.k_pos[i : i + 1]))
        for node, chunk, single in zip(range(0, n, 3), run(chunks, size, window), run(singles, 80 - size, window, seed=1), strict=True):
            assert torch.equal(out[node], chunk[-1]), f"node {node} and its path"
            assert torch.equal(out[node], single[0]), f"node {node} and the path in pages"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 33])
def test_a_row_does_not_see_its_batch(cpp: Any, window: int, dtype: torch.dtype) -> None:
    parts = mixed(7, 64, dtype)
    want = run(parts, 64, window)
    for other in (run(parts, 16, window, seed=5), run(parts[::-1], 64, window)[::-1], [run([p], 16, window)[0] for p in parts]):
        assert all(torch.equal(a, b) for a, b in zip(want, other, strict=True))
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(want, run(parts, 64, window), strict=True))


def test_a_prompt_may_be_cut_anywhere(cpp: Any) -> None:
    whole, _ = make("chunk", 0, 150, 2, 32, torch.bfloat16)
    (want,) = run([whole])
    for cut in (1, 16, 63, 64, 100):
        old = whole.new[:, :cut]
        rest = replace(whole, old=old, q=whole.q[cut:], q_pos=whole.q_pos[cut:], new=whole.new[:, cut:], k_pos=whole.k_pos[cut:])
        kept = replace(rest, new=whole.new, k_pos=whole.k_pos, old=whole.old)  # all keys still in the row buffer, nq < nk
        assert torch.equal(run([rest])[0], want[cut:]) and torch.equal(run([kept])[0], want[cut:])


@pytest.mark.parametrize("causal", [False, True])
def test_slots_in_any_order(cpp: Any, causal: bool) -> None:
    """A drafter reuses slots: the order of slots is not the order of positions, and some slots belong to nobody."""
    tree, _ = make("chunk" if causal else "tree", 20, 40, 3, 64, torch.float32)
    (want,) = run([tree])
    slot = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:40]
    new = torch.full((2, 100, 2, 64), NAN)
    seen, k_pos = torch.zeros(40, 100, dtype=torch.bool), torch.full((100,), 3, dtype=torch.int32)
    new[:, slot], k_pos[slot] = tree.new, tree.k_pos
    seen[:, slot] = torch.ones(40, 40, dtype=torch.bool).tril() if tree.seen is None else tree.seen
    assert torch.equal(run([replace(tree, new=new, k_pos=k_pos, seen=seen)])[0], want)
    if causal:  # out of order under causal visibility: the last query still sees them all
        mix = torch.randperm(40, generator=torch.Generator().manual_seed(4))
        turned = replace(tree, q=tree.q[-1:], q_pos=tree.q_pos[-1:], new=tree.new[:, mix], k_pos=tree.k_pos[mix])
        assert torch.equal(run([turned])[0][0], want[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "prefix"), [("tree", 30), ("chunk", 30), ("chunk", 500)])
def test_nan_stays_in_its_branch(cpp: Any, kind: str, prefix: int, dtype: torch.dtype) -> None:
    """Rows of a chunk that end within one tile of keys share it: what later rows bring does not reach earlier ones."""
    part, parents = make(kind, prefix, 50, 2, 16, dtype)
    (want,) = run([part])
    sick = 20
    for bad in (NAN, torch.inf):
        new = part.new.clone()
        new[0, sick] = torch.nan
        new[1, sick] = bad
        (got,) = run([replace(part, new=new)])
        for i in range(50):
            assert torch.equal(got[i], want[i]) if sick not in path(parents, i) else not got[i].isfinite().any()


def test_softmax_of_large_scores(cpp: Any) -> None:
    part, _ = make("chunk", 90, 3, 2, 16, torch.float32)
    big = replace(part, q=part.q * 300)  # scores of thousands: all weight on one key, whose value is the output
    (out,) = run([big])
    k, v = torch.cat((big.old, big.new[:, :1]), dim=1)
    for h in range(4):
        assert torch.equal(out[0, h], v[(k[:, h // 2] @ big.q[0, h]).argmax(), h // 2])


def test_bad_indices_are_refused(cpp: Any) -> None:
    parts = [make("tree", 40, 5, 2, 16, torch.float32)[0]]

    def refused(index: int, place: Any, value: int, match: str) -> None:
        args = [a.clone() if isinstance(a, Tensor) else a for a in arguments(parts, 16, 0)]
        args[index][place] = value
        with pytest.raises(RuntimeError, match=match):
            kernels.attention(*args)

    refused(3, (0, 0), -1, "queries -1")
    refused(3, (0, 1), 99, "queries 1 \\+ 99")
    refused(3, (0, 3), 99, "keys 2 \\+ 99")
    refused(3, (0, 4), 1000, "page table")
    refused(4, (0, 2), 77, "page_table\\[2\\] = 77")
    args = arguments(parts, 16, 0)
    with pytest.raises(RuntimeError, match="anc"):
        kernels.attention(*args[:7], torch.zeros(len(args[0]), 0, dtype=torch.int64), *args[8:])
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        kernels.attention(args[0].half(), args[1].half(), args[2].half(), *args[3:])
