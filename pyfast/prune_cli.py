"""``pyfast prune``: options in, a progress bar while it runs, a table at the end.

Exit codes: 0 done; 2 the command was wrong; 130 interrupted (the same command goes on where it stopped).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pyfast.sparse.pruning.checkpoint import Calibration, default_device, prune_checkpoint
from pyfast.sparse.pruning.model import Observer, PrunedLayer
from pyfast.sparse.pruning.options import make_options
from pyfast.sparse.pruning.stream import Unit


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face checkpoint: a folder or a name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the pruned checkpoint goes; also holds the state.")],
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of the weights removed [default: that of the pattern].", show_default=False),
    ] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, or N:M: N kept of every M columns.")] = "unstructured",
    method: Annotated[str, typer.Option(help="magnitude, gradient, taylor, wanda or sparsegpt.")] = "wanda",
    scope: Annotated[
        str | None,
        typer.Option(help="row, layer or global [default: row for wanda, else layer].", show_default=False),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Layers by name, as a shell pattern (may be repeated).", show_default=False)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layers left as they are (may be repeated).", show_default=False)
    ] = None,
    head: Annotated[bool, typer.Option("--head", help="Prune the output head too.")] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR", help="Text to calibrate on [default: Python's own sources].", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences of text to calibrate on.")] = 64,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens in each [default: 512, or what the model takes].", show_default=False),
    ] = None,
    dampening: Annotated[float, typer.Option(help="Of sparsegpt: added to the Hessian, times its mean.")] = 0.01,
    block_size: Annotated[int, typer.Option(help="Of sparsegpt: columns settled at once.")] = 128,
    format: Annotated[str, typer.Option(help="How the result is stored: dense (zeros in place).")] = "dense",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda [default: cuda where there is one].", show_default=False)
    ] = None,
) -> None:
    """Set weights of a checkpoint to 0, block by block; a run that was stopped goes on where it was."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        options = make_options(method, sparsity, pattern, scope, dampening, block_size)
        with _bar() as observer:
            layers, before = prune_checkpoint(
                model,
                out,
                options,
                Calibration(text, samples, sequence_length),
                include=include or None,
                exclude=exclude or None,
                head=head,
                format=format,
                device=device or default_device(),
                observer=observer,
            )
    except (ValueError, TypeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except ModuleNotFoundError as error:
        typer.echo(f"error: {error}; pip install 'pyfast-kernels[models]'", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on from {out}", err=True)
        raise typer.Exit(130) from None
    console.print(_table(layers))
    console.print(f"{'already there' if before else 'written'}: {out}")


class _Bar(Observer):
    """A step for each unit; the line above says what is going on inside of it."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._task = progress.add_task("loading", total=None)
        self._names: list[str] = []

    def units(self, names: list[str]) -> None:
        self._names = names
        self._progress.update(self._task, total=len(names), description=names[0])

    def pruned(self, unit: Unit, layers: list[PrunedLayer]) -> None:
        done = self._names.index(unit.name) + 1
        what = self._names[done] if done < len(self._names) else "writing"
        self._progress.update(self._task, completed=done, description=what)

    def advance(self, what: str, done: int, total: int) -> None:
        share = f" {done}/{total}" if total > 1 else ""
        self._progress.update(self._task, description=f"{what}{share}")


@contextmanager
def _bar() -> Iterator[_Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)


def _table(layers: list[PrunedLayer]) -> Table:
    """A line for each kind of layer (its name inside its block): how many, and how much of them fell."""
    table = Table(title="pruned")
    for title in ("layer", "count", "weights", "removed", "output error"):
        table.add_column(title, justify="left" if title == "layer" else "right")
    kinds: dict[str, list[PrunedLayer]] = {}
    for layer in layers:
        kinds.setdefault(re.split(r"(?:^|\.)\d+\.", layer.name)[-1], []).append(layer)
    for kind, members in [*kinds.items(), ("all", layers)]:
        weights = sum(layer.shape[0] * layer.shape[1] for layer in members)
        removed = sum(layer.removed for layer in members)
        errors = [layer.error for layer in members if layer.error is not None]
        error = f"{sum(errors) / len(errors):.4f}" if errors else "-"
        table.add_row(kind, str(len(members)), f"{weights:,}", f"{removed / max(weights, 1):.2%}", error)
    return table
