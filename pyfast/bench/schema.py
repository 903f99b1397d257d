"""The one JSON schema of every benchmark suite.

A report is a description of the machine, a list of results and a list of bars::

    {"schema": 1, "environment": {...}, "results": [{...}], "bars": [{...}]}

Tables, plots and the README are generated from this and never typed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pyfast.bench.timing import Timing

SCHEMA = 1
FORMATS = ("dense", "2:4", "bitmap", "csr", "layers", "none")

_Row = TypeVar("_Row", "Result", "Bar")


@dataclass
class Result:
    """One implementation of one case.

    ``ms``, ``ms_min`` and ``ms_max`` are the median, the 10th and the 90th percentile in milliseconds.
    ``bytes`` and ``flops`` are what the task needs at least: not what this implementation happens to move.
    ``floor_ms`` is the time of a perfect implementation on this machine and ``of_floor = floor_ms / ms``.
    ``speedup = baseline_ms / ms`` against the implementation named by ``baseline`` in the same run.
    ``error`` is a relative norm against float64. ``metrics`` holds further figures by name.
    """

    suite: str
    op: str
    case: str
    shape: list[int]
    tokens: int
    format: str
    sparsity: float
    dtype: str
    impl: str
    ms: float
    ms_min: float
    ms_max: float
    bytes: int = 0
    flops: int = 0
    floor_ms: float | None = None
    of_floor: float | None = None
    baseline: str | None = None
    baseline_ms: float | None = None
    speedup: float | None = None
    error: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def timed(
        cls,
        timing: Timing,
        *,
        floor_ms: float | None = None,
        baseline_ms: float | None = None,
        **fields: Any,
    ) -> Result:
        """A result from a ``Timing``, with ``of_floor`` and ``speedup`` worked out."""
        return cls(
            ms=timing.ms,
            ms_min=timing.ms_min,
            ms_max=timing.ms_max,
            floor_ms=floor_ms,
            of_floor=floor_ms / timing.ms if floor_ms is not None and timing.ms > 0 else None,
            baseline_ms=baseline_ms,
            speedup=baseline_ms / timing.ms if baseline_ms is not None and timing.ms > 0 else None,
            **fields,
        )

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a result itself: two results of the same key are two runs of one thing."""
        return (
            self.suite,
            self.op,
            self.case,
            tuple(self.shape),
            self.tokens,
            self.format,
            self.sparsity,
            self.dtype,
            self.impl,
        )

    def is_noise(self, other: Result) -> bool:
        """Whether the difference from ``other`` is smaller than the spread: the intervals from the 10th
        to the 90th percentile contain each other's medians."""
        return self.ms_min <= other.ms <= self.ms_max and other.ms_min <= self.ms <= other.ms_max


@dataclass
class Bar:
    """A figure the project has set itself. ``measured`` and ``met`` are None where this run could not tell.

    ``required`` is a lower bound, or an upper bound where ``at_most`` is true.
    """

    name: str
    required: float
    measured: float | None = None
    met: bool | None = None
    unit: str = "x"
    note: str = ""
    at_most: bool = False

    @classmethod
    def judge(
        cls,
        name: str,
        required: float,
        measured: float | None,
        *,
        unit: str = "x",
        note: str = "",
        at_most: bool = False,
    ) -> Bar:
        """A bar with ``met`` worked out; a missing or non-finite ``measured`` leaves it undecided."""
        if measured is not None and not math.isfinite(measured):
            measured = None
        met = None if measured is None else (measured <= required if at_most else measured >= required)
        return cls(name, required, measured, met, unit, note, at_most)


@dataclass
class Report:
    """Everything one run has to say."""

    environment: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    schema: int = SCHEMA

    def select(self, **wanted: object) -> list[Result]:
        """The results whose fields equal those given, in order: ``report.select(suite="sparse",
        tokens=1)``."""
        return [r for r in self.results if all(getattr(r, name) == value for name, value in wanted.items())]

    def add(self, results: Sequence[Result], bars: Sequence[Bar] = ()) -> None:
        """Add results and bars; one that is there already (same key, same name) is replaced."""
        self.results = list({r.key: r for r in [*self.results, *results]}.values())
        self.bars = list({b.name: b for b in [*self.bars, *bars]}.values())

    def merge(self, other: Report) -> Report:
        """A report with the results of both; ``other`` wins where they overlap.

        Raises ValueError where the two come from different devices: their figures do not belong in one table.
        """
        mine, theirs = self.environment.get("device"), other.environment.get("device")
        if mine is not None and theirs is not None and mine != theirs:
            raise ValueError(f"other: a report of {theirs!r} cannot be merged into one of {mine!r}")
        merged = Report({**self.environment, **other.environment}, list(self.results), list(self.bars))
        merged.add(other.results, other.bars)
        return merged

    def to_json(self) -> str:
        """The report as JSON text. Raises ValueError for a number that JSON cannot hold (NaN, infinity)."""
        whole = {
            "schema": self.schema,
            "environment": self.environment,
            "results": [dataclasses.asdict(r) for r in self.results],
            "bars": [dataclasses.asdict(b) for b in self.bars],
        }
        try:
            return json.dumps(whole, indent=1, allow_nan=False) + "\n"
        except ValueError as error:
            raise ValueError(f"report: holds a number that is not finite: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what ``to_json`` wrote. Raises ValueError, saying what is wrong, for anything else."""
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"report: not JSON, or cut short: {error}") from error
        if not isinstance(whole, dict) or "schema" not in whole:
            raise ValueError('report: not a benchmark report: an object with "schema" was expected')
        if whole["schema"] != SCHEMA:
            raise ValueError(f"report: schema {whole['schema']!r} is unknown; this version reads schema {SCHEMA}")
        for name, kind in (("environment", dict), ("results", list), ("bars", list)):
            if not isinstance(whole.get(name), kind):
                raise ValueError(f"report: {name!r} is missing or is not a {kind.__name__}")
        return cls(
            environment=whole["environment"],
            results=[_read(Result, row, f"results[{i}]") for i, row in enumerate(whole["results"])],
            bars=[_read(Bar, row, f"bars[{i}]") for i, row in enumerate(whole["bars"])],
        )


def _read(row_type: type[_Row], row: object, where: str) -> _Row:
    """A dataclass from a JSON object, every field's presence and type checked."""
    if not isinstance(row, dict):
        raise ValueError(f"report: {where} is not an object")
    hints = typing.get_type_hints(row_type)
    unknown = sorted(set(row) - set(hints))
    if unknown:
        raise ValueError(f"report: {where} has unknown fields {unknown}")
    for f in dataclasses.fields(row_type):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.name not in row:
            if required:
                raise ValueError(f"report: {where} lacks {f.name!r}")
        elif not _fits(row[f.name], hints[f.name]):
            raise ValueError(f"report: {where}.{f.name} is {row[f.name]!r}, which is not {hints[f.name]}")
    return row_type(**row)


def _fits(value: object, hint: Any) -> bool:
    """Whether a JSON value has the type of a field. JSON may write a whole float without its point."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is list:
        return isinstance(value, Sequence) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(v, typing.get_args(hint)[1]) for v in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
