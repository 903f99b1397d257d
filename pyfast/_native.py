"""Loads the compiled modules, and says in one sentence why where one is missing.

``CPU`` and ``CUDA`` are the modules or None; ``CPU_REASON`` and ``CUDA_REASON`` say why None. Loading a module
registers its kernels with torch.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError:
        return None, f"{name} is not built"
    except ImportError as error:
        return None, f"{name} does not load: {error}"


CPU, CPU_REASON = _load("pyfast._C")

CUDA: ModuleType | None = None
if torch.version.cuda is None:
    CUDA_REASON = "this torch has no CUDA"
else:
    CUDA, CUDA_REASON = _load("pyfast._cuda")

if CPU is None:
    warnings.warn(
        f"pyfast: {CPU_REASON}; the plain-torch reference serves instead, correct but slow. "
        "Build it with `pip install .` (needs g++).",
        RuntimeWarning,
        stacklevel=2,
    )
if "does not load" in CUDA_REASON:
    warnings.warn(
        f"pyfast: {CUDA_REASON}; Triton and plain torch serve on the GPU instead. Build it again for this torch.",
        RuntimeWarning,
        stacklevel=2,
    )
