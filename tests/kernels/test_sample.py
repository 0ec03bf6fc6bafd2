"""philox, gumbel, sample: known answers, exact noise, exact argmax."""

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from specedge import kernels
from specedge.kernels import reference


def philox_words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in plain integers, for any counter."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = p1 >> 32 ^ x1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ x3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x0, x1, x2, x3


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    """Random123's vectors hold for the plain form above, and the reference equals that form wherever it reaches (words 2, 3 zero)."""
    numbers = [tuple(int(w, 16) for w in text.split()) for text in (counter, key, answer)]
    assert philox_words(numbers[0], numbers[1]) == numbers[2]  # type: ignore[arg-type]
    c, p, (k0, k1) = numbers[0][0], numbers[0][1], numbers[1]
    words = reference.philox(k1 << 32 | k0, torch.tensor([c]), p)
    assert tuple(words[0].tolist()) == philox_words((c, p, 0, 0), (k0, k1))


def noise(word: int) -> float:
    """The formula in 200 bits, rounded to float64 and once more to float32."""
    with mpmath.workprec(200):
        e = min((mpmath.mpf(word) + 0.5) / 2**32, 1 - mpmath.mpf(2) ** -24)
        return float(np.float32(float(-mpmath.log(-mpmath.log1p(-e)))))


def test_gumbel_is_the_formula() -> None:
    for seed, position in ((0, 0), (2**64 - 1, 2**31 - 1), (12345678901234567890, 77)):
        g = kernels.gumbel(seed, position, 515)
        for v in range(515):
            word = philox_words((v >> 2, position, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[v & 3]
            assert g[v].item() == noise(word)


@pytest.mark.parametrize(
    ("position", "token", "word"),
    [(3941, 11941, 2**32 - 6), (791, 3574, 2**32 - 7), (2947, 59987, 2**32 - 124), (1464, 122659, 15), (2068, 56876, 29)],
)
def test_gumbel_at_the_ends(position: int, token: int, word: int) -> None:
    """Words so large that e is held at 1 - 2^-24 (in float32 they would give infinity), and so small that 1 - e is nearly 1."""
    assert philox_words((token >> 2, position, 0, 0), (2024, 0))[token & 3] == word
    g = kernels.gumbel(2024, position, token + 1)
    assert g[token].item() == noise(word)
    assert g.isfinite().all() and (noise(word) == noise(2**32 - 1)) == (word > 2**31)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (2**64 - 1, 2**32 - 1), (2**63, 4096)])
def test_gumbel_is_the_reference(cpp: Any, seed: int, position: int) -> None:
    assert torch.equal(kernels.gumbel(seed, position, 1_000_001), reference.gumbel(seed, position, 1_000_001))


def test_gumbel_of_a_token_does_not_depend_on_the_vocabulary() -> None:
    whole = kernels.gumbel(9, 9, 1000)
    for vocab in (0, 1, 3, 63, 64, 65, 999):
        assert torch.equal(kernels.gumbel(9, 9, vocab), whole[:vocab])


def test_gumbel_is_gumbel() -> None:
    g = kernels.gumbel(1, 1, 1_000_000).double()
    assert abs(g.mean() - 0.5772157) < 0.005 and abs(g.var() - math.pi**2 / 6) < 0.02


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 63, 64, 65, 1000, 32003])
def test_sample_is_the_reference(vocab: int) -> None:
    gen = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(65, vocab, generator=gen) * 4).bfloat16().float()  # coarse: ties
    logits[:, ::3] = float("-inf")
    g = torch.randn(7, vocab, generator=gen).bfloat16().float()
    row = torch.randint(-1, 7, (65,), generator=gen).int()
    inverse = (1 / (torch.rand(65, generator=gen).double() + 0.3)).float()
    for limit in {1, (vocab + 1) // 2, vocab}:
        assert torch.equal(kernels.sample(logits, g, row, inverse, limit), reference.sample(logits, g, row, inverse, limit))


def test_sample_breaks_ties_by_id() -> None:
    for first in range(70):
        logits = torch.zeros(1, 70)
        logits[0, first:] = 5
        logits[0, 69] = 5
        row = torch.tensor([-1], dtype=torch.int32)
        assert kernels.sample(logits, torch.zeros(0, 70), row, torch.ones(1), 70).item() == first
    assert kernels.sample(torch.full((1, 40), float("-inf")), torch.zeros(0, 40), row, torch.ones(1), 40).item() == 0


def test_sample_rounds_the_product() -> None:
    """Every sum is exactly zero, so id 0 wins; with a fused multiply-add the rounding error of the product would be left."""
    gen = torch.Generator().manual_seed(1)
    logits = torch.randn(4096, 37, generator=gen)
    inverse = torch.rand(4096, generator=gen) + 0.5
    g = -(logits * inverse[:, None])
    assert not kernels.sample(logits, g, torch.arange(4096, dtype=torch.int32), inverse, 37).any()


def test_sample_twin(cpp: Any) -> None:
    gen = torch.Generator().manual_seed(2)
    logits, g = torch.randn(20, 999, generator=gen), torch.randn(20, 999, generator=gen)
    row, inverse = torch.arange(-1, 19, dtype=torch.int32), torch.rand(20, generator=gen) + 0.5
    assert torch.equal(cpp.sample(logits, g, row, inverse, 991), cpp.sample(logits, g, row, inverse, 991, scalar=True))


def test_bad_arguments_are_refused(cpp: Any) -> None:
    logits, g, row, one = torch.zeros(2, 8), torch.zeros(1, 8), torch.zeros(2, dtype=torch.int32), torch.ones(2)
    for args, match in (
        ((logits, g, row + 1, one, 8), "noise_row"),
        ((logits, g, row, one, 9), "limit"),
        ((logits.T, g, row, one, 2), "contiguous"),
        ((logits.double(), g, row, one, 8), "Float"),
        ((logits, g[:, :4].contiguous(), row, one, 8), "noise"),
    ):
        with pytest.raises(RuntimeError, match=match):
            kernels.sample(*args)
