"""The product with an indexed layout: the quads back to a dense matrix, then the dense product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyfast.reference.epilogue import epilogue

QUAD = 4  # rows side by side


def decompress(
    values: Tensor, columns: Tensor, starts: Tensor, rows: Tensor, n: int, k: int, panel: int, block: int
) -> Tensor:
    """Dense float32 [n, k] of quads in the order of panel, block, length. What fills up a quad lies in a column of its
    own, behind those of its block. Pairs, [steps, 4, 2], are two steps of single entries."""
    if values.dim() == 3:
        values, columns = (t.transpose(1, 2).flatten(0, 1) for t in (values.float(), columns))
        starts = 2 * starts
    panels, blocks, quads = -(-n // panel), -(-k // block), panel // QUAD
    of_step = torch.repeat_interleave(torch.arange(len(rows), device=values.device), starts.diff().to(torch.int64))
    row = (of_step // (blocks * quads) * panel)[:, None] + rows[of_step]
    block_of_step = (of_step // quads % blocks)[:, None]
    dense = values.new_zeros(panels * panel, blocks, block + 1)
    dense.index_put_((row, block_of_step.expand_as(row), columns.to(torch.int64)), values, accumulate=True)
    return dense[:n, :, :block].flatten(1)[:, :k]


def indexed_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    n: int,
    panel: int,
    block: int,
    activation: int,
    mul: Tensor | None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
    dense = decompress(values, columns, starts, rows, n, x.shape[-1], panel, block).to(x.dtype)
    return epilogue(linear(x, dense, bias), activation, mul)
