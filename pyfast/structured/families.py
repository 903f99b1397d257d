"""What has to be known of a model before its layers can be read or removed: where they are, what counts them.

The tables below are the whole of that knowledge. A new family is one more line in ``FAMILIES``; a new
index-dependent field of a configuration is one more line in ``CONFIG_RULES``. Nothing here imports
transformers: a model is recognised by ``config.model_type`` and by the methods it offers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """How one family of models keeps its layers.

    ``layers`` is the dotted path from the body (``model.base_model``) to the list of layers; ``decoder`` says
    that every model of the family keeps a key/value cache (an encoder does only where ``config.is_decoder``).
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    decoder: bool


FAMILIES: tuple[Family, ...] = (
    Family("Llama", ("llama",), "layers", decoder=True),
    Family("Qwen2", ("qwen2",), "layers", decoder=True),
    Family("Qwen3", ("qwen3",), "layers", decoder=True),
    Family("Mistral", ("mistral",), "layers", decoder=True),
    Family("BERT", ("bert",), "encoder.layer", decoder=False),
    Family("RoBERTa", ("roberta", "xlm-roberta", "camembert"), "encoder.layer", decoder=False),
)

# Attributes, anywhere inside a layer, that hold the position of the layer: the slot of its key/value cache.
INDEX_ATTRIBUTES: tuple[str, ...] = ("layer_idx",)

# Attributes, anywhere inside a layer, that its constructor derives from the position and that belong to the
# layer for good: a layer that moves forward keeps them, and a reloaded layer must be built with the same.
LAYER_MARKS: tuple[str, ...] = ("layer_type", "attention_type", "sliding_window", "is_sliding", "use_rope")

# Fields of a configuration with one entry a layer; the entry belongs to its layer as the marks do.
LAYER_LISTS: tuple[str, ...] = ("layer_types", "mlp_layer_types", "no_rope_layers")


def _count(value: Any, total: int, kept: Sequence[int]) -> int:
    """A number of layers becomes the number of layers kept."""
    return len(kept)


def _per_layer(value: Any, total: int, kept: Sequence[int]) -> Any:
    """A list with one entry a layer is sliced, never rebuilt: a layer keeps the kind it was trained as."""
    if len(value) != total:
        raise ValueError(f"it has {len(value)} entries for {total} layers")
    return type(value)(value[index] for index in kept)


def _indices(value: Any, total: int, kept: Sequence[int]) -> Any:
    """A list of layer positions loses the removed ones, and the others move forward."""
    position = {old: new for new, old in enumerate(kept)}
    return type(value)(position[index] for index in value if index in position)


def _first(value: Any, total: int, kept: Sequence[int]) -> int:
    """ "The first n layers" loses the removed layers that were among them."""
    kept_set = set(kept)
    return int(value) - sum(index not in kept_set for index in range(min(int(value), total)))


def _last(value: Any, total: int, kept: Sequence[int]) -> int:
    """ "The last n layers" loses the removed layers that were among them."""
    kept_set = set(kept)
    return int(value) - sum(index not in kept_set for index in range(max(total - int(value), 0), total))


Rule = Callable[[Any, int, Sequence[int]], Any]

# Every field of a configuration that counts layers or is indexed by them. A field that a configuration does
# not have, or has as None, is passed over.
CONFIG_RULES: dict[str, Rule] = {
    "num_hidden_layers": _count,
    **dict.fromkeys(LAYER_LISTS, _per_layer),
    "mlp_only_layers": _indices,
    "max_window_layers": _first,
    "first_k_dense_replace": _first,
    "num_kv_shared_layers": _last,
}


def edited_fields(config: Any, total: int, kept: Sequence[int]) -> dict[str, Any]:
    """The new values of the index-dependent fields of ``config`` when only ``kept`` of ``total`` layers stay.

    ``config`` itself is not changed. Raises ValueError, naming the field, where one does not fit ``total``.
    """
    fields: dict[str, Any] = {}
    for name, rule in CONFIG_RULES.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        try:
            fields[name] = rule(value, total, kept)
        except ValueError as error:
            raise ValueError(f"model: config.{name} does not fit the model: {error}") from error
    return fields


def layer_marks(layers: Iterable[nn.Module], config: Any) -> list[dict[str, Any]]:
    """For each layer the facts that must stay with it: its own marks and its entry in each per-layer list."""
    lists = {name: getattr(config, name, None) for name in LAYER_LISTS}
    marks: list[dict[str, Any]] = []
    for index, layer in enumerate(layers):
        facts = {
            f"{name}.{mark}": vars(module)[mark]
            for name, module in layer.named_modules()
            for mark in LAYER_MARKS
            if mark in vars(module)
        }
        for name, values in lists.items():
            if values is not None:
                facts[f"config.{name}"] = values[index] if index < len(values) else "missing"
        marks.append(facts)
    return marks


def layer_indices(layers: Iterable[nn.Module]) -> list[tuple[nn.Module, str, int]]:
    """Every place in ``layers`` that stores a position: ``(module, attribute, position of its layer)``."""
    return [
        (module, attribute, index)
        for index, layer in enumerate(layers)
        for module in layer.modules()
        for attribute in INDEX_ATTRIBUTES
        if isinstance(vars(module).get(attribute), int)
    ]


# Attributes that a model's body computes from its configuration once, in its constructor.
DERIVED: dict[str, Callable[[Any], Any]] = {
    "has_sliding_layers": lambda config: "sliding_attention" in (getattr(config, "layer_types", None) or ()),
}


@dataclass(frozen=True)
class Anatomy:
    """A model taken apart: its family, its body, the list of its layers, and its configuration."""

    family: Family
    base: Any
    layers: nn.ModuleList
    config: Any

    @property
    def has_cache(self) -> bool:
        """Whether the model reads one token after the other with a key/value cache."""
        return self.family.decoder or bool(getattr(self.config, "is_decoder", False))


def taught() -> str:
    """The families, for messages: ``Llama (llama), ...``."""
    return ", ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)


def anatomy(model: Any) -> Anatomy:
    """Find the layers of ``model``.

    Raises TypeError where ``model`` is no transformers model (or one in a wrapper), and ValueError where its
    family is not taught or its layers are not where, or as many as, the configuration says.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, a transformers model is wanted")
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise TypeError(
            f"model: {type(model).__name__} has no transformers configuration "
            "(model.config with a model_type), so nothing says how its layers are counted"
        )
    if not callable(getattr(type(model), "from_pretrained", None)) or not hasattr(model, "base_model"):
        raise TypeError(
            f"model: got {type(model).__name__}, a part of a model or a wrapper (compiled, parallel); "
            "pass the transformers model itself"
        )
    family = next((family for family in FAMILIES if config.model_type in family.model_types), None)
    if family is None:
        raise ValueError(
            f"model: the family {config.model_type!r} of {type(model).__name__} has not been taught; "
            f"taught are {taught()}"
        )
    layers: Any = model.base_model
    for name in family.layers.split("."):
        layers = getattr(layers, name, None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"model: {type(model).__name__} has no list of layers at base_model.{family.layers}, "
            f"where the {family.name} family keeps it"
        )
    if config.num_hidden_layers != len(layers):
        raise ValueError(
            f"model: config.num_hidden_layers is {config.num_hidden_layers}, "
            f"but {type(model).__name__} holds {len(layers)} layers"
        )
    return Anatomy(family, model.base_model, layers, config)
