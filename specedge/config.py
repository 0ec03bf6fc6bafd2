"""Every setting of the package: frozen dataclasses, checked once, when they are made.

A value out of range is a ValueError that names the field, the value and the range. Knows nothing of torch, files or sockets.
"""

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from specedge.tree import MAX_NODES

GREEDY_BELOW = 1e-5  # a temperature below this means argmax: 1/T would push logits out of float32's useful range
MAX_ROWS_PER_TREE = MAX_NODES + 1
PRIORITIES = ("interactive", "batch")  # batch: only rows that cost interactive texts nothing
KV_TOKENS = 16384  # of an engine of which nothing else is known


class SpecedgeError(Exception):
    """A failure that its reader can act on: the message is one sentence that names the thing and the remedy."""


def brief(reason: object) -> str:
    """What a library or a file says, as part of a sentence: one line of printable characters, at most 200 of them."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(reason).split()))[:200]


def _require(ok: bool, name: str, value: object, want: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}, but must be {want}")


def is_batch(priority: str) -> bool:
    """Whether a priority is the lower one; ValueError if it is none."""
    _require(priority in PRIORITIES, "priority", priority, " or ".join(PRIORITIES))
    return priority == "batch"


def _int(value: object, low: float, high: float) -> bool:
    """Whether it is an integer between the two; a bool, which Python takes for one, is not."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # NaN is between no two


def _require_int(name: str, value: object, low: int, high: int) -> None:
    _require(_int(value, low, high), name, value, f"an integer between {low} and {high}")


def _require_bools(config: object, *names: str) -> None:
    for name in names:
        _require(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")


def _tuple(name: str, value: object, want: str) -> tuple[Any, ...]:
    """The elements of a value; ValueError for one that has none."""
    _require(isinstance(value, Iterable), name, value, want)
    return tuple(value)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a text is drawn. A value that is out of range, or of another type, is a ValueError that names the field; lists are taken for tuples, and a
    mapping for `logit_bias`. `logprobs` is the number that vLLM calls so, and OpenAI's chat interface top_logprobs."""

    temperature: float = 0.0  # 0 .. 2; below 1e-5 the likeliest token is taken
    max_tokens: int = 128  # 1 .. 2^31-1
    seed: int | None = None  # 0 .. 2^64-1; None: drawn at random once, and reported (`with_seed`)
    stop_ids: tuple[int, ...] = ()  # <= 64, beside those of the model; the id that ends the text is its last, and not shown
    ignore_eos: bool = False  # the model's own ids end nothing
    top_k: int = 0  # 1 .. 2^31-1; 0 or -1: off
    top_p: float = 1.0  # above 0 .. 1; 1: off
    min_p: float = 0.0  # 0 .. 1; 0: off
    repetition_penalty: float = 1.0  # 0.01 .. 10, of prompt and output; 1: off
    presence_penalty: float = 0.0  # -2 .. 2, of output
    frequency_penalty: float = 0.0  # -2 .. 2, of output
    logit_bias: tuple[tuple[int, float], ...] = ()  # <= 1024 of (id, -100 .. 100, added to its logit), an id once
    min_tokens: int = 0  # 0 .. max_tokens; token min_tokens + 1 is the first that may be a stop id, or complete a stop string
    stop: tuple[str, ...] = ()  # <= 16 strings that end the text and are not part of it; one string is taken too
    logprobs: int | None = None  # 0 .. 2^31-1: report those of every token and of the so many likeliest (request.Logprobs); -1: of all; None: none
    n: int = 1  # 1 .. 128 completions of every prompt; 1 at temperature 0

    def __post_init__(self) -> None:
        _require(_number(self.temperature, 0, 2), "temperature", self.temperature, "between 0 and 2")
        _require(_int(self.max_tokens, 1, 2**31 - 1), "max_tokens", self.max_tokens, "an integer of at least 1")
        _require(self.seed is None or _int(self.seed, 0, 2**64 - 1), "seed", self.seed, "an integer in 0 .. 2^64-1")
        _require_bools(self, "ignore_eos")
        if _int(self.top_k, -1, -1):
            object.__setattr__(self, "top_k", 0)
        _require_int("top_k", self.top_k, 0, 2**31 - 1)
        for name, low, high in (("min_p", 0, 1), ("repetition_penalty", 0.01, 10), ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2)):
            value = getattr(self, name)
            _require(_number(value, low, high), name, value, f"between {low} and {high}")
        _require(_number(self.top_p, 0, 1) and self.top_p > 0, "top_p", self.top_p, "above 0 and at most 1")
        _require(_int(self.min_tokens, 0, self.max_tokens), "min_tokens", self.min_tokens, "between 0 and max_tokens")
        ranks = self.logprobs is None or _int(self.logprobs, -1, 2**31 - 1)
        _require(ranks, "logprobs", self.logprobs, "None, or an integer of at least -1")
        _require_int("n", self.n, 1, 128)
        _require(self.n == 1 or not self.greedy, "n", self.n, "1 at temperature 0, where all completions are the same")
        self._check_stops()
        self._check_bias()

    def _check_stops(self) -> None:
        ids = _tuple("stop_ids", self.stop_ids, "token ids")
        _require(all(_int(i, 0, 2**32 - 1) for i in ids), "stop_ids", self.stop_ids, "token ids")
        _require(len(ids) <= 64, "stop_ids", self.stop_ids, "at most 64 ids")
        want = "at most 16 strings, none of them empty"
        strings = (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop, want)
        _require(len(strings) <= 16 and all(isinstance(s, str) and s for s in strings), "stop", self.stop, want)
        object.__setattr__(self, "stop_ids", ids)
        object.__setattr__(self, "stop", strings)

    def _check_bias(self) -> None:
        given, want = self.logit_bias, "token ids with values between -100 and 100"
        pairs = _tuple("logit_bias", given.items() if isinstance(given, Mapping) else given, want)
        _require(all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs), "logit_bias", given, want)
        _require(all(_int(i, 0, 2**32 - 1) and _number(b, -100, 100) for i, b in pairs), "logit_bias", given, want)
        _require(len({i for i, _ in pairs}) == len(pairs), "logit_bias", given, "one value for each id")
        _require(len(pairs) <= 1024, "logit_bias", f"of {len(pairs)} ids", "of at most 1024")
        object.__setattr__(self, "logit_bias", tuple(map(tuple, sorted(pairs) if isinstance(given, Mapping) else pairs)))

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens before them."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def filters(self) -> bool:
        """Whether min_p, top_k or top_p leaves tokens out."""
        return (self.min_p, self.top_k, self.top_p) != (0, 0, 1)

    @property
    def kept(self) -> tuple[float, int, float]:
        """min_p, top_k, top_p."""
        return self.min_p, self.top_k, self.top_p

    @property
    def looser(self) -> tuple[float, int, float]:
        """The filters of a draft: it must not lose what the target might keep, yet without any the noise would lift tokens that the target never
        emits (simulated: 12.05 tokens per round without noise, 11.69 with noise and no truncation)."""
        return self.min_p / 3, min(2 * self.top_k, 2**31 - 1), self.top_p + 0.7 * (1 - self.top_p)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without noise."""
        return self.temperature < GREEDY_BELOW

    def with_seed(self) -> "SamplingParams":
        """The same with a seed: its own, or a fresh one."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(64))

    def each(self) -> "list[SamplingParams]":
        """The parameters of the n completions, one for each: completion i has the seed `seed + i` modulo 2^64, with which it can be had alone."""
        first = self.with_seed()
        assert first.seed is not None
        return [replace(first, n=1, seed=(first.seed + i) % 2**64) for i in range(self.n)]

    def single(self) -> "SamplingParams":
        """The same with a seed, for a stream; ValueError if it asks for several completions."""
        _require(self.n == 1, "n", self.n, "1 for a stream: open one for each seed, or use generate")
        return self.with_seed()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder, as read from a Hugging Face config.json (`engine.weights.read_config`)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    eos_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head before rope
    windows: tuple[int, ...] = ()  # sliding window of every layer, 0 for none; empty: none anywhere
    rope_type: str = "default"
    rope: Mapping[str, float] = field(default_factory=dict)  # what the type needs (engine.rope)

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_positions"):
            value = getattr(self, name)
            _require(_int(value, 1, 2**31 - 1), name, value, "a positive integer")
        _require(self.heads % self.kv_heads == 0, "kv_heads", self.kv_heads, f"a divisor of the {self.heads} heads")
        _require(self.head_dim % 8 == 0 and self.head_dim <= 256, "head_dim", self.head_dim, "a multiple of 8 up to 256")
        _require(0 < self.norm_eps < math.inf, "norm_eps", self.norm_eps, "positive and finite")
        _require(0 < self.rope_theta < math.inf, "rope_theta", self.rope_theta, "positive and finite")
        _require(all(isinstance(i, int) and 0 <= i < 2**32 for i in self.eos_ids), "eos_ids", self.eos_ids, "token ids")
        _require(len(self.eos_ids) <= 64, "eos_ids", self.eos_ids, "at most 64 ids")
        _require(len(self.windows) in (0, self.layers), "windows", self.windows, f"empty or one for each of the {self.layers} layers")
        _require(all(isinstance(w, int) and 0 <= w < 2**31 for w in self.windows), "windows", self.windows, "numbers of tokens")

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token holds over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of an engine. `kv_tokens`: tokens whose K/V fit its pages, None: 16,384, or on a GPU what `gpu_share` of its memory leaves beside
    weights and passes; `max_rows`: rows of one step. `admission`: of every tree verify the nodes that are worth their rows, else all of them. What
    is out of range, or of another type, is a ValueError that names the field."""

    kv_tokens: int | None = None  # at least a page
    page_size: int = 64  # 16, 32, 64 or 128 tokens
    max_rows: int = 512  # 2 .. 65,536
    max_sequences: int = 256  # 1 .. 65,536
    admission: bool = True
    gpu_share: float = 0.9  # above 0 .. 1

    def __post_init__(self) -> None:
        _require(_int(self.page_size, 16, 128) and self.page_size in (16, 32, 64, 128), "page_size", self.page_size, "16, 32, 64 or 128")
        enough = self.kv_tokens is None or _int(self.kv_tokens, self.page_size, math.inf)
        _require(enough, "kv_tokens", self.kv_tokens, f"an integer of at least one page of {self.page_size}")
        _require_int("max_rows", self.max_rows, 2, 65536)
        _require_int("max_sequences", self.max_sequences, 1, 65536)
        _require_bools(self, "admission")
        _require(_number(self.gpu_share, 0, 1) and self.gpu_share > 0, "gpu_share", self.gpu_share, "above 0 and at most 1")

    @property
    def tokens(self) -> int:
        """kv_tokens, or what stands for None where no GPU's memory is asked."""
        return KV_TOKENS if self.kv_tokens is None else self.kv_tokens

    @property
    def pages(self) -> int:
        """Whole pages that hold so many tokens at most."""
        return self.tokens // self.page_size


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """How trees are grown: at most `tree_size` nodes of a submitted tree and `width` rows of a draft forward, `branch` children kept of a row. What
    is out of range, or of another type, is a ValueError that names the field."""

    tree_size: int = 31  # 0 .. 255; 0: nothing is drafted
    width: int = 32  # 1 .. 255
    branch: int = 8  # 1 .. 255
    depth: int | None = None  # 1 .. 255 draft forwards before a tree of exactly `tree_size` nodes is submitted; None: both as times and odds say
    tau: float = 1.0  # above 0; how far the draft's probabilities are trusted beside the shared noise
    proactive: bool = True  # keep growing while the verdict is in flight
    ahead: bool = True  # and say what grows, so that a server may verify it before anybody asks
    autopilot: bool = True  # an edge leaves the text to the server while drafts do not pay; not with a `depth`
    max_sessions: int = 8  # 1 .. 256 texts at a time
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(KV_TOKENS, max_rows=256))

    def __post_init__(self) -> None:
        _require_int("tree_size", self.tree_size, 0, MAX_NODES)
        _require_int("width", self.width, 1, MAX_NODES)
        _require_int("branch", self.branch, 1, MAX_NODES)
        if self.depth is not None:
            _require_int("depth", self.depth, 1, MAX_NODES)
        _require(_number(self.tau, 0, math.inf) and self.tau not in (0, math.inf), "tau", self.tau, "positive and finite")
        _require_bools(self, "proactive", "ahead", "autopilot")
        _require(isinstance(self.engine, EngineConfig), "engine", self.engine, "an EngineConfig")
        _require_int("max_sessions", self.max_sessions, 1, 256)
