"""Memory: how much a call may take, what is free on the device now; and large memory that a step has at every turn."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from pyfast import _native
from pyfast.ops._library import LIBRARY, define

_UNKNOWN = 4 << 30


def memory_at_hand(device: torch.device) -> int | None:
    """Bytes that can be allocated on ``device`` now; None while a CUDA graph is captured, when one may not ask.

    CUDA: free memory of the device and what the caching allocator holds without using it. CPU: memory that can be had
    without swapping, 4 GiB where the system does not say, and what :func:`reusable_empty` keeps.
    """
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    kept = 0 if _native.CPU is None else _native.CPU.kept_memory()
    return kept + (int(found[1]) << 10 if found else _UNKNOWN)


# csrc/cpu/reuse.h: memory that is kept when the tensor goes, and handed out again.
define("reusable_empty(Tensor like, int rows, int columns) -> Tensor")


@torch.library.register_fake("pyfast::reusable_empty", lib=LIBRARY)
def _fake(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(rows, columns)


def reusable_empty(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised matrix ``[rows, columns]`` of ``like``'s dtype on its device: on a CPU in memory that is kept
    for the next one of about its size (:func:`pyfast.backends.release_memory` gives it back), on others in that of
    torch's caching allocator."""
    if like.device.type != "cpu" or _native.CPU is None:
        return like.new_empty(rows, columns)
    return torch.ops.pyfast.reusable_empty(like, rows, columns)
