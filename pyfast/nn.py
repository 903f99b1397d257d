"""Modules: :class:`SparseLinear` and :class:`DistillationLoss`."""

from pyfast.losses import DistillationLoss
from pyfast.sparse import SparseLinear

__all__ = ["DistillationLoss", "SparseLinear"]
