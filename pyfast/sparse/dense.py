"""Dense linears of the libraries torch brings along: plain, and with the weight packed in advance.

``F.linear`` packs its weight at every call, so that at 4 to 16 tokens a library that has packed the weight beforehand
is about twice as fast. All of them compute ``x @ weight.T + bias`` for a weight [N, K] and x [tokens, K].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast import _products

Linear = Callable[..., Tensor]  # (x, bias=None) -> y
Maker = Callable[[Tensor, int], Linear]  # (weight, tokens) -> Linear


def f_linear(weight: Tensor, tokens: int) -> Linear:
    """``torch.nn.functional.linear`` with ``weight [N, K]``; the number of tokens does not matter to it."""
    return lambda x, bias=None: F.linear(x, weight, bias)


def mkl_prepacked(weight: Tensor, tokens: int) -> Linear:
    """MKL's packed float32 matmul for ``tokens`` rows of x; another number falls back to ``F.linear``. Raises
    RuntimeError or TypeError where it has none."""
    if weight.dtype is not torch.float32:
        raise TypeError(f"weight: MKL packs float32 only, got {weight.dtype}")
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, tokens)
    linear = torch.ops.mkl._mkl_linear
    return lambda x, bias=None: linear(x, packed, weight, bias, tokens)


def onednn_prepacked(weight: Tensor, tokens: int) -> Linear:
    """oneDNN's matmul over a weight reordered for about ``tokens`` rows of x; any number of rows is served. Raises
    RuntimeError where the CPU has no kernel for the dtype."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    return lambda x, bias=None: _products.onednn_linear(x, packed, bias)  # a function: what is packed cannot be copied


@lru_cache(maxsize=32)
def runs(make: Maker, dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether this machine has such a linear for this dtype, found out by running it once on a small weight."""
    try:
        make(torch.ones(32, 32, dtype=dtype, device=device), 2)(torch.ones(2, 32, dtype=dtype, device=device))
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return False
    return True
