"""Divergence between the attention distributions of two models, and its gradient, without a matrix of T×S.

What it computes, for student and teacher with as many query heads H each (keys may have fewer: head h of the queries
looks at head h // repeat of the keys), with s_i = softmax(rate · q_s[i]·k_sᵀ) over the keys that query i may attend::

    rows[b, h, i] = row_scale[b, h, i] · D(s_i, t_i)                       D and its pulls: _divergences.py
    slope[i, j]   = row_scale · rate · (pull - s · Σ pull)                 (the gradient to q_s[i]·k_s[j])
    grad_q        = slope · k_s        grad_k = slopeᵀ · q_s

A query whose ``row_scale`` is exactly 0 and a key that is masked are not read: their part is 0.

How it is laid out: two launches that multiply the scores out again rather than keep them::

    attention_rows: a program has BLOCK_Q queries of a         attention_keys: a program has BLOCK_K keys of
    head and walks the keys, two or three times                a head and walks the queries that look at them
          keys ──►         ──►               ──►                     keys
      q ┌──────────┐   ┌──────────┐   ┌───────────────┐          q ┌──────┐
        │ log-sums │   │  Σ pull  │   │ rows, slope·k │          │ │      │   slopeᵀ·q, by the log-sums and
        └──────────┘   └──────────┘   └───────────────┘          ▼ └──────┘   Σ pull that were kept
                     not forward_kl

No atomics: a program owns what it writes, so results repeat bit by bit. Queries, keys and three numbers a query (the
log-sums of both and Σ pull) are all that moves; causal programs stop at the diagonal. Products for forward_kl: 5 tiles
in attention_rows (scores twice, grad_q) and 3 in attention_keys; two more for the others.

How accurately: scores and sums are float32. Where it was measured (``plan``), products of float32 are three of tf32, of
both parts of each number but for the two small ones: as accurate as float32 (3.8e-7 of loss and gradients on an H100)
and several times as fast. The slope is rounded to bfloat16 before its product with bfloat16 keys (as the gradient
itself will be). With float16 that product is two of tf32, whose exponents hold what float16 would lose below 6e-8: of
the slope's first 11 bits, and of what is left.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._divergences import DIVERGENCES, terms
from ._launch import DTYPES, launch

#: The widest head.
MAX_WIDTH = 256

_LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _load(base, stride, places, keep, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``places`` of ``WIDTH`` numbers, [places, BLOCK]; 0 beyond the width and where ``keep`` is False."""
    lanes = tl.arange(0, BLOCK)
    return tl.load(
        base + places.to(tl.int64)[:, None] * stride + lanes[None, :],
        mask=keep[:, None] & (lanes < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _exponents(a, b, rate, seen, PRECISION: tl.constexpr):
    """rate · a·bᵀ, -inf where not ``seen``."""
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)  # says nothing of 16-bit inputs
    return tl.where(seen, scores * rate, -_INF)


@triton.jit
def _add_product(slope, x, total, PRECISION: tl.constexpr):
    """total + slope · x, in a precision that fits the dtype of x; see the head of the file."""
    if x.dtype == tl.float32:
        return tl.dot(slope, x, total, input_precision=PRECISION)
    elif x.dtype == tl.float16:
        wide = x.to(tl.float32)  # exact in tf32, as is the upper part of the slope
        upper = (slope.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(upper, wide, total, input_precision="tf32")
        return tl.dot(slope - upper, wide, total, input_precision="tf32")
    else:
        return tl.dot(slope.to(x.dtype), x, total)


@triton.jit
def _open_keys(key_mask, places, keys):
    """Which of these keys exist and are not masked. ``key_mask`` (or None) is the row of the batch entry."""
    inside = places < keys
    if key_mask is None:
        return inside
    else:
        return tl.load(key_mask + places, mask=inside, other=0) != 0


@triton.jit
def _key_tile(
    q_s, q_t, k_s, k_t, stride_s, stride_t, key_mask, start, last, keys, rate_s, rate_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The student's keys from ``start``, which of them each query sees, and the exponents of both models."""
    places = start + tl.arange(0, BLOCK_K)
    open_keys = _open_keys(key_mask, places, keys)
    tile_s = _load(k_s, stride_s, places, open_keys, WIDTH_S, PAD_S)
    tile_t = _load(k_t, stride_t, places, open_keys, WIDTH_T, PAD_T)
    seen = open_keys[None, :]
    if CAUSAL:
        seen = seen & (places[None, :] <= last[:, None])
    exponents_s = _exponents(q_s, tile_s, rate_s, seen, PRECISION)
    return tile_s, seen, exponents_s, _exponents(q_t, tile_t, rate_t, seen, PRECISION)


@triton.jit
def _fold(peak, total, exponents):
    """Another tile into the running Σ 2^exponent of each row, relative to its peak."""
    higher = tl.maximum(peak, tl.max(exponents, axis=1))
    origin = tl.where(higher == -_INF, 0.0, higher)
    total = total * tl.exp2(peak - origin) + tl.sum(tl.exp2(exponents - origin[:, None]), axis=1)
    return higher, total


@triton.jit
def _compare(exponents_s, exponents_t, sum_s, sum_t, seen, share_t, share_s, DIVERGENCE: tl.constexpr):
    """Values and pulls of a tile, and the student's probabilities; ``sum_s`` and ``sum_t`` are log2 of the sums."""
    s = tl.exp2(exponents_s - sum_s)
    t = tl.exp2(exponents_t - sum_t)
    x = tl.where(seen, ((exponents_s - exponents_t) - (sum_s - sum_t)) * _LN_2, 0.0)
    value, pull = terms(s, t, x, ~seen, share_t, share_s, DIVERGENCE)
    return value, pull, s


@triton.jit
def attention_rows(
    q_s, k_s, q_t, k_t, row_scale, key_mask, rows, grad_q, sums_s, sums_t, means,
    q_s_batch, q_s_head, q_s_row, k_s_batch, k_s_head, k_s_row,
    q_t_batch, q_t_head, q_t_row, k_t_batch, k_t_head, k_t_row,
    heads, repeat_s, repeat_t, tokens, keys, rate_s, rate_t, slope_rate, share_t, share_s,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, DIVERGENCE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Values and ``grad_q`` of a block of queries, and what ``attention_keys`` needs of each. What is None (key_mask;
    grad_q, sums and means without a gradient; means for forward_kl) is compiled away."""
    blocks = tl.cdiv(tokens, BLOCK_Q)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks  # the long rows first
    entry = unit // heads
    head = unit % heads
    places = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = places < tokens
    last = places + (keys - tokens)
    scale = tl.load(row_scale + unit * tokens + places, mask=inside, other=0.0)
    counted = scale != 0.0
    k_s += entry * k_s_batch + head // repeat_s * k_s_head
    k_t += entry * k_t_batch + head // repeat_t * k_t_head
    if key_mask is not None:
        key_mask += entry * keys
    tile_q = _load(q_s + entry * q_s_batch + head * q_s_head, q_s_row, places, counted, WIDTH_S, PAD_S)
    tile_t = _load(q_t + entry * q_t_batch + head * q_t_head, q_t_row, places, counted, WIDTH_T, PAD_T)
    reach = keys
    if CAUSAL:
        reach = tl.minimum(keys, (block + 1) * BLOCK_Q + keys - tokens)
    reach = tl.where(tl.max(counted.to(tl.int32), axis=0) == 0, 0, reach)
    peak_s = tl.full([BLOCK_Q], -_INF, tl.float32)
    peak_t = tl.full([BLOCK_Q], -_INF, tl.float32)
    total_s = tl.zeros([BLOCK_Q], tl.float32)
    total_t = tl.zeros([BLOCK_Q], tl.float32)
    for start in tl.range(0, reach, BLOCK_K):
        _, _, es, et = _key_tile(
            tile_q, tile_t, k_s, k_t, k_s_row, k_t_row, key_mask, start, last, keys, rate_s, rate_t,
            WIDTH_S, WIDTH_T, PAD_S, PAD_T, BLOCK_K, CAUSAL, PRECISION,
        )  # fmt: skip
        peak_s, total_s = _fold(peak_s, total_s, es)
        peak_t, total_t = _fold(peak_t, total_t, et)
    # Rows that see nothing do not count: any number will do.
    sum_s = tl.where(counted, peak_s + tl.log2(total_s), 0.0)
    sum_t = tl.where(counted, peak_t + tl.log2(total_t), 0.0)
    mean = tl.zeros([BLOCK_Q], tl.float32)
    if means is not None:
        for start in tl.range(0, reach, BLOCK_K):
            _, seen, es, et = _key_tile(
                tile_q, tile_t, k_s, k_t, k_s_row, k_t_row, key_mask, start, last, keys, rate_s, rate_t,
                WIDTH_S, WIDTH_T, PAD_S, PAD_T, BLOCK_K, CAUSAL, PRECISION,
            )  # fmt: skip
            _, pull, _ = _compare(es, et, sum_s[:, None], sum_t[:, None], seen, share_t, share_s, DIVERGENCE)
            mean += tl.sum(pull, axis=1)
        tl.store(means + unit * tokens + places, mean, mask=inside)
    value = tl.zeros([BLOCK_Q], tl.float32)
    gradient = tl.zeros([BLOCK_Q, PAD_S], tl.float32)
    for start in tl.range(0, reach, BLOCK_K):
        tile_k, seen, es, et = _key_tile(
            tile_q, tile_t, k_s, k_t, k_s_row, k_t_row, key_mask, start, last, keys, rate_s, rate_t,
            WIDTH_S, WIDTH_T, PAD_S, PAD_T, BLOCK_K, CAUSAL, PRECISION,
        )  # fmt: skip
        values, pull, s = _compare(es, et, sum_s[:, None], sum_t[:, None], seen, share_t, share_s, DIVERGENCE)
        value += tl.sum(values, axis=1)
        if grad_q is not None:
            gradient = _add_product(pull - s * mean[:, None], tile_k, gradient, PRECISION)
    tl.store(rows + unit * tokens + places, tl.where(counted, scale * value, 0.0), mask=inside)
    if grad_q is not None:
        tl.store(sums_s + unit * tokens + places, sum_s, mask=inside)
        tl.store(sums_t + unit * tokens + places, sum_t, mask=inside)
        gradient = tl.where(counted[:, None], gradient * (scale * slope_rate)[:, None], 0.0)
        lanes = tl.arange(0, PAD_S)
        tl.store(
            grad_q + (unit * tokens + places)[:, None] * WIDTH_S + lanes[None, :],
            gradient.to(grad_q.dtype.element_ty),
            mask=inside[:, None] & (lanes < WIDTH_S)[None, :],
        )


@triton.jit
def attention_keys(
    q_s, k_s, q_t, k_t, row_scale, key_mask, grad_k, sums_s, sums_t, means,
    q_s_batch, q_s_head, q_s_row, k_s_batch, k_s_head, k_s_row,
    q_t_batch, q_t_head, q_t_row, k_t_batch, k_t_head, k_t_row,
    heads, repeat_s, repeat_t, tokens, keys, rate_s, rate_t, slope_rate, share_t, share_s,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, DIVERGENCE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``grad_k`` of a block of the student's keys, from all queries that see them. Tiles are [keys, queries]."""
    blocks = tl.cdiv(keys, BLOCK_K)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    start_k = (tl.program_id(0) % blocks) * BLOCK_K  # the keys that most queries see first
    key_heads = heads // repeat_s
    entry = unit // key_heads
    places_k = start_k + tl.arange(0, BLOCK_K)
    if key_mask is not None:
        key_mask += entry * keys
    open_keys = _open_keys(key_mask, places_k, keys)
    tile_k = _load(k_s + entry * k_s_batch + unit % key_heads * k_s_head, k_s_row, places_k, open_keys, WIDTH_S, PAD_S)
    first = 0
    if CAUSAL:
        first = tl.maximum(start_k - (keys - tokens), 0) // BLOCK_Q * BLOCK_Q
    gradient = tl.zeros([BLOCK_K, PAD_S], tl.float32)
    for member in range(0, repeat_s):
        head = unit % key_heads * repeat_s + member
        row = (entry * heads + head) * tokens
        tile_kt = _load(
            k_t + entry * k_t_batch + head // repeat_t * k_t_head, k_t_row, places_k, open_keys, WIDTH_T, PAD_T
        )
        for start in tl.range(first, tokens, BLOCK_Q):
            places = start + tl.arange(0, BLOCK_Q)
            inside = places < tokens
            scale = tl.load(row_scale + row + places, mask=inside, other=0.0)
            counted = scale != 0.0
            tile_q = _load(q_s + entry * q_s_batch + head * q_s_head, q_s_row, places, counted, WIDTH_S, PAD_S)
            tile_t = _load(q_t + entry * q_t_batch + head * q_t_head, q_t_row, places, counted, WIDTH_T, PAD_T)
            seen = open_keys[:, None] & counted[None, :]
            if CAUSAL:
                seen = seen & (places_k[:, None] <= (places + (keys - tokens))[None, :])
            es = _exponents(tile_k, tile_q, rate_s, seen, PRECISION)
            et = _exponents(tile_kt, tile_t, rate_t, seen, PRECISION)
            sum_s = tl.load(sums_s + row + places, mask=inside, other=0.0)[None, :]
            sum_t = tl.load(sums_t + row + places, mask=inside, other=0.0)[None, :]
            _, slope, s = _compare(es, et, sum_s, sum_t, seen, share_t, share_s, DIVERGENCE)
            if means is not None:
                slope -= s * tl.load(means + row + places, mask=inside, other=0.0)[None, :]
            gradient = _add_product(slope * scale[None, :], tile_q, gradient, PRECISION)
    lanes = tl.arange(0, PAD_S)
    tl.store(
        grad_k + (unit * keys + places_k)[:, None] * WIDTH_S + lanes[None, :],
        (gradient * slope_rate).to(grad_k.dtype.element_ty),
        mask=(places_k < keys)[:, None] & (lanes < WIDTH_S)[None, :],
    )


class Plan(NamedTuple):
    """Layout of a launch: queries and keys in a tile, warps and tiles in flight."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    precision: str = "ieee"  # of products of float32

    @property
    def options(self) -> dict[str, int]:
        """Those of the launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


#: The fastest of up to twenty on an H100 (docs/kernels-gpu.md) whose terms stay in registers, by dtype, widest head and
#: whether the divergence is ``forward_kl``. float32 stays below 64 queries, from which on Triton multiplies by wgmma:
#: ptxas 12.8, Triton 3.6's, loses descriptors of its tf32x3 where one width is padded to 16 and the other to more.
_HOPPER = {
    (torch.bfloat16, 64, True): Plan(64, 64, 4, 3),
    (torch.bfloat16, 64, False): Plan(64, 16, 4, 3),
    (torch.bfloat16, 128, True): Plan(64, 32, 4, 3),
    (torch.bfloat16, 128, False): Plan(64, 16, 4, 3),
    (torch.bfloat16, 256, True): Plan(64, 32, 8, 2),
    (torch.float16, 64, True): Plan(64, 32, 4, 2),
    (torch.float16, 64, False): Plan(64, 16, 4, 3),
    (torch.float16, 128, True): Plan(32, 32, 4, 2),
    (torch.float32, 64, True): Plan(32, 16, 4, 2, "tf32x3"),
    (torch.float32, 128, True): Plan(16, 16, 8, 2, "tf32x3"),
}


def plan(width: int, dtype: torch.dtype, divergence: str, capability: int) -> Plan:
    """Layout for heads of at most ``width`` numbers on a GPU of ``capability`` (major · 10 + minor): the fastest where
    they were measured, else the largest tiles whose terms stay in registers (``compile.py`` shows them). The two
    products of float16 take more of those."""
    padded = 64 if width <= 64 else 128 if width <= 128 else 256
    measured = _HOPPER.get((dtype, padded, divergence == "forward_kl"))
    if measured is not None and capability == 90:
        return measured
    if dtype == torch.float32:
        return Plan(32, 16, 4, 2) if padded == 64 else Plan(16, 16, 4, 2)
    if dtype == torch.float16 and padded > 64:
        return Plan(32, 32 if padded == 128 else 16, 8, 2)
    return Plan(64, 32, 8, 2) if padded <= 128 else Plan(32, 16, 4, 2)


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    """Compute capability, major · 10 + minor; 0 on the CPU, where Triton interprets."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def refusal(
    q_s: torch.Tensor,
    k_s: torch.Tensor,
    q_t: torch.Tensor,
    k_t: torch.Tensor,
    row_scale: torch.Tensor,
    *options: Any,
) -> str | None:
    """Why these kernels cannot serve arguments of :func:`attention_distill`; None if they can."""
    if q_s.shape[1] != q_t.shape[1] or q_s.shape[1] != row_scale.shape[1]:
        return f"heads are compared one by one; the student has {q_s.shape[1]}, the teacher {q_t.shape[1]}"
    if max(q_s.shape[3], q_t.shape[3]) > MAX_WIDTH:
        return f"heads of up to {MAX_WIDTH} are held on chip; got {q_s.shape[3]} and {q_t.shape[3]}"
    return None


def attention_distill(
    q_s: torch.Tensor,
    k_s: torch.Tensor,
    q_t: torch.Tensor,
    k_t: torch.Tensor,
    row_scale: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    causal: bool = True,
    divergence: str = "forward_kl",
    mix: float = 0.0,
    student_rate: float = 1.0,
    teacher_rate: float = 1.0,
    with_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value of each query, and the gradients of their sum to ``q_s`` and ``k_s``.

    Args:
        q_s, q_t: queries [B, H, T, D] of student and teacher; D may differ. float32, bfloat16 or float16.
        k_s, k_t: keys [B, H_kv, S, D], H_kv dividing H; D as in the queries. All of one dtype, of any strides.
        row_scale: [B, H, T] float32. Queries of factor 0 are not read; only they may have no key to attend.
        key_mask: boolean [B, S], True for keys that may be attended; None for all.
        causal: query i attends keys up to i + S - T.
        divergence: one of ``DIVERGENCES``; ``mix`` the share of its mixture, as in ``pyfast::distill_kl``.
        student_rate, teacher_rate: factor of the scores, above 0.
        with_grad: whether the gradients are computed.

    Returns:
        rows [B, H, T] float32; grad_q [B, H, T, D] and grad_k [B, H_kv, S, D], contiguous in the dtype of the inputs,
        or empty [0] without ``with_grad``.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit, an unknown divergence.

    Never waits for the device, so it can be captured in a CUDA graph.
    """
    _check(q_s, k_s, q_t, k_t, row_scale, key_mask, divergence)
    q_s, k_s, q_t, k_t = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (q_s, k_s, q_t, k_t))
    batch, heads, tokens, width_s = q_s.shape
    key_heads, keys, width_t = k_s.shape[1], k_s.shape[2], q_t.shape[3]
    rows = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q_s.device)
    grad_q = torch.empty(q_s.shape if with_grad else 0, dtype=q_s.dtype, device=q_s.device)
    grad_k = torch.empty(k_s.shape if with_grad else 0, dtype=k_s.dtype, device=k_s.device)
    sums_s = torch.empty_like(rows) if with_grad else None
    sums_t = torch.empty_like(rows) if with_grad else None
    means = torch.empty_like(rows) if with_grad and divergence != "forward_kl" else None
    inputs = (q_s, k_s, q_t, k_t, row_scale.contiguous())
    inputs += (None if key_mask is None else key_mask.contiguous().view(torch.uint8),)
    strides = [x.stride(dim) for x in (q_s, k_s, q_t, k_t) for dim in range(3)]
    sizes = (heads, heads // key_heads, heads // k_t.shape[1], tokens, keys)
    rates = (student_rate * _LOG2_E, teacher_rate * _LOG2_E, student_rate)
    shares = (1.0 - mix, mix) if divergence == "skew_reverse_kl" else (mix, 1.0 - mix)
    layout = plan(max(width_s, width_t), q_s.dtype, divergence, _capability(q_s.device))
    constants = {
        "WIDTH_S": width_s,
        "WIDTH_T": width_t,
        "PAD_S": max(16, triton.next_power_of_2(width_s)),
        "PAD_T": max(16, triton.next_power_of_2(width_t)),
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "CAUSAL": causal,
        "DIVERGENCE": divergence,
        "PRECISION": layout.precision,
    }
    common = (*strides, *sizes, *rates, *shares)
    results = (rows, grad_q if with_grad else None, sums_s, sums_t, means)
    programs = batch * heads * triton.cdiv(tokens, layout.block_q)
    launch(attention_rows, programs, q_s, layout.options, *inputs, *results, *common, **constants)
    if with_grad:
        programs = batch * key_heads * triton.cdiv(keys, layout.block_k)
        launch(
            attention_keys, programs, q_s, layout.options, *inputs, grad_k, sums_s, sums_t, means, *common, **constants
        )
    return rows, grad_q, grad_k


def _check(
    q_s: torch.Tensor,
    k_s: torch.Tensor,
    q_t: torch.Tensor,
    k_t: torch.Tensor,
    row_scale: torch.Tensor,
    key_mask: torch.Tensor | None,
    divergence: str,
) -> None:
    batch, heads, tokens, width_s = q_s.shape
    key_heads_s, keys = k_s.shape[1:3]
    key_heads_t, width_t = k_t.shape[1], q_t.shape[3]
    for name, tensor, accepted in (
        ("q_t", q_t, (batch, heads, tokens, width_t)),
        ("k_s", k_s, (batch, key_heads_s, keys, width_s)),
        ("k_t", k_t, (batch, key_heads_t, keys, width_t)),
        ("row_scale", row_scale, (batch, heads, tokens)),
        ("key_mask", key_mask, (batch, keys)),
    ):
        if tensor is None:
            continue
        if tensor.shape != accepted:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, accepted: {list(accepted)}")
        if tensor.device != q_s.device:
            raise ValueError(f"{name}: got device {tensor.device}, accepted: {q_s.device}")
        dtype = {"row_scale": torch.float32, "key_mask": torch.bool}.get(name, q_s.dtype)
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, accepted: {dtype}")
    if q_s.dtype not in DTYPES:
        raise TypeError(f"q_s: got dtype {q_s.dtype}, accepted: float32, bfloat16, float16")
    if max(width_s, width_t) > MAX_WIDTH:
        raise ValueError(f"q_s, q_t: got heads of {width_s} and {width_t}, accepted: at most {MAX_WIDTH}")
    for name, key_heads in (("k_s", key_heads_s), ("k_t", key_heads_t)):
        if key_heads == 0 or heads % key_heads:
            raise ValueError(f"{name}: got {key_heads} heads, accepted: a number that divides {heads}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: got {divergence!r}, accepted: {', '.join(DIVERGENCES)}")
