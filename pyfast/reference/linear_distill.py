"""Divergence between the softmaxes of two linear heads: the products, then ``reference/distill_kl.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyfast.reference.distill_kl import distill_kl


def linear_distill(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_head: Tensor | None,
    teacher_bias: Tensor | None,
    row_scale: Tensor,
    divergence: str,
    mix: float,
    student_temperature: float,
    teacher_temperature: float,
    student_softcap: float,
    teacher_softcap: float,
    labels: Tensor | None,
    ce_scale: Tensor | None,
    words: int,
) -> Tensor:
    """Rows of :func:`distill_kl` over the first ``words`` words, for hidden states ``[rows, H]`` and heads ``[V, H]``;
    ``teacher`` holds logits where there is no ``teacher_head``. Differentiable in hidden states, head and bias of the
    student, also where a row of scale 0 holds NaN."""
    counted = row_scale != 0 if ce_scale is None else (row_scale != 0) | (ce_scale != 0)
    student_hidden = torch.where(counted.unsqueeze(-1), student_hidden, 0.0)
    student = linear(student_hidden, student_head, student_bias)
    if teacher_head is not None:
        teacher = linear(teacher, teacher_head, teacher_bias)
    rows, _ = distill_kl(
        student[:, :words],
        teacher[:, :words],
        row_scale,
        divergence,
        mix,
        student_temperature,
        teacher_temperature,
        student_softcap,
        teacher_softcap,
        labels,
        ce_scale,
    )
    return rows
