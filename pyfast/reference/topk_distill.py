"""Divergence from a teacher known by K words a token, by its definition, with the teacher spread over all words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyfast.reference.distill_kl import weighted

TAILS = ("bucket", "ignore", "renormalise")


def topk_distill(
    student: Tensor, ids: Tensor, entries: Tensor, row_scale: Tensor, tail: str, temperature: float
) -> Tensor:
    """Values of each row times ``row_scale``: float32 [rows] (float64 for float64 logits), differentiable in
    ``student``. ``tail``: one of ``TAILS`` with log-probabilities as float64 ``entries``, or ``"sampled"`` with
    weights. An entry of probability 0 is not there; a row without entries gives 0, one with an id out of range NaN."""
    words = student.shape[-1]
    masses = entries if tail == "sampled" else entries.exp()
    there = masses != 0
    wrong = (there & ((ids < 0) | (ids >= words))).any(-1)
    counted = (row_scale != 0) & there.any(-1)
    place = torch.where(there, ids, 0).clamp(0, words - 1)
    masses = torch.where(there & counted.unsqueeze(-1), masses, 0.0)
    t = torch.zeros(student.shape, dtype=torch.float64, device=student.device).scatter_add(-1, place, masses)
    if tail in ("sampled", "renormalise"):
        t = t / torch.where(counted, t.sum(-1), 1.0).unsqueeze(-1)
    inside = t != 0

    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    student = torch.where(counted.unsqueeze(-1), student.to(dtype), 0.0) / temperature
    if tail == "renormalise":
        student = torch.where(inside | ~counted.unsqueeze(-1), student, -math.inf)
    log_s = torch.log_softmax(student, dim=-1)
    value = _kl(t, log_s)
    if tail == "ignore":
        value = value + torch.where(inside, log_s.exp() - t, 0.0).sum(-1)
    if tail == "bucket":
        closed = inside.all(-1) | ~counted
        t_rest = torch.where(closed, 0.0, (1 - t.sum(-1)).clamp(min=0.0))
        outside = torch.where(inside & ~closed.unsqueeze(-1), -math.inf, log_s)
        value = value + _kl(t_rest.unsqueeze(-1), torch.logsumexp(outside, -1, keepdim=True))
    return weighted(torch.where(wrong, math.nan, value), row_scale.to(dtype)).to(dtype)


def _kl(t: Tensor, log_s: Tensor) -> Tensor:
    """Σ t log(t/s), 0 where t is 0."""
    there = t != 0
    return (t * torch.where(there, torch.where(there, t, 1.0).log() - log_s, 0.0)).sum(-1)
