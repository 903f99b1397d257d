"""The ops: schema, fake, autograd and public function, one file an op. Importing this package defines them all."""

from pyfast.ops import (
    bitmap_convert,
    bitmap_linear,
    distill_kl,
    nm_mask,
    scattered_linear,
    shard_distill,
    sliced_linear,
    sparse24_convert,
    sparse24_linear,
)

__all__ = [
    "bitmap_convert",
    "bitmap_linear",
    "distill_kl",
    "nm_mask",
    "scattered_linear",
    "shard_distill",
    "sliced_linear",
    "sparse24_convert",
    "sparse24_linear",
]
