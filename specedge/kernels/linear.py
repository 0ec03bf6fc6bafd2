"""Linear layers whose rows do not depend on each other.

On a CPU the weight is packed once: by the C++ ops where they are built, else by oneDNN, whose rows have the same bits at every row count of
at least two (measured for float32 and bfloat16, N and K from 33 to 4096, 2 to 599 rows), so that one row is padded to two. Elsewhere this is
`F.linear`. Weights of 8 or 4 bits are made from the given ones. Knows nothing of layers or models.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specedge.kernels import backend, reference, silu_mul

PACK_FOR_ROWS = 64  # a hint for oneDNN's blocking; the result does not depend on it
LANES = 16  # of csrc/cpu/vec.h
QUANTISE_ROWS = 8192  # of a weight at a time: in float32 they take a tenth of the memory of the largest matrix


class Linear:
    """`x [R, K]` -> `x W^T + b [R, N]` for a weight `[N, K]` and perhaps a bias `[N]`; `bits` 8 or 4 rounds the weight to integers.

    A `gated` layer's outputs are a gate and then what it multiplies, and it returns `silu_mul` of them `[R, N / 2]`, to the bit: in C++ without
    writing them (of 512 rows of 9,728 outputs that was a sixth of the time).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, bits: int | None = None, gated: bool = False) -> None:
        self.outputs, self.gated = len(weight) // 2 if gated else len(weight), gated
        self.scale: Tensor | None = None
        ops: Any = torch.ops.specedge
        cpp = weight.device.type == "cpu" and backend() != "torch"
        if gated and cpp:
            weight, bias = _side_by_side(weight), None if bias is None else _side_by_side(bias)
        self.bias = bias
        if bits is not None:
            parts = [reference.quantise(part, bits) for part in weight.split(QUANTISE_ROWS)]  # type: ignore[no-untyped-call]
            q, scale = (torch.cat(each) for each in zip(*parts, strict=True))
            self.kind = "C++ integers" if cpp else "integers"
            self.weight = ops.linear_pack_int(q, scale if bits == 4 else None) if cpp else q
            self.scale = None if cpp and bits == 4 else scale  # the packed weight holds those of 4 bits
        elif cpp:
            self.kind, self.weight = "C++", ops.linear_pack(weight)
        elif weight.device.type == "cpu" and _onednn_packs(weight.dtype):
            self.kind, self.weight = "oneDNN", torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_FOR_ROWS)
        else:
            self.kind, self.weight = "torch", weight

    def __call__(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """With `logits [R, N]` float32 that is where the result goes, rounded like any other."""
        y: Tensor
        match self.kind:
            case "C++":
                y = torch.ops.specedge.linear(x, self.weight, self.outputs, self.bias, gated=self.gated, logits=logits)
            case "C++ integers":
                y = torch.ops.specedge.linear_int(x, self.weight, self.scale, self.outputs, self.bias, gated=self.gated, logits=logits)
            case "integers":
                assert self.scale is not None
                y = reference.linear_int(x, self.weight, self.scale, self.bias)
            case "oneDNN":
                padded = x.expand(2, -1) if len(x) == 1 else x
                y = torch.ops.mkldnn._linear_pointwise(padded.contiguous(), self.weight, self.bias, "none", [], "")[: len(x)]
            case _:
                y = F.linear(x, self.weight, self.bias)
        if self.gated and not self.kind.startswith("C++"):
            y = silu_mul(y)
        return y if logits is None or y is logits else logits.copy_(y)


def _side_by_side(x: Tensor) -> Tensor:
    """`x [2F, ..]` as panels of 16 gates and the 16 that they multiply; F is rounded up with zeros."""
    parts, inner = x.reshape(2, -1, *x.shape[1:]), x.shape[1:]  # [2, F, ..]
    parts = torch.cat((parts, parts.new_zeros((2, -parts.shape[1] % LANES, *inner))), dim=1)
    return parts.view(2, -1, LANES, *inner).transpose(0, 1).reshape(-1, *inner)


def _onednn_packs(dtype: torch.dtype) -> bool:
    able: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return able and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
