"""Losses as modules: the twins of the functions, for code that wants an object."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyfast.ops.distill_kl import distillation_loss


class DistillationLoss(nn.Module):
    """:func:`pyfast.distillation_loss` with its options set once.

    Args:
        divergence, temperature, teacher_temperature, scale_by_t2, reduction, ignore_index, vocab_size, backend: as in
            :func:`pyfast.distillation_loss`.
    """

    def __init__(self, divergence: str = "forward_kl", **options: Any):
        super().__init__()
        unknown = set(options) - _OPTIONS
        if unknown:
            raise TypeError(f"options: got {sorted(unknown)}, accepted: {sorted(_OPTIONS)}")
        self.options = {"divergence": divergence, **options}

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Logits ``[..., V]`` of both to the loss."""
        return distillation_loss(student, teacher, labels=labels, mask=mask, num_items=num_items, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


_OPTIONS = {
    "temperature",
    "teacher_temperature",
    "scale_by_t2",
    "reduction",
    "ignore_index",
    "vocab_size",
    "backend",
}
