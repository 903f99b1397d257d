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
from pyfast.sparse.joined import JoinedPart, Rows, bias_of, joinable, weight_of
from pyfast.sparse.layouts import (
    CusparseltLayout,
    DenseLayout,
    IndexedLayout,
    PackedLayout,
    ScatteredLayout,
    SlicedLayout,
)
from pyfast.sparse.linear import (
    Signature,
    SparseLinear,
    checked_product,
    is_ordinary,
    native_direct,
    stored_product,
)
from pyfast.sparse.planning import pick, plan
from pyfast.sparse.remembered import Product, Remembered, first_call

Model = TypeVar("Model", bound=nn.Module)
TracedLayout = IndexedLayout | SlicedLayout | ScatteredLayout | DenseLayout
OpaqueLayout = PackedLayout | CusparseltLayout
#: Layouts that are tensors and numbers; those of oneDNN and cuSPARSELt belong to their libraries.
_TRACED = {"direct", "indexed", "sliced", "scattered", "dense"}
_is_compiling = torch.compiler.is_compiling


class FrozenLinear(nn.Module):
    """A sparse layer for inference alone, made by :func:`freeze`.

    Holds, for each of some numbers of tokens, the form of the weight whose kernel is expected to be fastest there, as
    buffers that are not saved; x of another number of tokens is served by the form of the next larger one, or of the
    largest. It has no parameters, no gradient and no state_dict, and stays on its device and in its dtype.
    """

    bias: Tensor | None

    def __init__(
        self, weight: SparseWeight, bias: Tensor | None, tokens: Sequence[int], *, traceable: bool = True
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._signature = Signature.of(weight)
        self._fixed = _Fixed(weight.shape)
        self._last: Remembered | None = None
        self.stored = weight.values.numel()
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        forms = {count: _kernel(weight, count, traceable) for count in sorted(set(tokens))}
        self.forms = nn.ModuleDict({kernel: _form(weight, kernel) for kernel in set(forms.values())})
        self.kernels = tuple(forms.items())  # from the fewest tokens to the most
        self._served = tuple((most, kernel, self.forms[kernel]) for most, kernel in self.kernels)

    def _serving(self, tokens: int) -> tuple[int, str, Any]:
        return next((one for one in self._served if tokens <= one[0]), self._served[-1])

    def kernel(self, tokens: int) -> str:
        """Which form serves so many tokens, in the words of :attr:`pyfast.sparse.Plan.kernel`."""
        return self._serving(tokens)[1]

    def product(self, x: Tensor, *, activation: str | None = None, mul: Tensor | None = None) -> Tensor:
        """f(x Wᵀ + bias) · mul, as :func:`pyfast.sparse_linear` has it. RuntimeError where x wants a gradient."""
        bias = self._buffers["bias"]
        if (
            not _is_compiling()
            and (last := self._last) is not None
            and last.is_like(x, self._fixed, bias, activation, mul)
        ):
            y = last.again(x, mul)
            if y is not None:
                return y
        if torch.is_grad_enabled() and (x.requires_grad or (mul is not None and mul.requires_grad)):
            raise RuntimeError("FrozenLinear: has no gradient; freeze a model for inference, under torch.no_grad()")

        def multiply(rows: Tensor, number: int, gate: Tensor | None) -> Tensor:
            form = self._serving(rows.shape[0])[2]
            if _is_compiling() or not is_ordinary(rows):
                traced: Tensor = form(rows, bias, number, gate)
                return traced
            given = x, rows, self._fixed, bias, activation, number, mul, gate
            y, self._last = first_call(form.product, *given, derived=False)
            return y

        return checked_product(multiply, x, self._signature, activation, mul)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to ``[..., out_features]``."""
        return self.product(x)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NoReturn:
        raise RuntimeError("FrozenLinear: keeps its device and dtype; move the model before pyfast.sparse.freeze")

    def _save_to_state_dict(self, *args: Any) -> NoReturn:
        raise RuntimeError("FrozenLinear: has nothing to save; save the model before pyfast.sparse.freeze")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def extra_repr(self) -> str:
        served = ", ".join(f"{kernel} to {most}" for most, kernel in self.kernels)
        return f"in_features={self.in_features}, out_features={self.out_features}, tokens: {served}"


class _Fixed:
    """In place of a container whose tensors may change: the shape alone."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def tensors(self) -> dict[str, Tensor]:
        return {}


class _Derived(nn.Module):
    """A layout, its tensors as buffers."""

    def __init__(self, layout: TracedLayout) -> None:
        super().__init__()
        self.kind, self.layout = type(layout), layout
        self.names = tuple(field.name for field in dataclasses.fields(layout))
        for name in self.names:
            value = getattr(layout, name)
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    @property
    def product(self) -> Product:
        """The same product, by the same tensors, found faster than those of a module."""
        return self.layout.linear

    def forward(self, rows: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
        return self.kind(*(getattr(self, name) for name in self.names)).linear(rows, bias, activation, mul)


class _Stored(nn.Module):
    """The container as it is, its tensors as buffers."""

    def __init__(self, weight: SparseWeight) -> None:
        super().__init__()
        tensors = {name: tensor.detach() for name, tensor in weight.tensors().items()}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.kind, self.shape = type(weight), weight.shape

    def _weight(self) -> SparseWeight:
        return self.kind._unchecked(self._buffers, self.shape)  # type: ignore[arg-type]

    @property
    def product(self) -> Product:
        """The same product by the kernels of the device, past autograd."""
        return native_direct(self._weight())

    def forward(self, rows: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
        return stored_product(rows, self._weight(), bias, activation, mul)


class _Opaque(nn.Module):
    """A layout that belongs to a library; ``weight_nbytes`` are held by it."""

    def __init__(self, layout: OpaqueLayout) -> None:
        super().__init__()
        self.product, self.weight_nbytes = layout.linear, layout.nbytes

    def forward(self, rows: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
        if _is_compiling():
            raise RuntimeError("FrozenLinear: was frozen with traceable=False, its weight belongs to a library")
        return self.product(rows, bias, activation, mul)


def _kernel(weight: SparseWeight, tokens: int, traceable: bool) -> str:
    expected = plan(weight, tokens).alternatives
    return pick({kernel: ms for kernel, ms in expected.items() if kernel in _TRACED or not traceable})


def _form(weight: SparseWeight, kernel: str) -> nn.Module:
    if kernel == "direct":
        return _Stored(weight)
    layout = layouts.make(kernel, weight)
    return _Opaque(layout) if isinstance(layout, OpaqueLayout) else _Derived(layout)


def freeze(model: Model, tokens: int | Sequence[int] = 1, *, traceable: bool = True) -> Model:
    """Replaces every :class:`SparseLinear` of a model by a :class:`FrozenLinear`, in place.

    For inference: under torch.compile and torch.export a sparse layer reads its weight as it is stored, whatever the
    plan; a frozen one takes the kernel of the plan there too, in memory that holds only what these numbers of tokens
    need. The query, key and value projections of an attention, which read the same x, become one product
    (:mod:`pyfast.sparse.joined`). Save the model before: what is derived is not saved, and there is no way back.

    Args:
        model: any module whose sparse layers are children of others; changed and returned. Fuse it before.
        tokens: rows of x that the layers will see, such as 1 for decoding, or (1, 512) with prompts of 512.
        traceable: only forms that torch.compile and torch.export trace. False takes those of libraries too (a weight
            packed by oneDNN, compressed by cuSPARSELt): the fastest in eager code and CUDA graphs.

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
    frozen: dict[SparseLinear, nn.Module] = {}
    for layers in joinable(model):
        whole = FrozenLinear(weight_of(layers), bias_of(layers), counts, traceable=traceable)
        rows = Rows(whole, [layer.out_features for layer in layers])
        frozen |= {layer: JoinedPart(rows, place) for place, layer in enumerate(layers)}
    for layer in set(found.values()) - set(frozen):
        frozen[layer] = FrozenLinear(layer.weight, layer.bias, counts, traceable=traceable)
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, frozen[layer].train(layer.training))
    return model
