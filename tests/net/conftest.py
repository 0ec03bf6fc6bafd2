"""What most tests of the wire begin with: a model on disk, and an engine over it that no server has."""

from pathlib import Path

import pytest

from specedge.engine.engine import Engine
from tests.helpers import engine, random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("target"), seed=3)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Engine:
    return engine(model)
