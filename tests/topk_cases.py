"""Teachers of topk_distill, and its value and gradient by the formulas in float64."""

from __future__ import annotations

import torch

import pyfast

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What rounding the result to the dtype costs, and a little more.
GRAD_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
TAILS = ["bucket", "ignore", "renormalise"]
MODES = [*TAILS, "sampled"]
INF, NAN = float("inf"), float("nan")


def truth(student, ids, entries, mode, temperature=1.0):
    """Values and gradient in float64 by the formulas, from the teacher spread over all words."""
    z = student.detach().double() / temperature
    p = entries.double() if mode == "sampled" else entries.double().exp()
    t = torch.zeros_like(z).scatter_add(-1, torch.where(p > 0, ids.long(), 0), p)
    inside = t > 0
    if mode in ("renormalise", "sampled"):
        t = t / t.sum(-1, keepdim=True)
    if mode == "renormalise":
        z = z.masked_fill(~inside, -INF)
    log_s = torch.log_softmax(z, -1)
    s = log_s.exp()
    value = torch.where(inside, t * (t.log() - log_s), 0.0).sum(-1)
    grad = s - t
    if mode == "ignore":
        gap = torch.where(inside, s - t, 0.0)
        value = value + gap.sum(-1)
        grad = gap - s * gap.sum(-1, keepdim=True)
    if mode == "bucket" and not inside.all():
        t_rest = (1 - t.sum(-1, keepdim=True)).clamp(min=0)
        log_s_rest = log_s.masked_fill(inside, -INF).logsumexp(-1, keepdim=True)
        value = value + torch.where(t_rest > 0, t_rest * (t_rest.log() - log_s_rest), 0.0).squeeze(-1)
        grad = torch.where(inside, s - t, s - t_rest * (log_s - log_s_rest).exp())
    return value, grad / temperature


def loss_and_grad(student, ids, entries, mode="bucket", **options):
    student = student.detach().requires_grad_()
    if mode == "sampled":
        loss = pyfast.topk_distillation_loss(student, ids, None, weights=entries, **options)
    else:
        loss = pyfast.topk_distillation_loss(student, ids, entries, mode, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), grad


def logits(*shape, dtype=torch.float32, spread=3.0):
    return (torch.randn(*shape) * spread).to(dtype)


def teacher(rows, vocab, k, mode="bucket"):
    """The k likeliest words of a random teacher, or k drawn ones, likely repeated, with weights."""
    log_p = torch.log_softmax(logits(rows, vocab), -1)
    if mode == "sampled":
        return torch.randint(0, vocab, (rows, k)), torch.rand(rows, k) + 0.1
    entries, ids = log_p.topk(k)
    order = torch.rand(rows, k).argsort(-1)
    return ids.gather(-1, order), entries.gather(-1, order)
