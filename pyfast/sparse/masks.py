"""Which weights stay: from scores to a mask with an exact count, by row, by matrix, over several matrices, or N:M."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pyfast.ops.nm_mask import check_pattern, nm_mask

SCOPES = ("row", "layer", "global")
_DIGIT = 16  # bits of a score looked at in one pass over the matrices


def magnitude_mask(weight: Tensor, format: str, sparsity: float) -> Tensor:
    """Boolean mask [N, K], True where an element stays.

    ``"2:4"`` keeps the two largest of each group of four columns; ``"bitmap"`` keeps the largest
    N·K − round(sparsity·N·K) of the whole matrix. Of equal magnitudes the first stays.

    Raises:
        ValueError: sparsity outside [0, 1), other than 0.5 for 2:4, or a weight that holds NaN.
    """
    check_sparsity(format, sparsity)
    if bool(torch.isnan(weight).any()):
        raise ValueError("weight: holds NaN, which has no magnitude to rank")
    magnitude = weight.detach().abs()
    return nm_mask(magnitude, 2, 4) if format == "2:4" else largest_of_all(magnitude, sparsity)


def check_sparsity(format: str, sparsity: float) -> None:
    """ValueError or TypeError where ``sparsity`` is not a share in [0, 1) that the format can hold."""
    check_share(sparsity)
    if format == "2:4" and sparsity != 0.5:
        raise ValueError(f'sparsity: got {sparsity}, accepted: 0.5 for format "2:4" (two of every four)')


def check_share(sparsity: float) -> None:
    """ValueError or TypeError where ``sparsity`` is not a number in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise TypeError(f"sparsity: got {type(sparsity).__name__}, accepted: a number in [0, 1)")
    if not 0.0 <= sparsity < 1.0 or math.isnan(sparsity):
        raise ValueError(f"sparsity: got {sparsity}, accepted: [0, 1)")


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(n, m) of ``"n:m"`` (n kept of every m columns), None for ``"unstructured"``."""
    if not isinstance(pattern, str):
        raise TypeError(f"pattern: got {type(pattern).__name__}, accepted: 'unstructured' or 'N:M' such as '2:4'")
    if pattern == "unstructured":
        return None
    numbers = re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern)
    if numbers is None:
        raise ValueError(f"pattern: got {pattern!r}, accepted: 'unstructured' or 'N:M' such as '2:4'")
    n, m = int(numbers[1]), int(numbers[2])
    try:
        check_pattern(n, m)
    except ValueError as error:
        raise ValueError(f"pattern: got {pattern!r}; {error}") from None
    return n, m


def largest_of_each_row(scores: Tensor, sparsity: float) -> Tensor:
    """Mask [R, C] that removes the round(sparsity·C) smallest of every row; of equal ones the first stay."""
    columns = scores.shape[-1]
    removed = round(sparsity * columns)
    if removed == 0 or scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(removed, dim=-1, keepdim=True).values
    mask = scores > threshold
    free = columns - removed - mask.sum(-1)  # places of each row left for elements that equal its threshold
    rows, places = (scores == threshold).nonzero(as_tuple=True)
    count = torch.bincount(rows, minlength=len(scores))
    position = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    stay = position < free[rows]
    mask[rows[stay], places[stay]] = True
    return mask


def largest_of_all(scores: Tensor, sparsity: float) -> Tensor:
    """Mask that removes the round(sparsity·numel) smallest of a matrix; of equal ones the first, by rows, stay."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return Threshold(lambda: [scores], round(sparsity * scores.numel()), dtype).mask(scores)


class Threshold:
    """The line between removed and kept over several matrices, found without holding more than one at a time.

    Non-negative floats rank as their bits do. A histogram of the upper 16 bits of all scores says which value of them
    the threshold has, one of the next 16 bits among those scores refines it: two passes for float32, four for float64,
    each asking for the scores afresh. The count is exact, and of equal scores the first stay, in the order given.

    Args:
        scores: gives the matrices of non-negative scores, anew at every call.
        removed: how many of the smallest fall.
        dtype: float32 or float64, in which scores are compared.
    """

    def __init__(self, scores: Callable[[], Iterable[Tensor]], removed: int, dtype: torch.dtype = torch.float32):
        self._dtype = dtype
        self._key, self._free = -1, 0  # the bits of the largest score that falls; how many scores equal to it stay
        if removed > 0:
            self._find(scores, removed)

    def _find(self, scores: Callable[[], Iterable[Tensor]], removed: int) -> None:
        prefix = 0
        for shift in range(8 * self._dtype.itemsize - _DIGIT, -1, -_DIGIT):
            counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
            for matrix in scores():
                digits = self._keys(matrix).flatten() >> shift
                digits = digits[(digits >> _DIGIT) == prefix] & ((1 << _DIGIT) - 1)
                counts += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
            up_to = counts.cumsum(0)
            digit = int(torch.searchsorted(up_to, removed))
            removed -= int(up_to[digit] - counts[digit])
            prefix = prefix << _DIGIT | digit
        self._key, self._free = prefix, int(counts[digit]) - removed

    def mask(self, scores: Tensor) -> Tensor:
        """Mask of the next matrix: to be asked for once each, in their order."""
        keys = self._keys(scores)
        mask = keys > self._key
        ties = (keys == self._key).flatten().nonzero().squeeze(-1)[: self._free]
        self._free -= len(ties)
        mask.view(-1)[ties] = True
        return mask

    def _keys(self, scores: Tensor) -> Tensor:
        """Integers that rank as non-negative scores do: their bits (-0.0 first made +0.0)."""
        bits = torch.int64 if self._dtype == torch.float64 else torch.int32
        return (scores.to(self._dtype) + 0.0).contiguous().view(bits)
