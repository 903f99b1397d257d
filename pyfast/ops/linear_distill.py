"""linear_distill: the divergence of distill_kl between two linear heads, whose logits never exist in full.

Read top to bottom: the public function, its checks and the choice of backend, the op with its fake, chunks and
autograd. Truth: ``pyfast/reference/linear_distill.py``.

    for each chunk of tokens         student_hidden [n, H_s]      teacher_hidden [n, H_t]
                                             │ · student_headᵀ            │ · teacher_headᵀ
                                      logits [n, V]                logits [n, V]
                                             └────── distill_kl ──────────┘
                                                         │
                                 values [n],  gradient of the logits [n, V]
                                                         │
              grad_hidden = gradient · head,   grad_head += gradientᵀ · hidden,   grad_bias += Σ gradient

Three blocks of [n, V] are alive at a time. The two of the logits are reused by every chunk, and the kernel's gradient
gets its memory again from what it kept (csrc/cpu/reuse.h) or from the caching allocator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast import backends
from pyfast.ops import _arguments as arguments
from pyfast.ops._library import LIBRARY, define
from pyfast.ops._memory import memory_at_hand
from pyfast.ops.distill_kl import scaled
from pyfast.reference import linear_distill as reference

# Tokens above which the products gain little: every chunk reads both heads, and reads and writes the head's gradient.
EFFICIENT_TOKENS = {"cpu": 208, "cuda": 1024}
SMALL_BYTES = 16 << 20  # logits of a chunk that may be had whatever the number of tokens
BLOCKS = 3  # of logits that are alive at a time: the student's, the teacher's, the gradient
PANEL_BYTES = 16 << 20  # of a 16-bit product on its way into float32


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
    others: dict[str, Any] = {
        "student_bias": student_bias,
        "teacher_bias": teacher_bias,
        "teacher_logits": teacher_logits,
        "chunk_size": chunk_size,
    }
    if arguments.is_dtensor(student_head) or arguments.is_dtensor(teacher_head):
        from pyfast import _dtensor  # a floor above: collectives run between the ops there

        return _dtensor.linear_distillation_loss(
            student_hidden, student_head, teacher_hidden, teacher_head, given, **others
        )
    teachers = None if teacher_hidden is None else (teacher_hidden,)
    return layers_loss((1.0,), (student_hidden,), student_head, teachers, teacher_head, given, **others)


def layers_loss(
    layer_weights: Sequence[float],
    student_hiddens: Sequence[Tensor],
    student_head: Tensor,
    teacher_hiddens: Sequence[Tensor] | None,
    teacher_head: Tensor | None,
    options: arguments.LossOptions,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Σ layer_weights[i] · :func:`linear_distillation_loss` of the i-th hidden states, for several that share a head.

    All layers make one call of the op, so that there is one gradient of the head and not one a layer. ``labels`` and
    ``mask`` are those of one layer.
    """
    for hidden in student_hiddens:
        arguments.check_head("student", hidden, student_head, student_bias)
    leading = student_hiddens[0].shape[:-1]
    if any(hidden.shape[:-1] != leading for hidden in student_hiddens):
        shapes = [list(hidden.shape) for hidden in student_hiddens]
        raise ValueError(f"student_hidden: got shapes {shapes}, accepted: one leading shape for all layers")
    teachers = _check_teacher(student_hiddens, teacher_hiddens, teacher_head, teacher_bias, teacher_logits)
    teacher_words = teachers[0].shape[-1] if teacher_head is None else teacher_head.shape[0]
    words = arguments.common_vocabulary(student_head.shape[0], teacher_words, options.vocab_size)
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1):
        raise ValueError(f"chunk_size: got {chunk_size!r}, accepted: an integer from 1, or None")
    objective = options.objective()
    student_dtype = arguments.product_dtype(student_hiddens[0])
    teacher_dtype = teachers[0].dtype if teacher_head is None else arguments.product_dtype(teachers[0])
    logits_dtype = torch.promote_types(student_dtype, teacher_dtype)
    served_by = backends.select("linear_distill", student_head.device.type, logits_dtype, options.backend)

    weights = options.token_weights(
        student_head.new_empty((math.prod(leading), 0), dtype=logits_dtype),
        leading,
        words=words,
        divide_last=student_dtype == torch.float16,
    )
    targets, ce_scale = weights.labels, weights.ce_scale
    if targets is not None and ce_scale is not None:
        targets = targets.repeat(len(layer_weights))
        ce_scale = torch.cat([ce_scale * weight for weight in layer_weights])
    scale = torch.cat([weights.row_scale * weight for weight in layer_weights])

    summed = options.reduction != "none"
    operands = (_rows(student_hiddens), student_head, student_bias)
    inputs: tuple[Any, ...] = (
        *operands,
        _rows([teacher.detach() for teacher in teachers]),
        None if teacher_head is None else teacher_head.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        scale,
        *objective,
        targets,
        ce_scale,
        words,
        chunk_size or 0,
        student_dtype,
        teacher_dtype,
        summed,
        [summed and torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands],
    )
    if served_by == "reference":
        rows = reference.linear_distill(*inputs[:16])
        loss = rows.sum() if summed else rows
    else:
        loss, *_ = torch.ops.pyfast.linear_distill(*inputs)
    if not summed:
        return loss.reshape(len(layer_weights), *leading).sum(0)
    return weights.reduced(loss)


def _check_teacher(
    student_hiddens: Sequence[Tensor],
    hiddens: Sequence[Tensor] | None,
    head: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    least: int = 1,
) -> Sequence[Tensor]:
    """The teacher's hidden states or logits, of which one must be given, over at least ``least`` words."""
    if hiddens is not None and logits is None:
        if head is None:
            raise TypeError("teacher_head: got None, accepted with teacher_hidden: a tensor of weights [V, H]")
        name, teachers = "teacher_hidden", hiddens
        for hidden in hiddens:
            arguments.check_head("teacher", hidden, head, bias, least)
    elif logits is not None and hiddens is None:
        name, teachers = "teacher_logits", (logits,)
        for extra, value in (("teacher_head", head), ("teacher_bias", bias)):
            if value is not None:
                raise ValueError(f"{extra}: got one beside teacher_logits, accepted: with teacher_hidden only")
        arguments.check_floating(name, logits, "of logits [..., V]", least)
    else:
        got = "neither" if logits is None else "both"
        raise ValueError(
            f"teacher_hidden, teacher_logits: got {got}, accepted: one of them (teacher_hidden with teacher_head)"
        )
    for student, teacher in zip(student_hiddens, teachers, strict=True):
        if teacher.device != student.device:
            raise ValueError(f"{name}: got device {teacher.device}, accepted: the student's, {student.device}")
        if teacher.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"{name}: got shape {list(teacher.shape)}, accepted: the leading shape of student_hidden, "
                f"{[*student.shape[:-1], '...']}"
            )
    return teachers


def _rows(layers: Sequence[Tensor]) -> Tensor:
    """Layers ``[..., width]`` as ``[layers · rows, width]``."""
    rows = [layer.reshape(math.prod(layer.shape[:-1]), layer.shape[-1]) for layer in layers]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class _Inputs(NamedTuple):
    """What ``pyfast::linear_distill`` takes, in the order of its schema."""

    student_hidden: Tensor  # [rows, H_s]
    student_head: Tensor  # [V, H_s]
    student_bias: Tensor | None  # [V]
    teacher: Tensor  # hidden states [rows, H_t] where there is a teacher_head, else logits [rows, V]
    teacher_head: Tensor | None
    teacher_bias: Tensor | None
    row_scale: Tensor  # from here to ce_scale as in pyfast::distill_kl
    divergence: str
    mix: float
    student_temperature: float
    teacher_temperature: float
    student_softcap: float
    teacher_softcap: float
    labels: Tensor | None
    ce_scale: Tensor | None
    words: int  # rows of the heads that are multiplied
    chunk_size: int  # tokens; 0: from the memory at hand
    student_dtype: torch.dtype  # of the student's products
    teacher_dtype: torch.dtype
    summed: bool
    wanted: Sequence[bool]  # which gradients, of student_hidden, student_head, student_bias

    @property
    def objective(self) -> arguments.Objective:
        return arguments.Objective(*self[7:13])


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
    call = _Inputs(*inputs)
    loss = call.row_scale.new_empty(() if call.summed else call.row_scale.shape)
    return loss, *_gradients(call)


def _gradients(call: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients that are wanted, empty for the others; zeroed for hidden states and bias."""
    of_hidden, of_head, of_bias = call.wanted
    grad_hidden = call.student_hidden.new_zeros(call.student_hidden.shape if of_hidden else (0,))
    grad_head = call.row_scale.new_empty(call.student_head.shape if of_head else (0,))
    grad_bias = call.row_scale.new_zeros(call.student_head.shape[:1] if of_bias else (0,))
    return grad_hidden, grad_head, grad_bias


@torch.library.impl(LIBRARY, "linear_distill", "CompositeExplicitAutograd")
def _whole(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Inputs(*inputs)

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

    return _in_chunks(call, loss_of)


def _in_chunks(
    call: _Inputs, loss_of: Callable[[Tensor, Tensor, slice | Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss_of`` gives the values of the rows of a chunk, and the gradient of their sum to its first argument, from
    the logits of both: of all words, or of those that this process has (``pyfast/parallel.py``)."""
    of_hidden, of_head, of_bias = call.wanted
    words, row_scale, ce_scale = call.words, call.row_scale, call.ce_scale
    rows = torch.zeros_like(row_scale)
    grad_hidden, grad_head, grad_bias = _gradients(call)
    logits_dtype = torch.promote_types(call.student_dtype, call.teacher_dtype)
    counted = row_scale != 0 if ce_scale is None else (row_scale != 0) | (ce_scale != 0)
    chunks = _chunks(counted, call.chunk_size or _chunk_size(words, logits_dtype, row_scale.device))
    hidden = call.student_hidden
    if hidden.device.type != "cpu":  # there _chunks leaves these rows out; 0 · NaN would reach the head's gradient
        hidden = hidden.masked_fill(~counted.unsqueeze(-1), 0)

    with torch.autocast(row_scale.device.type, enabled=False):
        student = _Product(hidden, call.student_head, call.student_bias, words, call.student_dtype)
        teacher: Tensor | _Product
        if call.teacher_head is None:
            teacher = call.teacher[:, :words]
        else:
            teacher = _Product(call.teacher, call.teacher_head, call.teacher_bias, words, call.teacher_dtype)
        for i, chunk in enumerate(chunks):
            rows[chunk], grad = loss_of(student[chunk].to(logits_dtype), teacher[chunk].to(logits_dtype), chunk)
            grad = grad.to(call.student_dtype)
            if of_hidden:
                grad_hidden[chunk] = torch.mm(grad, student.head).to(grad_hidden.dtype)
            if of_head:
                _add_product(grad_head[:words], grad.t(), student.hidden[chunk], overwrite=i == 0)
            if of_bias:
                grad_bias[:words] += grad.sum(0, dtype=grad_bias.dtype)
            del grad  # its memory serves the next chunk
    if of_head:
        grad_head[words if chunks else 0 :].zero_()
    return rows.sum() if call.summed else rows, grad_hidden, grad_head, grad_bias


class _Product:
    """The logits hidden · headᵀ + bias of any chunk of rows, written over those of the chunk before. The first chunk
    asked for must be none smaller than the others."""

    def __init__(self, hidden: Tensor, head: Tensor, bias: Tensor | None, words: int, dtype: torch.dtype):
        head = head[:words].to(dtype)
        self.head = head if 1 in head.stride() else head.contiguous()  # or every product would copy it
        self.bias = None if bias is None else bias[:words].to(dtype)
        self.hidden = hidden.to(dtype)
        self.logits: Tensor | None = None

    def __getitem__(self, chunk: slice | Tensor) -> Tensor:
        hidden = self.hidden[chunk]
        if self.logits is None:
            self.logits = hidden.new_empty(hidden.shape[0], self.head.shape[0])
        out = self.logits[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.head.t(), out=out)
        return torch.addmm(self.bias, hidden, self.head.t(), out=out)


def _chunks(counted: Tensor, size: int) -> list[slice | Tensor]:
    """Rows in chunks of equal length, at most ``size``: on the CPU those that count; elsewhere, where to know them
    would stop the host, all."""
    total = counted.shape[0]
    chosen = counted.nonzero().squeeze(1) if counted.device.type == "cpu" else None
    if chosen is not None and chosen.shape[0] < total:
        return list(chosen.split(_even(chosen.shape[0], size)))
    length = _even(total, size)
    return [slice(begin, min(begin + length, total)) for begin in range(0, total, length)]


def _even(rows: int, size: int) -> int:
    """The length of as few chunks as ``size`` allows, all but the last of the same."""
    return -(-rows // max(1, -(-rows // size))) or 1


def _chunk_size(words: int, dtype: torch.dtype, device: torch.device) -> int:
    """As many tokens as make the products efficient, and as an eighth of the free memory holds."""
    row = words * dtype.itemsize
    tokens = max(EFFICIENT_TOKENS.get(device.type, 1024), SMALL_BYTES // row)
    memory = memory_at_hand(device)
    return tokens if memory is None else max(1, min(tokens, memory // 8 // (BLOCKS * row)))


def _add_product(total: Tensor, left: Tensor, right: Tensor, overwrite: bool) -> None:
    """total (+)= left · right, into float32. A product in 16 bits is added a panel of rows at a time."""
    if left.dtype == torch.float32:
        torch.addmm(total, left, right, beta=0 if overwrite else 1, out=total)
        return
    panel = max(1, PANEL_BYTES // (right.shape[1] * right.element_size()))
    for begin in range(0, total.shape[0], panel):
        part = slice(begin, begin + panel)
        if overwrite:
            total[part] = torch.mm(left[part], right)
        else:
            total[part] += torch.mm(left[part], right)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    call = _Inputs(*inputs)
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
        return (None,) * len(_Inputs._fields)
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
        call = _Inputs(*(value if tensor is None else tensor for tensor, value in saved))
        call = call._replace(
            row_scale=_row_times(call.row_scale, grad_loss),
            ce_scale=None if call.ce_scale is None else _row_times(call.ce_scale, grad_loss),
            summed=True,
            wanted=wanted,
        )
        _, *grads = torch.ops.pyfast.linear_distill(*call)
    grads = [grad.to(dtype) if of else None for grad, dtype, of in zip(grads, ctx.dtypes, wanted, strict=True)]
    return *grads, *(None,) * (len(_Inputs._fields) - 3)


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """A saved gradient times the one incoming number: not touched where that is 1, see ``scaled``."""
    rows = grad if grad.dim() == 2 else grad.unsqueeze(1)
    return scaled(rows, factor.expand(rows.shape[0])).view_as(grad)


def _row_times(scale: Tensor, factor: Tensor) -> Tensor:
    """``scale · factor``, and 0 for rows that do not count whatever comes in for them."""
    return torch.where(scale == 0, 0.0, scale * factor)


torch.library.register_autograd("pyfast::linear_distill", _backward, setup_context=_setup_context, lib=LIBRARY)
