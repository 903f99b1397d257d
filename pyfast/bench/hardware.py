"""Facts about the machine: caches, names, memory."""

from __future__ import annotations

import ctypes
import platform
import re
import resource
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

_FALLBACK_CACHE_BYTES = 32 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@lru_cache(maxsize=1)
def last_level_cache_bytes() -> int:
    """Bytes of one last-level cache of the CPU; 32 MiB where the system does not say."""
    return cache_bytes_under(Path("/sys/devices/system/cpu/cpu0/cache")) or _FALLBACK_CACHE_BYTES


def cache_bytes_under(folder: Path) -> int | None:
    """The size of the highest cache level described in a Linux cache folder (``index*/level``,
    ``index*/size``)."""
    found: list[tuple[int, int]] = []
    for index in sorted(folder.glob("index*")):
        try:
            level = int((index / "level").read_text())
            size = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip())
        except (OSError, ValueError):
            continue
        if size:
            found.append((level, int(size[1]) * _UNITS[size[2]]))
    return max(found)[1] if found else None


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The CPU's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


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


def peak_growth_bytes(run: Callable[[], object]) -> int | None:
    """By how much the resident memory grew at its highest while ``run`` ran, its result alive; None where
    the system does not tell. Everything that the process touches anew counts, whoever allocated it; pages
    make it coarse by a few hundred KiB. Memory that earlier work freed is first given back to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return None
    if not reset_peak():
        return None
    before = resident_bytes()
    result = run()
    grown = peak_resident_bytes() - before
    del result
    return max(grown, 0)
