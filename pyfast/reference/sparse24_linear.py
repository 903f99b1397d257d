"""The product with a 2:4 weight: decompress, then the dense product."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from pyfast.reference import sparse24_convert
from pyfast.reference.epilogue import epilogue


def scaled(dense: Tensor, scales: Tensor | None, x: Tensor) -> Tensor:
    """A dense weight [n, k] of int8 and its scales [n] as numbers of x's dtype; any other weight as it is."""
    return dense if scales is None else (dense * scales[:, None]).to(x.dtype)


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    activation: int,
    mul: Tensor | None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]; differentiable in x, values and bias."""
    dense = scaled(sparse24_convert.decompress(values, metadata, values.shape[0], x.shape[-1]), scales, x)
    return epilogue(linear(x, dense, bias), activation, mul)
