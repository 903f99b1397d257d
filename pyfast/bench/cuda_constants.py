"""``pyfast calibrate --device cuda``: the constants of the GPU's cost model, measured and shown."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from pyfast.bench.constants import cells, plain_table
from pyfast.bench.progress import Progress
from pyfast.sparse import cache, cuda_calibration
from pyfast.sparse.cuda_costs import DENSITIES, FEW_TOKENS, MANY_TOKENS, SLICED_TOKENS, CudaConstants


def measure(progress: Progress) -> tuple[CudaConstants, Path | None]:
    """Calibrates the current GPU; the constants, and the file that keeps them (None: they are not kept). Raises
    RuntimeError without a GPU or CUDA kernels."""
    with progress.step("calibrate"):
        found = cuda_calibration.calibrate(say=progress.say)
    return found, cache.kept_in(found.device, cuda_calibration.library())


def render(found: CudaConstants, path: Path | None) -> RenderableType:
    """Tables of the constants."""
    machine = Table.grid(padding=(0, 2))
    machine.add_row("GPU", found.device)
    machine.add_row("a launch", f"{found.launch_us:.2f} us")
    machine.add_row("kept in", str(path) if path is not None else "nowhere: they end with this process")
    many = plain_table("dense libraries, ps a position with all tokens", "", [f"{t} tokens" for t in MANY_TOKENS])
    many.add_row("F.linear", *cells(found.dense))
    if found.cusparselt:
        many.add_row("2:4 by cuSPARSELt", *cells(found.cusparselt))
    few = plain_table("2:4, ps a position with all tokens", "", [*(f"{t} tokens" for t in FEW_TOKENS), "decompressed"])
    few.add_row("as stored", *cells((*found.sparse24, found.sparse24_decompress)))
    shares = [f"{density:.0%} stored" for density in DENSITIES]
    bitmap = plain_table("bitmap, ps a position with all tokens", "tokens at once", shares)
    for tokens, row in zip(FEW_TOKENS, found.bitmap, strict=True):
        bitmap.add_row(f"as stored, {tokens}", *cells(row))
    for tokens, row in zip(SLICED_TOKENS, found.sliced, strict=True):
        bitmap.add_row(f"sliced, {tokens}", *cells(row))
    bitmap.add_row("decompressed", *cells(found.bitmap_decompress))
    return Group(machine, many, few, bitmap)
