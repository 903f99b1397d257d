"""A number that rises whenever another kernel may serve a call from now on: with the ISA, the calibration of the device
and the layouts that are allowed. Whoever remembers a choice remembers it with this number."""

from __future__ import annotations

number = 0


def rise() -> None:
    """Says that choices may be others now."""
    global number
    number += 1
