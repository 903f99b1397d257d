"""Compiles a driver beside this file together with the kernels of ``csrc/cuda`` and executes it on the host.

    library = build("sparse24_convert")
    out = Output((n, k), np.uint16)
    library.run("decompress_16", values, metadata, out, n, k)
    out.array

``run`` raises :class:`SimtError` with the kernel's line, block and thread where the kernel breaks a rule. README.md
says which rules there are and what they do not see.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
# The compiler reports every load and store; -O1 keeps them in the kernel's order.
INSTRUMENTED = ["-O1", "-fsanitize=thread", "-Wno-tsan"]
ORDERS = (0, 1, 2, 3)  # of lanes and blocks: ascending, descending, two shuffles

_folder = tempfile.TemporaryDirectory(prefix="simt-")


class SimtError(Exception):
    """A kernel broke a rule of the machine; the message says which, where, and by which thread."""


def aligned(shape: int | tuple[int, ...], dtype: object) -> np.ndarray:
    """An array of zeros at a multiple of 256 bytes, as torch allocates on a GPU."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape))
    room = np.zeros(size + 256, np.uint8)
    start = -room.ctypes.data % 256
    return room[start : start + size].view(dtype).reshape(shape)


class Input:
    """Memory that a kernel reads and must not write. A plain array given to ``run`` becomes one."""

    role = 0

    def __init__(self, array: np.ndarray) -> None:
        self.memory = aligned(array.shape, array.dtype)
        self.memory[...] = array


class InOut(Input):
    """Memory that holds something and may be written."""

    role = 2

    @property
    def array(self) -> np.ndarray:
        return self.memory


class Output:
    """Memory that holds nothing yet: reading a byte before it is written is an error."""

    role = 1

    def __init__(self, shape: int | tuple[int, ...], dtype: object) -> None:
        self.memory = aligned(shape, dtype)
        self.unwritten = self.memory.nbytes

    @property
    def array(self) -> np.ndarray:
        """What the kernel wrote; it must have written all of it."""
        assert self.unwritten == 0, f"{self.unwritten} of {self.memory.nbytes} bytes were not written"
        return self.memory


class Library:
    """A compiled driver."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls = ctypes.CDLL(str(path))
        self.calls.simt_error.restype = ctypes.c_char_p
        self.calls.simt_unwritten.restype = ctypes.c_size_t

    def run(self, function: str, *arguments: object, order: int = 0) -> None:
        """Calls the driver's function. Arrays go as pointers, integers as int64_t, floats as float, None as a null
        pointer. ``order`` is that of lanes and blocks, see ``ORDERS``."""
        given = [Input(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
        buffers = [argument for argument in given if isinstance(argument, Input | Output)]
        self.calls.simt_begin(ctypes.c_uint(order))
        for buffer in buffers:
            kind = type(buffer).__name__.lower()
            name = f"argument {given.index(buffer)} ({kind}, {buffer.memory.dtype} {list(buffer.memory.shape)})"
            memory = buffer.memory
            self.calls.simt_buffer(name.encode(), _pointer(memory), ctypes.c_size_t(memory.nbytes), buffer.role)
        getattr(self.calls, function)(*map(_pass, given))
        message = self.calls.simt_error().decode()
        if message:
            raise SimtError(self._with_lines(message))
        for buffer in buffers:
            if isinstance(buffer, Output):
                buffer.unwritten = self.calls.simt_unwritten(_pointer(buffer.memory))

    @contextmanager
    def off_by(self, *, rough: float = 0.0, bias: float = 0.0) -> Iterator[None]:
        """Meanwhile powers and logarithms are off by up to ``rough``, this way or that, reciprocals by half as much,
        and all logarithms by ``bias``; all relative, but logarithms near 0."""
        self.calls.simt_errors(ctypes.c_float(rough), ctypes.c_float(bias))
        try:
            yield
        finally:
            self.calls.simt_errors(ctypes.c_float(0.0), ctypes.c_float(0.0))

    def _with_lines(self, message: str) -> str:
        """Puts file and line where the message holds an address in the code."""

        def line(match: re.Match[str]) -> str:
            if shutil.which("addr2line") is None:
                return match[0]
            command = ["addr2line", "-e", str(self.path), match[1]]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            return Path(found.split(" ")[0].strip()).name

        return re.sub(r"\{\+(0x[0-9a-f]+)\}", line, message)


def _pointer(memory: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(memory.ctypes.data)


def _pass(argument: object) -> object:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Input | Output):
        return _pointer(argument.memory)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    assert isinstance(argument, int | np.integer), type(argument)
    return ctypes.c_int64(int(argument))


def _compile(command: list[str]) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    done = subprocess.run([compiler, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@cache
def _engine() -> list[str]:
    objects = []
    for name in ("simt", "memory", "instructions"):
        target = f"{_folder.name}/{name}.o"
        _compile([*FLAGS, "-O2", f"-I{CSRC / 'cuda'}", "-c", str(HERE / f"{name}.cpp"), "-o", target])
        objects.append(target)
    return objects


@cache
def _library(driver: str, changes: tuple[tuple[str, str, str], ...]) -> Library:
    folder = Path(tempfile.mkdtemp(prefix=f"{driver}-", dir=_folder.name))
    include, here = CSRC / "cuda", HERE
    if changes:
        include, here = folder / "csrc" / "cuda", folder / "simt"
        shutil.copytree(CSRC, folder / "csrc")
        shutil.copytree(HERE, here)
        for name, old, new in changes:
            path = next(path for path in (include / name, here / name) if path.exists())
            text = path.read_text()
            assert text.count(old) == 1, f"{name} holds {text.count(old)} times: {old}"
            path.write_text(text.replace(old, new))
    compiled, library = str(folder / "driver.o"), folder / f"{driver}.so"
    _compile([*FLAGS, *INSTRUMENTED, f"-I{include}", f"-I{here}", "-c", str(here / f"{driver}.cpp"), "-o", compiled])
    _compile(["-shared", compiled, *_engine(), "-ldl", "-o", str(library)])
    return Library(library)


def build(driver: str, changes: Mapping[tuple[str, str], str] | None = None) -> Library:
    """Compiles ``<driver>.cpp``, once a session. ``changes`` maps (file, text) to another text: a mutant of the kernel.
    The file is one of ``csrc/cuda`` or of this folder; the text must occur in it exactly once."""
    return _library(driver, tuple((name, old, new) for (name, old), new in (changes or {}).items()))


def bits_from_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to the bits of ``"bf16"`` or ``"f16"`` (rounded to nearest even) or ``"f32"``."""
    values = np.asarray(values, np.float32)
    if dtype == "f32":
        return values
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint16)
    wide = values.view(np.uint32)
    return ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)


def float_from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The float64 values of what :func:`bits_from_float` gives."""
    if dtype == "f32":
        return bits.astype(np.float64)
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
