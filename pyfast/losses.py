"""Losses as modules: the weighted sum of every signal between two models, and the plain twin of the logit loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.capture import AttentionInputs, CapturedLayers
from pyfast.heads import Head, final_norm, output_head
from pyfast.hidden import hidden_states_loss
from pyfast.layer_map import layer_pairs
from pyfast.ops import _arguments as arguments
from pyfast.ops.distill_kl import distillation_loss

SIGNALS = ("logits", "hidden", "attention", "lens")

Weight = float | Callable[[int], float]


class LogitDistillationLoss(nn.Module):
    """:func:`pyfast.distillation_loss` with its options set once.

    Args:
        divergence, alpha, beta, temperature, teacher_temperature, scale_by_t2, softcap, teacher_softcap, ce_weight,
            reduction, ignore_index, vocab_size, backend: as in :func:`pyfast.distillation_loss`.
    """

    def __init__(self, divergence: str = "forward_kl", **options: Any):
        super().__init__()
        arguments.check_names("LogitDistillationLoss", options, arguments.option_names(*_OF_CALLS))
        self.options = {"divergence": divergence, **options}

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Logits ``[..., V]`` of both to the loss."""
        return distillation_loss(student, teacher, labels=labels, mask=mask, num_items=num_items, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


@dataclass
class DistillationLossOutput:
    """What :class:`DistillationLoss` returns.

    ``loss``: the weighted sum, a scalar with its graph. ``parts``: each signal's value before its weight, detached,
    on the device. ``weights``: what each was multiplied by.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


class DistillationLoss(nn.Module):
    """The weighted sum of four signals between the outputs of a student and of a teacher.

    ============= ================================================= =============================================
    signal        compares                                          needs of both outputs
    ============= ================================================= =============================================
    ``logits``    next-token distributions: any divergence of       ``.logits``, or ``.last_hidden_state`` and the
                  :func:`pyfast.distillation_loss`, plus            models: then through
                  ``ce_weight`` times the labels' cross-entropy     :func:`pyfast.linear_distillation_loss`
    ``hidden``    hidden states: :func:`pyfast.hidden_states_loss`  ``.hidden_states`` (``output_hidden_states=True``)
    ``attention`` where queries look:                               ``.attention_inputs``
                  :func:`pyfast.attention_distillation_loss`        (:func:`pyfast.capture_attention`)
    ``lens``      what layers would say through the final norm and  ``.hidden_states``, and the models
                  head: :func:`pyfast.logit_lens_loss`
    ============= ================================================= =============================================

    ::

        loss = DistillationLoss(hidden=0.1, temperature=2.0, ce_weight=0.5, shift=True)
        out = loss(student(**batch, output_hidden_states=True), theirs, labels=batch["labels"])
        out.loss.backward()
        out.parts                                   # {"logits": tensor(1.91), "hidden": tensor(0.37)}

    Args:
        logits, hidden, attention, lens: weights, 0 or above, or schedules: callables from the step to a weight, such
            as :class:`linear_schedule` and :class:`cosine_schedule`. A signal of weight 0 is not computed.
        shift: whether ``labels`` and ``mask`` speak of tokens, as a causal language model of transformers takes them:
            the logits (and hidden states) at i are then counted by the token at i + 1, and the last position by none.
            False where they speak of the positions themselves (masked language models, labels that are shifted
            already). To be said wherever labels or a mask are given.
        ignore_index: label of tokens that do not count.
        divergence, temperature and the other options of :func:`pyfast.distillation_loss`: of the ``logits`` signal.
        hidden_options: layers, kind, embeddings, projection, eps of :func:`pyfast.hidden_states_loss`. Modules in
            ``projection`` become parts of this module: their parameters belong into the optimizer.
        attention_options: divergence, alpha, beta, temperature, backend of
            :func:`pyfast.attention_distillation_loss`; and ``layers``: pairs of the layers' numbers, or a strategy,
            over the layers that were captured.
        lens_options: options of :func:`pyfast.logit_lens_loss` and :func:`pyfast.linear_distillation_loss`.

    Raises:
        TypeError, ValueError: an option of a wrong name, type or value.
    """

    def __init__(
        self,
        divergence: str = "forward_kl",
        *,
        logits: Weight = 1.0,
        hidden: Weight = 0.0,
        attention: Weight = 0.0,
        lens: Weight = 0.0,
        shift: bool | None = None,
        ignore_index: int = -100,
        hidden_options: Mapping[str, Any] | None = None,
        attention_options: Mapping[str, Any] | None = None,
        lens_options: Mapping[str, Any] | None = None,
        **logit_options: Any,
    ):
        super().__init__()
        self.weights = dict(zip(SIGNALS, (logits, hidden, attention, lens), strict=True))
        for name, weight in self.weights.items():
            if not callable(weight):
                arguments.not_negative(name, weight)
        if not any(callable(weight) or weight > 0 for weight in self.weights.values()):
            raise ValueError(f"{', '.join(SIGNALS)}: got weights that are all 0, accepted: one at least above 0")
        if shift is not None and not isinstance(shift, bool):
            raise TypeError(f"shift: got {type(shift).__name__}, accepted: True, False or None (no labels, no mask)")
        self.shift, self.ignore_index = shift, ignore_index
        self.logit_options = {"divergence": divergence, **logit_options}
        self.hidden_options, self.attention_options, self.lens_options = (
            dict(options or {}) for options in (hidden_options, attention_options, lens_options)
        )
        logit_names = arguments.option_names(*_OF_CALLS, "reduction", "ignore_index")
        arguments.check_names("DistillationLoss", logit_options, logit_names)
        arguments.check_names("hidden_options", self.hidden_options, _HIDDEN_OPTIONS)
        arguments.check_names("attention_options", self.attention_options, _ATTENTION_OPTIONS)
        projection = self.hidden_options.get("projection")
        if isinstance(projection, list | tuple) and all(isinstance(each, nn.Module) for each in projection):
            projection = self.hidden_options["projection"] = nn.ModuleList(projection)
        self.projection = projection if isinstance(projection, nn.Module) else None

    def uses(self, signal: str) -> bool:
        """Whether ``signal`` can have a weight above 0."""
        weight = self.weights[signal]
        return callable(weight) or weight > 0

    def forward(
        self,
        student_outputs: Any,
        teacher_outputs: Any,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shift: bool | None = None,
        step: int | None = None,
        num_items: float | Tensor | None = None,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
    ) -> DistillationLossOutput:
        """The loss over the outputs of both models for the same tokens.

        Args:
            student_outputs, teacher_outputs: ModelOutputs, or objects or dicts with the fields of the table above.
            labels: integers ``[B, T]``: words for the cross-entropy, and tokens that count.
            mask: boolean ``[B, T]``, tokens that count, for training without labels. With both, both must hold.
            attention_mask: ``[B, T]`` as the models got it, 0 at padding: positions there count in no signal, and no
                query looks at them.
            shift: of this call, in place of the module's.
            step: the training step, from 0; needed where a weight is a schedule.
            num_items: replaces the divisor of every signal's mean: the count of tokens of all micro-batches.
            student, teacher: the models, unwrapped; needed for ``lens``, and for ``logits`` from last hidden states.

        Raises:
            TypeError, ValueError: as the functions of the signals; and outputs that lack what a signal needs.
        """
        shift = self.shift if shift is None else shift
        if shift is None and (labels is not None or mask is not None):
            raise ValueError(
                "shift: got None with labels or a mask, accepted: True (they speak of tokens, as the labels of a "
                "causal language model do) or False (they speak of the positions of the logits)"
            )
        if shift:
            labels = None if labels is None else arguments.next_token(labels, self.ignore_index)
            mask = None if mask is None else arguments.next_token(mask, False)
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
        call = _Call(
            student_outputs,
            teacher_outputs,
            labels,
            mask,
            attention_mask,
            num_items,
            student,
            teacher,
            self.ignore_index,
        )
        total: Tensor | None = None
        result = DistillationLossOutput(torch.empty(0))
        for name in SIGNALS:
            weight = self._weight(name, step)
            if weight == 0:
                continue
            part = getattr(self, f"_{name}")(call)
            total = weight * part if total is None else total + weight * part
            result.parts[name], result.weights[name] = part.detach(), weight
        if total is None:
            raise ValueError(f"{', '.join(SIGNALS)}: every schedule gives 0 at step {step}, accepted: one above 0")
        result.loss = total
        return result

    def _weight(self, name: str, step: int | None) -> float:
        weight = self.weights[name]
        if not callable(weight):
            return float(weight)
        if step is None:
            raise ValueError(f"step: got None, accepted: the training step, as the weight of {name!r} is a schedule")
        return arguments.not_negative(name, weight(step))

    def _logits(self, call: _Call) -> Tensor:
        options = {**self.logit_options, "ignore_index": self.ignore_index, "num_items": call.num_items}
        ours, theirs = call.get("logits")
        options["labels"] = call.labels
        if ours is not None and theirs is not None:
            options["mask"] = _both(call.mask, call.positions(ours, "attention_mask"))
            return distillation_loss(ours, theirs, **options)
        ours, theirs = call.required("last_hidden_state", "logits", "nor logits; one of the two is what models return")
        options["mask"] = _both(call.mask, call.positions(ours, "attention_mask"))
        return _linear(ours, theirs, *call.models("logits"), options)

    def _hidden(self, call: _Call) -> Tensor:
        ours, theirs = call.required("hidden_states", "hidden", _ASK_FOR_HIDDEN)
        counted = call.positions(ours[-1], *_COUNTED)
        return hidden_states_loss(ours, theirs, mask=counted, num_items=call.num_items, **self.hidden_options)

    def _attention(self, call: _Call) -> Tensor:
        from pyfast.ops.attention_distill import attention_distillation_loss

        how = "run both models within pyfast.capture_attention(model)"
        ours, theirs = call.required("attention_inputs", "attention", how)
        options = dict(self.attention_options)
        pairs = _attention_pairs(options.pop("layers", "uniform"), ours, theirs)
        if torch.is_grad_enabled() and not any(each.query.requires_grad or each.key.requires_grad for each, _ in pairs):
            raise ValueError(
                "student_outputs: the captured queries and keys carry no gradient, accepted: those of a forward with "
                "gradients, without reentrant checkpointing (use_reentrant=False)"
            )
        losses = []
        for student, teacher in pairs:
            _check_attention(student, teacher)
            queries = call.positions(student.query[:, 0], *_COUNTED)
            loss = attention_distillation_loss(
                student.query,
                student.key,
                teacher.query,
                teacher.key,
                causal=student.causal,
                mask=call.attention_mask,
                query_mask=queries,
                student_scale=student.scaling,
                teacher_scale=teacher.scaling,
                reduction="mean" if call.num_items is None else "sum",
                **options,
            )
            if call.num_items is not None:  # a mean over the groups of heads, and a sum over tokens
                groups = math.gcd(student.query.shape[1], teacher.query.shape[1])
                loss = loss / (groups * call.num_items)
            losses.append(loss)
        return torch.stack(losses).mean()

    def _lens(self, call: _Call) -> Tensor:
        from pyfast.logit_lens import logit_lens_loss

        ours, theirs = call.required("hidden_states", "lens", _ASK_FOR_HIDDEN)
        student, teacher = call.models("lens")
        head_s, head_t = output_head("student", student), output_head("teacher", teacher)
        return logit_lens_loss(
            ours,
            theirs,
            final_norm("student", student),
            head_s.weight,
            final_norm("teacher", teacher),
            head_t.weight,
            mask=call.positions(ours[-1], *_COUNTED),
            num_items=call.num_items,
            **_of_heads(head_s, head_t, self.lens_options),
        )

    def extra_repr(self) -> str:
        weights = {name: weight for name, weight in self.weights.items() if self.uses(name)}
        options = {**weights, **self.logit_options, "shift": self.shift}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


@dataclass
class _Call:
    """One call's arguments, labels and mask at the positions of the logits."""

    student_outputs: Any
    teacher_outputs: Any
    labels: Tensor | None
    mask: Tensor | None
    attention_mask: Tensor | None
    num_items: float | Tensor | None
    student: nn.Module | None
    teacher: nn.Module | None
    ignore_index: int

    def get(self, name: str) -> tuple[Any, Any]:
        """The field of both outputs, None where there is none."""
        return _field(self.student_outputs, name), _field(self.teacher_outputs, name)

    def required(self, name: str, signal: str, how: str) -> tuple[Any, Any]:
        found = self.get(name)
        for who, value in zip(("student_outputs", "teacher_outputs"), found, strict=True):
            if value is None:
                raise ValueError(f"{who}: has no {name}, which the signal {signal!r} needs; {how}")
        return found

    def models(self, signal: str) -> tuple[Any, Any]:
        if self.student is None or self.teacher is None:
            name = "student" if self.student is None else "teacher"
            raise ValueError(f"{name}: got None, accepted: the model, whose head the signal {signal!r} needs")
        return self.student, self.teacher

    def positions(self, states: Tensor, *names: str) -> Tensor | None:
        """The positions of ``states`` [..., H] that all the named arguments count; None for all. An argument of another
        rank (one label a sequence, a mask over the tokens of one sequence logit) does not speak of them."""
        leading = states.shape[:-1]
        result = None
        for name in names:
            choice = getattr(self, name)
            if choice is None or choice.dim() != len(leading):
                continue
            if choice.shape != leading:
                raise ValueError(f"{name}: got shape {list(choice.shape)}, accepted: {list(leading)}, one a position")
            counted = choice != self.ignore_index if name == "labels" else choice
            result = counted if result is None else result & counted
        return result


def _field(outputs: Any, name: str) -> Any:
    """A field of a ModelOutput, an object or a dict; None where there is none."""
    found = getattr(outputs, name, None)
    return outputs.get(name) if found is None and isinstance(outputs, dict) else found


def _linear(ours: Tensor, theirs: Tensor, student: nn.Module, teacher: nn.Module, options: dict[str, Any]) -> Tensor:
    """The logit signal from last hidden states: the logits never exist in full."""
    from pyfast.ops.linear_distill import linear_distillation_loss

    head_s, head_t = output_head("student", student), output_head("teacher", teacher)
    return linear_distillation_loss(ours, head_s.weight, theirs, head_t.weight, **_of_heads(head_s, head_t, options))


def _of_heads(student: Head, teacher: Head, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of a loss that multiplies by the heads itself, with what else the models do to their logits."""
    own: dict[str, Any] = {"student_bias": student.bias, "teacher_bias": teacher.bias}
    if student.softcap is not None or teacher.softcap is not None:
        if options.get("softcap") is not None or options.get("teacher_softcap") is not None:
            raise ValueError("softcap: got one beside the models' own, accepted with last hidden states: None")
        if teacher.softcap is None:
            raise ValueError("student: caps its logits where the teacher does not, which is accepted with logits alone")
        own |= {"softcap": student.softcap, "teacher_softcap": teacher.softcap}
    return {**options, **own}


def _attention_pairs(
    layers: str | list[tuple[int, int]], ours: CapturedLayers, theirs: CapturedLayers
) -> list[tuple[AttentionInputs, AttentionInputs]]:
    """Captured inputs to compare: by the layers' numbers, or by a strategy over those that were captured."""
    if isinstance(layers, str):
        numbers = [sorted(captured) for captured in (ours, theirs)]
        named = [(numbers[0][i], numbers[1][j]) for i, j in layer_pairs(layers, len(ours), len(theirs))]
    else:
        named = layer_pairs(layers, ours.depth, theirs.depth)
    for who, captured, used in (("student", ours, {i for i, _ in named}), ("teacher", theirs, {j for _, j in named})):
        if not used <= captured.keys():
            raise ValueError(f"layers: got {who} layers {sorted(used - captured.keys())}, captured: {sorted(captured)}")
    return [(ours[i], theirs[j]) for i, j in named]


def _check_attention(student: AttentionInputs, teacher: AttentionInputs) -> None:
    """Both calls of attention are ones that attention_distillation_loss computes."""
    for who, inputs in (("student_outputs", student), ("teacher_outputs", teacher)):
        if inputs.softcap is not None:
            raise ValueError(f"{who}: caps its attention scores (softcap {inputs.softcap}), which is not supported")
        if inputs.sliding_window is not None and inputs.sliding_window < inputs.key.shape[2]:
            raise ValueError(
                f"{who}: attends {inputs.sliding_window} of {inputs.key.shape[2]} keys (sliding window), which is not "
                "supported; choose other layers, or sequences within the window"
            )
    if student.causal != teacher.causal:
        raise ValueError("teacher_outputs: one model attends causally and the other does not, accepted: the same")


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if second is None else second if first is None else first & second


_COUNTED = ("labels", "mask", "attention_mask")
_ASK_FOR_HIDDEN = "call the model with output_hidden_states=True"
_OF_CALLS = ("labels", "mask", "num_items")  # options of the logit loss that forward takes
_HIDDEN_OPTIONS = ("layers", "kind", "embeddings", "projection", "eps")
_ATTENTION_OPTIONS = ("layers", "divergence", "alpha", "beta", "temperature", "backend")
