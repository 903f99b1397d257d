"""Layouts of the Triton attention kernels on a GPU: a generated table of docs/kernels-gpu.md.

    python benchmarks/attention_layouts.py measure FILE.json [--processes 16]
    python benchmarks/attention_layouts.py tables benchmarks/results/*/attention_layouts.json [--write PAGE.md]

16 heads, 2048 tokens, causal; each layout is compiled in one of several processes, then timed in one: the median of
five calls, each kernel between events. A file holds the device and rows: dtype, width, divergence, layout (queries and
keys in a tile, warps, stages), and us of ``attention_rows`` and ``attention_keys``.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from generated import measure_or_tables
from triton.runtime.errors import OutOfResources

HEADS, TOKENS = 16, 2048
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CASES = [(dtype, width, divergence) for dtype in DTYPES for width in (64, 128) for divergence in ("forward_kl", "jsd")]
LAYOUTS = [
    (block_q, block_k, warps, stages)
    for block_q, block_k in ((32, 16), (32, 32), (32, 64), (64, 16), (64, 32), (64, 64), (128, 32), (128, 64))
    for warps in (4, 8)
    for stages in (2, 3)
]
SHOWN = 3  # layouts of a case, the fastest first


def jobs() -> Iterator[tuple[tuple[str, int, str], tuple[int, int, int, int]]]:
    return ((case, layout) for case in CASES for layout in LAYOUTS)


def call(case: tuple[str, int, str], layout: tuple[int, int, int, int], tokens: int) -> None:
    """One loss and gradient by a layout."""
    from pyfast.triton_kernels import attention_distill

    dtype, width, divergence = case
    chosen = attention_distill.plan
    attention_distill.plan = lambda *_: attention_distill.Plan(*layout)
    try:
        tensors = [torch.randn(1, HEADS, tokens, width, device="cuda", dtype=DTYPES[dtype]) for _ in range(4)]
        scale = torch.full((1, HEADS, tokens), 1e-3, device="cuda")
        attention_distill.attention_distill(*tensors, scale, None, True, divergence, 0.5, width**-0.5, width**-0.5)
    finally:
        attention_distill.plan = chosen


def compile_some(first: int, step: int) -> None:
    for case, layout in list(jobs())[first::step]:
        try:
            call(case, layout, 256)
        except OutOfResources:  # told by the process that times
            continue


def timed(case: tuple[str, int, str], layout: tuple[int, int, int, int]) -> dict[str, float]:
    """Microseconds of each kernel."""
    from pyfast.triton_kernels import attention_distill

    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
    launch = attention_distill.launch

    def between_events(kernel: Any, *arguments: Any, **constants: Any) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch(kernel, *arguments, **constants)
        end.record()
        spans.setdefault(kernel.fn.__name__.removeprefix("attention_"), []).append((start, end))

    attention_distill.launch = between_events
    try:
        for _ in range(6):
            call(case, layout, TOKENS)
    finally:
        attention_distill.launch = launch
    torch.cuda.synchronize()
    return {name: sorted(s.elapsed_time(e) for s, e in found[1:])[2] * 1e3 for name, found in spans.items()}


def measure(path: Path, processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    compilers = [context.Process(target=compile_some, args=(i, processes)) for i in range(processes)]
    for process in compilers:
        process.start()
    for process in compilers:
        process.join()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    for case, layout in jobs():
        try:
            us = timed(case, layout)
        except OutOfResources as error:
            print(f"{case} {layout}: {error}", flush=True)
            continue
        found["rows"].append(dict(zip(("dtype", "width", "divergence"), case, strict=True), layout=layout, **us))
        path.write_text(json.dumps(found, indent=0) + "\n")


def tables(files: list[dict]) -> dict[str, str]:
    """Markdown by the name of its block."""
    lines = ["| GPU | dtype | width | divergence | attention_rows, µs | attention_keys, µs |", "| --- " * 6 + "|"]
    for file in files:
        for dtype, width, divergence in CASES:
            here = [r for r in file["rows"] if (r["dtype"], r["width"], r["divergence"]) == (dtype, width, divergence)]
            cells = [", ".join(_shown(row, kernel) for row in _fastest(here, kernel)) for kernel in ("rows", "keys")]
            if here:
                device = file["device"].removeprefix("NVIDIA ").split()[0]
                lines.append("| " + " | ".join([device, dtype, str(width), divergence, *cells]) + " |")
    return {"attention-layouts": "\n".join(lines)}


def _fastest(rows: list[dict], kernel: str) -> list[dict]:
    return sorted((row for row in rows if kernel in row), key=lambda row: row[kernel])[:SHOWN]


def _shown(row: dict, kernel: str) -> str:
    block_q, block_k, warps, stages = row["layout"]
    return f"{row[kernel]:.0f} ({block_q}x{block_k}, {warps} warps, {stages})"


if __name__ == "__main__":
    measure_or_tables(
        __doc__.splitlines()[0],
        lambda given: measure(given.files[0], given.processes),
        tables,
        name="--processes",
        type=int,
        default=16,
        help="that compile at once",
    )
