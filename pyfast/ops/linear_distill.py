"""linear_distill: the divergence of distill_kl between two linear heads, whose logits never exist in full.

Read top to bottom: the public function, its checks and the choice of backend, the op with its fake and autograd.
Chunks and products: ``pyfast/ops/_linear_chunks.py``; truth: ``pyfast/reference/linear_distill.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast import backends
from pyfast.ops import _arguments as arguments
from pyfast.ops._library import LIBRARY, define, register_autograd
from pyfast.ops._linear_chunks import Inputs, Operands, gradients, in_chunks
from pyfast.ops.distill_kl import scaled
from pyfast.reference import linear_distill as reference


def linear_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    divergence: str = "forward_kl",
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    chunk_size: int | None = None,
    **options: Any,
) -> Tensor:
    """:func:`distillation_loss` between hidden states times head, without ever holding the logits.

    The same value as ``distillation_loss(F.linear(student_hidden, student_head, student_bias), F.linear(teacher_hidden,
    teacher_head, teacher_bias), …)``, computed a chunk of tokens at a time together with the gradients.

    Memory beyond inputs and gradients: 3 · ``chunk_size`` · V logits. The gradient of the head is summed in float32 and
    kept so until backward, which rounds it once: where the head is bfloat16 or float16 that takes 4 · V · H_s bytes
    more. Gradients that are not required (a frozen head) are neither computed nor allocated.

    ``reduction="mean"`` and ``"sum"`` compute the gradients in forward, and backward scales them by the one number that
    comes in. With ``"none"`` another number comes in for every token, which a finished gradient of the head cannot be
    scaled by: forward then computes the values alone, and backward runs the chunks again. Sum with weights through
    ``mask``, ``num_items`` or a factor where that will do.

    Args:
        student_hidden: ``[..., H_s]``, float32, bfloat16 or float16 (float64 by the reference). Receives a gradient.
        student_head: ``[V, H_s]`` of the same dtype, such as ``model.lm_head.weight``. Receives a gradient. May be tied
            to another parameter or be a view. Both heads may be DTensors sharded by their rows, on a mesh of one
            dimension, with biases and ``teacher_logits`` likewise: then
            :func:`pyfast.parallel.vocab_parallel_linear_distillation_loss` runs.
        teacher_hidden, teacher_head: ``[..., H_t]`` with the student's leading shape, and ``[V, H_t]``; no gradient
            flows to them. Width and dtype are the teacher's own; logits are compared in the wider dtype of the two.
        student_bias, teacher_bias: ``[V]``; the student's receives a gradient.
        teacher_logits: ``[..., V]``, in place of ``teacher_hidden`` and ``teacher_head``.
        divergence: as in :func:`distillation_loss`.
        chunk_size: tokens a chunk, from 1. None: as many as make the products efficient, fewer where an eighth of the
            free memory does not hold them. Sums over tokens are rounded in the order of the chunks.
        options: the options of :func:`distillation_loss`. With ``vocab_size`` only the first rows of both heads are
            multiplied; ``backend="reference"`` holds the logits in full.

    Under ``torch.autocast`` the products run in its dtype, as those of ``F.linear`` would; gradients always come in
    the dtype of what they belong to.

    Returns:
        As :func:`distillation_loss`: float32 (float64 for float64 inputs), a scalar, or ``[...]`` for ``"none"``.
        Tokens that do not count are not read, and on the CPU not multiplied either.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named in the message.
        RuntimeError: double backward, which only ``backend="reference"`` has.
    """
    given = arguments.LossOptions.of("linear_distillation_loss", divergence, options)
    operands = Operands(
        (student_hidden,),
        student_head,
        student_bias,
        None if teacher_hidden is None else (teacher_hidden,),
        teacher_head,
        teacher_bias,
        teacher_logits,
    )
    if arguments.is_dtensor(student_head) or arguments.is_dtensor(teacher_head):
        from pyfast import _dtensor  # a floor above: collectives run between the ops there

        return _dtensor.linear_distillation_loss(operands, given, chunk_size)
    return layers_loss((1.0,), operands, given, chunk_size)


def layers_loss(
    layer_weights: Sequence[float], operands: Operands, options: arguments.LossOptions, chunk_size: int | None
) -> Tensor:
    """Σ layer_weights[i] · :func:`linear_distillation_loss` of the i-th hidden states, for several that share a head.

    All layers make one call of the op, so that there is one gradient of the head and not one a layer. ``labels`` and
    ``mask`` are those of one layer.
    """
    operands.check()
    words = arguments.common_vocabulary(*operands.vocabularies, options.vocab_size)
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1):
        raise ValueError(f"chunk_size: got {chunk_size!r}, accepted: an integer from 1, or None")
    inputs, weights = operands.joined(options, words, chunk_size, layer_weights=layer_weights, labels_below=words)
    device = operands.student_head.device.type
    if backends.select("linear_distill", device, inputs.logits_dtype, options.backend) == "reference":
        rows = reference.linear_distill(*inputs[:16])
        loss = rows.sum() if inputs.summed else rows
    else:
        loss, *_ = torch.ops.pyfast.linear_distill(*inputs)
    if not inputs.summed:
        return loss.reshape(len(layer_weights), *operands.leading).sum(0)
    return weights.reduced(loss)


# The op. With ``summed`` the loss is one number, Σ rows of distill_kl, and the wanted gradients come with it: that of
# the hidden states in their dtype, the other two in float32, empty where not wanted. Without it the loss is [rows] and
# no gradient may be wanted: backward runs the op again.
define(
    "linear_distill(Tensor student_hidden, Tensor student_head, Tensor? student_bias, Tensor teacher, "
    "Tensor? teacher_head, Tensor? teacher_bias, Tensor row_scale, str divergence, float mix, "
    "float student_temperature, float teacher_temperature, float student_softcap, float teacher_softcap, "
    "Tensor? labels, Tensor? ce_scale, int words, int chunk_size, ScalarType student_dtype, ScalarType teacher_dtype, "
    "bool summed, bool[3] wanted) -> (Tensor loss, Tensor grad_hidden, Tensor grad_head, Tensor grad_bias)"
)


@torch.library.register_fake("pyfast::linear_distill", lib=LIBRARY)
def _fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Inputs(*inputs)
    loss = call.row_scale.new_empty(() if call.summed else call.row_scale.shape)
    return loss, *gradients(call)


@torch.library.impl(LIBRARY, "linear_distill", "CompositeExplicitAutograd")
def _whole(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Inputs(*inputs)

    def loss_of(student: Tensor, teacher: Tensor, chunk: slice | Tensor) -> tuple[Tensor, Tensor]:
        rows, _, grad = torch.ops.pyfast.distill_kl(
            student,
            teacher,
            call.row_scale[chunk],
            *call.objective,
            None if call.labels is None else call.labels[chunk],
            None if call.ce_scale is None else call.ce_scale[chunk],
            any(call.wanted),
        )
        return rows, grad

    return in_chunks(call, loss_of)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    call = Inputs(*inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or autograd would make zeros of the size of the head for grad_head
    ctx.dtypes = [None if operand is None else operand.dtype for operand in inputs[:3]]
    if call.summed:
        ctx.wanted, ctx.inputs = call.wanted, None
        ctx.save_for_backward(*output[1:])
    else:
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * len(Inputs._fields)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "pyfast.linear_distillation_loss: double backward (create_graph=True) is not supported; "
            "use backend='reference'"
        )
    if ctx.inputs is None:
        wanted = ctx.wanted
        grads = [_times(grad, grad_loss) if of else grad for grad, of in zip(ctx.saved_tensors, wanted, strict=True)]
    else:
        wanted = ctx.needs_input_grad[:3]
        saved = zip(ctx.saved_tensors, ctx.inputs, strict=True)
        call = Inputs(*(value if tensor is None else tensor for tensor, value in saved))
        call = call._replace(
            row_scale=_row_times(call.row_scale, grad_loss),
            ce_scale=None if call.ce_scale is None else _row_times(call.ce_scale, grad_loss),
            summed=True,
            wanted=wanted,
        )
        _, *grads = torch.ops.pyfast.linear_distill(*call)
    grads = [grad.to(dtype) if of else None for grad, dtype, of in zip(grads, ctx.dtypes, wanted, strict=True)]
    return *grads, *(None,) * (len(Inputs._fields) - 3)


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """A saved gradient times the one incoming number: not touched where that is 1, see ``scaled``."""
    rows = grad if grad.dim() == 2 else grad.unsqueeze(1)
    return scaled(rows, factor.expand(rows.shape[0])).view_as(grad)


def _row_times(scale: Tensor, factor: Tensor) -> Tensor:
    """``scale · factor``, and 0 for rows that do not count whatever comes in for them."""
    return torch.where(scale == 0, 0.0, scale * factor)


register_autograd("linear_distill", _backward, _setup_context)
