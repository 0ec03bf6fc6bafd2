"""Which precisions are served where, and that a server with other bits is another model."""

import pytest
import torch

from specedge.cli import DEMO
from specedge.engine.runner import DeviceError, choose
from specedge.engine.weights import fingerprint


def test_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert choose("cpu", None) == (cpu, torch.float32, None)
    assert choose("cpu", "int8") == (cpu, torch.bfloat16, 8) and choose("cpu", "int4") == (cpu, torch.bfloat16, 4)
    for name in ("int2", "float16"):
        with pytest.raises(DeviceError, match=name):
            choose("cpu", name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("cuda:1", "cuda:x", "mps"):
        with pytest.raises(DeviceError, match=f"{name}.*use cpu or cuda, and CUDA_VISIBLE_DEVICES"):
            choose(name, None)
    assert choose(None, None) == (torch.device("cuda"), torch.bfloat16, None)
    with pytest.raises(DeviceError, match="int8 weights are served on a CPU only: use --device cpu, or bfloat16"):
        choose(None, "int8")


def test_fingerprints_differ_by_precision() -> None:
    found = {fingerprint(DEMO / "target", torch.bfloat16, bits) for bits in (None, 8, 4)}
    assert len(found | {fingerprint(DEMO / "target", torch.float32, None)}) == 4
