"""Checks of the tensors of sparse weights, before a kernel sees them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, accepted: {', '.join(map(str, dtypes))}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, accepted: {list(shape)}")


def check_bitmask(
    shape: tuple[int, int] | Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor
) -> tuple[int, int]:
    """(N, K) of a row-major bitmask whose parts agree. ValueError names the one that does not."""
    numbers = shape.flatten().tolist() if isinstance(shape, Tensor) else list(shape)
    if len(numbers) != 2 or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"shape: got {numbers}, accepted: (out_features, in_features)")
    n, k = numbers
    if compressed.dim() != 1:
        raise ValueError(f"compressed: got shape {list(compressed.shape)}, accepted: flat, [stored]")
    check_tensor("bitmask", bitmask, (torch.uint8,), (n, -(-k // 8)))
    check_tensor("row_offsets", row_offsets, (torch.int64,), (n,))
    for name, tensor in (("bitmask", bitmask), ("row_offsets", row_offsets)):
        if tensor.device != compressed.device:
            raise ValueError(f"{name}: got device {tensor.device}, accepted: that of compressed, {compressed.device}")
    if k % 8 and bool((bitmask[:, -1] >> k % 8).any()):
        raise ValueError(f"bitmask: holds bits beyond column {k - 1}; the weight is damaged")
    words = bitmask.new_zeros(n, -(-k // 64), 8)
    words.view(n, 8 * words.shape[1])[:, : bitmask.shape[1]] = bitmask
    counts = popcount(words.view(torch.int64).squeeze(-1)).sum(-1)
    ends = counts.cumsum(0)
    if not torch.equal(row_offsets, ends - counts):
        raise ValueError("row_offsets: do not agree with the bitmask; the weight is damaged")
    stored = int(ends[-1]) if n else 0
    if compressed.numel() != stored:
        raise ValueError(
            f"compressed: got {compressed.numel()} elements, the bitmask holds {stored}; the weight is damaged"
        )
    return n, k


def popcount(words: Tensor) -> Tensor:
    """Set bits of each int64: sums of neighbouring fields of 1, 2, 4 bits, then of the eight bytes."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return sum(((x >> shift) & 0xFF for shift in range(0, 64, 8)), torch.zeros_like(x))
