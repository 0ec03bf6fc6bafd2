"""Tree attention over pages on a GPU: ours as a whole and its first launch alone, beside other kernels on identical inputs.

A cell is (kind, B sequences, L committed tokens each, T rows each, G query heads per key head) with 8 key heads of 128. Pages are random and lie in
random order; as many stores of pages take turns as keep them out of the L2. Before a form is timed, its output for the first and the last sequence is
held to kernels/reference.py: a form that is wrong has no time. Bytes: keys and values once, queries and outputs once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.gpu_lab import Cell, Lab, distance
from specedge import kernels
from specedge.kernels import reference

PAGE = 64
WRONG_ABOVE = 1e-2  # ||out - reference|| / ||reference||, with operands of 16 bits
Form = Callable[[Tensor], Tensor]  # a store of pages -> the output [R, Hq, D]


class Shape(NamedTuple):
    """`kind`: decode (T = 1), chain and chunk (causal; a chunk is a piece of a prompt), tree (ancestor words)."""

    kind: str
    batch: int
    length: int
    rows: int
    group: int
    kv_heads: int = 8
    dim: int = 128

    @property
    def name(self) -> str:
        return f"{self.kind} B{self.batch} L{self.length} T{self.rows} G{self.group}"

    @property
    def packed(self) -> int:
        """Rows that share a key head of a sequence: M."""
        return self.rows * self.group


def grid(quick: bool) -> list[Shape]:
    """The cells, the most telling ones first: what targets speak of, then every other row count, length, batch and kind."""
    main = [(8, 4096), (1, 32768), (32, 1024), (1, 8192), (8, 16384), (1, 512)]
    trees = (1, 8, 32, 64)

    def row(kind: str, batch: int, length: int, rows: int, group: int = 4) -> Shape:
        return Shape("decode" if rows == 1 else kind, batch, length, rows, group)

    cells = [row("tree", b, n, t) for b, n in main[:3] for t in trees]
    if quick:
        return cells
    cells += [row("tree", b, n, t, 8) for b, n in main[:2] for t in (1, 16, 32)]
    cells += [row("tree", b, n, t) for b, n in main[3:] for t in trees]
    cells += [row("chain", b, n, t) for b, n in main[:2] for t in (4, 8, 32)]
    cells += [Shape("chunk", 1, n, 512, 4) for n in (0, 2048, 16384)]
    cells += [row("tree", b, n, t) for b, n in ((32, 32768), (4, 32768), (4, 2048), (32, 4096), (16, 512)) for t in (1, 16, 33, 64)]
    cells += [row("tree", b, n, t, 8) for b, n in main[2:] for t in (1, 8, 33, 64)]
    return cells + [row("chain", b, n, t) for b, n in main[2:] for t in (2, 16, 64)]


def tiny() -> list[Shape]:
    """One of each kind, for a dry run."""
    small = [("tree", 2, 70, 5, 4), ("decode", 3, 64, 1, 4), ("chain", 2, 65, 3, 8), ("chunk", 1, 0, 7, 4)]
    return [Shape(*s, 2, 16) for s in small]


@dataclass
class Inputs:
    """What all forms read, made on `device`. `seen [B, T, T]`: which rows of its sequence a row sees. A store holds K/V of prefix and rows."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    stores: int
    q: Tensor = field(init=False)  # [B T, Hq, D]
    rows_kv: Tensor = field(init=False)  # [2, B T, Hkv, D]
    segments: Tensor = field(init=False)
    table: Tensor = field(init=False)  # [B, pages of a sequence]
    positions: Tensor = field(init=False)
    anc: Tensor = field(init=False)
    seen: Tensor = field(init=False)
    pages: list[Tensor] = field(init=False)  # [2, P, Hkv, S, D] each

    def __post_init__(self) -> None:
        s, rng = self.shape, np.random.default_rng(0)
        total, wide = s.batch * s.rows, -(-(s.length + s.rows) // PAGE)
        self.q = self._random(total, s.kv_heads * s.group, s.dim)
        self.rows_kv = self._random(2, total, s.kv_heads, s.dim)
        causal = int(s.kind != "tree")
        segments = [[b * s.rows, s.rows, b * s.rows, s.rows, s.length, causal] for b in range(s.batch)]
        words = np.zeros((total, -(-s.rows // 64)), np.uint64)
        depth = np.tile(np.arange(s.rows), s.batch)
        seen = np.tril(np.ones((s.rows, s.rows), bool))[None].repeat(s.batch, 0)
        if not causal:
            seen[:] = False
            for b in range(s.batch):
                for i in range(s.rows):
                    parent = i - 1 if rng.random() < 0.5 else int(rng.integers(0, max(1, i)))
                    if i:
                        seen[b, i] = seen[b, parent]
                        depth[b * s.rows + i] = depth[b * s.rows + parent] + 1
                    seen[b, i, i] = True
            for j in range(s.rows):
                words[:, j // 64] |= seen[:, :, j].reshape(-1).astype(np.uint64) << np.uint64(j % 64)
        self.segments = torch.tensor(segments, dtype=torch.int32, device=self.device)
        self.positions = torch.from_numpy((s.length + depth).astype(np.int32)).to(self.device)
        self.anc = torch.from_numpy(words.view(np.int64)).to(self.device)
        self.seen = torch.from_numpy(seen).to(self.device)
        self.table = torch.randperm(s.batch * wide, device=self.device).int().view(s.batch, wide)
        at = s.length + torch.arange(s.rows, device=self.device)
        page = self.table.long()[:, at // PAGE]
        self.pages = []
        for _ in range(self.stores):
            store = self._random(2, s.batch * wide, s.kv_heads, PAGE, s.dim)
            store[:, page, :, at % PAGE] = self.rows_kv.unflatten(1, (s.batch, s.rows)).permute(1, 2, 0, 3, 4)
            self.pages.append(store)

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device, dtype=self.dtype)

    @property
    def scale(self) -> float:
        return float(self.shape.dim**-0.5)

    def ours(self, store: Tensor) -> Tensor:
        """The op."""
        attention = kernels.attention
        if self.device.type == "cpu":  # a dry run: in Triton's interpreter
            from specedge.kernels.triton_rows import attention
        return attention(
            self.q, self.rows_kv, store, self.segments, self.table, self.positions, self.positions, self.anc, self.scale, 0
        )  # fmt: skip

    def prefix(self, store: Tensor) -> object:
        """The first of its two launches."""
        from specedge.kernels.triton_prefix import prefix_attention

        return prefix_attention(self.q, store, self.segments, self.table, self.positions, self.scale, 0)

    @cached_property
    def law(self) -> dict[int, Tensor]:
        """The reference's output over the first store for the first and the last sequence."""
        found, rows = {}, self.shape.rows
        for b in {0, self.shape.batch - 1}:
            out = reference.attention(
                self.q, self.rows_kv, self.pages[0], self.segments[b : b + 1], self.table[b : b + 1], self.positions, self.positions, self.anc,
                self.scale, 0,
            )  # fmt: skip
            found[b] = out[b * rows : (b + 1) * rows]
        return found

    def error(self, out: Tensor) -> float:
        """How far an output over the first store is from the law."""
        rows = self.shape.rows
        return max(distance(out[b * rows : (b + 1) * rows], want) for b, want in self.law.items())


def costs(s: Shape, seen: Tensor) -> dict[str, float]:
    """Bytes and operations of the op and of its prefix part."""
    head = 2 * s.dim  # bytes of a vector
    io = 2 * s.batch * s.rows * s.kv_heads * s.group * head
    prefix = 2 * s.batch * s.length * s.kv_heads * head
    of_prefix = 4 * s.dim * s.kv_heads * s.packed * s.batch * s.length
    among = 4 * s.dim * s.kv_heads * s.group * int(seen.sum())
    return {"moved": prefix + 2 * s.batch * s.rows * s.kv_heads * head + io, "flops": of_prefix + among, "prefix_moved": prefix + io // 2,
            "prefix_flops": of_prefix}  # fmt: skip


def make_inputs(lab: Lab, s: Shape) -> Inputs:
    """The inputs of a cell, with as many stores as it takes."""
    return Inputs(s, lab.device, lab.dtype, lab.copies(4 * s.batch * (s.length + s.rows) * s.kv_heads * s.dim))


def timed(lab: Lab, x: Inputs, form: Form) -> tuple[float, float]:
    """Microseconds of a form and how far it is from the reference; ValueError if it is wrong."""
    error = x.error(form(x.pages[0]))
    if not error < WRONG_ABOVE:
        raise ValueError(f"its output is {error:.1e} from the reference's")
    return lab.rotated(form, x.pages), error


def measure(lab: Lab, s: Shape, forms: Callable[[Inputs], dict[str, Callable[[], Form]]]) -> dict[str, Any]:
    """Ours and every form that `forms` offers for these inputs; a peer that fails leaves a sentence in place of its time."""
    x = make_inputs(lab, s)
    result: dict[str, Any] = {"shape": s._asdict(), **costs(s, x.seen), "stores": len(x.pages)}
    result["us"], result["distance"] = timed(lab, x, x.ours)
    if s.length:
        result["prefix_us"] = lab.rotated(x.prefix, x.pages)
    peers: dict[str, float | str] = {}
    for name, make in forms(x).items():
        try:
            peers[name], _ = timed(lab, x, make())
        except Exception as error:
            lab.sync()  # raises if the device is lost
            peers[name] = f"{type(error).__name__}: {error}"[:200]
    return {**result, "peers_us": peers}


def attention(lab: Lab, quick: bool) -> None:
    """The grid, with FlashInfer and torch's own attention as peers."""
    from bench.gpu_peers import flashinfer_forms, sdpa_forms

    usable = lab.log.results("peers").keys()

    def forms(x: Inputs) -> dict[str, Callable[[], Form]]:
        return {**flashinfer_forms(x, usable), **sdpa_forms(x)}

    shapes = tiny() if lab.dry else grid(quick)
    cells: dict[str, Cell] = {s.name: lambda s=s: measure(lab, s, forms) for s in shapes}  # type: ignore[misc]
    lab.each("attention", cells)


def flex(lab: Lab) -> None:
    """FlexAttention on a few trees: it is compiled anew for every shape."""
    from bench.gpu_peers import flex_forms

    shapes = [tiny()[0]] if lab.dry else [Shape("tree", 8, 4096, 32, 4), Shape("decode", 8, 4096, 1, 4), Shape("tree", 1, 32768, 32, 4)]
    cells: dict[str, Cell] = {s.name: lambda s=s: measure(lab, s, lambda x: flex_forms(x, not lab.dry)) for s in shapes}  # type: ignore[misc]
    lab.each("flex", cells)
