"""The decoder: one forward pass over the rows of a step.

Rows come from many sequences and are prompt chunks, single tokens and tree rows alike. Knows nothing of sequences or sampling. Invariant on a
CPU: the bits of a row depend on its own path of tokens and on nothing that it is batched with.
"""

from collections.abc import Callable

from torch import Tensor

from specedge import kernels
from specedge.config import ModelConfig
from specedge.engine.batch import StepBatch
from specedge.engine.rope import angles
from specedge.engine.weights import Weights


class Abandoned(Exception):
    """A pass that was given up between two layers: no logits, and its rows of the row buffer hold nothing of use."""


class Decoder:
    """A Llama-shaped decoder over the K/V of `rows [L, 2, rows, Hkv, D]` and `pages [L, 2, P, Hkv, S, D]`."""

    def __init__(self, config: ModelConfig, weights: Weights, positions: int) -> None:
        self.config, self.weights = config, weights
        device = weights.embedding.device
        self.windows = config.windows or (0,) * config.layers
        self.cos, self.sin = (t.to(device) for t in angles(config, positions))

    def forward(
        self, batch: StepBatch, rows: Tensor, pages: Tensor, logits: Tensor | None = None, stop: Callable[[], bool] | None = None
    ) -> Tensor:
        """Logits `[n, V]` float32 of the wanted rows, in `logits` if that is there; writes the K/V of all rows to their slots in `rows`. `stop` is
        asked after every layer: Abandoned once it says yes."""
        c, w = self.config, self.weights
        x = w.embedding[batch.tokens]
        y = kernels.rms_norm(x, w.layers[0].input_norm, c.norm_eps)
        next_norms = [*(layer.input_norm for layer in w.layers[1:]), w.norm]
        for i, (layer, next_norm) in enumerate(zip(w.layers, next_norms, strict=True)):
            qkv, to = layer.qkv(y), rows[i]
            if layer.qk_norm is None:
                q = kernels.rope_write(qkv, self.cos, self.sin, batch.positions, batch.slots, to, c.heads)
            else:
                q_norm, k_norm = layer.qk_norm
                q = kernels.norm_rope_write(
                    qkv, q_norm, k_norm, c.norm_eps, self.cos, self.sin, batch.positions, batch.slots, to, c.heads
                )  # fmt: skip
            o = kernels.attention(
                q, rows[i], pages[i], batch.segments, batch.page_table, batch.positions, batch.k_pos, batch.anc, c.head_dim**-0.5, self.windows[i]
            )
            y, x = kernels.add_rms_norm(layer.out(o.flatten(1)), x, layer.post_norm, c.norm_eps)
            y, x = kernels.add_rms_norm(layer.down(layer.gate_up(y)), x, next_norm, c.norm_eps)
            if stop is not None and stop():
                raise Abandoned
        return w.head(y[batch.wanted], logits).float()
