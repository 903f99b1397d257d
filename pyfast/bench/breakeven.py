"""From which sparsity on a sparse format pays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyfast.bench.schema import Result


def break_even(points: Iterable[tuple[float, float]]) -> float | None:
    """The sparsity from which on the speedup is at least 1, linear between the measured points.

    ``points`` are pairs of sparsity (0 to 1) and speedup, in any order. Where even the least sparse point
    pays, its sparsity is given: the true value is at most that. None where the sparsest point does not pay.
    """
    ordered = sorted(points)
    if not ordered or ordered[-1][1] < 1:
        return None
    below = [i for i, (_, speedup) in enumerate(ordered) if speedup < 1]
    if not below:
        return ordered[0][0]
    (s0, v0), (s1, v1) = ordered[below[-1]], ordered[below[-1] + 1]
    return s0 + (s1 - s0) * (1 - v0) / (v1 - v0)


def break_even_text(points: Iterable[tuple[float, float]]) -> str:
    """The break-even in words: "63 %", "50 % or less", "above 95 %"."""
    ordered = sorted(points)
    if not ordered:
        return "not measured"
    found = break_even(ordered)
    if found is None:
        return f"above {ordered[-1][0]:.0%}".replace("%", " %")
    text = f"{found:.0%}".replace("%", " %")
    return f"{text} or less" if found == ordered[0][0] else text


def speedup_points(
    results: Sequence[Result], *, shape: Sequence[int], tokens: int, dtype: str, format: str = "bitmap"
) -> list[tuple[float, float]]:
    """Pairs of sparsity and speedup of pyfast's results for one shape, number of tokens and dtype, sorted.

    Without those where the plan stayed dense: a speedup of 1 that says nothing of the format.
    """
    found = _of_pyfast(results, shape, tokens, dtype, format)
    return sorted((r.sparsity, r.speedup) for r in found if r.speedup is not None and not stays_dense(r))


def stays_dense(r: Result) -> bool:
    """Whether the cost model served a sparse weight by the dense product."""
    return r.note == "kernel: dense"


def predicted_points(
    results: Sequence[Result], *, shape: Sequence[int], tokens: int, dtype: str, format: str = "bitmap"
) -> list[tuple[float, float]]:
    """The same with the speedup that the cost model predicted, over the best dense of the same dtype."""
    metric = "predicted_speedup_same_dtype"
    found = _of_pyfast(results, shape, tokens, dtype, format)
    return sorted((r.sparsity, r.metrics[metric]) for r in found if metric in r.metrics)


def _of_pyfast(results: Sequence[Result], shape: Sequence[int], tokens: int, dtype: str, format: str) -> list[Result]:
    return [
        r
        for r in results
        if r.suite == "sparse"
        and r.op == "sparse_linear"
        and r.impl == "pyfast"
        and r.format == format
        and list(r.shape) == list(shape)
        and r.tokens == tokens
        and r.dtype == dtype
    ]
