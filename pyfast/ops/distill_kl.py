"""distill_kl: divergence between two tempered softmaxes over logits, fused with its gradient.

Read top to bottom: the public function, the choice of backend, the op with its fake and autograd. Kernels:
``csrc/cpu/distill_kl*`` and ``triton_kernels/distill_kl.py``; truth: ``pyfast/reference/distill_kl.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyfast import backends
from pyfast.ops._library import LIBRARY, define
from pyfast.reference import distill_kl as reference

DIVERGENCES = tuple(reference.DIVERGENCES)
REDUCTIONS = ("mean", "sum", "none")


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    divergence: str = "forward_kl",
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    reduction: str = "mean",
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Distillation loss between the logits of a student and of a teacher (Hinton, Vinyals and Dean, 2015).

    With s = softmax(student / temperature) and t = softmax(teacher / teacher_temperature), ``forward_kl`` is
    Σ t log(t/s) a token. Loss and gradient are computed in one pass that reads both tensors once from memory and
    writes the gradient; nothing else of the size of the logits is allocated. Sums run in float32, without the
    cancellation of the textbook formula (a KL of 1e-7 keeps its digits).

    Args:
        student: logits ``[..., V]``, float32, bfloat16 or float16 (float64 by the reference). Receives the gradient.
        teacher: logits ``[..., V]`` of the same leading shape; no gradient flows to it. −inf excludes a word.
            Where dtypes differ both are brought to the wider one.
        divergence: ``"forward_kl"``.
        temperature: T > 0 of the student, and of the teacher unless ``teacher_temperature`` is given.
        scale_by_t2: multiply by ``temperature`` squared, so that the gradient's size does not depend on T.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"`` (``[...]``, 0 where not counted).
        labels: integer ``[...]``; tokens whose label is ``ignore_index`` do not count.
        mask: boolean ``[...]``; tokens where it is False do not count. With ``labels``, both must hold.
        num_items: replaces the divisor of the mean (the count of all micro-batches in gradient accumulation).
        vocab_size: compare the first ``vocab_size`` words of both: for padded vocabularies that differ.
        backend: None for the best, or ``"native"``, ``"triton"``, ``"reference"``.

    Returns:
        float32 (float64 for float64 logits): a scalar, or ``[...]`` for ``reduction="none"``. Where no token counts
        the mean is 0, attached to the graph, with zero gradient. Tokens that do not count are not read.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named in the message.
    """
    leading, student, teacher = _check_logits(student, teacher, vocab_size)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    _check_options(divergence, temperature, teacher_temperature, reduction, num_items)
    counted = _counted_tokens(leading, student.device, labels, ignore_index, mask)
    row_scale = _row_scale(student, counted, reduction, num_items, temperature**2 if scale_by_t2 else 1.0)
    served_by = backends.select("distill_kl", student.device.type, student.dtype, backend)
    if served_by == "reference":
        rows = reference.distill_kl(student, teacher, row_scale, divergence, temperature, teacher_temperature)
    else:
        with_grad = torch.is_grad_enabled() and student.requires_grad
        rows, _ = torch.ops.pyfast.distill_kl(
            student, teacher, row_scale, divergence, temperature, teacher_temperature, with_grad
        )
    return rows.reshape(leading) if reduction == "none" else rows.sum()


def _check_logits(student: Tensor, teacher: Tensor, vocab_size: int | None) -> tuple[torch.Size, Tensor, Tensor]:
    """Both as ``[rows, V]`` of one dtype, the teacher detached, and the leading shape."""
    for name, logits in (("student", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name}: got {type(logits).__name__}, accepted: a tensor of logits [..., V]")
        if not logits.dtype.is_floating_point or logits.dtype.itemsize < 2:
            raise TypeError(f"{name}: got dtype {logits.dtype}, accepted: float32, bfloat16, float16, float64")
        if logits.dim() < 1 or logits.shape[-1] == 0:
            raise ValueError(f"{name}: got shape {list(logits.shape)}, accepted: [..., V] with V of at least 1")
    if student.device != teacher.device:
        raise ValueError(f"teacher: got device {teacher.device}, accepted: the student's, {student.device}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: got shape {list(teacher.shape)}, accepted: the student's leading shape, "
            f"{[*student.shape[:-1], 'V']}"
        )
    smaller = min(student.shape[-1], teacher.shape[-1])
    if vocab_size is not None:
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not 1 <= vocab_size <= smaller:
            raise ValueError(f"vocab_size: got {vocab_size!r}, accepted: an integer from 1 to {smaller}")
        student, teacher = student[..., :vocab_size], teacher[..., :vocab_size]
    elif student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"teacher: vocabularies differ, got {teacher.shape[-1]} words against the student's {student.shape[-1]}; "
            f"pass vocab_size={smaller} (or less) to compare the first words of both"
        )
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    leading, vocab = student.shape[:-1], student.shape[-1]
    rows = math.prod(leading)
    return (
        leading,
        student.to(dtype).reshape(rows, vocab),
        teacher.detach().to(dtype).reshape(rows, vocab),
    )


def _check_options(
    divergence: str,
    temperature: float,
    teacher_temperature: float,
    reduction: str,
    num_items: float | Tensor | None,
) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: got {divergence!r}, accepted: {', '.join(DIVERGENCES)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, accepted: {', '.join(REDUCTIONS)}")
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: got {type(value).__name__}, accepted: a number above 0")
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: got {value}, accepted: a finite number above 0")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f'num_items: replaces the divisor of reduction="mean", got reduction={reduction!r}')
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: got shape {list(num_items.shape)}, accepted: a number or a tensor of one")
    elif not num_items > 0:
        raise ValueError(f"num_items: got {num_items}, accepted: a number above 0")


def _counted_tokens(
    leading: torch.Size, device: torch.device, labels: Tensor | None, ignore_index: int, mask: Tensor | None
) -> Tensor | None:
    """Boolean [rows] of the tokens that count, or None where all do."""
    counted = None
    for name, choice, accepted in (
        ("labels", labels, "an integer tensor"),
        ("mask", mask, "a boolean tensor"),
    ):
        if choice is None:
            continue
        if not isinstance(choice, Tensor):
            raise TypeError(f"{name}: got {type(choice).__name__}, accepted: {accepted} of shape {list(leading)}")
        boolean = choice.dtype == torch.bool
        if boolean != (name == "mask") or choice.dtype.is_floating_point or choice.dtype.is_complex:
            raise TypeError(f"{name}: got dtype {choice.dtype}, accepted: {accepted} of shape {list(leading)}")
        if choice.shape != leading:
            raise ValueError(f"{name}: got shape {list(choice.shape)}, accepted: {list(leading)}, one a token")
        if choice.device != device:
            raise ValueError(f"{name}: got device {choice.device}, accepted: that of the logits, {device}")
        keep = (choice if boolean else choice != ignore_index).reshape(-1)
        counted = keep if counted is None else counted & keep
    return counted


def _row_scale(
    student: Tensor, counted: Tensor | None, reduction: str, num_items: float | Tensor | None, factor: float
) -> Tensor:
    """What each row's value and gradient are multiplied by: mask, T² and the divisor of the mean in one. The kernels
    fold it in, so that backward has nothing left to do. float32 (float64 for float64 logits) [rows], no host sync."""
    rows = student.shape[0]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if counted is None:
        scale = torch.full((rows,), factor, dtype=dtype, device=student.device)
        divisor: float | Tensor = float(max(rows, 1))
    else:
        scale = counted.to(dtype) * factor
        divisor = counted.sum().clamp(min=1).to(dtype)
    if reduction != "mean":
        return scale
    if isinstance(num_items, Tensor):
        divisor = num_items.reshape(()).to(scale)
    elif num_items is not None:
        divisor = float(num_items)
    return scale / divisor


# The op. grad is the finished gradient of rows.sum() to the student, [rows, V], or empty where with_grad is False.
define(
    "distill_kl(Tensor student, Tensor teacher, Tensor row_scale, str divergence, float student_temperature, "
    "float teacher_temperature, bool with_grad) -> (Tensor rows, Tensor grad)"
)
define("scale_rows(Tensor grad, Tensor scale) -> Tensor")


@torch.library.register_fake("pyfast::distill_kl", lib=LIBRARY)
def _fake(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    divergence: str,
    student_temperature: float,
    teacher_temperature: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    shape = tuple(student.shape) if with_grad else (0, 0)
    return student.new_empty(student.shape[0], dtype=torch.float32), student.new_empty(shape)


@torch.library.register_fake("pyfast::scale_rows", lib=LIBRARY)
def _fake_scale_rows(grad: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.impl(LIBRARY, "distill_kl", "CUDA")
def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from pyfast.triton_kernels.distill_kl import distill_kl

    return distill_kl(*arguments)


@torch.library.impl(LIBRARY, "scale_rows", "CUDA")
def _scale_rows_cuda(grad: Tensor, scale: Tensor) -> Tensor:
    return (grad * scale.unsqueeze(-1)).to(grad.dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    grad = output[1]
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)  # or autograd would make zeros of the size of the logits for grad
    ctx.with_grad = inputs[-1]
    ctx.save_for_backward(grad)


def _backward(ctx: Any, grad_rows: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_rows is None:
        return (None,) * 7
    if not ctx.with_grad:
        raise RuntimeError("pyfast::distill_kl: backward needs with_grad=True in forward")
    (grad,) = ctx.saved_tensors
    # The usual case, rows.sum().backward(): the gradient is finished. Looking costs a host sync on a GPU, and a
    # tensor that is being traced (a subclass) has nothing to look at.
    if type(grad_rows) is Tensor and grad_rows.device.type == "cpu" and bool((grad_rows == 1).all()):
        student_grad = grad
    else:
        student_grad = torch.ops.pyfast.scale_rows(grad, grad_rows)
    return student_grad, None, None, None, None, None, None


def _refuse_double_backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
    raise RuntimeError("pyfast.distillation_loss: double backward is not supported; use backend='reference'")


torch.library.register_autograd("pyfast::distill_kl", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("pyfast::scale_rows", _refuse_double_backward, lib=LIBRARY)
