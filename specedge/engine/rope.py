"""Rotary position frequencies: the scalings that Llama, Mistral and Qwen checkpoints name in their config.

A pure function of the configuration; knows nothing of models. Sources: RoFormer (arXiv 2104.09864), position interpolation (2306.15595),
YaRN (2309.00071) and the scheme that Llama 3.1 published with its weights.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from specedge.config import ModelConfig

# what a scaling needs in config.json beside rope_type and rope_theta
FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
OPTIONAL = {"yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")}
MAX_CONTEXT = 2**31 - 1  # positions are int32


def context(kind: str, rope: Mapping[str, float], positions: int) -> int:
    """Tokens that a text may have whose checkpoint says max_position_embeddings = `positions`: YaRN stretches the original context by its factor and
    interpolation stretches `positions`, as in vLLM. A larger `positions` holds, for some checkpoints state what they were stretched to."""
    if kind not in ("yarn", "linear"):
        return positions
    original = rope["original_max_position_embeddings"] if kind == "yarn" else positions
    return max(positions, int(min(original * rope["factor"], MAX_CONTEXT)))


def angles(config: ModelConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions 0 .. positions-1, each `[positions, D/2]` float32, any amplitude of the scaling included."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency, amplitude = _SCALINGS[config.rope_type](1.0 / config.rope_theta**half, config)
    angle = torch.outer(torch.arange(positions, dtype=torch.float32), frequency)
    return angle.cos() * amplitude, angle.sin() * amplitude


def _same(frequency: Tensor, _: ModelConfig) -> tuple[Tensor, float]:
    """No scaling. Dynamic NTK is this too within max_position_embeddings, and longer texts are not served: its frequencies would change under
    the K/V that is already there."""
    return frequency, 1.0


def _linear(frequency: Tensor, c: ModelConfig) -> tuple[Tensor, float]:
    """Positions are squeezed by `factor`."""
    return frequency / c.rope["factor"], 1.0


def _llama3(frequency: Tensor, c: ModelConfig) -> tuple[Tensor, float]:
    """Long waves are squeezed by `factor`, short ones stay, those between are blended by how often they turn in the original context."""
    factor, low, high = c.rope["factor"], c.rope["low_freq_factor"], c.rope["high_freq_factor"]
    turns = c.rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequency / factor + blend * frequency, 1.0


def _yarn(frequency: Tensor, c: ModelConfig) -> tuple[Tensor, float]:
    """As llama3, but blended linearly in the index of the pair; queries and keys grow by an amplitude."""
    r, dim = c.rope, c.head_dim
    factor = r["factor"]
    original = r["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """Index of the pair that turns so often in the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = pair(r.get("beta_fast", 32)), pair(r.get("beta_slow", 1))
    if r.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    squeezed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = r.get("attention_factor")
    if amplitude is None:
        amplitude = grown(r["mscale"]) / grown(r["mscale_all_dim"]) if r.get("mscale") and r.get("mscale_all_dim") else grown(1.0)
    return squeezed * frequency / factor + (1 - squeezed) * frequency, float(amplitude)


_SCALINGS: Mapping[str, Callable[[Tensor, ModelConfig], tuple[Tensor, float]]] = {
    "default": _same, "linear": _linear, "dynamic": _same, "yarn": _yarn, "llama3": _llama3,
}  # fmt: skip
