"""Bitmap weights to and from a row-major bitmask, in plain torch (docs/formats.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyfast.reference.bitmap_convert import bits_of, from_tiles, pack_tiles, to_tiles
from pyfast.reference.sparse24_convert import padded


def unpack(bitmask: Tensor, k: int) -> Tensor:
    """uint8 [n, ceil(k / 8)] to boolean [n, k]."""
    bits = bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bitmask.device) & 1
    return bits.reshape(bitmask.shape[0], 8 * bitmask.shape[1])[:, :k].bool()


def pack(bits: Tensor) -> Tensor:
    """Boolean [n, k] to uint8 [n, ceil(k / 8)]."""
    n, k = bits.shape
    eight = pad(bits, (0, padded(k, 8) - k)).reshape(n, -(-k // 8), 8)
    return (eight << torch.arange(8, device=bits.device)).sum(-1).to(torch.uint8)


def from_bitmask(compressed: Tensor, bitmask: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """values [stored], bitmaps int64 [tiles, 16], offsets int64 [tiles + 1]."""
    bits = unpack(bitmask, k)
    dense = compressed.new_zeros(bits.shape).masked_scatter(bits, compressed)
    tiles = to_tiles(bits)
    return to_tiles(dense)[tiles], *pack_tiles(tiles)


def to_bitmask(values: Tensor, bitmaps: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """compressed [stored], bitmask uint8 [n, ceil(k / 8)], row_offsets int64 [n]."""
    tiles = bits_of(bitmaps)
    bits = from_tiles(tiles, n, k)
    dense = from_tiles(values.new_zeros(tiles.shape).masked_scatter(tiles, values), n, k)
    counts = bits.sum(-1)
    return dense[bits], pack(bits), counts.cumsum(0) - counts
