"""Builds the native modules of pyfast; everything else about the package is in pyproject.toml.

pyfast._C      CPU kernels and their op registrations; LibTorch stable ABI and abi3, so that the module serves every
               torch >= 2.11 and every Python >= 3.10
pyfast._host   the same kernels for NumPy, without torch (pybind11, hence one build a Python version)
pyfast._cuda   CUDA kernels; stable ABI and abi3; imported only where torch has CUDA

Environment
    PYFAST_CUDA=1           build pyfast._cuda or fail; 0 leaves it out; unset builds it where nvcc and a CUDA build
                            of torch are there. With 1 a CPU build of torch is enough to compile and link.
    MAX_JOBS                how many compilers run at once; default: one a CPU
    TORCH_CUDA_ARCH_LIST    the architectures, such as "9.0" or "8.0;9.0+PTX"; default: DEFAULT_CUDA_ARCHS
    PYFAST_NATIVE=0         no native module at all: the plain-torch reference serves
    PYFAST_SANITIZE=1       CPU modules with the address and undefined-behaviour sanitizers (`make sanitize`)
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.modified import newer_group
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000"  # 2.11
DEFAULT_CUDA_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "pyfast" / "_version.py").read_text())[1]
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12's own intrinsics warn
# -g0: Python's own flags ask for debug information, which would be most of a module's bytes
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", *WARNINGS]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
if os.environ.get("PYFAST_SANITIZE") == "1":
    CXX_FLAGS += SANITIZE
ABI3_MACROS = [("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", TORCH_TARGET)]


def sources(*patterns: str) -> list[str]:
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [str(path.relative_to(ROOT)) for path in found]


def cpu_kernels() -> list[str]:
    variants = ("serial", "avx2", "avx512*")
    return sources("csrc/cpu/isa.cpp", "csrc/cpu/tables.cpp", *(f"csrc/cpu/*_{isa}.cpp" for isa in variants))


def cpu_extensions() -> list[Extension]:
    import pybind11

    kernels = cpu_kernels()
    torch_side = [path for path in sources("csrc/cpu/*.cpp") if path not in kernels]
    headers = sources("csrc/*.h", "csrc/cpu/*.h")
    return [
        CppExtension(
            "pyfast._C",
            ["csrc/library.cpp", *torch_side, *kernels],
            define_macros=[*ABI3_MACROS, ("PYFAST_VERSION", f'"{VERSION}"')],
            depends=headers,
            extra_compile_args=CXX_FLAGS,
            extra_link_args=[flag for flag in CXX_FLAGS if flag.startswith("-fsanitize")],
            py_limited_api=True,
        ),
        Extension(
            "pyfast._host",
            ["csrc/host.cpp", *kernels],
            include_dirs=[pybind11.get_include()],
            depends=headers,
            extra_compile_args=CXX_FLAGS,
            extra_link_args=[flag for flag in CXX_FLAGS if flag.startswith("-fsanitize")],
            language="c++",
        ),
    ]


def find_cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME where it is set, else the one whose nvcc is on the PATH, else /usr/local/cuda."""
    on_path = shutil.which("nvcc")
    candidates = [on_path and Path(on_path).resolve().parents[1], "/usr/local/cuda"]
    if "CUDA_HOME" in os.environ:
        candidates = [os.environ["CUDA_HOME"]]
    needed = ("bin/nvcc", "include/cuda_runtime_api.h")
    homes = [Path(candidate) for candidate in candidates if candidate]
    return next((home for home in homes if all((home / path).exists() for path in needed)), None)


def cuda_extensions() -> list[Extension]:
    wanted = os.environ.get("PYFAST_CUDA")
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"PYFAST_CUDA: got {wanted!r}, accepted: 0 or 1")
    if wanted == "0" or (wanted is None and torch.version.cuda is None):
        return []
    if find_cuda_home() is None:
        if wanted == "1":
            raise SystemExit("PYFAST_CUDA=1, but there is no nvcc: set CUDA_HOME or put it on the PATH")
        return []
    gencode_flags(cuda_archs())  # a wrong list is refused before anything is compiled
    files = ["csrc/cuda/module.cpp", *sources("csrc/cuda/*.cu")]
    headers = sources("csrc/*.h", "csrc/cuda/*.cuh", "csrc/cuda/*.h")
    return [Extension("pyfast._cuda", files, depends=headers, py_limited_api=True)]


def cuda_archs() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS


def gencode_flags(arch_list: str) -> list[str]:
    """nvcc flags for a list such as "8.0 9.0a;12.0+PTX"."""
    flags = []
    for arch in arch_list.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {arch!r}, accepted: numbers such as 9.0, 9.0a, 12.0+PTX")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildNative(BuildExtension):
    """BuildExtension for the CPU modules; pyfast._cuda by nvcc and the linker directly, because BuildExtension takes
    CUDA sources only with a CUDA build of torch."""

    def build_extensions(self) -> None:
        every = self.extensions
        self.extensions = [extension for extension in every if extension.name != "pyfast._cuda"]
        super().build_extensions()
        self.extensions = every
        for extension in every:
            if extension.name == "pyfast._cuda":
                self.build_cuda(extension)

    def build_extension(self, extension: Extension) -> None:
        """pyfast._host takes the kernels' objects that pyfast._C, which is built before, was linked from; one that is
        older than its source or a header, as where that module was up to date, is compiled again."""
        if extension.name == "pyfast._host":
            compiled = {source: str(Path(self.build_temp, source).with_suffix(".o")) for source in cpu_kernels()}
            made = {s: target for s, target in compiled.items() if not newer_group([s, *extension.depends], target)}
            extension.sources = [source for source in extension.sources if source not in made]
            extension.extra_objects = list(made.values())
        super().build_extension(extension)

    def build_cuda(self, extension: Extension) -> None:
        home = find_cuda_home()
        archs = cuda_archs()
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        cuda_include, python_include = f"{home}/include", sysconfig.get_paths()["include"]
        isystem = [word for path in (*include_paths(), cuda_include, python_include) for word in ("-isystem", path)]
        macros = ["-DUSE_CUDA", *(f"-D{name}={value}" for name, value in ABI3_MACROS)]
        macros += [f'-DPYFAST_VERSION="{VERSION}"', f'-DPYFAST_CUDA_ARCHS="{archs}"']
        host_flags = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror"

        def compile_one(source: str) -> str:
            target = str(folder / (Path(source).stem + ".o"))
            if source.endswith(".cu"):
                command = [f"{home}/bin/nvcc", "-std=c++20", "-O3", *macros, *isystem, *gencode_flags(archs)]
                command += ["-Werror=all-warnings", f"-Xcompiler={host_flags}"]
            else:
                command = ["g++", "-std=c++20", "-O3", *macros, *isystem, *host_flags.split(",")]
            self.spawn([*command, "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))) as pool:
            objects = list(pool.map(compile_one, extension.sources))
        output = self.get_ext_fullpath(extension.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        # libtorch.so stands between: in a CUDA build of torch it brings in libtorch_cuda.so, whose one symbol (the
        # current stream) a CPU build of torch does not have.
        libraries = [
            "-Wl,--no-as-needed",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
            "-lcudart_static",
            "-lrt",
            "-lpthread",
            "-ldl",
        ]
        search = [f"-L{path}" for path in (*library_paths(), f"{home}/lib64")]
        self.spawn(["g++", "-shared", *objects, "-o", output, *search, *libraries])


def native() -> dict:
    if os.environ.get("PYFAST_NATIVE") == "0":
        return {}
    return {"ext_modules": [*cpu_extensions(), *cuda_extensions()], "cmdclass": {"build_ext": BuildNative}}


setup(**native())
