"""Other engines behind one interface, each over random weights in a shape of ours, made by its own means.

What they share with us is the work: a pass of `rows` rows for each of `sequences` sequences behind `context` tokens of K/V, with logits of every
row, or of the last alone for a prompt. Rows of a verification are a causal chain here: nobody else takes a tree, and a chain costs them no more.
Packages are imported where they are used, so that one that is missing costs its column and nothing else. OpenVINO has a file of its own.
"""

import ctypes
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bench.peer_openvino import OpenVINO
from specedge.config import ModelConfig

NAMES = ("transformers", "openvino", "openvino-int8", "llama.cpp", "llama.cpp-q8_0")


def make_peer(name: str, c: ModelConfig, device: torch.device, dtype: torch.dtype, threads: int, sequences: int, tokens: int) -> "Peer":
    """The peer of that name, with room for `sequences` of `tokens` tokens each; it computes in `dtype`, or, llama.cpp, as its name says."""
    if name == "transformers":
        return Transformers(c, device, dtype)
    if name.startswith("openvino"):
        return OpenVINO(c, name.endswith("int8"), dtype == torch.float32, threads)
    return LlamaCpp(c, "Q8_0" if name.endswith("q8_0") else "BF16", threads, sequences, tokens)


class Peer(Protocol):
    """An engine that can be timed. `step` is timed; `prepare` runs before each, untimed, and leaves `context` tokens in every cache."""

    version: str

    def prepare(self, kind: str, sequences: int, rows: int, context: int) -> None: ...

    def step(self, kind: str, sequences: int, rows: int, context: int) -> None: ...


class Transformers:
    """Qwen2ForCausalLM, or Qwen3 where heads are normed, in `dtype` with SDPA and the cache that its `generate` takes."""

    def __init__(self, c: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        import transformers

        self.api: Any = transformers
        self.version = f"transformers {transformers.__version__}, {str(dtype).removeprefix('torch.')}"
        self.config = (self.api.Qwen3Config if c.qk_norm else self.api.Qwen2Config)(
            hidden_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, intermediate_size=c.ffn,
            vocab_size=c.vocab, rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_positions, tie_word_embeddings=c.tied,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, **({"head_dim": c.head_dim} if c.qk_norm else {}),
        )  # fmt: skip
        with device:  # weights are drawn there: on a CPU those of an 8B model would take minutes
            self.model = self.api.AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        self.shape, self.device, self.dtype = (c.layers, c.kv_heads, c.head_dim), device, dtype
        self.cache: Any = None
        self.cached = (0, 0)

    def prepare(self, kind: str, sequences: int, rows: int, context: int) -> None:
        if self.cached == (sequences, context) and context:
            self.cache.crop(context - self.cache.get_seq_length())  # below 0: so many tokens fewer
            return
        layers, heads, dim = self.shape
        self.cache, self.cached = self.api.DynamicCache(config=self.config), (sequences, context)
        for i in range(layers if context else 0):
            keys, values = torch.zeros(2, sequences, heads, context, dim, device=self.device, dtype=self.dtype)
            self.cache.update(keys, values, i)

    @torch.inference_mode()
    def step(self, kind: str, sequences: int, rows: int, context: int) -> None:
        ids = torch.ones(sequences, rows, dtype=torch.long, device=self.device)
        self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=int(kind == "prompt"))


class LlamaCpp:
    """llama.cpp through its C functions, K/V in float16, one cache for each sequence. `kind`: a type of GGUF, BF16 or Q8_0."""

    def __init__(self, c: ModelConfig, kind: str, threads: int, sequences: int, tokens: int) -> None:
        import gguf
        import llama_cpp

        self.api: Any = llama_cpp
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds no reference
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, c, gguf.GGMLQuantizationType[kind])
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * -(-tokens // 256) * 256
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max, params.kv_unified = sequences, False  # unified: copies of a sequence would share their K/V
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise MemoryError("llama.cpp made no context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.filled, self.copied = 0, (1, 0)

    def _decode(self, sequences: int, rows: int, first: int, last_only: bool) -> None:
        batch = self.batch
        batch.n_tokens = sequences * rows
        for i in range(sequences * rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = 1, first + i % rows, 1, i // rows
            batch.logits[i] = not last_only or i == rows - 1
        code = self.api.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode answered {code}")

    def prepare(self, kind: str, sequences: int, rows: int, context: int) -> None:
        self.filled = min(self.filled, context)
        for s in range(sequences):
            self.api.llama_memory_seq_rm(self.memory, s, context if s else self.filled, -1)
        while self.filled < context:  # there is no way to fill a cache but to run the tokens
            count = min(512, context - self.filled)
            self._decode(1, count, self.filled, True)
            self.filled += count
        if sequences > 1 and self.copied != (sequences, context):
            for s in range(1, sequences):
                self.api.llama_memory_seq_rm(self.memory, s, -1, -1)
                self.api.llama_memory_seq_cp(self.memory, 0, s, -1, -1)
        self.copied = (sequences, context)

    def step(self, kind: str, sequences: int, rows: int, context: int) -> None:
        self._decode(sequences, rows, context, kind == "prompt")
        self.api.llama_synchronize(self.context)


def write_gguf(path: Path, c: ModelConfig, kind: Any) -> None:
    """A Qwen2 of random weights, quantised by the gguf package; rows and layers repeat, in bytes of their own."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        some = gguf.quants.quantize(rng.standard_normal((min(rows, 512), columns), np.float32) * columns**-0.5, kind)
        return np.resize(some, (rows, some.shape[1]))  # repeated: to draw and quantise every weight would take a minute

    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layer = {
        "attn_q": matrix(q, c.hidden), "attn_k": matrix(kv, c.hidden), "attn_v": matrix(kv, c.hidden), "attn_output": matrix(c.hidden, q),
        "ffn_gate": matrix(c.ffn, c.hidden), "ffn_up": matrix(c.ffn, c.hidden), "ffn_down": matrix(c.hidden, c.ffn),
    }  # fmt: skip
    ones = np.ones(c.hidden, np.float32)
    biases = {"attn_q": q, "attn_k": kv, "attn_v": kv} if c.qkv_bias else {}
    writer.add_tensor("token_embd.weight", matrix(c.vocab, c.hidden), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(c.layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", ones)
        for name, weight in layer.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", weight, raw_dtype=kind)
        for name, size in biases.items():
            writer.add_tensor(f"blk.{i}.{name}.bias", np.full(size, size**-0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
