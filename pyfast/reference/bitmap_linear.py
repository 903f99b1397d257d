"""The product with a bitmap weight: decompress, then the dense product."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from pyfast.reference import bitmap_convert


def bitmap_linear(x: Tensor, values: Tensor, bitmaps: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """x [tokens, k] to [tokens, n]; differentiable in x, values and bias."""
    dense = bitmap_convert.decompress(values, bitmaps, n, x.shape[-1])
    return linear(x, dense, bias)
