"""distill_kl: divergence between two tempered softmaxes over logits, fused with its gradient.

Read top to bottom: the public functions, the choice of backend, the op with its fake and autograd. Kernels:
``csrc/{cpu,cuda}/distill_kl*``, ``csrc/cuda/scale_rows.cuh`` and ``triton_kernels/{distill_kl,scale_rows}.py``; truth:
``pyfast/reference/distill_kl.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast import _native, backends
from pyfast.ops import _arguments as arguments
from pyfast.ops._library import LIBRARY, define, register_autograd
from pyfast.reference import distill_kl as reference

DIVERGENCES = tuple(reference.DIVERGENCES)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    divergence: str = "forward_kl",
    *,
    alpha: float = 0.1,
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    ce_weight: float = 0.0,
    reduction: str = "mean",
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Distillation loss between the logits of a student and of a teacher (Hinton, Vinyals and Dean, 2015).

    With s = softmax(student / temperature) and t = softmax(teacher / teacher_temperature), a token's value is

    - ``forward_kl``: Σ t log(t/s)
    - ``reverse_kl``: Σ s log(s/t), over the words that the teacher allows (MiniLLM)
    - ``jsd``: β KL(t‖m) + (1−β) KL(s‖m), m = βt + (1−β)s (GKD)
    - ``skew_kl``: KL(t ‖ αt + (1−α)s); ``skew_reverse_kl``: KL(s ‖ (1−α)t + αs) (DistiLLM)
    - ``tvd``: ½ Σ |s − t|; ``mse``: Σ (s − t)²

    Loss and gradient are computed in one call that reads both tensors once from memory and writes the gradient;
    nothing else of the size of the logits is allocated, and without a gradient nothing at all. Sums run in float32,
    without the cancellation of the textbook formulas (a KL of 1e-7 keeps its digits).

    Args:
        student: logits ``[..., V]``, float32, bfloat16 or float16 (float64 by the reference). Receives the gradient.
        teacher: logits ``[..., V]`` of the same leading shape; no gradient flows to it. −inf excludes a word.
            Where dtypes differ both are brought to the wider one.
            Both may be DTensors whose words, ``Shard(-1)``, lie on one dimension of their mesh, alike in the others:
            then :func:`pyfast.parallel.vocab_parallel_distillation_loss` runs. ``labels`` and ``mask`` are this rank's
            tokens, or DTensors. The result is a plain tensor; where a dimension of the mesh shards the tokens it is
            the loss of this rank's, and its mean is over these unless ``num_items`` is given.
        divergence: one of the names above.
        alpha: share α of the skew divergences, from 0 (no skew) to below 1.
        beta: share β of ``jsd``, above 0 and below 1.
        temperature: T > 0 of the student, and of the teacher unless ``teacher_temperature`` is given.
        scale_by_t2: multiply by ``temperature`` squared, so that the gradient's size does not depend on T.
        softcap: c > 0 brings logits z of both to c·tanh(z/c) first; ``teacher_softcap`` sets the teacher's apart.
        ce_weight: adds ``ce_weight`` times the cross-entropy of ``labels`` under softmax(student) (T = 1).
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"`` (``[...]``, 0 where not counted).
        labels: integer ``[...]``; tokens whose label is ``ignore_index`` do not count.
        mask: boolean ``[...]``; tokens where it is False do not count. With ``labels``, both must hold.
        num_items: replaces the divisor of the mean (the count of all micro-batches in gradient accumulation).
        vocab_size: compare the first ``vocab_size`` words of both: for padded vocabularies that differ.
        backend: None for the best, or ``"native"``, ``"cuda"``, ``"triton"``, ``"reference"``.

    Returns:
        float32 (float64 for float64 logits): a scalar, or ``[...]`` for ``reduction="none"``. Where no token counts
        the mean is 0, attached to the graph, with zero gradient. Tokens that do not count are not read.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named in the message.
            Labels out of range are seen on the CPU only; on a GPU, where looking would stop the host, they give NaN.
    """
    options = arguments.LossOptions(
        divergence,
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        scale_by_t2=scale_by_t2,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        ce_weight=ce_weight,
        reduction=reduction,
        labels=labels,
        ignore_index=ignore_index,
        mask=mask,
        num_items=num_items,
        vocab_size=vocab_size,
        backend=backend,
    )
    if arguments.is_dtensor(student) or arguments.is_dtensor(teacher):
        from pyfast import _dtensor  # a floor above: collectives run between the ops there

        return _dtensor.distillation_loss(student, teacher, options)
    call = _prepare(student, teacher, options)
    rows, _, _ = call.run(torch.is_grad_enabled() and student.requires_grad)
    return rows.reshape(call.leading) if reduction == "none" else call.weights.reduced(rows.sum())


def distillation_value_and_grad(
    student: Tensor, teacher: Tensor, divergence: str = "forward_kl", **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient to ``student`` in one pass, without autograd: for training loops that write their own
    backward.

    Args:
        student, teacher, divergence, options: as in :func:`distillation_loss`; both tensors plain.

    Returns:
        The loss as :func:`distillation_loss` gives it, detached; and the gradient of its sum, of the shape and dtype
        of ``student`` (0 for words beyond ``vocab_size``).

    Raises:
        TypeError, ValueError: as :func:`distillation_loss`.
    """
    given = arguments.LossOptions.of("distillation_value_and_grad", divergence, options)
    if arguments.is_dtensor(student) or arguments.is_dtensor(teacher):
        raise TypeError("student, teacher: got DTensors, accepted by distillation_loss; here plain tensors")
    call = _prepare(student, teacher, given, finished=True)
    with torch.no_grad():
        rows, _, grad = call.run(True)
    loss = rows.reshape(call.leading) if given.reduction == "none" else rows.sum()
    grad = grad.to(student.dtype).reshape(*call.leading, grad.shape[-1])
    beyond = student.shape[-1] - grad.shape[-1]
    return loss, torch.nn.functional.pad(grad, (0, beyond)) if beyond else grad


class _Call(NamedTuple):
    """A checked call: rows of logits, and what ``pyfast::distill_kl`` takes besides."""

    leading: torch.Size
    student: Tensor
    teacher: Tensor
    weights: arguments.TokenWeights
    objective: arguments.Objective
    backend: str

    def run(self, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, the cross-entropy's part of them, and the gradient of their sum (empty without ``with_grad``)."""
        row_scale, labels, ce_scale, _, _ = self.weights
        inputs = (self.student, self.teacher, row_scale, *self.objective, labels, ce_scale)
        if self.backend == "triton":
            return torch.ops.pyfast.distill_kl_triton(*inputs, with_grad)
        if self.backend != "reference":
            return torch.ops.pyfast.distill_kl(*inputs, with_grad)
        if torch.is_grad_enabled() or not with_grad:
            return *reference.distill_kl(*inputs), self.student.new_empty(0)
        with torch.enable_grad():
            student = self.student.detach().requires_grad_()
            rows, ce_rows = reference.distill_kl(student, *inputs[1:])
            (grad,) = torch.autograd.grad(rows.sum(), student)
        return rows.detach(), ce_rows, grad


def _prepare(student: Tensor, teacher: Tensor, options: arguments.LossOptions, finished: bool = False) -> _Call:
    leading, rows_s, rows_t = arguments.check_pair(student, teacher, options.vocab_size)
    objective = options.objective()
    divide_last = student.dtype == torch.float16 and not finished
    weights = options.token_weights(rows_s, leading, words=rows_s.shape[-1], divide_last=divide_last)
    served_by = backends.select("distill_kl", student.device.type, rows_s.dtype, options.backend)
    return _Call(leading, rows_s, rows_t, weights, objective, served_by)


# The op. rows[i] = row_scale[i] · divergence + ce_scale[i] · cross-entropy; ce_rows is the second part alone, empty
# without labels; grad is the finished gradient of rows.sum() to the student, [rows, V], empty where with_grad is False.
# distill_kl_triton is the same by Triton, beside pyfast._cuda; without that module distill_kl is by Triton too.
OPS = ("distill_kl", "distill_kl_triton")
for _op in OPS:
    define(
        f"{_op}(Tensor student, Tensor teacher, Tensor row_scale, str divergence, float mix, "
        "float student_temperature, float teacher_temperature, float student_softcap, float teacher_softcap, "
        "Tensor? labels, Tensor? ce_scale, bool with_grad) -> (Tensor rows, Tensor ce_rows, Tensor grad)"
    )
# grad[i, :] · scale[i]: into a new tensor, or in place, where rows of scale 1 are not touched.
define("scale_rows(Tensor grad, Tensor scale) -> Tensor")
define("scale_rows_(Tensor(a!) grad, Tensor scale) -> ()")


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
    labels: Tensor | None,
    ce_scale: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = student.shape[0]
    rows = student.new_empty(count, dtype=torch.float32)
    ce_rows = student.new_empty(0 if labels is None else count, dtype=torch.float32)
    return rows, ce_rows, student.new_empty(tuple(student.shape) if with_grad else (0, 0))


@torch.library.register_fake("pyfast::scale_rows", lib=LIBRARY)
def _fake_scale_rows(grad: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.register_fake("pyfast::scale_rows_", lib=LIBRARY)
def _fake_scale_rows_(grad: Tensor, scale: Tensor) -> None:
    pass


def _triton(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from pyfast.triton_kernels.distill_kl import distill_kl

    return distill_kl(*inputs)


def _scale_rows_triton(grad: Tensor, scale: Tensor) -> Tensor:
    from pyfast.triton_kernels.scale_rows import scale_rows

    return scale_rows(grad, scale)


def _scale_rows_in_place_triton(grad: Tensor, scale: Tensor) -> None:
    from pyfast.triton_kernels.scale_rows import scale_rows_

    scale_rows_(grad, scale)


torch.library.impl(LIBRARY, "distill_kl_triton", "CUDA")(_triton)
if _native.CUDA is None:
    torch.library.impl(LIBRARY, "distill_kl", "CUDA")(_triton)
    torch.library.impl(LIBRARY, "scale_rows", "CUDA")(_scale_rows_triton)
    torch.library.impl(LIBRARY, "scale_rows_", "CUDA")(_scale_rows_in_place_triton)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, ce_rows, grad = output
    ctx.mark_non_differentiable(ce_rows, grad)
    ctx.set_materialize_grads(False)  # or autograd would make zeros of the size of the logits for grad
    ctx.with_grad = inputs[-1]
    ctx.save_for_backward(grad)


def _backward(ctx: Any, grad_rows: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_rows is None:
        return (None,) * 12
    if not ctx.with_grad:
        raise RuntimeError("pyfast::distill_kl: backward needs with_grad=True in forward")
    (grad,) = ctx.saved_tensors
    return scaled(grad, grad_rows), *(None,) * 11


def scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """``grad`` times the incoming gradient of its rows: in backward of an op that saved ``grad``.

    The graph is gone after an ordinary backward, so the saved tensor is scaled where it lies, and where ``scale`` is
    1 (every ``loss.backward()``) it is not touched; the kernel looks for itself, without a host sync. A graph that is
    kept, or being traced, gets a new tensor.
    """
    if type(scale) is Tensor and not torch.compiler.is_compiling() and not _graph_is_kept():
        torch.ops.pyfast.scale_rows_(grad, scale)
        return grad
    return torch.ops.pyfast.scale_rows(grad, scale)


def _graph_is_kept() -> bool:
    """Whether this backward runs with ``retain_graph`` (or ``create_graph``)."""
    return torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()


def _refuse_double_backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
    raise RuntimeError("pyfast.distillation_loss: double backward is not supported; use backend='reference'")


for _op in OPS:
    torch.library.register_fake(f"pyfast::{_op}", _fake, lib=LIBRARY)
    register_autograd(_op, _backward, _setup_context)
register_autograd("scale_rows", _refuse_double_backward)
