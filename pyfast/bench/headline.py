"""The answer in a few figures: what compression buys on the machine of a report.

Each finding is taken from the results alone; where a suite did not run there is no finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pyfast.bench.bars import HEAD_TOO
from pyfast.bench.breakeven import break_even_text, speedup_points
from pyfast.bench.plots import TIMES, digits, finite
from pyfast.bench.schema import Report, Result

NBSP = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Finding:
    """A question, the ``figure`` that answers it, and a sentence with its conditions. ``good`` is whether
    it speaks for compression, None where it only reports."""

    question: str
    figure: str
    sentence: str
    good: bool | None = None


def findings(report: Report) -> list[Finding]:
    """All findings of a report, the most wanted first."""
    rows = finite(report.results)
    parts: Sequence[Callable[[list[Result]], Iterable[Finding]]] = (
        _sparse_one_token,
        _sparse_many_tokens,
        _decode,
        _removal,
        _encoder,
        _losses,
        _lost,
    )
    return [finding for part in parts for finding in part(rows)]


def compressed(r: Result) -> bool:
    """Whether a result is that of something compressed or fused: pyfast's own, or a model with layers
    removed."""
    return r.impl.startswith("pyfast") or r.format == "layers"


def lost(results: Iterable[Result]) -> list[Result]:
    """Compressed or fused results that are slower than the best dense or unfused one."""
    return [r for r in results if compressed(r) and r.speedup is not None and r.speedup < 1]


def _sparse_one_token(rows: list[Result]) -> Iterable[Finding]:
    mine = [r for r in rows if r.suite == "sparse" and r.op == "sparse_linear" and r.tokens == 1 and _ours(r)]
    if not mine:
        return
    shape = max((r.shape for r in mine), key=lambda s: (list(s) == [4096, 4096], s))
    here = sorted((r for r in mine if r.shape == shape), key=lambda r: (r.format != "2:4", r.sparsity))
    best, least = max(here, key=_speed), min(here, key=_speed)
    by_dtype = []
    for dtype in dict.fromkeys(r.dtype for r in here):
        figures = ", ".join(f"{_name(r)}{NBSP}{_times(r)}" for r in here if r.dtype == dtype)
        by_dtype.append(f"{dtype}: {figures}")
    yield Finding(
        "Sparse weights, one token",
        _times(best) if len(here) == 1 else f"{_times(least)} to {_times(best)}",
        f"A {_size(shape)} layer against the best dense ({best.baseline}). " + "; ".join(by_dtype) + ".",
        _speed(least) > 1,
    )


def _sparse_many_tokens(rows: list[Result]) -> Iterable[Finding]:
    sparse = [r for r in rows if r.suite == "sparse" and r.op == "sparse_linear"]
    shapes = list(dict.fromkeys(tuple(r.shape) for r in sparse))
    shapes.sort(key=lambda s: s != (4096, 4096))
    for shape in shapes[:1]:
        dtypes = [r.dtype for r in sparse if tuple(r.shape) == shape]
        dtype = "float32" if "float32" in dtypes else dtypes[0]
        points = {t: speedup_points(sparse, shape=shape, tokens=t, dtype=dtype) for t in (1, 16, 32, 128)}
        told = {t: break_even_text(p) for t, p in points.items() if len(p) > 1}
        if told:
            last = max(told)
            yield Finding(
                f"From which sparsity it pays, {last} token{'s' if last > 1 else ''}",
                told[last],
                f"Bitmap, {_size(shape)}, {dtype} against the best dense of any dtype: "
                + "; ".join(f"{t} token{'s' if t > 1 else ''}: {text}" for t, text in told.items())
                + ".",
            )


def _decode(rows: list[Result]) -> Iterable[Finding]:
    mine = [r for r in rows if r.suite == "model" and r.op == "decode"]
    for case in dict.fromkeys(r.case for r in mine):
        here = [r for r in mine if r.case == case]
        dense = min((r for r in here if r.format == "dense"), key=lambda r: r.ms, default=None)
        others = sorted((r for r in here if r.format in ("2:4", "bitmap")), key=lambda r: -_speed(r))
        if dense is None or not others:
            continue
        best = others[0]
        listed = ", ".join(f"{_name(r)} {r.dtype}{NBSP}{_times(r)}" for r in others)
        yield Finding(
            f"Whole model, decoding: {case}",
            f"{digits(1000 / best.ms)} tokens/s",
            f"With {_name(best)} {best.dtype}, against {digits(1000 / dense.ms)} tokens/s dense "
            f"({dense.impl} {dense.dtype}). "
            f"{listed}." + (f" {best.note[0].upper()}{best.note[1:]}." if best.note else ""),
            _speed(best) > 1,
        )


def _removal(rows: list[Result]) -> Iterable[Finding]:
    mine = [r for r in rows if r.suite in ("model", "layers") and r.op == "decode" and r.format == "layers"]
    mine.sort(key=lambda r: (r.suite != "model", abs(r.sparsity - 0.22)))
    for r in mine[:1]:
        predicted = r.metrics.get("predicted_speedup")
        expected = "" if predicted is None else f", {predicted:.2f}{TIMES} expected from bytes, the head counted"
        yield Finding(
            f"Removing {100 * r.sparsity:.0f} % of the layers",
            _times(r),
            f"{r.case}, decoding{expected}. No special kernel is needed.",
            _speed(r) > 1,
        )


def _encoder(rows: list[Result]) -> Iterable[Finding]:
    mine = [r for r in rows if r.suite == "model" and r.op == "embed" and r.format != "dense"]
    if not mine:
        return
    here = [r for r in mine if r.shape[0] == min(r.shape[0] for r in mine)]
    best = max(here, key=lambda r: (r.metrics.get("cosine", 0.0), _speed(r)))
    worth = [r for r in here if _speed(r) > 1]
    kept = max(worth, key=lambda r: r.metrics.get("cosine", 0.0), default=best)
    controls = [r for r in here if r.sparsity == kept.sparsity and "last layers" in r.impl and kept.format == "layers"]
    control = f" Removing simply the last ones keeps {controls[0].metrics['cosine']:.2f}." if controls else ""
    yield Finding(
        f"Real weights, no healing: {kept.case}",
        f"cosine {kept.metrics.get('cosine', 0.0):.2f} at {_times(kept)}",
        f"The best kept embedding among what is faster than dense: {_name(kept)}, {kept.impl}, {kept.dtype}.{control}",
        _speed(kept) > 1 and kept.metrics.get("cosine", 0.0) > 0.9,
    )


def _losses(rows: list[Result]) -> Iterable[Finding]:
    mine = [r for r in rows if r.suite == "losses" and r.op == "distill_kl" and _ours(r)]
    mine = [r for r in mine if r.case in ("loss+gradient", "loss")]
    if not mine:
        return
    r = max(mine, key=lambda r: (r.case == "loss+gradient", r.dtype == "float32", r.shape[0] * r.shape[-1]))
    compiled = r.metrics.get("speedup_vs_compile")
    beside = "" if compiled is None else f", {compiled:.1f}{TIMES} over torch.compile"
    floor = "" if r.of_floor is None else f", {100 * r.of_floor:.0f} % of the floor"
    yield Finding(
        "Fused distillation loss",
        _times(r),
        f"Over {r.baseline}{beside}{floor}: forward KL, {r.case}, {_size(r.shape)}, {r.dtype}.",
        _speed(r) > 1,
    )


def _lost(rows: list[Result]) -> Iterable[Finding]:
    judged = [r for r in rows if compressed(r) and r.speedup is not None]
    if not judged:
        return
    losing = lost(judged)
    worst = min(losing, key=_speed, default=None)
    sentence = (
        "No compressed or fused case lost to the best dense one."
        if worst is None
        else f"Slower than the best dense or eager one; the worst: {_times(worst)}, {worst.suite} {worst.case}, "
        f"{worst.tokens} tokens, {_name(worst)}, {worst.dtype}."
    )
    yield Finding("Cases in which it loses", f"{len(losing)} of {len(judged)}", sentence, not losing)


def _ours(r: Result) -> bool:
    return r.impl == "pyfast" and r.speedup is not None


def _speed(r: Result) -> float:
    return r.speedup or 0.0


def _times(r: Result) -> str:
    return f"{_speed(r):.2f}{TIMES}" if _speed(r) < 9.95 else f"{_speed(r):.1f}{TIMES}"


def _name(r: Result) -> str:
    if r.format in ("2:4", "dense", "none"):
        return r.format
    head = ", head too," if r.impl == HEAD_TOO else ""
    return f"{r.format}{NBSP}{100 * r.sparsity:.0f}{NBSP}%{head}"


def _size(shape: Sequence[int]) -> str:
    return f" {TIMES} ".join(map(str, shape))
