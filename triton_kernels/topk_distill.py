"""Divergence of a softmax from a teacher known by K of its words, value and gradient of each row in one launch.

What it computes, for the rows of ``student`` [M, V] with s = softmax(student / T), and words ``ids`` [M, K] of which
the teacher has the probabilities t (see ``csrc/cpu/topk_distill.h`` for where these come from)::

    bucket       Σ t_k log(t_k / s_k) + t_R log(t_R / s_R)      R: all other words as one
    sampled      the same with t = w / Σ w and t_R = 0
    ignore       Σ t_k log(t_k / s_k) - t_k + s_k
    renormalise  Σ t_k log(t_k / s_k), both divided by their sums over the K words

each times ``row_scale[i]``, and the gradient with respect to the student's logits. A row whose ``row_scale`` is
exactly 0, or which has no entry of a probability above 0, is not read; its value and its gradient are 0.

How it is laid out: two kernels, one program a row in each. The first reads only the teacher: it adds up repeated
ids, divides where the mode does, and leaves log t of each word, in double, once (-inf for repeats and padding)::

    ids, entries [M, K]  ──►  topk_teacher  ──►  log_t [M, K], log t_R [M]
                                                     │
    student [M, V]  ─────►  topk_student  ◄──────────┘      K words: gathered; all words: in blocks, twice
                                 └──►  rows [M], grad [M, V]

The second sums the words outside without those of the teacher, rather than subtracting one sum from another: where
the K words hold nearly everything nothing would be left of the difference. Each lane keeps one bit a block in a mask
of 32 blocks, set where its word of that block belongs to the teacher; wider rows go on with a fresh mask::

    lane      0   1   2   3   …
    block 0   ·   x   ·   ·        word 1 is the teacher's: bit 0 of lane 1
    block 1   ·   ·   ·   x        word BLOCK + 3:          bit 1 of lane 3

The gradient of the words outside is written to all words in blocks, then, behind a barrier, that of the K words
over it.

How accurately: terms are t·q(x), q(x) = e^x - 1 - x, with x = log s - log t formed in double from the logits
themselves and one log-sum-exp, whose float32 error is common to all x and moves the value by its square.

How much it moves, with E the bytes of the logits: the row is read for the sums, again for the gradient, from the end
to its start, while it lies in the caches, and the gradient written: 2E of device memory, 3E at worst; E without
the gradient. renormalise reads K words and writes E, or nothing. Offsets are 64-bit and rows may have any stride.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import check_like, check_logits, check_scale, launch, words_together

#: Modes of the kernel, by the number that selects them.
TAILS = {"bucket": 0, "ignore": 1, "renormalise": 2, "sampled": 3}

#: Options of ``topk_student``: left alone, ptxas spills for the sake of a second program a multiprocessor, which wide
#: rows do better without (their second reading would miss the caches).
STUDENT_OPTIONS = {"maxnreg": 64}

_BUCKET = tl.constexpr(TAILS["bucket"])
_IGNORE = tl.constexpr(TAILS["ignore"])
_RENORMALISE = tl.constexpr(TAILS["renormalise"])
_SAMPLED = tl.constexpr(TAILS["sampled"])
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_SMALL = tl.constexpr(0.25)
_MASK_BITS = tl.constexpr(32)


@triton.jit
def topk_teacher(
    ids,
    entries,
    row_scale,
    log_t,
    log_rest,
    ids_stride,
    entries_stride,
    width,
    count,
    TAIL: tl.constexpr,
    ENTRIES: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """One row: log t of each word at its first entry, -inf at the others, and log t_R (NaN for an id that names no
    word); log_rest is +inf where there is nothing at all."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(row_scale + row)
    ids += row * ids_stride
    entries += row * entries_stride
    log_t += row * count
    mass = tl.full([], 0.0, tl.float64)
    words = tl.full([], 0, tl.int32)
    if scale != 0.0:
        for start in tl.range(0, count, ENTRIES):
            k = start + tl.arange(0, ENTRIES)
            inside = k < count
            entry = tl.load(entries + k, mask=inside, other=0.0 if TAIL == _SAMPLED else -float("inf"))
            word = tl.load(ids + k, mask=inside, other=0)
            t = entry if TAIL == _SAMPLED else tl.exp(entry)
            here = t != 0.0
            merged = tl.zeros([ENTRIES], tl.float64)
            earlier = tl.zeros([ENTRIES], tl.int32)
            for other in tl.range(0, count, OTHERS):
                j = other + tl.arange(0, OTHERS)
                other_entry = tl.load(entries + j, mask=j < count, other=0.0 if TAIL == _SAMPLED else -float("inf"))
                other_word = tl.load(ids + j, mask=j < count, other=0)
                other_t = other_entry if TAIL == _SAMPLED else tl.exp(other_entry)
                same = (word[:, None] == other_word[None, :]) & (other_t != 0.0)[None, :]
                merged += tl.sum(tl.where(same, other_t[None, :], 0.0), axis=1)
                earlier += tl.sum((same & (j[None, :] < k[:, None])).to(tl.int32), axis=1)
            first = here & (earlier == 0)
            bad = here & ((word < 0) | (word >= width))
            log_merged = tl.where(merged == t, entry, tl.log(merged)) if TAIL != _SAMPLED else tl.log(merged)
            log_merged = tl.where(first, log_merged, -float("inf"))
            tl.store(log_t + k, tl.where(bad, float("nan"), log_merged), mask=inside)
            mass += tl.sum(tl.where(bad, float("nan"), tl.where(first, merged, 0.0)), axis=0)
            words += tl.sum(first.to(tl.int32), axis=0)
        if (TAIL == _SAMPLED) | (TAIL == _RENORMALISE):
            log_mass = tl.log(mass)
            tl.debug_barrier()
            for start in tl.range(0, count, ENTRIES):
                k = start + tl.arange(0, ENTRIES)
                inside = k < count
                tl.store(log_t + k, tl.load(log_t + k, mask=inside) - log_mass, mask=inside)
    rest = tl.where((words == width) | (mass > 1.0), 0.0, 1.0 - mass)
    rest = tl.where(words == 0, float("inf"), tl.log(rest) if TAIL == _BUCKET else -float("inf"))
    tl.store(log_rest + row, rest)


@triton.jit
def _log(x):
    """log of a positive float32 in double to 1e-7, whatever its size: exponent and mantissa apart."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float64)
    return tl.where((x > 0.0) & (x < float("inf")), exponent * _LN_2 + tl.log(mantissa), tl.log(x))


@triton.jit
def _fold(peak, total, logit, rate):
    """One more logit a lane into Σ e^(rate · (logit - peak)), with one exponential; -inf adds nothing."""
    step = logit - peak
    shrink = tl.exp2(-tl.abs(step) * (rate * _LOG2_E))
    total = tl.where(step > 0.0, total * shrink + 1.0, total + shrink)
    return tl.maximum(peak, logit), total


@triton.jit
def _term(t, s, x):
    """t·q(x), q(x) = e^x - 1 - x, and s - t, both without cancellation for small x = log s - log t."""
    # q(x) / x² up to x⁵: relative error 1.3e-8 at |x| = 1/4.
    p = x * (1.0 / 5040.0) + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    p = p * x + 0.5
    q = p * x * x
    small = tl.abs(x) < _SMALL
    gap = s - t
    return tl.where(small, t * q, gap - t * x), tl.where(small, t * (x + q), gap)


@triton.jit
def topk_student(
    student,
    ids,
    log_t,
    log_rest,
    row_scale,
    rows,
    grad,
    student_stride,
    ids_stride,
    grad_stride,
    width,
    count,
    rate,
    rate_rest,
    TAIL: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row in blocks, forwards for the sum outside and backwards for the gradient: 2E, 3E at worst.

    rate + rate_rest is 1 / T: where x is formed, float32 does not do for it."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    blocks = tl.cdiv(width, BLOCK)
    scale = tl.load(row_scale + row)
    rest = tl.load(log_rest + row)
    exact_rate = tl.full([], 1.0, tl.float64) * rate + rate_rest
    student += row * student_stride
    ids += row * ids_stride
    log_t += row * count
    grad += row * grad_stride
    if (scale == 0.0) | (rest == float("inf")):
        tl.store(rows + row, 0.0)
        if WITH_GRAD:
            zero = tl.zeros([BLOCK], tl.float32).to(grad.dtype.element_ty)
            for block in tl.range(0, blocks):
                words = block * BLOCK + lanes
                tl.store(grad + words, zero, mask=words < width, cache_modifier=".cs")
    else:
        # The words of the teacher: highest logit. A row with an id that names no word has NaN as its log t.
        highest = tl.full([], _LOWEST, tl.float32)
        named = tl.full([], 0, tl.int32)
        for start in tl.range(0, count, ENTRIES):
            k = start + tl.arange(0, ENTRIES)
            lt = tl.load(log_t + k, mask=k < count, other=-float("inf"))
            word = tl.load(ids + k, mask=k < count, other=0)
            here = (lt > -float("inf")) & (word >= 0) & (word < width)
            z = tl.load(student + word, mask=here, other=-float("inf")).to(tl.float32)
            highest = tl.maximum(highest, tl.max(z, axis=0))
            named += tl.sum(here.to(tl.int32), axis=0)

        # All others.
        outside = tl.full([], 0.0, tl.float32)
        shift = highest
        if TAIL != _RENORMALISE:
            peak = tl.full([BLOCK], _LOWEST, tl.float32)
            total = tl.zeros([BLOCK], tl.float32)
            for segment in tl.range(0, blocks, _MASK_BITS):
                begin = segment * BLOCK
                mask = tl.zeros([BLOCK], tl.int32)
                for k in tl.range(0, count):
                    word = tl.load(ids + k)
                    here = tl.load(log_t + k) > -float("inf")
                    place = word - begin
                    here = here & (place >= 0) & (place < BLOCK * _MASK_BITS)
                    place = tl.where(here, place, 0).to(tl.int32)
                    bit = tl.where(here, 1, 0) << (place // BLOCK)
                    mask |= tl.where(lanes == place % BLOCK, bit, 0)
                for block in tl.range(segment, tl.minimum(segment + _MASK_BITS, blocks), num_stages=STAGES):
                    words = block * BLOCK + lanes
                    z = tl.load(student + words, mask=words < width, other=-float("inf")).to(tl.float32)
                    z = tl.where(((mask >> (block - segment)) & 1) != 0, -float("inf"), z)
                    peak, total = _fold(peak, total, z, rate)
            shift = tl.max(peak, axis=0)
            outside = tl.sum(total * tl.exp2((peak - shift) * (rate * _LOG2_E)), axis=0)

        # Both, from the higher of the two logits.
        top = tl.maximum(highest, shift)
        within = tl.full([], 0.0, tl.float32)
        for start in tl.range(0, count, ENTRIES):
            k = start + tl.arange(0, ENTRIES)
            lt = tl.load(log_t + k, mask=k < count, other=-float("inf"))
            word = tl.load(ids + k, mask=k < count, other=0)
            here = (lt > -float("inf")) & (word >= 0) & (word < width)
            z = tl.load(student + word, mask=here, other=-float("inf")).to(tl.float32)
            within += tl.sum(tl.exp2((z - top) * (rate * _LOG2_E)), axis=0)
        apart = outside * tl.exp2((shift - top) * (rate * _LOG2_E))
        sum_all = within + apart
        log_sum = _log(sum_all)  # all logits taken from top

        # Terms.
        value = tl.full([], 0.0, tl.float32)
        gaps = tl.full([], 0.0, tl.float32)
        for start in tl.range(0, count, ENTRIES):
            k = start + tl.arange(0, ENTRIES)
            lt = tl.load(log_t + k, mask=k < count, other=-float("inf"))
            word = tl.load(ids + k, mask=k < count, other=0)
            here = lt != -float("inf")
            z = tl.load(student + word, mask=here & (word >= 0) & (word < width), other=0.0).to(tl.float32)
            t = tl.exp(lt.to(tl.float32))
            s = tl.exp2((z - top) * (rate * _LOG2_E)) / sum_all
            term, gap = _term(t, s, ((z.to(tl.float64) - top) * exact_rate - log_sum - lt).to(tl.float32))
            value += tl.sum(tl.where(here, term, 0.0), axis=0)
            gaps += tl.sum(tl.where(here, gap, 0.0), axis=0)
        s_rest = apart / sum_all
        spread = s_rest  # what the softmax of the words outside is multiplied by in the gradient
        if TAIL == _IGNORE:
            spread = -gaps * s_rest
        if TAIL == _BUCKET:
            t_rest = tl.exp(rest.to(tl.float32))
            log_s_rest = (shift.to(tl.float64) - top) * exact_rate + _log(outside) - log_sum
            rest_term, rest_gap = _term(t_rest, s_rest, (log_s_rest - rest).to(tl.float32))
            value += tl.where(t_rest == 0.0, s_rest, rest_term)
            spread = tl.where(t_rest == 0.0, s_rest, rest_gap)
        if TAIL == _SAMPLED:
            value += s_rest
            spread += gaps * 0.0  # NaN where there is one
        tl.store(rows + row, scale * value)

        if WITH_GRAD:
            # The gradient of the teacher's words takes the place of their log t; +inf marks those that have none.
            for start in tl.range(0, count, ENTRIES):
                k = start + tl.arange(0, ENTRIES)
                lt = tl.load(log_t + k, mask=k < count, other=-float("inf"))
                word = tl.load(ids + k, mask=k < count, other=0)
                here = (lt > -float("inf")) & (word >= 0) & (word < width)
                z = tl.load(student + word, mask=here, other=0.0).to(tl.float32)
                t = tl.exp(lt.to(tl.float32))
                s = tl.exp2((z - top) * (rate * _LOG2_E)) / sum_all
                _, slope = _term(t, s, ((z.to(tl.float64) - top) * exact_rate - log_sum - lt).to(tl.float32))
                if TAIL == _IGNORE:
                    slope -= s * gaps
                slope = tl.where(here, slope * (scale * rate), float("inf"))
                tl.store(log_t + k, slope.to(tl.float64), mask=k < count)
            factor = tl.where(outside == 0.0, 0.0, spread / outside) * (scale * rate)
            for done in tl.range(0, blocks, num_stages=STAGES):
                words = (blocks - 1 - done) * BLOCK + lanes
                inside = words < width
                if TAIL == _RENORMALISE:
                    others = tl.zeros([BLOCK], tl.float32) + gaps * 0.0  # NaN where there is one
                else:
                    z = tl.load(student + words, mask=inside, other=-float("inf"), eviction_policy="evict_first")
                    others = tl.exp2((z.to(tl.float32) - shift) * (rate * _LOG2_E)) * factor
                tl.store(grad + words, others.to(grad.dtype.element_ty), mask=inside, cache_modifier=".cs")
            tl.debug_barrier()
            for start in tl.range(0, count, ENTRIES):
                k = start + tl.arange(0, ENTRIES)
                slope = tl.load(log_t + k, mask=k < count, other=float("inf"))
                word = tl.load(ids + k, mask=k < count, other=0)
                tl.store(grad + word, slope.to(tl.float32).to(grad.dtype.element_ty), mask=slope != float("inf"))


class Plan(NamedTuple):
    """How ``topk_student`` is launched: words in a block, entries in a block, warps, blocks in flight."""

    block: int
    entries: int
    warps: int
    stages: int


def plan(width: int, count: int, item_size: int) -> Plan:
    """Layout for rows of ``width`` words of ``item_size`` bytes and ``count`` entries."""
    warps = 4 if width <= 2048 else 16 if width <= 32768 else 32
    block = min(128 * warps, max(128, triton.next_power_of_2(width)))
    entries = min(32 * warps, max(16, triton.next_power_of_2(count)))
    return Plan(block, entries, warps, 4 if item_size <= 2 else 3)


def teacher_plan(count: int) -> tuple[int, int, int]:
    """Entries in a block of ``topk_teacher``, those that they are compared with at a time, and warps."""
    entries = min(256, max(16, triton.next_power_of_2(count)))
    return entries, 16, max(1, entries // 32)


def topk_distill(
    student: torch.Tensor,
    ids: torch.Tensor,
    entries: torch.Tensor,
    row_scale: torch.Tensor,
    tail: str = "bucket",
    temperature: float = 1.0,
    with_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value of each row, and its gradient with respect to the student's logits.

    Args:
        student: logits [M, V], float32, bfloat16 or float16. Any strides; copied where words are apart.
        ids: [M, K] int64. An id outside [0, V) gives NaN in its row.
        entries: [M, K] float64: log-probabilities (-inf: not there), or weights (0: not there) for ``"sampled"``.
        row_scale: [M] float32, the factor of each row. Rows of factor 0 are not read.
        tail: a key of ``TAILS``.
        temperature: divides the student's logits, above 0.
        with_grad: whether the gradient is computed.

    Returns:
        rows: [M] float32, row_scale · divergence. A NaN among a row's logits makes that row NaN.
        grad: [M, V] contiguous in the student's dtype, or empty [0, 0] without ``with_grad``.

    Raises:
        TypeError: a dtype other than those named.
        ValueError: shapes or devices that do not fit, a temperature not above 0, an unknown tail.

    Never waits for the device, so it can be captured in a CUDA graph.
    """
    _check(student, ids, entries, row_scale, tail, temperature)
    student, ids, entries = words_together(student), words_together(ids), words_together(entries)
    row_scale = row_scale.contiguous()
    rows_count, width = student.shape
    count = ids.shape[1]
    rows = torch.empty(rows_count, dtype=torch.float32, device=student.device)
    grad = torch.empty((rows_count, width) if with_grad else (0, 0), dtype=student.dtype, device=student.device)
    log_t = torch.empty((rows_count, count), dtype=torch.float64, device=student.device)
    log_rest = torch.empty(rows_count, dtype=torch.float64, device=student.device)
    rate = float(torch.tensor(1.0 / temperature, dtype=torch.float32))
    block, block_entries, warps, stages = plan(width, count, student.element_size())
    teacher_entries, others, teacher_warps = teacher_plan(count)
    launch(
        topk_teacher,
        rows_count,
        student,
        {"num_warps": teacher_warps},
        ids,
        entries,
        row_scale,
        log_t,
        log_rest,
        ids.stride(0),
        entries.stride(0),
        width,
        count,
        TAIL=TAILS[tail],
        ENTRIES=teacher_entries,
        OTHERS=others,
    )
    launch(
        topk_student,
        rows_count,
        student,
        {"num_warps": warps, **STUDENT_OPTIONS},
        student,
        ids,
        log_t,
        log_rest,
        row_scale,
        rows,
        grad,
        student.stride(0),
        ids.stride(0),
        width,
        width,
        count,
        rate,
        1.0 / temperature - rate,
        TAIL=TAILS[tail],
        WITH_GRAD=with_grad,
        BLOCK=block,
        ENTRIES=block_entries,
        STAGES=stages,
    )
    return rows, grad


def _check(
    student: torch.Tensor,
    ids: torch.Tensor,
    entries: torch.Tensor,
    row_scale: torch.Tensor,
    tail: str,
    temperature: float,
) -> None:
    check_logits("student", student)
    for name, tensor, dtype in (("ids", ids, torch.int64), ("entries", entries, torch.float64)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, accepted: {dtype}")
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids: got shape {list(ids.shape)}, accepted: [{student.shape[0]}, K] with K above 0")
    check_like("ids", ids, (student.shape[0], ids.shape[1]), student.device)
    check_like("entries", entries, ids.shape, student.device)
    check_scale("row_scale", row_scale, student)
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}, accepted: a finite number above 0")
    if tail not in TAILS:
        raise ValueError(f"tail: got {tail!r}, accepted: {', '.join(TAILS)}")
