"""topk_distill: divergence from a teacher that is kept as K words a token, fused with its gradient.

Read top to bottom: the public function, its checks, the op with its fake and autograd. Kernels:
``csrc/{cpu,cuda}/topk_distill*`` and ``triton_kernels/topk_distill.py``; truth: ``pyfast/reference/topk_distill.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyfast import _native, backends
from pyfast.ops import _arguments as arguments
from pyfast.ops._library import LIBRARY, define, register_autograd
from pyfast.ops.distill_kl import scaled
from pyfast.reference import topk_distill as reference

TAILS = reference.TAILS
# How far the probabilities of a token may sum above 1: what rounding log-probabilities to bfloat16 can do to them.
MASS_TOLERANCE = 0.03


def topk_distillation_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor | None,
    tail: str | None = None,
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    reduction: str = "mean",
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Forward KL from a teacher of which K words a token are known: its top K as recorded, or K drawn from it.

    With s = softmax(student_logits / temperature), and t_k = exp(teacher_logprobs) the teacher's probability of word
    ``teacher_ids`` k, a token's value is, by ``tail``,

    - ``"bucket"`` (the default): Σ t_k log(t_k/s_k) + t_R log(t_R/s_R), all other words R taken as one,
      t_R = 1 − Σ t_k and s_R their sum under the student. A true KL: it never exceeds that of the full teacher.
    - ``"ignore"``: Σ t_k log(t_k/s_k) − t_k + s_k, the generalised KL. Σ t_k log(t_k/s_k) alone, where neither side
      sums to 1, goes below 0 and is least where the student puts all its mass on the K words.
    - ``"renormalise"``: KL between teacher and student, each divided by its sum over the K words. The student's other
      words take no part and no gradient.

    With ``weights`` the teacher is Σ w_k δ(id_k) / Σ w_k, and the value its KL over all words (random sampling
    knowledge distillation: Anshumann et al., Sparse Logit Sampling, 2025). For ids drawn from q, with w = p/q, the
    gradient s − t estimates that of the full forward KL: without bias where q = p and w = 1, and with one of order
    1/K, as of every self-normalised estimate, where Σ w_k differs from draw to draw.

    The value is never negative and keeps its digits near convergence. One call reads the student's logits once from
    memory and writes the gradient; nothing else of their size is allocated, and without a gradient nothing at all.

    Args:
        student_logits: ``[..., V]``, float32, bfloat16 or float16 (float64 by the reference). Receives the gradient.
        teacher_ids: int32 or int64 ``[..., K]``, the words of each token, in any order, 1 ≤ K ≤ V (any K ≥ 1 with
            ``weights``). An id that occurs several times in a token is one word with the sum of their probabilities.
        teacher_logprobs: floating ``[..., K]``, natural logarithms of the teacher's probabilities over the whole
            vocabulary, any temperature of the teacher's already applied. −inf marks an entry that is not there
            (padding): its id may be anything. A token without entries gives 0. Not read, and may be None, where
            ``weights`` are given.
        tail: see above; not to be given together with ``weights``, which leave no tail.
        weights: floating ``[..., K]``, 0 or above, of sampled words; 0 marks padding.
        temperature: T > 0 of the student.
        scale_by_t2: multiply by ``temperature`` squared, so that the gradient's size does not depend on T.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"`` (``[...]``, 0 where not counted).
        labels: integer ``[...]``; tokens whose label is ``ignore_index`` do not count.
        mask: boolean ``[...]``; tokens where it is False do not count. With ``labels``, both must hold.
        num_items: replaces the divisor of the mean (the count of all micro-batches in gradient accumulation).
        backend: None for the best, or ``"native"``, ``"cuda"``, ``"triton"``, ``"reference"``. Of rows that its kernel
            does not take ``"cuda"`` hands on to Triton.

    Returns:
        float32 (float64 for float64 logits): a scalar, or ``[...]`` for ``reduction="none"``. Where no token counts
        the mean is 0, attached to the graph, with zero gradient. Tokens that do not count are not read.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named in the message.
            Values (ids out of range, probabilities that sum to more than 1, weights below 0) are looked at on the CPU
            only, outside of tracing; elsewhere, where looking would stop the host, an id out of range gives NaN.
    """
    arguments.check_floating("student_logits", student_logits, "of logits [..., V]")
    tail, entries = _check_teacher(student_logits, teacher_ids, teacher_logprobs, tail, weights)
    temperature = arguments.positive("temperature", temperature)
    leading, words, k = student_logits.shape[:-1], student_logits.shape[-1], teacher_ids.shape[-1]
    student = student_logits.reshape(math.prod(leading), words)
    weight = arguments.LossOptions(
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        reduction=reduction,
        labels=labels,
        ignore_index=ignore_index,
        mask=mask,
        num_items=num_items,
    ).token_weights(student, leading, divide_last=student.dtype == torch.float16)
    ids = teacher_ids.reshape(-1, k).long()
    entries = entries.detach().reshape(-1, k).double()
    _check_values(ids, entries, weight.counted, tail, words)
    inputs = (student, ids, entries, weight.row_scale, tail, temperature)
    served_by = backends.select("topk_distill", student.device.type, student.dtype, backend)
    if served_by == "reference":
        rows = reference.topk_distill(*inputs)
    else:
        op = torch.ops.pyfast.topk_distill_triton if served_by == "triton" else torch.ops.pyfast.topk_distill
        rows, _ = op(*inputs, torch.is_grad_enabled() and student.requires_grad)
    return rows.reshape(leading) if reduction == "none" else weight.reduced(rows.sum())


def _check_teacher(
    student: Tensor, ids: Tensor, logprobs: Tensor | None, tail: str | None, weights: Tensor | None
) -> tuple[str, Tensor]:
    """What the op calls the tail, and the entries that it reads; everything checked but values."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"teacher_ids: got {type(ids).__name__}, accepted: a tensor of ids [..., K]")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"teacher_ids: got dtype {ids.dtype}, accepted: int32, int64")
    if ids.dim() != student.dim() or ids.shape[:-1] != student.shape[:-1] or ids.shape[-1] == 0:
        raise ValueError(
            f"teacher_ids: got shape {list(ids.shape)}, accepted: the leading shape of student_logits and K of at "
            f"least 1, {[*student.shape[:-1], 'K']}"
        )
    if tail is not None and tail not in TAILS:
        raise ValueError(f"tail: got {tail!r}, accepted: {', '.join(TAILS)}")
    name, entries = ("teacher_logprobs", logprobs) if weights is None else ("weights", weights)
    if weights is not None and tail is not None:
        raise ValueError(f"tail: got {tail!r} together with weights, accepted: None, since weights leave no tail")
    if entries is None:
        raise TypeError("teacher_logprobs: got None, accepted: a tensor [..., K], or None where weights are given")
    arguments.check_floating(name, entries, f"{list(ids.shape)}, as teacher_ids")
    if entries.shape != ids.shape:
        raise ValueError(f"{name}: got shape {list(entries.shape)}, accepted: {list(ids.shape)}, as teacher_ids")
    for argument, tensor in (("teacher_ids", ids), (name, entries)):
        if tensor.device != student.device:
            raise ValueError(f"{argument}: got device {tensor.device}, accepted: that of the logits, {student.device}")
    if weights is None and ids.shape[-1] > student.shape[-1]:
        raise ValueError(
            f"teacher_ids: got K = {ids.shape[-1]} words a token, accepted: 1 to {student.shape[-1]}, the vocabulary"
        )
    return ("sampled" if weights is not None else tail or "bucket"), entries


def _check_values(ids: Tensor, entries: Tensor, counted: Tensor | None, tail: str, words: int) -> None:
    """What the entries of the tokens that count say. Looked at where that costs no host sync: on the CPU, outside of
    tracing. NaN passes: it gives NaN in its row."""
    if type(entries) is not Tensor or type(ids) is not Tensor or entries.device.type != "cpu":
        return
    if torch.compiler.is_compiling():
        return
    if counted is not None:
        ids, entries = ids[counted], entries[counted]
    if tail == "sampled":
        wrong = entries[(entries < 0) | (entries == math.inf)]
        if wrong.numel():
            raise ValueError(f"weights: got {float(wrong[0]):g}, accepted: finite numbers, 0 or above")
        masses = entries
    else:
        masses = entries.exp()
        if bool((masses > 1 + MASS_TOLERANCE).any()):
            raise ValueError(
                f"teacher_logprobs: got {float(entries[masses > 1 + MASS_TOLERANCE][0]):g}, accepted: logarithms of "
                "probabilities, 0 or below (log_softmax over the whole vocabulary, not logits or probabilities)"
            )
        sums = masses.sum(-1)
        if bool((sums > 1 + MASS_TOLERANCE).any()):
            raise ValueError(
                f"teacher_logprobs: got a token whose probabilities sum to {float(sums.nan_to_num(0).max()):.4g}, "
                f"accepted: at most 1 (with {MASS_TOLERANCE} for rounding)"
            )
    strange = ((ids < 0) | (ids >= words)) & (masses != 0)
    if bool(strange.any()):
        padding = "weight 0" if tail == "sampled" else "log-probability -inf"
        raise ValueError(
            f"teacher_ids: got {int(ids[strange][0])}, accepted: 0 to {words - 1}, or any id with {padding}"
        )


# The op. tail: "bucket", "ignore" or "renormalise" with log-probabilities as entries, "sampled" with weights; both
# float64 [rows, K]. rows[i] = row_scale[i] · divergence; grad is the finished gradient of rows.sum() to the student,
# [rows, V], empty where with_grad is False. On a GPU it is topk_distill_cuda where that kernel holds such rows and so
# many entries on chip (topk_distill_fits, which looks at shapes and device alone), and topk_distill_triton elsewhere.
OPS = ("topk_distill", "topk_distill_cuda", "topk_distill_triton")
for _op in OPS:
    define(
        f"{_op}(Tensor student, Tensor ids, Tensor entries, Tensor row_scale, str tail, float temperature, "
        "bool with_grad) -> (Tensor rows, Tensor grad)"
    )
define("topk_distill_fits(Tensor student, int entries) -> bool")


def _fake(
    student: Tensor,
    ids: Tensor,
    entries: Tensor,
    row_scale: Tensor,
    tail: str,
    temperature: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    rows = student.new_empty(student.shape[0], dtype=torch.float32)
    return rows, student.new_empty(tuple(student.shape) if with_grad else (0, 0))


@torch.library.impl(LIBRARY, "topk_distill_triton", "CUDA")
def _triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from pyfast.triton_kernels.topk_distill import topk_distill

    return topk_distill(*inputs)


@torch.library.impl(LIBRARY, "topk_distill", "CUDA")
def _on_gpu(*inputs: Any) -> tuple[Tensor, Tensor]:
    if _native.CUDA is not None and torch.ops.pyfast.topk_distill_fits(inputs[0], inputs[1].shape[1]):
        return torch.ops.pyfast.topk_distill_cuda(*inputs)
    return torch.ops.pyfast.topk_distill_triton(*inputs)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, grad = output
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)  # or autograd would make zeros of the size of the logits for grad
    ctx.with_grad = inputs[-1]
    ctx.save_for_backward(grad)


def _backward(ctx: Any, grad_rows: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_rows is None:
        return (None,) * 7
    if not ctx.with_grad:
        raise RuntimeError("pyfast::topk_distill: backward needs with_grad=True in forward")
    (grad,) = ctx.saved_tensors
    return scaled(grad, grad_rows), *(None,) * 6


for _op in OPS:
    torch.library.register_fake(f"pyfast::{_op}", _fake, lib=LIBRARY)
    register_autograd(_op, _backward, _setup_context)
