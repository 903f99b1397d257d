"""How things are timed: in turn, cold, and with the spread beside the median."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch

from pyfast._cuda_clock import flush_l2

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Median, 10th and 90th percentile in milliseconds of ``rounds`` calls."""

    ms: float
    ms_min: float
    ms_max: float
    rounds: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Timing:
        """The summary of a list of times in milliseconds. Raises ValueError for an empty one."""
        if not samples_ms:
            raise ValueError("samples_ms: at least one time is needed")
        return cls(
            ms=percentile(samples_ms, 0.5),
            ms_min=percentile(samples_ms, 0.1),
            ms_max=percentile(samples_ms, 0.9),
            rounds=len(samples_ms),
        )


class ImplementationError(RuntimeError):
    """An implementation under the clock raised. ``impl`` names it; the cause is chained."""

    def __init__(self, impl: str, cause: BaseException) -> None:
        super().__init__(f"{impl}: {type(cause).__name__}: {cause}")
        self.impl = impl


def percentile(samples: Sequence[float], q: float) -> float:
    """The ``q`` quantile (0 to 1) of the samples, linear between neighbours."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interleave(
    impls: Mapping[str, Callable[[], object]],
    *,
    budget_s: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 1000,
    device: str = "cpu",
    warmup: int = 1,
    calls: int = 1,
    flushes: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time implementations in turn (A B C A B C …), so that a drift of the machine meets them all alike.

    ``budget_s`` bounds the seconds of all implementations together, the warm-up left out: rounds go on
    until it is spent, never fewer than ``min_rounds``, never more than ``max_rounds``. On ``device="cuda"``
    times come from events and the second-level cache is flushed before each call; the host does not wait in
    between, and what it takes to issue a call is not counted as long as ``flushes`` of the cache last. Where an
    implementation does its work ``calls`` times, as a CUDA graph of that many does, times are those of one. What an
    implementation returns is dropped, inside the clock. Raises ``ImplementationError`` (naming the implementation)
    where one raises.
    """
    if not impls:
        raise ValueError("impls: at least one implementation is needed")
    if calls < 1:
        raise ValueError(f"calls: 1 or more, got {calls}")
    if min_rounds < 1 or max_rounds < min_rounds:
        raise ValueError(f"min_rounds, max_rounds: 1 <= min <= max is needed, got {min_rounds}, {max_rounds}")
    for name, run in impls.items():
        for _ in range(warmup):
            _call(name, run)
    samples: dict[str, list[float]] = {name: [] for name in impls}
    one_round = partial(_cuda_round, flushes) if device.startswith("cuda") else _cpu_round
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for done in range(1, max_rounds + 1):
            one_round(impls, samples, clock)
            if done >= min_rounds and clock() - start >= budget_s:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of([ms / calls for ms in times]) for name, times in samples.items()}


def _call(name: str, run: Callable[[], object]) -> None:
    try:
        run()
    except Exception as error:
        raise ImplementationError(name, error) from error


def _cpu_round(
    impls: Mapping[str, Callable[[], object]], samples: dict[str, list[float]], clock: Callable[[], float]
) -> None:
    for name, run in impls.items():
        before = clock()
        _call(name, run)
        samples[name].append((clock() - before) * 1e3)


def _cuda_round(
    flushes: int, impls: Mapping[str, Callable[[], object]], samples: dict[str, list[float]], clock: Callable[[], float]
) -> None:
    events = {}
    for name, run in impls.items():
        flush_l2(flushes)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        _call(name, run)
        end.record()
        events[name] = (start, end)
    torch.cuda.synchronize()
    for name, (start, end) in events.items():
        samples[name].append(start.elapsed_time(end))


class Rotating(Generic[T]):
    """A ring of equal things; each call gives the next, so that none is found in a cache."""

    def __init__(self, items: Sequence[T]) -> None:
        if not items:
            raise ValueError("items: at least one is needed")
        self.items = list(items)
        self._next = 0

    def __call__(self) -> T:
        item = self.items[self._next]
        self._next = (self._next + 1) % len(self.items)
        return item

    def __len__(self) -> int:
        return len(self.items)


def copies_needed(nbytes: int, llc_bytes: int) -> int:
    """How many copies of ``nbytes`` exceed four times a last-level cache of ``llc_bytes``."""
    if nbytes <= 0:
        raise ValueError(f"nbytes: a positive number of bytes is needed, got {nbytes}")
    return 4 * max(llc_bytes, 0) // nbytes + 1


def cold(make: Callable[[], T], nbytes: int, llc_bytes: int) -> Rotating[T]:
    """Copies made by ``make``, of ``nbytes`` each, until together they exceed four times the last-level
    cache."""
    return Rotating([make() for _ in range(copies_needed(nbytes, llc_bytes))])
