"""Divergences over a shard of the vocabulary: what a rank computes of each row by itself, a few rows at a time.

A row lies on several ranks; the three steps below are of one rank, and between them the ranks add up what they have
(``pyfast/parallel.py``). Everything runs in float64, so that the sums over words and ranks may be taken by the plain
formulas of ``reference/distill_kl.py``: of a KL of 1e-7 they keep eight digits.

    logits [rows, V_local] ──► shard_stats ──► max, Σ exp ──► all ranks ──► log-sum-exp of the whole row
    logits, log-sum-exps   ──► sums: Σ value, Σ pull, the label's logit ──► all ranks ──► value and center of the row
    logits, log-sum-exps, center ──► gradient of the shard = pull − s · center

With L the value of a row and z the student's logits over its temperature, log s_v = z_v − log-sum-exp, so that
∂L/∂z_v = a_v − s_v Σ_w a_w, where a = ∂L/∂log s is what is called the pull, and its sum over all ranks the center.
A term c·s may be added to a without changing this; ``PULLS`` choose it so that the pull is exactly 0 where s = t.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyfast.reference.distill_kl import DIVERGENCES, softcap, weighted

# Words in one float64 temporary: on the CPU about what its caches hold, elsewhere enough to keep the device busy.
_SCRATCH_WORDS = {"cpu": 1 << 16}
_SCRATCH_WORDS_ELSEWHERE = 1 << 21
_FAR = 700.0  # e^x is finite up to here; a word this much less likely under one model than under the other
_LOWEST = torch.finfo(torch.float64).min  # stands in for −inf as a maximum, so that −inf − max is −inf


def shard_stats(logits: Tensor, temperatures: list[float], cap: float) -> Tensor:
    """The largest logit z of each row of a shard, then Σ exp((z − largest) / T) for each T: float64 ``[rows, 1 + T]``.
    A row without a word to count (an empty shard, −inf alone) has the lowest number and 0."""
    stats = logits.new_zeros((logits.shape[0], 1 + len(temperatures)), dtype=torch.float64)
    stats[:, 0] = _LOWEST
    for part in _chunks(logits):
        z = softcap(logits[part].double(), cap)
        top = z.amax(-1, keepdim=True).clamp(min=_LOWEST)
        stats[part] = torch.cat([top, *(((z - top) / t).exp().sum(-1, keepdim=True) for t in temperatures)], -1)
    return stats


def log_sum_exps(stats: Tensor, temperatures: list[float]) -> Tensor:
    """``shard_stats`` of every rank, ``[ranks, rows, 1 + T]``, to the log-sum-exps of the whole rows ``[rows, T]``."""
    shard_tops = stats[..., 0]
    top = shard_tops.amax(0)
    columns = zip(stats[..., 1:].unbind(-1), temperatures, strict=True)
    return torch.stack([top / t + (sums * ((shard_tops - top) / t).exp()).sum(0).log() for sums, t in columns], -1)


def shard_distill(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    divergence: str,
    mix: float,
    student_temperature: float,
    teacher_temperature: float,
    student_softcap: float,
    teacher_softcap: float,
    student_lse: Tensor,
    teacher_lse: Tensor,
    center: Tensor | None,
    labels: Tensor | None,
    ce_scale: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """One rank's sums of each row, or its gradient; ``pyfast/ops/shard_distill.py`` says when which."""
    rows = student.shape[0]
    centered = divergence in PULLS
    sums = student.new_zeros((rows if center is None else 0, 3), dtype=torch.float64)
    grad = student.new_empty(student.shape if with_grad and centered == (center is not None) else (0, 0))
    counted = row_scale != 0 if ce_scale is None else (row_scale != 0) | (ce_scale != 0)
    for part in _chunks(student):
        z = softcap(student[part].double(), student_softcap)
        log_s = z / student_temperature - student_lse[part, :1]
        log_t = softcap(teacher[part].double(), teacher_softcap) / teacher_temperature - teacher_lse[part, :1]
        pull = PULLS[divergence](log_s, log_t, mix) if centered and with_grad else None
        if center is None:
            sums[part, 0] = DIVERGENCES[divergence](log_s, log_t, mix)
            if pull is not None:
                sums[part, 1] = pull.sum(-1)
            if labels is not None:
                sums[part, 2] = torch.where(labels[part] < 0, 0.0, z.gather(-1, _column(labels[part])).squeeze(-1))
        if grad.numel() == 0:
            continue
        s = log_s.exp()
        slope = s - log_t.exp() if pull is None or center is None else pull - s * center[part].unsqueeze(-1)
        slope = weighted(slope, (row_scale[part].double() / student_temperature).unsqueeze(-1))
        if labels is not None and ce_scale is not None:
            of_ce = (z - student_lse[part, 1:]).exp()
            here = (labels[part] >= 0).double().unsqueeze(-1)
            of_ce.scatter_add_(-1, _column(labels[part]), -here)
            slope += of_ce * ce_scale[part].double().unsqueeze(-1)
        if student_softcap != 0:
            raw = student[part].double()
            slope = torch.where(raw == -math.inf, slope, slope / (raw / student_softcap).cosh().square())
        grad[part] = torch.where(counted[part].unsqueeze(-1), slope, 0.0).to(grad.dtype)
    return sums, grad


def _chunks(logits: Tensor) -> Iterator[slice]:
    """The rows in parts whose temporaries stay small; none where there is nothing to read."""
    rows, words = logits.shape
    scratch = _SCRATCH_WORDS.get(logits.device.type, _SCRATCH_WORDS_ELSEWHERE)
    size = max(1, scratch // max(words, 1))
    return (slice(begin, begin + size) for begin in range(0, rows if words else 0, size))


def _column(labels: Tensor) -> Tensor:
    """Indices for gather and scatter; the first word stands in for a label on another rank."""
    return labels.clamp(min=0).unsqueeze(-1)


def _gap(log_s: Tensor, log_t: Tensor) -> Tensor:
    """log(s/t), no larger than e^x can take; 0 where both are 0."""
    neither = (log_s == -math.inf) & (log_t == -math.inf)
    return torch.where(neither, 0.0, log_s - log_t).clamp(-_FAR, _FAR)


def _reverse_kl(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    slope = torch.where(log_t == -math.inf, -1.0, (log_s - log_t).clamp(min=-_FAR))
    return log_s.exp() * slope


def _over_mixture(x: Tensor, share: float) -> Tensor:
    """log(s/m), m = share · t + (1 − share) · s, from x = log(s/t)."""
    return -torch.log1p(share * torch.expm1(-x))


def _jsd(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    return (1 - mix) * log_s.exp() * _over_mixture(_gap(log_s, log_t), mix)


def _skew_kl(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    rise = (1 - mix) * torch.expm1(_gap(log_s, log_t))
    return (1 - mix) * log_s.exp() * (rise / (1 + rise))


def _skew_reverse_kl(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    x = _gap(log_s, log_t)
    rise = mix * torch.expm1(x)
    return log_s.exp() * (_over_mixture(x, 1 - mix) - (1 - mix) * (rise / (1 + rise)))


def _tvd(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    return 0.5 * log_s.exp() * torch.sign(_gap(log_s, log_t))


def _mse(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    s = log_s.exp()
    return 2 * s * (s - log_t.exp())


# ∂L/∂log s of each word, up to a multiple of s. forward_kl is not here: its pull is −t, whose sum is known to be −1.
PULLS = {
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
    "mse": _mse,
}
