"""Calibration batches: what a model is called with, and which of its tokens count."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """One call of the model, and the tokens that count (boolean [B, T]; None: all)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None

    def run(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


def read(calibration: Any, model: nn.Module, *, labels: bool, head: bool) -> list[Batch]:
    """The batches of a calibration set, on the model's device.

    Args:
        calibration: an iterable of mappings of the model's arguments, or of tensors, its first argument.
        labels: whether the loss is wanted; where it is not, labels are left out.
        head: whether the inputs of the head are looked at; where neither is, it works on one token.

    Raises:
        TypeError, ValueError: no batch, a single batch instead of several, or one that is malformed.
    """
    if isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration: got {type(calibration).__name__}, accepted: an iterable of batches, such as [batch]"
        )
    parameters = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    spare: dict[str, Any] = {}
    if "use_cache" in parameters:
        spare["use_cache"] = False
    if "logits_to_keep" in parameters and not labels and not head:
        spare["logits_to_keep"] = 1
    batches = [_batch(f"calibration[{i}]", given, device, spare, labels) for i, given in enumerate(calibration)]
    if not batches:
        raise ValueError("calibration: holds no batch")
    return batches


def _batch(name: str, given: Any, device: torch.device, spare: dict[str, Any], labels: bool) -> Batch:
    if isinstance(given, Tensor):
        return Batch((given.to(device),), spare, None)
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: got {type(given).__name__}, accepted: a tensor or a mapping of the model's arguments")
    if labels and given.get("labels") is None:
        raise ValueError(f"{name}: has no labels, from which the loss of gradient and taylor comes")
    arguments = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in given.items()
        if labels or key != "labels"
    }
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: attention_mask has {got}, accepted: [batch, tokens]")
    return Batch((), {**spare, **arguments}, None if mask is None else mask != 0)
