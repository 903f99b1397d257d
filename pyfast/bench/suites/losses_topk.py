"""Suite ``losses``, top-k: the forward KL from a teacher of which K words a token were kept.

T = 1, the other words taken as one (``tail="bucket"``), mean over the rows, with the gradient. With E bytes in the
student's logits it must move 2E: one read, one write. Beside the same formula in torch it is timed beside pyfast's own
loss over the teacher's whole vocabulary, which a recorded top-k stands in for and which moves 3E.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F

from pyfast.bench.cases import DTYPES
from pyfast.bench.loss_case import Loss, SignalCase, rowwise_truth
from pyfast.bench.options import Options
from pyfast.bench.suites.losses import SHAPES, logits

FULL = "pyfast full KL"
# One maximum, one exponential with its shift and sum, one scaling and difference a word; the K entries are few.
_FLOPS_A_WORD = 9
_ROWS_CHECKED = 4


def eager(student: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """The textbook formula in torch: log-softmax, the K words gathered, and what is left over in a bucket."""
    wide = torch.promote_types(student.dtype, torch.float32)
    log_s = F.log_softmax(student.to(wide), -1).gather(-1, ids)
    log_t = logprobs.to(wide)

    def with_rest(logs: torch.Tensor) -> torch.Tensor:
        rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(wide).eps)
        return torch.cat([logs, rest.log()], -1)

    return F.kl_div(with_rest(log_s), with_rest(log_t), log_target=True, reduction="batchmean")


@dataclass
class TopKCase(SignalCase):
    """``rows`` x ``vocab`` logits of the student beside the ``k`` likeliest words of the teacher."""

    op: ClassVar[str] = "topk_distill"
    beside: ClassVar[Mapping[str, str]] = {FULL: "another loss: the teacher's whole vocabulary"}
    ratios: ClassVar[Mapping[str, str]] = {**SignalCase.ratios, "speedup_vs_full_kl": FULL}

    rows: int
    vocab: int
    k: int = 64

    @property
    def task(self) -> str:
        return f"top-{self.k} loss+gradient"

    @property
    def shape(self) -> list[int]:
        return [self.rows, self.vocab]

    @property
    def tokens(self) -> int:
        return self.rows

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Student, ids, log-probabilities, and the teacher that these are from."""
        student, teacher = logits(self)
        top, ids = teacher.float().topk(self.k, -1)
        return student.requires_grad_(), ids, top - teacher.float().logsumexp(-1, keepdim=True), teacher

    def losses(self) -> dict[str, Callable[[], Loss]]:
        import pyfast

        return {
            "pyfast": lambda: lambda s, ids, logprobs, t: pyfast.topk_distillation_loss(s, ids, logprobs, "bucket"),
            "eager": lambda: lambda s, ids, logprobs, t: eager(s, ids, logprobs),
            "torch.compile": _compiled,
            FULL: lambda: lambda s, ids, logprobs, t: pyfast.distillation_loss(s, t),
        }

    @property
    def bytes(self) -> int:
        return 2 * self.rows * self.vocab * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        return self.rows * self.vocab * _FLOPS_A_WORD

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        return rowwise_truth(eager, *self.inputs()[:3], rows=_ROWS_CHECKED)

    def part(self, gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return gradients[0][:_ROWS_CHECKED]


def _compiled() -> Loss:
    compiled = torch.compile(eager, dynamic=False)
    return lambda s, ids, logprobs, t: compiled(s, ids, logprobs)


def cases(options: Options) -> list[TopKCase]:
    """K = 64 of the larger vocabulary, float32 and bfloat16; on a GPU 8192 tokens."""
    make = partial(TopKCase, device=options.device, seed=options.seed)
    if options.quick:
        return [make(16, 32000)]
    if options.device == "cuda":
        return [make(8192, 151936, dtype="bfloat16")]
    return [make(*SHAPES[1], dtype=dtype) for dtype in ("float32", "bfloat16")]
