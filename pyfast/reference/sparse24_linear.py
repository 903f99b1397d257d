"""The product with a 2:4 weight: decompress, then the dense product."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from pyfast.reference import sparse24_convert


def sparse24_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, k] to [tokens, n]; differentiable in x, values and bias."""
    dense = sparse24_convert.decompress(values, metadata, values.shape[0], x.shape[-1])
    return linear(x, dense, bias)
