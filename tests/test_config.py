"""Every field of every configuration: what is accepted at its bounds, what is refused beyond them, and how the refusal reads.

TABLE must name every field, so that a new one cannot come without its bounds.
"""

import dataclasses
import inspect
import math
import re
from typing import Any

import pytest

from specedge.config import GREEDY_BELOW, MAX_ROWS_PER_TREE, DraftConfig, EngineConfig, ModelConfig, SamplingParams

MODEL: dict[str, Any] = dict(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=1000, norm_eps=1e-6, rope_theta=1e4, max_positions=512, tied=True)  # fmt: skip # noqa: E501
BASE: dict[type, dict[str, Any]] = {SamplingParams: {"temperature": 1.0}, ModelConfig: MODEL, EngineConfig: {}, DraftConfig: {}}
NAN, INF = math.nan, math.inf
POSITIVE = ([1, 2**31 - 1], [0, -1, 2**31, 1.5, "8", None, True])

# class, field: (accepted, refused); an empty second list: any value of the type will do
TABLE: dict[tuple[type, str], tuple[list[Any], list[Any]]] = {
    (SamplingParams, "temperature"): ([0, 0.0, 1e-9, 1, 2, 2.0], [-1e-9, 2.0000001, -1, 3, 10**400, NAN, INF, -INF, "1", None, True]),
    (SamplingParams, "max_tokens"): ([1, 2**31 - 1], [0, -1, 2**31, 1.0, "1", None, True]),
    (SamplingParams, "seed"): ([None, 0, 2**64 - 1], [-1, 2**64, 1.0, "1", True]),
    (SamplingParams, "stop_ids"): (
        [(), (0,), (2**32 - 1,), tuple(range(64))],
        [None, 3, (-1,), (2**32,), (1.0,), ("1",), "12", (None,), (True,), tuple(range(65)), [-1]],
    ),
    (SamplingParams, "ignore_eos"): ([True, False], ["no", None, 0, 1, 0.0]),
    (SamplingParams, "top_k"): ([0, 1, 2**31 - 1], [-2, 2**31, 1.5, NAN, -1.0, "5", None, True]),
    (SamplingParams, "top_p"): ([1e-9, 0.5, 1, 1.0], [0, -0.1, 1.01, NAN, INF, "1", None, True]),
    (SamplingParams, "min_p"): ([0, 0.0, 0.5, 1], [-0.1, 1.01, NAN, "0", None, False]),
    (SamplingParams, "repetition_penalty"): ([0.01, 1, 10], [0, 1e-46, -1, 10.1, NAN, INF, "1", None, True]),
    (SamplingParams, "presence_penalty"): ([-2, 0, 2.0], [-2.1, 2.1, NAN, "0", None, True]),
    (SamplingParams, "frequency_penalty"): ([-2, 0, 2.0], [-2.1, 2.1, NAN, "0", None, True]),
    (SamplingParams, "logit_bias"): (
        [(), ((0, 1.0),), ((2**32 - 1, -100),)],
        [
            ((-1, 0.0),), ((2**32, 0.0),), ((1, 101.0),), ((1, NAN),), ((1.0, 1.0),), ((1, "1"),), ((1, 0.5), (1, 0.5)), None, 5, "ab", ((1,),),
            ((1, 2.0, 3),), (1, 2.0), ((True, 1.0),), ((1, True),), {1: 0.5, "a": 0.5}, {"a": 0.5}, {1: None}, {1: [0.5]}, [[1, 0.5], [1, 0.5]],
        ],
    ),
    (SamplingParams, "min_tokens"): ([0, 1, 128], [-1, 129, 1.5, NAN, "1", None, True]),
    (SamplingParams, "stop"): ([(), ("a",), ("a", "b") * 8], [("",), "", (1,), ("a",) * 17, None, 5, b"a", ("a", None)]),
    (SamplingParams, "logprobs"): ([None, -1, 0, 20, 2**31 - 1], [-2, 2**31, 1.5, "1", NAN, True, False]),
    (SamplingParams, "n"): ([1, 2, 128], [0, -1, 129, 1.5, "1", None, True]),
    (ModelConfig, "hidden"): POSITIVE,
    (ModelConfig, "layers"): POSITIVE,
    (ModelConfig, "heads"): ([2, 64], POSITIVE[1]),
    (ModelConfig, "kv_heads"): ([1, 2, 4], [*POSITIVE[1], 3, 8]),
    (ModelConfig, "head_dim"): ([8, 16, 128, 256], [*POSITIVE[1], 12, 257, 264]),
    (ModelConfig, "ffn"): POSITIVE,
    (ModelConfig, "vocab"): POSITIVE,
    (ModelConfig, "norm_eps"): ([1e-12, 1e-5], [0, -1e-6, NAN, INF]),
    (ModelConfig, "rope_theta"): ([1e4, 5e6], [0, -1.0, NAN, INF]),
    (ModelConfig, "max_positions"): POSITIVE,
    (ModelConfig, "tied"): ([True, False], []),
    (ModelConfig, "eos_ids"): ([(), (0,), (1, 2), (7,) * 64], [(-1,), (2**32,), (1.0,), (None,), (7,) * 65]),
    (ModelConfig, "qkv_bias"): ([True, False], []),
    (ModelConfig, "out_bias"): ([True, False], []),
    (ModelConfig, "mlp_bias"): ([True, False], []),
    (ModelConfig, "qk_norm"): ([True, False], []),
    (ModelConfig, "windows"): ([(), (0,) * MODEL["layers"], (4096,) * MODEL["layers"]], [(1,) * (MODEL["layers"] + 1), (-1,) * MODEL["layers"]]),
    (ModelConfig, "rope_type"): (["default", "yarn"], []),
    (ModelConfig, "rope"): ([{}, {"factor": 2.0}], []),
    (EngineConfig, "kv_tokens"): ([None, 64, 65, 2**31 - 1], [0, -1, 63, 100.5, NAN, INF, "64", True]),
    (EngineConfig, "page_size"): ([16, 32, 64, 128], [0, -64, 1, 48, 256, 63.5, 64.0, "64", None, True]),
    (EngineConfig, "max_rows"): ([2, 65536], [0, 1, -1, 65537, 2.5, NAN, "2", None]),
    (EngineConfig, "max_sequences"): ([1, 65536], [0, -1, 65537, 2.5, NAN, True]),
    (EngineConfig, "admission"): ([True, False], ["no", None, 1]),
    (EngineConfig, "gpu_share"): ([0.1, 0.9, 1], [0, -0.1, 1.1, NAN, INF, "all", None, True]),
    (DraftConfig, "tree_size"): ([0, 1, 255], [-1, 256, 7.5, NAN, True]),
    (DraftConfig, "width"): ([1, 255], [0, -1, 256, 7.5, NAN, None, True]),
    (DraftConfig, "branch"): ([1, 255], [0, -1, 256, 7.5, NAN, None, True]),
    (DraftConfig, "depth"): ([None, 1, 255], [0, -1, 1.5, NAN, INF, True]),
    (DraftConfig, "tau"): ([1e-3, 1.0, 5], [0, -1.0, NAN, INF, "1", None, True]),
    (DraftConfig, "proactive"): ([True, False], ["no", None, 0]),
    (DraftConfig, "ahead"): ([True, False], ["no", None, 0]),
    (DraftConfig, "autopilot"): ([True, False], ["no", None, 0]),
    (DraftConfig, "max_sessions"): ([1, 256], [0, -1, 257, 1.5, NAN, True]),
    (DraftConfig, "engine"): ([EngineConfig()], [None, 512]),
}
GOOD = [(kind, name, value) for (kind, name), (good, _) in TABLE.items() for value in good]
BAD = [(kind, name, value) for (kind, name), (_, bad) in TABLE.items() for value in bad]


def label(value: object) -> str:
    text = value.__name__ if isinstance(value, type) else repr(value)
    return text if len(text) < 30 else text[:20] + "..."


def make(kind: type, name: str, value: object) -> Any:
    return kind(**{**BASE[kind], name: value})


@pytest.mark.parametrize(("kind", "name", "value"), GOOD, ids=label)
def test_values_within_bounds_are_kept(kind: type, name: str, value: object) -> None:
    assert getattr(make(kind, name, value), name) == value


@pytest.mark.parametrize(("kind", "name", "value"), BAD, ids=label)
def test_values_out_of_range_are_refused_by_name(kind: type, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*, but must be .+") as e:
        make(kind, name, value)
    assert repr(value) in str(e.value)


def test_what_is_kept_can_be_hashed() -> None:
    """Lists and mappings are taken, and become tuples."""
    params = SamplingParams(top_k=-1, stop_ids=[3, 1], stop=["a", "b"], logit_bias={5: 1, 2: -0.5})  # type: ignore[arg-type]
    assert (params.top_k, params.stop_ids, params.stop, params.logit_bias) == (0, (3, 1), ("a", "b"), ((2, -0.5), (5, 1)))
    listed = SamplingParams(stop_ids=iter([3, 1]), stop="ab", logit_bias=[[5, 1], (2, -0.5)])  # type: ignore[arg-type]
    assert (listed.stop_ids, listed.stop, listed.logit_bias) == ((3, 1), ("ab",), ((5, 1), (2, -0.5)))
    assert len({params, listed}) == 2


@pytest.mark.parametrize("kind", BASE, ids=label)
def test_the_table_names_every_field(kind: type) -> None:
    assert {f.name for f in dataclasses.fields(kind)} == {name for k, name in TABLE if k is kind}


RANGE = re.compile(r"^    (\w+): (\w+).*?# (above )?(-?[\d.,^-]+) \.\. ([\d.,^-]+|max_tokens)(?![\d^])", re.MULTILINE)  # field, type, what is said
COUNT = re.compile(r"^    (\w+): .*?# <= (\d+)", re.MULTILINE)


def number(text: str) -> float:
    """12, 0.01, 65,536 or 2^31-1."""
    if text == "max_tokens":
        return SamplingParams().max_tokens
    base, _, rest = text.replace(",", "").partition("^")
    power, _, less = rest.partition("-")
    return int(base) ** int(power) - int(less) if rest else float(base)


@pytest.mark.parametrize(("kind", "fields"), [(SamplingParams, 12), (EngineConfig, 3), (DraftConfig, 5)], ids=label)
def test_what_is_said_beside_a_field_is_so(kind: type, fields: int) -> None:
    """The ranges in the comments are those that are checked."""
    found = RANGE.findall(inspect.getsource(kind))
    assert len(found) == fields, "none is overlooked"
    for name, of, above, low, high in found:
        first, last = number(low), number(high)
        for value in (first, last) if not above else (last,):
            make(kind, name, int(value) if of == "int" else value)
        for value in (first - 3 if of == "int" else first if above else first - 0.001, last + 1 if of == "int" else last + 0.001):
            with pytest.raises(ValueError, match=f"^{name} is"):  # -3: in some fields 0 or -1 means off
                make(kind, name, int(value) if of == "int" else value)


def test_what_is_said_of_numbers_and_names_is_so() -> None:
    many = {
        "stop_ids": lambda n: tuple(range(n)), "stop": lambda n: ("a",) * n, "logit_bias": lambda n: tuple((i, 0.0) for i in range(n)),
    }  # fmt: skip
    found = COUNT.findall(inspect.getsource(SamplingParams))
    assert {name for name, _ in found} == set(many)
    for name, most in found:
        make(SamplingParams, name, many[name](int(most)))
        with pytest.raises(ValueError, match=f"^{name} is"):
            make(SamplingParams, name, many[name](int(most) + 1))
    assert "top_logprobs" in (SamplingParams.__doc__ or "")
    assert all("ValueError" in (kind.__doc__ or "") for kind in (SamplingParams, EngineConfig, DraftConfig))


@pytest.mark.parametrize("kind", BASE, ids=label)
def test_frozen_and_closed(kind: type) -> None:
    made = kind(**BASE[kind])
    for f in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, f.name, getattr(made, f.name))
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        made.another = 1
    assert not hasattr(made, "__dict__") and made == kind(**BASE[kind])


def test_a_pool_needs_a_page() -> None:
    assert EngineConfig(kv_tokens=128, page_size=128).pages == 1
    with pytest.raises(ValueError, match="^kv_tokens is 127, but must be .*128"):
        EngineConfig(kv_tokens=127, page_size=128)
    assert EngineConfig(kv_tokens=1000, page_size=16).pages == 62, "a page that is not whole does not count"


def test_with_seed_draws_once() -> None:
    params = SamplingParams(temperature=0.7, max_tokens=9, stop_ids=(3,), ignore_eos=True)
    first, second = params.with_seed(), params.with_seed()
    assert params.seed is None, "the original stays as it was"
    assert first.seed is not None and second.seed is not None and first.seed != second.seed
    assert 0 <= first.seed < 2**64
    assert dataclasses.replace(first, seed=None) == params
    assert first.with_seed() is first


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_with_seed_keeps_a_seed(seed: int) -> None:
    assert SamplingParams(seed=seed).with_seed().seed == seed


def test_seeds_use_all_64_bits() -> None:
    seeds = [SamplingParams().with_seed().seed or 0 for _ in range(64)]
    assert max(seeds) >= 2**60 and len(set(seeds)) == 64  # by chance with odds below 10^-70


def test_each_completion_has_a_seed_of_its_own() -> None:
    params = SamplingParams(temperature=1.0, n=3, seed=2**64 - 2)
    assert [(p.seed, p.n) for p in params.each()] == [(2**64 - 2, 1), (2**64 - 1, 1), (0, 1)]
    drawn = [p.seed or 0 for p in SamplingParams(temperature=1.0, n=2).each()]
    assert drawn[1] == (drawn[0] + 1) % 2**64
    with pytest.raises(ValueError, match="^n is 2, but must be 1 at temperature 0"):
        SamplingParams(n=2)
    with pytest.raises(ValueError, match="^n is 3, but must be 1 for a stream"):
        params.single()


def test_greedy_has_a_sharp_limit() -> None:
    assert SamplingParams().greedy and SamplingParams(temperature=math.nextafter(GREEDY_BELOW, 0)).greedy
    assert not SamplingParams(temperature=GREEDY_BELOW).greedy and not SamplingParams(temperature=1.0).greedy
    assert GREEDY_BELOW == 1e-5


def test_derived_sizes() -> None:
    assert ModelConfig(**MODEL).kv_bytes_per_token(2) == 2 * 2 * 2 * 16 * 2
    assert ModelConfig(**MODEL).kv_bytes_per_token(4) == 512
    assert MAX_ROWS_PER_TREE == 256
    assert DraftConfig().engine is not DraftConfig().engine and DraftConfig().engine.max_rows >= MAX_ROWS_PER_TREE
