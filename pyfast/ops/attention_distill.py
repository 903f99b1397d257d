"""attention_distill: divergence between the attention distributions of two models, fused with its gradient.

Read top to bottom: the public function, its checks, the op with its fake and autograd. Kernels:
``pyfast/ops/_attention_blocks.py`` (the CPU, and what Triton's does not know) over the rows of ``distill_kl``, and
``triton_kernels/attention_distill.py``; truth: ``pyfast/reference/attention_distill.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyfast import backends
from pyfast.ops import _arguments as arguments
from pyfast.ops import _attention_blocks as blocks
from pyfast.ops._library import LIBRARY, define, register_autograd
from pyfast.ops.distill_kl import scaled
from pyfast.reference.attention_distill import attention_distill as reference


def attention_distillation_loss(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    divergence: str = "forward_kl",
    alpha: float = 0.1,
    beta: float = 0.5,
    causal: bool = True,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Attention transfer: a divergence between where the student's and the teacher's queries look (Jiao et al.,
    TinyBERT, 2020; Wang et al., MiniLM, 2020), without ever holding a matrix of queries × keys.

    For each query, with s = softmax(student_scale · q_s·k_sᵀ / temperature) over the keys that it may attend and t
    likewise of the teacher, the value is a divergence of :func:`pyfast.distillation_loss` between s and t. Queries
    and keys are taken as attention takes them: after any rotation of positions and norm of heads.

    Memory beside queries, keys and their gradients grows with T and S, not with their product, in forward and
    backward; the gradient is computed in forward (``reduction="none"``: again in backward).

    Args:
        q_s: the student's queries ``[B, H, T, D]``, float32, bfloat16 or float16 (float64 by the reference).
        k_s: its keys ``[B, H_kv, S, D]``; H_kv divides H, query head h looks at key head h // (H / H_kv).
        q_t: the teacher's queries ``[B, H', T, D']``; no gradient flows to them.
        k_t: the teacher's keys ``[B, H'_kv, S, D']``. Where dtypes differ all are brought to the widest.
            With H = H' heads are compared one by one. Else both models' heads fall into G = gcd(H, H') groups of
            neighbours, and the means of the distributions in a group are compared: G values a query.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"``, ``"skew_kl"``, ``"skew_reverse_kl"``, ``"tvd"`` or
            ``"mse"``, with their shares ``alpha`` and ``beta`` as in :func:`pyfast.distillation_loss`.
        causal: query i attends keys up to i + S − T: the last query sees all keys, as with a cache of keys.
        mask: boolean ``[B, S]``, True for keys that may be attended. Where T = S it says also which queries count.
        query_mask: boolean ``[B, T]``, True for queries that count; replaces what ``mask`` says of them.
        student_scale: factor of the student's scores, above 0; None: D^-0.5. ``teacher_scale`` likewise, D'^-0.5.
        temperature: divides the scores of both, above 0. The value is not multiplied by its square.
        reduction: ``"mean"`` over batch, groups and the queries that count; ``"sum"``; or ``"none"``, ``[B, G, T]``
            with 0 where a query does not count. A query that may attend no key does not count.
        backend: None for the best, or ``"native"``, ``"triton"``, ``"reference"`` (which holds the full matrices).

    Returns:
        float32 (float64 for float64 inputs): a scalar, or ``[B, G, T]`` for ``reduction="none"``. Where no query
        counts the mean is 0, attached to the graph, with zero gradient. Masked keys and queries that do not count
        may hold anything, NaN too.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, named in the message.
    """
    _check_heads("s", q_s, k_s)
    _check_heads("t", q_t, k_t)
    for name, got, like in (("q_t", q_t, q_s), ("k_t", k_t, k_s)):
        if got.device != like.device:
            raise ValueError(f"{name}: got device {got.device}, accepted: the student's, {like.device}")
        if got.shape[0] != like.shape[0] or got.shape[2] != like.shape[2]:
            accepted = f"[{like.shape[0]}, heads, {like.shape[2]}, D], batch and tokens as the student's"
            raise ValueError(f"{name}: got shape {list(got.shape)}, accepted: {accepted}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}, accepted: True or False")
    objective = arguments.LossOptions(divergence, alpha=alpha, beta=beta, temperature=temperature).objective()
    arguments.check_reduction(reduction, None)
    student_rate = _rate("student_scale", student_scale, q_s, temperature)
    teacher_rate = _rate("teacher_scale", teacher_scale, q_t, temperature)
    groups = math.gcd(q_s.shape[1], q_t.shape[1])
    dtype = torch.promote_types(torch.promote_types(q_s.dtype, k_s.dtype), torch.promote_types(q_t.dtype, k_t.dtype))
    scale = _row_scale(q_s, k_s, causal, mask, query_mask, groups, dtype, reduction)
    served_by = backends.select("attention_distill", q_s.device.type, dtype, backend)
    inputs = (
        q_s.to(dtype),
        k_s.to(dtype),
        q_t.detach().to(dtype),
        k_t.detach().to(dtype),
        scale,
        mask,
        causal,
        objective.divergence,
        objective.mix,
        student_rate,
        teacher_rate,
    )
    if served_by == "reference":
        rows = reference(*inputs)
        return rows if reduction == "none" else rows.sum()
    with_grad = reduction != "none" and torch.is_grad_enabled() and (q_s.requires_grad or k_s.requires_grad)
    loss, rows, _, _ = torch.ops.pyfast.attention_distill(*inputs, with_grad)
    return rows if reduction == "none" else loss


def _check_heads(whose: str, q: Tensor, k: Tensor) -> None:
    """Queries [B, H, T, D] and keys [B, H_kv, S, D] of one model."""
    for name, tensor, shape in ((f"q_{whose}", q, "[B, H, T, D]"), (f"k_{whose}", k, "[B, H_kv, S, D]")):
        arguments.check_floating(name, tensor, shape)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, accepted: {shape}")
        if tensor.shape[1] == 0 or (name[0] == "k" and tensor.shape[2] == 0):
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, accepted: {shape}, at least one head and key")
    if k.device != q.device:
        raise ValueError(f"k_{whose}: got device {k.device}, accepted: that of q_{whose}, {q.device}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        accepted = f"[{q.shape[0]}, H_kv, S, {q.shape[3]}], batch and D as in q_{whose}"
        raise ValueError(f"k_{whose}: got shape {list(k.shape)}, accepted: {accepted}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k_{whose}: got {k.shape[1]} heads, accepted: a number that divides the {q.shape[1]} heads of q_{whose}"
        )


def _rate(name: str, scale: float | None, q: Tensor, temperature: float) -> float:
    """What the product of a query and a key is multiplied by."""
    return (q.shape[3] ** -0.5 if scale is None else arguments.positive(name, scale)) / temperature


def _row_scale(
    q: Tensor,
    k: Tensor,
    causal: bool,
    mask: Tensor | None,
    query_mask: Tensor | None,
    groups: int,
    dtype: torch.dtype,
    reduction: str,
) -> Tensor:
    """The factor of each row, [B, G, T]: 0 where a query does not count."""
    batch, tokens = q.shape[0], q.shape[2]
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    if mask is None and query_mask is None and (not causal or tokens <= k.shape[2]):  # all of them count
        factor = 1 / max(batch * groups * tokens, 1) if reduction == "mean" else 1.0
        return torch.full((batch, groups, tokens), factor, dtype=kept, device=q.device)
    scale = _counted_queries(q, k, causal, mask, query_mask).to(kept)
    if reduction == "mean":
        scale = scale / (scale.sum() * groups).clamp(min=1)
    return scale.unsqueeze(1).expand(-1, groups, -1)


def _counted_queries(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, query_mask: Tensor | None) -> Tensor:
    """Boolean [B, T] of the queries that count: not padding, and with a key to attend. Without a host sync."""
    batch, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    for name, choice, length in (("mask", mask, keys), ("query_mask", query_mask, tokens)):
        if choice is None:
            continue
        if not isinstance(choice, Tensor) or choice.dtype != torch.bool:
            got = f"dtype {choice.dtype}" if isinstance(choice, Tensor) else type(choice).__name__
            raise TypeError(f"{name}: got {got}, accepted: a boolean tensor [{batch}, {length}]")
        if choice.shape != (batch, length):
            raise ValueError(f"{name}: got shape {list(choice.shape)}, accepted: [{batch}, {length}]")
        if choice.device != q.device:
            raise ValueError(f"{name}: got device {choice.device}, accepted: that of the queries, {q.device}")
    last = torch.arange(tokens, device=q.device) + (keys - tokens)  # the key that a causal query sees last
    if not causal:
        last = torch.full_like(last, keys - 1)
    counted = (last >= 0).expand(batch, tokens)
    if mask is not None:
        seen = mask.cumsum(1).index_select(1, last.clamp(min=0))
        counted = counted & (seen > 0)
        if query_mask is None and tokens == keys:
            query_mask = mask
    return counted if query_mask is None else counted & query_mask


# The op. rows[b, g, i] = row_scale[b, g, i] · divergence between the mean attention of the student's and the teacher's
# heads of group g (G = row_scale's, dividing both numbers of heads); loss is their sum. A row of scale 0 may have no
# allowed key. With with_grad, grad_q and grad_k are the finished gradients of loss, and loss can be differentiated;
# without, both are empty, and rows can be: its backward calls the op again with the incoming gradient in row_scale.
define(
    "attention_distill(Tensor q_s, Tensor k_s, Tensor q_t, Tensor k_t, Tensor row_scale, Tensor? key_mask, "
    "bool causal, str divergence, float mix, float student_rate, float teacher_rate, bool with_grad) "
    "-> (Tensor loss, Tensor rows, Tensor grad_q, Tensor grad_k)"
)


@torch.library.register_fake("pyfast::attention_distill", lib=LIBRARY)
def _fake(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, row_scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k = (x.new_empty(x.shape if options[-1] else 0) for x in (q_s, k_s))
    return row_scale.new_empty(()), row_scale.new_empty(row_scale.shape), grad_q, grad_k


@torch.library.impl(LIBRARY, "attention_distill", "CPU")
def _cpu(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, grad_q, grad_k = blocks.attention_distill(*inputs)
    return rows.sum(), rows, grad_q, grad_k


@torch.library.impl(LIBRARY, "attention_distill", "CUDA")
def _cuda(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from pyfast.triton_kernels import attention_distill as triton_kernel

    serve = triton_kernel if triton_kernel.refusal(*inputs) is None else blocks
    rows, grad_q, grad_k = serve.attention_distill(*inputs)
    return rows.sum(), rows, grad_q, grad_k


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    loss, rows, grad_q, grad_k = output
    *tensors, ctx.causal, ctx.divergence, ctx.mix, ctx.student_rate, ctx.teacher_rate, ctx.with_grad = inputs
    ctx.mark_non_differentiable(*((rows,) if ctx.with_grad else (loss,)), grad_q, grad_k)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((grad_q, grad_k) if ctx.with_grad else tensors))


def _backward(ctx: Any, grad_loss: Tensor | None, grad_rows: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 10
    if ctx.with_grad:
        if grad_loss is None:
            return None, None, *rest
        grad_q, grad_k = (_scaled(grad, grad_loss) for grad in ctx.saved_tensors)
        return grad_q, grad_k, *rest
    if grad_rows is None:
        return None, None, *rest
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "pyfast.attention_distillation_loss: double backward is not supported; use backend='reference'"
        )
    q_s, k_s, q_t, k_t, row_scale, key_mask = ctx.saved_tensors
    scale = row_scale * grad_rows
    options = (key_mask, ctx.causal, ctx.divergence, ctx.mix, ctx.student_rate, ctx.teacher_rate, True)
    _, _, grad_q, grad_k = torch.ops.pyfast.attention_distill(q_s, k_s, q_t, k_t, scale, *options)
    return grad_q, grad_k, *rest


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    rows = grad.flatten(0, 2)
    return scaled(rows, factor.expand(rows.shape[0])).view(grad.shape)


register_autograd("attention_distill", _backward, _setup_context)
