"""A number that is another one whenever another kernel may serve a call from now on: with the ISA, the calibration of
the device and the layouts that are allowed. Whoever remembers a choice remembers it with this number. It is what it was
when an ISA comes back."""

from __future__ import annotations

_STEP = 16  # more than there are ISAs
number = 0


def rise() -> None:
    """Says that choices may be others now."""
    global number
    number += _STEP


def set_isa(place: int) -> int:
    """Says that from now on the ISA of this place serves, 0 the one at the start; returns the place before."""
    global number
    before = number % _STEP
    number += place - before
    return before
