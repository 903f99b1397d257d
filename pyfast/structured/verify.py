"""The checks after surgery: the model in memory, the model saved and reloaded, and reading with the cache.

What is right is fixed before the cut, by the uncut model with the removed layers passed over. Everything that
can be compared exactly is: positions, per-layer facts, keys, and every reloaded weight. Outputs are compared
by norm, since the same sums in another order differ by rounding: the error of a row (a token's logits or
hidden state) is the norm of the difference over the root mean square norm of the expected rows, and the worst
row counts.

    ==========  ================  ==============================
    dtype       same computation  with the cache against without
    ==========  ================  ==============================
    float64     1e-10             1e-9
    float32     1e-4              1e-3 (TF32 may be on)
    float16     2e-3              2e-2
    bfloat16    1e-2              5e-2
    ==========  ================  ==============================

The runs of the cut model, with the cache and without, are the same computations as those of the uncut model
with layers passed over. How far rounding may part a run with the cache from one without depends on the model:
deep ones in 16 bits go further than the table allows. So four times what the uncut model itself shows is
allowed there, and for the reloaded model (whose weights may be aligned otherwise in memory), where that is
more. ``generate`` hands its logits out in float32, so that for it 1e-6 is the least tolerance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.structured.families import Anatomy, anatomy, layer_indices, layer_marks
from pyfast.structured.importance import evaluating

SAME = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CACHED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}

_SEED = 20240506
_STEPS = 6  # tokens read one by one with the cache, and at most tokens generated
_LONGEST_WINDOW = 256  # a sliding window up to here is filled and overrun by the probe


class SurgeryError(RuntimeError):
    """A model did not come out of surgery as it should have. It has been put back as it was before."""


@dataclass(frozen=True)
class Expectation:
    """The probe ``ids`` ``[1, T]`` and what the model must make of it, in float64 on the CPU.

    ``outputs`` of a run without a cache, by name; where there is a cache, the one of them that reading with
    it must also give is called ``field``, and ``stepwise`` is what it gives.
    """

    ids: Tensor
    outputs: dict[str, Tensor]
    field: str | None
    stepwise: Tensor | None

    @property
    def rounding(self) -> float:
        """Four times what parts the uncut model's own run with the cache from its run without."""
        if self.field is None or self.stepwise is None:
            return 0.0
        return 4 * _error(self.stepwise, self.outputs[self.field])


def expect(model: Any, parts: Anatomy, removed: set[int]) -> Expectation:
    """Run the uncut model with the ``removed`` layers passed over by hooks: an account of the cut model that
    shares nothing with the surgery."""
    ids = _probe(parts)
    with _quiet(model), _bypassed([parts.layers[index] for index in removed]):
        outputs = _outputs(model, parts, ids)
        if not parts.has_cache:
            return Expectation(ids, outputs, None, None)
        field = "model logits" if model.can_generate() else "body last_hidden_state"
        return Expectation(ids, outputs, field, _stepwise(model, parts, field, ids))


def check_structure(model: Any, parts: Anatomy, marks: Sequence[dict[str, Any]]) -> None:
    """Without running anything: the layers, their positions and the configuration fit each other, and every
    layer has kept the facts ``marks`` that it had."""
    name, count = type(model).__name__, len(parts.layers)
    if parts.config.num_hidden_layers != count:
        stated = parts.config.num_hidden_layers
        raise SurgeryError(f"{name} holds {count} layers, its config.num_hidden_layers says {stated}")
    for module, attribute, index in layer_indices(parts.layers):
        if getattr(module, attribute) != index:
            stored = f"{type(module).__name__}.{attribute} = {getattr(module, attribute)}"
            raise SurgeryError(f"layer {index} of {name} has {stored}")
    found = layer_marks(parts.layers, parts.config)
    if len(found) != len(marks):
        raise SurgeryError(f"{name} holds {len(found)} layers, {len(marks)} were kept")
    for index, (got, wanted) in enumerate(zip(found, marks, strict=True)):
        if got != wanted:
            raise SurgeryError(f"layer {index} of {name} is {got}, and was {wanted} before")


def outer_ties(model: Any, parts: Anatomy) -> set[frozenset[str]]:
    """The groups of parameters outside the layers that are one tensor, by name: embeddings tied to a head."""
    inside = {id(parameter) for layer in parts.layers for parameter in layer.parameters()}
    return {group for number, group in _shared(model).items() if number not in inside}


def check_ties(model: Any, parts: Anatomy, ties: set[frozenset[str]]) -> None:
    """What was tied outside the layers before surgery is tied after it, and nothing else."""
    now = outer_ties(model, parts)
    if now != ties:
        raise SurgeryError(f"{type(model).__name__} ties {_named(now)}; before surgery {_named(ties)}")


def check_model(model: Any, parts: Anatomy, marks: Sequence[dict[str, Any]], expected: Expectation) -> None:
    """Run the model, save it, reload it, run that; SurgeryError where anything is not as ``expected``."""
    with _quiet(model):
        same = SAME[model.dtype]
        _check_runs(model, parts, expected, same, "the model in memory")
        again = _reloaded(model, parts)
        there = anatomy(again)
        check_structure(again, there, marks)
        if set(_shared(again).values()) != set(_shared(model).values()):
            raise SurgeryError(
                f"the reloaded model ties {_named(_shared(again).values())}, "
                f"the model in memory {_named(_shared(model).values())}"
            )
        _check_weights(model, again)
        _share_rounded_buffers(model, again)
        with evaluating(again):
            _check_runs(again, there, expected, max(same, expected.rounding), "the reloaded model")


def _shared(model: nn.Module) -> dict[int, frozenset[str]]:
    """Parameters with more than one name: the names, by the identity of the parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {number: frozenset(group) for number, group in names.items() if len(group) > 1}


def _named(groups: Iterable[frozenset[str]]) -> str:
    return "; ".join(sorted(" = ".join(sorted(group)) for group in groups)) or "nothing"


def _probe(parts: Anatomy) -> Tensor:
    """Token ids ``[1, T]``, the same for every call on models of one size, without the padding token.

    Long enough to fill and overrun a small sliding window; a large one would cost too much, and is looked
    after by the exact comparison of each layer's marks.
    """
    words = int(parts.base.get_input_embeddings().num_embeddings)
    padding = getattr(parts.config, "pad_token_id", None)
    length = 16
    window = getattr(parts.config, "sliding_window", None)
    if isinstance(window, int) and window <= _LONGEST_WINDOW:
        length = max(length, window + 8)
    # RoBERTa-like models number their positions from the padding id + 1.
    reserved = padding + 1 if isinstance(padding, int) and padding > 0 else 0
    length = max(min(length, int(parts.config.max_position_embeddings) - reserved), 1)
    ids = torch.randint(0, words, (1, length), generator=torch.Generator().manual_seed(_SEED))
    if padding is not None:
        ids = torch.where(ids == padding, (ids + 1) % words, ids)
    return ids.to(parts.base.get_input_embeddings().weight.device)


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, and the random generators as they were at the end."""
    devices = sorted({parameter.device for parameter in model.parameters()}, key=str)
    accelerators = [device for device in devices if device.type != "cpu"]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for kind in sorted({device.type for device in devices} | {"cpu"}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if accelerators:
            stack.enter_context(torch.random.fork_rng(accelerators, device_type=accelerators[0].type))
        else:
            stack.enter_context(torch.random.fork_rng([]))
        yield


@contextmanager
def _bypassed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let each of ``layers`` hand on what it was given."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        return (entering, *output[1:]) if isinstance(output, tuple) else entering

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: Any, parts: Anatomy, ids: Tensor) -> dict[str, Tensor]:
    """All that the body and the whole model put out for ``ids``, cache off: float64 on the CPU, by name."""
    arguments = {"use_cache": False} if parts.has_cache else {}
    outputs: dict[str, Tensor] = {}
    runs = [("body", parts.base, ids)]
    if parts.base is not model:
        choices = type(model).__name__.endswith("ForMultipleChoice")  # it reads [batch, choices, tokens]
        runs.append(("model", model, ids[:, None] if choices else ids))
    for label, module, tokens in runs:
        result = module(input_ids=tokens, return_dict=True, **arguments)
        for name, value in result.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                outputs[f"{label} {name}"] = value.double().cpu()
    return outputs


def _check_runs(model: Any, parts: Anatomy, expected: Expectation, same: float, what: str) -> None:
    """The plain run and, where there is a cache, reading and generating with it, all against ``expected``;
    ``same`` is the tolerance between equal computations."""
    got = _outputs(model, parts, expected.ids)
    if got.keys() != expected.outputs.keys():
        raise SurgeryError(f"{what} puts out {sorted(got)}, {sorted(expected.outputs)} was expected")
    for name, wanted in expected.outputs.items():
        _compare(got[name], wanted, same, f"{what}: {name}")
    if expected.field is None or expected.stepwise is None:
        return
    cached = max(CACHED[model.dtype], expected.rounding)
    stepwise = _stepwise(model, parts, expected.field, expected.ids)
    _compare(stepwise, expected.stepwise, same, f"{what}: {expected.field} with the cache")
    whole = expected.outputs[expected.field]
    _compare(stepwise, whole, cached, f"{what}: {expected.field} with the cache against without")
    if model.can_generate():
        _check_generation(model, expected.ids, cached, what)


def _stepwise(model: Any, parts: Anatomy, field: str, ids: Tensor) -> Tensor:
    """What ``_outputs`` calls ``field``, the last tokens of ``ids`` read one by one with the cache."""
    label, name = field.split()
    runner = model if label == "model" else parts.base
    length = ids.shape[1]
    stops = range(max(length - _STEPS, 1), length + 1)
    cache, start, pieces = None, 0, []
    for stop in stops:
        result = runner(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, return_dict=True)
        cache, start = result.past_key_values, stop
        if cache is None:
            raise SurgeryError(f"{type(runner).__name__} gives no cache although it is asked to")
        pieces.append(result[name].double().cpu())
    return torch.cat(pieces, dim=1)


def _check_generation(model: Any, ids: Tensor, tolerance: float, what: str) -> None:
    """The logits by which ``generate`` chose each token are those of one run over the finished sequence."""
    prompt = ids[:, : max(ids.shape[1] - _STEPS, 1)]
    steps = ids.shape[1] - prompt.shape[1]
    if steps == 0:
        return
    # A new object of the model's own class: greedy, whatever the model's own settings are.
    settings = type(model.generation_config)(
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    own = model.generation_config
    model.generation_config = settings  # what a model's own settings say would fill every gap in those passed
    try:
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    finally:
        model.generation_config = own
    stepped = torch.stack(made.logits, dim=1).double().cpu()
    whole = model(input_ids=made.sequences[:, :-1], use_cache=False, return_dict=True).logits
    whole = whole[:, prompt.shape[1] - 1 :].double().cpu()
    _compare(stepped, whole, max(tolerance, 1e-6), f"{what}: logits of generate")


def _error(got: Tensor, wanted: Tensor) -> float:
    """The norm of the worst row of ``got - wanted``, relative to the root mean square norm of a row."""
    difference = torch.linalg.vector_norm(got - wanted, dim=-1).max()
    scale = torch.linalg.vector_norm(wanted, dim=-1).square().mean().sqrt()
    return float(difference / scale) if float(scale) > 0 else float(difference)


def _compare(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Raise SurgeryError unless the worst row of ``got`` is within ``tolerance`` of ``wanted``."""
    if got.shape != wanted.shape:
        raise SurgeryError(f"{what} has shape {tuple(got.shape)}, {tuple(wanted.shape)} was expected")
    if not bool(torch.isfinite(wanted).all()):
        raise SurgeryError(f"{what}: the model gives values that are not finite; nothing can be compared")
    error = _error(got, wanted)
    if not error <= tolerance:  # so put, a NaN fails too
        raise SurgeryError(f"{what}: off by {error:.1e} (relative norm), {tolerance:.0e} is allowed")


def _reloaded(model: Any, parts: Anatomy) -> Any:
    """``model`` saved to a temporary folder and loaded again by its own class, on the same device."""
    # A body without a pooler is an argument of its constructor, which no configuration records.
    poolerless = parts.base is model and hasattr(model, "pooler") and model.pooler is None
    arguments = {"add_pooling_layer": False} if poolerless else {}
    with tempfile.TemporaryDirectory(prefix="pyfast-") as folder, _without_progress_bars():
        model.save_pretrained(folder)
        again, report = type(model).from_pretrained(
            folder,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            local_files_only=True,
            output_loading_info=True,
            **arguments,
        )
        wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
        if wrong:
            raise SurgeryError(f"saving and reloading {type(model).__name__} goes wrong: {wrong}")
        return again.to(next(model.parameters()).device)


def _check_weights(model: nn.Module, again: nn.Module) -> None:
    """Every saved tensor comes back under its name, in its dtype, to the last bit."""
    saved, loaded = model.state_dict(), again.state_dict()
    if list(saved) != list(loaded):
        odd = sorted(saved.keys() ^ loaded.keys()) or "the same keys in another order"
        raise SurgeryError(f"the reloaded model has not the keys of the model in memory: {odd}")
    for name, tensor in saved.items():
        other = loaded[name]
        if tensor.dtype != other.dtype or not torch.equal(tensor, other):
            raise SurgeryError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} in memory and comes back as {other.dtype} "
                f"{tuple(other.shape)} with other values or another dtype"
            )


def _share_rounded_buffers(model: nn.Module, again: nn.Module) -> None:
    """Give ``again`` the unsaved buffers of ``model`` that differ from its own by nothing but their dtype.

    ``model.to(torch.bfloat16)`` also rounds the frequencies of rotary embeddings, which reloading computes
    afresh in float32. That difference is no fault of the surgery, and grows with the length of the probe.
    """
    saved = model.state_dict().keys()
    fresh = dict(again.named_buffers())
    for name, buffer in model.named_buffers():
        other = fresh.get(name)
        if name in saved or other is None or other.dtype == buffer.dtype or other.shape != buffer.shape:
            continue
        if torch.equal(other.to(buffer.dtype), buffer):
            owner, _, last = name.rpartition(".")
            again.get_submodule(owner).register_buffer(last, buffer, persistent=False)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Saving and loading draw progress bars; nobody asked for these."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
