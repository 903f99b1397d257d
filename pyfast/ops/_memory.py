"""How much memory a call may take: what is free on the device now."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_UNKNOWN = 4 << 30


def memory_at_hand(device: torch.device) -> int | None:
    """Bytes that can be allocated on ``device`` now; None while a CUDA graph is captured, when one may not ask.

    CUDA: free memory of the device and what the caching allocator holds without using it. CPU: memory that can be had
    without swapping, 4 GiB where the system does not say.
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
    return int(found[1]) << 10 if found else _UNKNOWN
