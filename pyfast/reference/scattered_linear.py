"""The product with a scattered layout: the entries back to a dense matrix, then the dense product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from pyfast.reference.epilogue import epilogue
from pyfast.reference.sliced_linear import unpack_deltas

IMAGE_ROWS, IMAGE_COLUMNS = 64, 64
LANES = 32
LINES = 64  # of 32 words of two elements
WAY = 2 * LINES  # of a lane: the lower halves of its words, then the upper ones
LINE_BYTES = 512  # from a line to the next: those of the four warps of a block lie between each other

# An image as the weight has it, [row tile, register's row half, row pair, row of it; half of the columns, t, step of
# it, register's column half, half of the word], and as it lies in shared memory: halves of words, lines, lanes.
_WEIGHT_ORDER = (4, 2, 4, 2, 2, 4, 2, 2, 2)
_TO_PLACES = (8, 0, 4, 6, 2, 3, 5, 7, 1)
_PLACE_ORDER = tuple(_WEIGHT_ORDER[axis] for axis in _TO_PLACES)
_TO_WEIGHT = tuple(_TO_PLACES.index(axis) for axis in range(9))


def to_images(dense: Tensor) -> Tensor:
    """A weight [n, k] as [tiles, 128, 32]: what each lane finds on its way, zeros beyond the weight."""
    n, k = dense.shape
    whole = pad(dense, (0, -k % IMAGE_COLUMNS, 0, -n % IMAGE_ROWS))
    down, across = whole.shape[0] // IMAGE_ROWS, whole.shape[1] // IMAGE_COLUMNS
    rows, columns = _WEIGHT_ORDER[:4], _WEIGHT_ORDER[4:]
    axes = whole.view(down, *rows, across, *columns).permute(0, 5, 1, 2, 3, 4, *range(6, 11))
    return axes.permute(0, 1, *(axis + 2 for axis in _TO_PLACES)).reshape(-1, WAY, LANES)


def from_images(images: Tensor, n: int, k: int) -> Tensor:
    """The inverse of :func:`to_images`."""
    across = -(-k // IMAGE_COLUMNS)
    axes = images.reshape(-1, across, *_PLACE_ORDER).permute(0, 1, *(axis + 2 for axis in _TO_WEIGHT))
    whole = axes.permute(0, 2, 3, 4, 5, 1, *range(6, 11)).reshape(-1, across * IMAGE_COLUMNS)
    return whole[:n, :k].contiguous()


def decompress(values: Tensor, deltas: Tensor, extras: Tensor, ends: Tensor, n: int, k: int) -> Tensor:
    """Dense [n, k], bit for bit."""
    tiles, device = len(ends) - 1, values.device
    bits = torch.zeros(tiles, WAY, LANES, dtype=torch.int16, device=device)
    counts = ends.diff(dim=0).long()
    tile = torch.repeat_interleave(counts[:, 0])
    distances = unpack_deltas(deltas).to(torch.int64)
    reached = pad(distances.sum(-1).cumsum(0), (0, 0, 1, 0))
    way = distances.cumsum(-1) + (reached[:-1] - reached[ends[:-1].long()[tile, 0]]).unsqueeze(-1) - 1
    lane = torch.arange(LANES, device=device)[:, None]
    bits[tile[:, None, None], way, lane] = values.view(torch.int16)
    words = extras.long()
    offset = words >> 16
    line, byte = offset // LINE_BYTES, offset % LINE_BYTES
    bits[torch.repeat_interleave(counts[:, 1])[:, None], byte % 4 // 2 * LINES + line, byte // 4] = words.short()
    return from_images(bits.view(values.dtype), n, k)


def scattered_linear(
    x: Tensor,
    values: Tensor,
    deltas: Tensor,
    extras: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    n: int,
    activation: int,
    mul: Tensor | None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
    return epilogue(linear(x, decompress(values, deltas, extras, ends, n, x.shape[-1]), bias), activation, mul)
