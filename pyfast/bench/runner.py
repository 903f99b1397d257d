"""A run of the benchmark: the suites in turn, each one's figures kept as soon as they are there."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pyfast import backends
from pyfast.bench import environment, floors
from pyfast.bench.hardware import give_back_memory
from pyfast.bench.options import SUITES, Options
from pyfast.bench.progress import Progress
from pyfast.bench.schema import Report


@dataclass
class Outcome:
    """The report of a run, and the suites that failed with what they raised."""

    report: Report
    failures: dict[str, Exception] = field(default_factory=dict)


def check(suites: Sequence[str], options: Options) -> tuple[str, ...]:
    """The suites to run, in the order of ``SUITES``; all of them if none is named. Raises ValueError for an
    unknown suite, or for a device that is not there."""
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"suites: {unknown[0]!r} is unknown; accepted are {', '.join(SUITES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no GPU here; accepted is cpu")
    return tuple(name for name in SUITES if name in suites or not suites)


def run(
    suites: Sequence[str],
    options: Options,
    *,
    json_path: Path | None = None,
    progress: Progress | None = None,
    on_start: Callable[[Report], None] = lambda report: None,
    on_suite: Callable[[str, Report], None] = lambda suite, report: None,
) -> Outcome:
    """Measure the floors, then run the suites (all of them if none is named).

    After the floors ``on_start(report)`` is called; after each suite the report so far is written to
    ``json_path`` and ``on_suite(suite, report)`` is called. A suite that raises is kept in ``failures`` and
    the next one runs, so that one broken part does not cost the figures of the others. Raises ValueError as
    ``check`` does.
    """
    chosen = check(suites, options)
    progress = progress or Progress(quiet=True)
    outcome = Outcome(Report())
    with threads(options.threads), progress:
        with progress.step("floors of this machine"):
            measured = floors.measure(options.device, options.quick)
        outcome.report.environment = environment.describe(options, measured)
        on_start(outcome.report)
        with progress.step("suites", total=len(chosen)):
            for name in chosen:
                begin = time.perf_counter()
                try:
                    suite = importlib.import_module(f"pyfast.bench.suites.{name}")
                    results, bars = suite.run(options, measured, progress)
                except Exception as error:
                    outcome.failures[name] = error
                else:
                    outcome.report.add(results, bars)
                    seconds = outcome.report.environment.setdefault("suite_seconds", {})
                    seconds[name] = round(time.perf_counter() - begin, 1)
                    if json_path is not None:
                        write(outcome.report, json_path)
                    on_suite(name, outcome.report)
                _tidy()
                progress.advance()
    return outcome


def _tidy() -> None:
    """What a suite leaves in memory must not be missing to the next one."""
    gc.collect()
    backends.release_memory()
    give_back_memory()


def write(report: Report, path: Path) -> None:
    """Write the report as JSON; the file is there whole or not at all."""
    text = report.to_json()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: Path) -> Report:
    """Read a report from a file. Raises ValueError, naming the file, for anything that is not one."""
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch with this many threads inside the ``with`` block; None leaves them."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
