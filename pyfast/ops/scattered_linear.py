"""scattered_linear: the product with a weight whose stored values are scattered into the fragments of tensor cores, for
up to 32 tokens on CUDA; :mod:`pyfast.sparse.scattered` derives the layout from a bitmap weight.

Kernel: ``csrc/cuda/scattered_linear*`` (more tokens are groups of 32, one launch each); truth:
``pyfast/reference/scattered_linear.py``. For inference: it has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfast import backends
from pyfast.ops._library import LIBRARY, define, register_autograd
from pyfast.reference import scattered_linear as reference

MOST_CHUNKS = 2**26


def scattered_linear(
    x: Tensor,
    values: Tensor,
    deltas: Tensor,
    extras: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    n: int,
    activation: int,
    mul: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
    if backends.select("scattered_linear", x.device.type, x.dtype, backend) == "reference":
        return reference.scattered_linear(x, values, deltas, extras, ends, bias, n, activation, mul)
    bias, mul = (tensor if tensor is None else tensor.contiguous() for tensor in (bias, mul))
    return torch.ops.pyfast.scattered_linear(x, values, deltas, extras, ends, bias, n, activation, mul)


define(
    "scattered_linear(Tensor x, Tensor values, Tensor deltas, Tensor extras, Tensor ends, Tensor? bias, int n, "
    "int activation, Tensor? mul) -> Tensor"
)


@torch.library.register_fake("pyfast::scattered_linear", lib=LIBRARY)
def _fake(x: Tensor, values, deltas, extras, ends, bias, n: int, activation, mul) -> Tensor:
    return x.new_empty(x.shape[0], n)


def _backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "scattered_linear: has no gradient; pyfast.sparse_linear trains the weight that it was made from"
    )


register_autograd("scattered_linear", _backward)
