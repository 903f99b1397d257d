"""Distillation of hidden states: a distance between the vectors of student and teacher, token by token.

Plain torch: the states are a thousandth of the logits, and their traffic does not show beside the layers that made
them. Sums run in float32 (float64 for float64 states).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.layer_map import layer_pairs
from pyfast.ops import _arguments as arguments
from pyfast.reference.distill_kl import weighted

KINDS = ("mse", "cosine", "normalised_mse")

Projection = nn.Module | Tensor


def hidden_loss(
    student: Tensor,
    teacher: Tensor,
    kind: str = "mse",
    *,
    mask: Tensor | None = None,
    projection: Projection | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Distance between hidden states of a student and of a teacher (FitNets, Romero et al., 2015).

    With s the student's vector (projected, where a projection is given) and t the teacher's, a token's value is

    - ``mse``: ‖s − t‖² / H_t (TinyBERT, Jiao et al., 2020, equation 8; Minitron, Muralidharan et al., 2024)
    - ``cosine``: 1 − cos(s, t) (DistilBERT, Sanh et al., 2019), summed as ½‖s/‖s‖ − t/‖t‖‖², which keeps its digits
      where the two almost agree; 1 where one of them is 0
    - ``normalised_mse``: ‖s − t‖² / ‖t‖², so that layers of different size weigh alike

    Args:
        student: ``[..., H_s]``, float32, bfloat16, float16 or float64. Receives the gradient.
        teacher: ``[..., H_t]`` of the same leading shape; no gradient flows to it.
        kind: one of the names above.
        mask: boolean ``[...]``; tokens where it is False do not count, and may hold NaN.
        projection: brings the student to the teacher's width: an ``nn.Linear(H_s, H_t)``, any module that maps
            ``[..., H_s]`` to ``[..., H_t]``, or a weight ``[H_t, H_s]``. Receives gradients. Needed where the widths
            differ.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"`` (``[...]``, 0 where not counted).
        num_items: replaces the divisor of the mean (the count of all micro-batches in gradient accumulation).
        eps: below it ‖t‖² of ``normalised_mse``, and the norms of ``cosine``, count as ``eps``.

    Returns:
        float32 (float64 for float64 states): a scalar, or ``[...]`` for ``reduction="none"``. Where no token counts
        the mean is 0, attached to the graph, with zero gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named in the message.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, accepted: {', '.join(KINDS)}")
    arguments.positive("eps", eps)
    leading = _check_pair(student, teacher, projection)
    options = arguments.LossOptions(mask=mask, reduction=reduction, num_items=num_items)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    weights = options.token_weights(torch.empty(math.prod(leading), device=student.device, dtype=dtype), leading)
    count, counted = math.prod(leading), weights.counted
    student, teacher = student.reshape(count, student.shape[-1]), teacher.detach().reshape(count, teacher.shape[-1])
    if counted is not None:
        student = torch.where(counted.unsqueeze(-1), student, 0.0)
        teacher = torch.where(counted.unsqueeze(-1), teacher, 0.0)
    student = _projected(student, projection, teacher.shape[-1])
    values = _VALUES[kind](student.to(dtype), teacher.to(dtype), eps)
    rows = weighted(values, weights.row_scale)
    return rows.reshape(leading) if reduction == "none" else rows.sum()


def hidden_states_loss(
    student_hiddens: Sequence[Tensor],
    teacher_hiddens: Sequence[Tensor],
    layers: str | list[tuple[int, int]] = "uniform",
    kind: str = "mse",
    *,
    embeddings: bool = False,
    mask: Tensor | None = None,
    projection: Projection | Sequence[Projection] | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """:func:`hidden_loss` over pairs of layers, averaged over the pairs.

    Args:
        student_hiddens: the hidden states as transformers returns them with ``output_hidden_states=True``: the
            embeddings, then the output of each layer (of the last one, in most models, after the final norm), each
            ``[..., H_s]``.
        teacher_hiddens: likewise, each ``[..., H_t]``.
        layers: ``"uniform"``, ``"last"`` or ``"first"`` (see :func:`pyfast.layer_map`), or pairs (student layer,
            teacher layer) counted from 0 over the layers' outputs, the embeddings not counted; negative from the end.
        kind, mask, reduction, num_items, eps: as in :func:`hidden_loss`.
        embeddings: compare the embeddings too, as one pair more, before the others.
        projection: one for all pairs, or a sequence (an ``nn.ModuleList``) with one for each pair.

    Raises:
        TypeError, ValueError: as :func:`hidden_loss`; and hidden states or layers that do not fit together.
    """
    for name, hiddens in (("student_hiddens", student_hiddens), ("teacher_hiddens", teacher_hiddens)):
        if isinstance(hiddens, Tensor) or not isinstance(hiddens, Sequence):
            raise TypeError(f"{name}: got {type(hiddens).__name__}, accepted: a tuple of hidden states, one a layer")
        if len(hiddens) < 2:
            raise ValueError(f"{name}: got {len(hiddens)}, accepted: the embeddings and the output of each layer")
    pairs = layer_pairs(layers, len(student_hiddens) - 1, len(teacher_hiddens) - 1)
    positions = [(0, 0)] * embeddings + [(i + 1, j + 1) for i, j in pairs]
    if isinstance(projection, Sequence | nn.ModuleList):
        projections: list[Any] = list(projection)
        if len(projections) != len(positions):
            raise ValueError(f"projection: got {len(projections)}, accepted: one, or one for each of {len(positions)}")
    else:
        projections = [projection] * len(positions)
    losses = [
        hidden_loss(
            student_hiddens[i],
            teacher_hiddens[j],
            kind,
            mask=mask,
            projection=each,
            reduction=reduction,
            num_items=num_items,
            eps=eps,
        )
        for (i, j), each in zip(positions, projections, strict=True)
    ]
    return torch.stack(losses).mean(dim=0)


def _check_pair(student: Tensor, teacher: Tensor, projection: Projection | None) -> torch.Size:
    """The leading shape of hidden states that fit together."""
    arguments.check_floating("student", student, "of hidden states [..., H]")
    arguments.check_floating("teacher", teacher, "of hidden states [..., H]")
    if student.device != teacher.device:
        raise ValueError(f"teacher: got device {teacher.device}, accepted: the student's, {student.device}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: got shape {list(teacher.shape)}, accepted: the student's leading shape, "
            f"{[*student.shape[:-1], 'H']}"
        )
    width_s, width_t = student.shape[-1], teacher.shape[-1]
    if projection is None:
        if width_s != width_t:
            raise ValueError(
                f"teacher: widths differ, got {width_t} against the student's {width_s}; "
                f"pass projection=nn.Linear({width_s}, {width_t}, bias=False) and train it"
            )
    elif isinstance(projection, Tensor):
        if tuple(projection.shape) != (width_t, width_s):
            raise ValueError(f"projection: got shape {list(projection.shape)}, accepted: {[width_t, width_s]}")
        if not projection.is_floating_point():
            raise TypeError(f"projection: got dtype {projection.dtype}, accepted: a floating dtype")
    elif isinstance(projection, nn.Linear):
        got = (projection.in_features, projection.out_features)
        if got != (width_s, width_t):
            raise ValueError(f"projection: got nn.Linear{got}, accepted: nn.Linear({width_s}, {width_t})")
    elif not isinstance(projection, nn.Module):
        raise TypeError(f"projection: got {type(projection).__name__}, accepted: a module or a weight [H_t, H_s]")
    return student.shape[:-1]


def _projected(student: Tensor, projection: Projection | None, width: int) -> Tensor:
    if projection is None:
        return student
    if isinstance(projection, Tensor):
        return nn.functional.linear(student.to(projection.dtype), projection)
    parameter = next(projection.parameters(), None)
    student = projection(student if parameter is None else student.to(parameter.dtype))
    if student.shape[-1] != width:
        raise ValueError(f"projection: gives {student.shape[-1]} numbers a token, accepted: the teacher's {width}")
    return student


def _mse(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    return (student - teacher).square().mean(-1)


def _normalised_mse(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=eps)


def _cosine(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    norm_s, norm_t = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (student, teacher))
    halves = 0.5 * (student / norm_s.clamp(min=eps) - teacher / norm_t.clamp(min=eps)).square().sum(-1)
    return torch.where(((norm_s < eps) | (norm_t < eps)).squeeze(-1), 1.0, halves)


_VALUES = {"mse": _mse, "cosine": _cosine, "normalised_mse": _normalised_mse}
