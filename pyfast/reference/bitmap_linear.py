"""The product with a bitmap weight: decompress, then the dense product."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from pyfast.reference import bitmap_convert
from pyfast.reference.epilogue import epilogue
from pyfast.reference.sparse24_linear import scaled


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmaps: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    activation: int,
    mul: Tensor | None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]; differentiable in x, values and bias."""
    dense = scaled(bitmap_convert.decompress(values, bitmaps, n, x.shape[-1]), scales, x)
    return epilogue(linear(x, dense, bias), activation, mul)
