"""Fixtures of the kernel tests: the C++ ops, or a skip with the remedy."""

from typing import Any

import pytest
import torch

from specedge import kernels


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
