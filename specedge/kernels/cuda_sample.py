"""gumbel, sample and truncate of csrc/cuda/sample.cu for CUDA tensors.

The library holds plain C launchers and knows nothing of torch; they get addresses and the current stream. Invariant: no call waits for the device.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CudaSample:
    """The launchers of the library `path`. Raises OSError if it does not load."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def gumbel(self, seed: int, position: int, vocab: int, device: torch.device) -> Tensor:
        """`reference.gumbel`."""
        out = torch.empty(vocab, device=device)
        self._launch("gumbel", ctypes.c_uint64(seed), ctypes.c_uint32(position), out, vocab)
        return out

    def sample(self, logits: Tensor, noise: Tensor, noise_row: Tensor, inv_temperature: Tensor, limit: int) -> Tensor:
        """`reference.sample`."""
        rows, vocab = logits.shape
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
        self._launch("sample", logits, noise, noise_row, inv_temperature, out, rows, vocab, limit)
        return out

    def truncate(self, logits: Tensor, inv_temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, limit: int) -> Tensor:
        """`reference.truncate`."""
        rows, vocab = logits.shape
        out = torch.empty_like(logits)
        self._launch("truncate", logits, inv_temperature, min_p.log(), top_k, top_p, out, rows, vocab, limit)
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
