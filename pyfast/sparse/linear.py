"""The public product with a sparse weight, and the module that holds one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.ops import indexed_linear  # noqa: F401
from pyfast.ops.bitmap_linear import bitmap_linear
from pyfast.ops.sparse24_linear import sparse24_linear
from pyfast.sparse.formats import DTYPES, BitmapWeight, Sparse24Weight, SparseWeight, format_class
from pyfast.sparse.masks import magnitude_mask


def sparse_linear(x: Tensor, weight: SparseWeight, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = x Wᵀ + bias with a sparse weight.

    Few tokens are served by kernels that read the compressed weight once; many are decompressed, a panel of rows at
    a time, for the dense library. Differentiable in x, in the stored values (the pattern stays) and in the bias.

    Args:
        x: ``[..., K]``, of the weight's dtype and device; of any floating dtype where the weight's values are int8.
        weight: :class:`Sparse24Weight` or :class:`BitmapWeight` of shape (N, K).
        bias: ``[N]`` or None.
        backend: None for the best, or ``"native"``, ``"cuda"``, ``"reference"``.

    Returns:
        ``[..., N]`` in x's dtype; float32 sums.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, named in the message.
    """
    if not isinstance(weight, Sparse24Weight | BitmapWeight):
        raise TypeError(f"weight: got {type(weight).__name__}, accepted: Sparse24Weight or BitmapWeight")
    n, k = weight.shape
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, accepted: a tensor [..., {k}]")
    if weight.scales is None and x.dtype != weight.values.dtype:
        raise TypeError(f"x: got dtype {x.dtype}, accepted: that of the weight, {weight.dtype}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got dtype {x.dtype}, accepted: float32, bfloat16, float16, float64")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x: got shape {list(x.shape)}, accepted: [..., {k}]")
    if x.device != weight.values.device:
        raise ValueError(f"x: got device {x.device}, accepted: that of the weight, {weight.device}")
    if bias is not None:
        if bias.dtype != x.dtype or bias.device != x.device:
            raise TypeError(f"bias: got {bias.dtype} on {bias.device}, accepted: {x.dtype} on {x.device}")
        if tuple(bias.shape) != (n,):
            raise ValueError(f"bias: got shape {list(bias.shape)}, accepted: [{n}]")
    rows = x.reshape(math.prod(x.shape[:-1]), k)  # numel() would make a traced number of tokens a constant
    if isinstance(weight, Sparse24Weight):
        y = sparse24_linear(rows, weight.values, weight.metadata, weight.scales, bias, 0, None, backend)
    else:
        y = bitmap_linear(rows, weight.values, weight.bitmaps, weight.offsets, weight.scales, bias, n, 0, None, backend)
    return y.reshape(*x.shape[:-1], n)


class SparseLinear(nn.Module):
    """``nn.Linear`` with a sparse weight: ``values`` is a parameter, the pattern lies in buffers.

    Made by :meth:`from_linear` or :func:`pyfast.sparsify`. state_dict, ``.to()``, optimizers and torch.compile see
    ordinary tensors. int8 values are not trained; x and the bias still get gradients. ``load_state_dict`` checks the
    tensors as :meth:`SparseWeight.from_tensors` does and changes nothing where they are refused.
    """

    values: nn.Parameter
    metadata: Tensor  # 2:4
    bitmaps: Tensor  # bitmap
    offsets: Tensor  # bitmap
    scales: Tensor | None  # of int8 values; float32 whatever dtype the module is cast to

    def __init__(self, weight: SparseWeight, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_format = weight.format
        self.register_buffer("scales", None)
        self._hold(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: str = "2:4", sparsity: float = 0.5, *, mask: Tensor | None = None
    ) -> SparseLinear:
        """Prunes a linear layer by magnitude (or by ``mask``, boolean, True kept) and takes over its bias.

        Args:
            linear: the dense layer; it is not changed.
            format: ``"2:4"`` (``sparsity`` must be 0.5) or ``"bitmap"``.
            sparsity: share of the elements removed, in [0, 1).
        """
        weight_class = format_class(format)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}, accepted: torch.nn.Linear")
        weight = linear.weight.detach()
        if mask is None:
            mask = magnitude_mask(weight, format, sparsity)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        module = cls(weight_class.from_dense(weight, mask=mask), bias)
        module.values.requires_grad_(linear.weight.requires_grad)
        if module.bias is not None and linear.bias is not None:
            module.bias.requires_grad_(linear.bias.requires_grad)
        return module.train(linear.training)

    def _hold(self, weight: SparseWeight) -> None:
        for name, tensor in weight.tensors().items():
            if name == "values":
                self.values = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            else:
                self.register_buffer(name, tensor)

    @torch.no_grad()
    def quantize_(self) -> SparseLinear:
        """Turns the values into int8 with a scale a row, in place (:meth:`SparseWeight.quantize`)."""
        self._hold(self.weight.quantize())
        return self

    @property
    def weight(self) -> SparseWeight:
        """The weight as a container over the module's own tensors."""
        shape = (self.out_features, self.in_features)
        if self.weight_format == "2:4":
            return Sparse24Weight(self.values, self.metadata, shape, self.scales)
        return BitmapWeight(self.values, self.bitmaps, self.offsets, shape, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to ``[..., out_features]``."""
        return sparse_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        stored = self.values.numel() / max(self.in_features * self.out_features, 1)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.weight_format!r}, stored={stored:.1%}, values={self.values.dtype}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        scales = self.scales
        super()._apply(fn, recurse)
        if scales is not None and self.scales is not None and self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        given = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        parts = self.weight.tensors().keys()
        missing = [prefix + name for name in parts if name not in given]
        refusal = self._refusal(own, given)
        if refusal is not None:
            error_msgs.append(f"{prefix.removesuffix('.') or 'SparseLinear'}: {refusal}")
        elif 0 < len(missing) < len(parts):  # values without their pattern say nothing
            missing_keys.extend(missing)
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _refusal(self, own: dict[str, Tensor], given: dict[str, Tensor]) -> str | None:
        """Why the given tensors cannot take the places of those of the same names; None if they can."""
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                return f"{name}: got shape {list(tensor.shape)}, accepted: {list(own[name].shape)}"
            if tensor.is_floating_point() != own[name].is_floating_point():
                return f"{name}: got dtype {tensor.dtype}, accepted: such as {own[name].dtype}"
        weight = self.weight
        tensors = {name: given[name].detach() for name in weight.tensors() if name in given}
        plain = all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors.values())
        if len(tensors) < len(weight.tensors()) or not plain:
            return None  # not whole; or sharded, fake or without data: nothing to look at
        try:
            type(weight).from_tensors(tensors, weight.shape)
        except ValueError as error:
            return str(error)
        return None
