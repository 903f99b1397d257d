"""bitmap_linear: the product with a bitmap weight. :func:`pyfast.sparse_linear` is the public door.

Kernels: ``csrc/cpu/bitmap_linear*``; on CUDA decompression and the dense product; truth:
``pyfast/reference/bitmap_linear.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyfast import backends
from pyfast.ops import bitmap_convert
from pyfast.ops._library import LIBRARY, define
from pyfast.reference import bitmap_linear as reference


def bitmap_linear(
    x: Tensor, values: Tensor, bitmaps: Tensor, offsets: Tensor, bias: Tensor | None, n: int, backend: str | None
) -> Tensor:
    """x [tokens, k] to [tokens, n]; differentiable in x, values and bias at the fixed pattern."""
    if backends.select("bitmap_linear", x.device.type, x.dtype, backend) == "reference":
        return reference.bitmap_linear(x, values, bitmaps, bias, n)
    return torch.ops.pyfast.bitmap_linear(x, values, bitmaps, offsets, bias, n)


define("bitmap_linear(Tensor x, Tensor values, Tensor bitmaps, Tensor offsets, Tensor? bias, int n) -> Tensor")


@torch.library.register_fake("pyfast::bitmap_linear", lib=LIBRARY)
def _fake(x: Tensor, values: Tensor, bitmaps: Tensor, offsets: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


@torch.library.impl(LIBRARY, "bitmap_linear", "CUDA")
def _cuda(x: Tensor, values: Tensor, bitmaps: Tensor, offsets: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return linear(x, bitmap_convert.decompress(values, bitmaps, offsets, n, x.shape[1]), bias)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, bitmaps, offsets, _, n = inputs
    ctx.n = n
    ctx.save_for_backward(x, values, bitmaps, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, bitmaps, offsets = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ bitmap_convert.decompress(values, bitmaps, offsets, ctx.n, x.shape[1])
    if ctx.needs_input_grad[1]:
        grad_values = bitmap_convert.gather(grad.T @ x, bitmaps, offsets, values.shape[0])
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0)
    return grad_x, grad_values, None, None, grad_bias, None


torch.library.register_autograd("pyfast::bitmap_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
