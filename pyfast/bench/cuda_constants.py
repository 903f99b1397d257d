"""``pyfast calibrate --device cuda``: the constants of the GPU's cost model, measured and shown."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from pyfast.bench.constants import plain_table
from pyfast.bench.progress import Progress
from pyfast.sparse import cache, cuda_calibration
from pyfast.sparse.cuda_costs import (
    DENSITIES,
    FEW_TOKENS,
    MANY_TOKENS,
    SCATTERED_TOKENS,
    SLICED_TOKENS,
    CudaConstants,
    Row,
)


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
    machine.add_row("kept in", str(path) if path is not None else "nowhere: they end with this process")
    what = "us to begin + ps a position with all tokens"
    many = plain_table(f"dense libraries, {what}", "", [f"{t} tokens" for t in MANY_TOKENS])
    many.add_row("F.linear", *_lines(found.dense))
    if found.cusparselt:
        many.add_row("2:4 by cuSPARSELt", *_lines(found.cusparselt))
    few = plain_table(f"2:4, {what}", "", [*(f"{t} tokens" for t in FEW_TOKENS), "decompressed"])
    few.add_row("as stored", *_lines((*found.sparse24, found.sparse24_decompress)))
    shares = [f"{density:.0%} stored" for density in DENSITIES]
    bitmap = plain_table(f"bitmap, {what}", "tokens at once", shares)
    for tokens, row in zip(FEW_TOKENS, found.bitmap, strict=True):
        bitmap.add_row(f"as stored, {tokens}", *_lines(row))
    for tokens, row in zip(SLICED_TOKENS, found.sliced, strict=True):
        bitmap.add_row(f"sliced, {tokens}", *_lines(row))
    if found.scattered:
        for tokens, row in zip(SCATTERED_TOKENS, found.scattered, strict=True):
            bitmap.add_row(f"scattered, {tokens}", *_lines(row))
    bitmap.add_row("decompressed", *_lines(found.bitmap_decompress))
    return Group(machine, many, few, bitmap)


def _lines(row: Row) -> list[str]:
    return [f"{begin:.1f} + {position:.2f}" for begin, position in row]
