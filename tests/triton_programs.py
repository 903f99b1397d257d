"""What the tests of Triton kernels share: programs that run cases elsewhere, and kernels compiled ahead of time.

Triton chooses between interpreter and compiler when it is imported. Cases therefore run in a process of their own, a
test file or a file of cases started as a program with a device and a file to save to; the tests judge what it saved.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

#: Where the cases run: parameters of a fixture.
PLACES = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


def saved_by(program: str, place: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``program`` saves in one of ``PLACES``, and the ``"device"`` it ran on."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if place == "interpreter" and broken_interpreter():
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    device = "cuda" if place == "cuda" else "cpu"
    target = tmp_path_factory.mktemp("triton") / f"{place}.pt"
    settings = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    python([str(Path(program).resolve()), device, str(target)], target.parent, settings)
    return {"device": device, **torch.load(target)}


def python(arguments: list[str], folder: Path, settings: dict[str, str]) -> str:
    """What Python prints, started in ``folder`` with these environment variables, Triton's compiler by default."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | settings
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def broken_interpreter() -> bool:
    """Triton's interpreter before 3.7 fails on every loop under NumPy 2.4 and later (its issue 9171)."""
    import numpy

    major, minor = (int(part) for part in version("triton").split(".")[:2])
    numpy_major, numpy_minor = (int(part) for part in numpy.__version__.split(".")[:2])
    return (major, minor) < (3, 7) and (numpy_major, numpy_minor) >= (2, 4)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let torch.empty give NaN, so that an element that nobody wrote shows."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).fill_(math.nan)

    torch.empty = filled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


def error_of(call: Callable[[], object]) -> tuple[str, str]:
    """Name and message of the TypeError or ValueError that ``call`` raises; empty without one."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


def check_compiled(pairs: str, kernels: set[str], folder: Path) -> list[str]:
    """Compiles ``pairs`` of a case and a target, an expression over ``pyfast.triton_kernels.compile``, without a GPU:
    of every kernel and target some, none of which spills or asks for more than a device has. Returns their names."""
    pytest.importorskip("triton", reason="Triton is not installed")
    program = (
        "import json\n"
        "from pyfast.triton_kernels import compile\n"
        f"print(json.dumps([compile.resources(*pair) for pair in {pairs}]))\n"
    )
    table = json.loads(python(["-c", program], folder, {"TRITON_CACHE_DIR": str(folder)}))
    assert {target for _, target, *_ in table} == {80, 90, 100}
    assert {name.split()[0] for name, *_ in table} == kernels
    for name, target, warps, registers, stack, shared in table:
        assert stack == 0, f"{name} spills {stack} bytes on sm_{target}"
        assert registers * warps * 32 <= 65536, f"{name} does not fit sm_{target}"
        assert shared <= 99 * 1024, f"{name} asks sm_{target} for {shared} bytes of shared memory"
    return [name for name, *_ in table]
