"""The command line: ``pyfast info``, ``pyfast calibrate``, ``pyfast bench`` and ``pyfast prune``.

Exit codes: 0 done; 1 a suite failed (the others' figures are kept); 2 the command was wrong.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from pyfast import backends
from pyfast.prune_cli import prune

if TYPE_CHECKING:
    from pyfast.bench.options import Options

app = typer.Typer(
    name="pyfast",
    help="Custom kernels for distillation and sparse inference, and what they buy on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point of the command ``pyfast``."""
    try:
        backends.active_isa()
    except ValueError as error:  # PYFAST_ISA names nothing that runs here
        print(f"pyfast: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from pyfast._version import __version__

        print(f"pyfast {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What was built, what runs here, and which backend serves each op, with the reason for each refusal."""
    from pyfast.bench import info as gathered

    facts = gathered.gather()
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _console().print(gathered.render(facts))


@app.command()
def calibrate(
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads [default: torch's own choice].", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure, in a few seconds, what the sparse kernels' choices rest on, and keep it for this device."""
    from pyfast.bench import constants, cuda_constants
    from pyfast.bench.options import DEVICES
    from pyfast.bench.progress import Progress

    if device not in DEVICES:
        _refuse(ValueError(f"device: {device!r} is unknown; accepted are {', '.join(DEVICES)}"))
    try:
        with Progress() as progress:
            if device == "cuda":
                shown = cuda_constants.render(*cuda_constants.measure(progress))
            else:
                shown = constants.render(*constants.measure(threads, progress), threads)
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    _console().print(shown)


@app.command()
def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="Any of losses, sparse, layers, model; all of them if none is named.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes and short budgets: a first look.")] = False,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures there, after each suite.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write one self-contained HTML page there.", show_default=False),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH|NAME",
            help="For the suite model: a local Hugging Face checkpoint, or published dimensions by name "
            "(may be repeated) [default: qwen2.5-0.5b].",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads [default: torch's own choice].", show_default=False)
    ] = None,
) -> None:
    """Measure what compression buys on this machine, beside the best dense baseline."""
    from pyfast.bench import runner, tables
    from pyfast.bench.progress import Progress
    from pyfast.bench.schema import Report

    try:
        options = _options(device, quick, threads, model or [])
        chosen = runner.check(suites or [], options)
        _check_file(json_path)
        _check_directory(report)
    except ValueError as error:
        _refuse(error)

    console, progress = _console(), Progress()

    def on_start(so_far: Report) -> None:
        with progress.paused():
            console.print(tables.environment(so_far))

    def on_suite(name: str, so_far: Report) -> None:
        with progress.paused():
            console.print(tables.suite(so_far, name))

    outcome = runner.run(
        chosen,
        options,
        json_path=json_path,
        progress=progress,
        on_start=on_start,
        on_suite=on_suite,
    )
    if outcome.report.bars:
        console.print(tables.bars(outcome.report.bars))
    if report is not None and outcome.report.results:
        from pyfast.bench import report as page

        console.print(f"page: {page.write(outcome.report, report)}")
    if json_path is not None and outcome.report.results:
        console.print(f"figures: {json_path}")
    if outcome.failures:
        _tell_failures(outcome.failures)
        raise typer.Exit(1)


app.command()(prune)


def _console() -> Console:
    """Colours and the terminal's width on a terminal, plain lines wide enough for every table elsewhere."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=180)


def _options(device: str, quick: bool, threads: int | None, models: list[str]) -> Options:
    """Options from the command line; a model that is a directory is a checkpoint, any other a name."""
    from pyfast.bench.options import Options

    paths = [given for given in models if Path(given).is_dir()]
    names = tuple(given.lower() for given in models if given not in paths)
    if len(paths) > 1:
        raise ValueError(f"model: one checkpoint at a time, got {len(paths)}: {', '.join(paths)}")
    if paths and not (Path(paths[0]) / "config.json").is_file():
        raise ValueError(f"model: {paths[0]} has no config.json: a Hugging Face checkpoint was expected")
    path = paths[0] if paths else None
    if names or path:
        return Options(device=device, quick=quick, threads=threads, models=names, model_path=path)
    return Options(device=device, quick=quick, threads=threads)


def _check_file(path: Path | None) -> None:
    """Find out before the work whether a file can be written."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--json: {path} is a directory; a file was expected")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"--json: {path} cannot be written")
    _check_directory(path.parent, "--json")


def _check_directory(path: Path | None, option: str = "--report") -> None:
    """Make a directory and find out whether files can be made in it."""
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: {path} cannot be written to")


def _refuse(error: ValueError) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2)


def _tell_failures(failures: dict[str, Exception]) -> None:
    """A bad argument in one line; anything else with its trace, for it is a bug."""
    for name, error in failures.items():
        typer.echo(f"suite {name} failed: {type(error).__name__}: {error}", err=True)
        if not isinstance(error, ValueError):
            typer.echo("".join(traceback.format_exception(error)), err=True)


if __name__ == "__main__":
    main()
