"""Measured constants as JSON gives them back, checked one by one."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> float:
    """A time or a rate: finite, not negative. ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no time")
    return float(value)


def sized(values: Any, size: int) -> list[Any]:
    """The entries of a list of ``size`` of them. ValueError otherwise."""
    if not isinstance(values, list | tuple) or len(values) != size:
        raise ValueError(f"{size} values were expected")
    return list(values)
