"""Suite ``losses``: the fused distillation losses beside eager torch, ``torch.compile`` and other libraries.

Here the losses between logits. The task is a divergence of tempered softmaxes, T = 4, times T², mean over the rows,
with the gradient of the student's logits ("loss+gradient") or without ("loss"). With E bytes in one logits tensor it
must move 3E (two reads, one write), or 2E without the gradient. ``losses_topk``, ``losses_attention`` and
``losses_linear`` have the other signals.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F

from pyfast.bench import bars, bars_cuda
from pyfast.bench.cases import DTYPES, cpu_variants
from pyfast.bench.floors import Floors
from pyfast.bench.loss_case import FLOPS_A_WORD, FLOPS_A_WORD_GRADIENT, Loss, SignalCase, measure, rowwise_truth
from pyfast.bench.options import Options
from pyfast.bench.progress import Progress
from pyfast.bench.schema import Bar, Result

TEMPERATURE = 4.0
BETA = 0.5  # the teacher's share of the mixture in jsd
ALPHA = 0.1  # and in skew_kl
_ROWS_CHECKED = 4

SHAPES = bars.LOSS_SHAPES


def eager(
    student: torch.Tensor, teacher: torch.Tensor, divergence: str = "forward_kl", temperature: float = TEMPERATURE
) -> torch.Tensor:
    """The textbook formulas in torch, 16-bit logits brought to float32 first."""
    wide = torch.promote_types(student.dtype, torch.float32)
    log_s = F.log_softmax(student.to(wide) / temperature, -1)
    log_t = F.log_softmax(teacher.to(wide) / temperature, -1)
    if divergence == "forward_kl":
        value = _kl(log_t, log_s)
    elif divergence == "reverse_kl":
        value = _kl(log_s, log_t)
    elif divergence == "jsd":
        mixture = _log_mixture(log_s, log_t, BETA)
        value = BETA * _kl(log_t, mixture) + (1 - BETA) * _kl(log_s, mixture)
    else:
        value = _kl(log_t, _log_mixture(log_s, log_t, ALPHA))
    return value * temperature**2


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q), mean over the rows."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _log_mixture(log_s: torch.Tensor, log_t: torch.Tensor, share: float) -> torch.Tensor:
    """log(share · t + (1 - share) · s). Not ``torch.logaddexp``, which the compiler for CPUs does not vectorise: so
    the peers are two to three times faster. The bound keeps words finite that both models rule out."""
    mixture = share * log_t.exp() + (1 - share) * log_s.exp()
    return mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()


def _pyfast(divergence: str) -> Loss:
    import pyfast

    return partial(pyfast.distillation_loss, divergence=divergence, temperature=TEMPERATURE, alpha=ALPHA, beta=BETA)


def _compiled(divergence: str) -> Loss:
    return torch.compile(partial(eager, divergence=divergence), dynamic=False)


def _liger(divergence: str) -> Loss:
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    def tempered(x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(x.float() / TEMPERATURE, -1)

    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    loss = kl if divergence == "forward_kl" else LigerJSD(beta=_GENERALISED_JSD[divergence])
    return lambda s, t: loss(tempered(s), tempered(t)) * TEMPERATURE**2


def _trl(divergence: str) -> Loss:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        from trl import GKDTrainer  # where it was before it was called experimental

    jsd = partial(
        GKDTrainer.generalized_jsd_loss,
        beta=_GENERALISED_JSD[divergence],
        temperature=TEMPERATURE,
        reduction="batchmean",
    )
    return lambda s, t: jsd(s, t) * TEMPERATURE**2  # which it leaves out


# What TRL and Liger call the divergences: the beta of their generalised JSD, KL at its ends. They have no skew KL.
_GENERALISED_JSD = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}


@dataclass
class LossCase(SignalCase):
    """``rows`` x ``vocab`` logits and a divergence, with or without the gradient; ``every_isa`` adds pyfast under
    each other instruction set that this CPU runs."""

    op: ClassVar[str] = "distill_kl"
    budget_s: ClassVar[float] = 1.5

    rows: int
    vocab: int
    divergence: str = "forward_kl"
    gradient: bool = True
    every_isa: bool = False

    @property
    def task(self) -> str:
        what = "loss+gradient" if self.gradient else "loss"
        return what if self.divergence == "forward_kl" else f"{self.divergence} {what}"

    @property
    def shape(self) -> list[int]:
        return [self.rows, self.vocab]

    @property
    def tokens(self) -> int:
        return self.rows

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Student and teacher."""
        student, teacher = logits(self)
        return student.requires_grad_(self.gradient), teacher

    def isas(self) -> dict[str, str | None]:
        return cpu_variants() if self.device == "cpu" and self.every_isa else super().isas()

    def losses(self) -> dict[str, Callable[[], Loss]]:
        makers: dict[str, Callable[[], Loss]] = {name: partial(_pyfast, self.divergence) for name in self.isas()}
        makers["eager"] = lambda: partial(eager, divergence=self.divergence)
        makers["torch.compile"] = partial(_compiled, self.divergence)
        if self.divergence in _GENERALISED_JSD:
            makers["trl"] = partial(_trl, self.divergence)
            if self.device != "cpu":  # Triton
                makers["liger"] = partial(_liger, self.divergence)
        return makers

    @property
    def logits_bytes(self) -> int:
        """E: the bytes of one logits tensor."""
        return self.rows * self.vocab * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        return (3 if self.gradient else 2) * self.logits_bytes

    @property
    def flops(self) -> int:
        return self.rows * self.vocab * (FLOPS_A_WORD + (FLOPS_A_WORD_GRADIENT if self.gradient else 0))

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        return rowwise_truth(partial(eager, divergence=self.divergence), *self.inputs(), rows=_ROWS_CHECKED)

    def part(self, gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return gradients[0][:_ROWS_CHECKED]


def logits(case: SignalCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher of the case's shape: the teacher drawn from a normal distribution of spread 3, the student
    near it."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    teacher = torch.randn(case.shape[:2], generator=generator, device=case.device).mul_(3)
    student = torch.randn(case.shape[:2], generator=generator, device=case.device).add_(teacher)
    return student.to(DTYPES[case.dtype]), teacher.to(DTYPES[case.dtype])


def cases(options: Options) -> list[LossCase]:
    """Losses between logits: every divergence, float32 and bfloat16, with the gradient; the value alone for the
    forward KL. On a GPU batches of 8192 tokens, at the small ones the forward KL alone."""
    make = partial(LossCase, device=options.device, seed=options.seed)
    if options.quick:
        return [
            make(64, 32000, every_isa=True),
            make(16, 151936),
            make(64, 32000, gradient=False),
            make(16, 32000, "reverse_kl", dtype="bfloat16"),
            make(16, 32000, "jsd"),
            make(16, 32000, "skew_kl"),
        ]
    if options.device == "cpu":
        plan = [
            make(rows, vocab, divergence, dtype=dtype)
            for divergence, cases in bars.LOSS_CASES.items()
            for (rows, vocab), dtype in cases
        ]
        plan[0].every_isa = True
        return [*plan, make(*SHAPES[0], gradient=False)]
    # A GPU is measured at the batches that fill it: the small ones tell of launches, and each case is compiled.
    full = partial(make, bars_cuda.KL_ROWS, dtype="bfloat16")
    plan = [
        make(*SHAPES[0], dtype="bfloat16"),
        full(32000),
        full(151936),
        full(bars_cuda.KL_VOCABULARY, gradient=False),
    ]
    plan += [full(bars_cuda.KL_VOCABULARY, divergence) for divergence in bars.LOSS_CASES]
    return plan


def every_case(options: Options) -> list[SignalCase]:
    """The cases of all signals."""
    from pyfast.bench.suites import losses_attention, losses_linear, losses_topk

    parts: Sequence[Sequence[SignalCase]] = (
        cases(options),
        losses_topk.cases(options),
        losses_attention.cases(options),
        losses_linear.cases(options),
    )
    return [case for part in parts for case in part]


def run(options: Options, floors: Floors, progress: Progress) -> tuple[list[Result], list[Bar]]:
    """Measure every case of every signal. The baseline of a result is eager torch; the time against ``torch.compile``
    is in the metrics as "speedup_vs_compile", the memory beyond inputs and gradient as "extra_bytes"."""
    results: list[Result] = []
    todo = every_case(options)
    with progress.step("losses", total=len(todo)):
        for case in todo:
            case.say = progress.say
            with progress.step(case.id):
                results += measure(case, options, floors)
            progress.advance()
    return results, (bars if options.device == "cpu" else bars_cuda).losses(results, options)
