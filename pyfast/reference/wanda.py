"""Wanda's choice in plain torch (Sun et al., A Simple and Effective Pruning Approach for LLMs, arXiv 2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast.reference.nm_mask import nm_mask


def wanda(weight: Tensor, inputs: Tensor, sparsity: float, nm: tuple[int, int] | None = None) -> Tensor:
    """Boolean mask [N, K] of ``weight``, True kept, from ``inputs`` [tokens, K] of the layer; in float64.

    S = |W| · ‖X‖₂ (equation 1), the norm of each input feature over all tokens. The comparison group is the row:
    round(sparsity · K) of each fall, the smallest S; or all but n of every m columns.
    """
    scores = weight.double().abs() * inputs.double().norm(dim=0)
    if nm is not None:
        return nm_mask(scores, *nm)
    kept = weight.shape[1] - round(sparsity * weight.shape[1])
    largest = scores.argsort(dim=1, descending=True, stable=True)[:, :kept]
    return torch.zeros_like(weight, dtype=torch.bool).scatter(1, largest, True)
