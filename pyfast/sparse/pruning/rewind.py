"""Lottery tickets: the mask stays, the weights go back to what they were before training.

Frankle and Carbin, The Lottery Ticket Hypothesis (arXiv 1803.03635): train, prune, :func:`rewind`, train again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyfast.sparse.convert import owner_counts
from pyfast.sparse.linear import SparseLinear


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks that a pruned model carries: boolean ``[N, K]``, True kept, by the name of the layer.

    Of dense layers (``nn.Linear`` whose weight is its own) those that hold zeros, each zero counting as removed; of
    :class:`SparseLinear` the places that are stored. Layers that hold no zero are left out. Masks lie on the device of
    their layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, accepted: a torch.nn.Module")
    masks: dict[str, Tensor] = {}
    owners = owner_counts(model)
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            weight = module.weight
            tensors = {**weight.tensors(), "values": torch.ones_like(weight.values, requires_grad=False)}
            masks[name] = type(weight).from_tensors(tensors, weight.shape).to_dense() != 0
        elif isinstance(module, nn.Linear) and owners[id(module.weight)] == 1:
            kept = module.weight.detach() != 0
            if not bool(kept.all()):
                masks[name] = kept
    return masks


def rewind(model: nn.Module, initial: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> None:
    """Puts every parameter and buffer of a model back to its initial value, in place, but for what ``masks`` remove.

    Args:
        model: a dense model. Its parameters stay the same objects; an optimizer's own state is not touched.
        initial: a ``state_dict`` of the model from before training (or from an early step: late rewinding).
        masks: boolean ``[N, K]`` by the name of the layer whose ``weight`` they mask, as :func:`masks_of` gives them;
            None: those of the model as it is. Removed elements become +0.0.

    Raises:
        TypeError, ValueError: names, shapes or dtypes that do not fit. The model is then unchanged.
    """
    masks = masks_of(model) if masks is None else masks
    state = model.state_dict(keep_vars=True)
    missing = sorted(set(state) ^ set(initial))
    if missing:
        raise ValueError(f"initial: model and initial state differ in {len(missing)} names, the first: {missing[0]}")
    for name, tensor in state.items():
        if initial[name].shape != tensor.shape:
            raise ValueError(f"initial: {name} has shape {list(initial[name].shape)}, accepted: {list(tensor.shape)}")
    for name, mask in masks.items():
        weight = state.get(f"{name}.weight")
        if weight is None:
            raise ValueError(f"masks: the model has no weight {name}.weight (rewind before it becomes sparse)")
        if mask.dtype != torch.bool:
            raise TypeError(f"masks: that of {name} has dtype {mask.dtype}, accepted: bool")
        if mask.shape != weight.shape:
            raise ValueError(f"masks: that of {name} has shape {list(mask.shape)}, accepted: {list(weight.shape)}")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(initial[name])
        for name, mask in masks.items():
            state[f"{name}.weight"].masked_fill_(~mask.to(state[f"{name}.weight"].device), 0.0)
