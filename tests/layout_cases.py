"""What the tests of derived layouts share: weights, the error of a product, and what every layout refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sparse_cases import weight_unstructured
from test_simt_bitmap_linear import ACTIVATIONS
from torch import Tensor

import pyfast

HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def bits_of(tensor: Tensor) -> np.ndarray:
    """The elements of 16 bits as unsigned integers."""
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def sparse(n: int, k: int, density: float, kind: str = "bf16") -> Tensor:
    """A weight of 16 bits with a random pattern."""
    return weight_unstructured(n, k, 1 - density, HALVES[kind])


def product_error(
    multiply: Callable[..., Tensor], dense: Tensor, tokens: int, activation: str = "none", extras: bool = False
) -> float:
    """Relative error of multiply(x, bias, activation, mul), in units of the largest that rounding its output makes."""
    n, k = dense.shape
    x, mul, bias = (torch.randn(*shape).to(dense.dtype) for shape in ((tokens, k), (tokens, n), (n,)))
    y = multiply(x, bias if extras else None, list(ACTIVATIONS).index(activation), mul if extras else None)
    truth = x.double() @ dense.double().T + (bias.double() if extras else 0)
    truth = torch.from_numpy(ACTIVATIONS[activation](truth.numpy())) * (mul.double() if extras else 1)
    return float((y.double() - truth).norm() / truth.norm().clamp(min=1e-9)) / ROUNDING[dense.dtype]


def check_reference(layout_of: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    """On the CPU a layout's product is the dense one."""
    dense, x = weight_unstructured(70, 300, 0.8, dtype), torch.randn(3, 300).to(dtype)
    bias, mul = torch.randn(70).to(dtype), torch.randn(3, 70).to(dtype)
    y = layout_of(dense).linear(x, bias, 4, mul)
    assert torch.equal(y, torch.nn.functional.silu(torch.nn.functional.linear(x, dense, bias)) * mul)


def check_rows_that_store_nothing(multiply: Callable[..., Tensor]) -> None:
    """multiply(x, dense, bias, activation) gives f(bias) where nothing is stored."""
    dense, bias = torch.zeros(70, 100, dtype=torch.bfloat16), torch.randn(70).bfloat16()
    y = multiply(torch.randn(2, 100).bfloat16(), dense, bias, 1)
    assert torch.equal(y, bias.relu().expand(2, 70))


def check_refusals(layout: Any) -> None:
    """Only bitmap weights of 16 bits that are not empty have a layout for the GPU."""
    half = pyfast.BitmapWeight.from_dense(torch.randn(4, 64, dtype=torch.float16))
    with pytest.raises(TypeError, match="weight: got Sparse24Weight"):
        layout.of(pyfast.Sparse24Weight.from_dense(torch.zeros(4, 64)))
    with pytest.raises(TypeError, match="weight: got dtype"):
        layout.of(pyfast.BitmapWeight.from_dense(torch.randn(4, 64)))
    with pytest.raises(TypeError, match="weight: got dtype"):
        layout.of(half.quantize())
    for shape in ((0, 64), (64, 0)):
        with pytest.raises(ValueError, match="weight: got shape"):
            layout.of(pyfast.BitmapWeight.from_dense(torch.zeros(shape, dtype=torch.float16)))


def check_on_the_gpu(call: Callable[..., Tensor], dense: Tensor, token_counts: tuple[int, ...]) -> None:
    """call(x, bias, n, activation, mul) on a GPU: right to rounding, the same each time and in a CUDA graph."""
    n, k = dense.shape
    dtype, bias = dense.dtype, torch.randn(n, device="cuda", dtype=dense.dtype)
    for tokens in token_counts:
        x, mul = (torch.randn(tokens, size, device="cuda", dtype=dtype) for size in (k, n))
        y = call(x, bias, n, 4, mul)
        truth = torch.nn.functional.silu(x.double() @ dense.double().T + bias.double()) * mul.double()
        assert (y.double() - truth).norm() <= 1.1 * ROUNDING[dtype] * truth.norm(), tokens
        for _ in range(3):
            assert torch.equal(y, call(x, bias, n, 4, mul)), "not deterministic"
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            replayed = call(x, bias, n, 4, mul)
        for _ in range(2):
            replayed.zero_()
            captured.replay()
            assert torch.equal(replayed, y)
