"""Sampling parameters as they cross the wire: SamplingParams without what belongs to the text side, there and back.

Apart from wire.py, which knows no types but its own. Invariant: unpacking what was packed gives parameters that sample the same ids.
"""

import numpy as np

from specedge.config import SamplingParams
from specedge.net import wire


def pack_sampling(p: SamplingParams) -> wire.Sampling:
    """The fields of `p`, which has a seed, that the server needs."""
    assert p.seed is not None
    ids, values = zip(*p.logit_bias, strict=True) if p.logit_bias else ((), ())
    return wire.Sampling(
        float(p.temperature), p.seed, p.top_k, float(p.top_p), float(p.min_p), float(p.repetition_penalty), float(p.presence_penalty),
        float(p.frequency_penalty), p.min_tokens, wire.pack_ids(list(ids)), np.array(values, "<f8").tobytes(),
    )  # fmt: skip


def unpack_sampling(s: wire.Sampling, max_tokens: int) -> SamplingParams:
    """The parameters in a message; ValueError for those out of range."""
    ids = wire.unpack_ids(s.bias_ids).tolist()
    if len(s.bias_values) != 8 * len(ids):
        raise ValueError(f"logit_bias has {len(ids)} ids, but {len(s.bias_values)} bytes of values")
    return SamplingParams(
        s.temperature, max_tokens, s.seed, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, repetition_penalty=s.repetition_penalty,
        presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty, min_tokens=s.min_tokens,
        logit_bias=tuple(zip(ids, np.frombuffer(s.bias_values, "<f8").tolist(), strict=True)),
    )  # fmt: skip
