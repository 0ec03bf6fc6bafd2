"""The decoder: one forward pass over the rows of a step.

Rows come from many sequences and are prompt chunks, single tokens and tree rows alike. Knows nothing of sequences or sampling. Invariant on a
CPU: the bits of a row depend on its own path of tokens and on nothing that it is batched with.
"""

import torch
from torch import Tensor

from specedge import kernels
from specedge.config import ModelConfig
from specedge.engine.batch import StepBatch
from specedge.engine.rope import angles
from specedge.engine.weights import Weights


class Decoder:
    """A Llama-shaped decoder over the K/V of `rows [L, 2, rows, Hkv, D]` and `pages [L, 2, P, Hkv, S, D]`."""

    def __init__(self, config: ModelConfig, weights: Weights, positions: int) -> None:
        self.config, self.weights = config, weights
        device = weights.embedding.device
        self.windows = config.windows or (0,) * config.layers
        self.cos, self.sin = (t.to(device) for t in angles(config, positions))

    def forward(self, batch: StepBatch, rows: Tensor, pages: Tensor) -> Tensor:
        """Logits `[n, V]` float32 of the wanted rows; writes the K/V of all rows of the batch to their slots in `rows`."""
        c, w = self.config, self.weights
        x = w.embedding[batch.tokens]
        for i, layer in enumerate(w.layers):
            qkv = layer.qkv(kernels.rms_norm(x, layer.input_norm, c.norm_eps))
            if layer.qk_norm is not None:
                qkv = self._norm_heads(qkv, *layer.qk_norm)
            q = kernels.rope_write(qkv, self.cos, self.sin, batch.positions, batch.slots, rows[i], c.heads)
            o = kernels.attention(
                q, rows[i], pages[i], batch.segments, batch.page_table, batch.positions, batch.k_pos, batch.anc, c.head_dim**-0.5, self.windows[i]
            )
            x = layer.out(o.flatten(1), x)
            x = layer.down(kernels.silu_mul(layer.gate_up(kernels.rms_norm(x, layer.post_norm, c.norm_eps))), x)
        return w.head(kernels.rms_norm(x[batch.wanted], w.norm, c.norm_eps)).float()

    def _norm_heads(self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        """RMSNorm of every query and key head of `qkv [R, (Hq + 2 Hkv) D]` by itself (Qwen3)."""
        c = self.config
        q, k = c.heads * c.head_dim, c.kv_heads * c.head_dim
        queries = kernels.rms_norm(qkv[:, :q].reshape(-1, c.head_dim), q_norm, c.norm_eps)
        keys = kernels.rms_norm(qkv[:, q : q + k].reshape(-1, c.head_dim), k_norm, c.norm_eps)
        return torch.cat((queries.view(-1, q), keys.view(-1, k), qkv[:, q + k :]), dim=1)
