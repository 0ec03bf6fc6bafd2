"""The ops of csrc/cuda for CUDA tensors.

The library holds plain C launchers and knows nothing of torch; they get addresses and the current stream. Invariant: no call waits for the device.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CudaOps:
    """The launchers of the library `path`. Raises OSError if it does not load."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def gumbel(self, seed: int, position: int, vocab: int, device: torch.device) -> Tensor:
        """`reference.gumbel`."""
        out = torch.empty((1, vocab), device=device)
        self.fill_noise(out, torch.tensor([[(seed + 2**63) % 2**64 - 2**63, position, 0]], device=device))
        return out[0]

    def fill_noise(self, table: Tensor, fills: Tensor) -> None:
        """`reference.fill_noise`."""
        if len(fills):
            self._launch("noise", fills, table, len(fills), table.shape[1])

    def adjust(self, logits: Tensor, rows: Tensor, penalties: Tensor, edits: Tensor, bias: Tensor, paths: Tensor) -> None:
        """`reference.adjust`."""
        if len(logits):
            self._launch("adjust", logits, rows, penalties, edits, bias, paths, *logits.shape)

    def sample(self, logits: Tensor, noise: Tensor, noise_row: Tensor, inv_temperature: Tensor, limit: int) -> Tensor:
        """`reference.sample`."""
        rows, vocab = logits.shape
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
        self._launch("sample", logits, noise, noise_row, inv_temperature, out, rows, vocab, limit)
        return out

    def truncate(self, logits: Tensor, inv_temperature: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor, limit: int) -> Tensor:
        """`reference.truncate`, in place; a row without a filter is left as it is, ids past the limit included."""
        rows, vocab = logits.shape
        self._launch("truncate", logits, inv_temperature, log_min_p, top_k, top_p, logits, rows, vocab, limit)
        return logits

    def accept(
        self, rows_kv: Tensor, pages_kv: Tensor, segments: Tensor, page_table: Tensor, tokens: Tensor, anc: Tensor, sampled: Tensor, verify: Tensor,
        stops: Tensor,
    ) -> Tensor:  # fmt: skip
        """`reference.accept`; what it says of segments of which nothing was asked is arbitrary."""
        layers, both, slots, heads, dim = rows_kv.shape
        _, _, pages, _, size, _ = pages_kv.shape
        count, width = page_table.shape
        out = torch.empty((count, 3), dtype=torch.int32, device=tokens.device)
        self._launch(
            "accept", segments, page_table, tokens, anc, sampled, verify, stops, out, rows_kv, pages_kv,
            count, len(tokens), anc.shape[1], width, layers * both, slots, pages, heads, size, dim * rows_kv.element_size() // 16,
        )  # fmt: skip
        return out

    def _launch(self, name: str, *args: Any) -> None:
        """Call a launcher on the current stream; tensors are passed by address."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not all(t.is_contiguous() for t in tensors):
            raise ValueError(f"{name} takes contiguous tensors")
        stream = torch.cuda.current_stream(tensors[0].device).cuda_stream if tensors[0].is_cuda else 0
        plain = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in args]
        error = getattr(self._library, f"specedge_{name}")(*plain, ctypes.c_void_p(stream))
        if error:
            raise RuntimeError(f"{name} could not be launched: CUDA error {error}")
