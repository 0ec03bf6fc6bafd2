"""csrc/cuda: nvcc compiles it without a spill, and on a CPU, thread by thread, it gives the reference's bits.

There a kernel's launch becomes a call of emulate.h; the rest of the source is compiled as it is, and called as on a GPU.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from specedge.kernels import reference
from specedge.kernels.cuda_ops import CudaOps
from tests.kernels.test_truncate import arguments

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_nvcc_compiles_it(source: Path, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: install the CUDA toolkit")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "89", "90a")]
    command = ["nvcc", "-std=c++20", "-O3", "-Xptxas=-v", "-Werror=all-warnings", *targets, "-c", source, "-o", tmp_path / "object.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert len(spills) >= 2 * len(targets) and set(spills) == {"0"}, done.stderr


def emulate(folder: Path, threads: int = 0) -> CudaOps:
    """The ops for CPU tensors, built in `folder`; `threads` of a block of sample.cu in place of its own number."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH: install a C++ compiler")
    for source in SOURCES:
        launch, call = r"(\w+)<<<(.*?), (\w+), 0, stream>>>\((.*?)\);", r"emulate::launch(\2, \3, [&] { \1(\4); });"
        text = re.sub(launch, call, source.read_text(), flags=re.DOTALL)
        if threads:
            text = text.replace("THREADS = 512", f"THREADS = {threads}")
        (folder / f"{source.stem}.cpp").write_text(text)
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-include", Path(__file__).with_name("emulate.h")]
    subprocess.run([*command, *folder.glob("*.cpp"), "-o", folder / "cuda.so"], check=True)
    return CudaOps(folder / "cuda.so")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> CudaOps:
    """The ops, as they are."""
    return emulate(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("vocab", [1, 6, 5003])
def test_gumbel(emulated: CudaOps, vocab: int) -> None:
    for key in ((0, 0), (2**64 - 1, 2**32 - 1), (12345678901234567, 77)):
        assert torch.equal(emulated.gumbel(*key, vocab, torch.device("cpu")), reference.gumbel(*key, vocab))


@pytest.mark.parametrize("vocab", [1, 5, 513, 3000])
def test_sample(emulated: CudaOps, vocab: int) -> None:
    rng = torch.Generator().manual_seed(vocab)
    logits = torch.randn(12, vocab, generator=rng).mul(4).round()  # many ties
    noise = torch.randn(3, vocab, generator=rng)
    noise[1] = noise[1].round()
    noise_row, inv_t = torch.tensor([-1, 0, 1, 2] * 3, dtype=torch.int32), torch.rand(12, generator=rng) + 0.5
    inv_t[2::4] = 1
    for limit in {vocab, (vocab + 1) // 2}:
        assert torch.equal(emulated.sample(logits, noise, noise_row, inv_t, limit), reference.sample(logits, noise, noise_row, inv_t, limit))


@pytest.mark.parametrize("vocab", [1, 5, 300, pytest.param(5000, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["smooth", "ties", "wide"])
def test_truncate(emulated: CudaOps, vocab: int, kind: str) -> None:
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)) * (40 if kind == "wide" else 4)
    if kind == "ties":
        logits = logits.round()
    logits[0, vocab // 2] = float("-inf")
    for min_p, top_k, top_p in ((0.0, 0, 0.9), (0.05, 0, 1.0), (0.0, 40, 0.99), (0.001, 300, 0.9999), (0.0, 1, 1.0), (1.0, 0, 0.5), (0.0, 3, 1e-6)):
        for t, limit in ((0.3, vocab), (1.7, (vocab + 1) // 2)):
            a = arguments(4, min_p, top_k, top_p, t)
            assert torch.equal(emulated.truncate(logits.clone(), *a, limit), reference.truncate(logits, *a, limit)), (min_p, top_k, top_p, t, limit)


def test_padding_is_left_alone(emulated: CudaOps) -> None:
    """Rows of a bucket that nobody asked for: no filter, no edits, noise row -2, nothing to fill in."""
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    before, none, table = logits.clone(), torch.zeros(3, dtype=torch.int32), torch.full((2, 700), 7.0)
    emulated.adjust(logits, torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, 3), torch.zeros(1, 3, dtype=torch.int32), torch.ones(1), none)
    emulated.truncate(logits, torch.ones(3), torch.zeros(3).log(), none, torch.ones(3).double(), 600)
    emulated.fill_noise(table, torch.tensor([[1, 2, -1], [3, 4, -1]]))
    assert torch.equal(logits, before) and (table == 7).all()
    assert emulated.sample(logits, table, torch.tensor([-1, -2, -1], dtype=torch.int32), torch.ones(3), 600)[::2].tolist() == [
        int(logits[0, :600].argmax()), int(logits[2, :600].argmax())
    ]  # fmt: skip
