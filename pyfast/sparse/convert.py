"""Whole models: every eligible ``nn.Linear`` swapped for a :class:`SparseLinear`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from pyfast.sparse.formats import DTYPES, format_class
from pyfast.sparse.linear import SparseLinear
from pyfast.sparse.masks import check_sparsity
from pyfast.sparse.pretrained import record_layers, untie_sparse

Model = TypeVar("Model", bound=nn.Module)
Patterns = str | Sequence[str] | None


def sparsify(
    model: Model,
    format: str = "2:4",
    sparsity: float = 0.5,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    head: bool = False,
) -> Model:
    """Prunes every eligible linear layer of a model by magnitude and swaps it for a sparse one, in place.

    Eligible is every ``nn.Linear`` (exactly that class) whose weight no other module shares. The output head (what
    ``get_output_embeddings()`` returns, or a module called ``lm_head``) stays dense unless ``head`` is True; one whose
    weight is the embedding's is then untied, which leaves the embedding dense and adds the sparse head's bytes.
    Everything is checked before the first layer is touched; layers are then swapped one at a time, so that the peak
    memory is that of the dense model and one sparse layer. A Hugging Face model's config says afterwards which layers
    are sparse: ``save_pretrained`` and ``from_pretrained`` work (docs/formats.md).

    Args:
        model: any module; changed in place and returned.
        format: ``"2:4"`` or ``"bitmap"``.
        sparsity: share of each layer's elements removed, in [0, 1); 0.5 for ``"2:4"``.
        include: shell patterns of module names (``"model.layers.*.mlp.*"``); None takes all.
        exclude: shell patterns of module names left dense.
        head: sparsify the output head too.

    Raises:
        TypeError, ValueError: a wrong argument, a pattern that matches no linear layer, a weight of another dtype,
            on the meta device or holding NaN, or nothing to sparsify. The model is then unchanged.
    """
    format_class(format)
    check_sparsity(format, sparsity)
    chosen = eligible_linears(model, include, exclude, head, tied=True)
    swapped: dict[nn.Module, SparseLinear] = {}
    for name in list(chosen):
        linear = chosen.pop(name)
        if linear not in swapped:
            swapped[linear] = SparseLinear.from_linear(linear, format, sparsity)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, swapped[linear])
    record_layers(model)
    untie_sparse(model)
    return model


def eligible_linears(
    model: nn.Module, include: Patterns, exclude: Patterns, head: bool, *, tied: bool = False
) -> dict[str, nn.Linear]:
    """The layers that :func:`sparsify` swaps and :func:`pyfast.sparse.prune` prunes, by every name they go by, checked:
    arguments and errors are those of :func:`sparsify`. ``tied``: a head may share its weight with the embedding."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, accepted: a torch.nn.Module")
    chosen = _choose(model, _patterns("include", include), _patterns("exclude", exclude), head, tied)
    for name, linear in chosen.items():
        _check_weight(name, linear)
    return chosen


def _choose(
    model: nn.Module, include: tuple[str, ...] | None, exclude: tuple[str, ...] | None, head: bool, tied: bool
) -> dict[str, nn.Linear]:
    """The layers to swap, by every name they go by."""
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and name != ""
    }
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in linears):
                known = ", ".join(list(linears)[:5]) or "none"
                raise ValueError(f"{argument}: {pattern!r} matches no linear layer; the first are: {known}")
    owners = owner_counts(model)
    heads = _heads(model)
    chosen = {
        name: linear
        for name, linear in linears.items()
        if (include is None or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude or ())
        and (head or linear not in heads)
        and (owners[id(linear.weight)] == 1 or (tied and linear in heads))
    }
    if not chosen:
        transposed = sum(type(module).__name__ == "Conv1D" for module in model.modules())  # GPT-2's layers
        other = f"; {transposed} are Conv1D, whose weight lies transposed: not supported" if transposed else ""
        raise ValueError(f"model: no eligible linear layer among {len(linears)} (see include, exclude, head){other}")
    return chosen


def owner_counts(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by its ``id``."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return owners


def _heads(model: nn.Module) -> set[nn.Module]:
    found = {module for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head"}
    output_of = getattr(model, "get_output_embeddings", None)  # transformers
    if callable(output_of) and isinstance(output := output_of(), nn.Module):
        found.add(output)
    return found


def _check_weight(name: str, linear: nn.Linear) -> None:
    weight = linear.weight
    if weight.dtype not in DTYPES:
        raise TypeError(f"model: {name} has dtype {weight.dtype}, accepted: float32, bfloat16, float16, float64")
    if weight.device.type == "meta":
        raise ValueError(f"model: {name} lies on the meta device and has no values")
    if bool(torch.isnan(weight).any()):
        raise ValueError(f"model: {name} holds NaN, which has no magnitude to rank")


def _patterns(argument: str, patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: got {type(pattern).__name__}, accepted: shell patterns of module names")
    return listed
