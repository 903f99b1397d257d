"""What a case is, and what the suites that have cases share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch

from pyfast.bench.timing import ImplementationError, Timing, interleave

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(Protocol):
    """One task that several implementations do. ``run`` of a suite and pytest-benchmark both consume it."""

    @property
    def id(self) -> str:
        """Unique in the suite, fit for the command line of pytest."""

    @property
    def names(self) -> list[str]:
        """The names of the implementations, known before anything is built."""

    def implementations(self) -> Mapping[str, Callable[[], object]]:
        """Build the data and the implementations by name. One of another library that cannot run here is left
        out; one of pyfast that cannot run raises."""


def keep_runnable(
    impls: Mapping[str, Callable[[], T]], must_run: Callable[[str], bool], say: Callable[[str], None]
) -> dict[str, Callable[[], T]]:
    """Run each implementation once, which also compiles it. One that raises is left out, with a line through
    ``say``; if ``must_run(name)`` its error goes on as ``ImplementationError``."""
    kept = {}
    for name, run in impls.items():
        try:
            run()
        except Exception as error:
            if must_run(name):
                raise ImplementationError(name, error) from error
            say(f"{name} left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        else:
            kept[name] = run
    return kept


def time_case(
    impls: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    device: str,
    min_rounds: int = 5,
    calls: int = 1,
    flushes: int = 1,
) -> dict[str, Timing]:
    """``interleave`` over the implementations of one case, which have been run already."""
    return interleave(
        impls, budget_s=budget_s, min_rounds=min_rounds, device=device, warmup=0, calls=calls, flushes=flushes
    )


def is_pyfast(name: str) -> bool:
    """Whether an implementation is this project's own."""
    return name.split("[")[0].split(" ")[0] == "pyfast"


def cpu_variants() -> dict[str, str | None]:
    """pyfast on the CPU by name: "pyfast" is what a user gets (no instruction set forced, None), and
    "pyfast[avx2]" and so on are the other instruction sets that are built and that this CPU runs."""
    from pyfast import backends

    active = backends.active_isa()
    return {"pyfast": None, **{f"pyfast[{isa}]": isa for isa in backends.isas_supported() if isa != active}}


def with_isa(isa: str | None, run: Callable[[], T]) -> Callable[[], T]:
    """``run`` under a forced instruction set; ``run`` itself if ``isa`` is None."""
    if isa is None:
        return run
    from pyfast import backends

    def forced() -> T:
        with backends.isa(isa):
            return run()

    return forced


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float | None:
    """‖got - truth‖ / ‖truth‖ in float64; None where ``got`` is not finite or the truth is zero."""
    difference = torch.linalg.vector_norm(got.detach().to("cpu", torch.float64) - truth.cpu())
    size = torch.linalg.vector_norm(truth.cpu())
    error = float(difference / size) if float(size) > 0 else float("nan")
    return error if error == error and error != float("inf") else None
