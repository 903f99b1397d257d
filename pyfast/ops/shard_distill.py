"""shard_distill: one rank's part of a divergence between softmaxes whose vocabulary lies on several ranks.

The public functions, with the collectives between the two ops and their autograd, are in ``pyfast/parallel.py``.
Kernels: none yet; the ops are served everywhere by ``pyfast/reference/shard_distill.py``, which says what they compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast.ops._library import LIBRARY, define
from pyfast.reference import shard_distill as reference

# Divergences whose gradient needs a sum over all words, the center, besides the log-sum-exps.
CENTERED = frozenset(reference.PULLS)

# Of each row of a shard: the largest logit z, then Σ exp((z − largest) / T) for each T. float64 [rows, 1 + T].
define("shard_stats(Tensor logits, float[] temperatures, float softcap) -> Tensor")
# From the log-sum-exps of whole rows, float64: the student's [rows, 1] at its temperature, or [rows, 2] with that at
# T = 1 where there are labels; the teacher's [rows, 1].
#   without center   sums: float64 [rows, 3], this rank's part of the value, of the center (0 where the divergence has
#                    none, or without with_grad) and the label's logit (0 where another rank holds it); and the
#                    gradient, where with_grad asks for it and the divergence needs no center.
#   with center      sums is empty; the gradient, if with_grad.
# labels count from the shard's first word; below 0: on another rank. grad is finished: the gradient of
# Σ row_scale · divergence + ce_scale · cross-entropy over all ranks to the logits of this one.
define(
    "shard_distill(Tensor student, Tensor teacher, Tensor row_scale, str divergence, float mix, "
    "float student_temperature, float teacher_temperature, float student_softcap, float teacher_softcap, "
    "Tensor student_lse, Tensor teacher_lse, Tensor? center, Tensor? labels, Tensor? ce_scale, bool with_grad) "
    "-> (Tensor sums, Tensor grad)"
)

torch.library.impl(LIBRARY, "shard_stats", "CompositeExplicitAutograd")(reference.shard_stats)
torch.library.impl(LIBRARY, "shard_distill", "CompositeExplicitAutograd")(reference.shard_distill)


@torch.library.register_fake("pyfast::shard_stats", lib=LIBRARY)
def _fake_stats(logits: Tensor, temperatures: list[float], softcap: float) -> Tensor:
    return logits.new_empty((logits.shape[0], 1 + len(temperatures)), dtype=torch.float64)


@torch.library.register_fake("pyfast::shard_distill", lib=LIBRARY)
def _fake(
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
    finished = with_grad and (divergence in CENTERED) == (center is not None)
    sums = student.new_empty((student.shape[0] if center is None else 0, 3), dtype=torch.float64)
    return sums, student.new_empty(tuple(student.shape) if finished else (0, 0))
