"""The product with a sliced layout: the entries back to a dense matrix, then the dense product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyfast.reference.epilogue import epilogue
from pyfast.reference.sparse24_convert import stored

SLICE_ROWS = 32
CHUNK_ENTRIES = 8  # of a row


def unpack_deltas(deltas: Tensor) -> Tensor:
    """uint8 [chunks, 32, bits] to the distances of the entries [chunks, 32, 8]."""
    if deltas.shape[-1] == CHUNK_ENTRIES:
        return deltas
    return torch.cat([deltas & 15, deltas >> 4], -1)


def pack_deltas(distances: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`unpack_deltas`, for distances that fit ``bits`` (4 or 8) bits."""
    if bits == CHUNK_ENTRIES:
        return distances
    return distances[..., :4] | distances[..., 4:] << 4


def decompress(values: Tensor, deltas: Tensor, ends: Tensor, rows: Tensor, n: int, k: int) -> Tensor:
    """Dense [n, k], bit for bit. Entries of +0.0 stand for nothing."""
    slices = torch.searchsorted(ends, torch.arange(len(values), device=ends.device, dtype=ends.dtype), right=True)
    reached = unpack_deltas(deltas).sum(-1, dtype=torch.int64).cumsum(0)
    before = torch.cat([reached.new_zeros(1, SLICE_ROWS), reached])
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])[slices]
    columns = unpack_deltas(deltas).to(torch.int64).cumsum(-1) + (before[:-1] - before[begins]).unsqueeze(-1)
    chunk, lane, entry = stored(values).nonzero(as_tuple=True)
    dense = values.new_zeros(n, k)
    dense[rows[slices[chunk], lane].long(), columns[chunk, lane, entry]] = values[chunk, lane, entry]
    return dense


def sliced_linear(
    x: Tensor,
    values: Tensor,
    deltas: Tensor,
    ends: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    n: int,
    activation: int,
    mul: Tensor | None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
    return epilogue(linear(x, decompress(values, deltas, ends, rows, n, x.shape[-1]), bias), activation, mul)
