"""attention in Triton: equal to the reference up to rounding, wherever the keys lie, and the same bits for a row whatever it is batched with.

Runs in Triton's interpreter (float32 and float16: its bfloat16 products are wrong), or on a GPU where there is one, there in bfloat16 too.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_attention import Part, arguments, expected, make, path, run

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from specedge.kernels import triton_prefix, triton_rows  # noqa: E402

TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-5, "atol": 5e-6},
    torch.float16: {"rtol": 2**-9, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2e-2},
}
# the interpreter takes milliseconds for every program, so `make test` has one dtype in it
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.full), pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def full(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.full)


@pytest.fixture
def op(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The op for CPU tensors. The interpreter takes tiles of 64 for float32 too: it pays for every operation, not for its size."""
    if device.type == "cpu":
        half = triton_prefix.choose_tile, triton_rows.choose_tile
        monkeypatch.setattr(triton_prefix, "choose_tile", lambda *a: half[0](*a[:4], 2, a[5]))
        monkeypatch.setattr(triton_rows, "choose_tile", lambda dim, _, wgmma: half[1](dim, 2, wgmma))
    return lambda *args: triton_rows.attention(*(a.to(device) if isinstance(a, Tensor) else a for a in args)).cpu()


def close(parts: list[Part], got: list[Tensor], window: int) -> None:
    for part, out in zip(parts, got, strict=True):
        torch.testing.assert_close(out, expected(part, window), **TOLERANCE[part.q.dtype])


def some(group: int, dim: int, dtype: torch.dtype) -> list[Part]:
    """A chunk of more than 256 packed rows if G > 3, a tree of more than 128, a single row; prefixes none, longer than a page, one page."""
    shapes = [("chunk", 0, 70), ("tree", 70, 33), ("chunk", 64, 1)]
    return [make(kind, prefix, n, group, dim, dtype, seed=i)[0] for i, (kind, prefix, n) in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "dim", "size", "window"),
    [(4, 32, 64, 0), (4, 16, 16, 40), (1, 96, 32, 0), full(2, 8, 128, 1), full(2, 256, 64, 0), full(7, 16, 128, 50), full(3, 96, 16, 0)],
)
def test_is_the_reference(op: Any, group: int, dim: int, size: int, window: int, dtype: torch.dtype) -> None:
    parts = some(group, dim, dtype)
    close(parts, run(parts, size, window, op=op), window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 601, full(200)])
def test_contexts_of_several_splits(op: Any, window: int, dtype: torch.dtype) -> None:
    shapes = [("chunk", 1030, 1), ("tree", 512, 9), ("chunk", 257, 2)]
    parts = [make(kind, prefix, n, 4, 16, dtype)[0] for kind, prefix, n in shapes]
    close(parts, run(parts, 64, window, op=op), window)


@pytest.mark.parametrize("rows", [full(16), 32, full(64), 128])
def test_tiles(op: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen for 16 bits. 33 rows of 4 heads are 132: nine tiles of 16, or two of 128."""
    monkeypatch.setattr(triton_prefix, "choose_tile", lambda *_: triton_prefix.Tile(rows, 64, 4 if rows == 64 else 8, 3))
    parts = [make("tree", 150, 33, 4, 32, torch.float16)[0], make("chunk", 40, 1, 4, 32, torch.float16)[0]]
    close(parts, run(parts, op=op), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_a_row_does_not_see_its_tile(op: Any, dim: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise P1 where a bucket chooses the tile."""
    parts = [make(kind, prefix, n, 4, dim, torch.bfloat16)[0] for kind, prefix, n in [("tree", 300, 33), ("chunk", 1030, 1), ("chunk", 520, 9)]]
    found = []
    for tile in triton_prefix.tiles_of(dim, 2, triton_prefix.has_wgmma(torch.device("cuda"))):
        monkeypatch.setattr(triton_prefix, "choose_tile", lambda *_, tile=tile: tile)
        found.append(torch.cat(run(parts, 64, window, op=op)))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(("window", "prefix", "n"), [(0, 75, 24), (30, 20, 70), full(0, 0, 200)])
def test_branches(op: Any, window: int, prefix: int, n: int) -> None:
    """Every node equals the last row of the causal run of its own path, and a single row with that path in pages."""
    tree, parents = make("tree", prefix, n, 3, 16, torch.float32)
    (out,) = run([tree], 64, window, op=op)
    parts, nodes = [], [0, n // 3, n - 1]
    for i in nodes:
        rows = path(parents, i)
        parts.append(replace(tree, q=tree.q[rows], q_pos=tree.q_pos[rows], new=tree.new[:, rows], k_pos=tree.k_pos[rows], seen=None))
        old = torch.cat((tree.old, tree.new[:, rows[:-1]]), dim=1)
        parts.append(Part(old, tree.q[i : i + 1], tree.q_pos[i : i + 1], tree.new[:, i : i + 1], tree.k_pos[i : i + 1]))
    got = run(parts, 64, window, op=op)
    for node, chunk, single in zip(nodes, got[::2], got[1::2], strict=True):
        for other in (chunk[-1], single[0]):
            torch.testing.assert_close(out[node], other, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_its_batch(op: Any, dtype: torch.dtype) -> None:
    """Promise P1: the bits are those of the part alone and on other pages."""
    parts = [make(kind, prefix, n, 8, 16, dtype)[0] for kind, prefix, n in [("tree", 300, 9), ("chunk", 30, 33), ("chunk", 520, 1)]]
    for part, together in zip(parts, run(parts, 64, 0, op=op), strict=True):
        assert torch.equal(run([part], 64, 0, op=op, seed=5)[0], together)


@pytest.mark.parametrize("causal", [False, full(True)])
def test_more_keys_than_queries(op: Any, causal: bool) -> None:
    """A drafter's forward: some rows of those that live. In a chunk the queries are the last rows."""
    part, _ = make("chunk" if causal else "tree", 20, 90, 3, 32, torch.float32)
    (want,) = run([part], op=op)
    few = replace(part, q=part.q[60:], q_pos=part.q_pos[60:], seen=part.seen[60:] if part.seen is not None else None)
    torch.testing.assert_close(run([few], op=op)[0], want[60:], **TOLERANCE[torch.float32])


def test_slots_in_any_order(op: Any) -> None:
    tree, _ = make("tree", 20, 40, 3, 16, torch.float32)
    slot = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:40]
    new = torch.zeros(2, 100, 2, 16)
    seen, k_pos = torch.zeros(40, 100, dtype=torch.bool), torch.full((100,), 3, dtype=torch.int32)
    assert tree.seen is not None
    new[:, slot], k_pos[slot], seen[:, slot] = tree.new, tree.k_pos, tree.seen
    for window in (0, 15):
        got = run([replace(tree, new=new, k_pos=k_pos, seen=seen)], 16, window, op=op)[0]
        torch.testing.assert_close(got, expected(tree, window), **TOLERANCE[torch.float32])


def test_padding_changes_nothing(op: Any) -> None:
    """A captured launch is as large as its bucket: segments without rows, rows without a segment, tables wider than needed."""
    part, _ = make("tree", 300, 9, 4, 16, torch.float32)
    q, rows_kv, pages, segments, table, q_pos, k_pos, anc, scale, window = arguments([part], 64, 0)
    want = op(q, rows_kv, pages, segments, table, q_pos, k_pos, anc, scale, window)
    segments = torch.cat((torch.tensor([[0, 0, 0, 0, 0, 1]]), segments, torch.tensor([[7, 0, 3, 0, 99, 0]]))).int()
    table = torch.nn.functional.pad(table, (0, 9, 1, 1), value=-7)
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, 20), value=float("nan"))
    q_pos, anc = torch.nn.functional.pad(q_pos, (0, 20)), torch.nn.functional.pad(anc, (0, 0, 0, 20))
    got = op(q, rows_kv, pages, segments, table, q_pos, k_pos, anc, scale, window)
    assert torch.equal(got[: len(want)], want) and not got[len(want) :].any()


@pytest.mark.parametrize("size", [16, 64])
def test_pages_beyond_31_bits(op: Any, device: torch.device, size: int) -> None:
    """Offsets of 2^31 elements and more; most of this memory is never touched."""
    part, _ = make("chunk", size + 4, 2, 2, 64, torch.float16)
    pages = torch.empty(2, 2**24 // size + 4, 2, size, 64, dtype=torch.float16, device=device)
    args = list(arguments([part], size, 0))
    last = pages.shape[1] - 2
    for i in range(2):
        pages[:, last + i] = args[2][:, args[4][0, i]].to(device)
    args[2], args[4] = pages, torch.tensor([[last, last + 1]], dtype=torch.int32)
    torch.testing.assert_close(op(*args)[1:3], expected(part, 0), **TOLERANCE[torch.float16])


def test_softmax_of_large_scores(op: Any) -> None:
    part, _ = make("chunk", 90, 3, 2, 16, torch.float32)
    big = replace(part, q=part.q * 300)  # scores of thousands: all weight on one key, whose value is the output
    (out,) = run([big], op=op)
    torch.testing.assert_close(out, expected(big, 0), rtol=1e-4, atol=1e-4)


@triton.jit
def cut_kernel(nq, prefix, window, out, G: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    begin, size, count = triton_prefix.cut(tl.load(nq + i), tl.load(prefix + i), window, G)
    tl.store(out + i, begin)
    tl.store(out + N + i, size)
    tl.store(out + 2 * N + i, count)


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("window", [1, 64, 1000, triton_prefix.NO_WINDOW])
def test_splits_cover_what_is_seen(device: torch.device, group: int, window: int) -> None:
    n = 4096
    gen = torch.Generator().manual_seed(window)
    nq = torch.randint(0, 300, (n,), generator=gen).int()
    prefix = (torch.rand(n, generator=gen) ** 3 * 140_000).int()
    out = torch.empty(3, n, dtype=torch.int32, device=device)
    cut_kernel[(1,)](nq.to(device), prefix.to(device), window, out, G=group, N=n)
    begin, size, count = out.cpu().long()
    assert (begin % 64 == 0).all() and (size % 64 == 0).all() and (size >= 256).all()
    assert (count <= triton_prefix.MAX_SPLITS.value).all()
    assert (begin + size * count >= prefix).all() and ((count == 0) | (begin + size * (count - 1) < prefix)).all()
    seen = (prefix + 1 - window).clamp(min=0)  # the first key that a row at position `prefix` sees
    assert (begin <= seen).all() and (begin > seen - 64).all()
    assert (nq * group * count <= nq * group + prefix // triton_prefix.KEYS_PER_ROW.value).all()  # the room that prefix_attention makes


part = st.tuples(st.sampled_from(["chunk", "tree"]), st.integers(0, 90), st.integers(1, 20))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(part, min_size=1, max_size=3), st.integers(1, 8), st.sampled_from([0, 0, 7, 64]), st.sampled_from([16, 64]))
def test_any_batch(op: Any, shapes: list[tuple[str, int, int]], group: int, window: int, size: int) -> None:
    parts = [make(kind, prefix, n, group, 16, torch.float32)[0] for kind, prefix, n in shapes]
    close(parts, run(parts, size, window, op=op), window)


def test_tiles_are_a_function_of_shapes() -> None:
    choose = triton_prefix.choose_tile
    assert choose(8, 8, 4, 128, 2, True) == choose(16, 1, 4, 128, 2, True) == (64, 64, 4, 3)
    assert choose(33, 1, 4, 128, 2, True) == (128, 64, 8, 3)
    assert [choose(r, 1, 4, 128, 2, False).rows for r in (1, 4, 5, 8, 9, 500)] == [16, 16, 32, 32, 64, 64]
    assert choose(64, 16, 4, 128, 2, False).rows == 16 and choose(1, 1, 4, 64, 2, False).rows == 64
    for rows in range(1, 40):
        for tile in (16, 64, 128):
            for cuts in ([1] * rows, [rows], [rows - rows // 2, rows // 2]):
                assert sum(-(-4 * n // tile) for n in cuts) <= triton_prefix.max_tiles(rows, len(cuts), 4, tile)
