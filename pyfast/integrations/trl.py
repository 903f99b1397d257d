"""A drop-in for the loss of TRL's ``GKDTrainer``: same arguments, same conventions, one fused pass.

The conventions (Agarwal et al., GKD, 2024, equation 1, and TRL's code), with s and t the softmaxes of both logits over
``temperature``:

- ``beta`` 0: Σ t log(t/s); 1: Σ s log(s/t); between: β KL(t‖m) + (1−β) KL(s‖m), m = βt + (1−β)s
- the value is not multiplied by the temperature's square
- ``labels`` are aligned with the logits, −100 where a token does not count
- ``reduction="batchmean"``: over the tokens that count with labels, over the first dimension without;
  ``"mean"``: over tokens and words; ``"sum"``; ``"none"``: one value a word

Two things differ, both where TRL's formula gives NaN: a batch in which no token counts gives 0, attached to the graph,
and words that the teacher excludes (−inf) add nothing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfast.ops import _arguments as arguments
from pyfast.ops.distill_kl import distillation_loss

REDUCTIONS = ("batchmean", "mean", "sum", "none")
_IGNORE = -100
_HOMES = ("trl.experimental.gkd", "trl")  # where releases of TRL keep GKDTrainer, the newest first


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    *,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence with TRL's conventions (see the module), through
    :func:`pyfast.distillation_loss`.

    Args:
        student_logits, teacher_logits: ``[B, T, V]`` (any leading shape).
        labels: integers ``[B, T]`` or None.
        beta: from 0 to 1.
        temperature: above 0.
        reduction: ``"batchmean"``, ``"mean"``, ``"sum"`` or ``"none"``. The last gives a value a word, ``[B, T, V]``
            (``[n, V]`` with labels, the n tokens that count), and takes plain torch and memory of the logits' size.
        vocab_size, backend: as in :func:`pyfast.distillation_loss`.

    Returns:
        float32, a scalar but for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as :func:`pyfast.distillation_loss`.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, accepted: {', '.join(REDUCTIONS)}")
    beta = arguments.number("beta", beta, "a number from 0 to 1")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: got {beta}, accepted: a number from 0 to 1")
    if reduction == "none":
        leading, student, teacher = arguments.check_pair(student_logits, teacher_logits, vocab_size)
        arguments.positive("temperature", temperature)
        counted = arguments.counted_tokens(leading, student.device, labels, _IGNORE, None)
        values = _words(student, teacher, beta, temperature)
        return values.reshape(*leading, -1) if counted is None else values[counted]
    loss = distillation_loss(
        student_logits,
        teacher_logits,
        {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd"),
        beta=beta,
        temperature=temperature,
        scale_by_t2=False,
        labels=labels,
        ignore_index=_IGNORE,
        reduction="sum" if reduction == "sum" or labels is None else "mean",
        vocab_size=vocab_size,
        backend=backend,
    )
    if reduction == "sum":
        return loss
    words = min(student_logits.shape[-1], teacher_logits.shape[-1]) if vocab_size is None else vocab_size
    if labels is not None:
        return loss if reduction == "batchmean" else loss / words
    tokens = math.prod(student_logits.shape[:-1])
    first = student_logits.shape[0] if student_logits.dim() > 1 else 1
    return loss / max(first if reduction == "batchmean" else tokens * words, 1)


def patch_gkd(trainer: type | None = None) -> Callable[[], None]:
    """Gives TRL's ``GKDTrainer`` (or ``trainer``, a class with a static ``generalized_jsd_loss``) this module's loss.

    Returns:
        A function that puts the former loss back.

    Raises:
        ImportError: TRL is not there, or has no ``GKDTrainer`` where its releases keep it.
        TypeError: ``trainer`` has no such loss.
    """
    trainer = _gkd_trainer() if trainer is None else trainer
    if not isinstance(trainer, type) or not hasattr(trainer, "generalized_jsd_loss"):
        raise TypeError(f"trainer: got {trainer!r}, accepted: a class with generalized_jsd_loss, such as GKDTrainer")
    own = vars(trainer).get("generalized_jsd_loss")
    trainer.generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    def restore() -> None:
        if own is None:  # it was inherited
            del trainer.generalized_jsd_loss
        else:
            trainer.generalized_jsd_loss = own

    return restore


class GKDMixin:
    """This module's loss in a subclass: ``class FusedGKDTrainer(GKDMixin, GKDTrainer): ...``"""

    generalized_jsd_loss = staticmethod(generalized_jsd_loss)


def _gkd_trainer() -> Any:
    for home in _HOMES:
        try:
            return importlib.import_module(home).GKDTrainer
        except (ImportError, AttributeError):
            continue
    raise ImportError("patch_gkd: no GKDTrainer in trl.experimental.gkd or trl; install trl, or pass the class")


def _words(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """The words' parts of the divergence, [rows, V]."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_s, log_t = (torch.log_softmax(x.to(dtype) / temperature, dim=-1) for x in (student, teacher))
    if beta == 0.0:
        return _part(log_t, log_s)
    if beta == 1.0:
        return _part(log_s, log_t)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return beta * _part(log_t, log_m) + (1.0 - beta) * _part(log_s, log_m)


def _part(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p/q) of each word, 0 where p is 0."""
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
