"""Contrastive distillation: the teacher's responses are made likelier, the student's own are pulled to the teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast.ops import _arguments as arguments
from pyfast.ops.distill_kl import distillation_loss


class Response(NamedTuple):
    """Logits of both models over the same tokens, those of a response (and of its prompt).

    ``student`` and ``teacher``: ``[..., V]``. ``tokens``: labels (integers, ``ignore_index`` where a token does not
    count) or a boolean mask, ``[...]``; None where all count. A plain tuple of the three does as well.
    """

    student: Tensor
    teacher: Tensor
    tokens: Tensor | None = None


def contrastive_distillation_loss(
    teacher_response: Response | tuple[Tensor, Tensor, Tensor | None],
    student_response: Response | tuple[Tensor, Tensor, Tensor | None],
    *,
    alpha: float = 0.1,
    student_alpha: float | None = None,
    balance: float = 0.5,
    shift: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: tuple[float | Tensor, float | Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """Contrastive loss of DistiLLM-2 (Ko et al., 2025, arXiv 2503.07067): another divergence for each kind of text.

    With y_t a response that the teacher wrote to a prompt and y_s one that the student wrote,

        (1 − balance) · skew KL(t ‖ αt + (1−α)s) over y_t  +  balance · skew reverse KL(s ‖ (1−α)t + αs) over y_s

    where s and t are both models' distributions along that text. The first term raises the student's probability
    where the teacher has mass; the second lowers it where the teacher has none. Equal weights, as in the paper, by
    default. The paper's curriculum for α is the caller's: pass another ``alpha`` at each step.

    Args:
        teacher_response, student_response: :class:`Response` or a tuple of its fields: student logits, teacher logits
            (``[..., V]``, as in :func:`pyfast.distillation_loss`) and the tokens that count. The two may differ in
            length.
        alpha: share α of the skew, from 0 to below 1; ``student_alpha`` sets that of the second term apart.
        balance: weight of the second term, from 0 to 1.
        shift: True where the tokens are unshifted, as a causal language model takes its labels: the logits at i
            belong to the token at i + 1.
        ignore_index: label of tokens that do not count.
        reduction: ``"mean"`` over the tokens that count, of each response by itself, or ``"sum"``.
        num_items: the two divisors that replace those of the mean (teacher's, student's responses).
        options: temperature, teacher_temperature, scale_by_t2, softcap, teacher_softcap, vocab_size, backend: as in
            :func:`pyfast.distillation_loss`.

    Returns:
        A scalar; 0, attached to the graph, where no token counts.

    Raises:
        TypeError, ValueError: as :func:`pyfast.distillation_loss`; and responses that do not fit together, named.
    """
    arguments.check_names("contrastive_distillation_loss", options, arguments.option_names(*_OWN))
    if not 0.0 <= arguments.number("balance", balance, "a number from 0 to 1") <= 1.0:
        raise ValueError(f"balance: got {balance}, accepted: a number from 0 to 1")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, accepted: mean, sum (the responses differ in shape)")
    if num_items is not None and (not isinstance(num_items, tuple | list) or len(num_items) != 2):
        raise TypeError(f"num_items: got {type(num_items).__name__}, accepted: two numbers, one a response")
    items = (None, None) if num_items is None else num_items
    student_alpha = alpha if student_alpha is None else student_alpha
    terms = [
        ("skew_kl", alpha, 1.0 - balance, *_checked("teacher_response", teacher_response, shift, ignore_index)),
        (
            "skew_reverse_kl",
            student_alpha,
            balance,
            *_checked("student_response", student_response, shift, ignore_index),
        ),
    ]
    losses = [
        weight
        * distillation_loss(
            student,
            teacher,
            divergence,
            alpha=share,
            reduction=reduction,
            ignore_index=ignore_index,
            num_items=divisor,
            **chosen,
            **options,
        )
        for (divergence, share, weight, student, teacher, chosen), divisor in zip(terms, items, strict=True)
    ]
    return losses[0] + losses[1]


def _checked(
    name: str, response: Response | tuple[Tensor, Tensor, Tensor | None], shift: bool, ignore_index: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits of both models, and the tokens that count as an argument of the loss: labels, or a mask."""
    if not isinstance(response, tuple | list) or len(response) != 3:
        raise TypeError(f"{name}: got {type(response).__name__}, accepted: (student logits, teacher logits, tokens)")
    student, teacher, tokens = response
    for who, logits in (("student", student), ("teacher", teacher)):
        arguments.check_floating(f"{name}: {who}", logits, "of logits [..., V]")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"{name}: teacher: got shape {list(teacher.shape)}, accepted: {[*student.shape[:-1], 'V']}")
    if tokens is None:
        return student, teacher, {}
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name}: tokens: got {got}, accepted: integer labels, a boolean mask or None")
    if tokens.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: tokens: got shape {list(tokens.shape)}, accepted: {list(student.shape[:-1])}, one a token"
        )
    boolean = tokens.dtype == torch.bool
    if shift:
        tokens = arguments.next_token(tokens, False if boolean else ignore_index)
    return student, teacher, {"mask" if boolean else "labels": tokens}


_OWN = ("alpha", "beta", "ce_weight", "reduction", "labels", "ignore_index", "mask", "num_items")
