"""Other attention kernels on the inputs of a cell: FlashInfer, torch's scaled_dot_product_attention, FlexAttention.

A form is made outside of the timed region (plans, masks, dense copies of the pages), and then called with a store of pages. FlashInfer is compiled
by itself when it is first used: `python -m bench.gpu_peers LOG` does that for each of its backends and checks its forms, before anything is timed.
"""

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_attention import PAGE, Form, Inputs, Shape, timed
from bench.gpu_lab import Lab
from bench.gpu_log import Log

BACKENDS = ("fa2", "fa3")  # of FlashInfer's prefill
WORKSPACE = 512 * 2**20
MASK_BYTES = 2**31  # above it no dense mask is made
Make = Callable[[], Form]


def lend_curand() -> None:
    """Have FlashInfer find curand_kernel.h, which fa3 includes, among torch's wheels if the toolkit of nvcc lacks it."""
    nvcc, nvidia = shutil.which("nvcc"), importlib.util.find_spec("nvidia")
    toolkit = Path(nvcc).resolve().parents[1] if nvcc else Path("/usr/local/cuda")
    if nvidia and not any(toolkit.glob("**/include/curand_kernel.h")):
        found = [h for folder in nvidia.submodule_search_locations or () for h in Path(folder).glob("*/include/curand_kernel.h")]
        if found:
            os.environ.setdefault("FLASHINFER_EXTRA_CUDAFLAGS", f"-I{found[0].parent}")


class FlashInfer:
    """Its forms over one set of inputs; pages as they are (HND), the rows' keys at the end of the last pages where they are part of one call."""

    def __init__(self, x: Inputs) -> None:
        import flashinfer

        self.api: Any = flashinfer
        self.x, s = x, x.shape
        self.workspace = torch.zeros(WORKSPACE if x.device.type == "cuda" else 1024, dtype=torch.uint8, device=x.device)
        self.rows = self._steps(s.rows)
        self.heads = (s.kv_heads * s.group, s.kv_heads, s.dim)
        self.kinds = {"q_data_type": x.dtype, "kv_data_type": x.dtype, "sm_scale": x.scale}

    def _steps(self, size: int) -> Tensor:
        """[0, size, 2 size, ...] over the sequences, on the device: masks are packed there."""
        return torch.arange(self.x.shape.batch + 1, dtype=torch.int32, device=self.x.device) * size

    def _paged(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """indptr, indices and length of the last page for the first `length` tokens of every sequence."""
        pages = -(-length // PAGE)
        last = torch.full((self.x.shape.batch,), (length - 1) % PAGE + 1, dtype=torch.int32, device=self.x.device)
        return self._steps(pages), self.x.table[:, :pages].flatten().contiguous(), last

    def _prefill(self, length: int, backend: str, **mask: Any) -> Any:
        wrapper = self.api.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "HND", backend=backend)
        wrapper.plan(self.rows, *self._paged(length), *self.heads, PAGE, **mask, **self.kinds)
        return wrapper

    def one_call(self) -> Form:
        """Prefix and rows as one text: causal, or under a mask over all of it."""
        s, x = self.x.shape, self.x
        if s.kind == "tree":
            old = torch.ones(s.batch, s.rows, s.length, dtype=torch.bool, device=x.device)
            mask: dict[str, Any] = {"custom_mask": torch.cat((old, x.seen), dim=2).flatten()}
        else:
            mask = {"causal": True}
        wrapper = self._prefill(s.length + s.rows, "fa2", **mask)
        return lambda store: wrapper.run(x.q, (store[0], store[1]))

    def decode(self) -> Form:
        """Its decoding kernel, on matrix units."""
        s, x = self.x.shape, self.x
        wrapper = self.api.BatchDecodeWithPagedKVCacheWrapper(self.workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*self._paged(s.length + 1), *self.heads, PAGE, **self.kinds)
        return lambda store: wrapper.run(x.q, (store[0], store[1]))

    def two_parts(self, backend: str) -> Form:
        """The prefix without a mask, the rows under theirs, merged by log-sum-exp."""
        s, x = self.x.shape, self.x
        if backend == "fa3":
            lend_curand()
        prefix = self._prefill(s.length, backend, causal=False)
        rows = self.api.BatchPrefillWithRaggedKVCacheWrapper(self.workspace, "NHD", backend="fa2")
        mask = {"custom_mask": x.seen.flatten()} if s.kind == "tree" else {"causal": True}
        rows.plan(self.rows, self.rows, *self.heads, **mask, **self.kinds)

        def run(store: Tensor) -> Tensor:
            out, lse = prefix.run(x.q, (store[0], store[1]), return_lse=True)
            self.api.merge_state_in_place(out, lse, *rows.run(x.q, x.rows_kv[0], x.rows_kv[1], return_lse=True))
            return out

        return run


def flashinfer_forms(x: Inputs, usable: Collection[str]) -> dict[str, Make]:
    """What FlashInfer offers for these inputs, of the backends that were found to work."""
    if "fa2" not in usable:
        return {}
    kit = FlashInfer(x)
    found: dict[str, Make] = {"flashinfer one call": kit.one_call}
    if x.shape.rows == 1:
        found["flashinfer decode"] = kit.decode
    elif x.shape.length:
        for backend in (b for b in BACKENDS if b in usable):
            found[f"flashinfer two parts {backend}"] = lambda b=backend: kit.two_parts(b)  # type: ignore[misc]
    return found


def dense(x: Inputs, store: Tensor) -> Tensor:
    """Keys and values `[2, B, Hkv, L + T, D]` without pages."""
    s = x.shape
    flat = store[:, x.table.long()].transpose(2, 3)  # [2, B, Hkv, pages, S, D]
    return flat.flatten(3, 4)[:, :, :, : s.length + s.rows].contiguous()


def mask_of(x: Inputs) -> Tensor:
    """`[B, T, L + T]`."""
    s = x.shape
    return torch.cat((x.seen.new_ones(s.batch, s.rows, s.length), x.seen), dim=2)


def sdpa_forms(x: Inputs) -> dict[str, Make]:
    """torch's attention with T and G folded into one dimension, over dense keys and values."""
    s = x.shape
    if s.batch * s.packed * (s.length + s.rows) > MASK_BYTES:
        return {}

    def make() -> Form:
        flat = {store.data_ptr(): dense(x, store) for store in x.pages}
        q = x.q.view(s.batch, s.rows, s.kv_heads, s.group, s.dim).transpose(1, 2).reshape(s.batch, s.kv_heads, s.packed, s.dim)
        mask = mask_of(x).repeat_interleave(s.group, dim=1)[:, None] if s.rows > 1 else None

        def run(store: Tensor) -> Tensor:
            k, v = flat[store.data_ptr()]
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=x.scale)
            return out.view(s.batch, s.kv_heads, s.rows, s.group, s.dim).transpose(1, 2).reshape(x.q.shape)

        return run

    return {"torch sdpa": make}


def flex_forms(x: Inputs, compiled: bool) -> dict[str, Make]:
    """FlexAttention, its mask an index function over `seen`, compiled for the shape; over dense keys and values."""
    s = x.shape

    def make() -> Form:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j < s.length) | x.seen[b, i, (j - s.length).clamp(min=0)]

        blocks = create_block_mask(visible, s.batch, None, s.rows, s.length + s.rows, device=str(x.device))
        run_flex: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
        flat = {store.data_ptr(): dense(x, store) for store in x.pages}
        q = x.q.view(s.batch, s.rows, -1, s.dim).transpose(1, 2).contiguous()

        def run(store: Tensor) -> Tensor:
            k, v = flat[store.data_ptr()]
            out: Tensor = run_flex(q, k, v, block_mask=blocks, scale=x.scale, enable_gqa=True)
            return out.transpose(1, 2).reshape(x.q.shape)

        return run

    return {"torch flex": make}


def warm(lab: Lab) -> None:
    """Compile FlashInfer's backends in turn and hold each form to the reference; what works is a result of the section "peers"."""
    sizes = (2, 16) if lab.dry else (8, 128)
    tree, one = (Inputs(Shape(kind, 2, 100, rows, 4, *sizes), lab.device, lab.dtype, 1) for kind, rows in (("tree", 5), ("decode", 1)))

    def try_out(backend: str) -> dict[str, Any]:
        begun = time.time()
        for inputs in (tree, one):
            for name, make in flashinfer_forms(inputs, {"fa2", backend}).items():
                if backend == "fa2" or name.endswith(backend):
                    timed(lab, inputs, make())
        import flashinfer

        return {"version": f"flashinfer {flashinfer.__version__}", "seconds": time.time() - begun}

    lab.each("peers", {b: lambda b=b: try_out(b) for b in BACKENDS})  # type: ignore[misc]


if __name__ == "__main__":  # record, end of its time, --dry-run
    warm(Lab(Log(Path(sys.argv[1])), float(sys.argv[2]), "--dry-run" in sys.argv))
