"""Divergences between tempered softmaxes, by their definitions (design: the table in docs/kernels.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def distill_kl(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    divergence: str,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Values of each row times ``row_scale``: float32 [rows] (float64 for float64 logits), differentiable in
    ``student``. Rows whose scale is 0 give 0 with zero gradient, whatever they hold."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    counted = (row_scale != 0).unsqueeze(-1)
    student = torch.where(counted, student.to(dtype), 0.0)
    teacher = torch.where(counted, teacher.to(dtype), 0.0)
    log_s = torch.log_softmax(student / student_temperature, dim=-1)
    log_t = torch.log_softmax(teacher / teacher_temperature, dim=-1)
    return DIVERGENCES[divergence](log_s, log_t) * row_scale.to(dtype)


def forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Σ t log(t/s), 0 for words that the teacher excludes."""
    t = log_t.exp()
    return torch.where(t == 0, 0.0, t * (log_t - log_s)).sum(-1)


DIVERGENCES = {"forward_kl": forward_kl}
