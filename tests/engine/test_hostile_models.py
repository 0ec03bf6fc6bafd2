"""A directory of hostile model folders, made here from a small valid one: each is refused in one sentence that names the file and what is wrong
in it, or is served because what is odd in it does no harm. Nothing of it takes long, much memory, or runs code."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specedge import cli
from specedge.config import DraftConfig, EngineConfig, SamplingParams, SpecedgeError
from specedge.engine import weights as weights_module
from specedge.engine.drafter import Drafter
from specedge.engine.engine import Engine, RequestError
from specedge.engine.speculative import PairError, SpeculativeEngine
from tests.helpers import BYTES, byte_tokenizer, check_empty, random_model

Break = Callable[[Path], object]  # makes a valid folder hostile
Q0 = "model.layers.0.self_attn.q_proj.weight"
NAN, MISSING = float("nan"), object()
SPARE = 1 << 30  # bytes that a load may take: a tenth of what the absurd sizes below would
SIZES = EngineConfig(kv_tokens=1024)
DRAFT = DraftConfig(tree_size=7, max_sessions=1, engine=EngineConfig(kv_tokens=1024, max_rows=256))
pytestmark = pytest.mark.timeout(30)  # a hang is a failure, too


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("valid") / "m"
    random_model(path, 3, byte_tokenizer(), vocab_size=BYTES, eos_token_id=256)
    (path / "generation_config.json").write_text('{"eos_token_id": 256}')
    return path


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "m"))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """An allocation of more than SPARE fails, as it would on a machine that is full."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + SPARE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# ----------------------------------------------------------------------------------------------------------------------
# ways to break a folder


def write(name: str, content: str | bytes) -> Break:
    return lambda path: (path / name).write_bytes(content.encode() if isinstance(content, str) else content)


def config(**changes: object) -> Break:
    def change(path: Path) -> None:
        file = path / "config.json"
        fields = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in fields.items() if v is not MISSING}))

    return change


def remove(*names: str) -> Break:
    return lambda path: [(path / name).unlink() for name in names]


def replaced(name: str, make: Callable[[Path], object]) -> Break:
    """Something else in place of a file."""

    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return change


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def sparse(size: int) -> Callable[[Path], object]:
    """A file of zeros that takes no room on the disk."""

    def make(path: Path) -> None:
        with path.open("wb") as f:
            f.truncate(size)

    return make


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    """Weights that are read, changed and written again."""

    def apply(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors")

    return apply


def cut(size: int) -> Break:
    """The first `size` bytes of the weights; a negative size counts from the end."""
    return lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:size])


def header(change: Callable[[dict[str, Any]], object]) -> Break:
    """The header of the weights, changed; the data stays."""

    def apply(path: Path) -> None:
        raw = (path / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        head = json.loads(raw[8 : 8 + size])
        change(head)
        text = json.dumps(head).encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return apply


def raw_header(text: str, length: int | None = None) -> Break:
    return write("model.safetensors", struct.pack("<Q", len(text) if length is None else length) + text.encode() + bytes(64))


def twice(path: Path) -> None:
    """A tensor named two times in the header, the second time with another shape."""
    raw = (path / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    text = raw[8 : 8 + size].decode().rstrip()
    text = text[:-1] + f',"{Q0}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + size :])


def index(weight_map: object) -> Break:
    """Shards in place of the one file."""

    def apply(path: Path) -> None:
        (path / "model.safetensors").rename(path / "model-1.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return apply


def sharded(change: Callable[[list[dict[str, torch.Tensor]]], object]) -> Break:
    """Three shards in place of the one file, changed after the index was written."""

    def apply(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        names = sorted(weights)
        parts = [{name: weights[name] for name in names[i::3]} for i in range(3)]
        table = {name: f"model-{i + 1}.safetensors" for i, part in enumerate(parts) for name in part}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        change(parts)
        for i, part in enumerate(parts):
            save_file(part, path / f"model-{i + 1}.safetensors")

    return apply


def cut_shard(number: int, size: int) -> Break:
    """Three shards, of which one lacks its last `size` bytes."""

    def apply(path: Path) -> None:
        sharded(lambda parts: None)(path)
        file = path / f"model-{number}.safetensors"
        os.truncate(file, file.stat().st_size - size)

    return apply


def pickles(path: Path) -> None:
    """A pickle that leaves a mark when it is read, in place of the weights."""
    mark = path.parent / "unpickled"
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode())


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Break:
    def apply(path: Path) -> None:
        content = json.loads((path / "tokenizer.json").read_text())
        change(content)
        (path / "tokenizer.json").write_text(json.dumps(content))

    return apply


def poison(name: str, value: float) -> Break:
    return tensors(lambda w: w[name].view(-1)[5:6].fill_(value))


def large_bfloat16(path: Path) -> None:
    """An embedding that fits as it is in the file, of zeros that take no room on the disk, and not in float32."""
    vocab = 6_000_000
    config(vocab_size=vocab)(path)
    text = json.dumps({"model.embed_tokens.weight": {"dtype": "BF16", "shape": [vocab, 48], "data_offsets": [0, vocab * 96]}}).encode()
    with (path / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + vocab * 96)


# ----------------------------------------------------------------------------------------------------------------------
# folders that are refused, and what the sentence must hold

COUNTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
ABSURD = {
    "text": "8", "negative": -8, "NaN": NAN, "1e308": 1e308, "half": 8.5, "bool": True, "list": [8], "object": {}, "2^40": 2**40, "huge": 10**400,
}  # fmt: skip
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
MISTRAL = {"architectures": ["MistralForCausalLM"]}

UNREADABLE = "model.safetensors is not a readable safetensors file"
REFUSED: dict[str, tuple[Break, str]] = {
    "config missing": (remove("config.json"), "config.json is missing"),
    "config empty": (write("config.json", ""), "config.json cannot be read as JSON"),
    "config not JSON": (write("config.json", "{'a': 1}"), "config.json cannot be read as JSON"),
    "config not UTF-8": (write("config.json", b"\xff\xfe{}"), "config.json cannot be read as JSON"),
    "config a list": (write("config.json", "[1]"), "config.json holds no JSON object"),
    "config deep": (write("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000), "config.json cannot be read as JSON"),
    "config deep list": (write("config.json", "[" * 10**6), "config.json cannot be read as JSON"),
    "config huge": (replaced("config.json", sparse(1 << 40)), "config.json .*1099.5 GB"),
    "config long number": (write("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), "config.json cannot be read as JSON"),
    "config a directory": (replaced("config.json", Path.mkdir), "config.json is no file"),
    "config a symlink loop": (replaced("config.json", loop), "config.json is (missing|no file)"),
    "config a pipe": (replaced("config.json", os.mkfifo), "config.json is no file"),
    "config a device": (replaced("config.json", lambda p: p.symlink_to("/dev/zero")), "config.json is no file"),
    "architecture unknown": (config(architectures=["GPT2LMHeadModel"]), "config.json: architecture 'GPT2LMHeadModel' is not supported"),
    "architecture none": (config(architectures=[]), "config.json: architecture 'none' is not supported"),
    "architecture absent": (config(architectures=MISSING), "config.json: architecture 'none' is not supported"),
    "architecture a text": (config(architectures="LlamaForCausalLM"), "config.json: architectures"),
    "architecture a number": (config(architectures=[7]), "config.json: architecture 7 is not supported"),
    "architecture long": (config(architectures=["A" * 10**6]), "config.json: architecture 'AAA"),
    "architecture with control codes": (config(architectures=["\x1b[2J\nready \ud800"]), "config.json: architecture '"),
    "activation unknown": (config(hidden_act="gelu"), "config.json: hidden_act is 'gelu'"),
    "activation long": (config(hidden_act=["x"] * 10**5), "config.json: hidden_act is "),
    "quantised": (config(quantization_config={"quant_method": "awq"}), "config.json: quantization_config"),
    "rope a list": (config(rope_scaling=[1]), "config.json: .*rope"),
    "rope type unknown": (config(rope_scaling={"rope_type": "longrope"}), "config.json: rope type 'longrope' is not supported"),
    "rope type long": (config(rope_scaling={"rope_type": "x" * 10**5}), "config.json: rope type 'xxx"),
    "rope type a list": (config(rope_scaling={"rope_type": ["yarn"]}), "config.json: rope type"),
    "rope factor absent": (config(rope_scaling={"rope_type": "linear"}), "config.json lacks the field factor"),
    "rope factor null": (config(rope_scaling={"rope_type": "linear", "factor": None}), "config.json lacks the field factor"),
    "rope factor zero": (config(rope_scaling={"rope_type": "linear", "factor": 0}), "config.json: factor is 0"),
    "rope low frequency absent": (config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "config.json lacks the field low_freq_factor"),
    "rope factor NaN": (config(rope_scaling={"rope_type": "linear", "factor": NAN}), "config.json: .*factor"),
    "rope factor infinite": (config(rope_scaling={"rope_type": "linear", "factor": float("inf")}), "config.json: .*factor"),
    "rope factor huge": (config(rope_scaling={"rope_type": "linear", "factor": 10**400}), "config.json: .*factor"),
    "rope factor a bool": (config(rope_scaling={"rope_type": "linear", "factor": True}), "config.json: .*factor"),
    "rope factors crossed": (config(rope_scaling={**LLAMA3, "low_freq_factor": 9.0}), "config.json: .*high_freq_factor"),
    "rope original negative": (config(rope_scaling={**ROPE, "original_max_position_embeddings": -1}), "config.json: .*original_max_position"),
    "rope beta negative": (config(rope_scaling={**ROPE, "beta_fast": -1}), "config.json: .*beta_fast"),
    "rope beta huge": (config(rope_scaling={**ROPE, "beta_slow": 10**400}), "config.json: .*beta_slow"),
    "rope attention NaN": (config(rope_scaling={**ROPE, "attention_factor": NAN}), "config.json: .*attention_factor"),
    "rope mscale negative": (config(rope_scaling={**ROPE, "mscale": -50, "mscale_all_dim": 1}), "config.json: .*mscale"),
    "rope theta one": (config(rope_theta=1.0, rope_scaling=ROPE), "config.json: .*rope_theta"),
    "rope theta tiny": (config(rope_theta=1e-320), "config.json: .*rope_theta"),
    "heads not a multiple": (config(num_key_value_heads=4), "config.json: .*kv_heads"),
    "kv_heads negative": (config(num_key_value_heads=-2), "config.json: num_key_value_heads is -2"),
    "head_dim odd": (config(head_dim=12), "config.json: head_dim is 12"),
    "head_dim large": (config(head_dim=512), "config.json: head_dim is 512"),
    "head_dim derived and odd": (config(head_dim=MISSING, hidden_size=72), "config.json: head_dim"),
    "layers without weights": (config(num_hidden_layers=4000), "model.safetensors lacks the tensor model.layers.2."),
    "layers of Mistral": (config(num_hidden_layers=2 * 10**9, **MISTRAL), "config.json: num_hidden_layers is 2000000000"),
    "vocabulary without weights": (config(vocab_size=2**30), "model.safetensors: tensor model.embed_tokens.weight has shape"),
    "hidden without weights": (config(hidden_size=2**30), "model.safetensors: tensor model.embed_tokens.weight has shape"),
    "window a text": (config(sliding_window="x" * 99999, **MISTRAL), "config.json: sliding_window"),
    "window negative": (config(sliding_window=-5, **MISTRAL), "config.json: sliding_window"),
    "window NaN": (config(sliding_window=NAN, **MISTRAL), "config.json: sliding_window"),
    "layer types too few": (config(layer_types=["sliding_attention"], **MISTRAL), "config.json: layer_types"),
    "layer types a number": (config(layer_types=5, **MISTRAL), "config.json: layer_types"),
    "layer types unknown": (config(layer_types=["mamba"] * 2, **MISTRAL), "config.json: layer_types"),
    "tied a text": (config(tie_word_embeddings="false"), "config.json: tie_word_embeddings"),
    "bias a text": (config(attention_bias="no"), "config.json: attention_bias"),
    "bias without weights": (config(attention_bias=True), "model.safetensors lacks the tensor model.layers.0.self_attn.q_proj.bias"),
    "eos an object": (lambda p: (remove("generation_config.json")(p), config(eos_token_id={})(p)), "config.json: eos_token_id"),
    "generation not JSON": (write("generation_config.json", "{"), "generation_config.json cannot be read as JSON"),
    "generation a list": (write("generation_config.json", "[]"), "generation_config.json holds no JSON object"),
    "generation eos a text": (write("generation_config.json", '{"eos_token_id": "</s>"}'), "generation_config.json: eos_token_id"),
    "generation eos negative": (write("generation_config.json", '{"eos_token_id": -1}'), "generation_config.json: eos_token_id"),
    "generation eos too many": (write("generation_config.json", json.dumps({"eos_token_id": [7] * 65})), "generation_config.json: eos_token_id"),
    "weights missing": (remove("model.safetensors"), "holds neither model.safetensors nor model.safetensors.index.json"),
    "weights pickled": (pickles, "pytorch_model.bin .*pickle"),
    "weights empty": (write("model.safetensors", b""), UNREADABLE),
    "weights cut in the length": (cut(5), UNREADABLE),
    "weights cut in the header": (cut(500), UNREADABLE),
    "weights cut in the data": (cut(-4), f"{UNREADABLE}: tensor model.norm.weight ends 4 bytes past the end"),
    "weights cut in the middle": (cut(30_000), f"{UNREADABLE}: tensor lm_head.weight ends 21448 bytes past the end"),
    "weights with a tail": (lambda p: (p / "model.safetensors").open("ab").write(bytes(4)), UNREADABLE),
    "weights a directory": (replaced("model.safetensors", Path.mkdir), "model.safetensors"),
    "weights a symlink loop": (replaced("model.safetensors", loop), "model.safetensors"),
    "weights a pipe": (replaced("model.safetensors", os.mkfifo), "model.safetensors"),
    "weights of an LFS pointer": (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), UNREADABLE),
    "header of 2^63 bytes": (raw_header("{}", 2**63), UNREADABLE),
    "header larger than the file": (raw_header("{}", 10**6), UNREADABLE),
    "header of zero bytes": (raw_header("", 0), UNREADABLE),
    "header not JSON": (raw_header("{]"), UNREADABLE),
    "header a list": (raw_header("[]"), UNREADABLE),
    "header deep": (raw_header('{"a":' * 50_000), UNREADABLE),
    "header with control codes": (header(lambda h: h[Q0].update(dtype="\x1b[2J\nready")), UNREADABLE),
    "header twice": (twice, f"model.safetensors.*{Q0}|model.safetensors is not a readable"),
    "offsets overlap": (header(lambda h: h[Q0].update(data_offsets=[0, 9216])), UNREADABLE),
    "offsets out of range": (header(lambda h: h[Q0].update(data_offsets=[2**60, 2**60 + 9216])), UNREADABLE),
    "offsets of 400 digits": (header(lambda h: h[Q0].update(data_offsets=[0, 10**400])), UNREADABLE),
    "offsets backwards": (header(lambda h: h[Q0].update(data_offsets=[9216, 0])), UNREADABLE),
    "offsets negative": (header(lambda h: h[Q0].update(data_offsets=[-9216, 0])), UNREADABLE),
    "shape overflows": (header(lambda h: h[Q0].update(shape=[2**62, 2**62])), UNREADABLE),
    "shape negative": (header(lambda h: h[Q0].update(shape=[-48, -48])), UNREADABLE),
    "shape turned": (tensors(lambda w: w.update({Q0: w[Q0].reshape(24, 96)})), f"tensor {Q0} has shape \\[24, 96\\], .*\\[48, 48\\]"),
    "shape flat": (tensors(lambda w: w.update({Q0: w[Q0].flatten()})), f"model.safetensors: tensor {Q0} has shape \\[2304\\]"),
    "shape of many": (tensors(lambda w: w.update({Q0: w[Q0].reshape(48, 48, *[1] * 999)})), f"model.safetensors: tensor {Q0} has shape"),
    "dtype int32": (tensors(lambda w: w.update({Q0: w[Q0].int()})), f"model.safetensors: tensor {Q0} .*I32"),
    "dtype bool": (tensors(lambda w: w.update({Q0: w[Q0] > 0})), f"model.safetensors: tensor {Q0} .*BOOL"),
    "dtype float8": (tensors(lambda w: w.update({Q0: w[Q0].to(torch.float8_e4m3fn)})), f"model.safetensors: tensor {Q0} .*F8_E4M3"),
    "tensor missing": (tensors(lambda w: w.pop(Q0)), f"model.safetensors lacks the tensor {Q0}"),
    "head missing": (tensors(lambda w: w.pop("lm_head.weight")), "model.safetensors lacks the tensor lm_head.weight"),
    "tensors all missing": (tensors(lambda w: w.clear()), "model.safetensors lacks the tensor model.embed_tokens.weight"),
    "weights NaN": (poison(Q0, NAN), f"model.safetensors: tensor {Q0} .*finite"),
    "weights infinite": (poison("lm_head.weight", float("inf")), "model.safetensors: tensor lm_head.weight .*finite"),
    "weights larger than the memory": (large_bfloat16, "m does not fit the memory of cpu in torch.float32"),
    "index not JSON": (lambda p: (index({})(p), write("model.safetensors.index.json", "{")(p)), "index.json cannot be read as JSON"),
    "index without a map": (index(None), "index.json has no weight_map"),
    "index empty": (index({}), "index.json has no weight_map"),
    "index of lists": (index({Q0: ["model-1.safetensors"]}), "index.json has no weight_map"),
    "index of numbers": (index({Q0: 1}), "index.json has no weight_map"),
    "index with NUL": (index({Q0: "model\0.safetensors"}), "index.json has no weight_map"),
    "index leaves by ..": (index({Q0: "../../../../etc/passwd"}), "index.json has no weight_map"),
    "index leaves by /": (index({Q0: "/etc/passwd"}), "index.json has no weight_map"),
    "index names ..": (index({Q0: ".."}), "index.json has no weight_map"),
    "index names nothing": (index({Q0: ""}), "index.json has no weight_map"),
    "index with control codes": (index({Q0: "\x1b[2J.safetensors"}), "index.json has no weight_map"),
    "index names a pickle": (index({Q0: "pytorch_model.bin"}), "index.json has no weight_map"),
    "shard missing": (index({Q0: "model-1.safetensors", "x": "model-2.safetensors"}), "model-2.safetensors is not a readable"),
    "shard a pipe": (
        lambda p: (sharded(lambda parts: None)(p), replaced("model-2.safetensors", os.mkfifo)(p)), "model-2.safetensors is not .*: it is a pipe"
    ),
    "shard cut": (cut_shard(2, 4), "model-2.safetensors .*: tensor model.layers.1.self_attn.v_proj.weight ends 4 bytes past"),
    "shards without a tensor": (sharded(lambda parts: [p.pop(Q0, 0) for p in parts]), f"index.json: none of its 3 files holds the tensor {Q0}"),
    "shards with a tensor twice": (
        sharded(lambda parts: parts[2].update({Q0: parts[0][Q0] + 1})), f"model-3.safetensors: tensor {Q0} is also in model-1.safetensors"
    ),
    "index of long names": (index({Q0: "x" * 10**5 + ".safetensors"}), "index.json has no weight_map"),
    "shards a million": (index({f"t{i}": f"{i}.safetensors" for i in range(10**5)}), "0.safetensors is"),
    "tokenizer missing": (remove("tokenizer.json"), "tokenizer.json is missing"),
    "tokenizer not JSON": (write("tokenizer.json", "{"), "tokenizer.json is not a tokenizer"),
    "tokenizer of nothing": (write("tokenizer.json", "{}"), "tokenizer.json is not a tokenizer"),
    "tokenizer not UTF-8": (write("tokenizer.json", b"\xff\xff"), "tokenizer.json is not a tokenizer"),
    "tokenizer deep": (write("tokenizer.json", '{"model":' * 100_000), "tokenizer.json is not a tokenizer"),
    "tokenizer a directory": (replaced("tokenizer.json", Path.mkdir), "tokenizer.json is (missing|not a tokenizer)"),
    "tokenizer a pipe": (replaced("tokenizer.json", os.mkfifo), "tokenizer.json is (missing|not a tokenizer)"),
    "tokenizer huge": (replaced("tokenizer.json", sparse(1 << 40)), "tokenizer.json .*1099.5 GB"),
    "tokenizer of an unknown kind": (tokenizer(lambda t: t["model"].update(type="\x1b[2J\n" + "x" * 9999)), "tokenizer.json is not a tokenizer"),
    "tokenizer without ids": (tokenizer(lambda t: (t["model"]["vocab"].clear(), t.update(added_tokens=[]))), "tokenizer.json .*no tokens"),
    "tokenizer of another model": (tokenizer(lambda t: t["model"]["vocab"].update({"xyz": 5000})), "tokenizer.json .*5000.*257"),
}
for name in COUNTS:
    for what, value in ABSURD.items():
        REFUSED[f"{name} {what}"] = config(**{name: value}), f"config.json: {name} is "
    if name not in ("num_key_value_heads", "head_dim"):  # those may be absent: they follow from others
        REFUSED[f"{name} null"] = config(**{name: None}), f"config.json: {name} is None|config.json lacks the field {name}"
        REFUSED[f"{name} zero"] = config(**{name: 0}), f"config.json: {name} is 0"
        REFUSED[f"{name} absent"] = config(**{name: MISSING}), f"config.json lacks the field {name}"
for name in ("rms_norm_eps", "rope_theta"):
    for what in ("text", "negative", "NaN", "bool", "list", "huge"):
        REFUSED[f"{name} {what}"] = config(**{name: ABSURD[what]}), f"config.json: {name} is "


def sentence(error: object, path: Path) -> str:
    """What a user reads, with the folder's name made short; it must be one printable sentence."""
    text = str(error).replace(str(path), "DIR")
    assert text.isprintable() and 10 < len(text) < 300, text
    return text


def make(folder: Path, how: Break) -> Path:
    how(folder)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_folder_is_refused_in_a_sentence(case: str, folder: Path, little_memory: None) -> None:
    how, words = REFUSED[case]
    with pytest.raises(SpecedgeError, match=words) as e:
        Engine.from_pretrained(make(folder, how), device="cpu", sizes=SIZES)
    print(sentence(e.value, folder))
    assert not (folder.parent / "unpickled").exists()


# ----------------------------------------------------------------------------------------------------------------------
# folders that are odd and served all the same


def template(text: str) -> Break:
    return lambda path: (write("chat_template.jinja", text)(path), write("tokenizer_config.json", json.dumps({"chat_template": text}))(path))


def pickle_beside(path: Path) -> None:
    weights = (path / "model.safetensors").read_bytes()
    pickles(path)
    (path / "model.safetensors").write_bytes(weights)


def huge_weights(weights: dict[str, torch.Tensor]) -> None:
    """Finite, yet every activation overflows: logits of NaN."""
    for name in weights:
        if "proj" in name:
            weights[name] *= 1e30


REACH = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**12) %}{{ cycler.__init__.__globals__.os.system('touch unpickled') }}"
SERVED: dict[str, Break] = {
    "as it is": lambda path: None,
    "generation config missing": remove("generation_config.json"),
    "unknown fields": config(surprise={"a": [NAN]}, auto_map={"AutoModel": "evil.Model"}, torch_dtype="float7"),
    "optional fields null": config(
        head_dim=None, rope_theta=None, rope_scaling=None, eos_token_id=None, tie_word_embeddings=None, quantization_config=None, hidden_act=None
    ),
    "window null": config(sliding_window=None, **MISTRAL),
    "window zero": config(sliding_window=0, **MISTRAL),
    "window larger than the context": config(sliding_window=2**31 - 1, **MISTRAL),
    "context of 2^31": config(max_position_embeddings=2**31 - 1),
    "eos past the vocabulary": write("generation_config.json", '{"eos_token_id": [256, 4294967295]}'),
    "extra tensors": tensors(lambda w: w.update({"extra": torch.zeros(1), "model.layers.99.x": torch.zeros(1, dtype=torch.int32)})),
    "float16": tensors(lambda w: w.update({k: v.half() for k, v in w.items()})),
    "mixed dtypes": tensors(lambda w: w.update({Q0: w[Q0].bfloat16()})),
    "index beside one file": write("model.safetensors.index.json", "{"),
    "index of one shard": index({Q0: "model-1.safetensors"}),
    "index of three shards": sharded(lambda parts: None),
    "symlinks": lambda path: [f.rename(path.parent / f.name) and f.symlink_to(path.parent / f.name) for f in list(path.iterdir())],
    "code and pickles beside it": lambda path: (pickle_beside(path), write("modeling_evil.py", "raise SystemExit")(path)),
    "template broken": template("{% if %}{{{"),
    "template that reaches out": template(REACH),
    "tokenizer with a token added past the vocabulary": tokenizer(
        lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 300, "content": "<pad>"})
    ),
    "weights that overflow": tensors(huge_weights),
}


@pytest.mark.parametrize("case", SERVED)
def test_an_odd_folder_is_served(case: str, folder: Path, little_memory: None) -> None:
    """With ids of the vocabulary, the same with a draft as without, and again in the next engine."""
    path = make(folder, SERVED[case])
    params = SamplingParams(0.8, 6, seed=1, top_p=0.9)
    e = Engine.from_pretrained(path, device="cpu", sizes=SIZES)
    ids = e.generate("ab", params)[0].token_ids
    assert ids and all(0 <= i < BYTES for i in ids)
    both = SpeculativeEngine(Engine.from_pretrained(path, device="cpu", sizes=SIZES), path, DRAFT)
    assert both.generate("ab", params)[0].token_ids == ids
    check_empty(e)
    check_empty(both.engine)
    assert not list(folder.parent.glob("**/unpickled"))


def test_a_token_past_the_vocabulary_is_refused_where_it_is_used(folder: Path) -> None:
    path = make(folder, SERVED["tokenizer with a token added past the vocabulary"])
    e = Engine.from_pretrained(path, device="cpu", sizes=SIZES)
    with pytest.raises(RequestError, match="token 257 is outside the vocabulary of 257"):
        e.generate("a<pad>b")
    check_empty(e)


# ----------------------------------------------------------------------------------------------------------------------
# the same folders by other ways

SEVERAL = [
    "config missing", "config deep", "architecture with control codes", "vocab_size 2^40", "rope beta negative", "weights pickled",
    "weights cut in the data", "weights NaN", "dtype float8", "index leaves by ..", "index with NUL", "tokenizer missing",
    "tokenizer of another model",
]  # fmt: skip


@pytest.mark.parametrize("case", SEVERAL)
def test_a_hostile_draft_is_refused_in_the_same_sentence(case: str, valid: Path, folder: Path) -> None:
    make(folder, REFUSED[case][0])
    said = []
    for load in (Engine.from_pretrained, Drafter.from_pretrained, lambda path, device: SpeculativeEngine(valid, path, DRAFT, device=device)):
        with pytest.raises(SpecedgeError) as e:
            load(folder, device="cpu")  # type: ignore[operator]
        said.append(sentence(e.value, folder))
    assert len(set(said)) == 1


def test_a_draft_of_another_tokenizer_is_refused(valid: Path, folder: Path) -> None:
    make(folder, tokenizer(lambda t: t["added_tokens"][0].update(content="<stop>")))
    with pytest.raises(PairError, match="different tokenizers"):
        SpeculativeEngine(valid, folder, DRAFT, device="cpu")


@pytest.mark.parametrize("case", SEVERAL)
def test_the_server_says_it_in_a_line(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(folder, REFUSED[case][0])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command sets its own
    monkeypatch.setattr(sys, "argv", ["specedge-server", "serve", str(folder), "--device", "cpu"])
    with pytest.raises(SystemExit) as e:
        cli.server()
    out, err = capsys.readouterr()
    assert (e.value.code, out, err.count("\n")) == (1, "", 1)
    assert sentence(err.removesuffix("\n"), folder).startswith("specedge-server: DIR")


def test_memory_that_is_full_without_a_word(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own MemoryError says nothing at all."""

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(weights_module, "assemble", full)
    with pytest.raises(SpecedgeError, match="does not fit the memory of cpu"):
        Engine.from_pretrained(folder, device="cpu")


def test_a_process_says_it_in_a_line(folder: Path) -> None:
    make(folder, REFUSED["weights pickled"][0])
    code = "from specedge.cli import server; server()"
    done = subprocess.run([sys.executable, "-c", code, "serve", folder, "--device", "cpu"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert sentence(done.stderr.removesuffix("\n"), folder).startswith("specedge-server: DIR/pytorch_model.bin is a pickle")
    assert not (folder.parent / "unpickled").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "."])
def test_an_unreadable_file_is_named(name: str, folder: Path) -> None:
    (folder / name).chmod(0)
    if os.access(folder / name, os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises(SpecedgeError, match="ermission denied") as e:
        Engine.from_pretrained(folder, device="cpu")
    assert ("config.json" if name == "." else name) in sentence(e.value, folder)
    (folder / name).chmod(0o700)


@pytest.mark.parametrize("tries", [300, pytest.param(4000, marks=[pytest.mark.full, pytest.mark.timeout(300)])])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
def test_random_damage_is_refused_or_served(name: str, tries: int, valid: Path, folder: Path, little_memory: None) -> None:
    """Bytes changed, cut out, doubled or moved, for weights in their header: a sentence, or an engine."""
    rng = np.random.default_rng(tries)
    good = (valid / name).read_bytes()
    end = 8 + struct.unpack("<Q", good[:8])[0] if name == "model.safetensors" else len(good)
    refused = 0
    for _ in range(tries):
        data, at, size = bytearray(good), int(rng.integers(0, end)), int(rng.integers(1, 9))
        other = int(rng.integers(0, end))
        way = rng.integers(0, 4)
        data[at : at + size] = (rng.bytes(size), b"", good[at : at + size] * 2, good[other : other + size])[way]
        (folder / name).write_bytes(data)
        try:
            Engine.from_pretrained(folder, device="cpu", sizes=SIZES)
        except SpecedgeError as e:
            refused += 1
            sentence(e, folder)
    assert refused > tries / 10
