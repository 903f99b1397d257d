"""sparse24_linear: the product with a 2:4 weight. :func:`pyfast.sparse_linear` is the public door.

Kernels: ``csrc/cpu/sparse24_linear*``; on CUDA ``csrc/cuda/sparse24_linear*`` for few tokens, decompression and the
dense product for many, and ``csrc/cuda/sparse24_backward*``; truth: ``pyfast/reference/sparse24_linear.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyfast import _products, backends
from pyfast.ops import sparse24_convert
from pyfast.ops._library import LIBRARY, define, register_autograd
from pyfast.reference import sparse24_linear as reference
from pyfast.reference.epilogue import epilogue
from pyfast.reference.sparse24_linear import scaled


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    activation: int,
    mul: Tensor | None,
    backend: str | None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]. Without activation and mul it is differentiable in x, values
    and bias at the fixed pattern."""
    if backends.select("sparse24_linear", x.device.type, x.dtype, backend) == "reference":
        return reference.sparse24_linear(x, values, metadata, scales, bias, activation, mul)
    return torch.ops.pyfast.sparse24_linear(x, values, metadata, scales, bias, activation, mul)


define(
    "sparse24_linear(Tensor x, Tensor values, Tensor metadata, Tensor? scales, Tensor? bias, int activation, "
    "Tensor? mul) -> Tensor"
)


@torch.library.register_fake("pyfast::sparse24_linear", lib=LIBRARY)
def _fake(x: Tensor, values: Tensor, metadata: Tensor, scales, bias, activation, mul) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


# The CUDA kernel: values of 16 bits, any number of tokens. Above FEW_TOKENS the arithmetic bounds the product, and the
# dense library serves it.
FEW_TOKENS = 64
HALVES = (torch.bfloat16, torch.float16)
define(
    "sparse24_linear_mma(Tensor x, Tensor values, Tensor metadata, Tensor? bias, int activation, Tensor? mul) -> Tensor"
)


@torch.library.register_fake("pyfast::sparse24_linear_mma", lib=LIBRARY)
def _fake_mma(x: Tensor, values: Tensor, metadata: Tensor, bias, activation, mul) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.impl(LIBRARY, "sparse24_linear", "CUDA")
def _cuda(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    activation: int,
    mul: Tensor | None,
) -> Tensor:
    if x.shape[0] <= FEW_TOKENS and values.dtype == x.dtype and x.dtype in HALVES:
        bias, mul = (tensor if tensor is None else tensor.contiguous() for tensor in (bias, mul))
        return torch.ops.pyfast.sparse24_linear_mma(x, values, metadata, bias, activation, mul)
    dense = scaled(sparse24_convert.decompress(values, metadata, values.shape[0], x.shape[1]), scales, x)
    return epilogue(linear(x, dense, bias), activation, mul)


# The gradients that CUDA kernels compute, in 16 bits: to x at few tokens, to the values at any number.
GRAD_X_TOKENS = 32
define("sparse24_grad_x_few(Tensor grad, Tensor values, Tensor metadata, int k) -> Tensor")
define("sparse24_grad_values(Tensor grad, Tensor x, Tensor metadata) -> Tensor")


@torch.library.register_fake("pyfast::sparse24_grad_x_few", lib=LIBRARY)
def _fake_grad_x(grad: Tensor, values: Tensor, metadata: Tensor, k: int) -> Tensor:
    return grad.new_empty(grad.shape[0], k)


@torch.library.register_fake("pyfast::sparse24_grad_values", lib=LIBRARY)
def _fake_grad_values(grad: Tensor, x: Tensor, metadata: Tensor) -> Tensor:
    return x.new_empty(metadata.shape[0], 8 * metadata.shape[1])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, metadata, scales, _, activation, mul = inputs
    ctx.plain = activation == 0 and mul is None
    ctx.save_for_backward(x, values, metadata, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.plain:
        raise RuntimeError("sparse24_linear: the fused activation has no gradient; pyfast.sparse_linear goes around it")
    x, values, metadata, scales = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    kernels = x.is_cuda and scales is None and x.dtype in HALVES
    if ctx.needs_input_grad[0] and kernels and x.shape[0] <= GRAD_X_TOKENS:
        grad_x = torch.ops.pyfast.sparse24_grad_x_few(grad, values, metadata, x.shape[1])
    elif ctx.needs_input_grad[0]:
        dense = scaled(sparse24_convert.decompress(values, metadata, values.shape[0], x.shape[1]), scales, x)
        grad_x = _products.mm(grad, dense)
    if ctx.needs_input_grad[1] and kernels:
        grad_values = torch.ops.pyfast.sparse24_grad_values(grad, x, metadata)
    elif ctx.needs_input_grad[1]:
        grad_values = sparse24_convert.gather(_products.mm(grad.T, x), metadata)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0)
    return grad_x, grad_values, None, None, grad_bias, None, None


register_autograd("sparse24_linear", _backward, _setup_context)
