"""Builds the native modules of pyfast; everything else about the package is in pyproject.toml.

pyfast._C      CPU kernels and their op registrations; LibTorch stable ABI and abi3, so that one build serves
               every torch >= 2.11 and every Python >= 3.10
pyfast._host   the same kernels for NumPy, without torch (pybind11, hence one build a Python version)
pyfast._cuda   CUDA kernels; stable ABI and abi3; imported only where torch has CUDA

Environment
    PYFAST_CUDA=1           build pyfast._cuda or fail; 0 leaves it out; unset builds it where nvcc and a CUDA
                            build of torch are there
    TORCH_CUDA_ARCH_LIST    the architectures, e.g. "9.0"; default: all that DEFAULT_CUDA_ARCHS names
    PYFAST_NATIVE=0         no native module at all: the plain-torch reference serves
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000"  # 2.11
DEFAULT_CUDA_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "pyfast" / "_version.py").read_text())[1]
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12's own intrinsics warn
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", *WARNINGS]
ABI3_MACROS = [("Py_LIMITED_API", "0x030a0000"), ("TORCH_TARGET_VERSION", TORCH_TARGET)]


def sources(*patterns: str) -> list[str]:
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [str(path.relative_to(ROOT)) for path in found]


def cpu_extensions() -> list:
    import pybind11

    variants = ("serial", "avx2", "avx512*")
    kernels = sources("csrc/cpu/isa.cpp", "csrc/cpu/tables.cpp", *(f"csrc/cpu/*_{isa}.cpp" for isa in variants))
    torch_side = [path for path in sources("csrc/cpu/*.cpp") if path not in kernels]
    headers = sources("csrc/cpu/*.h")
    version = ("PYFAST_VERSION", f'"{VERSION}"')
    return [
        CppExtension(
            "pyfast._C",
            ["csrc/library.cpp", *torch_side, *kernels],
            define_macros=[*ABI3_MACROS, version],
            depends=headers,
            extra_compile_args=CXX_FLAGS,
            py_limited_api=True,
        ),
        CppExtension(
            "pyfast._host",
            ["csrc/host.cpp", *kernels],
            include_dirs=[pybind11.get_include()],
            depends=headers,
            extra_compile_args=CXX_FLAGS,
        ),
    ]


def setup_arguments() -> dict:
    if os.environ.get("PYFAST_NATIVE") == "0":
        return {}
    return {"ext_modules": cpu_extensions(), "cmdclass": {"build_ext": BuildExtension}}


setup(options={"bdist_wheel": {"py_limited_api": "cp310"}}, **setup_arguments())
