"""What each CUDA kernel does on a GPU, from Nsight Compute's counters: a generated table of docs/kernels-gpu.md.

    ncu --clock-control none --page raw --csv $(python benchmarks/profile_cuda.py sections) \\
        python benchmarks/profile_cuda.py launch > raw.csv
    python benchmarks/profile_cuda.py read raw.csv [--json FILE] [--write docs/kernels-gpu.md]

``launch`` runs each kernel once, at one shape; ``read`` takes from the counters what says where its time goes.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from pathlib import Path

import torch
from generated import replace_block

SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")
OURS = r"regex:^(sparse24|bitmap|sliced|scattered|distill_kl|scale_rows)"
N, K = 14336, 4096  # an MLP layer of Llama-3.1-8B
ROWS, WORDS = 1024, 128256
STALLS = re.compile(r"smsp__average_warps?_issue_stalled_(\w+?)_per_issue_active")
# Figures of a kernel: name, its counter, what it is divided by.
COUNTERS = {
    "us": ("gpu__time_duration.sum", 1e3),
    "dram_tb_s": ("dram__bytes.sum.per_second", 1e12),
    "dram_percent": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "ipc": ("sm__inst_executed.avg.per_cycle_active", 1),
    "issue_percent": ("sm__inst_issued.avg.pct_of_peak_sustained_active", 1),
    "warps_a_scheduler": ("smsp__warps_active.avg.per_cycle_active", 1),
    "tensor_percent": ("sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active", 1),
    "registers": ("launch__registers_per_thread", 1),
}


def launch() -> None:
    """Each kernel once, between the profiler's start and stop: what comes before only makes the weights."""
    import pyfast
    from pyfast.ops import bitmap_convert, sparse24_convert
    from pyfast.sparse.scattered import ScatteredLayout
    from pyfast.sparse.sliced import SlicedLayout

    ops = torch.ops.pyfast
    dense = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
    student, teacher = (torch.randn(ROWS, WORDS, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = {tokens: torch.randn(tokens, K, device="cuda", dtype=torch.bfloat16) for tokens in (1, 8, 32)}
    two_four = pyfast.Sparse24Weight(*sparse24_convert.prune(dense), (N, K))
    bitmaps = [
        pyfast.BitmapWeight.from_dense(dense, mask=torch.rand(N, K, device="cuda") < density) for density in (0.5, 0.2)
    ]
    layouts = [(SlicedLayout.of(weight), ScatteredLayout.of(weight)) for weight in bitmaps]
    grad = torch.randn(8, N, device="cuda", dtype=torch.bfloat16)
    scale = torch.ones(ROWS, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    sparse24_convert.prune(dense)
    sparse24_convert.decompress(two_four.values, two_four.metadata, N, K)
    for tokens in (1, 32):
        ops.sparse24_linear_mma(x[tokens], two_four.values, two_four.metadata, None, 0, None)
    for weight, (sliced, scattered) in zip(bitmaps, layouts, strict=True):
        tables = weight.values, weight.bitmaps, weight.offsets
        for tokens in x:
            ops.bitmap_linear_few(x[tokens], *tables, None, N, 0, None)
        for tokens in (1, 8):
            sliced.linear(x[tokens], None, 0, None)
        for tokens in (8, 32):
            scattered.linear(x[tokens], None, 0, None)
        bitmap_convert.decompress(*tables, N, K)
    ops.bitmap_scan(dense)
    ops.bitmap_grad_x_few(grad, *tables, K)
    ops.sparse24_grad_x_few(grad, two_four.values, two_four.metadata, K)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        ops.distill_kl(student, teacher, scale, divergence, 0.5, 1.0, 1.0, 0.0, 0.0, None, None, True)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def read(path: Path) -> dict:
    """The figures of every kernel in a raw CSV of Nsight Compute."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    units = rows.pop(0)  # the line below the header
    kernels = [_figures(row, units) for row in rows if row.get("Kernel Name")]
    if not kernels:
        raise SystemExit(f"{path}: no kernel in it; ncu printed: {path.read_text(errors='replace')[-500:]}")
    return {"kernels": kernels}


def _figures(row: dict, units: dict) -> dict:
    found: dict = {"kernel": re.sub(r"^void |\(.*$", "", row["Kernel Name"]), "grid": row.get("Grid Size", "")}
    for name, (counter, divisor) in COUNTERS.items():
        if row.get(counter):
            found[name] = float(row[counter].replace(",", "")) * _unit(units.get(counter, "")) / divisor
    stalls = {
        match[1]: float(value.replace(",", ""))
        for counter, value in row.items()
        if (match := STALLS.match(counter or "")) and value
    }
    stalls.pop("selected", None)
    found["stalls"] = dict(sorted(stalls.items(), key=lambda pair: -pair[1])[:3])
    return found


def _unit(unit: str) -> float:
    """What a unit of ncu is worth in nanoseconds, bytes a second, or as it is."""
    times, powers = {"ns": 1.0, "us": 1e3, "ms": 1e6}, {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    scales = times | {f"{power}byte/s": worth for power, worth in powers.items()}
    return scales.get(unit, 1.0)


def markdown(figures: dict) -> str:
    """The table; the device is named where the figures say it."""
    head = ["kernel", "µs", "DRAM TB/s", "of peak", "IPC", "warps a scheduler", "tensor pipe", "its warps wait for"]
    about = f"{N}x{K} bfloat16 weights, {ROWS}x{WORDS} bfloat16 logits."
    lines = [f"**{figures['device']}**, {about}" if "device" in figures else about]
    lines += ["", "| " + " | ".join(head) + " |", "| --- | " + "---: | " * (len(head) - 2) + "--- |"]

    def cell(kernel: dict, name: str, form: str) -> str:
        return format(kernel[name], form) if name in kernel else "-"

    for kernel in figures["kernels"]:
        waits = ", ".join(f"{name.replace('_', ' ')} {cycles:.1f}" for name, cycles in kernel["stalls"].items())
        cells = [f"`{kernel['kernel']}`", cell(kernel, "us", ".1f"), cell(kernel, "dram_tb_s", ".2f")]
        cells += [cell(kernel, "dram_percent", ".0f") + " %", cell(kernel, "ipc", ".2f")]
        cells += [cell(kernel, "warps_a_scheduler", ".1f"), cell(kernel, "tensor_percent", ".0f") + " %", waits]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Waits are cycles a warp stands at an issued instruction, the three longest of each kernel."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("sections", "launch", "read", "table"))
    parser.add_argument("file", type=Path, nargs="?", help="raw CSV to read, or JSON to make the table of")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--write", type=Path, help="a Markdown file with a block named profile to make anew")
    given = parser.parse_args()
    if given.what == "sections":
        print("--profile-from-start off -k", OURS, *(word for section in SECTIONS for word in ("--section", section)))
        return
    if given.what == "launch":
        launch()
        return
    figures = json.loads(given.file.read_text()) if given.what == "table" else read(given.file)
    if given.what == "read" and torch.cuda.is_available():
        figures = {"device": torch.cuda.get_device_name(), **figures}
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    text = markdown(figures)
    print(text)
    if given.write:
        given.write.write_text(replace_block(given.write.read_text(), "profile", text))


if __name__ == "__main__":
    sys.exit(main())
