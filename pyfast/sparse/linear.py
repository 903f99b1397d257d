"""The public product with a sparse weight, and the module that holds one."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from pyfast import _native, backends
from pyfast.ops.bitmap_linear import bitmap_linear
from pyfast.ops.sparse24_linear import sparse24_linear
from pyfast.reference.epilogue import ACTIVATIONS, epilogue
from pyfast.sparse import layouts
from pyfast.sparse.formats import DTYPES, BitmapWeight, Sparse24Weight, SparseWeight, format_class
from pyfast.sparse.masks import magnitude_mask
from pyfast.sparse.planning import choose, plan
from pyfast.sparse.remembered import Product, Remembered, first_call

_NUMBERS: dict[str | None, int] = {None: 0, **{name: i for i, name in enumerate(ACTIVATIONS) if i > 0}}
_WEIGHTS = (Sparse24Weight, BitmapWeight)
_BITMAP = torch.ops.pyfast.bitmap_linear.default
_SPARSE24 = torch.ops.pyfast.sparse24_linear.default
# The autograd of a custom op is Python, called whether a gradient is wanted or not.
_BelowAutograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)
_is_compiled = torch.compiler.is_dynamo_compiling
_LOCK = threading.Lock()
_HAS_KERNELS = {"cpu": _native.CPU is not None, "cuda": _native.CUDA is not None}


def sparse_linear(
    x: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    mul: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = f(x Wᵀ + bias) · mul with a sparse weight.

    Differentiable in x, in the stored values (the pattern stays), in the bias and in mul. Where no gradient is wanted,
    activation and mul are applied to the sums before they are stored, and the fastest kernel for the weight and the
    number of tokens serves: :func:`pyfast.sparse.plan` says which, and what memory it keeps;
    :func:`pyfast.sparse.set_layouts` forbids that memory.

    Args:
        x: ``[..., K]``, of the weight's dtype and device; of any floating dtype where the weight's values are int8.
        weight: :class:`Sparse24Weight` or :class:`BitmapWeight` of shape (N, K).
        bias: ``[N]`` or None.
        activation: None, ``"relu"``, ``"gelu"`` (by erf), ``"gelu_tanh"`` or ``"silu"``.
        mul: ``[..., N]`` in x's dtype or None: the other branch of a gated MLP, as in silu(x Gᵀ) · (x Uᵀ).
        backend: None for the best, or ``"native"``, ``"cuda"``, ``"reference"``: the kernels that read the weight as it
            is stored.

    Returns:
        ``[..., N]`` in x's dtype; float32 sums.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, named in the message.
    """
    if backend is None and not _is_compiled():
        last: Remembered | None = getattr(getattr(weight, "_layouts", None), "last", None)
        if last is not None and last.is_like(x, weight, bias, activation, mul):
            y = last.again(x, mul)
            if y is not None:
                return y
    _check(x, weight, bias, activation, mul)
    rows, gate = _in_two_dimensions(x, mul, weight.shape)
    number = _NUMBERS[activation]
    if torch.is_grad_enabled() and _wants_gradient(x, weight.values, bias, mul):
        y = epilogue(stored_product(rows, weight, bias, 0, None, backend), number, gate)
    else:
        y = _inferred(x, rows, weight, bias, activation, mul, gate, backend)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _in_two_dimensions(x: Tensor, mul: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    n, k = shape
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), k)  # numel() would make traced sizes constants
    return rows, mul if mul is None or mul.dim() == 2 else mul.reshape(rows.shape[0], n)


def checked_product(
    multiply: Callable[[Tensor, int, Tensor | None], Tensor],
    x: Tensor,
    weight: Signature,
    activation: str | None,
    mul: Tensor | None,
) -> Tensor:
    """multiply(rows, activation, mul) in two dimensions, for what :func:`sparse_linear` is given; its errors too."""
    _check_inputs(x, weight, activation, mul)
    rows, gate = _in_two_dimensions(x, mul, weight.shape)
    y = multiply(rows, _NUMBERS[activation], gate)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _inferred(
    x: Tensor,
    rows: Tensor,
    weight: SparseWeight,
    bias: Tensor | None,
    activation: str | None,
    mul: Tensor | None,
    gate: Tensor | None,
    backend: str | None,
) -> Tensor:
    """The product without gradients: by the layout of the plan, where the weight can keep one. ``rows`` and ``gate``
    are x and mul in two dimensions."""
    number = _NUMBERS[activation]
    if backend is not None or torch.compiler.is_compiling() or not (_is_plain(weight) and is_ordinary(rows)):
        return stored_product(rows, weight, bias, number, gate, backend)
    held, kernel = layouts.of(weight), choose(weight, rows.shape[0])
    layout = None if kernel == "direct" else held.get(kernel, weight)
    product: Product = native_direct(weight) if layout is None else layout.linear
    if layout is None and kernel != "direct":
        return product(rows, bias, number, gate)  # there will be a layout at the next call
    derived = layout is not None
    y, last = first_call(product, x, rows, weight, bias, activation, number, mul, gate, derived=derived)
    if last is not None:
        held.last = last
    return y


def _is_plain(weight: SparseWeight) -> bool:
    return type(weight.values) in (Tensor, nn.Parameter)


def is_ordinary(rows: Tensor) -> bool:
    """Whether kernels can be called past autograd: a tensor on a device with kernels, no subclass, no tangents, and
    nobody who watches the operators."""
    return (
        not backends.in_forward_mode()
        and _HAS_KERNELS.get(rows.device.type, False)
        and rows.dtype in backends.FAST_DTYPES
        and rows.shape[0] > 0
        and type(rows) is Tensor
        and not is_in_torch_dispatch_mode()
    )


def stored_product(
    rows: Tensor,
    weight: SparseWeight,
    bias: Tensor | None,
    activation: int,
    mul: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    """The product with the weight as it is stored."""
    if isinstance(weight, Sparse24Weight):
        return sparse24_linear(rows, weight.values, weight.metadata, weight.scales, bias, activation, mul, backend)
    assert isinstance(weight, BitmapWeight)
    n = weight.shape[0]
    tensors = weight.values, weight.bitmaps, weight.offsets, weight.scales
    return bitmap_linear(rows, *tensors, bias, n, activation, mul, backend)


def native_direct(weight: SparseWeight) -> Product:
    """The same by the kernels of the device, known to serve and without gradients: the shortest way for one token. It
    does not hold the weight, in which it may be kept."""
    n = weight.shape[0]
    if isinstance(weight, Sparse24Weight):
        two_four = weight.values, weight.metadata, weight.scales

        def product(rows: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
            with _BelowAutograd():
                return _SPARSE24(rows, *two_four, bias, activation, mul)
    else:
        assert isinstance(weight, BitmapWeight)
        bitmap = weight.values, weight.bitmaps, weight.offsets, weight.scales

        def product(rows: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
            with _BelowAutograd():
                return _BITMAP(rows, *bitmap, bias, n, activation, mul)

    return product


def _check(x: Tensor, weight: SparseWeight, bias: Tensor | None, activation: str | None, mul: Tensor | None) -> None:
    if not isinstance(weight, _WEIGHTS):
        raise TypeError(f"weight: got {type(weight).__name__}, accepted: Sparse24Weight or BitmapWeight")
    _check_inputs(x, Signature.of(weight), activation, mul)
    if bias is not None:
        if bias.dtype != x.dtype or bias.device != x.device:
            raise TypeError(f"bias: got {bias.dtype} on {bias.device}, accepted: {x.dtype} on {x.device}")
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"bias: got shape {list(bias.shape)}, accepted: [{weight.shape[0]}]")


class Signature(NamedTuple):
    """What x must fit: a weight's shape, device, and dtype (None where the values are int8)."""

    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def of(cls, weight: SparseWeight) -> Signature:
        return cls(weight.shape, weight.values.device, weight.values.dtype if weight.scales is None else None)


def _check_inputs(x: Tensor, weight: Signature, activation: str | None, mul: Tensor | None) -> None:
    n, k = weight.shape
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, accepted: a tensor [..., {k}]")
    if weight.dtype is not None and x.dtype != weight.dtype:
        raise TypeError(f"x: got dtype {x.dtype}, accepted: that of the weight, {weight.dtype}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got dtype {x.dtype}, accepted: float32, bfloat16, float16, float64")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x: got shape {list(x.shape)}, accepted: [..., {k}]")
    if x.device != weight.device:
        raise ValueError(f"x: got device {x.device}, accepted: that of the weight, {weight.device}")
    if activation not in _NUMBERS:
        raise ValueError(f"activation: got {activation!r}, accepted: None, {', '.join(map(repr, ACTIVATIONS[1:]))}")
    if mul is not None:
        if not isinstance(mul, Tensor):
            raise TypeError(f"mul: got {type(mul).__name__}, accepted: a tensor [..., {n}]")
        if mul.dtype != x.dtype or mul.device != x.device:
            raise TypeError(f"mul: got {mul.dtype} on {mul.device}, accepted: {x.dtype} on {x.device}")
        if mul.shape != (*x.shape[:-1], n):
            raise ValueError(f"mul: got shape {list(mul.shape)}, accepted: {[*x.shape[:-1], n]}")


class SparseLinear(nn.Module):
    """``nn.Linear`` with a sparse weight: ``values`` is a parameter, the pattern lies in buffers.

    Made by :meth:`from_linear` or :func:`pyfast.sparsify`. state_dict, ``.to()``, optimizers and torch.compile see
    ordinary tensors. int8 values are not trained; x and the bias still get gradients. ``load_state_dict`` checks the
    tensors as :meth:`SparseWeight.from_tensors` does and changes nothing where they are refused.

    Without gradients it may keep a second form of the weight in memory, made at the first call that wants it and never
    saved: 3 to 5 bytes a stored element for many tokens, or a dense copy where dense is faster.
    :func:`pyfast.sparse.plan` tells, :func:`pyfast.sparse.set_layouts` forbids, :func:`pyfast.sparse.prepare` makes it
    ahead of the first call.
    """

    values: nn.Parameter
    metadata: Tensor  # 2:4
    bitmaps: Tensor  # bitmap
    offsets: Tensor  # bitmap
    bias: nn.Parameter | None
    scales: Tensor | None  # of int8 values; float32 whatever dtype the module is cast to

    def __init__(self, weight: SparseWeight, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_format = weight.format
        self.register_buffer("scales", None)
        self._kept: SparseWeight | None = None  # the container over the tensors below, and its layouts
        self._hold(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

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
        """The weight as a container over the module's own tensors; the same one until a tensor is replaced."""
        if torch.compiler.is_compiling():
            return self._container(self._parameters["values"], self._buffers)
        if (kept := self._still_kept()) is not None:
            return kept
        with _LOCK:
            if (kept := self._still_kept()) is None:
                kept = self._kept = self._container(self._parameters["values"], self._buffers)
            return kept

    def _still_kept(self) -> SparseWeight | None:
        # Straight from the dictionaries: attribute access to a module's tensors costs as much as a small product.
        kept, buffers = self._kept, self._buffers
        if kept is None or kept.values is not self._parameters["values"]:
            return None
        if isinstance(kept, Sparse24Weight):
            return kept if kept.metadata is buffers["metadata"] and kept.scales is buffers["scales"] else None
        assert isinstance(kept, BitmapWeight)
        same = kept.bitmaps is buffers["bitmaps"] and kept.offsets is buffers["offsets"]
        return kept if same and kept.scales is buffers["scales"] else None

    def _container(self, values: Any, buffers: dict[str, Any]) -> SparseWeight:
        shape = (self.out_features, self.in_features)
        if self.weight_format == "2:4":
            return Sparse24Weight(values, buffers["metadata"], shape, buffers["scales"])
        return BitmapWeight(values, buffers["bitmaps"], buffers["offsets"], shape, buffers["scales"])

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to ``[..., out_features]``."""
        return sparse_linear(x, self.weight, self._parameters["bias"])

    def product(self, x: Tensor, *, activation: str | None = None, mul: Tensor | None = None) -> Tensor:
        """f(x Wᵀ + bias) · mul, as :func:`pyfast.sparse_linear` has it."""
        return sparse_linear(x, self.weight, self._parameters["bias"], activation=activation, mul=mul)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseLinear:
        self._kept = None  # .to() replaces the memory of a parameter and leaves its identity and version
        scales = self.scales
        super()._apply(fn, recurse)
        if scales is not None and self.scales is not None and self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # copies and pickles start without layouts

    def extra_repr(self) -> str:
        stored = self.values.numel() / max(self.in_features * self.out_features, 1)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.weight_format!r}, stored={stored:.1%}, values={self.values.dtype}"
        )

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


def prepare(model: nn.Module, tokens: int | tuple[int, ...]) -> int:
    """Makes the layouts that the sparse layers of a model will want at these numbers of tokens, so that the first
    request need not wait for it; returns the bytes that all layouts of the model now hold."""
    counts = (tokens,) if isinstance(tokens, int) else tokens
    for module in model.modules():
        if isinstance(module, SparseLinear):
            for count in counts:
                kernel = plan(module.weight, count).kernel
                if kernel != "direct":
                    layouts.of(module.weight).get(kernel, module.weight)
    return layouts.layout_bytes(model)
