"""A sparse product that is asked for again with another x: served without looking at everything once more.

    first call    checks ── plan ── layout ── operator ──► y         in Python, in the dispatcher, in C++
                     └───────────────┬───────────┘
                                 Remembered                          kept by the weight's layouts, one a weight
                                     │
    again         is_like ── again ──┴──────────────────► y          some twenty looks, then csrc/cpu/served.h

Between two layers of a model the weights sweep the caches: every Python object and every function that a call looks at
comes from memory, and costs many times what it costs in a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyfast import _changes, _native

Product = Callable[[Tensor, Tensor | None, int, Tensor | None], Tensor]  # rows, bias, activation, mul


class Held(Protocol):
    """What a product is with: a container, whose tensors may be replaced and written to, or something that is fixed and
    has none to look at."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def tensors(self) -> dict[str, Tensor]: ...


# Looked up once: a call must not depend on where the caches have left the names of torch. Some are not public: where a
# torch lacks one of them nothing is remembered.
_empty_like = torch.empty_like
_is_grad_enabled = torch.is_grad_enabled
_is_profiled: Any = getattr(torch.autograd, "_profiler_enabled", None)
_is_traced: Any = getattr(torch._C, "_get_tracing_state", None)
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_is_wrapped: Any = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
_SEES = None not in (_is_profiled, _is_traced, _modes, _is_wrapped) and hasattr(forward_ad, "_current_level")


def _can_be_remembered(x: Tensor, weight: Held, bias: Tensor | None, mul: Tensor | None) -> bool:
    """Whether changes would be seen (tensors made in inference mode have no version), and the operator gets these very
    tensors: no subclasses, nothing that torch.func wraps."""
    tensors = weight.tensors().values()
    given = [tensor for tensor in (x, bias, mul, *tensors) if tensor is not None]
    return (
        _SEES
        and x.is_cpu
        and not torch.is_grad_enabled()
        and all(type(tensor) in (Tensor, nn.Parameter) and not _is_wrapped(tensor) for tensor in given)
        and not any(tensor.is_inference() for tensor in tensors)
    )


class Remembered:
    """A product on the CPU without gradients, as it was served: by ``served``, which is called by addresses, or by
    ``product``, which calls an operator."""

    __slots__ = (
        "activation",
        "bias",
        "changes",
        "dtype",
        "gated",
        "like",
        "number",
        "product",
        "rows",
        "same",
        "served",
        "shape",
        "threads",
        "unchanged",
    )

    def __init__(
        self,
        x: Tensor,
        weight: Held,
        bias: Tensor | None,
        activation: str | None,
        number: int,
        mul: Tensor | None,
        product: Product,
        served: Any,
        derived: bool,
    ):
        """``number`` is the operators' of the activation, ``served`` what was recorded of the call or None; ``derived``
        says that a layout was multiplied by, not the container's tensors."""
        n, k = weight.shape
        self.shape, self.rows = x.shape, (math.prod(x.shape[:-1]), k)
        self.like = x.new_empty(1).expand(*x.shape[:-1], n)  # torch.empty_like is cheaper than torch.empty
        self.dtype, self.bias, self.activation, self.number = x.dtype, bias, activation, number
        self.gated, self.product = mul is not None, product
        # Of one column a tensor may be contiguous and yet a lazy negative, as z.conj().imag is: not to be read so.
        self.served = served if n > 1 and k > 1 else None
        self.threads, self.changes = torch.get_num_threads(), _changes.number
        tensors = weight.tensors()
        self.same = tuple(tensors.items())
        # What reads the container's tensors sees what they hold. A layout holds what they were.
        self.unchanged = tuple((t, t._version, t.data_ptr()) for t in tensors.values()) if derived else ()

    def is_like(self, x: Tensor, weight: Held, bias: Tensor | None, activation: str | None, mul: Tensor | None) -> bool:
        """Whether this call differs in the values of x and mul alone, and nothing has changed since."""
        if (
            type(x) is not Tensor
            or x.shape != self.shape
            or x.dtype is not self.dtype
            or not x.is_cpu
            or bias is not self.bias
            or activation != self.activation
            or (mul is not None) != self.gated
            or self.changes != _changes.number
            or _is_grad_enabled()
            or forward_ad._current_level >= 0
            or _modes() > 0
        ):
            return False
        tensors = weight.__dict__
        for name, tensor in self.same:
            if tensors[name] is not tensor:
                return False
        for tensor, version, address in self.unchanged:
            if tensor._version != version or tensor.data_ptr() != address:
                return False
        return mul is None or (
            type(mul) is Tensor and mul.shape == self.like.shape and mul.dtype is self.dtype and mul.is_cpu
        )

    def again(self, x: Tensor, mul: Tensor | None) -> Tensor | None:
        """The product with another x; None where it must be looked at after all."""
        plain = x.is_contiguous() and (mul is None or mul.is_contiguous())
        if self.served is not None and plain and not _is_profiled() and not _is_traced():
            try:
                address, gate = x.data_ptr(), 0 if mul is None else mul.data_ptr()
            except RuntimeError:
                pass  # torch.func's wrappers have no memory of their own
            else:
                y = _empty_like(self.like)
                return y if self.served.run(address, gate, y.data_ptr()) else None
        if self.threads != torch.get_num_threads():
            return None
        rows = x if x.dim() == 2 else x.reshape(self.rows)
        factors = mul if mul is None or mul.dim() == 2 else mul.reshape(rows.shape[0], -1)
        return self.product(rows, self.bias, self.number, factors).view(self.like.shape)


def first_call(
    product: Product,
    x: Tensor,
    rows: Tensor,
    weight: Held,
    bias: Tensor | None,
    activation: str | None,
    number: int,
    mul: Tensor | None,
    gate: Tensor | None,
    *,
    derived: bool,
) -> tuple[Tensor, Remembered | None]:
    """The product, and what can be remembered of it: None where nothing can. ``rows`` and ``gate`` are x and mul in two
    dimensions; the other arguments are those of :class:`Remembered`."""
    cpu = _native.CPU
    if cpu is None or not _can_be_remembered(x, weight, bias, mul):
        return product(rows, bias, number, gate), None
    cpu.record()
    try:
        y = product(rows, bias, number, gate)
    finally:
        served = cpu.recorded()
    return y, Remembered(x, weight, bias, activation, number, mul, product, served, derived)
