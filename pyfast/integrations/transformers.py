"""Distillation in Hugging Face's Trainer: one argument more, ``teacher``.

::

    trainer = DistillationTrainer(
        model=student,
        args=TrainingArguments("out", per_device_train_batch_size=4, gradient_accumulation_steps=8),
        train_dataset=tokens,                       # input_ids, attention_mask, labels as for any causal LM
        teacher="Qwen/Qwen2.5-3B",
        distillation={"temperature": 2.0, "hidden": 0.1, "ce_weight": 0.5},
    )
    trainer.train()

Needs transformers 5 or later and accelerate.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from pyfast.capture import capture_attention
from pyfast.losses import DistillationLoss, DistillationLossOutput

LOSS_FILE = "distillation_loss.pt"

# Auto classes by the mapping that holds their models, for a teacher given by its name.
_AUTO_CLASSES = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AutoModelForCausalLM",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "AutoModelForMaskedLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "AutoModelForTokenClassification",
}


@dataclass
class _Record:
    """Parts of the loss, summed on the device over batches."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    batches: int = 0

    def add(self, result: DistillationLossOutput, scale: float, step: int) -> None:
        self.weights = result.weights
        self.steps.add(step)
        self.batches += 1
        for name, part in result.parts.items():
            self.parts[name] = self.parts[name] + scale * part if name in self.parts else scale * part


if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object


class DistillationMixin(_Base):
    """Makes a ``Trainer`` subclass distil: ``class MyTrainer(DistillationMixin, SFTTrainer): ...``

    The student's own loss is replaced by :class:`pyfast.nn.DistillationLoss` over the outputs of student and teacher.
    Its parts are logged as ``distill/<signal>`` beside the loss, means over the steps since the last log, and are
    metrics of evaluation as ``eval_distill/<signal>``; so are the last weights of schedules, ``..._weight``. The
    schedules' step is the optimizer's.

    With labels in the batches every signal is divided by the count of tokens of all micro-batches (and processes, with
    ``average_tokens_across_devices``), so that gradient accumulation gives the gradient of one large batch. Without
    labels each micro-batch is averaged by itself.

    Args:
        teacher: a model, or the name or path of one, which is then loaded for the student's task in its saved dtype. It
            is frozen, put in evaluation mode and prepared by Accelerate; it is no part of the student and never saved.
        distillation: a :class:`pyfast.nn.DistillationLoss`, its arguments as a dict, or None for the default. Where its
            ``shift`` is None it is set for the student: True for a causal language model. Parameters in it
            (projections) are trained with the student and saved in checkpoints as ``distillation_loss.pt``.
        fused_linear: compute the ``logits`` signal from last hidden states and heads; logits are never made in training
            and in evaluation without predictions. For causal language models.
        args, kwargs: as the ``Trainer`` takes them.

    Raises:
        TypeError, ValueError: a teacher that is no model, vocabularies that differ without ``vocab_size``, and a way of
            running (DataParallel, projections trained over several processes) that is not supported.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | str | os.PathLike,
        distillation: DistillationLoss | Mapping[str, Any] | None = None,
        fused_linear: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        student = self._unwrapped(self.model)
        self.distillation = _loss(distillation, shift=_is_causal(student)).to(self.args.device)
        self.fused_linear = fused_linear
        self._check_parallel()
        if fused_linear:
            _check_takes_logits_to_keep("model", student)
        teacher = _load(teacher, student) if isinstance(teacher, str | os.PathLike) else teacher
        self._check_teacher(student, teacher)
        self.teacher = self._prepare_teacher(teacher)
        # Tokens are counted over all micro-batches, and training_step divides no second time, whatever the model takes.
        self.model_accepts_loss_kwargs = True
        self.add_callback(_ZeroGrad(self.distillation))
        self._trained, self._evaluated = _Record(), _Record()
        self._predicting = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss of a batch: both forwards, the signals, their record."""
        if num_items_in_batch is not None:  # of batches in which no token counts, 0 over 1 is taken
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        student, teacher = self._unwrapped(model), self._unwrapped(self.teacher)
        fused = self.fused_linear and not self._predicting
        batch = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        captures = self._captured_layers()
        with contextlib.ExitStack() as stack:
            bodies = [stack.enter_context(_last_hidden_state(_body(each))) for each in (student, teacher) if fused]
            attention = [
                stack.enter_context(capture_attention(_body(each), layers))
                for each, layers in zip((student, teacher), captures, strict=True)
                if self.distillation.uses("attention")
            ]
            ours = model(**self._arguments(student, batch, fused))
            with torch.no_grad():
                theirs = self.teacher(**self._arguments(teacher, batch, fused))
            outputs = [_fields(each) for each in (ours, theirs)]
            for fields, body in zip(outputs, bodies, strict=False):
                del fields["logits"]
                fields["last_hidden_state"] = body["last_hidden_state"]
            for fields, capture in zip(outputs, attention, strict=False):
                fields["attention_inputs"] = capture.layers
        labels, shift = inputs.get("labels"), self.distillation.shift
        if "shift_labels" in inputs:
            labels, shift = inputs["shift_labels"], False
        result = self.distillation(
            *outputs,
            labels=labels,
            attention_mask=inputs.get("attention_mask"),
            shift=shift,
            step=self.state.global_step,
            num_items=num_items_in_batch,
            student=student,
            teacher=teacher,
        )
        scale = 1.0
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            scale = float(self.accelerator.num_processes)  # gradients are averaged, and the count is that of all
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        averaged = model.training and not self.loss_is_scaled_for_ga  # over the micro-batches, by training_step
        share = scale / self.current_gradient_accumulation_steps if averaged else scale
        (self._trained if model.training else self._evaluated).add(result, share, self.state.global_step)
        loss = result.loss * scale
        if not return_outputs:
            return loss
        return loss, {name: value for name, value in ours.items() if name != "hidden_states"}

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, *rest: Any, **named: Any
    ) -> Any:
        """As the Trainer's; logits are made where predictions are asked for, whatever ``fused_linear`` says."""
        self._predicting = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *rest, **named)
        finally:
            self._predicting = False

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the Trainer's, with the signals' parts among the metrics, means over the batches."""
        self._evaluated = _Record()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        parts = self._means(self._evaluated, f"{metric_key_prefix}_distill/", self._evaluated.batches)
        return output._replace(metrics={**(output.metrics or {}), **parts})

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """As the Trainer's, with the signals' parts beside the loss."""
        if "loss" in logs:
            logs.update(self._means(self._trained, "distill/", len(self._trained.steps)))
            self._trained = _Record()
        super().log(logs, *rest, **named)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's, with the loss's own parameters (projections) in a group of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        own = [each for each in self.distillation.parameters() if each.requires_grad and id(each) not in held]
        if own:
            optimizer.add_param_group({"params": own, "weight_decay": self.args.weight_decay})
        return optimizer

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's: the student alone; and beside it the loss's own parameters, where it has any."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save and list(self.distillation.parameters()):
            folder = output_dir or self.args.output_dir
            torch.save(self.distillation.state_dict(), os.path.join(str(folder), LOSS_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        path = os.path.join(resume_from_checkpoint, LOSS_FILE)
        if os.path.isfile(path):
            self.distillation.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))

    def _unwrapped(self, model: Any) -> Any:
        """The model of transformers within what Accelerate, and PEFT, have laid around it."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model

    def _check_teacher(self, student: Any, teacher: Any) -> None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher: got {type(teacher).__name__}, accepted: a model, or the name or path of one")
        if teacher is student:
            raise ValueError("teacher: got the student itself, accepted: another model")
        if self.fused_linear:
            _check_takes_logits_to_keep("teacher", teacher)
        ours, theirs = _vocabulary(student), _vocabulary(teacher)
        compared = self.distillation.uses("logits") and "vocab_size" not in self.distillation.logit_options
        if compared and ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"teacher: vocabularies differ, got {theirs} words against the student's {ours}; where the first words "
                f"agree pass distillation={{'vocab_size': {min(ours, theirs)}, ...}}"
            )

    def _check_parallel(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError("args: got several GPUs in one process (DataParallel), accepted: one process a GPU")
        if self.accelerator.num_processes > 1 and list(self.distillation.parameters()):
            raise ValueError("distillation: got projections, over several processes accepted: none to train")
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded and (self.fused_linear or self.distillation.uses("lens")):
            name = "fused_linear" if self.fused_linear else "distillation"
            raise ValueError(f"{name}: reads the heads outside of the forward, which FSDP and DeepSpeed do not allow")

    def _prepare_teacher(self, teacher: nn.Module) -> nn.Module:
        teacher.requires_grad_(False).eval()
        if self.is_deepspeed_enabled:  # shards and optimizer states are the student's; the teacher is held whole
            return teacher.to(self.args.device)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _arguments(self, model: Any, batch: dict[str, Any], fused: bool) -> dict[str, Any]:
        """What the model's forward is called with. A teacher may lack some of the student's inputs."""
        parameters = inspect.signature(type(model).forward).parameters
        takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        options = {name: value for name, value in batch.items() if takes_any or name in parameters}
        if hasattr(model.config, "use_cache"):
            options["use_cache"] = False
        if self.distillation.uses("hidden") or self.distillation.uses("lens"):
            options["output_hidden_states"] = True
        if fused:  # no position: the head makes no logits, and the forward runs through every wrapper of the model
            options["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=self.args.device)
        return options

    def _captured_layers(self) -> tuple[list[int] | None, list[int] | None]:
        """Which layers of student and teacher attention is compared in; None for all, of which a strategy chooses."""
        layers = self.distillation.attention_options.get("layers", "uniform")
        if isinstance(layers, str):
            return None, None
        return [student for student, _ in layers], [teacher for _, teacher in layers]

    def _means(self, record: _Record, prefix: str, count: int) -> dict[str, float]:
        """What was recorded, over ``count`` and the processes: here the host waits for the device."""
        means = {}
        for name, total in record.parts.items():
            total = total if self.accelerator.num_processes == 1 else self.accelerator.reduce(total, "mean")
            means[prefix + name] = float(total) / count
        for name, weight in self.distillation.weights.items():
            if callable(weight) and record.batches:
                means[f"{prefix}{name}_weight"] = record.weights.get(name, 0.0)
        return means


class DistillationTrainer(DistillationMixin, transformers.Trainer):
    """``transformers.Trainer`` that distils from a teacher; see :class:`DistillationMixin` for its arguments."""


def _loss(distillation: DistillationLoss | Mapping[str, Any] | None, shift: bool) -> DistillationLoss:
    if distillation is None or isinstance(distillation, Mapping):
        distillation = DistillationLoss(**{"shift": shift, **(distillation or {})})
    if not isinstance(distillation, DistillationLoss):
        raise TypeError(
            f"distillation: got {type(distillation).__name__}, accepted: a DistillationLoss, a dict or None"
        )
    if distillation.shift is None:
        distillation.shift = shift
    return distillation


class _ZeroGrad(transformers.TrainerCallback):
    """The Trainer zeroes the gradients of its model after a step; this one does so for the loss's own parameters."""

    def __init__(self, distillation: DistillationLoss):
        self.distillation = distillation

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.distillation.zero_grad()


def _is_causal(model: nn.Module) -> bool:
    return type(model).__name__ in _mapping("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


def _mapping(name: str) -> set[str]:
    """Names of the classes in one of the mappings of transformers."""
    found: set[str] = set()
    for value in getattr(transformers.models.auto.modeling_auto, name).values():
        found.update([value] if isinstance(value, str) else value)
    return found


def _load(name: str | os.PathLike, student: nn.Module) -> nn.Module:
    """A model for the student's task, by its name or path, in the dtype in which it was saved."""
    for mapping, auto_class in _AUTO_CLASSES.items():
        if type(student).__name__ in _mapping(mapping):
            return getattr(transformers, auto_class).from_pretrained(name, dtype="auto")
    raise ValueError(
        f"teacher: got {str(name)!r} for a student of type {type(student).__name__}, whose task is not known, "
        "accepted: the model itself"
    )


def _vocabulary(model: Any) -> int | None:
    """How many logits a token gets, by the model's head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return None if weight is None else weight.shape[0]


def _check_takes_logits_to_keep(name: str, model: nn.Module) -> None:
    if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(
            f"{name}: got {type(model).__name__}, accepted with fused_linear: causal language models of transformers, "
            "whose forward takes logits_to_keep"
        )


@contextlib.contextmanager
def _last_hidden_state(body: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dict that gets the body's last hidden state, the input of the head, in each forward within the context."""
    found: dict[str, Tensor] = {}

    def keep(_: nn.Module, inputs: Any, output: Any) -> None:
        found["last_hidden_state"] = output.last_hidden_state

    handle = body.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _body(model: Any) -> nn.Module:
    """The model without its head."""
    return model.base_model


def _fields(outputs: Any) -> dict[str, Any]:
    if not isinstance(outputs, Mapping):
        raise TypeError(f"model: returned {type(outputs).__name__}, accepted: a ModelOutput (config.return_dict=True)")
    return dict(outputs.items())
