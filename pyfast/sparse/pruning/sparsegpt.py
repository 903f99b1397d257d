"""SparseGPT for one matrix: the mask, and what the kept weights take over from the removed ones.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (arXiv 2301.00774). The
same result column by column, with the inverse Hessian itself: ``pyfast/reference/sparsegpt.py``.

    columns      c0 … c1        c1 … K
               ┌─────────┬────────────────┐   inside a block: one rank-one update a column
    Wᵀ row c → │ settled │ not yet        │   beyond it: one product of the block's errors, [K − c1, B] · [B, N],
               └─────────┴────────────────┘   so that the matrix is touched K / B times and not K times

Rows of the upper Cholesky factor U of the inverse Hessian (H⁻¹ = Uᵀ U) are what the updates need: row c of U is row 0
of the inverse over columns c … K, divided by the square root of its first element (section 3.3 of the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast.ops.nm_mask import nm_mask
from pyfast.sparse.masks import Threshold, parse_pattern
from pyfast.sparse.pruning.options import make_options

_RETRIES = 3  # each with ten times the dampening


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    dampening: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prunes one weight [N, K] so that its outputs on given inputs change little.

    Args:
        weight: floating ``[N, K]``; not changed.
        hessian: ``[K, K]``, H = 2 Xᵀ X / tokens for inputs X ``[tokens, K]`` of the layer (any factor serves).
        sparsity: share of the elements removed, in [0, 1); None for what an N:M pattern removes.
        pattern: ``"unstructured"``, or ``"N:M"``: N kept of every M columns.
        dampening: times the mean of the diagonal of H, added to the diagonal. Where the factorization fails all the
            same, ten times as much is tried, up to three times.
        block_size: columns whose mask is chosen at once (brought to a multiple of M), and updated at once.

    Returns:
        The new weight in the dtype of ``weight``, +0.0 where removed, and the boolean mask ``[N, K]``, True kept.
        Unstructured, round(sparsity · N · c) elements have fallen in the first c columns, c at the end of each block.

    Raises:
        TypeError, ValueError: a wrong argument, a weight or Hessian that is not finite, or one that no dampening makes
            positive definite.
    """
    options = make_options("sparsegpt", sparsity, pattern, None, dampening, block_size)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight: got {getattr(weight, 'dtype', type(weight).__name__)}, accepted: a floating tensor")
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {list(weight.shape)}, accepted: [N, K]")
    if not isinstance(hessian, Tensor) or not hessian.is_floating_point():
        raise TypeError(f"hessian: got {getattr(hessian, 'dtype', type(hessian).__name__)}, accepted: floating")
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian: got shape {list(hessian.shape)}, accepted: [{columns}, {columns}]")
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: holds NaN or infinity")
    factor, unused = inverse_factor(hessian, options.dampening)
    return solve(weight, factor, unused, options.sparsity, options.pattern, options.block_size)


def inverse_factor(hessian: Tensor, dampening: float) -> tuple[Tensor, Tensor]:
    """U [K, K], upper triangular with H⁻¹ = Uᵀ U for the damped Hessian, and which features no token uses [K].

    H read from its last row to its first has a lower factor L; read back, H = R Rᵀ with R upper triangular, and
    U = R⁻¹: one factorization and one triangular inverse, without ever forming H⁻¹.
    """
    dtype = torch.float64 if hessian.dtype == torch.float64 else torch.float32
    hessian = hessian.detach().to(dtype, copy=True)
    diagonal = hessian.diagonal()
    unused = diagonal == 0
    diagonal[unused] = 1.0
    base = diagonal.clone()
    for attempt in range(1 + _RETRIES):
        diagonal.copy_(base + dampening * 10**attempt * base.mean())
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not bool(failed):
            upper = lower.flip(0, 1)
            identity = torch.eye(len(upper), dtype=dtype, device=upper.device)
            return torch.linalg.solve_triangular(upper, identity, upper=True), unused
    raise ValueError(f"hessian: not positive definite, even with {dampening * 10**_RETRIES:g} of its mean added")


def solve(
    weight: Tensor, factor: Tensor, unused: Tensor, sparsity: float, pattern: str, block_size: int
) -> tuple[Tensor, Tensor]:
    """New weight and mask from the factor of :func:`inverse_factor`."""
    nm = parse_pattern(pattern)
    rows, columns = weight.shape
    # Transposed, in the factor's dtype: a column of W is a contiguous row.
    wt = weight.detach().T.to(factor.dtype, copy=True).contiguous()
    wt[unused] = 0.0
    keep = torch.ones_like(wt, dtype=torch.bool)
    step = block_size if nm is None else max(nm[1], block_size // nm[1] * nm[1])
    for begin in range(0, columns, step):
        end = min(begin + step, columns)
        block, kept, upper = wt[begin:end], keep[begin:end], factor[begin:end, begin:end]
        scale = upper.diagonal().unsqueeze(1)  # the square root of [H_c⁻¹]_00
        if nm is None:
            falling = round(sparsity * rows * end) - round(sparsity * rows * begin)
            costs = (block / scale).abs_().T
            kept.copy_(Threshold(lambda costs=costs: [costs], falling, factor.dtype).mask(costs).T)  # type: ignore[misc]
        errors = torch.empty_like(block)
        for c in range(end - begin):
            if nm is not None and c % nm[1] == 0:
                group = slice(c, c + nm[1])
                kept[group] = nm_mask((block[group] / scale[group]).abs_().T, *nm).T
            removed = block[c].masked_fill(kept[c], 0.0)
            block[c] -= removed
            torch.div(removed, upper[c, c], out=errors[c])
            block[c + 1 :].addr_(upper[c, c + 1 :], errors[c], alpha=-1.0)
        wt[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1.0)
    mask = keep.T.contiguous()
    return wt.T.contiguous().to(weight.dtype), mask
