"""What ``pyfast info`` tells: versions, what was built, what runs, and who serves each op."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyfast._version import __version__
from pyfast.bench import hardware
from pyfast.bench.environment import version


def gather() -> dict[str, Any]:
    """Everything as plain values, fit for JSON. ``ops`` maps each op to its backends in priority order."""
    from pyfast import backends

    ops: dict[str, list[dict[str, Any]]] = {}
    for row in backends.op_table():
        entry = {"backend": row.backend, "available": row.available, "reason": row.reason}
        ops.setdefault(row.op, []).append(entry)
    return {
        "versions": {
            "pyfast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "transformers": version("transformers"),
            "cuda": torch.version.cuda,
        },
        "cpu": hardware.cpu_name(),
        "threads": torch.get_num_threads(),
        "build": dict(backends.build_info()),
        "isas_built": list(backends.isas_built()),
        "isa_active": backends.active_isa(),
        "gpus": gpus(),
        "ops": ops,
    }


def gpus() -> list[str]:
    """The GPUs that torch sees, each with its compute capability and memory."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return found


def render(facts: Mapping[str, Any]) -> RenderableType:
    """Tables of what ``gather`` found."""
    return Group(_machine(facts), _ops(facts))


def _machine(facts: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    versions = facts["versions"]
    table.add_row("versions", ", ".join(f"{name} {found or 'not installed'}" for name, found in versions.items()))
    table.add_row("CPU", f"{facts['cpu']}, {facts['threads']} threads")
    for name, value in facts["build"].items():
        if name != "isas":  # told below
            table.add_row(name.replace("_", " "), Text(_plain(value)))
    built = facts["isas_built"]
    table.add_row("ISAs built", _plain(built))
    active = facts["isa_active"] or "none: the plain-torch reference serves"
    hint = f" (override with PYFAST_ISA={'|'.join(built)})" if built else ""
    table.add_row("ISA active", f"{active}{hint}")
    table.add_row("GPUs", _plain(facts["gpus"]))
    return table


def _plain(value: object) -> str:
    """A value in words: lists by commas, nothing as "none"."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == "" else str(value)


def _ops(facts: Mapping[str, Any]) -> Table:
    table = Table(title="ops and their backends, first choice first", title_justify="left", title_style="bold")
    table.add_column("op")
    table.add_column("backend")
    table.add_column("serves", justify="center")
    table.add_column("why", overflow="fold")
    for op, rows in facts["ops"].items():
        for i, row in enumerate(rows):
            table.add_row(
                op if i == 0 else "",
                row["backend"],
                "yes" if row["available"] else "no",
                Text(row["reason"]),
                style="" if row["available"] else "dim",
                end_section=i == len(rows) - 1,
            )
    return table
