"""Runner: a model on a device with its K/V, pages and row buffer.

Runs a batch and commits rows; does not know who asked. Engine and drafter each own one. Invariant: a forward pass writes to the row buffer
only, so pages change by `commit` alone and never roll back.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specedge import kernels
from specedge.config import EngineConfig, ModelConfig, SpecedgeError
from specedge.engine.batch import BatchBuilder
from specedge.engine.buckets import kv_tokens_that_fit, workspace
from specedge.engine.model import Decoder
from specedge.engine.weights import load_weights, read_config

# name: what activations, norms, embedding and K/V are, and the bits of the linear layers' weights if they are integers. With those the rest is
# bfloat16, as in most checkpoints: half the K/V of float32, and its rounding is finer than that of activations to 8 bits.
DTYPES: dict[str, tuple[torch.dtype, int | None]] = {
    "float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None), "float16": (torch.float16, None),
    "int8": (torch.bfloat16, 8), "int4": (torch.bfloat16, 4),
}  # fmt: skip


class DeviceError(SpecedgeError):
    """A device or dtype that this machine does not offer, or that is too small."""


def choose(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype, int | None]:
    """Device, dtype and bits of integer weights by name; None: CUDA if there is one, else the CPU; bfloat16 on CUDA, float32 on a CPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):  # of several GPUs the current one: Triton and csrc/cuda launch there, whatever tensors they are given
        raise DeviceError(f"device {device!r} is unknown: use cpu or cuda, and CUDA_VISIBLE_DEVICES to choose among GPUs")
    if device != "cpu" and not torch.cuda.is_available():
        raise DeviceError("this machine offers no CUDA device to torch: use --device cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise DeviceError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES)}")
    if device == "cpu" and dtype == "float16":
        raise DeviceError("float16 is not served on a CPU: use float32 or bfloat16")
    if device != "cpu" and DTYPES[dtype][1] is not None:
        raise DeviceError(f"{dtype} weights are served on a CPU only: use --device cpu, or bfloat16")
    return torch.device(device), *DTYPES[dtype]


def there_is(device: torch.device) -> str:
    """The memory of a GPU, in words."""
    free, total = torch.cuda.mem_get_info(device)
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free"


def sizes_for(c: ModelConfig, sizes: EngineConfig, device: torch.device, itemsize: int) -> EngineConfig:
    """`sizes` with a number of kv_tokens: on a GPU, if none is given, as many as fit it beside the weights that are there already."""
    if sizes.kv_tokens is not None or device.type != "cuda":
        return sizes
    torch.cuda.empty_cache()  # what joining matrices has left behind
    tokens = kv_tokens_that_fit(c, sizes, itemsize, *torch.cuda.mem_get_info(device))
    if tokens < sizes.page_size:
        need = workspace(c, sizes.max_rows, itemsize) / 1e9
        raise DeviceError(
            f"{device} has no room for K/V: {there_is(device)}, passes of {sizes.max_rows} rows take {need:.1f} GB, and {sizes.gpu_share:.0%} may be "
            "used; ask for fewer max_rows or a larger gpu_share, or use a smaller model"
        )
    return replace(sizes, kv_tokens=tokens)


class Runner:
    """`rows` rows of row buffer and `sizes.pages` pages for one model."""

    def __init__(self, model: Decoder, sizes: EngineConfig, rows: int) -> None:
        c = model.config
        like = model.weights.embedding
        self.device, self.dtype = like.device, like.dtype
        self.model, self.sizes = model, sizes
        try:  # and a row and a page for the dummy that pads captured passes
            self.rows = like.new_zeros((c.layers, 2, rows + 1, c.kv_heads, c.head_dim))
            self.pages = like.new_zeros((c.layers, 2, sizes.pages + 1, c.kv_heads, sizes.page_size, c.head_dim))
        except RuntimeError:
            need = (sizes.tokens + rows) * c.kv_bytes_per_token(like.element_size())
            there = f" ({there_is(self.device)})" if self.device.type == "cuda" else ""
            raise DeviceError(
                f"{need / 1e9:.1f} GB for the K/V of {sizes.tokens} tokens do not fit {self.device}{there}: ask for fewer kv_tokens"
            ) from None
        self.k_pos = np.zeros(rows + 1, np.int32)
        self._logits = like.new_empty((0, c.vocab), dtype=torch.float32)

    @classmethod
    def load(cls, path: Path, sizes: EngineConfig, rows: int, device: str | None, dtype: str | None, progress: bool) -> "Runner":
        """A runner for the model directory `path`."""
        config = read_config(path)
        chosen, kind, bits = choose(device, dtype)
        weights = load_weights(path, config, chosen, kind, bits, progress)
        sizes = sizes_for(config, sizes, chosen, weights.embedding.element_size())
        return cls(Decoder(config, weights, min(config.max_positions, sizes.tokens)), sizes, rows)

    @property
    def context(self) -> int:
        """Tokens that one sequence may hold."""
        return min(self.model.config.max_positions, self.sizes.pages * self.sizes.page_size)

    def batch(self) -> BatchBuilder:
        """An empty batch over this runner's row buffer."""
        return BatchBuilder(self.k_pos)

    @torch.inference_mode()
    def run(self, batch: BatchBuilder, stop: Callable[[], bool] | None = None) -> Tensor:
        """Logits `[n, V]` float32 of the rows that the batch wants; the next run overwrites them (in new memory 64 rows of 152 k took 16 ms). `stop`:
        as of Decoder.forward, which may raise Abandoned."""
        built = batch.build(self.device)
        if len(built.wanted) > len(self._logits):
            for rows in (0, len(built.wanted)):  # the old ones are freed first
                self._logits = self._logits.new_empty((rows, self.model.config.vocab))
        return self.model.forward(built, self.rows, self.pages, self._logits[: len(built.wanted)], stop)

    @torch.inference_mode()
    def commit(self, rows: list[int], pages: list[int], offsets: list[int]) -> None:
        """Copy the K/V of row-buffer rows to (page, offset), over all layers."""
        if rows:
            index = torch.tensor([rows, pages, offsets])
            if self.device.type == "cuda":  # from pinned memory the copy is not waited for
                index = index.pin_memory().to(self.device, non_blocking=True)
            kernels.commit(self.rows, self.pages, index[0], index[1], index[2])
