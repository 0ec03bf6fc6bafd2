"""A small trained model inside a large one: the same function at the large one's cost, so that a benchmark has both real text and real work.

    runner = wide_runner(Path("specedge/demo/target"), SHAPES["0.5b"], EngineConfig(), torch.device("cpu"), torch.bfloat16)

Everything the large model adds is dense random weight up to a matrix of zeros: new channels of the hidden state stay zero, new heads and FFN
columns are projected by zeros, new layers add nothing to the residual stream, new ids lie beyond the tokenizer and never win. Nothing is written:
tensors are made on the device, one at a time. Knows the names of tensors (engine/weights.py) and nothing of the forward pass.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from specedge.config import EngineConfig, ModelConfig
from specedge.engine.model import Decoder
from specedge.engine.runner import Runner
from specedge.engine.weights import Get, Reader, assemble, read_config, shards


def widened(narrow: ModelConfig, shape: ModelConfig) -> ModelConfig:
    """The configuration of `narrow` at the sizes of `shape`; ValueError if it does not fit inside.

    A mean over H' channels of which H are not zero is H/H' of the narrow one, so eps shrinks alike, and norm weights too, by its root.
    """
    copies = -(-narrow.heads // narrow.kv_heads // (shape.heads // shape.kv_heads))  # K/V heads that the queries of one spread over
    fits = {
        "hidden": shape.hidden >= narrow.hidden, "layers": shape.layers >= narrow.layers, "ffn": shape.ffn >= narrow.ffn,
        "vocab": shape.vocab >= narrow.vocab, "head_dim": shape.head_dim % narrow.head_dim == 0,
        "kv_heads": shape.kv_heads >= narrow.kv_heads * copies,
    }  # fmt: skip
    for name, ok in fits.items():
        if not ok:
            raise ValueError(f"{name} is {getattr(shape, name)}, which cannot hold the {getattr(narrow, name)} of the model")
    if narrow.qk_norm or narrow.rope_type != "default":
        raise ValueError("models with q/k norms or scaled rope are not widened: their formulas depend on the head dim or its frequencies")
    windows = narrow.windows and narrow.windows + (0,) * (shape.layers - narrow.layers)
    return replace(
        narrow, hidden=shape.hidden, layers=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, ffn=shape.ffn,
        vocab=shape.vocab, norm_eps=narrow.norm_eps * narrow.hidden / shape.hidden, windows=windows,
    )  # fmt: skip


def widen(get: Get, narrow: ModelConfig, wide: ModelConfig, make: Callable[..., Tensor]) -> Get:
    """Tensors of the wide model from those of the narrow one; `make(*shape)` gives random ones of the size that weights have."""
    q_heads, kv_heads = _heads(narrow, wide)
    dims = _dims(narrow, wide)
    old_q = torch.arange(narrow.heads * narrow.head_dim)
    new_q = torch.cat([h * wide.head_dim + dims for h in q_heads])
    new_kv = torch.cat([new * wide.head_dim + dims for new, _ in kv_heads])
    old_kv = torch.cat([old * narrow.head_dim + torch.arange(narrow.head_dim) for _, old in kv_heads])
    hidden, ffn, vocab = torch.arange(narrow.hidden), torch.arange(narrow.ffn), torch.arange(narrow.vocab)
    places = {  # module: (rows there, rows here, columns there, columns here); None: a vector
        "embed_tokens": (vocab, vocab, hidden, hidden), "lm_head": (vocab, vocab, hidden, hidden),
        "norm": (hidden, hidden, None, None), "input_layernorm": (hidden, hidden, None, None),
        "post_attention_layernorm": (hidden, hidden, None, None),
        "q_proj": (new_q, old_q, hidden, hidden), "k_proj": (new_kv, old_kv, hidden, hidden), "v_proj": (new_kv, old_kv, hidden, hidden),
        "o_proj": (hidden, hidden, new_q, old_q), "gate_proj": (ffn, ffn, hidden, hidden), "up_proj": (ffn, ffn, hidden, hidden),
        "down_proj": (hidden, hidden, ffn, ffn),
    }  # fmt: skip
    sizes = {  # of the narrow model's tensors
        "embed_tokens": (narrow.vocab, narrow.hidden), "lm_head": (narrow.vocab, narrow.hidden),
        "q_proj": (len(old_q), narrow.hidden), "k_proj": (narrow.kv_heads * narrow.head_dim, narrow.hidden),
        "v_proj": (narrow.kv_heads * narrow.head_dim, narrow.hidden), "o_proj": (narrow.hidden, len(old_q)), "gate_proj": (narrow.ffn, narrow.hidden),
        "up_proj": (narrow.ffn, narrow.hidden), "down_proj": (narrow.hidden, narrow.ffn),
    }  # fmt: skip
    # what new rows would reach: the residual stream (o, down), or scores through queries at pairs that the narrow head has not
    silent = ("embed_tokens", "o_proj", "down_proj")
    factor = {"q_proj": (wide.head_dim / narrow.head_dim) ** 0.5, "norm": (narrow.hidden / wide.hidden) ** 0.5}  # scores are scaled by D'^-0.5

    def wide_get(name: str, *shape: int) -> Tensor:
        module, kind = name.split(".")[-2:]
        out = make(*shape)
        if module in silent or kind == "bias":
            out.zero_()
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= narrow.layers:
            return out
        rows, old_rows, columns, old_columns = places[module]
        size = sizes.get(module, (narrow.hidden,))
        old = get(name, *(size if kind == "weight" else size[:1])) * factor.get("norm" if module.endswith("norm") else module, 1.0)
        there = out.device
        if module == "q_proj":  # all pairs of a head that came from the narrow model
            out.view(wide.heads, wide.head_dim, *shape[1:])[torch.tensor(q_heads, device=there)] = 0
        if columns is None or kind == "bias":
            out[rows.to(there)] = old[old_rows.to(there)]
        else:
            assert old_columns is not None
            out[rows.to(there)[:, None], columns.to(there)] = old[old_rows.to(there)[:, None], old_columns.to(there)]
        return out

    return wide_get


def _heads(narrow: ModelConfig, wide: ModelConfig) -> tuple[list[int], list[tuple[int, int]]]:
    """Where each query head goes, and (new, old) K/V heads: a K/V head is copied if its queries are too many for one of the wide model."""
    group, room = narrow.heads // narrow.kv_heads, wide.heads // wide.kv_heads
    copies = -(-group // room)
    queries = [(j * copies + g // room) * room + g % room for j in range(narrow.kv_heads) for g in range(group)]
    return queries, [(j * copies + c, j) for j in range(narrow.kv_heads) for c in range(copies)]


def _dims(narrow: ModelConfig, wide: ModelConfig) -> Tensor:
    """Where the dims of a head go: pair i, which is dims i and i + D/2, turns at theta^(-2i/D), as pair i D'/D does in the wide head."""
    pairs = torch.arange(narrow.head_dim // 2) * (wide.head_dim // narrow.head_dim)
    return torch.cat((pairs, pairs + wide.head_dim // 2))


def wide_runner(path: Path, shape: ModelConfig, sizes: EngineConfig, device: torch.device, dtype: torch.dtype, rows: int = 0) -> Runner:
    """A runner of `rows` rows (0: those of a step) over the model in `path` at the sizes of `shape`."""
    narrow = read_config(path)
    wide = widened(narrow, shape)
    rng = torch.Generator(device).manual_seed(0)

    def make(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, device=device, dtype=dtype).mul_(wide.hidden**-0.5)

    with ExitStack() as stack:
        reader = Reader(shards(path), device, dtype, stack, lambda: None)
        weights = assemble(widen(reader.get, narrow, wide, make), wide)
    return Runner(Decoder(wide, weights, min(wide.max_positions, sizes.tokens)), sizes, rows or sizes.max_rows)
