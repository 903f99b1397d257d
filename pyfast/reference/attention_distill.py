"""Divergence between attention distributions, by its definition: holds the T×S matrices in full."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyfast.reference.distill_kl import DIVERGENCES, weighted


def attention_distill(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    row_scale: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    divergence: str,
    mix: float,
    student_rate: float,
    teacher_rate: float,
) -> Tensor:
    """``row_scale`` · divergence between the student's and the teacher's attention, each the mean of the softmaxes of
    its heads of a group: float32 [B, G, T] (float64 for float64 inputs), differentiable in ``q_s`` and ``k_s``.
    Rows of scale 0 and masked keys may hold anything; rows of another scale have at least one allowed key."""
    tokens, keys = q_s.shape[2], k_s.shape[2]
    allowed = torch.ones(tokens, keys, dtype=torch.bool, device=q_s.device)
    if causal:
        allowed = allowed.tril(keys - tokens)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, None, :]
        k_s, k_t = (torch.where(key_mask[:, None, :, None], k, 0.0) for k in (k_s, k_t))
    log_s = log_attention(q_s, k_s, student_rate, allowed, row_scale != 0)
    log_t = log_attention(q_t, k_t, teacher_rate, allowed, row_scale != 0)
    return weighted(DIVERGENCES[divergence](log_s, log_t, mix), row_scale.to(log_s.dtype))


def log_attention(q: Tensor, k: Tensor, rate: float, allowed: Tensor, counted: Tensor) -> Tensor:
    """log of the mean over the heads of a group of softmax(rate · q·kᵀ) over the allowed keys: [B, G, T, S]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    counted = counted[:, :, None, :, None]  # [B, G, 1, T, 1], against [B, G, heads of a group, T, S]
    q = torch.where(counted, q.to(dtype).unflatten(1, (counted.shape[1], -1)), 0.0)
    k = k.to(dtype).repeat_interleave(q.shape[1] * q.shape[2] // k.shape[1], dim=1).unflatten(1, q.shape[1:3])
    with torch.autocast(q.device.type, enabled=False):
        scores = rate * q @ k.mT
    seen = allowed | ~counted
    scores = torch.where(seen, scores, -math.inf)
    log_heads = torch.log_softmax(scores, dim=-1)
    heads = log_heads.shape[2]
    if heads == 1:
        return log_heads.squeeze(2)
    mean = torch.where(seen, log_heads, 0.0).logsumexp(dim=2) - math.log(heads)
    return torch.where(seen.squeeze(2), mean, -math.inf)
