"""Arguments that the distillation losses share: their checks, and what the kernels make of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyfast.reference.distill_kl import DIVERGENCES

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor

REDUCTIONS = ("mean", "sum", "none")


class Objective(NamedTuple):
    """What is computed for a pair of rows, in the order of the schema of ``pyfast::distill_kl``.

    ``mix`` is the share of the first distribution in the mixture: the teacher's in ``jsd`` (β) and ``skew_kl`` (α),
    the student's in ``skew_reverse_kl`` (α). Softcaps: 0 for none.
    """

    divergence: str
    mix: float
    student_temperature: float
    teacher_temperature: float
    student_softcap: float
    teacher_softcap: float


class TokenWeights(NamedTuple):
    """What the tokens of a call count: factors of each row, and what the sum over rows is divided by at last."""

    row_scale: Tensor
    labels: Tensor | None
    ce_scale: Tensor | None
    counted: Tensor | None
    divisor: float | Tensor | None

    def reduced(self, loss: Tensor) -> Tensor:
        return loss if self.divisor is None else loss / self.divisor


@dataclass(frozen=True, slots=True)
class LossOptions:
    """The options of :func:`pyfast.distillation_loss`, whose docstring says what they mean, with their defaults.

    The losses that take them besides arguments of their own accept ``**options`` and come here by :meth:`of`.
    """

    divergence: str = "forward_kl"
    alpha: float = 0.1
    beta: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float | None = None
    scale_by_t2: bool = True
    softcap: float | None = None
    teacher_softcap: float | None = None
    ce_weight: float = 0.0
    reduction: str = "mean"
    labels: Tensor | None = None
    ignore_index: int = -100
    mask: Tensor | None = None
    num_items: float | Tensor | None = None
    vocab_size: int | None = None
    backend: str | None = None

    @classmethod
    def of(
        cls, function: str, divergence: str, options: Mapping[str, Any], without: Collection[str] = ()
    ) -> LossOptions:
        """The ``options`` with which ``function`` was called, which has none of the names in ``without``.

        Raises:
            TypeError: a name that it does not accept, with those that it does.
        """
        check_names(function, options, option_names(*without))
        return cls(divergence, **options)

    def objective(self) -> Objective:
        """The options that say what is computed for a pair of rows, checked.

        Raises:
            TypeError, ValueError: naming the option, what was got and what is accepted.
        """
        divergence, mix = self.divergence, 0.0
        if divergence not in DIVERGENCES:
            raise ValueError(f"divergence: got {divergence!r}, accepted: {', '.join(DIVERGENCES)}")
        positive("temperature", self.temperature)
        teacher_temperature = self.temperature if self.teacher_temperature is None else self.teacher_temperature
        positive("teacher_temperature", teacher_temperature)
        for name, cap in (("softcap", self.softcap), ("teacher_softcap", self.teacher_softcap)):
            if cap is not None:
                positive(name, cap)
        teacher_softcap = self.softcap if self.teacher_softcap is None else self.teacher_softcap
        if divergence == "jsd":
            mix = number("beta", self.beta, "a number above 0 and below 1")
            if not 0.0 < mix < 1.0:
                limits = (
                    "; the divergence is 0 there: forward_kl and reverse_kl are the limits" if mix in (0, 1) else ""
                )
                raise ValueError(f"beta: got {self.beta}, accepted: a number above 0 and below 1{limits}")
        elif divergence in ("skew_kl", "skew_reverse_kl"):
            mix = number("alpha", self.alpha, "a number from 0 to below 1")
            if not 0.0 <= mix < 1.0:
                raise ValueError(f"alpha: got {self.alpha}, accepted: a number from 0 to below 1 (0 skews nothing)")
            if mix == 0.0:
                divergence = "forward_kl" if divergence == "skew_kl" else "reverse_kl"
        return Objective(
            divergence,
            mix,
            float(self.temperature),
            float(teacher_temperature),
            float(self.softcap or 0),
            float(teacher_softcap or 0),
        )

    def token_weights(
        self, like: Tensor, leading: torch.Size, *, words: int | None = None, divide_last: bool = False
    ) -> TokenWeights:
        """Mask, T² and the divisor of the mean in one number for each row of ``like`` ([rows, …]). The kernels fold it
        in, so that backward has nothing left to do. float32 (float64 for float64 ``like``), without a host sync.

        Args:
            words: which labels of the cross-entropy must be below; None: not looked at.
            divide_last: leave the divisor of the mean to :meth:`TokenWeights.reduced`: folded into a float16 gradient
                it makes small numbers 0 before a loss scale can reach them.

        Raises:
            TypeError, ValueError: naming the option, what was got and what is accepted.
        """
        check_reduction(self.reduction, self.num_items)
        labels = self.labels
        counted = counted_tokens(leading, like.device, labels, self.ignore_index, self.mask)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        count = like.shape[0]
        divisor = mean_divisor(like, counted, self.num_items, dtype) if self.reduction == "mean" else None
        each, last = (None, divisor) if divide_last else (divisor, None)

        def rows(factor: float) -> Tensor:
            """``factor`` for each row that counts. In one small tensor operation where none is left out: in a training
            step, with cold caches, each takes as long as a row of logits."""
            if counted is None and not isinstance(each, Tensor):
                return torch.full((count,), factor if each is None else factor / each, dtype=dtype, device=like.device)
            ones = like.new_ones(count, dtype=dtype) if counted is None else counted.to(dtype)
            return (ones if each is None else ones / each) * factor

        targets = ce_scale = None
        if not_negative("ce_weight", self.ce_weight) > 0:
            if labels is None:
                raise ValueError("labels: got None, accepted with ce_weight above 0: an integer tensor, one a token")
            if words is not None:
                check_labels(labels, counted, words)
            targets, ce_scale = labels.reshape(-1).long(), rows(self.ce_weight)
        return TokenWeights(rows(self.temperature**2 if self.scale_by_t2 else 1.0), targets, ce_scale, counted, last)


_NAMES = tuple(option.name for option in fields(LossOptions) if option.name != "divergence")


def option_names(*without: str) -> list[str]:
    """The options of :func:`pyfast.distillation_loss` behind ``divergence``, less those named."""
    return [name for name in _NAMES if name not in without]


def check_names(name: str, options: Iterable[str], accepted: Collection[str]) -> None:
    """``options`` of the function or argument ``name`` are ones that it has."""
    for option in options:
        if option not in accepted:
            raise TypeError(f"{name}: got the unknown option {option!r}, accepted: {', '.join(accepted)}")


def number(name: str, value: float, accepted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {type(value).__name__}, accepted: {accepted}")
    return float(value)


def positive(name: str, value: float) -> float:
    value = number(name, value, "a number above 0")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, accepted: a finite number above 0")
    return value


def not_negative(name: str, value: float) -> float:
    value = number(name, value, "a number, 0 or above")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value}, accepted: a finite number, 0 or above")
    return value


def check_reduction(reduction: str, num_items: float | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, accepted: {', '.join(REDUCTIONS)}")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f'num_items: replaces the divisor of reduction="mean", got reduction={reduction!r}')
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: got shape {list(num_items.shape)}, accepted: a number or a tensor of one")
    else:
        positive("num_items", num_items)


def check_floating(name: str, tensor: Tensor, shape: str, least: int = 1) -> None:
    """``tensor`` holds float16, bfloat16, float32 or float64 with at least ``least`` elements in its last dimension."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, accepted: a tensor {shape}")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, accepted: float32, bfloat16, float16, float64")
    if tensor.dim() < 1 or tensor.shape[-1] < least:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, accepted: {shape}, the last of at least {least}")


def check_pair(student: Tensor, teacher: Tensor, vocab_size: int | None) -> tuple[torch.Size, Tensor, Tensor]:
    """Logits of both as ``[rows, V]`` of one dtype, the teacher detached, and the leading shape."""
    check_floating("student", student, "of logits [..., V]")
    check_floating("teacher", teacher, "of logits [..., V]")
    check_same_tokens(student, teacher)
    return as_rows(student, teacher, common_vocabulary(student.shape[-1], teacher.shape[-1], vocab_size))


def check_same_tokens(student: Tensor, teacher: Tensor) -> None:
    """Both lie on one device and agree in all but the last dimension."""
    if student.device != teacher.device:
        raise ValueError(f"teacher: got device {teacher.device}, accepted: the student's, {student.device}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: got shape {list(teacher.shape)}, accepted: the student's leading shape, "
            f"{[*student.shape[:-1], 'V']}"
        )


def as_rows(student: Tensor, teacher: Tensor, words: int) -> tuple[torch.Size, Tensor, Tensor]:
    """The first ``words`` words of both as ``[rows, words]`` of the wider dtype, the teacher detached, and the leading
    shape."""
    dtype = student.dtype if student.dtype == teacher.dtype else torch.promote_types(student.dtype, teacher.dtype)
    leading = student.shape[:-1]

    def rows(logits: Tensor) -> Tensor:  # what changes nothing is left out: it would take time, and a place in autograd
        logits = logits if logits.shape[-1] == words else logits[..., :words]
        logits = logits if logits.dtype == dtype else logits.to(dtype)
        return logits if logits.dim() == 2 else logits.reshape(math.prod(leading), words)

    return leading, rows(student), rows(teacher.detach())


def check_head(of: str, hidden: Tensor, head: Tensor, bias: Tensor | None, least: int = 1) -> None:
    """``hidden`` [..., H], ``head`` [V, H] and ``bias`` [V] of one model, whose name ``of`` stands in front of each
    argument's, can be multiplied as by ``F.linear``; V is at least ``least``."""
    check_floating(f"{of}_hidden", hidden, "of hidden states [..., H]")
    check_floating(f"{of}_head", head, "of weights [V, H]")
    width = hidden.shape[-1]
    if head.dim() != 2 or head.shape[0] < least or head.shape[1] != width:
        raise ValueError(f"{of}_head: got shape {list(head.shape)}, accepted: [V, {width}], as wide as {of}_hidden")
    operands = {f"{of}_head": head}
    if bias is not None:
        check_floating(f"{of}_bias", bias, "of one value a word [V]", least)
        if bias.shape != head.shape[:1]:
            raise ValueError(f"{of}_bias: got shape {list(bias.shape)}, accepted: [{head.shape[0]}], one a word")
        operands[f"{of}_bias"] = bias
    for name, operand in operands.items():
        if operand.device != hidden.device:
            raise ValueError(f"{name}: got device {operand.device}, accepted: that of {of}_hidden, {hidden.device}")
        if product_dtype(operand) != product_dtype(hidden):
            raise TypeError(
                f"{name}: got dtype {operand.dtype}, accepted: that of {of}_hidden, {hidden.dtype} "
                "(under torch.autocast, any but float64)"
            )


def product_dtype(operand: Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` would multiply ``operand`` here: that of autocast, which leaves float64 alone."""
    kind = operand.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and operand.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return operand.dtype


def common_vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    """How many words are compared: all, where both have as many, else the first ``vocab_size``."""
    smaller = min(student, teacher)
    if vocab_size is not None:
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not 1 <= vocab_size <= smaller:
            raise ValueError(f"vocab_size: got {vocab_size!r}, accepted: an integer from 1 to {smaller}")
        return vocab_size
    if student != teacher:
        raise ValueError(
            f"teacher: vocabularies differ, got {teacher} words against the student's {student}; "
            f"pass vocab_size={smaller} (or less) to compare the first words of both"
        )
    return student


def counted_tokens(
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


def mean_divisor(
    rows: Tensor, counted: Tensor | None, num_items: float | Tensor | None, dtype: torch.dtype
) -> float | Tensor:
    """What the sum over ``rows`` is divided by in a mean: ``num_items``, or how many of them count (1 where none does).
    A tensor of ``dtype`` where only the device knows it."""
    if isinstance(num_items, Tensor):
        return num_items.reshape(()).to(rows.device, dtype)
    if num_items is not None:
        return float(num_items)
    return float(max(rows.shape[0], 1)) if counted is None else counted.sum().clamp(min=1).to(dtype)


def check_labels(labels: Tensor, counted: Tensor | None, words: int) -> None:
    """Labels that count name a word. Looked at where that costs no host sync: on the CPU, outside of tracing."""
    if type(labels) is not Tensor or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    flat = labels.reshape(-1) if counted is None else labels.reshape(-1)[counted]
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= words):
        wrong = flat[(flat < 0) | (flat >= words)][0]
        raise ValueError(f"labels: got {int(wrong)}, accepted: 0 to {words - 1}, or ignore_index")


def next_token(tokens: Tensor, fill: int | bool) -> Tensor:
    """What stands at i + 1, at i: labels or a mask ``[..., T]`` over tokens, moved to the positions whose logits
    predict them. The last position predicts nothing and gets ``fill``."""
    return torch.nn.functional.pad(tokens[..., 1:], (0, 1), value=fill)


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether ``value`` is a DTensor, found without importing what DTensors are where it is a plain tensor."""
    if type(value) in (Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
