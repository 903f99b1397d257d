"""Suite ``losses``: the fused distillation loss beside eager torch, ``torch.compile`` and, on a GPU, other
libraries.

The task is the forward KL divergence of tempered softmaxes, T = 4, times T², mean over the rows, with the
gradient of the student's logits ("loss+gradient") or without ("loss"). With E bytes in one logits tensor it
must move 3E (two reads, one write), or 2E without the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from pyfast import backends
from pyfast.bench import bars, hardware
from pyfast.bench.cases import (
    DTYPES,
    cpu_variants,
    is_pyfast,
    keep_runnable,
    relative_error,
    time_case,
    with_isa,
)
from pyfast.bench.floors import Floors, floor_ms
from pyfast.bench.options import Options
from pyfast.bench.progress import Progress
from pyfast.bench.schema import Bar, Result

TEMPERATURE = 4.0
OP = "distill_kl"
# Additions, multiplications and exponentials (one each) a word: two row maxima, two exponentials with their
# scaling, shift and sum, the sum over t·(expm1(x) - x); with the gradient a difference and a scale more.
FLOPS_A_WORD = 16
FLOPS_A_WORD_GRADIENT = 3
_ROWS_CHECKED = 4

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Outcome = Callable[[], tuple[torch.Tensor, ...]]


def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The textbook formula in torch."""
    return (
        F.kl_div(
            F.log_softmax(student / TEMPERATURE, -1),
            F.log_softmax(teacher / TEMPERATURE, -1),
            log_target=True,
            reduction="batchmean",
        )
        * TEMPERATURE**2
    )


def _pyfast(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    import pyfast

    return pyfast.distillation_loss(student, teacher, "forward_kl", temperature=TEMPERATURE)


def _liger() -> Loss:
    from liger_kernel.transformers import LigerKLDIVLoss

    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda s, t: kl(F.log_softmax(s / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1)) * TEMPERATURE**2


def _trl() -> Loss:
    from trl import GKDTrainer

    kl = GKDTrainer.generalized_jsd_loss  # with beta 0 it is the forward KL, without T²
    return lambda s, t: kl(s, t, beta=0.0, temperature=TEMPERATURE, reduction="batchmean") * TEMPERATURE**2


@dataclass
class LossCase:
    """``rows`` x ``vocab`` logits of one dtype, with or without the gradient; ``every_isa`` adds pyfast
    under each other instruction set that this CPU runs."""

    rows: int
    vocab: int
    dtype: str
    gradient: bool
    every_isa: bool = False
    device: str = "cpu"
    seed: int = 0
    say: Callable[[str], None] = field(default=lambda text: None, repr=False)

    @property
    def task(self) -> str:
        return "loss+gradient" if self.gradient else "loss"

    @property
    def id(self) -> str:
        return f"{self.rows}x{self.vocab}-{self.dtype}-{self.task}"

    @property
    def names(self) -> list[str]:
        return list(self._losses())

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Student and teacher: the teacher drawn from a normal distribution of spread 3, the student near
        it."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        teacher = torch.randn(self.rows, self.vocab, generator=generator, device=self.device).mul_(3)
        student = torch.randn(self.rows, self.vocab, generator=generator, device=self.device).add_(teacher)
        dtype = DTYPES[self.dtype]
        return student.to(dtype).requires_grad_(self.gradient), teacher.to(dtype)

    def implementations(self) -> dict[str, Outcome]:
        """By name; each gives (loss, gradient) or (loss,)."""
        torch.compiler.reset()
        student, teacher = self.logits()
        isas = self._isas()
        impls = {
            name: with_isa(isas.get(name), self._task(make, student, teacher)) for name, make in self._losses().items()
        }
        return keep_runnable(impls, is_pyfast, self.say)

    def _isas(self) -> dict[str, str | None]:
        forced = self.device == "cpu" and self.every_isa
        return cpu_variants() if forced else {"pyfast": None}

    def _losses(self) -> dict[str, Callable[[], Loss]]:
        """Makers of the losses by name."""
        makers: dict[str, Callable[[], Loss]] = {name: lambda: _pyfast for name in self._isas()}
        makers["eager"] = lambda: eager
        makers["torch.compile"] = lambda: torch.compile(eager, dynamic=False)
        if self.device != "cpu":
            makers |= {"liger": _liger, "trl": _trl}
        return makers

    def _task(self, make: Callable[[], Loss], student: torch.Tensor, teacher: torch.Tensor) -> Outcome:
        made: list[Loss] = []

        def loss() -> torch.Tensor:
            if not made:
                made.append(make())
            return made[0](student, teacher)

        def with_gradient() -> tuple[torch.Tensor, torch.Tensor]:
            value = loss()
            return value, torch.autograd.grad(value, student)[0]

        def without() -> tuple[torch.Tensor]:
            with torch.no_grad():
                return (loss(),)

        return with_gradient if self.gradient else without

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        """E: the bytes of one logits tensor."""
        return self.rows * self.vocab * self.element_bytes

    @property
    def bytes(self) -> int:
        return (3 if self.gradient else 2) * self.logits_bytes

    @property
    def flops(self) -> int:
        return self.rows * self.vocab * (FLOPS_A_WORD + (FLOPS_A_WORD_GRADIENT if self.gradient else 0))

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64: the loss, and the gradient's first rows."""
        student, teacher = self.logits()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        first = torch.empty(0)
        for start in range(0, self.rows, _ROWS_CHECKED):
            rows = slice(start, start + _ROWS_CHECKED)
            log_s = F.log_softmax(student[rows].detach().double() / TEMPERATURE, -1)
            log_t = F.log_softmax(teacher[rows].double() / TEMPERATURE, -1)
            t = log_t.exp()
            total += (t * (log_t - log_s)).sum()
            if start == 0:
                first = (log_s.exp() - t) * (TEMPERATURE / self.rows)
        return total * (TEMPERATURE**2 / self.rows), first

    def check(self, run: Outcome, truth: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float | None]:
        """One call examined: relative errors of the "loss" and of the "gradient" (its first rows), and
        "extra_bytes", what was in use at the peak beyond the inputs and the gradient. None where it cannot
        be told."""
        kept: list[tuple[torch.Tensor, ...]] = []
        grown = self._peak_growth(lambda: kept.append(run()))
        outcome = kept.pop()
        expected = self.logits_bytes if self.gradient else 0
        return {
            "extra_bytes": None if grown is None else float(max(0, grown - expected)),
            "loss": relative_error(outcome[0], truth[0]),
            "gradient": relative_error(outcome[1][:_ROWS_CHECKED], truth[1]) if self.gradient else None,
        }

    def _peak_growth(self, run: Callable[[], object]) -> int | None:
        if self.device == "cpu":
            backends.release_memory()  # or a gradient that is kept for reuse would hide its own bytes
            return hardware.peak_growth_bytes(run)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def cases(options: Options) -> list[LossCase]:
    """The cases of a run: 32,000 words (Llama 2) and 151,936 (Qwen 2.5); on a GPU batches of 8192 tokens as
    well."""
    if options.quick:
        plan = [
            (64, 32000, "float32", True, True),
            (16, 151936, "float32", True, False),
            (64, 32000, "float32", False, False),
        ]
    else:
        plan = [
            (512, 32000, "float32", True, True),
            (128, 151936, "float32", True, False),
            (512, 32000, "bfloat16", True, False),
            (128, 151936, "bfloat16", True, False),
            (512, 32000, "float32", False, False),
            (128, 151936, "float32", False, False),
        ]
    if options.device == "cuda" and not options.quick:
        plan += [(8192, 128256, "bfloat16", True, False), (8192, 151936, "bfloat16", True, False)]
    return [LossCase(*case, device=options.device, seed=options.seed) for case in plan]


def run(options: Options, floors: Floors, progress: Progress) -> tuple[list[Result], list[Bar]]:
    """Measure every case. The baseline of a result is eager torch; the time against ``torch.compile`` is in
    the metrics as "speedup_vs_compile", the memory beyond inputs and gradient as "extra_bytes"."""
    results: list[Result] = []
    todo = cases(options)
    with progress.step("losses", total=len(todo)):
        for case in todo:
            case.say = progress.say
            with progress.step(case.id):
                results += _measure(case, options, floors)
            progress.advance()
    return results, bars.losses(results, options)


def _measure(case: LossCase, options: Options, floors: Floors) -> list[Result]:
    impls = case.implementations()
    truth = case.truth()
    checked = {name: case.check(run, truth) for name, run in impls.items()}
    timings = time_case(impls, budget_s=options.budget(3.0), device=options.device)
    perfect = floor_ms(case.bytes, case.flops, floors, by="copy", dtype="float32")
    compiled = timings.get("torch.compile")
    results = []
    for name, timing in timings.items():
        metrics = {"rows_per_s": case.rows / timing.ms * 1e3}
        for metric, value in (
            ("extra_bytes", checked[name]["extra_bytes"]),
            ("loss_error", checked[name]["loss"]),
            ("speedup_vs_compile", compiled.ms / timing.ms if compiled else None),
        ):
            if value is not None:
                metrics[metric] = value
        error = checked[name]["gradient" if case.gradient else "loss"]
        results.append(
            Result.timed(
                timing,
                suite="losses",
                op=OP,
                case=case.task,
                shape=[case.rows, case.vocab],
                tokens=case.rows,
                format="none",
                sparsity=0.0,
                dtype=case.dtype,
                impl=name,
                bytes=case.bytes,
                flops=case.flops,
                floor_ms=perfect,
                baseline="eager" if "eager" in timings else None,
                baseline_ms=timings["eager"].ms if "eager" in timings else None,
                error=error,
                metrics=metrics,
                note="" if error is not None else "result is not finite",
            )
        )
    return results
