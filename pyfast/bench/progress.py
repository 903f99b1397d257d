"""Progress of long work: bars on a terminal, silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A stack of steps, drawn on stderr if that is a terminal.

    ::

        with Progress() as progress, progress.step("sparse", total=12):
            for case in cases:
                progress.advance()              # one of the 12 done
                with progress.step(case.id):    # a step within the step
                    ...
    """

    def __init__(self, console: Console | None = None, *, quiet: bool | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = not self.console.is_terminal if quiet is None else quiet
        self._steps: list[TaskID] = []
        self._bars = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            redirect_stdout=False,  # results go to stdout, which may be a file
            redirect_stderr=False,
            disable=self.quiet,
        )

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, description: str, total: int | None = None) -> Iterator[Progress]:
        """A piece of work; ``total`` is its number of parts if known. Steps nest."""
        task = self._bars.add_task(description, total=total)
        self._steps.append(task)
        try:
            yield self
        finally:
            self._steps.remove(task)
            self._bars.remove_task(task)

    def advance(self, parts: int = 1) -> None:
        """Say that parts of the innermost step are done."""
        if self._steps:
            self._bars.advance(self._steps[-1], parts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bars away while something else is printed."""
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()

    def say(self, text: str) -> None:
        """A line that stays, above the bars; nothing where the progress is quiet."""
        if not self.quiet:
            self.console.print(text)
