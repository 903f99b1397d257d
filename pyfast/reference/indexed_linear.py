"""The product with an indexed layout: the lists back to a dense matrix, then the dense product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyfast.reference.epilogue import epilogue

UNIT = 4  # entries a list is a multiple of


def decompress(values: Tensor, columns: Tensor, starts: Tensor, n: int, k: int, panel: int, block: int) -> Tensor:
    """Dense float32 [n, k] of lists in the order of panel, block, row. Entries of one place add up: padding adds 0."""
    blocks = -(-k // block)
    lengths = starts.diff().to(torch.int64) * UNIT
    of_list = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    row = of_list // (blocks * panel) * panel + of_list % panel
    column = of_list // panel % blocks * block + columns
    dense = values.new_zeros(-(-n // panel) * panel, blocks * block)
    return dense.index_put_((row, column), values, accumulate=True)[:n, :k]


def indexed_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    n: int,
    panel: int,
    block: int,
    activation: int,
    mul: Tensor | None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
    dense = decompress(values, columns, starts, n, x.shape[-1], panel, block).to(x.dtype)
    return epilogue(linear(x, dense, bias), activation, mul)
