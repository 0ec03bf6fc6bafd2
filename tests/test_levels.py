"""What smaller machines run: the builds for AVX-512, AVX2 and no vectors, and plain torch, each with the tests that the best build passes.

A level is a copy of the package with one library, or none, that is tested in a process of its own; the environment tells torch, oneDNN and the
loader to use no more of the processor. Libraries are built once into build/levels. Without a compiler only torch is tested, and
a machine of a lower level tests those below it: its own is what every other test runs on.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specedge import kernels
from specedge.config import DraftConfig, EngineConfig, SamplingParams
from specedge.engine.speculative import SpeculativeEngine
from tests.engine.test_model import Text
from tests.helpers import check_empty, drafter, engine, random_model, runner

ROOT = Path(__file__).parents[1]
LEVELS = {  # name of the build -> what torch and oneDNN are told
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "scalar": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "torch": {},
}
BEST = kernels.backend().removeprefix("cpp ")
BELOW = list(LEVELS)[list(LEVELS).index(BEST) + 1 :] if BEST in LEVELS else list(LEVELS)
PATIENCE = 280.0
SHORT = [
    "tests/kernels",
    "tests/engine/test_model.py::test_one_row_is_tree_is_chunk_is_batch",
    "tests/test_levels.py::test_speculation_flips_near_ties_at_most",
]
LONG = ["tests/kernels", "tests/engine", "tests/test_lossless.py"]
ELSEWHERE = ["--ignore-glob=*test_triton*", "--ignore-glob=*test_cuda*"]  # a GPU's kernels, to which the level of the processor is nothing
LONG_IN_TORCH = ["tests/engine/test_model.py", "tests/engine/test_families.py", "tests/engine/test_hostile_models.py"]  # near ties may flip elsewhere


def library(level: str) -> Path:
    """The library of a level, built unless the sources are those of the last time."""
    sources = sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*.[ch]*")])
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + torch.__version__.encode()).hexdigest()[:16]
    home = ROOT / "build" / "levels" / f"{level}-{digest}"
    if not home.exists():
        work = home.with_suffix(f".{os.getpid()}")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(work / "lib"), "--build-temp", str(work / "objects")]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **LEVELS[level]}, capture_output=True, text=True, timeout=PATIENCE, check=False)
        if not list(work.glob("lib/specedge/_C_*")):
            pytest.skip(f"the {level} library cannot be built here: {(done.stdout + done.stderr)[-300:]}")
        work.rename(home)
    (found,) = home.glob("lib/specedge/_C_*")
    return found


def copy(level: str, path: Path) -> Path:
    """The package and its tests with the library of one level alone."""
    shutil.copytree(ROOT / "specedge", path / "specedge", ignore=shutil.ignore_patterns("_C_*", "__pycache__", "demo"))
    (path / "specedge" / "demo").symlink_to(ROOT / "specedge" / "demo")
    shutil.copytree(ROOT / "tests", path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", path)
    name = "torch"
    if level != "torch":
        name = f"cpp {level}"
        shutil.copy(library(level), path / "specedge")
    with (path / "tests" / "conftest.py").open("a") as f:
        f.write(f"\nfrom specedge import kernels  # noqa: E402\n\nassert kernels.backend() == {name!r}, kernels.backend()\n")
    return path


def outcome(level: str, path: Path, what: list[str], patience: float = PATIENCE) -> str:
    """The last lines of a test run over `what` at `level`."""
    environment = {**os.environ, **LEVELS[level], "PYTHONPATH": str(copy(level, path))}
    command = [sys.executable, "-m", "pytest", "-m", "not full and not gpu", "--tb=short", "--durations=3", *ELSEWHERE, *what]
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, timeout=patience, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout[-600:]


@pytest.mark.timeout(600)  # two or three minutes of it are the compiler's, once
@pytest.mark.parametrize("level", [pytest.param(level, marks=[pytest.mark.full] if level == "scalar" else []) for level in BELOW])
def test_a_level_passes_the_tests_of_the_kernels_and_of_the_model(level: str, tmp_path: Path) -> None:
    print(outcome(level, tmp_path, SHORT))


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("level", BELOW)
def test_a_level_passes_the_tests_of_the_engine(level: str, tmp_path: Path) -> None:
    print(outcome(level, tmp_path, LONG_IN_TORCH if level == "torch" else LONG, 900.0))


NEAR = 1e-4  # of a score; measured in torch: a logit (spread 3) differs by up to 1.7e-5 between chunks, so two scores at T = 0.8 by 4e-5


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_flips_near_ties_at_most(temperature: float, tmp_path: Path) -> None:
    """What plain torch promises: ids with and without a draft are the same up to a near tie. The C++ ops promise that there is no such end."""
    target, draft = random_model(tmp_path / "target", 1), random_model(tmp_path / "draft", 2)
    params = SamplingParams(temperature, 60, seed=6)
    prompts = [[(7 * i + j * j) % 105 for j in range(3 + 11 * i)] for i in range(6)]
    plain = [engine(target).generate([p], params)[0].token_ids for p in prompts]
    for path in (target, draft):
        config = DraftConfig(tree_size=31, engine=EngineConfig(kv_tokens=8192, max_rows=256))
        both = SpeculativeEngine(engine(target, page_size=16, max_rows=100), drafter(path, config))
        for prompt, want, done in zip(prompts, plain, both.generate(prompts, params), strict=True):
            same = next((i for i, (a, b) in enumerate(zip(want, done.token_ids, strict=True)) if a != b), len(want))
            if same < len(want):
                assert kernels.backend() == "torch", "equal by construction"
                assert margin(target, prompt + want[:same], params) < NEAR
        check_empty(both.engine)


def margin(path: Path, tokens: list[int], params: SamplingParams) -> float:
    """By how much the best token behind `tokens` wins."""
    logits = Text(runner(path), tokens).run(len(tokens))[-1]
    if not params.greedy:
        logits = logits / params.temperature + kernels.gumbel(params.seed or 0, len(tokens), len(logits))
    first, second = logits.topk(2).values.tolist()
    return float(first - second)
