"""Reads a Hugging Face model directory: config.json, generation_config.json and safetensors, single or sharded.

Weights are memory-mapped and reach the device one tensor at a time; q/k/v and gate/up are joined on the way. Knows the names and
shapes in the files, and nothing of the forward pass. Anything wrong is a ModelError of one sentence that names the file.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from specedge.config import ModelConfig, SpecedgeError
from specedge.engine.rope import FIELDS
from specedge.kernels.linear import Linear

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class ModelError(SpecedgeError):
    """A model directory that cannot be served."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; `qkv` holds q, k, v and `gate_up` holds gate, up, one behind the other."""

    input_norm: Tensor
    qkv: Linear
    out: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    qk_norm: tuple[Tensor, Tensor] | None = None  # of query and key heads


@dataclass(frozen=True, slots=True)
class Weights:
    """All parameters of a decoder, on their device."""

    embedding: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Linear


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, or ModelError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file} is missing: a model is a directory with config.json, tokenizer.json and safetensors") from None
    except (OSError, ValueError) as e:
        raise ModelError(f"{file} cannot be read as JSON: {e}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object")
    return content


def read_config(path: Path) -> ModelConfig:
    """The shape of the model in directory `path`; ModelError names what is missing or not supported."""
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory: name a model directory in Hugging Face format")
    file = path / "config.json"
    raw = read_json(file)
    names = raw.get("architectures") or ["none"]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(names, list) or not isinstance(rope, dict):
        raise ModelError(f"{file}: architectures must be a list and rope_parameters an object")
    if names[0] not in ARCHITECTURES:
        raise ModelError(f"{file}: architecture {names[0]} is not supported, only {', '.join(ARCHITECTURES)} is")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{file}: hidden_act is {raw['hidden_act']!r}, only 'silu' is supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ModelError(f"{file}: rope type {kind!r} is not supported, only {', '.join(FIELDS)} are")
    lacking = [name for name in FIELDS[kind] if not isinstance(rope.get(name), int | float) or rope[name] <= 0]
    if lacking:
        raise ModelError(f"{file}: rope type {kind!r} lacks the field {lacking[0]}, a positive number")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ModelError(f"{file}: high_freq_factor must be above low_freq_factor")
    family = names[0].removesuffix("ForCausalLM")
    generation = path / "generation_config.json"
    eos = (read_json(generation) if generation.is_file() else {}).get("eos_token_id", raw.get("eos_token_id"))
    try:
        heads = raw["num_attention_heads"]
        return ModelConfig(
            hidden=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            ffn=raw["intermediate_size"],
            vocab=raw["vocab_size"],
            norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            max_positions=raw["max_position_embeddings"],
            tied=bool(raw.get("tie_word_embeddings", False)),
            eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            qkv_bias=bool(raw.get("attention_bias")) or family == "Qwen2",
            out_bias=bool(raw.get("attention_bias")) and family != "Qwen2",
            mlp_bias=bool(raw.get("mlp_bias")),
            qk_norm=family == "Qwen3",
            windows=_windows(raw, family),
            rope_type=kind,
            rope={k: v for k, v in rope.items() if isinstance(v, int | float)},
        )
    except KeyError as e:
        raise ModelError(f"{file} lacks the field {e.args[0]}") from None
    except (ValueError, TypeError, ZeroDivisionError) as e:
        raise ModelError(f"{file}: {e}") from None


def _windows(raw: dict[str, Any], family: str) -> tuple[int, ...]:
    """The sliding window of every layer; empty if no layer has one."""
    layers, window = raw["num_hidden_layers"], raw.get("sliding_window", 4096)
    if family == "Llama" or not window or (family != "Mistral" and not raw.get("use_sliding_window", False)):
        return ()
    first = 0 if family == "Mistral" else raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def shards(path: Path) -> list[Path]:
    """The safetensors files of a model directory."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{path} holds neither model.safetensors nor model.safetensors.index.json")
    table = read_json(index).get("weight_map")
    names = set(table.values()) if isinstance(table, dict) else set()
    if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise ModelError(f"{index} has no weight_map of files beside it")
    return [path / name for name in sorted(names)]


class Reader:
    """Looks tensors up by name over all shards, checks their shapes and brings them to a device."""

    def __init__(self, files: list[Path], device: torch.device, dtype: torch.dtype, stack: ExitStack, step: Callable[[], object]) -> None:
        self._device, self._dtype, self._step = device, dtype, step
        self._where: dict[str, tuple[Path, Any]] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as e:
                raise ModelError(f"{file} is not a readable safetensors file: {str(e)[:200]}") from None
            self._where.update((name, (file, handle)) for name in handle.keys())  # noqa: SIM118 (not a dict)
        self._last = files[-1]

    def get(self, name: str, *shape: int) -> Tensor:
        """Tensor `name`, which must have `shape`."""
        if name not in self._where:
            raise ModelError(f"{self._last} lacks the tensor {name}")
        file, handle = self._where[name]
        found = tuple(handle.get_slice(name).get_shape())
        if found != shape:
            raise ModelError(f"{file}: tensor {name} has shape {list(found)}, config.json asks for {list(shape)}")
        try:
            tensor: Tensor = handle.get_tensor(name).to(self._device, self._dtype)
        except torch.OutOfMemoryError:
            raise ModelError(f"{file} does not fit the memory of {self._device}: use a smaller model or dtype") from None
        self._step()
        return tensor

    def linear(self, width: int, bias: bool, *parts: tuple[str, int]) -> Linear:
        """Layers of (name, rows) over inputs of `width`, stacked by rows into one."""
        weight = torch.cat([self.get(f"{name}.weight", rows, width) for name, rows in parts])
        return Linear(weight, torch.cat([self.get(f"{name}.bias", rows) for name, rows in parts]) if bias else None)


def fingerprint(path: Path, dtype: torch.dtype) -> bytes:
    """sha256 over dtype, config.json, and of every shard the size, the header and 64 kB at both ends of the data: cheap to read, and a model and its
    fine-tune differ in it."""
    digest = hashlib.sha256(f"{dtype}".encode() + (path / "config.json").read_bytes())
    for file in shards(path):
        size = file.stat().st_size
        with file.open("rb") as f:
            header = min(int.from_bytes(f.read(8), "little"), 1 << 26)
            digest.update(f"{size}".encode() + f.read(header + (1 << 16)))
            f.seek(max(0, size - (1 << 16)))
            digest.update(f.read())
    return digest.digest()


def load_weights(path: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype, progress: bool) -> Weights:
    """All weights of directory `path` on `device` in `dtype`, with a bar on stderr if `progress`."""
    with ExitStack() as stack:
        each = 9 + 3 * config.qkv_bias + config.out_bias + 3 * config.mlp_bias + 2 * config.qk_norm
        count = each * config.layers + 3 - config.tied
        bar = stack.enter_context(tqdm(total=count, desc=f"loading {path.name}", unit="tensor", disable=not progress, leave=False))
        reader = Reader(shards(path), device, dtype, stack, bar.update)
        embedding = reader.get("model.embed_tokens.weight", config.vocab, config.hidden)
        layers = tuple(_layers(reader, config))
        norm = reader.get("model.norm.weight", config.hidden)
        head = embedding if config.tied else reader.get("lm_head.weight", config.vocab, config.hidden)
        return Weights(embedding, layers, norm, Linear(head))


def _layers(reader: Reader, c: ModelConfig) -> Iterator[LayerWeights]:
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i in range(c.layers):
        at = f"model.layers.{i}."
        attn, mlp = at + "self_attn.", at + "mlp."
        yield LayerWeights(
            input_norm=reader.get(at + "input_layernorm.weight", c.hidden),
            qkv=reader.linear(c.hidden, c.qkv_bias, (attn + "q_proj", q), (attn + "k_proj", kv), (attn + "v_proj", kv)),
            out=reader.linear(q, c.out_bias, (attn + "o_proj", c.hidden)),
            post_norm=reader.get(at + "post_attention_layernorm.weight", c.hidden),
            gate_up=reader.linear(c.hidden, c.mlp_bias, (mlp + "gate_proj", c.ffn), (mlp + "up_proj", c.ffn)),
            down=reader.linear(c.ffn, c.mlp_bias, (mlp + "down_proj", c.hidden)),
            qk_norm=(reader.get(attn + "q_norm.weight", c.head_dim), reader.get(attn + "k_norm.weight", c.head_dim)) if c.qk_norm else None,
        )
