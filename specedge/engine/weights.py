"""Reads a Hugging Face model directory: config.json, generation_config.json and safetensors, single or sharded.

Weights are memory-mapped and reach the device one tensor at a time; q/k/v and gate/up are joined on the way. Knows the names and
shapes in the files, and nothing of the forward pass. Anything wrong is a ModelError of one sentence that names the file.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short  # of what a file holds: cut and escaped
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from specedge.config import ModelConfig, SpecedgeError, brief
from specedge.engine.rope import FIELDS, OPTIONAL, context
from specedge.kernels.linear import Linear

Get = Callable[..., Tensor]  # get(name, *shape): the tensor of that name, which must have that shape
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = ("F32", "F16", "BF16")  # of tensors in files; others belong to quantised checkpoints, whose numbers mean nothing without their scales
MAX_JSON = 1 << 26  # bytes; the index of a model of a thousand shards has 10 million
MAX_LAYERS = 4096
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")


class ModelError(SpecedgeError):
    """A model directory that cannot be served."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; `qkv` holds q, k, v and `gate_up` gate, up, one behind the other; it multiplies them."""

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
    bits: int | None = None  # of the linear layers, if their weights are integers


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, or ModelError."""
    try:
        if not file.exists():
            raise ModelError(f"{file} is missing: a model is a directory with config.json, tokenizer.json and safetensors")
        if not file.is_file():
            raise ModelError(f"{file} is no file")
        if (size := file.stat().st_size) > MAX_JSON:
            raise ModelError(f"{file} cannot be read as JSON: it has {size / 1e9:.1f} GB")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{file} cannot be read as JSON: {brief(e)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object")
    return content


class Fields:
    """A JSON object out of `file`, each field checked when it is asked for. null counts as absent."""

    def __init__(self, file: Path, raw: dict[str, Any]) -> None:
        self.file, self._raw = file, raw

    def has(self, name: str) -> bool:
        """Whether the field is there, and be it null."""
        return name in self._raw

    def get(self, name: str) -> Any:
        return self._raw.get(name)

    def wrong(self, name: str, want: str) -> ModelError:
        """The sentence for a field that is not what it must be."""
        return ModelError(f"{self.file}: {name} is {short(self._raw.get(name))}, but must be {want}")

    def count(self, name: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        """An integer between `low` and `high`; without a default it must be there."""
        value = default if self._raw.get(name) is None else self._raw[name]
        if value is None:
            raise ModelError(f"{self.file} lacks the field {name}")
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"an integer between {low} and {high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number that float32 holds, as do its square and its products with others of the kind; without a default it must be there."""
        value = default if self._raw.get(name) is None else self._raw[name]
        if value is None:
            raise ModelError(f"{self.file} lacks the field {name}")
        if type(value) not in (int, float) or not 1e-18 <= value <= 1e18:
            raise self.wrong(name, "a number between 1e-18 and 1e18")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = default if self._raw.get(name) is None else self._raw[name]
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: one, several or none."""
        value = self._raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > 64 or any(type(i) is not int or not 0 <= i < 2**32 for i in ids):
            raise self.wrong(name, "a token id or a list of at most 64")
        return tuple(ids)


def read_config(path: Path) -> ModelConfig:
    """The shape of the model in directory `path`; ModelError names what is missing or not supported."""
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory: name a model directory in Hugging Face format")
    file = path / "config.json"
    f = Fields(file, read_json(file))
    names = f.get("architectures") or ["none"]
    if not isinstance(names, list):
        raise f.wrong("architectures", "a list of names")
    if names[0] not in ARCHITECTURES:
        raise ModelError(f"{file}: architecture {short(names[0])} is not supported, only {', '.join(ARCHITECTURES)} is")
    if f.get("hidden_act") not in (None, "silu"):
        raise f.wrong("hidden_act", "'silu', for no other is supported")
    if f.get("quantization_config") is not None:
        raise f.wrong("quantization_config", "absent: use the checkpoint in float32, float16 or bfloat16")
    family = names[0].removesuffix("ForCausalLM")
    generation = path / "generation_config.json"
    g = Fields(generation, read_json(generation)) if generation.exists() else f
    heads, hidden, layers = f.count("num_attention_heads"), f.count("hidden_size"), f.count("num_hidden_layers", high=MAX_LAYERS)
    positions = f.count("max_position_embeddings")
    theta, kind, rope = _rope(f, positions)
    try:
        return ModelConfig(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=f.count("num_key_value_heads", heads),
            head_dim=f.count("head_dim", hidden // heads),
            ffn=f.count("intermediate_size"),
            vocab=f.count("vocab_size"),
            norm_eps=f.number("rms_norm_eps"),
            rope_theta=theta,
            max_positions=context(kind, rope, positions),
            tied=f.flag("tie_word_embeddings"),
            eos_ids=(g if g.has("eos_token_id") else f).ids("eos_token_id"),
            qkv_bias=f.flag("attention_bias") or family == "Qwen2",
            out_bias=f.flag("attention_bias") and family != "Qwen2",
            mlp_bias=f.flag("mlp_bias"),
            qk_norm=family == "Qwen3",
            windows=_windows(f, family, layers),
            rope_type=kind,
            rope=rope,
        )
    except ValueError as e:  # fields that do not fit each other
        raise ModelError(f"{file}: {brief(e)}") from None


def _rope(f: Fields, positions: int) -> tuple[float, str, dict[str, float]]:
    """Base, type and further numbers of the rotary frequencies; `positions`: max_position_embeddings."""
    where = "rope_parameters" if f.get("rope_parameters") else "rope_scaling"
    raw = f.get(where) or {}
    if not isinstance(raw, dict):
        raise f.wrong(where, "an object")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ModelError(f"{f.file}: rope type {short(kind)} is not supported, only {', '.join(FIELDS)} are")
    r = Fields(f.file, raw)
    theta = f.number("rope_theta", r.number("rope_theta", 10000.0))
    if theta < 2:
        raise ModelError(f"{f.file}: rope_theta is {theta}, but must be at least 2")
    rope = {name: r.number(name) for name in FIELDS[kind]}
    rope |= {name: r.number(name) for name in OPTIONAL.get(kind, ()) if r.get(name) is not None}
    if kind == "yarn":  # as in transformers: who does not say what was stretched means max_position_embeddings
        rope.setdefault("original_max_position_embeddings", positions)
    rope["truncate"] = r.flag("truncate", True)
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ModelError(f"{f.file}: high_freq_factor must be above low_freq_factor")
    return theta, kind, rope


def _windows(f: Fields, family: str, layers: int) -> tuple[int, ...]:
    """The sliding window of every layer; empty if no layer has one."""
    if family == "Llama" or (family != "Mistral" and not f.flag("use_sliding_window")):
        return ()
    if f.has("sliding_window") and not f.get("sliding_window"):
        return ()
    window = f.count("sliding_window", 4096)
    first = 0 if family == "Mistral" else f.count("max_window_layers", 28, low=0)
    kinds = f.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in ("full_attention", "sliding_attention") for k in kinds):
        raise f.wrong("layer_types", f"'full_attention' or 'sliding_attention' for each of the {layers} layers")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def shards(path: Path) -> list[Path]:
    """The safetensors files of a model directory."""
    single, index = path / "model.safetensors", path / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        if pickled:
            raise ModelError(f"{path / pickled[0]} is a pickle, which can run code and is not read: convert the model to safetensors")
        raise ModelError(f"{path} holds neither model.safetensors nor {INDEX}")
    table = read_json(index).get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    if not names or not all(isinstance(n, str) and SHARD.fullmatch(n) for n in names):
        raise ModelError(f"{index} has no weight_map that names safetensors files beside it")
    return [path / name for name in sorted(set(names))]


def past_the_end(file: Path) -> str | None:
    """Of a safetensors file that cannot be read: the first tensor that its data is too short for, in words; None if that is not what is wrong."""
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            data = file.stat().st_size - 8 - length
            if length > MAX_JSON or data < 0:
                return None
            tensors = json.loads(f.read(length))
        ends = [(int(t["data_offsets"][1]), str(name)) for name, t in tensors.items() if name != "__metadata__"]
    except (OSError, ValueError, RecursionError, ArithmeticError, AttributeError, LookupError, TypeError):  # no such header either
        return None
    end, name = min((e for e in ends if e[0] > data), default=(0, ""))
    return brief(f"tensor {name} ends {end - data} bytes past the end of the file") if end else None


class Reader:
    """Looks tensors up by name over all shards, checks their shapes and brings them to a device."""

    def __init__(self, files: list[Path], device: torch.device, dtype: torch.dtype, stack: ExitStack, step: Callable[[], object]) -> None:
        self._device, self._dtype, self._step = device, dtype, step
        self._where: dict[str, tuple[Path, Any]] = {}
        for file in files:
            try:
                if file.is_fifo():  # to open one is to wait for a writer
                    raise ModelError(f"{file} is not a readable safetensors file: it is a pipe")
                file.open("rb").close()  # safe_open calls whatever it cannot open "No such file"
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as e:
                raise ModelError(f"{file} is not a readable safetensors file: {past_the_end(file) or brief(e)}") from None
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in self._where:  # whatever the index says, nobody meant to write it twice
                    raise ModelError(f"{file}: tensor {brief(name)} is also in {self._where[name][0].name}")
                self._where[name] = file, handle
        self._all = f"{files[0]} lacks" if len(files) == 1 else f"{files[0].parent / INDEX}: none of its {len(files)} files holds"

    def get(self, name: str, *shape: int) -> Tensor:
        """Tensor `name`, which must have `shape`."""
        if name not in self._where:
            raise ModelError(f"{self._all} the tensor {name}")
        file, handle = self._where[name]
        view = handle.get_slice(name)
        if (found := view.get_dtype()) not in DTYPES:
            raise ModelError(f"{file}: tensor {name} has dtype {found}, only {', '.join(DTYPES)} are supported")
        if view.get_shape() != list(shape):
            raise ModelError(f"{file}: tensor {name} has shape {short(view.get_shape())}, config.json asks for {list(shape)}")
        tensor: Tensor = handle.get_tensor(name).to(self._device, self._dtype)
        low, high = tensor.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise ModelError(f"{file}: tensor {name} holds values that are not finite in {self._dtype}: fetch the file again or use another dtype")
        self._step()
        return tensor


def fingerprint(path: Path, dtype: torch.dtype, bits: int | None) -> bytes:
    """sha256 over dtype and bits, config.json, and of every shard the size, the header and 64 kB at both ends of the data: cheap to read, and a
    model and its fine-tune differ in it."""
    digest = hashlib.sha256(f"{dtype} {bits}".encode() + (path / "config.json").read_bytes())
    for file in shards(path):
        size = file.stat().st_size
        with file.open("rb") as f:
            header = min(int.from_bytes(f.read(8), "little"), 1 << 26)
            digest.update(f"{size}".encode() + f.read(header + (1 << 16)))
            f.seek(max(0, size - (1 << 16)))
            digest.update(f.read())
    return digest.digest()


def load_weights(path: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype, bits: int | None, progress: bool) -> Weights:
    """All weights of directory `path` on `device` in `dtype`, those of linear layers in integers of `bits`; a bar on stderr if `progress`."""
    try:
        with ExitStack() as stack:
            each = 9 + 3 * config.qkv_bias + config.out_bias + 3 * config.mlp_bias + 2 * config.qk_norm
            count = each * config.layers + 3 - config.tied
            bar = stack.enter_context(tqdm(total=count, desc=f"loading {path.name}", unit="tensor", disable=not progress, leave=False))
            reader = Reader(shards(path), device, dtype, stack, bar.update)
            return assemble(reader.get, config, bits)
    except (MemoryError, RuntimeError) as e:  # torch has no type of its own for a CPU that is full
        if not isinstance(e, MemoryError) and "memory" not in str(e):
            raise
        size = f"{sum(file.stat().st_size for file in shards(path)) / 1e9:.1f} GB of files"
        room = f"; the device has {torch.cuda.mem_get_info(device)[1] / 1e9:.1f} GB" if device.type == "cuda" else ""
        raise ModelError(f"{path} does not fit the memory of {device} in {dtype} ({size}{room}): use a smaller model or dtype") from None


def assemble(get: Get, c: ModelConfig, bits: int | None = None) -> Weights:
    """The weights of a decoder, whose tensors `get` knows by their names in a file; those of linear layers in integers of `bits`."""
    embedding = get("model.embed_tokens.weight", c.vocab, c.hidden)
    layers = tuple(_layers(get, c, bits))
    norm = get("model.norm.weight", c.hidden)
    head = embedding if c.tied else get("lm_head.weight", c.vocab, c.hidden)
    return Weights(embedding, layers, norm, Linear(head, bits=bits), bits)


def _layers(get: Get, c: ModelConfig, bits: int | None) -> Iterator[LayerWeights]:
    def linear(width: int, bias: bool, *parts: tuple[str, int], gated: bool = False) -> Linear:
        """Layers of (name, rows) over inputs of `width`, stacked by rows into one."""
        weight = torch.cat([get(f"{name}.weight", rows, width) for name, rows in parts])
        return Linear(weight, torch.cat([get(f"{name}.bias", rows) for name, rows in parts]) if bias else None, bits, gated)

    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i in range(c.layers):
        at = f"model.layers.{i}."
        attn, mlp = at + "self_attn.", at + "mlp."
        yield LayerWeights(
            input_norm=get(at + "input_layernorm.weight", c.hidden),
            qkv=linear(c.hidden, c.qkv_bias, (attn + "q_proj", q), (attn + "k_proj", kv), (attn + "v_proj", kv)),
            out=linear(q, c.out_bias, (attn + "o_proj", c.hidden)),
            post_norm=get(at + "post_attention_layernorm.weight", c.hidden),
            gate_up=linear(c.hidden, c.mlp_bias, (mlp + "gate_proj", c.ffn), (mlp + "up_proj", c.ffn), gated=True),
            down=linear(c.ffn, c.mlp_bias, (mlp + "down_proj", c.hidden)),
            qk_norm=(get(attn + "q_norm.weight", c.head_dim), get(attn + "k_norm.weight", c.head_dim)) if c.qk_norm else None,
        )
