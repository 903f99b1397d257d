"""Bitmap weights to and from dense, in plain torch (docs/formats.md).

Everything is a permutation of elements: dense [n, k] is padded to whole tiles of 16 × 64 and re-ordered as
[tile, row, column]; the stored elements of that order, one after another, are the values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyfast.reference.sparse24_convert import padded, stored

TILE_ROWS, TILE_COLUMNS = 16, 64


def to_tiles(dense: Tensor) -> Tensor:
    """[n, k] to [tiles, 16 rows, 64 columns], zeros in the padding."""
    n, k = dense.shape
    whole = pad(dense, (0, padded(k, TILE_COLUMNS) - k, 0, padded(n, TILE_ROWS) - n))
    tiles = whole.reshape(whole.shape[0] // TILE_ROWS, TILE_ROWS, whole.shape[1] // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.transpose(1, 2).reshape(-1, TILE_ROWS, TILE_COLUMNS)


def from_tiles(tiles: Tensor, n: int, k: int) -> Tensor:
    """The inverse of :func:`to_tiles`."""
    rows, columns = padded(n, TILE_ROWS), padded(k, TILE_COLUMNS)
    whole = tiles.reshape(rows // TILE_ROWS, columns // TILE_COLUMNS, TILE_ROWS, TILE_COLUMNS).transpose(1, 2)
    return whole.reshape(rows, columns)[:n, :k]


def bits_of(bitmaps: Tensor) -> Tensor:
    """int64 [tiles, 16] to boolean [tiles, 16 rows, 64 columns]."""
    return (bitmaps.unsqueeze(-1) >> torch.arange(64, device=bitmaps.device)) & 1 == 1


def pack_tiles(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Boolean [tiles, 16 rows, 64 columns] to bitmaps int64 [tiles, 16] and offsets int64 [tiles + 1]."""
    bitmaps = (bits.to(torch.int64) << torch.arange(64, device=bits.device)).sum(-1)
    counts = bits.sum((1, 2))
    return bitmaps, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def compress(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values [stored], bitmaps int64 [tiles, 16], offsets int64 [tiles + 1]."""
    tiles = to_tiles(dense)
    bits = stored(tiles)
    return tiles[bits], *pack_tiles(bits)


def decompress(values: Tensor, bitmaps: Tensor, n: int, k: int) -> Tensor:
    """Dense [n, k]."""
    bits = bits_of(bitmaps)
    tiles = values.new_zeros(bits.shape).masked_scatter(bits, values)
    return from_tiles(tiles, n, k)


def gather(dense: Tensor, bitmaps: Tensor) -> Tensor:
    """The elements of ``dense`` at the stored places: [stored]."""
    return to_tiles(dense)[bits_of(bitmaps)]
