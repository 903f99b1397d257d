"""Temperature-softmax distillation loss, value and gradient of each row in one launch.

What it computes, for the rows of ``student`` and ``teacher`` [M, V] with s = softmax(student / Ts) and
t = softmax(teacher / Tt)::

    rows[i]    = row_scale[i] · KL(t ‖ s)
    grad[i, :] = row_scale[i] / Ts · (s - t)          (the gradient with respect to the student's logits)

A row whose ``row_scale`` is exactly 0 is not read; its value and its gradient are 0.

How accurately: Σ t·log(t/s) cancels when t and s are close. With x = log s - log t the same sum is
Σ t·q(x), q(x) = e^x - 1 - x ≥ 0, whose terms are all of one sign. q is a polynomial where |x| is small and
s - t - t·x elsewhere; where t is 0 the term is s, its limit. Exponents are differences from the highest logit
and x is formed from differences of logits, which are exact for neighbours: what is left of error is a common
c in x, about 3e-7, which moves the value by c²/2 and the gradient by t·c.

How much it moves, with E the bytes of one logits tensor: rows of at most 8192 words stay in registers between
the two steps and cost 3E (read both, write the gradient). Wider rows are read twice, 2E for the sums and 2E
for the terms, and written once: 5E at worst. The second reading runs from the end of the row to its start, so
that what was read last is found in the caches: while all rows in flight fit (2 or 3 a multiprocessor, so
about 40000 words of 16 bits with 50 MB of L2), device memory sees 3E. Without the gradient: 2E and 4E.

How it is laid out: one program for each row, one power-of-two block of words at a time (see ``plan``)::

    V ≤ 8192     one block: V rounded up, 8 words a thread, 1 to 32 warps    | load | sums | terms, store |
    V ≤ 32768    blocks of 2048, 4 words a thread, 16 warps                  sums: → → → →   terms: ← ← ← ←
    wider        blocks of 4096, 4 words a thread, 32 warps                  likewise

More words a thread spill (``compile.py`` shows it). Blocks are copied ahead, three or four deep, into shared
memory (cp.async) where addresses, strides and width are multiples of 16. In the first reading each lane keeps
a peak and a sum of its own, and lanes meet once a row. Offsets are 64-bit and rows may have any
stride; the words of a row are next to each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

#: Divergences that the kernel knows, by the number that selects their terms. A new one takes a number here, a
#: function of terms beside ``_forward_kl`` and a branch in ``_terms``.
DIVERGENCES = {"forward_kl": 0}

#: The widest row that is held in registers.
MAX_RESIDENT = 8192

#: Options of every launch, given so that the result does not hang on the default of a Triton release.
OPTIONS = {"enable_fp_fusion": True}

_FORWARD_KL = tl.constexpr(DIVERGENCES["forward_kl"])
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_SMALL = tl.constexpr(0.25)


@triton.jit
def _fold(peak, total, logit, rate):
    """One more logit a lane into Σ e^(rate · (logit - peak)), with one exponential; -inf adds nothing."""
    step = logit - peak
    shrink = tl.exp2(-tl.abs(step) * (rate * _LOG2_E))
    total = tl.where(step > 0.0, total * shrink + 1.0, total + shrink)
    return tl.maximum(peak, logit), total


@triton.jit
def _join(peak, total, rate):
    """Highest logit of the row and Σ e^(rate · (logit - highest)), from the lanes' own."""
    highest = tl.max(peak, axis=0)
    return highest, tl.sum(total * tl.exp2((peak - highest) * (rate * _LOG2_E)), axis=0)


@triton.jit
def _forward_kl(s, t, x):
    """Terms t·q(x) of KL(t ‖ s), and s - t, both without cancellation for small x = log s - log t."""
    # q(x) / x² up to x⁵: relative error 1.3e-8 at |x| = 1/4.
    p = x * (1.0 / 5040.0) + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    p = p * x + 0.5
    q = p * x * x
    small = tl.abs(x) < _SMALL
    gap = s - t
    value = tl.where(t == 0.0, s, tl.where(small, t * q, gap - t * x))
    slope = tl.where(small, t * (x + q), gap)
    return value, slope


@triton.jit
def _terms(ls, lt, highest_s, highest_t, total_s, total_t, student_rate, teacher_rate, DIVERGENCE: tl.constexpr):
    """Value and slope of each word, from float32 logits and what ``_join`` said of the row."""
    s = tl.exp2((ls - highest_s) * (student_rate * _LOG2_E) - tl.log2(total_s))
    t = tl.exp2((lt - highest_t) * (teacher_rate * _LOG2_E) - tl.log2(total_t))
    apart = student_rate - teacher_rate
    x = (ls - lt) * student_rate + lt * apart
    x -= (highest_s - highest_t) * student_rate + highest_t * apart + tl.log(total_s / total_t)
    tl.static_assert(DIVERGENCE == _FORWARD_KL, "unknown divergence")
    return _forward_kl(s, t, x)


@triton.jit
def distill_kl_resident(
    student,
    teacher,
    row_scale,
    rows,
    grad,
    student_stride,
    teacher_stride,
    grad_stride,
    width,
    student_rate,
    teacher_rate,
    BLOCK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
):
    """One row, held in registers: 3E."""
    row = tl.program_id(0).to(tl.int64)
    words = tl.arange(0, BLOCK)
    inside = words < width
    scale = tl.load(row_scale + row)
    if scale == 0.0:
        tl.store(rows + row, 0.0)
        if WITH_GRAD:
            zero = tl.zeros([BLOCK], tl.float32).to(grad.dtype.element_ty)
            tl.store(grad + row * grad_stride + words, zero, mask=inside)
    else:
        ls = tl.load(student + row * student_stride + words, mask=inside, other=-float("inf")).to(tl.float32)
        lt = tl.load(teacher + row * teacher_stride + words, mask=inside, other=-float("inf")).to(tl.float32)
        highest_s, total_s = _join(ls, 1.0, student_rate)
        highest_t, total_t = _join(lt, 1.0, teacher_rate)
        value, slope = _terms(ls, lt, highest_s, highest_t, total_s, total_t, student_rate, teacher_rate, DIVERGENCE)
        tl.store(rows + row, scale * tl.sum(value, axis=0))
        if WITH_GRAD:
            slope = (slope * (scale * student_rate)).to(grad.dtype.element_ty)
            tl.store(grad + row * grad_stride + words, slope, mask=inside)


@triton.jit
def distill_kl_streamed(
    student,
    teacher,
    row_scale,
    rows,
    grad,
    student_stride,
    teacher_stride,
    grad_stride,
    width,
    student_rate,
    teacher_rate,
    BLOCK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row in blocks, forwards for the log-sum-exps and backwards for the terms: 5E at worst."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    blocks = tl.cdiv(width, BLOCK)
    scale = tl.load(row_scale + row)
    student += row * student_stride
    teacher += row * teacher_stride
    grad += row * grad_stride
    if scale == 0.0:
        tl.store(rows + row, 0.0)
        if WITH_GRAD:
            zero = tl.zeros([BLOCK], tl.float32).to(grad.dtype.element_ty)
            for block in tl.range(0, blocks):
                words = block * BLOCK + lanes
                tl.store(grad + words, zero, mask=words < width, cache_modifier=".cs")
    else:
        peak_s = tl.full([BLOCK], _LOWEST, tl.float32)
        peak_t = tl.full([BLOCK], _LOWEST, tl.float32)
        sum_s = tl.zeros([BLOCK], tl.float32)
        sum_t = tl.zeros([BLOCK], tl.float32)
        for block in tl.range(0, blocks, num_stages=STAGES):
            words = block * BLOCK + lanes
            inside = words < width
            ls = tl.load(student + words, mask=inside, other=-float("inf")).to(tl.float32)
            lt = tl.load(teacher + words, mask=inside, other=-float("inf")).to(tl.float32)
            peak_s, sum_s = _fold(peak_s, sum_s, ls, student_rate)
            peak_t, sum_t = _fold(peak_t, sum_t, lt, teacher_rate)
        highest_s, total_s = _join(peak_s, sum_s, student_rate)
        highest_t, total_t = _join(peak_t, sum_t, teacher_rate)
        values = tl.zeros([BLOCK], tl.float32)
        for done in tl.range(0, blocks, num_stages=STAGES):
            words = (blocks - 1 - done) * BLOCK + lanes
            inside = words < width
            ls = tl.load(student + words, mask=inside, other=-float("inf"), eviction_policy="evict_first")
            lt = tl.load(teacher + words, mask=inside, other=-float("inf"), eviction_policy="evict_first")
            ls = ls.to(tl.float32)
            lt = lt.to(tl.float32)
            value, slope = _terms(
                ls, lt, highest_s, highest_t, total_s, total_t, student_rate, teacher_rate, DIVERGENCE
            )
            values += value
            if WITH_GRAD:
                slope = (slope * (scale * student_rate)).to(grad.dtype.element_ty)
                tl.store(grad + words, slope, mask=inside, cache_modifier=".cs")
        tl.store(rows + row, scale * tl.sum(values, axis=0))


class Plan(NamedTuple):
    """How a launch is laid out: kernel, words in a block, warps, blocks in flight (0: one block is all)."""

    kernel: Any
    block: int
    warps: int
    stages: int


def plan(width: int, item_size: int) -> Plan:
    """Layout for rows of ``width`` words of at most ``item_size`` bytes each; see the head of the file."""
    if width <= MAX_RESIDENT:
        block = max(32, triton.next_power_of_2(width))
        return Plan(distill_kl_resident, block, min(32, max(1, block // 256)), 0)
    warps = 16 if width <= 32768 else 32
    return Plan(distill_kl_streamed, 128 * warps, warps, 4 if item_size <= 2 else 3)


def distill_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row_scale: torch.Tensor,
    divergence: str = "forward_kl",
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    with_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value of each row, and its gradient with respect to the student's logits.

    Args:
        student: logits [M, V], float32, bfloat16 or float16. Any strides; copied where words are apart.
        teacher: logits [M, V] on the same device, likewise; its dtype may differ from the student's.
        row_scale: [M] float32, the factor of each row. Rows of factor 0 are not read.
        divergence: a key of ``DIVERGENCES``.
        student_temperature: divides the student's logits, above 0.
        teacher_temperature: divides the teacher's logits, above 0.
        with_grad: whether the gradient is computed.

    Returns:
        rows: [M] float32, row_scale · divergence. A NaN among a row's logits makes that row NaN.
        grad: [M, V] contiguous in the student's dtype, or empty [0, 0] without ``with_grad``.

    Raises:
        TypeError: a dtype other than those named.
        ValueError: shapes or devices that do not fit, a temperature not above 0, an unknown divergence.

    Never waits for the device, so it can be captured in a CUDA graph.
    """
    _check(student, teacher, row_scale, divergence, student_temperature, teacher_temperature)
    student, teacher = _words_together(student), _words_together(teacher)
    count, width = student.shape
    rows = torch.empty(count, dtype=torch.float32, device=student.device)
    grad = torch.empty((count, width) if with_grad else (0, 0), dtype=student.dtype, device=student.device)
    if count == 0:
        return rows, grad
    kernel, block, warps, stages = plan(width, max(student.element_size(), teacher.element_size()))
    layout = {"BLOCK": block, "DIVERGENCE": DIVERGENCES[divergence], "WITH_GRAD": with_grad}
    if stages:
        layout["STAGES"] = stages
    with torch.cuda.device_of(student):
        kernel[(count,)](
            student,
            teacher,
            row_scale.contiguous(),
            rows,
            grad,
            student.stride(0),
            teacher.stride(0),
            width,
            width,
            1.0 / student_temperature,
            1.0 / teacher_temperature,
            **layout,
            **OPTIONS,
            num_warps=warps,
        )
    return rows, grad


def _words_together(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()


def _check(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row_scale: torch.Tensor,
    divergence: str,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name}: dtype {logits.dtype}; float32, bfloat16 or float16 is accepted")
        if logits.dim() != 2 or logits.shape[1] == 0:
            raise ValueError(f"{name}: shape {tuple(logits.shape)}; [M, V] with V above 0 is accepted")
    if teacher.shape != student.shape:
        raise ValueError(f"teacher: shape {tuple(teacher.shape)}; {tuple(student.shape)} as in student is accepted")
    if row_scale.dtype != torch.float32:
        raise TypeError(f"row_scale: dtype {row_scale.dtype}; float32 is accepted")
    if row_scale.shape != student.shape[:1]:
        raise ValueError(f"row_scale: shape {tuple(row_scale.shape)}; [{student.shape[0]}] is accepted")
    for name, tensor in (("teacher", teacher), ("row_scale", row_scale)):
        if tensor.device != student.device:
            raise ValueError(f"{name}: on {tensor.device}; {student.device}, as the student, is accepted")
    for name, temperature in (
        ("student_temperature", student_temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"{name}: {temperature}; a finite number above 0 is accepted")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: {divergence!r}; one of {', '.join(DIVERGENCES)} is accepted")
