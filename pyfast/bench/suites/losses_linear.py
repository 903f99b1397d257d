"""Suite ``losses``, fused linear: the divergence of :mod:`pyfast.bench.suites.losses` from hidden states times head.

With the gradients of the student's hidden states and head. Its arithmetic is four matrix products of tokens x hidden x
words (the logits of both models, the two gradients); they are timed alone, all tokens at once, by the library that is
the fastest on the processor (``pyfast/_products.py``) and into memory that is there already, as what no fused loss can
be much faster than. What fusing saves is the memory of the logits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from pyfast import _products
from pyfast.bench import hardware
from pyfast.bench.cases import DTYPES
from pyfast.bench.loss_case import Loss, Outcome, SignalCase
from pyfast.bench.options import Options
from pyfast.bench.suites import losses
from pyfast.ops._linear_chunks import add_product, linear_out

PRODUCTS = "matrix products alone"
_ROWS_CHECKED = 4
_EAGER_LOGITS = 10  # tensors of the logits' size in float32 that autograd holds at the peak, at the most


@dataclass
class LinearCase(SignalCase):
    """``rows`` hidden states of ``hidden`` and heads of ``vocab`` words, of one width in both models."""

    op: ClassVar[str] = "linear_distill"
    beside: ClassVar[Mapping[str, str]] = {PRODUCTS: "no loss: the four products, in memory that is there already"}
    ratios: ClassVar[Mapping[str, str]] = {"speedup_vs_products": PRODUCTS}
    budget_s: ClassVar[float] = 0.0  # the rounds at the least: one call takes seconds
    min_rounds: ClassVar[int] = 3
    by_products: ClassVar[bool] = True

    rows: int
    hidden: int
    vocab: int
    divergence: str = "forward_kl"

    @property
    def task(self) -> str:
        return f"fused linear {self.divergence} loss+gradient"

    @property
    def shape(self) -> list[int]:
        return [self.rows, self.hidden, self.vocab]

    @property
    def tokens(self) -> int:
        return self.rows

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Hidden states and head of the student, then of the teacher, whose logits have a spread of 3."""
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def draw(rows: int, spread: float) -> torch.Tensor:
            return torch.randn(rows, self.hidden, generator=generator, device=self.device).mul_(spread)

        teacher, t_head = draw(self.rows, 1.0), draw(self.vocab, 3 * self.hidden**-0.5)
        student = draw(self.rows, 0.3).add_(teacher)
        s_head = draw(self.vocab, self.hidden**-0.5).add_(t_head)
        given = (x.to(DTYPES[self.dtype]) for x in (student, s_head, teacher, t_head))
        s, w_s, t, w_t = given
        return s.requires_grad_(), w_s.requires_grad_(), t, w_t

    def losses(self) -> dict[str, Callable[[], Loss]]:
        makers: dict[str, Callable[[], Loss]] = {"pyfast": self._pyfast, "eager": self._eager}
        return makers | ({"liger": self._liger} if self.divergence == "jsd" else {})

    def others(self, inputs: tuple[torch.Tensor, ...]) -> dict[str, Outcome]:
        outputs: list[torch.Tensor] = []

        def products() -> tuple[torch.Tensor, ...]:
            """An empty loss, and the outputs in place of gradients."""
            s, w_s, t, w_t = (x.detach() for x in inputs)
            if not outputs:
                outputs.extend(s.new_empty(shape) for shape in 2 * [(self.rows, self.vocab)] + [s.shape])
                outputs.append(s.new_empty(w_s.shape, dtype=torch.float32))  # as the loss sums it
            logits_s, logits_t, grad, grad_head = outputs
            linear_out(logits_s, s, w_s)
            linear_out(logits_t, t, w_t)
            grad.copy_(_products.mm(logits_s, w_s))
            add_product(grad_head, logits_s.T, s, overwrite=True)
            return s.new_empty(0), *outputs

        return {PRODUCTS: products}

    def _pyfast(self) -> Loss:
        import pyfast

        return partial(
            pyfast.linear_distillation_loss,
            divergence=self.divergence,
            temperature=losses.TEMPERATURE,
            alpha=losses.ALPHA,
            beta=losses.BETA,
        )

    def _eager(self) -> Loss:
        needed = _EAGER_LOGITS * 4 * self.rows * self.vocab
        if self.device == "cpu" and (free := hardware.available_memory_bytes()) < needed:
            raise MemoryError(f"may take {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        return self._unfused

    def _unfused(
        self, student: torch.Tensor, student_head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor
    ) -> torch.Tensor:
        return losses.eager(student @ student_head.T, teacher @ teacher_head.T, self.divergence)

    def _liger(self) -> Loss:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        jsd = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=losses.BETA, temperature=losses.TEMPERATURE
        )
        labels = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        return lambda *inputs: jsd(*inputs, labels) * losses.TEMPERATURE**2  # which it leaves out

    @property
    def bytes(self) -> int:
        """The student's inputs read and their gradients written, the teacher's read."""
        return 3 * (self.rows + self.vocab) * self.hidden * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        return 4 * 2 * self.rows * self.hidden * self.vocab

    def truth(self) -> tuple[None, torch.Tensor]:
        """The gradient of the first hidden states: that of one depends on itself and the heads alone."""
        s, w_s, t, w_t = (x.detach() for x in self.inputs())
        rows = min(_ROWS_CHECKED, self.rows)
        first = s[:rows].double().requires_grad_()
        value = self._unfused(first, w_s.double(), t[:rows].double(), w_t.double()) * (rows / self.rows)
        return None, torch.autograd.grad(value, first)[0]

    def part(self, gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return gradients[0][:_ROWS_CHECKED]


def cases(options: Options) -> list[LinearCase]:
    """The forward KL at the dimensions of Qwen 2.5 0.5B, and, where Liger is installed, the divergence
    that it fuses; on a GPU those of an 8B
    model with Qwen's vocabulary."""
    make = partial(LinearCase, device=options.device, seed=options.seed)
    if options.quick:
        return [make(64, 128, 16384)]
    if options.device == "cuda":
        return [
            make(rows, 4096, 151936, divergence, dtype="bfloat16")
            for rows in (1024, 8192)
            for divergence in ("forward_kl", "jsd")
        ]
    beside_liger = [make(256, 896, 151936, "jsd")] if importlib.util.find_spec("liger_kernel") else []
    return [make(1024, 896, 151936), *beside_liger]
