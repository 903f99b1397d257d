"""Where a report was measured: everything that its figures depend on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pyfast._version import __version__
from pyfast.bench import hardware
from pyfast.bench.floors import Floors
from pyfast.bench.options import Options


def describe(options: Options, floors: Floors | None = None) -> dict[str, Any]:
    """The ``environment`` of a report. Holds no path, no host name and no user name."""
    cuda = options.device == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else hardware.cpu_name(),
        "device_type": options.device,
        "cpu": hardware.cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": active_isa(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "last_level_cache_bytes": hardware.last_level_cache_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "pyfast": __version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "cuda": torch.version.cuda,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": options.quick,
        "seed": options.seed,
    }
    if floors is not None:
        found.update(floors.to_dict())
    return found


def version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def active_isa() -> str | None:
    """The instruction set that the CPU kernels use now, None without the compiled module."""
    from pyfast import backends

    return backends.active_isa()


def commit() -> str | None:
    """The commit of the checkout that this package lies in, with "+changes" if tracked files differ from
    it; None if it is not a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return f"{head}+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else head


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
