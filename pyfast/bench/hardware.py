"""Facts about the machine: caches, names, memory."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from pyfast._cpu import cache_bytes_under, cpu_name, last_level_cache_bytes

__all__ = [
    "available_memory_bytes",
    "cache_bytes_under",
    "cpu_name",
    "last_level_cache_bytes",
    "peak_growth_bytes",
    "peak_resident_bytes",
    "reset_peak",
    "resident_bytes",
]


def available_memory_bytes() -> int:
    """Memory that can be had without swapping; 4 GiB where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 4 << 30


def _status_bytes(field: str) -> int | None:
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    return _status_bytes("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory of this process that was ever resident, or since ``reset_peak``."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> bool:
    """Start ``peak_resident_bytes`` anew. False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_memory() -> bool:
    """Give memory that earlier work freed back to the system. False where that cannot be asked for."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def peak_growth_bytes(run: Callable[[], object]) -> int | None:
    """By how much the resident memory grew at its highest while ``run`` ran, its result alive; None where
    the system does not tell. Everything that the process touches anew counts, whoever allocated it; pages
    make it coarse by a few hundred KiB. Memory that earlier work freed is first given back to the system."""
    if not give_back_memory() or not reset_peak():
        return None
    before = resident_bytes()
    result = run()
    grown = peak_resident_bytes() - before
    del result
    return max(grown, 0)
