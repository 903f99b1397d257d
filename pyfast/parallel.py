"""Distillation losses where the vocabulary is sharded over the ranks of a process group (tensor parallelism).

    rank 0                    rank 1                    …
    student, teacher          student, teacher               [..., V_local] each
         │ shard_stats             │ shard_stats
         └──── all_gather: max and Σ exp of each row ────┘       1st collective, 32 to 40 bytes a token
         │ log-sum-exps            │ the same, bit for bit
         │ shard_distill           │ shard_distill
         └──── all_reduce: value, center, label's logit ─┘       2nd collective, 24 bytes a token
         │ gradient of the shard   │ gradient of the shard

Both run in forward, where the gradient is finished too: backward has no collective, it scales what is saved. A rank
reads its logits three times (twice for ``forward_kl``, whose gradient needs no center) and writes one gradient; nothing
else of their size is allocated.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfast import backends
from pyfast.ops import _arguments as arguments
from pyfast.ops._arguments import LossOptions
from pyfast.ops._linear_chunks import Inputs, Operands, in_chunks
from pyfast.ops.distill_kl import scaled
from pyfast.ops.shard_distill import CENTERED
from pyfast.reference.distill_kl import weighted
from pyfast.reference.shard_distill import log_sum_exps

CHUNK = 512  # tokens, of the linear loss: every rank must choose alike, whatever its memory


def vocab_parallel_distillation_loss(
    student_shard: Tensor,
    teacher_shard: Tensor,
    divergence: str = "forward_kl",
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    **options: Any,
) -> Tensor:
    """:func:`pyfast.distillation_loss` of logits whose words are spread over the ranks of a group.

    Every rank of the group calls it with its words of the same tokens and with the same options, gets the loss over
    the whole vocabulary, and in backward the gradient of its own words. Two collectives run in forward (an all_gather
    and an all_reduce of a few float64 numbers a token), none in backward.

    Args:
        student_shard: the student's logits of this rank's words, ``[..., V_local]``; receives the gradient. Ranks hold
            consecutive words in the order of their ranks; widths may differ, and be 0.
        teacher_shard: the teacher's logits of the same words; no gradient flows to it.
        group: the process group; None for the default group.
        vocab_start: number of the shard's first word in the vocabulary. None: found from the widths of the shards
            before it. Needed with ``vocab_size``.
        divergence, options: as in :func:`pyfast.distillation_loss`, but for ``backend``. ``labels``, whose words are
            counted over the whole vocabulary, ``mask`` and ``num_items`` are the same on every rank; ``vocab_size``
            compares the first words of the whole vocabulary, and ranks leave out those beyond.

    Returns:
        float32 (float64 for float64 logits), the same on every rank: a scalar, or ``[...]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named in the message.
            An error that only one rank sees leaves the others waiting in their collective.
        RuntimeError: double backward.
    """
    given = LossOptions.of("vocab_parallel_distillation_loss", divergence, options, without=("backend",))
    return loss_of_shards(student_shard, teacher_shard, given, group, vocab_start)


def loss_of_shards(
    student_shard: Tensor,
    teacher_shard: Tensor,
    options: LossOptions,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
) -> Tensor:
    """:func:`vocab_parallel_distillation_loss`, its options joined."""
    group = _checked_group(group)
    words = _words_here(student_shard, teacher_shard, vocab_start, options.vocab_size, group)
    leading, student, teacher = arguments.as_rows(student_shard, teacher_shard, words)
    objective = options.objective()
    weights = options.token_weights(student, leading, divide_last=student_shard.dtype == torch.float16)
    call = _Call(_Shard(group, vocab_start, options.vocab_size), weights, objective)
    if torch.is_grad_enabled() and student.requires_grad:
        rows = _VocabParallel.apply(student, teacher, call)
    else:
        with torch.no_grad():
            rows, _ = _rows_and_grad(student, teacher, call, slice(None), with_grad=False)
    return rows.reshape(leading) if options.reduction == "none" else weights.reduced(rows.sum())


def vocab_parallel_linear_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    divergence: str = "forward_kl",
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    chunk_size: int = CHUNK,
    **options: Any,
) -> Tensor:
    """:func:`pyfast.linear_distillation_loss` where the rows of the heads are spread over the ranks of a group.

    Every rank has the hidden states of all tokens and its rows of the heads. Two collectives run in forward for each
    chunk of tokens, as in :func:`vocab_parallel_distillation_loss`, and, where ``student_hidden`` requires a gradient,
    one more at the end, which sums that gradient over the ranks, so that every rank gets the whole of it. None runs in
    backward. ``torch.compile`` breaks its graph here.

    Args:
        student_hidden, teacher_hidden: ``[..., H_s]`` and ``[..., H_t]``, the same on every rank.
        student_head, teacher_head: this rank's rows, ``[V_local, H_s]`` and ``[V_local, H_t]``, of the same words.
            Ranks hold consecutive words in the order of their ranks; widths may differ, and be 0.
        student_bias, teacher_bias: ``[V_local]``.
        teacher_logits: this rank's words, ``[..., V_local]``, in place of ``teacher_hidden`` and ``teacher_head``.
        group, vocab_start, divergence, options: as in :func:`vocab_parallel_distillation_loss`.
            ``reduction="none"`` is accepted where no gradient is required: the gradient of a head is finished in
            forward.
        chunk_size: tokens a chunk, from 1, the same on every rank. Three blocks of ``chunk_size`` · V_local logits are
            alive at a time.

    Returns:
        As :func:`vocab_parallel_distillation_loss`. The gradients and their dtypes are those of
        :func:`pyfast.linear_distillation_loss`.

    Raises:
        As :func:`vocab_parallel_distillation_loss`.
    """
    given = LossOptions.of("vocab_parallel_linear_distillation_loss", divergence, options, without=("backend",))
    operands = Operands(
        (student_hidden,),
        student_head,
        student_bias,
        None if teacher_hidden is None else (teacher_hidden,),
        teacher_head,
        teacher_bias,
        teacher_logits,
    )
    return linear_loss_of_shards(operands, given, chunk_size, group, vocab_start)


@torch.compiler.disable  # the number of chunks hangs on how many tokens count
def linear_loss_of_shards(
    operands: Operands,
    options: LossOptions,
    chunk_size: int,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
) -> Tensor:
    """:func:`vocab_parallel_linear_distillation_loss`, its operands and options joined."""
    group = _checked_group(group)
    operands.check(least=0)
    words = _common_words(*operands.vocabularies, vocab_start, options.vocab_size, group)
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size!r}, accepted: an integer from 1")
    if options.reduction == "none" and any(operands.wanted):
        raise ValueError('reduction: got "none", accepted where a gradient is required: "mean", "sum"')
    inputs, weights = operands.joined(options, words, chunk_size)
    call = _Call(_Shard(group, vocab_start, options.vocab_size), weights, inputs.objective)
    if any(inputs.wanted):
        loss = _VocabParallelLinear.apply(*inputs[:3], inputs, call)
    else:
        with torch.no_grad():
            loss, *_ = _in_chunks(inputs, call)
    return loss.reshape(operands.leading) if options.reduction == "none" else weights.reduced(loss)


class _Shard(NamedTuple):
    """Where this rank's words lie."""

    group: dist.ProcessGroup
    vocab_start: int | None
    vocab_size: int | None


class _Call(NamedTuple):
    """A checked call: all but the logits. Labels count over the whole vocabulary."""

    shard: _Shard
    weights: arguments.TokenWeights
    objective: arguments.Objective


def _rows_and_grad(
    student: Tensor, teacher: Tensor, call: _Call, part: slice | Tensor, *, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Values of the rows ``part`` of a call over the whole vocabulary, and the gradient of their sum to this rank's
    logits: the two collectives, and what lies between them."""
    objective, group = call.objective, call.shard.group
    row_scale = call.weights.row_scale[part]
    ce_scale = None if call.weights.ce_scale is None else call.weights.ce_scale[part]
    student_temperatures = [objective.student_temperature] + ([] if ce_scale is None else [1.0])
    teacher_temperatures = [objective.teacher_temperature]

    student_stats = torch.ops.pyfast.shard_stats(student, student_temperatures, objective.student_softcap)
    teacher_stats = torch.ops.pyfast.shard_stats(teacher, teacher_temperatures, objective.teacher_softcap)
    both = torch.cat([student_stats, teacher_stats], -1)
    start = -1 if call.shard.vocab_start is None else call.shard.vocab_start
    place = [both.new_full((1,), start), both.new_full((1,), student.shape[-1])]
    gathered = _all_gather(torch.cat([both.reshape(-1), *place]), group)
    starts, widths = gathered[:, -2], gathered[:, -1]
    both = gathered[:, :-2].reshape(len(gathered), *both.shape)
    split = student_stats.shape[-1]
    student_lse = log_sum_exps(both[..., :split], student_temperatures)
    teacher_lse = log_sum_exps(both[..., split:], teacher_temperatures)
    _check_places(call, part, starts, widths)

    labels = None
    if call.weights.labels is not None:
        labels = call.weights.labels[part] - widths[: dist.get_rank(group)].sum().long()
        labels = torch.where(labels < student.shape[-1], labels, -1)  # below 0 already: on a rank before
    inputs = (student, teacher, row_scale, *objective, student_lse, teacher_lse)
    sums, grad = torch.ops.pyfast.shard_distill(*inputs, None, labels, ce_scale, with_grad)
    dist.all_reduce(sums, group=group)
    if with_grad and objective.divergence in CENTERED:
        _, grad = torch.ops.pyfast.shard_distill(*inputs, sums[:, 1], labels, ce_scale, True)

    rows = weighted(sums[:, 0], row_scale.double())
    if call.weights.labels is not None and ce_scale is not None:
        known = (call.weights.labels[part] >= 0) & (call.weights.labels[part] < widths.sum())
        ce = torch.where(known, student_lse[:, 1] - sums[:, 2], math.nan)
        rows = rows + weighted(ce, ce_scale.double())
    return rows.to(row_scale.dtype), grad


def _all_gather(flat: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[n]`` of every rank as ``[ranks, n]``."""
    out = flat.new_empty(dist.get_world_size(group) * flat.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(out, flat, group=group)
    return out.view(-1, flat.numel())


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, call: _Call) -> Tensor:
        rows, grad = _rows_and_grad(student, teacher, call, slice(None), with_grad=True)
        ctx.save_for_backward(grad)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return _scaled(grad, grad_rows), None, None


def _in_chunks(inputs: Inputs, call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def loss_of(student: Tensor, teacher: Tensor, chunk: slice | Tensor) -> tuple[Tensor, Tensor]:
        return _rows_and_grad(student, teacher, call, chunk, with_grad=any(inputs.wanted))

    return in_chunks(inputs, loss_of)


class _VocabParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, inputs: Inputs, call: _Call) -> Tensor:
        inputs = inputs._replace(student_hidden=hidden, student_head=head, student_bias=bias)
        loss, grad_hidden, grad_head, grad_bias = _in_chunks(inputs, call)
        if inputs.wanted[0]:
            wide = grad_hidden.to(call.weights.row_scale.dtype)
            dist.all_reduce(wide, group=call.shard.group)
            grad_hidden = wide.to(grad_hidden.dtype)
        ctx.wanted = inputs.wanted
        ctx.dtypes = [None if operand is None else operand.dtype for operand in (hidden, head, bias)]
        ctx.save_for_backward(grad_hidden, grad_head, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = []
        for grad, wanted, dtype in zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True):
            rows = grad if grad.dim() == 2 else grad.unsqueeze(1)
            grads.append(_scaled(rows, grad_loss.expand(len(rows))).view_as(grad).to(dtype) if wanted else None)
        return *grads, None, None


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """The finished gradient times the incoming one of its rows, in place where that can be."""
    if backends.select("distill_kl", grad.device.type, grad.dtype) == "reference":
        return (grad * scale.unsqueeze(-1)).to(grad.dtype)
    return scaled(grad, scale)


def _checked_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group: torch.distributed is not initialised, accepted after dist.init_process_group")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: got {type(group).__name__}, accepted: a ProcessGroup that this rank belongs to "
            "(of a DeviceMesh: mesh.get_group(dimension))"
        )
    return group


def _words_here(
    student: Tensor, teacher: Tensor, vocab_start: int | None, vocab_size: int | None, group: dist.ProcessGroup
) -> int:
    """How many words of its shards this rank compares."""
    arguments.check_floating("student_shard", student, "of logits [..., V_local]", least=0)
    arguments.check_floating("teacher_shard", teacher, "of logits [..., V_local]", least=0)
    arguments.check_same_tokens(student, teacher)
    return _common_words(student.shape[-1], teacher.shape[-1], vocab_start, vocab_size, group)


def _common_words(
    student: int, teacher: int, vocab_start: int | None, vocab_size: int | None, group: dist.ProcessGroup
) -> int:
    """The width of both shards, or what of it lies below ``vocab_size``."""
    for name, value, least in (("vocab_start", vocab_start, 0), ("vocab_size", vocab_size, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}: got {value!r}, accepted: an integer from {least}, or None")
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"teacher_shard: got {teacher} words against the student's {student}, accepted: the same words of "
                "both; pass vocab_start and vocab_size where only the end of the vocabulary differs"
            )
        return student
    if vocab_start is None:
        if dist.get_world_size(group) > 1:
            raise ValueError("vocab_start: got None, accepted with vocab_size: the number of this shard's first word")
        vocab_start = 0
    words = min(max(vocab_size - vocab_start, 0), max(student, teacher))
    if words > min(student, teacher):
        raise ValueError(
            f"teacher_shard: got words {vocab_start} to {vocab_start + teacher} against the student's {vocab_start} to "
            f"{vocab_start + student}, accepted: the same words of both below vocab_size={vocab_size}"
        )
    return words


def _check_places(call: _Call, part: slice | Tensor, starts: Tensor, widths: Tensor) -> None:
    """Shards follow each other and reach ``vocab_size``, and labels lie in them; looked at where that costs no host
    sync. All ranks see the same figures, so that all of them raise or none."""
    if type(widths) is not Tensor or widths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    end = 0
    for rank, (start, width) in enumerate(zip(starts.long().tolist(), widths.long().tolist(), strict=True)):
        if width > 0 and start not in (-1, end):
            raise ValueError(
                f"vocab_start: got {start} on rank {rank} of the group, accepted: {end}, after the ranks before"
            )
        end += width
    if end < 1:
        raise ValueError("student_shard: got no word on any rank, accepted: at least one")
    if call.shard.vocab_size not in (None, end):
        raise ValueError(f"vocab_size: got {call.shard.vocab_size}, accepted: an integer from 1 to {end}, or None")
    if call.weights.labels is not None:
        counted = None if call.weights.counted is None else call.weights.counted[part]
        arguments.check_labels(call.weights.labels[part], counted, end)
