"""Stop strings beside min_tokens: against a slow reading of the rule, and the same on every path."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.engine import Engine
from specedge.engine.request import Completion, Output
from specedge.engine.speculative import SpeculativeEngine
from specedge.net.edge import Edge
from specedge.net.server import Server
from specedge.text import Tokenizer
from tests.helpers import byte_tokenizer, check_empty, random_model

TOKENIZER = Tokenizer(byte_tokenizer())


def slow(text: str, stop: tuple[str, ...], least: int) -> tuple[int, str] | None:
    """How many tokens, of one character each, the text has when a stop string ends it, and what is left of it: the first token behind `least` that
    completes one; of several the one that begins first."""
    for n in range(least + 1, len(text) + 1):
        found = [n - len(s) for s in stop if text[:n].endswith(s)]
        if found:
            return n, text[: min(found)]
    return None


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_the_rule(data: st.DataObject) -> None:
    """However tokens are grouped; what was shown is never taken back."""
    text = data.draw(st.text("ab", min_size=1, max_size=14))
    stop = tuple(data.draw(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)))
    least = data.draw(st.integers(0, len(text)))
    ids, shown = TOKENIZER.encode(text), ""
    assert len(ids) == len(text)
    output = Output(TOKENIZER, 1, SamplingParams(max_tokens=len(text), seed=1, stop=stop, min_tokens=least))
    while output.completion is None:
        n = data.draw(st.integers(1, len(ids)))
        group, ids = ids[:n], ids[n:]
        shown += output.add(group, "" if ids else "length").text
        assert text.startswith(shown)
    want = slow(text, stop, least)
    found = output.completion
    assert (len(found.token_ids), found.text, found.finish_reason) == ((*want, "stop") if want else (len(text), text, "length"))
    assert shown == found.text


@pytest.mark.parametrize(
    ("least", "tokens", "text"),
    [(0, 2, ""), (1, 2, ""), (2, 4, "ab"), (3, 4, "ab"), (4, 6, "abab"), (5, 6, "abab"), (6, 7, "ababab!")],
)  # fmt: skip
def test_the_border(least: int, tokens: int, text: str) -> None:
    """Token min_tokens + 1 is the first that may complete a stop string, which may begin before it; earlier ones are never looked for again."""
    output = Output(TOKENIZER, 1, SamplingParams(max_tokens=7, seed=1, stop=("ab",), min_tokens=least))
    output.add(TOKENIZER.encode("ababab!"), "length")
    assert output.completion is not None and (len(output.completion.token_ids), output.completion.text) == (tokens, text)


def test_plain_is_speculative_is_over_the_wire(tmp_path: Path) -> None:
    """Stop strings of what the target writes of itself, with every min_tokens about the place where they end."""
    random_model(tmp_path, 1, byte_tokenizer(), vocab_size=257)
    config, sizes = DraftConfig(engine=EngineConfig(kv_tokens=8192, max_rows=256)), EngineConfig(kv_tokens=1024)
    with Engine.from_pretrained(tmp_path, device="cpu", sizes=sizes) as e, SpeculativeEngine(e, tmp_path, config, device="cpu") as both:
        cases, plain = list[SamplingParams](), list[Completion]()
        for seed in range(3):
            free = SamplingParams(1.0, 40, seed=seed, ignore_eos=True)
            whole = e.generate("ab", free)[0]
            at = next(i for i in range(5, 30) if whole.text[i : i + 2].isascii())
            stop = (whole.text[at : at + 2], "never there")
            (end,) = (len(c.token_ids) for c in e.generate("ab", SamplingParams(1.0, 40, seed=seed, ignore_eos=True, stop=stop)))
            for least in (0, end - 1, end, end + 1, 40):
                cases.append(SamplingParams(1.0, 40, seed=seed, ignore_eos=True, stop=stop, min_tokens=least))
                plain += e.generate("ab", cases[-1])
                assert plain[-1].token_ids == whole.token_ids[: len(plain[-1].token_ids)]
                assert (len(plain[-1].token_ids) == end) if least < end else len(plain[-1].token_ids) > least or least == 40
            assert plain[-1].text == whole.text and plain[-1].finish_reason == "length", "where min_tokens is max_tokens nothing ends it"
        for params, want in zip(cases, plain, strict=True):
            assert what(both.generate("ab", params)[0]) == what(want)
        check_empty(e)
        with Server(e) as server, Edge(server.address, tmp_path, config=config, device="cpu") as edge:
            for params, want in zip(cases, plain, strict=True):
                assert what(edge.generate("ab", params)[0]) == what(want)


def what(c: Completion) -> tuple[list[int], str, str]:
    return c.token_ids, c.text, c.finish_reason
