"""Taking layers out of a model, whole: weights, configuration and positions, or nothing at all."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyfast.sparse.pretrained import METHOD, entry_method, record_layers
from pyfast.structured.families import DERIVED, Anatomy, anatomy, edited_fields, layer_indices, layer_marks
from pyfast.structured.verify import (
    SAME,
    Expectation,
    SurgeryError,
    check_model,
    check_structure,
    check_ties,
    expect,
    outer_ties,
)

ModelT = TypeVar("ModelT", bound=nn.Module)

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def remove_layers(model: ModelT, layers: Iterable[int] | Tensor, *, verify: bool = True) -> ModelT:
    """Remove ``layers`` from ``model`` in place, prove that the rest works as before, and return ``model``.

    Everything that depends on the position or the number of layers is edited with them: the configuration
    (``num_hidden_layers``, ``layer_types``, ``max_window_layers``, ...) and the position that each layer
    keeps for its slot in the key/value cache. Kept layers, embeddings, heads and ``generation_config`` are
    the very objects they were; tied embeddings stay tied; the list of layers stays the same object.

    With ``verify`` the model is run on a few fixed tokens before the cut, the removed layers passed over, and
    that is what these must give afterwards (see ``pyfast.structured.verify`` for the tolerances):

    1. the model in memory;
    2. the model saved to a temporary folder and reloaded with ``type(model).from_pretrained``: no key missing
       or left over, every weight equal to the last bit, and the same outputs;
    3. for models with a key/value cache, both of them reading token by token with it, and ``generate``.

    If a check fails or anything raises, the model is put back exactly as it was. The checks need room for one
    more copy of the shortened model, on disk (in the folder for temporary files) and in memory on the
    model's device. Modes (train/eval) and the states of the random generators are put back.

    Args:
        model: a transformers model of a taught family (Llama, Qwen2, Qwen3, Mistral, BERT, RoBERTa) with any
            head or none, in float64, float32, float16 or bfloat16, whole on one device, not quantised and
            without adapters.
        layers: positions of the layers to remove, counted from 0, in any order: integers or a 1-D integer
            tensor, such as ``block_influence(model, batches).argsort()[:2]``. At least one layer must stay.
        verify: ``False`` leaves out everything that runs or saves the model; that the positions and the
            configuration fit the layers that stay is checked all the same.

    Raises:
        TypeError, ValueError: an argument is wrong (negative positions are refused, since counting from the
            end of a list that shrinks misleads), or the family is not taught. Nothing has been touched.
        SurgeryError: a check failed. The model is as it was.
    """
    parts = anatomy(model)
    removed = _positions(layers, len(parts.layers))
    if not isinstance(verify, bool):
        raise TypeError(f"verify: got {type(verify).__name__}, True or False is wanted")
    _require_whole(model, parts)
    kept = [index for index in range(len(parts.layers)) if index not in removed]
    configs = _configurations(model, parts)
    edits = [edited_fields(config, len(parts.layers), kept) for config in configs]
    marks = layer_marks(parts.layers, parts.config)

    before = _Snapshot(model, parts, configs)
    try:
        expected = expect(model, parts, removed) if verify else None
        ties = outer_ties(model, parts)
        _cut(parts, removed, configs, edits)
        if entry_method(model.config) == METHOD:
            record_layers(model)
        _check(model, parts, [marks[index] for index in kept], ties, expected)
    except BaseException as error:
        before.restore()
        if isinstance(error, SurgeryError) or not isinstance(error, Exception):
            raise
        raise SurgeryError(
            f"removing layers {sorted(removed)} from {type(model).__name__} failed, "
            f"and the model is as it was: {type(error).__name__}: {error}"
        ) from error
    return model


def _positions(layers: Any, total: int) -> set[int]:
    """``layers`` as a set of positions in ``range(total)``; TypeError or ValueError for anything else."""
    if isinstance(layers, Tensor):
        if layers.dim() != 1 or layers.dtype not in _INTEGERS:
            raise TypeError(
                f"layers: got a tensor of shape {tuple(layers.shape)} and dtype {layers.dtype}, "
                "a 1-D tensor of integers is wanted"
            )
        layers = layers.tolist()
    if isinstance(layers, str | bytes) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: got {type(layers).__name__}, positions such as [3, 4] are wanted")
    positions: set[int] = set()
    for entry in layers:
        position = _position(entry)
        if position < 0:
            raise ValueError(
                f"layers: {position} is negative; layers are counted from the first, 0 to {total - 1}, "
                "never from the end"
            )
        if position >= total:
            raise ValueError(f"layers: there is no layer {position}; the model has {total}, 0 to {total - 1}")
        if position in positions:
            raise ValueError(f"layers: {position} is given twice")
        positions.add(position)
    if not positions:
        raise ValueError("layers: empty; name at least one layer to remove")
    if len(positions) == total:
        raise ValueError(f"layers: all {total} layers of the model are named; at least one must stay")
    return positions


def _position(entry: Any) -> int:
    """``entry`` as an int: an integer of Python, NumPy or torch, and nothing that would be rounded."""
    kind = str(entry.dtype) if isinstance(entry, Tensor) else type(entry).__name__
    if not isinstance(entry, bool) and kind != "torch.bool":
        try:
            return operator.index(entry)
        except TypeError:
            pass
    raise TypeError(f"layers: {entry!r} is {kind}, an integer is wanted")


def _require_whole(model: Any, parts: Anatomy) -> None:
    """Refuse what cannot be cut and saved as a plain model: quantised, adapted, spread out, or irregular."""
    name = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None or entry_method(parts.config) not in (None, METHOD):
        raise ValueError(f"model: {name} is quantised; remove layers first and quantise the result")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"model: {name} carries adapters; merge or unload them first")
    if getattr(parts.config, "is_heterogeneous", False):
        raise ValueError(f"model: single layers of {name} have configurations of their own; this is not taught")
    if len({id(layer) for layer in parts.layers}) != len(parts.layers):
        raise ValueError(f"model: one layer stands at two positions of {name}; this is not taught")
    tensors = [*model.parameters(), *model.buffers()]
    strange = {type(tensor.data).__name__ for tensor in tensors if type(tensor.data) is not Tensor}
    if strange:
        raise ValueError(f"model: {name} holds {', '.join(sorted(strange))}, sharded or packed; Tensor is wanted")
    if model.dtype not in SAME:
        raise ValueError(f"model: {name} is in {model.dtype}; {', '.join(map(str, SAME))} are accepted")
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"model: {name} is on {', '.join(devices)}; all of it must be on one real device")


def _configurations(model: nn.Module, parts: Anatomy) -> list[Any]:
    """Every configuration object that the modules of ``model`` read, the model's own first; usually one."""
    found = {id(parts.config): parts.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "num_hidden_layers"):
            found.setdefault(id(config), config)
    return list(found.values())


class _Snapshot:
    """All that surgery and its checks may change, by reference: restoring copies no weight."""

    def __init__(self, model: Any, parts: Anatomy, configs: Sequence[Any]) -> None:
        self.layers = parts.layers
        self.entries = list(parts.layers)
        described = [*configs, getattr(model, "generation_config", None)]
        self.attributes = [(thing, dict(vars(thing))) for thing in described if thing is not None]
        places = [(module, name) for module, name, _ in layer_indices(self.entries)]
        places += [(parts.base, name) for name in DERIVED if name in vars(parts.base)]
        self.places = [(module, name, getattr(module, name)) for module, name in places]

    def restore(self) -> None:
        del self.layers[:]
        self.layers.extend(self.entries)
        for thing, attributes in self.attributes:
            vars(thing).clear()
            vars(thing).update(attributes)
        for module, name, value in self.places:
            setattr(module, name, value)


def _cut(parts: Anatomy, removed: set[int], configs: Sequence[Any], edits: Sequence[dict[str, Any]]) -> None:
    """The surgery itself: drop the layers, edit the configurations, number the layers anew."""
    for index in sorted(removed, reverse=True):
        del parts.layers[index]
    for config, fields in zip(configs, edits, strict=True):
        for name, value in fields.items():
            setattr(config, name, value)
    for module, attribute, index in layer_indices(parts.layers):
        setattr(module, attribute, index)
    for name, derive in DERIVED.items():
        if name in vars(parts.base):
            setattr(parts.base, name, derive(parts.config))


def _check(
    model: nn.Module,
    parts: Anatomy,
    marks: list[dict[str, Any]],
    ties: set[frozenset[str]],
    expected: Expectation | None,
) -> None:
    """Raise unless the model after the cut is sound; what the checks themselves leave behind is undone."""
    after = _Snapshot(model, parts, _configurations(model, parts))
    check_structure(model, parts, marks)
    check_ties(model, parts, ties)
    if expected is not None:
        check_model(model, parts, marks, expected)
        after.restore()
