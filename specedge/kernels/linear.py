"""Linear layers whose rows do not depend on each other.

On a CPU the weight is packed once by oneDNN. Measured there (float32 and bfloat16, N and K from 33 to 4096, 2 to 599 rows): a row has the same
bits for every row count of at least two, at about 90 % of the bandwidth roof, while `F.linear` has neither property; one row is padded
to two. Elsewhere this is `F.linear`. Knows nothing of layers or models.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_FOR_ROWS = 64  # a hint for oneDNN's blocking; the result does not depend on it


class Linear:
    """`x [R, K]` -> `x W^T + b [R, N]` for a weight `[N, K]` and perhaps a bias `[N]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        able = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if weight.dtype == torch.bfloat16:
            able = able and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.packed = able and weight.device.type == "cpu"
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_FOR_ROWS) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        rows = x.shape[0]
        if rows == 1:
            x = x.expand(2, -1)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.weight, self.bias, "none", [], "")
        return y[:rows]
