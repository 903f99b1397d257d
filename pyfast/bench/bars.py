"""The speed bars that the project has set itself, judged from results.

They hold for a CPU with AVX-512 on the shapes named; a run on other hardware, or a quick one, leaves them
undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pyfast.bench.environment import active_isa
from pyfast.bench.options import Options
from pyfast.bench.schema import Bar, Result

LOSS_SHAPES = ([512, 32000], [128, 151936])
SPARSE_SHAPE = [4096, 4096]
# Scratch that does not grow with the batch is allowed: memory below this share of a logits tensor counts as
# none.
EXTRA_MEMORY_SHARE = 0.05


def losses(results: Iterable[Result], options: Options) -> list[Bar]:
    """Forward KL, T = 4, loss and gradient, float32: against eager, against ``torch.compile``, against the
    copy floor, and memory beyond the gradient."""
    found = {
        tuple(r.shape): r
        for r in results
        if r.suite == "losses" and r.impl == "pyfast" and r.case == "loss+gradient" and r.dtype == "float32"
    }
    why = undecided(options)
    bars = []
    for shape in LOSS_SHAPES:
        r = found.get(tuple(shape)) if not why else None
        name = f"forward KL {shape[0]}x{shape[1]} float32, loss and gradient"
        metrics = r.metrics if r else {}
        extra = metrics.get("extra_bytes")
        share = None if extra is None else extra / (4 * shape[0] * shape[1])
        note = _spread(r) if r else why
        bars += [
            Bar.judge(f"{name}: against eager", 10.0, r.speedup if r else None, note=note),
            Bar.judge(f"{name}: against torch.compile", 4.0, metrics.get("speedup_vs_compile"), note=note),
            Bar.judge(
                f"{name}: share of the copy floor",
                0.45,
                r.of_floor if r else None,
                unit="of floor",
                note=note,
            ),
            Bar.judge(
                f"{name}: memory beyond the gradient",
                EXTRA_MEMORY_SHARE,
                share,
                unit="of the logits",
                note=note,
                at_most=True,
            ),
        ]
    return bars


def sparse(results: Iterable[Result], options: Options) -> list[Bar]:
    """``sparse_linear`` of 4096x4096 float32 at one token against the best dense of any kind, once of float32 and
    once of any dtype (a processor with bfloat16 instructions reads half the bytes of a dense bfloat16 weight), and
    the rate of conversion."""
    found = [r for r in results if r.suite == "sparse" and r.impl == "pyfast" and list(r.shape) == SPARSE_SHAPE]
    why = undecided(options)
    if why:
        found = []

    def one_token(format: str, sparsity: float) -> Callable[[Result], bool]:
        return lambda r: (
            r.op == "sparse_linear"
            and r.tokens == 1
            and r.dtype == "float32"
            and r.format == format
            and abs(r.sparsity - sparsity) < 0.005
        )

    bars = []
    for format, sparsity, required in (("bitmap", 0.5, 1.6), ("bitmap", 0.8, 3.5), ("2:4", 0.5, 1.6)):
        r = next(filter(one_token(format, sparsity), found), None)
        name = f"sparse_linear 4096x4096 float32, 1 token, {format} at {sparsity:.0%}".replace("%", " %")
        same = r.metrics.get("speedup_same_dtype") if r else None
        bars.append(Bar.judge(f"{name}: against the best dense float32", required, same, note=_spread(r) if r else why))
        note = f"against {r.baseline}; {_spread(r)}" if r else why
        bars.append(
            Bar.judge(f"{name}: against the best dense of any dtype", required, r.speedup if r else None, note=note)
        )

    rates = {
        f"{r.op} {r.format}": r.metrics["mweights_per_s"]
        for r in found
        if r.op in ("from_dense", "to_dense") and "mweights_per_s" in r.metrics
    }
    slowest = min(rates, key=lambda name: rates[name]) if rates else None
    bars.append(
        Bar.judge(
            "conversion 4096x4096 float32, the slowest of both formats and ways",
            100.0,
            rates[slowest] if slowest else None,
            unit="Mweights/s",
            note=f"slowest: {slowest}" if slowest else why,
        )
    )
    return bars


def undecided(options: Options) -> str:
    """Why this run cannot judge the bars; empty if it can."""
    if options.device != "cpu":
        return "set for a CPU"
    if options.quick:
        return "not judged by a quick run"
    isa = active_isa()
    return "" if isa == "avx512" else f"set for AVX-512; this run used {isa or 'the reference'}"


def _spread(r: Result) -> str:
    return f"{r.ms:.3g} ms ({r.ms_min:.3g} to {r.ms_max:.3g})"
