"""The N:M mask in plain torch: a stable sort of every group."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Boolean mask of ``scores`` [rows, k]: the ``n`` largest of every ``m`` columns, of equal ones the first."""
    rows, k = scores.shape
    ranked = torch.where(scores.isnan(), -math.inf, scores)
    groups = pad(ranked, (0, -k % m), value=-math.inf).reshape(rows, -(-k // m), m)
    largest = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, largest, True)
    return mask.flatten(1)[:, :k]
