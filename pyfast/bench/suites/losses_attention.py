"""Suite ``losses``, attention transfer: the forward KL between the attention of two models, causal.

Mean over the heads and the queries, with the gradients of the student's queries and keys. The inputs are small and the
matrices of queries by keys are not: the floor is arithmetic, and what tells is the memory beyond inputs and gradients,
which grows with the tokens here and with their square where the matrices are held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F

from pyfast.bench.cases import DTYPES
from pyfast.bench.loss_case import FLOPS_A_WORD, FLOPS_A_WORD_GRADIENT, Loss, SignalCase
from pyfast.bench.options import Options


def eager(q_s: torch.Tensor, k_s: torch.Tensor, q_t: torch.Tensor, k_t: torch.Tensor) -> torch.Tensor:
    """The textbook formula in torch: both matrices of scores, their softmaxes, and the KL between them."""
    later = torch.ones(q_s.shape[2], k_s.shape[2], dtype=torch.bool, device=q_s.device).triu(1)

    def log_attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        return F.log_softmax(scores.masked_fill(later, torch.finfo(scores.dtype).min), -1).flatten(0, 2)

    return F.kl_div(log_attention(q_s, k_s), log_attention(q_t, k_t), log_target=True, reduction="batchmean")


@dataclass
class AttentionCase(SignalCase):
    """One sequence of ``length`` tokens, ``heads`` of ``width`` in both models."""

    op: ClassVar[str] = "attention_distill"
    min_rounds: ClassVar[int] = 3
    by_products: ClassVar[bool] = True

    length: int
    heads: int = 16
    width: int = 64

    @property
    def task(self) -> str:
        return "attention loss+gradient"

    @property
    def shape(self) -> list[int]:
        return [1, self.heads, self.length, self.width]

    @property
    def tokens(self) -> int:
        return self.length

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Queries and keys of the student, then of the teacher, to which the student's are near."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        noise, teacher = torch.randn(2, 2, *self.shape, generator=generator, device=self.device)
        student = teacher + 0.5 * noise
        dtype = DTYPES[self.dtype]
        mine = [x.to(dtype).clone().requires_grad_() for x in student]
        return (*mine, *(x.to(dtype) for x in teacher))

    def losses(self) -> dict[str, Callable[[], Loss]]:
        import pyfast

        return {
            "pyfast": lambda: pyfast.attention_distillation_loss,
            "eager": lambda: eager,
            "torch.compile": lambda: torch.compile(eager, dynamic=False),
        }

    @property
    def bytes(self) -> int:
        """Four reads, two writes."""
        return 6 * self.heads * self.length * self.width * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """The scores of both models and the two gradients, over the pairs that a causal query sees, and what a word
        of a distribution takes for each pair."""
        pairs = self.heads * self.length * (self.length + 1) // 2
        return pairs * (4 * 2 * self.width + FLOPS_A_WORD + FLOPS_A_WORD_GRADIENT)

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Head by head, so that the matrices of float64 are those of one."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        parts = []
        inputs = self.inputs()
        for head in range(self.heads):
            q_s, k_s, q_t, k_t = (x.detach()[:, head : head + 1].double() for x in inputs)
            value = eager(q_s.requires_grad_(), k_s.requires_grad_(), q_t, k_t) / self.heads
            parts.append(self.part(torch.autograd.grad(value, (q_s, k_s))))
            total += value.detach()
        return total, torch.cat(parts, 2)

    def part(self, gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.stack(gradients)


def cases(options: Options) -> list[AttentionCase]:
    """16 heads of 64 at a length and at twice that, to tell how memory grows."""
    make = partial(AttentionCase, device=options.device, seed=options.seed)
    if options.quick:
        return [make(length, heads=4) for length in (128, 256)]
    if options.device == "cuda":
        return [make(length, dtype="bfloat16") for length in (2048, 4096)]
    return [make(length) for length in (1024, 2048)]
