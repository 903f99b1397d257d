"""sliced_linear: the product driven by the stored values, for few tokens on CUDA; :mod:`pyfast.sparse.sliced` derives
the layout from a bitmap weight.

Kernel: ``csrc/cuda/sliced_linear*``, made for 1 to 8 tokens (more of them are groups, one launch each); truth:
``pyfast/reference/sliced_linear.py``. For inference: it has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfast import backends
from pyfast.ops._library import LIBRARY, define, register_autograd
from pyfast.reference import sliced_linear as reference

BLOCK_WARPS = 16  # of a block of the kernel
MOST_COLUMNS = 65536
MOST_CHUNKS = 2**26


def sliced_linear(
    x: Tensor,
    values: Tensor,
    deltas: Tensor,
    starts: Tensor,
    segments: Tensor,
    ends: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    n: int,
    activation: int,
    mul: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
    if backends.select("sliced_linear", x.device.type, x.dtype, backend) == "reference":
        return reference.sliced_linear(x, values, deltas, ends, rows, bias, n, activation, mul)
    bias, mul = (tensor if tensor is None else tensor.contiguous() for tensor in (bias, mul))
    return torch.ops.pyfast.sliced_linear(x, values, deltas, starts, segments, ends, rows, bias, n, activation, mul)


define(
    "sliced_linear(Tensor x, Tensor values, Tensor deltas, Tensor starts, Tensor segments, Tensor ends, Tensor rows, "
    "Tensor? bias, int n, int activation, Tensor? mul) -> Tensor"
)


@torch.library.register_fake("pyfast::sliced_linear", lib=LIBRARY)
def _fake(x: Tensor, values, deltas, starts, segments, ends, rows, bias, n: int, activation, mul) -> Tensor:
    return x.new_empty(x.shape[0], n)


def _backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("sliced_linear: has no gradient; pyfast.sparse_linear trains the weight that it was made from")


register_autograd("sliced_linear", _backward)
