"""Small random models in Hugging Face format, and engines over them."""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from specedge.config import DraftConfig, EngineConfig
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine
from specedge.engine.runner import Runner
from specedge.tree import TokenTree, make_tree

BYTES = 257  # vocabulary of `byte_tokenizer`: every byte and an end
TINY = {
    "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 105, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ids are bytes, with id 256 as the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def random_model(path: Path, seed: int = 0, tokenizer: Tokenizer | None = None, **changes: object) -> Path:
    """Write a random Llama of shape TINY with `changes` to `path`. Weights are large enough for peaked, varied distributions."""
    c = {**TINY, **changes}
    path.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **c}
    (path / "config.json").write_text(json.dumps(config))
    rng = torch.Generator().manual_seed(seed)

    def matrix(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) * scale / shape[-1] ** 0.5

    h, d, f, v = c["hidden_size"], c["head_dim"], c["intermediate_size"], c["vocab_size"]
    hq, hkv = c["num_attention_heads"], c["num_key_value_heads"]
    weights = {"model.embed_tokens.weight": torch.randn(v, h, generator=rng), "model.norm.weight": 1 + 0.1 * torch.randn(h, generator=rng)}
    if not c["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(v, h, scale=3.0)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, shape in (
            ("self_attn.q_proj", (hq * d, h)), ("self_attn.k_proj", (hkv * d, h)), ("self_attn.v_proj", (hkv * d, h)),
            ("self_attn.o_proj", (h, hq * d)), ("mlp.gate_proj", (f, h)), ("mlp.up_proj", (f, h)), ("mlp.down_proj", (h, f)),
        ):  # fmt: skip
            weights[f"{at}{name}.weight"] = matrix(*shape, scale=2.0 if name in ("self_attn.q_proj", "self_attn.k_proj") else 1.0)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{name}.weight"] = 1 + 0.1 * torch.randn(h, generator=rng)
    save_file(weights, path / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"))
    return path


def runner(path: Path, rows: int | None = None, dtype: str = "float32", **sizes: int) -> Runner:
    """A runner on the CPU, with `rows` rows of row buffer (default: those of a step). Trees are verified whole unless `admission` is asked for:
    what a step does then depends on no times."""
    size = EngineConfig(**{"kv_tokens": 4096, "admission": False, **sizes})
    return Runner.load(path, size, rows or size.max_rows, "cpu", dtype, False)


def engine(path: Path, **sizes: int) -> Engine:
    """An engine on the CPU without a tokenizer."""
    return Engine(runner(path, **sizes))


def drafter(path: Path, config: DraftConfig | None = None) -> Drafter:
    """A drafter on the CPU without a tokenizer."""
    config = config or DraftConfig(engine=EngineConfig(kv_tokens=8192, max_rows=256))
    return Drafter(Runner.load(path, config.engine, config.max_sessions * 256, "cpu", "float32", False), config)


def pairwise(*values: Sequence[object]) -> list[tuple[object, ...]]:
    """Few cells of the product such that every pair of values of two factors occurs, and always the same ones: each begins with a pair that is
    missing, and takes from the other factors, in turn, the value that makes the most missing pairs with what it has."""
    missing = {(i, j, a, b): None for i, j in itertools.combinations(range(len(values)), 2) for a in values[i] for b in values[j]}  # an ordered set
    chosen = []
    while missing:
        i, j, a, b = next(iter(missing))
        cell = {i: a, j: b}
        for f in range(len(values)):
            if f not in cell:
                made = {v: [(f, g, v, w) if f < g else (g, f, w, v) for g, w in cell.items()] for v in values[f]}
                cell[f] = max(values[f], key=lambda v: sum(pair in missing for pair in made[v]))  # noqa: B023
        chosen.append(tuple(cell[f] for f in range(len(values))))
        for pair in pairs(chosen[-1]):
            missing.pop(pair, None)
    return chosen


def pairs(cell: Sequence[object]) -> set[tuple[int, int, object, object]]:
    """Which two values meet in `cell`, with the numbers of their factors."""
    return {(i, j, cell[i], cell[j]) for i, j in itertools.combinations(range(len(cell)), 2)}


def covers_all_pairs(cells: Iterable[Sequence[object]], *values: Sequence[object]) -> bool:
    """Whether any two values of two factors meet in one of `cells`."""
    want = {(i, j, a, b) for i, j in itertools.combinations(range(len(values)), 2) for a in values[i] for b in values[j]}
    return set().union(*map(pairs, cells)) == want


def random_tree(rng: np.random.Generator, nodes: int, honest: float, truth: Sequence[int], vocab: int) -> TokenTree:
    """At most `nodes` nodes. A share `honest` lies below the node before it, and that share carries the token that `truth` has at its depth."""
    tokens, parents, depth, there = list[int](), list[int](), [0], set[tuple[int, int]]()
    for _ in range(nodes):
        parent = len(tokens) if rng.random() < honest else int(rng.integers(0, len(tokens) + 1))
        true = rng.random() < honest and depth[parent] < len(truth)
        token = truth[depth[parent]] if true else int(rng.integers(0, vocab))
        if (parent, token) not in there:
            there.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            depth.append(depth[parent] + 1)
    return make_tree(tokens, parents)


def check_empty(e: Engine) -> None:
    """Nothing is left behind in an idle engine."""
    e.pool.check()
    assert not e.busy and e.pool.available == e.pool.total
