"""Facts about the CPU that more than one part needs: its name, its last-level cache and how wide its units are."""

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
    return name_in(_cpuinfo()) or platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def takes_512_bits_in_halves() -> bool:
    """Whether the CPU has AVX-512 on units of 256 bits."""
    return halves_in(_cpuinfo())


def name_in(cpuinfo: str) -> str | None:
    """The model name in the text of /proc/cpuinfo, None where there is none. One without a number, as virtual machines
    have it, is that of many processors: family and model are added."""
    facts = _facts(cpuinfo)
    name = facts.get("model name")
    if name is None or re.search(r"\d", name) or "model" not in facts:
        return name
    return f"{name}, family {facts.get('cpu family')} model {facts['model']}"


def halves_in(cpuinfo: str) -> bool:
    """Whether /proc/cpuinfo is that of a Zen 4: AMD's family 25, whose other members, Zen 3, have no AVX-512."""
    facts = _facts(cpuinfo)
    amd = facts.get("vendor_id") == "AuthenticAMD"
    return amd and facts.get("cpu family") == "25" and "avx512f" in facts.get("flags", "").split()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _facts(cpuinfo: str) -> dict[str, str]:
    """Those of the first processor."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip(), " ".join(value.split()))
    return facts
