"""Divergence between two tempered softmaxes, with its gradient and cross-entropy, each row in one launch.

What it computes, for the rows of ``student`` and ``teacher`` [M, V], soft-capped where a cap is given (z becomes
c · tanh(z/c)), with s = softmax(student / Ts) and t = softmax(teacher / Tt)::

    ce_rows[i] = ce_scale[i] · CE,   CE = log Σ e^student - student[label]               (with labels; Ts is 1 here)
    rows[i]    = row_scale[i] · D(s, t) + ce_rows[i]
    grad[i, :] = row_scale[i] / Ts · (pull - s · Σ pull) + ce_scale[i] · (softmax(student) - [v = label]),
                 times 1 - tanh² under a cap                                  (the gradient to the student's logits)

D and its pulls: ``_divergences.py``. A row whose scales are exactly 0 is not read; its values and gradient are 0.

How accurately: the terms of D are all of one sign and formed without cancellation. Exponents are differences from the
highest logit and x = log s - log t is formed from differences of logits, which are exact for neighbours: what is left
of error is a common c in x, about 3e-7, which moves the value by c²/2 and the gradient of forward_kl by t·c (elsewhere
it drops out of pull - s · Σ pull).

How much it moves, with E the bytes of one logits tensor::

    narrow rows                                      3E       stay in registers between the steps; value alone 2E
    wide, forward_kl and reverse_kl                  5E       sums, terms                            → ←
    wide, the others                                 7E       sums, mean of the pulls, terms         → ← →
    wide, value alone                                4E       sums, values                           → ←

forward_kl has no mean, and reverse_kl's is linear in the logits, so that it is found with the sums. Each reading of a
wide row runs against the one before, so that what was read last is found in the caches: while all rows in flight fit
(2 or 3 a multiprocessor, so about 40000 words of 16 bits with 50 MB of L2), device memory sees 3E for all. Labels add
one read of a word to a row, caps none.

How it is laid out: one program for each row, one power-of-two block of words at a time (see ``plan``)::

                forward_kl without labels and caps           all else
    narrow      to 8192 words: 8 a thread, 1 to 32 warps     to 4096: 4 a thread, 1 to 32 warps
    to 32768    blocks of 2048: 4 a thread, 16 warps         blocks of 2048: 2 a thread, 32 warps
    wider       blocks of 4096: 4 a thread, 32 warps         likewise

More words a thread spill (``compile.py`` shows it). Blocks are copied ahead, two to four deep, into shared memory
(cp.async) where addresses, strides and width are multiples of 16. Offsets are 64-bit and rows may have any stride; the
words of a row are next to each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._divergences import DIVERGENCES, terms
from ._launch import check_like, check_logits, check_scale, launch, words_together
from ._softmax import LOWEST, fold, join, probability, softcap, softcap_slope

_INF = tl.constexpr(float("inf"))

#: The widest row that is held in registers; half of it where a word needs more of them (see ``plan``).
MAX_RESIDENT = 8192


@triton.jit
def _factors(row_scale, labels, ce_scale, row, width):
    """Factors of the row's divergence and cross-entropy, NaN where its label names no word, and the label."""
    scale = tl.load(row_scale + row)
    if labels is None:
        return scale, 0.0, 0
    else:
        label = tl.load(labels + row).to(tl.int64)
        ce = tl.load(ce_scale + row)
        named = (label >= 0) & (label < width)
        return scale, tl.where(named | (ce == 0.0), ce, float("nan")), tl.where(named, label, 0)


@triton.jit
def _distributions(ls, lt, sums, student_rate, teacher_rate):
    """s, t and log s - log t of each word, and whether the teacher excludes it."""
    highest_s, highest_t, total_s, total_t, _ = sums
    s = probability(ls, highest_s, total_s, student_rate)
    t = probability(lt, highest_t, total_t, teacher_rate)
    x = _log_ratio(ls, lt, student_rate, teacher_rate)
    return s, t, x - _log_ratio_of_totals(sums, student_rate, teacher_rate), lt == -_INF


@triton.jit
def _log_ratio(ls, lt, student_rate, teacher_rate):
    """student_rate · ls - teacher_rate · lt, exact where rates are equal to 1 and logits are neighbours."""
    return (ls - lt) * student_rate + lt * (student_rate - teacher_rate)


@triton.jit
def _log_ratio_of_totals(sums, student_rate, teacher_rate):
    """Log-sum-exp of the student's row less that of the teacher's; exactly 0 for equal rows, hence the exact quotient:
    the fast one of two equal sums may be 1 - 2^-24."""
    highest_s, highest_t, total_s, total_t, _ = sums
    return _log_ratio(highest_s, highest_t, student_rate, teacher_rate) + tl.log(tl.div_rn(total_s, total_t))


@triton.jit
def _store_values(rows, ce_rows, row, value, scale, ce, label, student, sums, student_cap):
    """The row's values; a part whose factor is 0 is 0, whatever it holds. ``student`` is the start of the row."""
    value = tl.where(scale == 0.0, 0.0, scale * value)
    if ce_rows is not None:
        logit = softcap(tl.load(student + label).to(tl.float32), student_cap)
        highest, _, _, _, total = sums
        cross_entropy = tl.where(ce == 0.0, 0.0, ce * (highest - logit + tl.log(total)))
        tl.store(ce_rows + row, cross_entropy)
        value += cross_entropy
    tl.store(rows + row, value)


@triton.jit
def _slope(zs, ls, words, pull, s, mean, scale, ce_scale, ce, label, sums, student_rate, student_cap):
    """Gradient of each word, from its logit ``zs`` and what the cap made of it, ``ls``."""
    slope = (pull - s * mean) * (scale * student_rate)
    if ce_scale is not None:
        highest, _, _, _, total = sums
        chosen = tl.where(words == label, 1.0, 0.0)
        slope = tl.where(scale == 0.0, 0.0, slope) + ce * (probability(ls, highest, total, 1.0) - chosen)
    if student_cap is not None:
        slope *= softcap_slope(zs, student_cap)
    return slope


@triton.jit
def distill_kl_resident(
    student,
    teacher,
    row_scale,
    labels,
    ce_scale,
    rows,
    ce_rows,
    grad,
    student_stride,
    teacher_stride,
    grad_stride,
    width,
    student_rate,
    teacher_rate,
    student_cap,
    teacher_cap,
    share_t,
    share_s,
    BLOCK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """One row, held in registers: 3E. What is None (labels with ce_scale and ce_rows, grad, caps) is compiled away."""
    row = tl.program_id(0).to(tl.int64)
    words = tl.arange(0, BLOCK)
    inside = words < width
    scale, ce, label = _factors(row_scale, labels, ce_scale, row, width)
    if (scale == 0.0) & (ce == 0.0):
        tl.store(rows + row, 0.0)
        if ce_rows is not None:
            tl.store(ce_rows + row, 0.0)
        if grad is not None:
            zero = tl.zeros([BLOCK], tl.float32).to(grad.dtype.element_ty)
            tl.store(grad + row * grad_stride + words, zero, mask=inside)
    else:
        student += row * student_stride
        zs = tl.load(student + words, mask=inside, other=-_INF).to(tl.float32)
        zt = tl.load(teacher + row * teacher_stride + words, mask=inside, other=-_INF).to(tl.float32)
        ls = softcap(zs, student_cap)
        lt = softcap(zt, teacher_cap)
        highest_s = tl.max(ls, axis=0)
        highest_t = tl.max(lt, axis=0)
        total_s = join(ls, highest_s, 1.0, student_rate)
        total_t = join(lt, highest_t, 1.0, teacher_rate)
        total_1 = 1.0
        if labels is not None:
            total_1 = join(ls, highest_s, 1.0, 1.0)
        sums = (highest_s, highest_t, total_s, total_t, total_1)
        s, t, x, excluded = _distributions(ls, lt, sums, student_rate, teacher_rate)
        value, pull = terms(s, t, x, excluded, share_t, share_s, DIVERGENCE)
        _store_values(rows, ce_rows, row, tl.sum(value, axis=0), scale, ce, label, student, sums, student_cap)
        if grad is not None:
            mean = 0.0
            if DIVERGENCE != "forward_kl":
                mean = tl.sum(pull, axis=0)
            slope = _slope(zs, ls, words, pull, s, mean, scale, ce_scale, ce, label, sums, student_rate, student_cap)
            tl.store(grad + row * grad_stride + words, slope.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _origin(student, teacher, student_rate, teacher_rate, student_cap, teacher_cap):
    """``_log_ratio`` of the first word, or 0 if that is not finite: near those of the row if it has an offset."""
    ls = softcap(tl.load(student).to(tl.float32), student_cap)
    lt = softcap(tl.load(teacher).to(tl.float32), teacher_cap)
    origin = _log_ratio(ls, lt, student_rate, teacher_rate)
    return tl.where(tl.abs(origin) < _INF, origin, 0.0)


@triton.jit
def _read(student, teacher, words, width, student_cap, teacher_cap, EVICT: tl.constexpr):
    """The student's logits, and both after their caps, float32; -inf beyond the row."""
    inside = words < width
    zs = tl.load(student + words, mask=inside, other=-_INF, eviction_policy=EVICT).to(tl.float32)
    zt = tl.load(teacher + words, mask=inside, other=-_INF, eviction_policy=EVICT).to(tl.float32)
    return zs, softcap(zs, student_cap), softcap(zt, teacher_cap)


@triton.jit
def distill_kl_streamed(
    student,
    teacher,
    row_scale,
    labels,
    ce_scale,
    rows,
    ce_rows,
    grad,
    student_stride,
    teacher_stride,
    grad_stride,
    width,
    student_rate,
    teacher_rate,
    student_cap,
    teacher_cap,
    share_t,
    share_s,
    BLOCK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row in blocks, forwards, backwards and, where pulls have a mean that the first reading cannot find,
    forwards again: 5E or 7E at worst."""
    THIRD: tl.constexpr = (grad is not None) and DIVERGENCE != "forward_kl" and DIVERGENCE != "reverse_kl"
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    blocks = tl.cdiv(width, BLOCK)
    scale, ce, label = _factors(row_scale, labels, ce_scale, row, width)
    student += row * student_stride
    teacher += row * teacher_stride
    if grad is not None:
        grad += row * grad_stride
    if (scale == 0.0) & (ce == 0.0):
        tl.store(rows + row, 0.0)
        if ce_rows is not None:
            tl.store(ce_rows + row, 0.0)
        if grad is not None:
            zero = tl.zeros([BLOCK], tl.float32).to(grad.dtype.element_ty)
            for block in tl.range(0, blocks):
                words = block * BLOCK + lanes
                tl.store(grad + words, zero, mask=words < width, cache_modifier=".cs")
    else:
        nothing = tl.zeros([BLOCK], tl.float32)
        peak_s, peak_t = nothing + LOWEST, nothing + LOWEST
        sum_s, sum_t, sum_1 = nothing, nothing, nothing
        # For the mean of the pulls of reverse_kl: sums over e^student of log-ratios, less the first, and of words
        # that the teacher excludes.
        drift, lost = nothing, nothing
        origin = 0.0
        if DIVERGENCE == "reverse_kl":
            origin = _origin(student, teacher, student_rate, teacher_rate, student_cap, teacher_cap)
        for block in tl.range(0, blocks, num_stages=STAGES):
            words = block * BLOCK + lanes
            _, ls, lt = _read(student, teacher, words, width, student_cap, teacher_cap, "")
            if labels is not None:
                _, keep, weight = fold(peak_s, ls, 1.0)
                sum_1 = sum_1 * keep + weight
            peak_s, keep, weight = fold(peak_s, ls, student_rate)
            sum_s = sum_s * keep + weight
            if DIVERGENCE == "reverse_kl":
                excluded = lt == -_INF
                x = _log_ratio(ls, lt, student_rate, teacher_rate) - origin
                drift = drift * keep + tl.where(excluded | (weight == 0.0), 0.0, weight * x)
                lost = lost * keep + tl.where(excluded, weight, 0.0)
            peak_t, keep, weight = fold(peak_t, lt, teacher_rate)
            sum_t = sum_t * keep + weight
        highest_s = tl.max(peak_s, axis=0)
        highest_t = tl.max(peak_t, axis=0)
        total_s = join(peak_s, highest_s, sum_s, student_rate)
        total_t = join(peak_t, highest_t, sum_t, teacher_rate)
        total_1 = 1.0
        if labels is not None:
            total_1 = join(peak_s, highest_s, sum_1, 1.0)
        sums = (highest_s, highest_t, total_s, total_t, total_1)
        mean = 0.0
        if DIVERGENCE == "reverse_kl":
            gone = join(peak_s, highest_s, lost, student_rate) / total_s
            rest = _log_ratio_of_totals(sums, student_rate, teacher_rate) - origin
            mean = join(peak_s, highest_s, drift, student_rate) / total_s - rest * (1.0 - gone) - gone
        values, pulls = nothing, nothing
        for done in tl.range(0, blocks, num_stages=STAGES):
            words = (blocks - 1 - done) * BLOCK + lanes
            evict: tl.constexpr = "" if THIRD else "evict_first"
            zs, ls, lt = _read(student, teacher, words, width, student_cap, teacher_cap, evict)
            s, t, x, excluded = _distributions(ls, lt, sums, student_rate, teacher_rate)
            value, pull = terms(s, t, x, excluded, share_t, share_s, DIVERGENCE)
            values += value
            if THIRD:
                pulls += pull
            elif grad is not None:
                slope = _slope(
                    zs, ls, words, pull, s, mean, scale, ce_scale, ce, label, sums, student_rate, student_cap
                )
                tl.store(grad + words, slope.to(grad.dtype.element_ty), mask=words < width, cache_modifier=".cs")
        _store_values(rows, ce_rows, row, tl.sum(values, axis=0), scale, ce, label, student, sums, student_cap)
        if THIRD:
            mean = tl.sum(pulls, axis=0)
            for block in tl.range(0, blocks, num_stages=STAGES):
                words = block * BLOCK + lanes
                zs, ls, lt = _read(student, teacher, words, width, student_cap, teacher_cap, "evict_first")
                s, t, x, excluded = _distributions(ls, lt, sums, student_rate, teacher_rate)
                _, pull = terms(s, t, x, excluded, share_t, share_s, DIVERGENCE)
                slope = _slope(
                    zs, ls, words, pull, s, mean, scale, ce_scale, ce, label, sums, student_rate, student_cap
                )
                tl.store(grad + words, slope.to(grad.dtype.element_ty), mask=words < width, cache_modifier=".cs")


class Plan(NamedTuple):
    """How a launch is laid out: kernel, Triton's options for it, and its constants."""

    kernel: Any
    options: dict[str, int]
    constants: dict[str, Any]


def plan(width: int, item_size: int, divergence: str, extras: bool) -> Plan:
    """Layout for rows of ``width`` words of at most ``item_size`` bytes each; see the head of the file.

    ``extras``: with labels or a cap. They and a third reading need registers, so that a thread holds fewer words, and
    all that 32 warps can have are granted at once: ptxas would spill a few bytes to bring two programs together.
    """
    constants: dict[str, Any] = {"DIVERGENCE": divergence}
    light = divergence == "forward_kl" and not extras
    if width <= (MAX_RESIDENT if light else MAX_RESIDENT // 2):
        constants["BLOCK"] = block = max(32, triton.next_power_of_2(width))
        warps = min(32, max(1, block // (256 if light else 128)))
        return Plan(distill_kl_resident, {"num_warps": warps}, constants)
    constants["STAGES"] = 4 if item_size <= 2 else 3 if light else 2
    if not light:
        return Plan(distill_kl_streamed, {"num_warps": 32, "maxnreg": 64}, {**constants, "BLOCK": 2048})
    warps = 16 if width <= 32768 else 32
    return Plan(distill_kl_streamed, {"num_warps": warps}, {**constants, "BLOCK": 128 * warps})


def distill_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row_scale: torch.Tensor,
    divergence: str = "forward_kl",
    mix: float = 0.0,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    student_softcap: float = 0.0,
    teacher_softcap: float = 0.0,
    labels: torch.Tensor | None = None,
    ce_scale: torch.Tensor | None = None,
    with_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values of each row, and the gradient of their sum with respect to the student's logits.

    Args:
        student: logits [M, V], float32, bfloat16 or float16. Any strides; copied where words are apart.
        teacher: logits [M, V] on the same device, likewise; its dtype may differ from the student's.
        row_scale: [M] float32, the factor of each row's divergence.
        divergence: one of ``DIVERGENCES``.
        mix: share of the teacher in the mixture of ``jsd`` and ``skew_kl``, of the student in that of
            ``skew_reverse_kl``, above 0 and below 1; elsewhere of no effect.
        student_temperature: divides the student's logits, above 0.
        teacher_temperature: divides the teacher's logits, above 0.
        student_softcap: c above 0 makes c · tanh(z/c) of the student's logits z first; 0 leaves them.
        teacher_softcap: likewise of the teacher's.
        labels: [M] int64, the word of each row whose cross-entropy at temperature 1 is added. Read where ``ce_scale``
            is not 0; one that is not in [0, V) makes its row NaN.
        ce_scale: [M] float32, the factor of each row's cross-entropy; given with ``labels``, and only then.
        with_grad: whether the gradient is computed.

    Returns:
        rows: [M] float32, row_scale · divergence + ce_rows. A NaN among a row's logits makes that row NaN. Rows whose
            factors are 0 are not read and give 0.
        ce_rows: [M] float32, ce_scale · cross-entropy; empty [0] without ``labels``.
        grad: [M, V] contiguous in the student's dtype, or empty [0, 0] without ``with_grad``.

    Raises:
        TypeError: a dtype other than those named.
        ValueError: shapes or devices that do not fit, a number out of its range, an unknown divergence.

    Never waits for the device, so it can be captured in a CUDA graph.
    """
    _check_tensors(student, teacher, row_scale, labels, ce_scale)
    _check_numbers(divergence, mix, student_temperature, teacher_temperature, student_softcap, teacher_softcap)
    student, teacher = words_together(student), words_together(teacher)
    count, width = student.shape
    rows = torch.empty(count, dtype=torch.float32, device=student.device)
    ce_rows = torch.empty(0 if labels is None else count, dtype=torch.float32, device=student.device)
    grad = torch.empty((count, width) if with_grad else (0, 0), dtype=student.dtype, device=student.device)
    share_t = 1.0 - mix if divergence == "skew_reverse_kl" else mix
    extras = labels is not None or student_softcap > 0.0 or teacher_softcap > 0.0
    kernel, options, constants = plan(width, max(student.element_size(), teacher.element_size()), divergence, extras)
    launch(
        kernel,
        count,
        student,
        options,
        student,
        teacher,
        row_scale.contiguous(),
        None if labels is None else labels.contiguous(),
        None if ce_scale is None else ce_scale.contiguous(),
        rows,
        None if labels is None else ce_rows,
        grad if with_grad else None,
        student.stride(0),
        teacher.stride(0),
        width,
        width,
        1.0 / student_temperature,
        1.0 / teacher_temperature,
        student_softcap or None,
        teacher_softcap or None,
        share_t,
        1.0 - share_t,
        **constants,
    )
    return rows, ce_rows, grad


def _check_tensors(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row_scale: torch.Tensor,
    labels: torch.Tensor | None,
    ce_scale: torch.Tensor | None,
) -> None:
    check_logits("student", student)
    check_logits("teacher", teacher)
    check_like("teacher", teacher, student.shape, student.device)
    check_scale("row_scale", row_scale, student)
    if (labels is None) != (ce_scale is None):
        given, absent = ("ce_scale", "labels") if labels is None else ("labels", "ce_scale")
        raise ValueError(f"{absent}: got None, accepted with {given}: a tensor [{student.shape[0]}]")
    if labels is not None and ce_scale is not None:
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: got dtype {labels.dtype}, accepted: int64")
        check_like("labels", labels, student.shape[:1], student.device)
        check_scale("ce_scale", ce_scale, student)


def _check_numbers(
    divergence: str,
    mix: float,
    student_temperature: float,
    teacher_temperature: float,
    student_softcap: float,
    teacher_softcap: float,
) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: got {divergence!r}, accepted: {', '.join(DIVERGENCES)}")
    if divergence in ("jsd", "skew_kl", "skew_reverse_kl") and not 0.0 < mix < 1.0:
        raise ValueError(f"mix: got {mix}, accepted with {divergence}: a number above 0 and below 1")
    for name, temperature in (
        ("student_temperature", student_temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"{name}: got {temperature}, accepted: a finite number above 0")
    for name, cap in (("student_softcap", student_softcap), ("teacher_softcap", teacher_softcap)):
        if not 0.0 <= cap < float("inf"):
            raise ValueError(f"{name}: got {cap}, accepted: a finite number above 0, or 0 for none")
