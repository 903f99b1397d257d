"""Modules: :class:`SparseLinear`; :class:`DistillationLoss`, its schedules, and :class:`LogitDistillationLoss`."""

from pyfast.losses import DistillationLoss, DistillationLossOutput, LogitDistillationLoss
from pyfast.schedules import cosine_schedule, linear_schedule
from pyfast.sparse import SparseLinear

__all__ = [
    "DistillationLoss",
    "DistillationLossOutput",
    "LogitDistillationLoss",
    "SparseLinear",
    "cosine_schedule",
    "linear_schedule",
]
