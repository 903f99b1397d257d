"""SparseGPT in plain torch, one column at a time, with the inverse Hessian itself (Frantar and Alistarh,
SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv 2301.00774)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast.reference.nm_mask import nm_mask


def damped(hessian: Tensor, dampening: float) -> tuple[Tensor, Tensor]:
    """The Hessian in float64 with ``dampening`` times the mean of its diagonal added to the diagonal; and which
    features no token ever uses: there the diagonal is 1 first, since nothing depends on them."""
    hessian = hessian.double().clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1.0
    hessian.diagonal().add_(dampening * hessian.diagonal().mean())
    return hessian, unused


def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, nm: tuple[int, int] | None, block_size: int, dampening: float
) -> tuple[Tensor, Tensor]:
    """New weight (float64) and mask [N, K] for H = 2 X Xᵀ / tokens [K, K] of the layer's inputs.

    Columns are settled from left to right. With H_c⁻¹ the inverse of the Hessian over columns c, c + 1, … (those not
    settled), a weight removed from column c costs w_c² / [H_c⁻¹]_00 and is made up for by adding

        − w_c / [H_c⁻¹]_00 · [H_c⁻¹]_0:

    to the row's other weights that are not settled (section 3.1, equation 3). The mask is chosen by that cost: for
    ``block_size`` columns at once over all rows, so that round(sparsity · N · c) have fallen in the first c columns, or
    for every m columns, of which each row keeps n.
    """
    weight = weight.double().clone()
    hessian, unused = damped(hessian, dampening)
    weight[:, unused] = 0.0
    rows, columns = weight.shape
    mask = torch.ones_like(weight, dtype=torch.bool)
    width = block_size if nm is None else nm[1]
    for c in range(columns):
        if c % width == 0:
            group = slice(c, min(c + width, columns))
            costs = torch.stack(
                [weight[:, i] ** 2 / torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(columns)[group]], dim=1
            )
            if nm is not None:
                mask[:, group] = nm_mask(costs, *nm)
            else:
                falling = round(sparsity * rows * group.stop) - round(sparsity * rows * group.start)
                flat = torch.ones(costs.numel(), dtype=torch.bool)
                flat[costs.flatten().argsort(descending=True, stable=True)[costs.numel() - falling :]] = False
                mask[:, group] = flat.reshape(costs.shape)
        inverse = torch.linalg.inv(hessian[c:, c:])
        error = torch.where(mask[:, c], 0.0, weight[:, c]) / inverse[0, 0]
        weight[:, c:] -= error.unsqueeze(1) * inverse[0]
        weight[~mask[:, c], c] = 0.0
    return weight, mask
