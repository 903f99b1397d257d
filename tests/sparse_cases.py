"""Weights for the sparse tests."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = [(1, 1), (1, 64), (3, 4), (16, 64), (17, 65), (5, 31), (33, 130), (64, 256), (130, 896), (48, 4096)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding the result to the dtype, and float32 sums in another order.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def mask_24(weight: Tensor) -> Tensor:
    """The two largest of every four columns."""
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight.abs().float(), (0, -k % 4)).reshape(n, -1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.topk(2, -1).indices, True)
    return keep.reshape(n, -1)[:, :k]


def weight_24(n: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(n, k).to(dtype)
    return torch.where(mask_24(weight), weight, 0)


def weight_unstructured(n: int, k: int, sparsity: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.where(torch.rand(n, k) >= sparsity, torch.randn(n, k).to(dtype), 0)


def awkward(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Full rows, empty rows, one element, −0.0, NaN, infinities and the smallest subnormal."""
    weight = weight_unstructured(n, k, 0.7, dtype)
    special = [-0.0, float("nan"), float("inf"), -float("inf"), float(torch.finfo(dtype).smallest_normal) / 2]
    weight[0] = torch.randn(k).to(dtype)
    if n > 2:
        weight[1] = 0
        weight[2] = 0
        weight[2, k // 2] = 3.0
    for i, value in enumerate(special):
        if 3 + i < n:
            weight[3 + i, (7 * i) % k] = value
    return weight


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: NaN and the sign of zero count."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
