"""Fixtures of the kernel tests: the C++ ops, or a skip with the remedy; the Triton ops, on a GPU if there is one, else in Triton's interpreter."""

import os
from typing import Any

import pytest
import torch

from specedge import kernels
from tests.kernels.interpret import mended

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and again when a kernel is defined


@pytest.fixture
def cpp() -> Any:
    """The namespace of the C++ ops; they take `scalar=True` for the plain twin of a kernel."""
    if kernels.backend() == "torch":
        pytest.skip("the C++ ops are not built: python setup.py build_ext --inplace")
    return torch.ops.specedge


@pytest.fixture(autouse=True)
def threads() -> Any:
    """One thread, unless the test says more: other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where Triton ops run: the GPU, or the CPU in the interpreter."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed: pip install triton")
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", mended(interpreter))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
