"""What the launchers share: what they accept, and how a kernel is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

#: Options of every launch, given so that the result does not hang on the default of a Triton release.
OPTIONS = {"enable_fp_fusion": True}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_logits(name: str, logits: torch.Tensor) -> None:
    """``logits`` [M, V] of a dtype in ``DTYPES``, V above 0."""
    if logits.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {logits.dtype}, accepted: float32, bfloat16, float16")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{name}: got shape {list(logits.shape)}, accepted: [M, V] with V above 0")


def check_like(name: str, tensor: torch.Tensor, shape: Sequence[int], device: torch.device) -> None:
    """``tensor`` has this shape and lies on this device."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, accepted: {list(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, accepted: {device}")


def check_scale(name: str, scale: torch.Tensor, like: torch.Tensor) -> None:
    """``scale`` is float32, one for each row of ``like``."""
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}: got dtype {scale.dtype}, accepted: float32")
    check_like(name, scale, like.shape[:1], like.device)


def words_together(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` [M, V] with the words of a row next to each other: itself, or a copy."""
    return rows if rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()


def launch(
    kernel: Any, programs: int, like: torch.Tensor, options: dict[str, int], *arguments: Any, **constants: Any
) -> None:
    """Start ``programs`` programs of ``kernel`` on the device of ``like``; nothing where there are none.

    ``options`` are Triton's (``num_warps``, ``maxnreg``, …), beside ``OPTIONS``.
    """
    if programs == 0:
        return
    with torch.cuda.device_of(like):
        kernel[(programs,)](*arguments, **constants, **OPTIONS, **options)
