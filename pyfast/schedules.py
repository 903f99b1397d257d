"""Weights that change over training: callables from the step to a number, for :class:`pyfast.nn.DistillationLoss`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyfast.ops import _arguments as arguments


@dataclass(frozen=True)
class Schedule:
    """From ``start`` at step 0 to ``end`` at ``steps``, and ``end`` after it, in a ``shape``: linear or cosine.

    Raises:
        TypeError, ValueError: a value below 0 or not finite, ``steps`` below 1.
    """

    start: float
    end: float
    steps: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        arguments.not_negative("start", self.start)
        arguments.not_negative("end", self.end)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: got {self.steps!r}, accepted: an integer of at least 1")
        if self.shape not in ("linear", "cosine"):
            raise ValueError(f"shape: got {self.shape!r}, accepted: linear, cosine")

    def __call__(self, step: int) -> float:
        share = min(max(step / self.steps, 0.0), 1.0)
        if self.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return (1.0 - share) * self.start + share * self.end


def linear_schedule(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` in equal parts to ``end`` in ``steps`` steps."""
    return Schedule(start, end, steps)


def cosine_schedule(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` along half a cosine to ``end`` in ``steps`` steps: slow, fast, slow."""
    return Schedule(start, end, steps, "cosine")
