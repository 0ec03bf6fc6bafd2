"""The build: a machine without a compiler gets the package all the same, and a sentence about what follows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/c++"])
def test_without_a_compiler_the_build_succeeds_and_says_what_follows(compiler: str, tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cuda"))  # whose build is another, and long
    (tmp_path / "specedge").mkdir()
    (tmp_path / "specedge" / "__init__.py").touch()
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, "CC": compiler, "CXX": compiler}
    done = subprocess.run(build, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("WARNING: specedge: ")]
    assert done.returncode == 0, done.stderr
    assert len(said) == 1 + (torch.version.cuda is not None), done.stderr  # beside a torch for CUDA one more, of the CUDA ops
    assert said[-1].startswith("WARNING: specedge: C++ ops not built, the slower torch path will be used: ") and len(said[-1]) > 90
    assert not list(tmp_path.rglob("*.so"))
