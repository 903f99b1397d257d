"""bitmask_convert: bitmap weights to and from a row-major bitmask.

Kernels: ``csrc/cpu/bitmask_convert*``; truth: ``pyfast/reference/bitmask_convert.py``. The functions here choose the
backend and expect tensors that agree; :meth:`pyfast.BitmapWeight.from_bitmask` is the public door.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast import backends
from pyfast.ops._library import LIBRARY, define
from pyfast.ops.bitmap_convert import tile_count
from pyfast.reference import bitmask_convert as reference
from pyfast.reference.bitmap_convert import TILE_ROWS

define(
    "bitmap_from_bitmask(Tensor compressed, Tensor bitmask, Tensor row_offsets, int k) "
    "-> (Tensor values, Tensor bitmaps, Tensor offsets)"
)
define(
    "bitmap_to_bitmask(Tensor values, Tensor bitmaps, Tensor offsets, int n, int k) "
    "-> (Tensor compressed, Tensor bitmask, Tensor row_offsets)"
)


def from_bitmask(compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """values [stored], bitmaps int64 [tiles, 16], offsets int64 [tiles + 1]."""
    if backends.select("bitmap_convert", compressed.device.type, compressed.dtype) == "native":
        return torch.ops.pyfast.bitmap_from_bitmask(compressed, bitmask, row_offsets, k)
    return reference.from_bitmask(compressed, bitmask, k)


def to_bitmask(values: Tensor, bitmaps: Tensor, offsets: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """compressed [stored], bitmask uint8 [n, ceil(k / 8)], row_offsets int64 [n]."""
    if backends.select("bitmap_convert", values.device.type, values.dtype) == "native":
        return torch.ops.pyfast.bitmap_to_bitmask(values, bitmaps, offsets, n, k)
    return reference.to_bitmask(values, bitmaps, n, k)


@torch.library.register_fake("pyfast::bitmap_from_bitmask", lib=LIBRARY)
def _fake_from(compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    tiles = tile_count(bitmask.shape[0], k)
    return (
        torch.empty_like(compressed),
        compressed.new_empty((tiles, TILE_ROWS), dtype=torch.int64),
        compressed.new_empty(tiles + 1, dtype=torch.int64),
    )


@torch.library.register_fake("pyfast::bitmap_to_bitmask", lib=LIBRARY)
def _fake_to(values: Tensor, bitmaps: Tensor, offsets: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(values),
        values.new_empty((n, -(-k // 8)), dtype=torch.uint8),
        values.new_empty(n, dtype=torch.int64),
    )
