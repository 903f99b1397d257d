"""What each weight is worth, and the mask that a score gives one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast.ops.nm_mask import nm_mask
from pyfast.sparse.masks import largest_of_all, largest_of_each_row
from pyfast.sparse.pruning.options import Options, make_options

_NEEDS = {"magnitude": None, "gradient": "gradient", "taylor": "gradient", "wanda": "norms"}


def importance(weight: Tensor, method: str, statistic: Tensor | None) -> Tensor:
    """Scores [N, K], 0 or above, in float32 (float64 for a float64 weight).

    ``magnitude`` |w|; ``gradient`` |g|; ``taylor`` |w · g|, the loss that leaves with w to first order; ``wanda``
    |w| · ‖x‖₂. ``statistic`` is E|g| [N, K], or ‖x‖₂ [K].
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    magnitude = weight.detach().to(dtype).abs()
    if statistic is None:
        return magnitude
    factor = statistic.to(dtype).abs()
    return factor if method == "gradient" else magnitude * factor


def mask_from(scores: Tensor, options: Options) -> Tensor:
    """Boolean mask [N, K] of one matrix by the pattern and the scope (row or layer) of ``options``."""
    if options.nm is not None:
        return nm_mask(scores, *options.nm)
    select = largest_of_each_row if options.scope == "row" else largest_of_all
    return select(scores, options.sparsity)


def choose_mask(
    weight: Tensor,
    method: str = "magnitude",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    scope: str | None = None,
    gradient: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """Boolean mask ``[N, K]`` of one weight, True where an element stays.

    Counts are exact, and of equal scores the first (by rows; in a group, the lower column) stays.

    Args:
        weight: floating ``[N, K]``.
        method: ``"magnitude"`` |w|, ``"gradient"`` |g|, ``"taylor"`` |w · g| (Molchanov et al., arXiv 1611.06440 and
            1906.10771, first order), ``"wanda"`` |w| · ‖x‖₂ (Sun et al., arXiv 2306.11695).
            (:func:`pyfast.sparse.sparsegpt` changes the kept weights too and is called by itself.)
        sparsity: share of the elements removed, in [0, 1); None for what an N:M pattern removes.
        pattern: ``"unstructured"``, or ``"N:M"``: N kept of every M columns.
        scope: with what an element competes: ``"row"`` removes round(sparsity · K) of every row, ``"layer"``
            round(sparsity · N · K) of the matrix. None: rows for ``"wanda"``, as its paper has it, else the matrix.
        gradient: ``[N, K]``, for ``"gradient"`` and ``"taylor"``.
        norms: ``[K]``, the norm of each input feature over all tokens, for ``"wanda"``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value, or scores that hold NaN.
    """
    if method not in _NEEDS:
        raise ValueError(f"method: got {method!r}, accepted for a mask alone: {', '.join(_NEEDS)}")
    options = make_options(method, sparsity, pattern, scope)
    if options.scope == "global":
        raise ValueError("scope: got 'global', accepted for one matrix: row, layer")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight: got {getattr(weight, 'dtype', type(weight).__name__)}, accepted: a floating tensor")
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {list(weight.shape)}, accepted: [N, K]")
    shapes = {"gradient": tuple(weight.shape), "norms": (weight.shape[1],)}
    for name, statistic in (("gradient", gradient), ("norms", norms)):
        if (statistic is not None) != (_NEEDS[method] == name):
            accepted = f"a tensor {list(shapes[name])}" if statistic is None else "None"
            got = "None" if statistic is None else "a tensor"
            raise TypeError(f"{name}: got {got}, accepted for {method}: {accepted}")
        if statistic is not None and tuple(statistic.shape) != shapes[name]:
            raise ValueError(f"{name}: got shape {list(statistic.shape)}, accepted: {list(shapes[name])}")
    scores = importance(weight, method, norms if gradient is None else gradient)
    if bool(scores.isnan().any()):
        raise ValueError("weight: its scores hold NaN, which has no rank")
    return mask_from(scores, options)
