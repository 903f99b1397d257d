"""Divergences between tempered softmaxes, by their definitions (design: the table in docs/kernels.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distill_kl(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    divergence: str,
    mix: float,
    student_temperature: float,
    teacher_temperature: float,
    student_softcap: float = 0.0,
    teacher_softcap: float = 0.0,
    labels: Tensor | None = None,
    ce_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values of each row, ``row_scale`` · divergence + ``ce_scale`` · cross-entropy, and the second part alone
    (detached; empty without labels): float32 [rows] (float64 for float64 logits), differentiable in ``student``.
    A part whose scale is 0 is 0 with zero gradient, whatever the row holds."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32

    def part(logits: Tensor, cap: float, scale: Tensor) -> Tensor:
        return softcap(torch.where((scale != 0).unsqueeze(-1), logits.to(dtype), 0.0), cap)

    log_s = torch.log_softmax(part(student, student_softcap, row_scale) / student_temperature, dim=-1)
    log_t = torch.log_softmax(part(teacher, teacher_softcap, row_scale) / teacher_temperature, dim=-1)
    rows = weighted(DIVERGENCES[divergence](log_s, log_t, mix), row_scale.to(dtype))
    if labels is None or ce_scale is None:
        return rows, rows.new_empty(0).detach()
    word = torch.where(ce_scale != 0, labels, 0).unsqueeze(-1)
    log_1 = torch.log_softmax(part(student, student_softcap, ce_scale), dim=-1)
    ce = weighted(-log_1.gather(-1, word).squeeze(-1), ce_scale.to(dtype))
    return rows + ce, ce.detach()


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap); −inf, a word that is excluded, stays −inf. 0: no cap."""
    return logits if cap == 0 else torch.where(logits == -math.inf, logits, cap * torch.tanh(logits / cap))


def weighted(value: Tensor, scale: Tensor) -> Tensor:
    """value · scale, and 0 where scale is 0, whatever the value."""
    return torch.where(scale == 0, 0.0, value * scale)


def forward_kl(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    """Σ t log(t/s), 0 for words that the teacher excludes (Hinton, Vinyals and Dean, 2015)."""
    return _kl(log_t, log_s)


def reverse_kl(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    """Σ s log(s/t) over the words that the teacher allows (Gu et al., MiniLLM, 2024)."""
    nothing = (log_t == -math.inf) | (log_s == -math.inf)
    return (log_s.exp() * torch.where(nothing, 0.0, log_s - log_t)).sum(-1)


def jsd(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    """β KL(t‖m) + (1−β) KL(s‖m), m = βt + (1−β)s (Agarwal et al., GKD, 2024)."""
    log_m = _log_mixture(log_t, log_s, mix)
    return mix * _kl(log_t, log_m) + (1 - mix) * _kl(log_s, log_m)


def skew_kl(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    """KL(t ‖ αt + (1−α)s) (Ko et al., DistiLLM, 2024)."""
    return _kl(log_t, _log_mixture(log_t, log_s, mix))


def skew_reverse_kl(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    """KL(s ‖ (1−α)t + αs) (Ko et al., DistiLLM, 2024)."""
    return _kl(log_s, _log_mixture(log_t, log_s, 1 - mix))


def tvd(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    """Total variation distance, ½ Σ |s − t|."""
    return 0.5 * (log_s.exp() - log_t.exp()).abs().sum(-1)


def mse(log_s: Tensor, log_t: Tensor, mix: float) -> Tensor:
    """Squared distance of the probabilities, Σ (s − t)²."""
    return (log_s.exp() - log_t.exp()).square().sum(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p log(p/q), 0 where p is 0."""
    gap = torch.where(log_p == -math.inf, 0.0, log_p - log_q)
    return (log_p.exp() * gap).sum(-1)


def _log_mixture(log_t: Tensor, log_s: Tensor, share: float) -> Tensor:
    """log(share · t + (1 − share) · s); words that both exclude give a finite number that nothing weighs."""
    neither = (log_t == -math.inf) & (log_s == -math.inf)
    first = torch.where(neither, 0.0, log_t + math.log(share))
    return torch.logaddexp(first, torch.where(neither, 0.0, log_s + math.log1p(-share)))


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "mse": mse,
}
