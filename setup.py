"""Builds specedge._C_<isa>, the C++ ops: a plain shared library without a Python module, loaded by specedge/kernels/__init__.py.

The metadata is in pyproject.toml. Invariant: whatever is missing or fails, the package installs; one line then says that the ops run in
torch. The instruction set is a named level and not -march=native, and it is part of the file's name, so that the loader can tell before it
loads a library whether this processor can run it (native code would also use extensions that no level promises). Builds for several
levels live side by side; `ATEN_CPU_CAPABILITY=avx2 python setup.py build_ext --inplace` makes, and the same variable selects, a lower one.
Beside a torch for CUDA it also builds specedge/_C_cuda.so, the CUDA ops, which need no torch, with nvcc.
"""

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
except ImportError as error:
    torch, why = None, error

LEVELS = {
    "AMX": ("amx", ["-march=x86-64-v4", "-mamx-tile", "-mamx-bf16", "-mamx-int8"]),
    "AVX512": ("avx512", ["-march=x86-64-v4"]),
    "AVX2": ("avx2", ["-march=x86-64-v3"]),
}


def warn(reason: object) -> None:
    """One line, whatever the reason is made of."""
    print(f"WARNING: specedge: C++ ops not built, the slower torch path will be used: {' '.join(str(reason).split())}", file=sys.stderr)


def cuda(path: Path) -> None:
    """Build the CUDA ops: code for sm_80, which sm_86 and sm_89 run, and for sm_90, which later ones translate."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(CUDA_HOME or "/usr/local/cuda") / "bin"))
    if nvcc is None:
        return warn("nvcc is neither on the PATH nor in CUDA_HOME, so sampling on a GPU runs in torch")
    targets = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-std=c++20", "-O3", "-shared", "-Xcompiler=-fPIC", *targets, *sorted(glob.glob("csrc/cuda/*.cu")), "-o", str(path)]
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        warn(error)


def ops() -> dict[str, Any]:
    """The arguments of setup() that build the library, none without torch."""
    if torch is None:
        warn(f"{why}. With torch installed, `pip install --no-build-isolation` builds them")
        return {}

    class Build(BuildExtension):  # type: ignore[misc]
        """Builds what it can."""

        def run(self) -> None:
            if torch.version.cuda is not None:  # first: a build that is cut short on a machine with a GPU should have what the GPU needs
                cuda(Path("." if self.inplace else self.build_lib) / "specedge" / "_C_cuda.so")
            try:
                super().run()
            except Exception as error:
                self.extensions.clear()  # nobody shall look for what is not there
                warn(error)

    tiles = "ATEN_CPU_CAPABILITY" not in os.environ and torch.cpu._init_amx()  # as in specedge/kernels/__init__.py
    isa, march = LEVELS.get("AMX" if tiles else torch.backends.cpu.get_cpu_capability(), ("scalar", []))
    # -fopenmp when compiling and not when linking: the symbols resolve to the runtime that torch has loaded, and there is no second one.
    # Equal bits rest on -ffp-contract=off; the two options after it change no value, without them GCC does not vectorise gumbel.
    flags = ["-O3", *march, "-mtune=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    flags += ["-fvisibility=hidden", "-g0", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 warns of its own headers
    sources = ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    depends = glob.glob("csrc/cpu/*.h")
    library = CppExtension(f"specedge._C_{isa}", sources, depends=depends, extra_compile_args=flags, extra_link_args=["-s"])
    return {"ext_modules": [library], "cmdclass": {"build_ext": Build}}


setup(**ops())
