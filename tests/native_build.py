"""setup.py as a module, pyfast._cuda as it builds it, and what a library needs of others."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
CUDA_TARGETS = ("80", "90", "120")
# The whole of what a limited-API module may need of Python under a private name: what its macros expand to.
STABLE_PRIVATE = {
    "_PyArg_ParseTuple_SizeT",
    "_Py_BuildValue_SizeT",
    "_Py_Dealloc",
    "_Py_FalseStruct",
    "_Py_NoneStruct",
    "_Py_TrueStruct",
}


def load_setup(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The folder's setup.py without its call of setup(), and without what steers it in the environment; the folder is
    the current one from now on."""
    for name in ("PYFAST_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYFAST_NATIVE", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.chdir(folder)
    spec = importlib.util.spec_from_file_location("pyfast_setup", folder / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class CudaModule:
    library: Path
    objects: Path  # the folder of one .o a source

    def object_of(self, op: str) -> Path:
        return self.objects / f"{op}.o"


def build_cuda(folder: Path, monkeypatch: pytest.MonkeyPatch) -> CudaModule:
    """The module in ``folder``, for CUDA_TARGETS; warnings are errors, and so are spills. Skips where there is no
    nvcc."""
    setup_py = load_setup(ROOT, monkeypatch)
    if setup_py.find_cuda_home() is None:
        pytest.skip("no nvcc")
    monkeypatch.setenv("PYFAST_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " ".join(f"{target[:-1]}.{target[-1]}" for target in CUDA_TARGETS))
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xptxas --warn-on-spills,-Werror")
    options = {"name": "pyfast-kernels", "ext_modules": setup_py.cuda_extensions()}
    command = setup_py.BuildNative(setuptools.Distribution(options))
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    command.run()
    (library,) = (folder / "lib").rglob("*.so")
    return CudaModule(library, folder / "temp" / "cuda")


def needed(library: Path) -> set[str]:
    """Symbols that a library needs and that are not of glibc, libstdc++ or libgcc, whose symbols carry a version but
    for the string streams that libtorch exports again."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    command = ["nm", "-D", "--undefined-only", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in listed.splitlines()]
    versioned = [symbol for _, symbol in lines if "@" in symbol]
    assert versioned and all(re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", symbol) for symbol in versioned)
    again = re.compile(r"_ZN[KRO]*St7__cxx11\d+basic_(o?stringstream|stringbuf)IcSt11char_traitsIcESaIcEE")
    return {symbol for kind, symbol in lines if "@" not in symbol and kind != "w" and not again.match(symbol)}


def outside_the_stable_abi(symbols: set[str]) -> set[str]:
    torch_side = {symbol for symbol in symbols if re.fullmatch(r"(aoti_torch|torch)_[a-z0-9_]+", symbol)}
    assert "aoti_torch_library_init_impl" in torch_side
    python_side = {symbol for symbol in symbols if re.fullmatch(r"Py[A-Z]\w+|Py_\w+", symbol)}
    return symbols - torch_side - python_side - STABLE_PRIVATE
