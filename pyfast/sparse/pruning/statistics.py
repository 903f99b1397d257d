"""What the inputs of linear layers look like: norms of their features, or their second moments, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyfast import _products

_ROWS = 1024  # tokens turned into float64 at a time


class Moments:
    """Sums over the inputs of one layer, [K] for Wanda or [K, K] for SparseGPT; ``tokens`` counts them."""

    def __init__(self) -> None:
        self.tokens = 0
        self.value: Tensor | None = None

    def add_norms(self, squares: Tensor, tokens: int) -> None:
        """``squares`` float64 [K], the sum of x² over ``tokens``."""
        self.value = squares.clone() if self.value is None else self.value.add_(squares)
        self.tokens += tokens

    def add_products(self, products: Tensor, tokens: int) -> None:
        """``products`` [K, K], Xᵀ X of ``tokens``. Kept as the mean over all tokens so far times two, so that it does
        not grow with their number and float32 keeps its digits."""
        if tokens == 0:
            return
        before, self.tokens = self.tokens, self.tokens + tokens
        if self.value is None:
            self.value = products * (2.0 / tokens)
        else:
            self.value.mul_(before / self.tokens).add_(products, alpha=2.0 / self.tokens)


class Collector:
    """Collects the moments of the inputs of ``layers`` while the model runs inside :meth:`attached`.

    ``mask`` (boolean [B, T]) says which tokens count; it applies to inputs that have one row a token, [B, T, K] or
    [B · T, K]. Other inputs (a pooled [B, K], the tokens routed to one expert) count in full. Layers that read the same
    tensor (query, key and value) share the work of one product.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], second_moments: bool):
        self.layers = layers
        self.second_moments = second_moments
        self.mask: Tensor | None = None
        self.moments = {name: Moments() for name in layers}
        self._last: tuple[Tensor, int] | None = None  # the tensor read last, and its version
        self._summed: tuple[Tensor, int] | None = None  # its sum, and how many tokens

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(self._hook(self.moments[name]), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            self._last = self._summed = None
            for handle in handles:
                handle.remove()

    def take(self, name: str) -> Tensor:
        """The norms ‖x‖₂ [K] in float32, or the Hessian 2 Xᵀ X / tokens [K, K], of one layer; its memory is let go.

        ValueError, naming the layer, where no token reached it or its inputs are not finite.
        """
        moments = self.moments.pop(name)
        if moments.value is None or moments.tokens == 0:
            raise ValueError(f"calibration: no token reaches {name}; give more of it, or exclude the layer")
        if not bool(moments.value.isfinite().all()):
            raise ValueError(f"calibration: the inputs of {name} are not finite")
        return moments.value if self.second_moments else moments.value.sqrt().float()

    def _hook(self, moments: Moments) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if self._last is None or self._last[0] is not x or self._last[1] != x._version:
                self._summed = self._sum(x.detach())
                self._last = (x, x._version)
            assert self._summed is not None
            (moments.add_products if self.second_moments else moments.add_norms)(*self._summed)

        return hook

    def _sum(self, x: Tensor) -> tuple[Tensor, int]:
        rows = x.reshape(-1, x.shape[-1])
        if self.mask is not None and (x.shape[:-1] == self.mask.shape or x.shape[:-1] == (self.mask.numel(),)):
            rows = rows[self.mask.to(x.device).reshape(-1)]
        with torch.autocast(x.device.type, enabled=False):
            if self.second_moments:
                wide = rows if rows.dtype == torch.float64 else rows.float()
                return _products.mm(wide.T, wide), len(rows)
            squares = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
            for piece in rows.split(_ROWS):
                squares += piece.double().square_().sum(0)
            return squares, len(rows)
