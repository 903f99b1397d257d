"""bitmap_linear: the product with a bitmap weight. :func:`pyfast.sparse_linear` is the public door.

Kernels: ``csrc/cpu/bitmap_linear*``; on CUDA ``csrc/cuda/bitmap_linear*`` for few tokens, decompression and the dense
product for many, and ``csrc/cuda/bitmap_backward*``; truth: ``pyfast/reference/bitmap_linear.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyfast import _products, backends
from pyfast.ops import bitmap_convert
from pyfast.ops._library import LIBRARY, define, register_autograd
from pyfast.reference import bitmap_linear as reference
from pyfast.reference.epilogue import epilogue
from pyfast.reference.sparse24_linear import scaled


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmaps: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    activation: int,
    mul: Tensor | None,
    backend: str | None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]. Without activation and mul it is differentiable in x, values
    and bias at the fixed pattern."""
    if backends.select("bitmap_linear", x.device.type, x.dtype, backend) == "reference":
        return reference.bitmap_linear(x, values, bitmaps, scales, bias, n, activation, mul)
    return torch.ops.pyfast.bitmap_linear(x, values, bitmaps, offsets, scales, bias, n, activation, mul)


define(
    "bitmap_linear(Tensor x, Tensor values, Tensor bitmaps, Tensor offsets, Tensor? scales, Tensor? bias, int n, "
    "int activation, Tensor? mul) -> Tensor"
)


@torch.library.register_fake("pyfast::bitmap_linear", lib=LIBRARY)
def _fake(x: Tensor, values: Tensor, bitmaps: Tensor, offsets: Tensor, scales, bias, n: int, activation, mul) -> Tensor:
    return x.new_empty(x.shape[0], n)


# The part of bitmap_linear that the CUDA kernels serve: at most FEW_TOKENS tokens of 16 bits.
FEW_TOKENS = 64
HALVES = (torch.bfloat16, torch.float16)
define(
    "bitmap_linear_few(Tensor x, Tensor values, Tensor bitmaps, Tensor offsets, Tensor? bias, int n, int activation, "
    "Tensor? mul) -> Tensor"
)


@torch.library.register_fake("pyfast::bitmap_linear_few", lib=LIBRARY)
def _fake_few(x: Tensor, values: Tensor, bitmaps: Tensor, offsets: Tensor, bias, n: int, activation, mul) -> Tensor:
    return x.new_empty(x.shape[0], n)


@torch.library.impl(LIBRARY, "bitmap_linear", "CUDA")
def _cuda(
    x: Tensor,
    values: Tensor,
    bitmaps: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    activation: int,
    mul: Tensor | None,
) -> Tensor:
    if x.shape[0] <= FEW_TOKENS and values.dtype == x.dtype and x.dtype in HALVES:
        bias, mul = (tensor if tensor is None else tensor.contiguous() for tensor in (bias, mul))
        return torch.ops.pyfast.bitmap_linear_few(x, values, bitmaps, offsets, bias, n, activation, mul)
    dense = scaled(bitmap_convert.decompress(values, bitmaps, offsets, n, x.shape[1]), scales, x)
    return epilogue(linear(x, dense, bias), activation, mul)


# The gradients that CUDA kernels compute, in 16 bits: to x at few tokens, to the values at any number.
GRAD_X_TOKENS = 32
define("bitmap_grad_x_few(Tensor grad, Tensor values, Tensor bitmaps, Tensor offsets, int k) -> Tensor")
define("bitmap_grad_values(Tensor grad, Tensor x, Tensor bitmaps, Tensor offsets, int stored) -> Tensor")


@torch.library.register_fake("pyfast::bitmap_grad_x_few", lib=LIBRARY)
def _fake_grad_x(grad: Tensor, values: Tensor, bitmaps: Tensor, offsets: Tensor, k: int) -> Tensor:
    return grad.new_empty(grad.shape[0], k)


@torch.library.register_fake("pyfast::bitmap_grad_values", lib=LIBRARY)
def _fake_grad_values(grad: Tensor, x: Tensor, bitmaps: Tensor, offsets: Tensor, stored: int) -> Tensor:
    return x.new_empty(stored)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, bitmaps, offsets, scales, _, ctx.n, activation, mul = inputs
    ctx.plain = activation == 0 and mul is None
    ctx.save_for_backward(x, values, bitmaps, offsets, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.plain:
        raise RuntimeError("bitmap_linear: the fused activation has no gradient; pyfast.sparse_linear goes around it")
    x, values, bitmaps, offsets, scales = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    kernels = x.is_cuda and scales is None and x.dtype in HALVES
    if ctx.needs_input_grad[0] and kernels and x.shape[0] <= GRAD_X_TOKENS:
        grad_x = torch.ops.pyfast.bitmap_grad_x_few(grad, values, bitmaps, offsets, x.shape[1])
    elif ctx.needs_input_grad[0]:
        dense = scaled(bitmap_convert.decompress(values, bitmaps, offsets, ctx.n, x.shape[1]), scales, x)
        grad_x = _products.mm(grad, dense)
    if ctx.needs_input_grad[1] and kernels:
        grad_values = torch.ops.pyfast.bitmap_grad_values(grad, x, bitmaps, offsets, values.shape[0])
    elif ctx.needs_input_grad[1]:
        grad_values = bitmap_convert.gather(_products.mm(grad.T, x), bitmaps, offsets, values.shape[0])
    if ctx.needs_input_grad[5]:
        grad_bias = grad.sum(0)
    return grad_x, grad_values, None, None, None, grad_bias, None, None, None


register_autograd("bitmap_linear", _backward, _setup_context)
