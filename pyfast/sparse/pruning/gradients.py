"""How strongly the loss depends on each weight: the mean of |g| over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.sparse.pruning.calibration import Batch


def mean_gradients(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: Sequence[Batch], on_batch: Callable[[], None]
) -> dict[str, Tensor]:
    """E|∂loss/∂W| of each layer [N, K], float32 (float64 for float64 weights), over the batches.

    The magnitude is taken of each batch's gradient before the mean: near a minimum gradients of different batches
    cancel, and a mean of signed ones would call every weight unimportant (Molchanov et al., arXiv 1906.10771, average
    the square likewise). A batch counts once, whatever its size.

    Memory: one sum in float32 a chosen weight, the activations of one batch, and the gradient of one weight at a time:
    each is added and dropped as soon as it is complete. Parameters that are not chosen get none; gradients that the
    parameters hold are put back.

    Raises:
        ValueError: a loss or gradient that is not finite, a model without a loss, or a layer that it does not reach.
    """
    sums: dict[str, Tensor] = {}
    with _only(model, layers, sums), torch.enable_grad():
        for number, batch in enumerate(batches):
            _loss(batch.run(model), model, number).backward()
            on_batch()
    for name in layers:
        if name not in sums:
            raise ValueError(f"model: its loss does not depend on {name}; exclude it")
        if not bool(sums[name].isfinite().all()):
            raise ValueError(f"calibration: the gradient of {name} is not finite")
        sums[name] /= len(batches)
    return sums


def _loss(output: Any, model: nn.Module, number: int) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(f"model: {type(model).__name__} returns no loss that can be differentiated")
    if not bool(loss.isfinite()):
        raise ValueError(f"calibration[{number}]: its loss is {float(loss.detach())}")
    return loss


@contextmanager
def _only(model: nn.Module, layers: Mapping[str, nn.Linear], sums: dict[str, Tensor]) -> Iterator[None]:
    """Gradients of the chosen weights alone, each added to its sum and dropped when it is complete."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles = []

    def adding(name: str) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            magnitude = weight.grad.detach().abs().to(dtype)
            sums[name] = sums[name].add_(magnitude) if name in sums else magnitude
            weight.grad = None

        return add

    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, layer in layers.items():
            layer.weight.requires_grad_(True)
            handles.append(layer.weight.register_post_accumulate_grad_hook(adding(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted, grad in before:
            parameter.requires_grad_(wanted)
            parameter.grad = grad
