"""sparse24_convert: dense weights to and from 2:4 form.

Kernels: ``csrc/cpu/sparse24_convert*``, ``csrc/cuda/sparse24_convert*``; truth:
``pyfast/reference/sparse24_convert.py``. The functions here choose the backend; :class:`pyfast.Sparse24Weight` is
the public door.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast import backends
from pyfast.ops._library import LIBRARY, define
from pyfast.reference import sparse24_convert as reference
from pyfast.reference.sparse24_convert import COLUMN_UNIT, padded

define("sparse24_compress(Tensor dense) -> (Tensor values, Tensor metadata, Tensor violation)")
define("sparse24_prune(Tensor dense, Tensor? scores) -> (Tensor values, Tensor metadata)")
define("sparse24_decompress(Tensor values, Tensor metadata, int n, int k) -> Tensor")
define("sparse24_gather(Tensor dense, Tensor metadata) -> Tensor")


def compress(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values, metadata and the position of a group that is not 2:4 (int64 [1], -1 where none is)."""
    if backends.select("sparse24_convert", dense.device.type, dense.dtype) == "reference":
        return reference.compress(dense)
    return torch.ops.pyfast.sparse24_compress(dense)


def prune(dense: Tensor, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """values and metadata of the two elements of every group with the largest magnitude, or the largest of ``scores``
    (float32 [n, k]); of equals the earlier."""
    if backends.select("sparse24_convert", dense.device.type, dense.dtype) == "cuda":
        return torch.ops.pyfast.sparse24_prune(dense, scores)
    return reference.prune(dense, scores)


def decompress(values: Tensor, metadata: Tensor, n: int, k: int) -> Tensor:
    """Dense [n, k], bit for bit."""
    if backends.select("sparse24_convert", values.device.type, values.dtype) == "reference":
        return reference.decompress(values, metadata, n, k)
    return torch.ops.pyfast.sparse24_decompress(values, metadata, n, k)


def gather(dense: Tensor, metadata: Tensor) -> Tensor:
    """The elements of ``dense`` [n, k] at the kept places: [n, padded k / 2]."""
    if backends.select("sparse24_convert", dense.device.type, dense.dtype) == "reference":
        return reference.gather(dense, metadata)
    return torch.ops.pyfast.sparse24_gather(dense, metadata)


@torch.library.register_fake("pyfast::sparse24_compress", lib=LIBRARY)
def _fake_compress(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, k = dense.shape[0], padded(dense.shape[1], COLUMN_UNIT)
    return (
        dense.new_empty(n, k // 2),
        dense.new_empty((n, k // 16), dtype=torch.int16),
        dense.new_empty(1, dtype=torch.int64),
    )


@torch.library.register_fake("pyfast::sparse24_prune", lib=LIBRARY)
def _fake_prune(dense: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    values, metadata, _ = _fake_compress(dense)
    return values, metadata


@torch.library.register_fake("pyfast::sparse24_decompress", lib=LIBRARY)
def _fake_decompress(values: Tensor, metadata: Tensor, n: int, k: int) -> Tensor:
    return values.new_empty(n, k)


@torch.library.register_fake("pyfast::sparse24_gather", lib=LIBRARY)
def _fake_gather(dense: Tensor, metadata: Tensor) -> Tensor:
    return dense.new_empty(metadata.shape[0], 8 * metadata.shape[1])
