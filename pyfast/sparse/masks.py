"""Which weights stay: magnitude masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    return _two_of_four(magnitude) if format == "2:4" else _largest(magnitude, sparsity)


def check_sparsity(format: str, sparsity: float) -> None:
    """ValueError or TypeError where ``sparsity`` is not a share in [0, 1) that the format can hold."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise TypeError(f"sparsity: got {type(sparsity).__name__}, accepted: a number in [0, 1)")
    if not 0.0 <= sparsity < 1.0 or math.isnan(sparsity):
        raise ValueError(f"sparsity: got {sparsity}, accepted: [0, 1)")
    if format == "2:4" and sparsity != 0.5:
        raise ValueError(f'sparsity: got {sparsity}, accepted: 0.5 for format "2:4" (two of every four)')


def _two_of_four(magnitude: Tensor) -> Tensor:
    """An element stays if fewer than two of its group rank before it: larger, or equal and earlier."""
    n, k = magnitude.shape
    groups = torch.nn.functional.pad(magnitude, (0, -k % 4), value=-1.0).reshape(n, -1, 4).unbind(-1)
    kept = []
    for i, own in enumerate(groups):
        before = torch.zeros(own.shape, dtype=torch.int8, device=own.device)
        for j, other in enumerate(groups):
            if j != i:
                before += (other >= own) if j < i else (other > own)
        kept.append(before < 2)
    return torch.stack(kept, -1).reshape(n, -1)[:, :k]


def _largest(magnitude: Tensor, sparsity: float) -> Tensor:
    removed = round(sparsity * magnitude.numel())
    if removed == 0:
        return torch.ones_like(magnitude, dtype=torch.bool)
    flat = magnitude.flatten()
    threshold = flat.kthvalue(removed).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(-1)
    mask[ties[: flat.numel() - removed - int(mask.sum())]] = True
    return mask.reshape(magnitude.shape)
