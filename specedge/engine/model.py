"""The decoder: one forward pass over the rows of a step.

Rows come from many sequences and are prompt chunks, single tokens and tree rows alike. Knows nothing of sequences or sampling. Invariant on a
CPU: the bits of a row depend on its own path of tokens and on nothing that it is batched with.
"""

import torch
from torch import Tensor

from specedge import kernels
from specedge.config import ModelConfig
from specedge.engine.batch import StepBatch
from specedge.engine.weights import Weights


class Decoder:
    """A Llama-shaped decoder over the K/V of `rows [L, 2, rows, Hkv, D]` and `pages [L, 2, P, Hkv, S, D]`."""

    def __init__(self, config: ModelConfig, weights: Weights, positions: int) -> None:
        self.config, self.weights = config, weights
        device = weights.embedding.device
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angle = torch.outer(torch.arange(positions, dtype=torch.float32), 1.0 / config.rope_theta**half)
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)  # [positions, D/2]

    def forward(self, batch: StepBatch, rows: Tensor, pages: Tensor) -> Tensor:
        """Logits `[n, V]` float32 of the wanted rows; writes the K/V of all rows of the batch to their slots in `rows`."""
        c, w = self.config, self.weights
        x = w.embedding[batch.tokens]
        for i, layer in enumerate(w.layers):
            qkv = layer.qkv(kernels.rms_norm(x, layer.input_norm, c.norm_eps))
            q = kernels.rope_write(qkv, self.cos, self.sin, batch.positions, batch.slots, rows[i], c.heads)
            o = kernels.attention(
                q, rows[i], pages[i], batch.segments, batch.page_table, batch.positions, batch.k_pos, batch.anc, c.head_dim**-0.5, 0
            )
            x = x + layer.out(o.flatten(1))
            x = x + layer.down(kernels.silu_mul(layer.gate_up(kernels.rms_norm(x, layer.post_norm, c.norm_eps))))
        return w.head(kernels.rms_norm(x[batch.wanted], w.norm, c.norm_eps)).float()
