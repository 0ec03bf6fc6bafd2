"""The ops of the engine, each in its fastest form for the device of its arguments; `reference.py` is their specification.

Chosen once, by what was built: C++ for CPU tensors if a library for this processor loads, Triton for CUDA tensors, plain torch otherwise. Triton
is imported for the first CUDA tensor and not before. Knows nothing of models or sequences. Invariant: whatever runs, the result is the
reference's, up to rounding (accept, adjust, commit, gumbel, rope_write, sample and truncate: exactly); with the C++ and Triton ops a row's
bits do not depend on what it is batched with.
"""

import os
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specedge.kernels import reference
from specedge.kernels.cuda_ops import CudaOps

__all__ = [
    "accept", "add_rms_norm", "adjust", "attention", "backend", "commit", "fill_noise", "gumbel", "norm_rope_write", "rms_norm", "rope_write",
    "sample", "silu_mul", "truncate",
]  # fmt: skip

CAPTURABLE = "triton, cuda"  # the backend of which no op waits for the device


LEVELS = ("amx", "avx512", "avx2", "scalar")  # of the C++ library; a processor of one runs those after it


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of every op."""

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]
    rope_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
    norm_rope_write: Callable[[Tensor, Tensor, Tensor, float, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]
    commit: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    accept: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    gumbel: Callable[[int, int, int, torch.device], Tensor]
    fill_noise: Callable[[Tensor, Tensor], None]
    adjust: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    sample: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    truncate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


_TORCH = Ops(
    "torch",
    reference.rms_norm,
    reference.add_rms_norm,
    reference.silu_mul,
    reference.rope_write,
    reference.norm_rope_write,
    reference.attention,
    reference.commit,
    reference.accept,
    reference.gumbel,
    reference.fill_noise,
    reference.adjust,
    reference.sample,
    reference.truncate,
)


def _capability() -> str:
    """Torch's word for what this processor offers; AMX if it has tile registers, Linux lets this process use them, and nobody asked for less."""
    found: str = torch.backends.cpu.get_cpu_capability()
    if found == "AVX512" and "ATEN_CPU_CAPABILITY" not in os.environ and torch.cpu._init_amx():
        return "AMX"
    return found


def _cpp(folder: Path) -> Ops:
    """The C++ ops of the best library in `folder` that this processor can run, or the torch ops; says why if one is there in vain."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = [isa for isa in LEVELS if (folder / f"_C_{isa}{suffix}").exists()]
    if not built:
        return _TORCH
    capability = _capability()
    runs = LEVELS[{"AMX": 0, "AVX512": 1, "AVX2": 2}.get(capability, 3) :]
    isa = next((isa for isa in built if isa in runs), built[0])
    path = folder / f"_C_{isa}{suffix}"
    try:
        if isa not in runs:
            raise OSError(f"this processor offers {capability}")
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        return _cpp_ops(isa)
    except (OSError, RuntimeError, AttributeError) as error:  # the last: it was built from older sources
        reason = " ".join(str(error).split())
        warnings.warn(f"{path} does not load here ({reason}); rebuild it: python setup.py build_ext --inplace", stacklevel=2)
        return _TORCH


def _cpp_ops(isa: str) -> Ops:
    """The ops of the library that is loaded."""
    cpp: Any = torch.ops.specedge

    def norm_rope_write(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, *rope: Any) -> Tensor:
        *_, rows_kv, heads = rope
        kv_heads, dim = rows_kv.shape[2:]
        x = qkv.view(len(qkv), -1, dim)
        q, k, v = x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]
        normed = torch.cat((cpp.rms_norm.default(q, q_norm, eps), cpp.rms_norm.default(k, k_norm, eps), v), dim=1)
        out: Tensor = cpp.rope_write.default(normed.flatten(1), *rope)
        return out

    def gumbel(seed: int, position: int, vocab: int, _: torch.device) -> Tensor:
        out: Tensor = cpp.gumbel.default((seed + 2**63) % 2**64 - 2**63, position, vocab)  # same bits, signed
        return out

    def fill_noise(table: Tensor, fills: Tensor) -> None:
        for seed, position, row in fills.tolist():
            if row >= 0:
                table[row] = cpp.gumbel.default(seed, position, table.shape[1])

    return Ops(
        f"cpp {isa}",
        cpp.rms_norm.default,
        cpp.add_rms_norm.default,
        cpp.silu_mul.default,
        cpp.rope_write.default,
        norm_rope_write,
        cpp.attention.default,
        reference.commit,  # a copy: torch does it at the speed of memory
        reference.accept,
        gumbel,
        fill_noise,
        reference.adjust,
        cpp.sample.default,
        cpp.truncate.default,
    )


def _gpu(folder: Path) -> Ops:
    """The Triton ops, and those of the CUDA library in `folder` if it was built; the torch ops where Triton is not installed."""
    try:
        from specedge.kernels import triton_pointwise, triton_rows
    except ImportError as error:
        warnings.warn(f"the GPU runs plain torch ops, several times slower ({error}); install triton: pip install triton", stacklevel=2)
        return _TORCH
    ops = replace(
        _TORCH,
        name="triton",
        rms_norm=triton_pointwise.rms_norm,
        add_rms_norm=triton_pointwise.add_rms_norm,
        silu_mul=triton_pointwise.silu_mul,
        rope_write=triton_pointwise.rope_write,
        norm_rope_write=triton_pointwise.norm_rope_write,
        attention=triton_rows.attention,
    )
    path = folder / "_C_cuda.so"
    if not path.exists():
        return ops
    try:
        cuda = CudaOps(path)
    except OSError as error:
        warnings.warn(f"{path} does not load here ({error}); rebuild it: python setup.py build_ext --inplace", stacklevel=2)
        return ops
    return replace(
        ops, name=CAPTURABLE, accept=cuda.accept, gumbel=cuda.gumbel, fill_noise=cuda.fill_noise, adjust=cuda.adjust, sample=cuda.sample,
        truncate=cuda.truncate,
    )  # fmt: skip


_FOLDER = Path(__file__).parents[1]
_CPU = _cpp(_FOLDER)


@cache
def _ops_of(device: str) -> Ops:
    """The ops of a type of device."""
    return _CPU if device == "cpu" else _gpu(_FOLDER) if device == "cuda" else _TORCH


def _ops(x: Tensor) -> Ops:
    return _ops_of(x.device.type)


def backend(device: torch.device | str = "cpu") -> str:
    """What runs the ops on `device`: "cpp amx", "cpp avx512", "cpp avx2", "cpp scalar", "triton, cuda", "triton" or "torch"."""
    return _ops_of(torch.device(device).type).name


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [R, H]`, `weight [H]` -> `x / sqrt(mean(x^2) + eps) * weight [R, H]`; both have one dtype."""
    return _ops(x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x, residual [R, H]` -> `rms_norm(sum, weight, eps)` and `sum = x + residual`, which is rounded before it is normed."""
    return _ops(x).add_rms_norm(x, residual, weight, eps)


def silu_mul(x: Tensor) -> Tensor:
    """`x [R, 2F]`, gate then up -> `silu(gate) * up [R, F]`."""
    return _ops(x).silu_mul(x)


def rope_write(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, rows_kv: Tensor, heads: int) -> Tensor:
    """Rotate the queries and keys of `qkv [R, (Hq + 2 Hkv) D]`, write keys and values to `slots [R]` of `rows_kv [2, rows, Hkv, D]`.

    Returns the queries `[R, Hq, D]`. `cos, sin [max_position, D/2]` float32; `positions [R]`, `slots [R]` int32. All contiguous.
    """
    return _ops(qkv).rope_write(qkv, cos, sin, positions, slots, rows_kv, heads)


def norm_rope_write(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, rows_kv: Tensor, heads: int
) -> Tensor:
    """`rope_write` after an `rms_norm` of every query head by `q_norm [D]` and of every key head by `k_norm [D]`."""
    return _ops(qkv).norm_rope_write(qkv, q_norm, k_norm, eps, cos, sin, positions, slots, rows_kv, heads)


def attention(
    q: Tensor,
    rows_kv: Tensor,
    pages_kv: Tensor,
    segments: Tensor,
    page_table: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    anc: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Attention of `q [R, Hq, D]` over pages `[2, P, Hkv, S, D]` and rows `[2, rows, Hkv, D]` -> `[R, Hq, D]`; all contiguous.

    `segments [B, 6]` int32 (q0, nq, k0, nk, prefix, causal), `page_table [B, M]` int32, `q_pos [R]`, `k_pos [rows]` int32,
    `anc [R, W]` int64 words of 64 keys. The whole contract is in `reference.attention`.
    """
    return _ops(q).attention(q, rows_kv, pages_kv, segments, page_table, q_pos, k_pos, anc, scale, window)


def commit(rows_kv: Tensor, pages_kv: Tensor, rows: Tensor, pages: Tensor, offsets: Tensor) -> None:
    """Copy `rows [n]` of `rows_kv [L, 2, rows, Hkv, D]` to (`pages [n]`, `offsets [n]`) of `pages_kv [L, 2, P, Hkv, S, D]`; int64."""
    _ops(rows_kv).commit(rows_kv, pages_kv, rows, pages, offsets)


def accept(
    rows_kv: Tensor, pages_kv: Tensor, segments: Tensor, page_table: Tensor, tokens: Tensor, anc: Tensor, sampled: Tensor, verify: Tensor,
    stops: Tensor,
) -> Tensor:  # fmt: skip
    """Walk every segment's tree along the `sampled [n]` tokens and commit the K/V of what is kept; `[B, 3]` int32: row, closing token, finish
    (0 none, 1 stop, 2 length). `verify [B, 5]`, `stops [*]` int32, as in `reference.accept`."""
    return _ops(rows_kv).accept(rows_kv, pages_kv, segments, page_table, tokens, anc, sampled, verify, stops)


def gumbel(seed: int, position: int, vocab: int, device: torch.device | str = "cpu") -> Tensor:
    """The noise `[V]` float32 of the token at index `position`, a function of the unsigned 64-bit `seed` and of `position` alone."""
    where = torch.device(device)
    return _ops_of(where.type).gumbel(seed, position, vocab, where)


def fill_noise(table: Tensor, fills: Tensor) -> None:
    """Write the noise of `fills [m, 3]` int64 (seed as a signed number, position, row) to the rows of `table [n, V]` that they name; below 0:
    none."""
    _ops(table).fill_noise(table, fills)


def adjust(logits: Tensor, rows: Tensor, penalties: Tensor, edits: Tensor, bias: Tensor, paths: Tensor) -> None:
    """Bias, hold open and penalise `logits [n, V]` in place. `rows [n, 4]`, `edits [E, 3]`, `paths [P]` int32, `penalties [n, 3]`, `bias [E]`
    float32, as in `reference.adjust`."""
    _ops(logits).adjust(logits, rows, penalties, edits, bias, paths)


def sample(logits: Tensor, noise: Tensor, noise_row: Tensor, inv_temperature: Tensor, limit: int) -> Tensor:
    """`[n]` int64: argmax over v < limit of `logits [n, V]` * `inv_temperature [n]` + `noise [m, V]`; the smaller id wins a tie.

    `noise_row [n]` int32 names the row of `noise`, or is -1 for a greedy row: its logits are taken as they are. -2: nobody asks.
    """
    return _ops(logits).sample(logits, noise, noise_row, inv_temperature, limit)


def truncate(logits: Tensor, inv_temperature: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor, limit: int) -> Tensor:
    """`logits [n, V]`, which it may overwrite, with -inf where a token does not survive min_p, top_k `[n]` int32, top_p `[n]` float64, in this order.
    `log_min_p [n]` float32 is taken on the CPU: another logarithm would keep other tokens."""
    return _ops(logits).truncate(logits, inv_temperature, log_min_p, top_k, top_p, limit)
