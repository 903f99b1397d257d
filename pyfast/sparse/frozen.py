"""Sparse layers for inference alone: the forms of a weight that some numbers of tokens want, as tensors that
torch.compile and torch.export trace, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from pyfast.sparse import layouts
from pyfast.sparse.formats import SparseWeight
from pyfast.sparse.layouts import DenseLayout, IndexedLayout, ScatteredLayout, SlicedLayout
from pyfast.sparse.linear import Signature, SparseLinear, checked_product, stored_product
from pyfast.sparse.planning import pick, plan

Model = TypeVar("Model", bound=nn.Module)
Layout = IndexedLayout | SlicedLayout | ScatteredLayout | DenseLayout
#: Layouts that are tensors and numbers; those of oneDNN and cuSPARSELt belong to their libraries.
_KINDS = {"indexed", "sliced", "scattered", "dense"}


class FrozenLinear(nn.Module):
    """A sparse layer for inference alone, made by :func:`freeze`.

    Holds, for each of some numbers of tokens, the form of the weight whose kernel is expected to be fastest there, as
    buffers that are not saved; x of another number of tokens is served by the form of the next larger one, or of the
    largest. It has no parameters, no gradient and no state_dict, and stays on its device and in its dtype. In eager
    code a call takes a few microseconds more than one of a :class:`SparseLinear`, which remembers its last one.
    """

    bias: Tensor | None

    def __init__(self, layer: SparseLinear, tokens: Sequence[int]) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._signature = Signature.of(layer.weight)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach(), persistent=False)
        forms = {count: _kernel(layer.weight, count) for count in sorted(set(tokens))}
        self.forms = nn.ModuleDict({kernel: _form(layer.weight, kernel) for kernel in set(forms.values())})
        self.kernels = tuple(forms.items())  # from the fewest tokens to the most
        self._served = tuple((most, kernel, self.forms[kernel]) for most, kernel in self.kernels)

    def _serving(self, tokens: int) -> tuple[int, str, nn.Module]:
        return next((one for one in self._served if tokens <= one[0]), self._served[-1])

    def kernel(self, tokens: int) -> str:
        """Which form serves so many tokens, in the words of :attr:`pyfast.sparse.Plan.kernel`."""
        return self._serving(tokens)[1]

    def product(self, x: Tensor, *, activation: str | None = None, mul: Tensor | None = None) -> Tensor:
        """f(x Wᵀ + bias) · mul, as :func:`pyfast.sparse_linear` has it. RuntimeError where x wants a gradient."""
        if torch.is_grad_enabled() and (x.requires_grad or (mul is not None and mul.requires_grad)):
            raise RuntimeError("FrozenLinear: has no gradient; freeze a model for inference, under torch.no_grad()")

        def multiply(rows: Tensor, *given: Any) -> Tensor:
            y: Tensor = self._serving(rows.shape[0])[2].forward(rows, self._buffers["bias"], *given)
            return y

        return checked_product(multiply, x, self._signature, activation, mul)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to ``[..., out_features]``."""
        return self.product(x)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NoReturn:
        raise RuntimeError("FrozenLinear: keeps its device and dtype; move the model before pyfast.sparse.freeze")

    def _save_to_state_dict(self, *args: Any) -> NoReturn:
        raise RuntimeError("FrozenLinear: has nothing to save; save the model before pyfast.sparse.freeze")

    def extra_repr(self) -> str:
        served = ", ".join(f"{kernel} to {most}" for most, kernel in self.kernels)
        return f"in_features={self.in_features}, out_features={self.out_features}, tokens: {served}"


class _Derived(nn.Module):
    """A layout, its tensors as buffers."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.kind, self.layout = type(layout), layout
        self.names = tuple(field.name for field in dataclasses.fields(layout))
        for name in self.names:
            value = getattr(layout, name)
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def forward(self, rows: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.layout.linear(rows, bias, activation, mul)  # the same tensors, found faster
        return self.kind(*(getattr(self, name) for name in self.names)).linear(rows, bias, activation, mul)


class _Stored(nn.Module):
    """The container as it is, its tensors as buffers."""

    def __init__(self, weight: SparseWeight) -> None:
        super().__init__()
        tensors = {name: tensor.detach() for name, tensor in weight.tensors().items()}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.weight = type(weight)._unchecked(tensors, weight.shape)

    def forward(self, rows: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
        weight = self.weight
        if torch.compiler.is_compiling():
            weight = type(weight)._unchecked(self._buffers, weight.shape)  # type: ignore[arg-type]
        return stored_product(rows, weight, bias, activation, mul)


def _kernel(weight: SparseWeight, tokens: int) -> str:
    expected = plan(weight, tokens).alternatives
    return pick({kernel: ms for kernel, ms in expected.items() if kernel == "direct" or kernel in _KINDS})


def _form(weight: SparseWeight, kernel: str) -> nn.Module:
    if kernel == "direct":
        return _Stored(weight)
    layout = layouts.make(kernel, weight)
    assert isinstance(layout, Layout)
    return _Derived(layout)


def freeze(model: Model, tokens: int | Sequence[int] = 1) -> Model:
    """Replaces every :class:`SparseLinear` of a model by a :class:`FrozenLinear`, in place.

    For inference: under torch.compile and torch.export a sparse layer reads its weight as it is stored, whatever the
    plan; a frozen one takes the kernel of the plan there too, in memory that holds only what these numbers of tokens
    need. Save the model before: what is derived is not saved, and there is no way back.

    Args:
        model: any module whose sparse layers are children of others; changed and returned. Fuse it before.
        tokens: rows of x that the layers will see, such as 1 for decoding, or (1, 512) with prompts of 512.

    Raises:
        TypeError, ValueError: no module, no sparse layer in it, or tokens below 1. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, accepted: a torch.nn.Module")
    counts = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    if not counts or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
        raise ValueError(f"tokens: got {tokens}, accepted: integers from 1 on")
    if isinstance(model, SparseLinear):
        raise TypeError("model: got a SparseLinear, accepted: a module that holds it, in which it can be replaced")
    found = {name: layer for name, layer in model.named_modules(remove_duplicate=False) if type(layer) is SparseLinear}
    if not found:
        raise ValueError("model: has no SparseLinear to freeze")
    frozen = {layer: FrozenLinear(layer, counts).train(layer.training) for layer in set(found.values())}
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, frozen[layer])
    return model
