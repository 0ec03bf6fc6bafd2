"""The decoder against transformers, the outside law, and against itself: a row's bits do not depend on what it is batched with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specedge import kernels
from specedge.engine.runner import Runner
from specedge.tree import TokenTree, make_tree
from tests.helpers import TINY, random_model, runner

SHAPES = {
    "tiny": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 6, "head_dim": 16},
    "mqa": {"hidden_size": 56, "num_key_value_heads": 1, "num_attention_heads": 7, "head_dim": 32, "intermediate_size": 172},
    "wide": {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4, "vocab_size": 512, "rope_theta": 500000.0},
    "deep": {"num_hidden_layers": 5, "head_dim": 128, "num_attention_heads": 3, "num_key_value_heads": 3},
}


class Text:
    """One sequence over a runner's pages, driven by hand. Pages are taken in falling order, so that their numbers are not their places."""

    def __init__(self, r: Runner, tokens: list[int]) -> None:
        self.runner, self.tokens, self.computed = r, tokens, 0
        self.size = r.sizes.page_size
        self.pages = list(range(r.sizes.pages))[::-1]

    def add(self, batch: object, n: int, tree: TokenTree | None = None, first: int | None = None) -> None:
        """The next n tokens, and a tree below the last of them."""
        chain = self.tokens[self.computed : self.computed + n]
        first = batch.rows if first is None else first  # type: ignore[attr-defined]
        root, nodes = self.computed + n - 1, len(tree) if tree is not None else 0
        positions = [*range(self.computed, root + 1)]
        anc = None
        if tree is not None:
            positions += (root + tree.depths()[1:]).tolist()
            below = (1 << n - 1) - 1
            anc = [(1 << i + 1) - 1 for i in range(n - 1)] + [below | a << n - 1 for a in tree.ancestors()]
            chain = chain + tree.tokens.tolist()
        rows = n + nodes
        batch.add(chain, positions, [*range(first, first + rows)], (first, rows), self.computed, self.pages, anc, [*range(rows)])  # type: ignore[attr-defined]

    def commit(self, n: int, first: int = 0) -> None:
        at = range(self.computed, self.computed + n)
        self.runner.commit([*range(first, first + n)], [self.pages[t // self.size] for t in at], [t % self.size for t in at])
        self.computed += n

    def run(self, chunk: int) -> torch.Tensor:
        """Logits of all tokens, `chunk` at a time."""
        found = []
        while self.computed < len(self.tokens):
            n = min(chunk, len(self.tokens) - self.computed)
            batch = self.runner.batch()
            self.add(batch, n)
            found.append(self.runner.run(batch).clone())
            self.commit(n)
        return torch.cat(found)


def assert_logits_equal(path: Path, theirs: torch.nn.Module) -> None:
    """The model at `path` has the logits of `theirs`, a transformers model: whole, chunked, on other pages, and as tree rows."""
    vocab, rng = theirs.config.vocab_size, np.random.default_rng(0)
    tokens = rng.integers(0, vocab, 150).tolist()
    with torch.inference_mode():
        want = theirs(torch.tensor([tokens])).logits[0]
    for chunk, page_size in ((150, 64), (1, 64), (7, 16), (64, 64)):
        got = Text(runner(path, page_size=page_size, kv_tokens=512), tokens).run(chunk)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    for page_size in (16, 64):  # the first pages are those of another sequence, as after a prefix-cache hit
        first = Text(runner(path, page_size=page_size, kv_tokens=512), tokens[:64])
        first.run(64)
        hit = Text(first.runner, tokens)
        hit.computed = 64
        torch.testing.assert_close(hit.run(50), want[64:], atol=1e-4, rtol=0)

    tree = make_tree(rng.integers(0, vocab, 40).tolist(), [int(rng.integers(max(0, i - 5), i + 1)) for i in range(40)])
    with torch.inference_mode():
        branches = [tokens + [int(tree.tokens[r - 1]) for r in tree.path(row)] for row in range(len(tree) + 1)]
        want = torch.stack([theirs(torch.tensor([branch])).logits[0, -1] for branch in branches])
    for page_size in (16, 64):
        text = Text(runner(path, page_size=page_size, kv_tokens=512), tokens)
        text.run(64)
        text.computed -= 1  # the last token is the root: its row comes again, the K/V in pages stays unread
        batch = text.runner.batch()
        text.add(batch, 1, tree)
        torch.testing.assert_close(text.runner.run(batch), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = random_model(tmp_path, 1, **SHAPES[shape])
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    assert_logits_equal(path, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", ["tiny", "mqa", "wide"])
def test_one_row_is_tree_is_chunk_is_batch(shape: str, dtype: str, tmp_path: Path) -> None:
    if kernels.backend() == "torch":
        pytest.skip("bits are promised by the C++ ops only")
    path = random_model(tmp_path, 2, **SHAPES[shape])
    vocab = {**TINY, **SHAPES[shape]}["vocab_size"]
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, vocab, 90).tolist()
    alone = Text(runner(path, dtype=dtype), tokens).run(1)
    for chunk, page_size in ((90, 64), (7, 16), (33, 64)):
        assert torch.equal(Text(runner(path, dtype=dtype, page_size=page_size), tokens).run(chunk), alone)

    # the last 30 tokens as the deepest branch of a tree with 60 other nodes, beside another sequence's chunk
    parents, drafted, at = [], [], 0
    for i, token in enumerate(tokens[60:], 1):
        parents += [at, int(rng.integers(0, len(parents) + 1)), int(rng.integers(0, len(parents) + 1))]
        drafted += [token, *rng.integers(0, vocab, 2).tolist()]
        at = 3 * i - 2
    r = runner(path, dtype=dtype)
    text = Text(r, tokens[:60])
    text.run(13)
    text.computed -= 1
    other = Text(r, rng.integers(0, vocab, 20).tolist())
    batch = r.batch()
    other.add(batch, 20)
    text.add(batch, 1, make_tree(drafted, parents))
    got = r.run(batch)[20:]
    branch = [0] + [3 * i - 2 for i in range(1, 31)]
    assert torch.equal(got[branch], alone[59:])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_splits_have_the_same_bits(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    if kernels.backend() == "torch":
        pytest.skip("bits are promised by the C++ ops only")
    path = tmp_path_factory.getbasetemp() / "splits"
    if not path.exists():
        random_model(path, 3)
    tokens = np.random.default_rng(2).integers(0, 105, 70).tolist()
    text = Text(runner(path, page_size=16), tokens)
    got = []
    while text.computed < 70:
        n = data.draw(st.integers(1, 70 - text.computed))
        batch = text.runner.batch()
        text.add(batch, n)
        got.append(text.runner.run(batch).clone())
        text.commit(n)
    assert torch.equal(torch.cat(got), Text(runner(path), tokens).run(70))
