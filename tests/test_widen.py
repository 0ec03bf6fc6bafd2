"""bench/widen.py: a widened model computes what the narrow one does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.widen import wide_runner, widened
from specedge.config import EngineConfig, ModelConfig, SamplingParams
from specedge.engine.engine import Engine
from specedge.engine.runner import Runner
from specedge.engine.weights import read_config
from specedge.text import Tokenizer
from tests.engine.test_families import make
from tests.helpers import random_model

DEMO = Path(__file__).parents[1] / "specedge" / "demo" / "target"
SIZES = EngineConfig(kv_tokens=1024, max_rows=64)
NARROW = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 88, "vocab_size": 257}
SHAPES = {  # hidden, layers, heads, kv_heads, head_dim, ffn, vocab
    "the same": (48, 2, 6, 2, 8, 88, 257),
    "hidden": (112, 2, 6, 2, 8, 88, 257),
    "layers": (48, 5, 6, 2, 8, 88, 257),
    "more queries per K/V head": (48, 2, 8, 2, 8, 88, 257),
    "fewer queries per K/V head": (48, 2, 8, 4, 8, 88, 257),
    "one query per K/V head": (48, 2, 7, 7, 8, 88, 257),
    "head dim x 2": (48, 2, 6, 2, 16, 88, 257),
    "head dim x 8": (48, 2, 6, 2, 64, 88, 257),
    "ffn": (48, 2, 6, 2, 8, 300, 257),
    "vocabulary": (48, 2, 6, 2, 8, 88, 1000),
    "everything": (128, 4, 16, 4, 32, 256, 512),
}


def config(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int) -> ModelConfig:
    return ModelConfig(hidden, layers, heads, kv_heads, head_dim, ffn, vocab, 1e-6, 1e6, 8192, True)


def logits(runner: Runner, tokens: list[int]) -> torch.Tensor:
    batch = runner.batch()
    batch.add(tokens, list(range(len(tokens))), list(range(len(tokens))), (0, len(tokens)), 0, [], None, list(range(len(tokens))))
    return runner.run(batch)


def compare(path: Path, shape: ModelConfig) -> None:
    wide = wide_runner(path, shape, SIZES, torch.device("cpu"), torch.float32)
    narrow = Runner.load(path, SIZES, 64, "cpu", "float32", False)
    tokens = list(range(3, 45))
    a, b = logits(narrow, tokens), logits(wide, tokens)
    assert b.shape == (len(tokens), shape.vocab) and wide.model.config.layers == shape.layers
    torch.testing.assert_close(b[:, : a.shape[1]], a, rtol=0, atol=2e-5 * float(a.abs().max()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_the_narrow_model(tmp_path: Path, shape: tuple[int, ...], tied: bool) -> None:
    compare(random_model(tmp_path, **{**NARROW, "tie_word_embeddings": tied}), config(*shape))


@pytest.mark.parametrize("case", ["llama-bias", "qwen2-window"])
def test_biases_and_windows_stay(tmp_path: Path, case: str) -> None:
    make(tmp_path, case)
    compare(tmp_path, config(128, 5, 16, 4, 32, 256, 512))


def test_ids_of_the_demo_are_unchanged() -> None:
    shape = config(512, 8, 16, 4, 128, 1024, 8192)
    wide = wide_runner(DEMO, shape, SIZES, torch.device("cpu"), torch.float32)
    narrow = Runner.load(DEMO, SIZES, 64, "cpu", "float32", False)
    tokenizer, eos = Tokenizer.from_dir(DEMO), narrow.model.config.eos_ids
    for params in (SamplingParams(max_tokens=24), SamplingParams(max_tokens=24, temperature=0.8, seed=3, ignore_eos=True)):
        texts = [Engine(r, tokenizer, eos).generate("def area(radius):\n", params)[0].token_ids for r in (narrow, wide)]
        assert texts[0] == texts[1]


def test_what_does_not_fit_is_refused() -> None:
    narrow = read_config(DEMO)
    for name, value in (("hidden", 256), ("layers", 3), ("ffn", 100), ("vocab", 4095), ("head_dim", 96), ("kv_heads", 1)):
        roomy = config(768, 12, 12, 4, 128, 3072, 8192)
        with pytest.raises(ValueError, match=f"^{name} is {value}"):
            widened(narrow, replace(roomy, **{name: value}))
    with pytest.raises(ValueError, match="not widened"):
        widened(replace(narrow, qk_norm=True), config(768, 12, 12, 4, 128, 3072, 8192))
