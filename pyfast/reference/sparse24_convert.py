"""2:4 weights to and from dense, in plain torch (docs/formats.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

COLUMN_UNIT = 32  # columns are padded to a multiple of this

# For each mask of stored columns (bit c = column c): the kept pair, or (0, 0) where more than two are stored.
_PAIRS = (
    (0, 1), (0, 1), (0, 1), (0, 1), (0, 2), (0, 2), (1, 2), (0, 0),
    (0, 3), (0, 3), (1, 3), (0, 0), (2, 3), (0, 0), (0, 0), (0, 0),
)  # fmt: skip


def stored(dense: Tensor) -> Tensor:
    """Which elements are stored: all whose bits are not those of +0.0, so that −0.0 survives."""
    return (dense != 0) | torch.signbit(dense)


def padded(columns: int, unit: int) -> int:
    """``columns`` rounded up to a multiple of ``unit``."""
    return -(-columns // unit) * unit


def compress(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values [n, k/2], metadata int16 [n, k/16] and int64 [1]: the position row * k + column of a group that is not
    2:4, or -1."""
    n, k = dense.shape
    groups = pad(dense, (0, padded(k, COLUMN_UNIT) - k)).reshape(n, -1, 4)
    mask = (stored(groups) * torch.tensor([1, 2, 4, 8], device=dense.device)).sum(-1)
    pairs = torch.tensor(_PAIRS, device=dense.device)[mask]
    bad = (pairs[..., 1] == 0).reshape(-1).nonzero()
    violation = torch.full((1,), -1, device=dense.device)
    if len(bad):
        row, group = divmod(int(bad[0]), groups.shape[1])
        violation.fill_(row * k + 4 * group)
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).reshape(n, -1, 4)
    words = (nibbles << torch.tensor([0, 4, 8, 12], device=dense.device)).sum(-1)
    return groups.gather(-1, pairs).reshape(n, -1), words.to(torch.int16), violation


def prune(dense: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """values [n, k/2] and metadata int16 [n, k/16] of the two elements of every group with the largest magnitude, or
    the largest of ``scores`` [n, k]; of equals the earlier, the padding last."""
    n, k = dense.shape
    tail = padded(k, COLUMN_UNIT) - k
    rank = dense.abs() if scores is None else scores
    inside = torch.ones_like(rank, dtype=torch.bool)
    rank, inside = (pad(tensor, (0, tail)).reshape(n, -1, 4) for tensor in (rank, inside))
    order = rank.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, inside.gather(-1, order).to(torch.uint8).argsort(dim=-1, descending=True, stable=True))
    pairs = order[..., :2].sort(-1).values
    words = (
        (pairs[..., 0] | pairs[..., 1] << 2).reshape(n, -1, 4) << torch.tensor([0, 4, 8, 12], device=dense.device)
    ).sum(-1)
    return pad(dense, (0, tail)).reshape(n, -1, 4).gather(-1, pairs).reshape(n, -1), words.to(torch.int16)


def kept_columns(metadata: Tensor) -> Tensor:
    """Column of every value: int64 [n, k/2]."""
    n = metadata.shape[0]
    fields = (metadata.unsqueeze(-1).to(torch.int64) >> torch.arange(0, 16, 2, device=metadata.device)) & 3
    fields = fields.reshape(n, -1)
    base = torch.arange(fields.shape[1], device=metadata.device) // 2 * 4
    return fields + base


def decompress(values: Tensor, metadata: Tensor, n: int, k: int) -> Tensor:
    """Dense [n, k]."""
    dense = values.new_zeros(n, 2 * values.shape[1])
    return dense.scatter(1, kept_columns(metadata), values)[:, :k]


def gather(dense: Tensor, metadata: Tensor) -> Tensor:
    """The elements of ``dense`` at the kept places, zeros in the padding: [n, k/2]."""
    columns = kept_columns(metadata)
    return pad(dense, (0, 2 * columns.shape[1] - dense.shape[1])).gather(1, columns)
