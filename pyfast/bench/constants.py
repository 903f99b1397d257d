"""``pyfast calibrate``: the constants of the cost model, measured and shown, with what they predict."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from pyfast import backends
from pyfast.bench import runner
from pyfast.bench.progress import Progress
from pyfast.sparse import break_even, calibration
from pyfast.sparse.cost_model import DENSE_TOKENS, DENSITIES, GROUPS, TILES, Constants, Lists, Row

SHAPES = ((4096, 4096), (4864, 896), (896, 4864))  # a square layer and Qwen2.5-0.5B's MLP
TOKENS = (1, 4, 16, 128, 512)


def measure(threads: int | None, progress: Progress) -> tuple[Constants, Path | None]:
    """Calibrates, with this many threads; the constants, and the file that keeps them (None: they are not kept). Raises
    RuntimeError without native kernels."""
    with runner.threads(threads), progress.step("calibrate"):
        found = calibration.calibrate(say=progress.say)
        return found, calibration.kept_in(torch.get_num_threads(), backends.active_isa() or "none")


def render(found: Constants, path: Path | None, threads: int | None = None) -> RenderableType:
    """Tables of the constants and of the break-even that they predict."""
    kept = str(path) if path is not None else "nowhere: they end with this process"
    return Group(_machine(found, kept), _indexed(found), _direct(found), _dense(found), _break_even(threads))


def _machine(found: Constants, kept: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("reading memory", f"{found.read_gbps:.1f} GB/s")
    table.add_row("a call", f"{found.call_us:.1f} us")
    for kind, lists in _kinds(found):
        table.add_row(f"an activation turned, {kind}", f"{lists.turn:.1f} ps")
    table.add_row("kept in", kept)
    return table


def plain_table(title: str, first: str, columns: list[str]) -> Table:
    """A table without rows yet; the first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def cells(row: Row) -> list[str]:
    """Figures of a row."""
    return [f"{value:.3g}" for value in row]


def _indexed(found: Constants) -> Table:
    table = plain_table("indexed kernel, ps", "tokens at once", [str(tile) for tile in TILES])
    for kind, lists in _kinds(found):
        table.add_row(f"an entry, {kind}", *cells(lists.entry))
        table.add_row(f"a list, {kind}", *cells(lists.start))
    return table


def _kinds(found: Constants) -> list[tuple[str, Lists]]:
    return [("one by one", found.singles), *([("in pairs", found.pairs)] if found.pairs is not None else [])]


def _direct(found: Constants) -> Table:
    columns = [f"bitmap, {density:.0%} stored" for density in DENSITIES]
    table = plain_table("direct kernels, ps a position", "dtype, tokens at once", [*columns, "2:4"])
    for dtype, rates in found.rates.items():
        for group, row, two_four in zip(GROUPS, rates.bitmap, rates.sparse24, strict=True):
            table.add_row(f"{dtype}, {group}", *cells((*row, two_four)))
        table.add_row(
            f"{dtype}, decompressed",
            "",
            "",
            *cells((rates.bitmap_decompress,)),
            "",
            *cells((rates.sparse24_decompress,)),
        )
    return table


def _dense(found: Constants) -> Table:
    table = plain_table("dense kernels, ps a position with all tokens", "dtype", [f"{t} tokens" for t in DENSE_TOKENS])
    for dtype, rates in found.rates.items():
        table.add_row(f"{dtype}, F.linear", *cells(rates.dense))
        if rates.packed:
            table.add_row(f"{dtype}, packed", *cells(rates.packed))
    return table


def _break_even(threads: int | None) -> Table:
    """Predicted with the constants in use, which are the ones just measured."""
    table = plain_table("a bitmap weight is expected to pay from", "layer, dtype", [f"{t} tokens" for t in TOKENS])
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            found = [break_even(shape, tokens, dtype, threads=threads) for tokens in TOKENS]
            name = str(dtype).removeprefix("torch.")
            table.add_row(f"{shape[0]}x{shape[1]} {name}", *("never" if s is None else f"{s:.0%}" for s in found))
    return table
