"""Facts about the CPU that more than one part needs: its name and its last-level cache."""

from __future__ import annotations

import platform
import re
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
