"""Sparse models on disk: the entry of ``config.json`` that says which layers are sparse, and what is checked by it.

The entry is the model's ``quantization_config``, for that is where ``from_pretrained`` looks before it reads tensors::

    {"quant_method": "pyfast", "version": 1,
     "layers": {"model.layers.0.mlp.up_proj": {"format": "bitmap", "stored": 435814, "int8": false}, ...}}

:func:`pyfast.sparsify` writes it into ``model.config``; :mod:`pyfast.integrations.quantizer` reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import safetensors
from torch import nn

from pyfast.sparse.formats import format_class
from pyfast.sparse.linear import SparseLinear

METHOD = "pyfast"
ENTRY_VERSION = 1


def save_pretrained(model: Any, path: str | PathLike[str], **options: Any) -> None:
    """Saves a Hugging Face model with sparse layers: ``model.save_pretrained`` with an entry that says which layers
    are sparse now. After ``import pyfast``, ``from_pretrained`` gives the sparse model back.

    ``model.save_pretrained`` alone does after :func:`pyfast.sparsify`, which writes the entry; this function is for
    layers that were swapped or quantized by hand since.

    Args:
        model: a ``transformers.PreTrainedModel``.
        path: the directory.
        options: of ``model.save_pretrained``, such as ``max_shard_size``.

    Raises:
        TypeError: the model has no ``save_pretrained``.
        ValueError: the model has no sparse layer, or another quantization method has its entry.
    """
    save = getattr(model, "save_pretrained", None)
    if not callable(save) or not hasattr(model, "config"):
        raise TypeError(f"model: got {type(model).__name__}, accepted: a transformers.PreTrainedModel")
    if not record_layers(model):
        method = entry_method(model.config)
        state = "no SparseLinear" if method in (None, METHOD) else f"a config entry of {method!r}"
        raise ValueError(f"model: has {state}, accepted: sparse layers (see pyfast.sparsify)")
    save(path, **options)


def record_layers(model: Any) -> bool:
    """Writes the entry of the model's sparse layers into ``model.config``, and says whether there is one now. Models
    without such a config, and the entries of other quantization methods, are left alone. A config that has no entry
    is copied first: other models may have been made from it."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or entry_method(config) not in (None, METHOD):
        return False
    layers = {
        name: {"format": layer.weight_format, "stored": layer.values.numel(), "int8": layer.scales is not None}
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLinear)
    }
    if layers:
        if entry_method(config) is None:
            _unshare(model)
        model.config.quantization_config = {"quant_method": METHOD, "version": ENTRY_VERSION, "layers": layers}
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    return bool(layers)


def untie_sparse(model: Any) -> None:
    """Makes a Hugging Face model's config say that its words are not tied where its head is a sparse layer now: tied
    ones would be looked for under a name that is gone. To be called after :func:`record_layers`, which gives the model
    a config of its own."""
    known = hasattr(getattr(model, "config", None), "get_text_config") and hasattr(model, "get_output_embeddings")
    if not known or not isinstance(model.get_output_embeddings(), SparseLinear):
        return
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def entry_method(config: Any) -> str | None:
    """The quantization method of a config's entry, None where it has none."""
    entry = getattr(config, "quantization_config", None)
    method = entry.get("quant_method") if isinstance(entry, Mapping) else getattr(entry, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _unshare(model: Any) -> None:
    """Gives the model a config of its own: all modules that read the present one, or a part of it, read a copy."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if hasattr(value, "to_dict") and id(value) in copies:
                vars(module)[name] = copies[id(value)]


def check_entry(version: object, layers: object) -> dict[str, dict[str, Any]]:
    """The layers of an entry read from a file. ValueError where it is of another version or says something else."""
    if version != ENTRY_VERSION:
        raise ValueError(f"quantization_config: got version {version!r}, accepted: {ENTRY_VERSION}")
    if not isinstance(layers, dict):
        raise ValueError(f"quantization_config: got layers {type(layers).__name__}, accepted: an object")
    for name, about in layers.items():
        stored = about.get("stored") if isinstance(about, dict) else None
        if not isinstance(stored, int) or isinstance(stored, bool) or stored < 0:
            raise ValueError(f"{name}: got {about!r}, accepted: format, stored (a count) and int8")
        try:
            format_class(about.get("format", ""))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return layers


def make_room(model: nn.Module, layers: Mapping[str, Mapping[str, Any]], prefix: str = "") -> dict[str, SparseLinear]:
    """Swaps the dense layers that an entry names for sparse ones without values, on the same device.

    Args:
        prefix: that of the base model within a model with a head ("model"); a name fits with it and without it, as
            in ``from_pretrained``. A base model alone is given no layers of the head.

    Returns:
        The sparse layers by the names of the entry.

    Raises:
        ValueError: names a layer that is not there, or is no linear layer that can hold what the entry says.
    """
    found: dict[str, SparseLinear] = {}
    modules = dict(model.named_modules())
    for name, about in layers.items():
        own = next((n for n in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if n in modules), None)
        if own is None:
            if prefix and prefix not in modules and not name.startswith(f"{prefix}."):
                continue  # of a head
            raise ValueError(f"{name}: config.json names it a sparse layer, the model has no such layer")
        linear = modules[own]
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name}: config.json names it a sparse layer, the model has a {type(linear).__name__}")
        try:
            weight = format_class(about["format"]).empty(
                (linear.out_features, linear.in_features),
                about["stored"],
                dtype=linear.weight.dtype,
                device=linear.weight.device,
                int8=bool(about.get("int8")),
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        sparse = SparseLinear(weight).train(linear.training)
        sparse.bias = linear.bias
        parent, _, child = own.rpartition(".")
        setattr(model.get_submodule(parent), child, sparse)
        found[name] = sparse
    return found


def check_files(found: Mapping[str, SparseLinear], named: Iterable[str], files: Iterable[str]) -> None:
    """Compares the headers of safetensors files with the layers made for them, before any tensor is read.

    A layer none of whose tensors goes by its name (models whose checkpoints have other names) is left to
    :func:`check_layers`.

    Args:
        found: the layers made for an entry, by its names.
        named: all names of the entry; a base model has no room for those of a head.
        files: paths; other than safetensors files they are not looked at.

    Raises:
        ValueError: a tensor of a layer is missing or of another shape, or a file holds a sparse layer that the entry
            does not name; the message begins with the layer's name.
    """
    shapes: dict[str, list[int]] = {}
    listed = set(named)
    for path in files:
        if not str(path).endswith(".safetensors"):
            return
        with safetensors.safe_open(path, "pt") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
    for key in shapes:
        name, _, last = key.rpartition(".")
        if last in ("bitmaps", "metadata") and f"{name}.values" in shapes and name not in listed:
            raise ValueError(f"{name}: is sparse in the checkpoint, config.json does not name it")
    for name, layer in found.items():
        expected = {f"{name}.{part}": list(tensor.shape) for part, tensor in layer.state_dict().items()}
        if f"{name}.weight" in shapes:
            raise ValueError(f"{name}: is dense in the checkpoint, config.json names it a sparse layer")
        if not any(key in shapes for key in expected):
            continue
        for key, shape in expected.items():
            got = f"shape {shapes[key]}" if key in shapes else "no such tensor"
            if shapes.get(key) != shape:
                raise ValueError(f"{name}: the checkpoint has {got} for {key}, config.json says {shape}")


def check_layers(model: nn.Module) -> None:
    """Checks the values and patterns of all sparse layers. ValueError with the name of the first that is damaged."""
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLinear) or layer.values.is_meta:
            continue
        try:
            type(layer.weight).from_tensors(
                {part: tensor.detach() for part, tensor in layer.weight.tensors().items()}, layer.weight.shape
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
