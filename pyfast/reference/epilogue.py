"""What follows the sums of a linear layer: an activation and the other branch of a gated MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# By the number that the ops take.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def activate(y: Tensor, activation: int) -> Tensor:
    """One of :data:`ACTIVATIONS`, elementwise."""
    name = ACTIVATIONS[activation]
    if name == "none":
        return y
    if name == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return getattr(F, name)(y)


def epilogue(y: Tensor, activation: int, mul: Tensor | None) -> Tensor:
    """f(y) · mul."""
    y = activate(y, activation)
    return y if mul is None else y * mul
