"""The torch library ``pyfast``: where every op is defined. Kernels register themselves from C++ or Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("pyfast", "FRAGMENT")

# What torch.library itself builds a backward of; not public, so that a torch may come without.
_PARTS = ("_AutoDispatchBelowAutograd", "_after_autograd_keyset", "_any_requires_grad")
_HAS_PARTS = all(hasattr(torch._C, name) for name in _PARTS)


def define(schema: str) -> None:
    """Defines an op that follows the rules of torch.compile (functional, with a fake)."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple, Any], None] | None = None
) -> None:
    """Gives the op ``name`` a backward: ``setup_context(ctx, inputs, output)`` and ``backward(ctx, *grads)``.

    As ``torch.library.register_autograd`` does, which cannot know that an op has no defaults: at each call it asks the
    schema for all of its arguments, once for each of them. Of 12 that is 30 microseconds of 85 that a small loss takes.
    """
    if not _HAS_PARTS:
        torch.library.register_autograd(f"pyfast::{name}", backward, setup_context=setup_context, lib=LIBRARY)
        return
    op = getattr(torch.ops.pyfast, name).default
    assert not any(argument.has_default_value() or argument.kwarg_only for argument in op._schema.arguments)
    below, after = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset

    class Generated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *given, keys = inputs
            with below():
                output = op.redispatch(keys & after, *given)
            if setup_context is not None:
                setup_context(ctx, tuple(given), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple:
            found = backward(ctx, *grads)
            return (*found, None) if isinstance(found, tuple) else (found, None)

    def with_backward(keys: Any, *given: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*given):
            return Generated.apply(*given, keys)
        with below():
            return op.redispatch(keys & after, *given)

    LIBRARY.impl(name, with_backward, "Autograd", with_keyset=True)
