"""nm_mask: the N largest of every group of M consecutive columns.

Read top to bottom: the public function, its checks, the op with its fake. Kernels: ``csrc/cpu/nm_mask*``; truth:
``pyfast/reference/nm_mask.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast import backends
from pyfast.ops import _arguments as arguments
from pyfast.ops._library import LIBRARY, define
from pyfast.reference import nm_mask as reference

MAX_GROUP = 32  # the widest group that the kernels take


def nm_mask(scores: Tensor, n: int, m: int, *, backend: str | None = None) -> Tensor:
    """Boolean mask that keeps the ``n`` largest of every ``m`` consecutive scores of a row (the N:M pattern).

    Of equal scores the one in the lower column stays, so that the mask is the same on every machine and the count of
    every group is exactly ``n``. Where ``m`` does not divide K, the last group of a row is short and keeps
    min(``n``, its length). −0.0 equals +0.0; NaN counts as −inf.

    Args:
        scores: ``[..., K]``, float32, bfloat16 or float16 (float64 by the reference). No gradient flows.
        n: elements kept in a group, 1 to ``m``.
        m: columns in a group, 1 to 32.
        backend: None for the best, or ``"native"``, ``"reference"``.

    Returns:
        bool ``[..., K]``, True where an element stays.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value, named in the message.
    """
    arguments.check_floating("scores", scores, "of scores [..., K]", least=0)
    check_pattern(n, m)
    rows = scores.detach().reshape(scores.shape[:-1].numel(), scores.shape[-1])
    if backends.select("nm_mask", rows.device.type, rows.dtype, backend) == "native":
        mask = torch.ops.pyfast.nm_mask(rows, n, m)
    else:
        mask = reference.nm_mask(rows, n, m)
    return mask.reshape(scores.shape)


def check_pattern(n: int, m: int) -> None:
    """TypeError or ValueError where ``n`` of ``m`` is no pattern that the kernels take."""
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {type(value).__name__}, accepted: an integer")
    if not 1 <= m <= MAX_GROUP:
        raise ValueError(f"m: got {m}, accepted: 1 to {MAX_GROUP} columns in a group")
    if not 1 <= n <= m:
        raise ValueError(f"n: got {n}, accepted: 1 to {m}, the columns in a group")


define("nm_mask(Tensor scores, int n, int m) -> Tensor")


@torch.library.register_fake("pyfast::nm_mask", lib=LIBRARY)
def _fake(scores: Tensor, n: int, m: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)
