"""Rows of a saved gradient times the gradient that comes in: backward of every loss that computed its own in forward.

    out[i, :] = scale[i] · grad[i, :]

In place, a program that finds its scale equal to 1 returns: ``loss.backward()`` then reads M numbers, and the host
waits for nothing. Otherwise 2E, with E the bytes of the gradient: one program for each row, a block of words at a time.
``scale`` may have any stride, 0 among them (what ``.sum().backward()`` sends). Products are rounded from float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import check_logits, check_scale, launch, words_together

BLOCK = 4096
LAUNCH = {"num_warps": 8}


@triton.jit
def scale_rows_kernel(
    grad, scale, out, grad_stride, scale_stride, out_stride, width, BLOCK: tl.constexpr, IN_PLACE: tl.constexpr
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + row * scale_stride)
    if (factor != 1.0) | (not IN_PLACE):
        grad += row * grad_stride
        out += row * out_stride
        lanes = tl.arange(0, BLOCK)
        for block in tl.range(0, tl.cdiv(width, BLOCK)):
            words = block * BLOCK + lanes
            inside = words < width
            product = tl.load(grad + words, mask=inside).to(tl.float32) * factor
            tl.store(out + words, product.to(out.dtype.element_ty), mask=inside)


def scale_rows(grad: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``grad`` [M, V], float32, bfloat16 or float16, times ``scale`` [M] float32: new and contiguous."""
    _check(grad, scale)
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    _start(words_together(grad), scale, out)
    return out


def scale_rows_(grad: torch.Tensor, scale: torch.Tensor) -> None:
    """``grad`` [M, V] times ``scale`` [M] float32 in place; rows of scale 1 are not touched. The words of a row must
    lie next to each other (ValueError)."""
    _check(grad, scale)
    if words_together(grad) is not grad:
        raise ValueError(f"grad: got strides {list(grad.stride())}, accepted: the words of a row next to each other")
    _start(grad, scale, grad)


def _check(grad: torch.Tensor, scale: torch.Tensor) -> None:
    check_logits("grad", grad)
    check_scale("scale", scale, grad)


def _start(grad: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    launch(
        scale_rows_kernel,
        grad.shape[0],
        grad,
        LAUNCH,
        grad,
        scale,
        out,
        grad.stride(0),
        scale.stride(0),
        out.stride(0),
        grad.shape[1],
        BLOCK=BLOCK,
        IN_PLACE=out is grad,
    )
