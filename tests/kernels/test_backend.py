"""Which ops run: the library that was built, if this processor can run it; else torch, with one sentence."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specedge import kernels

ROOT = Path(kernels.__file__).parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def python(code: str, **env: str) -> str:
    """What a fresh interpreter prints, errors included."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_backend_names_what_runs() -> None:
    assert kernels.backend() in ("cpp amx", "cpp avx512", "cpp avx2", "cpp scalar", "torch")
    assert kernels.backend("cuda") in ("triton, cuda", "triton") and kernels.backend("meta") == "torch"


def test_without_triton_the_gpu_runs_torch_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("triton_pointwise", "triton_rows"):
        monkeypatch.delattr(kernels, name, raising=False)
        monkeypatch.delitem(sys.modules, f"specedge.kernels.{name}", raising=False)
    with pytest.warns(UserWarning, match="plain torch ops.*pip install triton"):
        assert kernels._gpu(tmp_path).name == "torch"


def test_nothing_built_is_silent(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert kernels._cpp(tmp_path).name == "torch"
    assert not recwarn.list


def test_a_library_that_does_not_load_says_so(tmp_path: Path) -> None:
    path = tmp_path / f"_C_scalar{SUFFIX}"
    path.write_bytes(b"no library")
    with pytest.warns(UserWarning, match=f"{path.name} does not load here .*rebuild it: python setup.py") as seen:
        assert kernels._cpp(tmp_path).name == "torch"
    assert len(seen) == 1


def test_a_library_of_older_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loads and lacks an op."""
    (tmp_path / f"_C_scalar{SUFFIX}").write_bytes(b"")
    monkeypatch.setattr(torch.ops, "load_library", lambda _: None)
    monkeypatch.setattr(torch.ops, "specedge", SimpleNamespace(rms_norm=SimpleNamespace(default=None)))
    with pytest.warns(UserWarning, match="does not load here .*no attribute.*rebuild it: python setup.py"):
        assert kernels._cpp(tmp_path).name == "torch"


def test_a_cuda_library_that_does_not_load_says_so(tmp_path: Path) -> None:
    (tmp_path / "_C_cuda.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match="_C_cuda.so does not load here .*rebuild it: python setup.py"):
        assert kernels._gpu(tmp_path).name == "triton"


def test_a_library_for_a_larger_processor_is_not_touched(tmp_path: Path) -> None:
    """Loading it might already end in SIGILL: a static initialiser is code, too."""
    (tmp_path / f"_C_avx512{SUFFIX}").write_bytes(b"no library")
    code = f"import pathlib; from specedge import kernels; print('got', kernels._cpp(pathlib.Path({str(tmp_path)!r})).name)"
    out = python(code, ATEN_CPU_CAPABILITY="default")
    assert f"{tmp_path}/_C_avx512{SUFFIX} does not load here (this processor offers DEFAULT)" in out and "got torch" in out


def test_importing_prints_nothing_and_loads_one_openmp(cpp: Any) -> None:
    code = (
        "import torch; from specedge import kernels; torch.set_num_threads(2); kernels.gumbel(1, 1, 200000);"
        "libs = {l.split()[-1] for l in open('/proc/self/maps') if '_C_' in l or 'omp' in l.rsplit('/', 1)[-1]}; print(len(libs), libs)"
    )
    out = python(code)
    assert out.startswith("2 ") and out.count("\n") == 1, out
