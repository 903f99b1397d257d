"""What the cases of the suite ``losses`` share: a scalar loss, alone or with its gradients, examined once against
float64 and for its memory, then timed in turn with the same loss by others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from pyfast import backends
from pyfast.bench import hardware
from pyfast.bench.cases import is_pyfast, keep_runnable, relative_error, time_case, with_isa
from pyfast.bench.floors import Floors, floor_ms
from pyfast.bench.options import Options
from pyfast.bench.schema import Result

Loss = Callable[..., torch.Tensor]
Outcome = Callable[[], tuple[torch.Tensor, ...]]

# Additions, multiplications and exponentials (one each) a word: two row maxima, two exponentials with their
# scaling, shift and sum, the sum over t·(expm1(x) - x); with the gradient a difference and a scale more.
FLOPS_A_WORD = 16
FLOPS_A_WORD_GRADIENT = 3

# Flushes of a GPU's cache, 0.07 ms each on an H100, while the host issues a loss and its backward: up to 2 ms.
ISSUED_WITHIN = 40


@dataclass(kw_only=True)
class SignalCase(ABC):
    """One loss over inputs of one shape and dtype. A subclass is a dataclass that says what the inputs are, who
    computes the loss, and what is true."""

    op: ClassVar[str]
    # What is timed beside the losses and is none itself, with the note that says what it is: it is not compared with
    # the truth and has no baseline.
    beside: ClassVar[Mapping[str, str]] = {}
    # Ratios of times that go into the metrics, by name, with the implementation that is compared with.
    ratios: ClassVar[Mapping[str, str]] = {"speedup_vs_compile": "torch.compile"}
    # Seconds for all implementations together, and rounds at the least.
    budget_s: ClassVar[float] = 2.0
    min_rounds: ClassVar[int] = 5
    # Whether the arithmetic is that of matrix products in the case's dtype, and not of float32.
    by_products: ClassVar[bool] = False

    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    say: Callable[[str], None] = field(default=lambda text: None, repr=False)

    @property
    @abstractmethod
    def task(self) -> str:
        """The case in words, as ``Result.case`` tells it."""

    @property
    @abstractmethod
    def shape(self) -> list[int]:
        """The sizes that name the case."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens, or rows, that one call compares."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """What must be moved at the least."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """What must be computed at the least."""

    @abstractmethod
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Drawn from ``seed``; those that require a gradient get one in each call."""

    @abstractmethod
    def losses(self) -> dict[str, Callable[[], Loss]]:
        """By name, makers of functions from the inputs to the loss. A maker runs within the first call."""

    @abstractmethod
    def truth(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """In float64: the loss, None where that would take too long, and ``part`` of the gradients."""

    @abstractmethod
    def part(self, gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What of the gradients is compared with the truth."""

    @property
    def id(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.dtype}-{self.task.replace(' ', '-')}"

    @property
    def names(self) -> list[str]:
        return [*self.losses(), *self.others(())]

    def isas(self) -> dict[str, str | None]:
        """pyfast's own names, each with the instruction set that it forces."""
        return {"pyfast": None}

    def others(self, inputs: tuple[torch.Tensor, ...]) -> dict[str, Outcome]:
        """What of ``beside`` is no function of the inputs to a loss. Nothing may be allocated before the first
        call."""
        return {}

    def tasks(self) -> dict[str, Outcome]:
        """By name; each gives the loss and, where wanted, the gradients."""
        torch.compiler.reset()
        inputs, isas = self.inputs(), self.isas()
        tasks = {name: with_isa(isas.get(name), _task(make, inputs)) for name, make in self.losses().items()}
        return tasks | self.others(inputs)

    def implementations(self) -> dict[str, Outcome]:
        return keep_runnable(self.tasks(), is_pyfast, self.say)

    def examine(self, run: Outcome, truth: tuple[torch.Tensor | None, torch.Tensor] | None) -> dict[str, float | None]:
        """One call: relative errors of the "loss" and of the "gradient", and "extra_bytes", what was in use at the
        peak beyond the inputs and the gradients. None where it cannot be told."""
        kept: list[tuple[torch.Tensor, ...]] = []
        grown = self._peak_growth(lambda: kept.append(run()))
        outcome = kept.pop()
        found: dict[str, float | None] = {"extra_bytes": None, "loss": None, "gradient": None}
        if grown is not None:
            found["extra_bytes"] = float(max(0, grown - sum(gradient.nbytes for gradient in outcome[1:])))
        if truth is not None:
            found["loss"] = None if truth[0] is None else relative_error(outcome[0], truth[0])
            found["gradient"] = relative_error(self.part(outcome[1:]), truth[1]) if outcome[1:] else None
        return found

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


def _task(make: Callable[[], Loss], inputs: tuple[torch.Tensor, ...]) -> Outcome:
    wanted = [x for x in inputs if x.requires_grad]
    made: list[Loss] = []

    def loss() -> torch.Tensor:
        if not made:
            made.append(make())
        return made[0](*inputs)

    def with_gradient() -> tuple[torch.Tensor, ...]:
        value = loss()
        return value, *torch.autograd.grad(value, wanted)

    def without() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (loss(),)

    return with_gradient if wanted else without


def measure(case: SignalCase, options: Options, floors: Floors) -> list[Result]:
    """Every implementation of a case. The baseline of a result is eager torch; peers that could not run are named in
    the note of pyfast's."""
    tasks, truth = case.tasks(), case.truth()
    checked: dict[str, dict[str, float | None]] = {}
    absent: list[str] = []

    def examined(name: str) -> None:
        tasks[name]()  # what is set up once
        checked[name] = case.examine(tasks[name], None if name in case.beside else truth)

    def leave_out(line: str) -> None:
        absent.append(line)
        case.say(line)

    kept = keep_runnable({name: partial(examined, name) for name in tasks}, is_pyfast, leave_out)
    budget_s, min_rounds = case.budget_s, case.min_rounds
    if case.device != "cpu":  # milliseconds a call
        budget_s, min_rounds = 0.5, 5
    timings = time_case(
        {name: tasks[name] for name in kept},
        budget_s=options.budget(budget_s),
        min_rounds=min_rounds,
        device=case.device,
        flushes=ISSUED_WITHIN,
    )
    arithmetic = case.dtype if case.by_products else "float32"
    perfect = floor_ms(case.bytes, case.flops, floors, by="copy", dtype=arithmetic)
    eager = timings.get("eager")
    results = []
    for name, timing in timings.items():
        metrics: dict[str, float] = {"rows_per_s": case.tokens / timing.ms * 1e3}
        for metric, value in (("extra_bytes", checked[name]["extra_bytes"]), ("loss_error", checked[name]["loss"])):
            if value is not None:
                metrics[metric] = value
        metrics |= {ratio: timings[to].ms / timing.ms for ratio, to in case.ratios.items() if to in timings}
        error = checked[name]["gradient" if truth[1].numel() else "loss"]
        notes = [case.beside[name]] if name in case.beside else ["result is not finite"] * (error is None)
        against = None if name in case.beside else eager
        results.append(
            Result.timed(
                timing,
                suite="losses",
                op=case.op,
                case=case.task,
                shape=case.shape,
                tokens=case.tokens,
                format="none",
                sparsity=0.0,
                dtype=case.dtype,
                impl=name,
                bytes=case.bytes,
                flops=case.flops,
                floor_ms=perfect,
                baseline="eager" if against else None,
                baseline_ms=against.ms if against else None,
                error=error,
                metrics=metrics,
                note="; ".join(notes + (absent if name == "pyfast" else [])),
            )
        )
    return results


def rowwise_truth(
    loss: Loss, student: torch.Tensor, *others: torch.Tensor, rows: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64: a mean over rows, taken a few rows at a time so that no tensor of float64 is of the logits' size,
    and its gradient in the first rows (empty where ``student`` requires none)."""
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    first = torch.empty(0, dtype=torch.float64)
    for start in range(0, len(student), rows):
        chosen = slice(start, start + rows)
        wide = student[chosen].detach().double().requires_grad_(student.requires_grad and start == 0)
        given = (x[chosen].double() if x.is_floating_point() else x[chosen] for x in others)
        value = loss(wide, *given) * (len(wide) / len(student))
        if wide.requires_grad:
            (first,) = torch.autograd.grad(value, wide)
        total += value.detach()
    return total, first
