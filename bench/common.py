"""What the benchmarks share: ceilings measured in the same run, medians, and models of random weights in known shapes.

Every benchmark prints the floor first (bytes, operations, ceilings), then the time, then the share of the floor; its last line is one JSON object.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from specedge.config import EngineConfig, ModelConfig
from specedge.engine.model import Decoder
from specedge.engine.runner import Runner
from specedge.engine.weights import LayerWeights, Weights
from specedge.kernels.linear import Linear

SHAPES = {  # bench.widen takes sizes from them alone: biases stay as they are in the narrow model
    "tiny": ModelConfig(64, 2, 4, 2, 16, 128, 256, 1e-6, 1e4, 8192, True, qkv_bias=True),  # for tests of the benchmarks themselves
    "60m": ModelConfig(512, 8, 8, 2, 64, 1536, 32000, 1e-6, 1e6, 8192, True),
    "0.5b": ModelConfig(896, 24, 14, 2, 64, 4864, 151936, 1e-6, 1e6, 8192, True, qkv_bias=True),  # as Qwen2.5-0.5B
    "1.5b": ModelConfig(1536, 28, 12, 2, 128, 8960, 151936, 1e-6, 1e6, 8192, True, qkv_bias=True),  # as Qwen2.5-1.5B
    "qwen3-0.6b": ModelConfig(1024, 28, 16, 8, 128, 3072, 151936, 1e-6, 1e6, 40960, True, qk_norm=True),
    "llama-3.1-8b": ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, 1e-5, 5e5, 131072, False),
    "qwen3-14b": ModelConfig(5120, 40, 40, 8, 128, 17408, 151936, 1e-6, 1e6, 40960, False, qk_norm=True),
}


def rewrite(source: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The model in `source` with every tensor changed, in `folder`; the same every time."""
    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: change(t) for name, t in load_file(source / "model.safetensors").items()}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def median_ms(run: Callable[[], object], seconds: float = 2.0, least: int = 5) -> float:
    """Median time of a call in milliseconds, over at least `least` calls and about `seconds`, after two that do not count."""
    times: list[float] = []
    for _ in range(2):
        run()
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


def stream_ceiling(stream: torch.Tensor, seconds: float = 2.0) -> float:
    """What memory gives now, in GB/s: a sum over `stream`, which must be far larger than the caches."""
    return stream.numel() * stream.itemsize / median_ms(stream.sum, seconds, 1) / 1e6


def gemm_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 1.0, side: int = 4096) -> float:
    """The best product of 512 to 2048 rows with a square matrix, in GFLOP/s, ours or torch's: a floor must not follow from our own slowness."""
    best = 0.0
    weight = torch.randn(side, side).to(device, dtype)
    layer = Linear(weight)
    for rows in (512, 1024, 2048):
        x = torch.randn(rows, side).to(device, dtype)
        for product in (layer, partial(F.linear, weight=weight)):
            best = max(best, 2 * rows * weight.numel() / median_ms(partial(product, x), seconds / 2, 1) / 1e6)
    return best


def ceilings(device: torch.device, seconds: float = 2.0, floats: int = 500_000_000, side: int = 4096) -> dict[str, float]:
    """What this machine can do now: streaming in GB/s, products in bfloat16 and float32 in GFLOP/s."""
    stream = torch.ones(floats, device=device)
    rates = {"gemm_gflop_per_s": torch.bfloat16, "float32_gflop_per_s": torch.float32}
    products = {name: gemm_ceiling(device, dtype, seconds / 2, side) for name, dtype in rates.items()}
    return {"stream_gb_per_s": stream_ceiling(stream, seconds), **products}


def random_runner(c: ModelConfig, sizes: EngineConfig, device: torch.device, dtype: torch.dtype, bits: int | None = None) -> Runner:
    """A runner over random weights, made on the device and never written."""
    rng = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=rng, device=device) / columns**0.5).to(dtype)

    def linear(rows: int, columns: int, gated: bool = False, biased: bool = False) -> Linear:
        return Linear(matrix(rows, columns), matrix(1, rows)[0] if biased else None, bits, gated)

    ones = torch.ones(c.hidden, device=device, dtype=dtype)
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    of_head = torch.ones(c.head_dim, device=device, dtype=dtype)
    qk_norm = (of_head, of_head) if c.qk_norm else None
    layers = tuple(
        LayerWeights(
            ones, linear(q + 2 * kv, c.hidden, biased=c.qkv_bias), linear(c.hidden, q), ones, linear(2 * c.ffn, c.hidden, True),
            linear(c.hidden, c.ffn), qk_norm,
        )
        for _ in range(c.layers)
    )  # fmt: skip
    embedding = matrix(c.vocab, c.hidden)
    return Runner(Decoder(c, Weights(embedding, layers, ones, Linear(embedding, bits=bits), bits), c.max_positions), sizes, sizes.max_rows)


def weight_bytes(c: ModelConfig, itemsize: float) -> float:
    """Bytes of weights that a forward pass reads, the output head among them."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return itemsize * (c.layers * c.hidden * (2 * q + 2 * kv + 3 * c.ffn) + c.vocab * c.hidden)
