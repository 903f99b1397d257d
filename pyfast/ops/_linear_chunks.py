"""The chunks of linear_distill: hidden states times heads, a block of tokens at a time, and the gradients that follow.

    for each chunk of tokens         student_hidden [n, H_s]      teacher_hidden [n, H_t]
                                             │ · student_headᵀ            │ · teacher_headᵀ
                                      logits [n, V]                logits [n, V]
                                             └──────── loss_of ───────────┘
                                                         │
                                 values [n],  gradient of the logits [n, V]
                                                         │
              grad_hidden = gradient · head,   grad_head += gradientᵀ · hidden,   grad_bias += Σ gradient

``loss_of`` is distill_kl, or where the words are sharded the collectives around shard_distill (``pyfast/parallel.py``).
Three blocks of [n, V] are alive at a time. The two of the logits are reused by every chunk. On a CPU their memory, that
of the kernel's gradient and that of the head's are kept from step to step (csrc/cpu/reuse.h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast import _products
from pyfast.ops import _arguments as arguments
from pyfast.ops._memory import memory_at_hand, reusable_empty

# Tokens above which the products gain little: every chunk reads both heads, and reads and writes the head's gradient.
EFFICIENT_TOKENS = {"cpu": 208, "cuda": 1024}
SMALL_BYTES = 16 << 20  # logits of a chunk that may be had whatever the number of tokens
BLOCKS = 3  # of logits that are alive at a time: the student's, the teacher's, the gradient
PANEL = 512  # rows of a head that are multiplied at once where the product needs memory on its way


class Operands(NamedTuple):
    """Hidden states and heads of both models as a loss takes them: of one layer, or of several that share a head.
    ``teacher_logits`` stand in place of the teacher's hidden states and head."""

    student_hiddens: Sequence[Tensor]
    student_head: Tensor
    student_bias: Tensor | None
    teacher_hiddens: Sequence[Tensor] | None
    teacher_head: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None = None

    @property
    def leading(self) -> torch.Size:
        """Shape of one layer's tokens."""
        return self.student_hiddens[0].shape[:-1]

    @property
    def teachers(self) -> Sequence[Tensor]:
        """The teacher's hidden states of each layer, or its logits."""
        return (self.teacher_hiddens or ()) if self.teacher_logits is None else (self.teacher_logits,)

    @property
    def vocabularies(self) -> tuple[int, int]:
        """Words of student and teacher."""
        teacher = self.teachers[0].shape[-1] if self.teacher_head is None else self.teacher_head.shape[0]
        return self.student_head.shape[0], teacher

    @property
    def wanted(self) -> list[bool]:
        """Whether hidden states, head and bias of the student require a gradient."""
        hidden = any(hidden.requires_grad for hidden in self.student_hiddens)
        others = (x is not None and x.requires_grad for x in (self.student_head, self.student_bias))
        return [torch.is_grad_enabled() and of for of in (hidden, *others)]

    def check(self, least: int = 1) -> None:
        """What can be multiplied and compared, over at least ``least`` words.

        Raises:
            TypeError, ValueError: naming the argument, what was got and what is accepted.
        """
        for hidden in self.student_hiddens:
            arguments.check_head("student", hidden, self.student_head, self.student_bias, least)
        if any(hidden.shape[:-1] != self.leading for hidden in self.student_hiddens):
            shapes = [list(hidden.shape) for hidden in self.student_hiddens]
            raise ValueError(f"student_hidden: got shapes {shapes}, accepted: one leading shape for all layers")
        name = self._check_teacher(least)
        for student, teacher in zip(self.student_hiddens, self.teachers, strict=True):
            if teacher.device != student.device:
                raise ValueError(f"{name}: got device {teacher.device}, accepted: the student's, {student.device}")
            if teacher.shape[:-1] != student.shape[:-1]:
                raise ValueError(
                    f"{name}: got shape {list(teacher.shape)}, accepted: the leading shape of student_hidden, "
                    f"{[*student.shape[:-1], '...']}"
                )

    def _check_teacher(self, least: int) -> str:
        """Hidden states with a head or logits are given, one of them; the name of that argument."""
        hiddens, logits = self.teacher_hiddens, self.teacher_logits
        if hiddens is not None and logits is None:
            if self.teacher_head is None:
                raise TypeError("teacher_head: got None, accepted with teacher_hidden: a tensor of weights [V, H]")
            for hidden in hiddens:
                arguments.check_head("teacher", hidden, self.teacher_head, self.teacher_bias, least)
            return "teacher_hidden"
        if logits is not None and hiddens is None:
            for extra, value in (("teacher_head", self.teacher_head), ("teacher_bias", self.teacher_bias)):
                if value is not None:
                    raise ValueError(f"{extra}: got one beside teacher_logits, accepted: with teacher_hidden only")
            arguments.check_floating("teacher_logits", logits, "of logits [..., V]", least)
            return "teacher_logits"
        got = "neither" if logits is None else "both"
        raise ValueError(
            f"teacher_hidden, teacher_logits: got {got}, accepted: one of them (teacher_hidden with teacher_head)"
        )

    def joined(
        self,
        options: arguments.LossOptions,
        words: int,
        chunk_size: int | None,
        *,
        layer_weights: Sequence[float] = (1.0,),
        labels_below: int | None = None,
    ) -> tuple[Inputs, arguments.TokenWeights]:
        """Checked operands and the options as ``pyfast::linear_distill`` takes them, layers one after the other, each
        with its weight; and what one layer's tokens count. ``words`` are compared; ``labels_below`` as ``words`` of
        :meth:`LossOptions.token_weights`."""
        objective = options.objective()
        student_dtype = arguments.product_dtype(self.student_hiddens[0])
        teacher = self.teachers[0]
        teacher_dtype = teacher.dtype if self.teacher_head is None else arguments.product_dtype(teacher)
        weights = options.token_weights(
            teacher.new_empty((math.prod(self.leading), 0), dtype=torch.promote_types(student_dtype, teacher_dtype)),
            self.leading,
            words=labels_below,
            divide_last=student_dtype == torch.float16,
        )
        labels, ce_scale = weights.labels, weights.ce_scale
        if labels is not None and ce_scale is not None:
            labels = labels.repeat(len(layer_weights))
            ce_scale = torch.cat([ce_scale * weight for weight in layer_weights])
        summed = options.reduction != "none"
        inputs = Inputs(
            _rows(self.student_hiddens),
            self.student_head,
            self.student_bias,
            _rows([teacher.detach() for teacher in self.teachers]),
            None if self.teacher_head is None else self.teacher_head.detach(),
            None if self.teacher_bias is None else self.teacher_bias.detach(),
            torch.cat([weights.row_scale * weight for weight in layer_weights]),
            *objective,
            labels,
            ce_scale,
            words,
            chunk_size or 0,
            student_dtype,
            teacher_dtype,
            summed,
            [summed and of for of in self.wanted],
        )
        return inputs, weights


def _rows(layers: Sequence[Tensor]) -> Tensor:
    """Layers ``[..., width]`` as ``[layers · rows, width]``."""
    rows = [layer.reshape(math.prod(layer.shape[:-1]), layer.shape[-1]) for layer in layers]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class Inputs(NamedTuple):
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

    @property
    def logits_dtype(self) -> torch.dtype:
        """In which student and teacher are compared."""
        return torch.promote_types(self.student_dtype, self.teacher_dtype)


def gradients(
    call: Inputs, empty: Callable[[Tensor, int, int], Tensor] = Tensor.new_empty
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients that are wanted, empty for the others; zeroed for hidden states and bias."""
    of_hidden, of_head, of_bias = call.wanted
    grad_hidden = call.student_hidden.new_zeros(call.student_hidden.shape if of_hidden else (0,))
    grad_head = empty(call.row_scale, *call.student_head.shape) if of_head else call.row_scale.new_empty(0)
    grad_bias = call.row_scale.new_zeros(call.student_head.shape[:1] if of_bias else (0,))
    return grad_hidden, grad_head, grad_bias


def in_chunks(
    call: Inputs, loss_of: Callable[[Tensor, Tensor, slice | Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss_of`` gives the values of the rows of a chunk, and the gradient of their sum to its first argument, from
    the logits of both: of all words, or of those that this process has (``pyfast/parallel.py``)."""
    of_hidden, of_head, of_bias = call.wanted
    words, row_scale, ce_scale = call.words, call.row_scale, call.ce_scale
    rows = torch.zeros_like(row_scale)
    grad_hidden, grad_head, grad_bias = gradients(call, reusable_empty)
    logits_dtype = call.logits_dtype
    counted = row_scale != 0 if ce_scale is None else (row_scale != 0) | (ce_scale != 0)
    chunks = _chunks(counted, call.chunk_size or tokens_a_chunk(words, logits_dtype, row_scale.device))
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
                grad_hidden[chunk] = _products.mm(grad, student.head).to(grad_hidden.dtype)
            if of_head:
                add_product(grad_head[:words], grad.t(), student.hidden[chunk], overwrite=i == 0)
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
            self.logits = reusable_empty(hidden, hidden.shape[0], self.head.shape[0])
        out = self.logits[: hidden.shape[0]]
        return linear_out(out, hidden, self.head, self.bias)


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


def tokens_a_chunk(words: int, dtype: torch.dtype, device: torch.device) -> int:
    """As many tokens as make the products efficient, and as an eighth of the free memory holds."""
    row = words * dtype.itemsize
    tokens = max(EFFICIENT_TOKENS.get(device.type, 1024), SMALL_BYTES // row)
    memory = memory_at_hand(device)
    return tokens if memory is None else max(1, min(tokens, memory // 8 // (BLOCKS * row)))


def linear_out(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """out = x · weightᵀ + bias."""
    if not _products.by_onednn(x, weight):
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    for part in _panels(len(weight)):  # oneDNN writes to new memory alone: a little of it, in the cache
        out[:, part] = _products.linear(x, weight[part], None if bias is None else bias[part])
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor, overwrite: bool) -> None:
    """total (+)= left · right, into float32. cuBLAS adds a product of 16 bits to float32 by itself, and MKL one of
    float32; what oneDNN multiplies is added a panel of rows at a time, of 16 bits once it is rounded."""
    if left.dtype == torch.float32 and not _products.by_onednn(left, right):
        torch.addmm(total, left, right, beta=0 if overwrite else 1, out=total)
        return
    if left.is_cuda and overwrite:
        torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=total)
        return
    if left.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
        return
    for part in _panels(len(total)):
        if overwrite:
            total[part] = _products.mm(left[part], right)
        else:
            total[part] += _products.mm(left[part], right)


def _panels(rows: int) -> list[slice]:
    return [slice(begin, begin + PANEL) for begin in range(0, rows, PANEL)]
