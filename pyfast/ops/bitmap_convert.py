"""bitmap_convert: dense weights to and from bitmap form.

Kernels: ``csrc/cpu/bitmap_convert*``, ``csrc/cuda/bitmap_convert*``; truth: ``pyfast/reference/bitmap_convert.py``. The
functions here choose the backend; :class:`pyfast.BitmapWeight` is the public door.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyfast import backends
from pyfast.ops._library import LIBRARY, define
from pyfast.reference import bitmap_convert as reference
from pyfast.reference.bitmap_convert import TILE_COLUMNS, TILE_ROWS
from pyfast.reference.sparse24_convert import padded

define("bitmap_compress(Tensor dense) -> (Tensor values, Tensor bitmaps, Tensor offsets)")
define("bitmap_decompress(Tensor values, Tensor bitmaps, Tensor offsets, int n, int k) -> Tensor")
define("bitmap_gather(Tensor dense, Tensor bitmaps, Tensor offsets, int stored) -> Tensor")


# The first half of bitmap_compress on CUDA: bitmaps and the number of values of each tile.
define("bitmap_scan(Tensor dense) -> (Tensor bitmaps, Tensor counts)")


def tile_count(n: int, k: int) -> int:
    """Tiles of 16 × 64 that cover [n, k]."""
    return padded(n, TILE_ROWS) // TILE_ROWS * (padded(k, TILE_COLUMNS) // TILE_COLUMNS)


def compress(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values [stored], bitmaps int64 [tiles, 16], offsets int64 [tiles + 1]."""
    if backends.select("bitmap_convert", dense.device.type, dense.dtype) == "reference":
        return reference.compress(dense)
    return torch.ops.pyfast.bitmap_compress(dense)


def decompress(values: Tensor, bitmaps: Tensor, offsets: Tensor, n: int, k: int) -> Tensor:
    """Dense [n, k], bit for bit."""
    if backends.select("bitmap_convert", values.device.type, values.dtype) == "reference":
        return reference.decompress(values, bitmaps, n, k)
    return torch.ops.pyfast.bitmap_decompress(values, bitmaps, offsets, n, k)


def gather(dense: Tensor, bitmaps: Tensor, offsets: Tensor, stored: int) -> Tensor:
    """The ``stored`` elements of ``dense`` [n, k] at the places of the bitmap."""
    if backends.select("bitmap_convert", dense.device.type, dense.dtype) == "reference":
        return reference.gather(dense, bitmaps)
    return torch.ops.pyfast.bitmap_gather(dense, bitmaps, offsets, stored)


@torch.library.register_fake("pyfast::bitmap_compress", lib=LIBRARY)
def _fake_compress(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tiles = tile_count(dense.shape[0], dense.shape[1])
    stored = torch.library.get_ctx().new_dynamic_size()
    return (
        dense.new_empty(stored),
        dense.new_empty((tiles, TILE_ROWS), dtype=torch.int64),
        dense.new_empty(tiles + 1, dtype=torch.int64),
    )


@torch.library.impl(LIBRARY, "bitmap_compress", "CUDA")
def _cuda_compress(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bitmaps, counts = torch.ops.pyfast.bitmap_scan(dense)
    offsets = pad(counts.cumsum(0), (1, 0))
    return torch.ops.pyfast.bitmap_gather(dense, bitmaps, offsets, int(offsets[-1])), bitmaps, offsets


@torch.library.register_fake("pyfast::bitmap_scan", lib=LIBRARY)
def _fake_scan(dense: Tensor) -> tuple[Tensor, Tensor]:
    tiles = tile_count(dense.shape[0], dense.shape[1])
    return dense.new_empty((tiles, TILE_ROWS), dtype=torch.int64), dense.new_empty(tiles, dtype=torch.int64)


@torch.library.register_fake("pyfast::bitmap_decompress", lib=LIBRARY)
def _fake_decompress(values: Tensor, bitmaps: Tensor, offsets: Tensor, n: int, k: int) -> Tensor:
    return values.new_empty(n, k)


@torch.library.register_fake("pyfast::bitmap_gather", lib=LIBRARY)
def _fake_gather(dense: Tensor, bitmaps: Tensor, offsets: Tensor, stored: int) -> Tensor:
    return dense.new_empty(stored)
