"""Dense matrix products by the faster of the libraries that torch brings along.

``torch.mm`` and ``F.linear`` multiply float32 on the CPU by MKL, which has AVX-512 for Intel's processors alone. On
others with AVX-512 oneDNN takes a third to a half of the time (docs/kernels.md); it is called here, and from C++ in
``csrc/cpu/dense_linear.cpp``. The choice goes by the processor and is never timed: a result does not depend on the
moment. What is traced, on another device or wants a gradient goes by torch's own functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from pyfast import _native


def _onednn_is_faster() -> bool:
    cpu = _native.CPU
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return cpu is not None and libraries and "avx512" in cpu.supported_isas() and not cpu.is_intel()


def multiply_by_onednn(chosen: bool) -> bool:
    """Whether float32 is multiplied by oneDNN from now on, in the whole process; returns what was before."""
    global _onednn
    before, _onednn = _onednn, chosen
    if _native.CPU is not None:
        _native.CPU.multiply_by_onednn(chosen)
    return before


_onednn = False
multiply_by_onednn(_onednn_is_faster())


def by_onednn(*operands: Tensor) -> bool:
    """Whether :func:`linear` and :func:`mm` multiply these by oneDNN."""
    if (
        not _onednn
        or torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(x.requires_grad for x in operands))
    ):
        return False
    return all(
        type(x) in (Tensor, Parameter) and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
        for x in operands
    )


def _overlaps(matrix: Tensor) -> bool:
    """Whether it is a window that moves over memory by less than its width: oneDNN has none."""
    (inner, size), (outer, _) = sorted(zip(matrix.stride(), matrix.shape, strict=True))
    return 0 < outer <= inner * (size - 1)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of two dimensions by oneDNN; ``weight`` may be what it has packed."""
    bias = None if bias is None else bias.contiguous()  # read as it lies
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, ``[rows, K]`` and ``[N, K]`` to ``[rows, N]``."""
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight.contiguous() if _overlaps(weight) else weight, bias)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a · b."""
    return linear(a, b.t()) if by_onednn(a, b) else torch.mm(a, b)
