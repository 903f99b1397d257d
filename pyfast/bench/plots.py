"""Plots of a report as SVG text to be put into a page.

No pyplot, no global figure: every plot is a ``Figure`` drawn by the SVG backend. Colours are written as
placeholders and then replaced by CSS variables, so that a plot follows the page into dark mode; text stays
text, so that it can be searched, selected and read aloud.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pyfast.bench.breakeven import break_even, break_even_text, speedup_points
from pyfast.bench.page_style import COLOURS
from pyfast.bench.schema import Report, Result

TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"

# Placeholder -> CSS variable. They are valid colours, unlikely ones, and all different.
INK, MUTED, GRID, LOSS = "#010101", "#020202", "#030303", "#040404"
DENSE, FIRST, SECOND, THIRD, FOURTH = "#050505", "#060606", "#070707", "#080808", "#090909"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    LOSS: "--loss",
    DENSE: "--dense",
    FIRST: "--c1",
    SECOND: "--c2",
    THIRD: "--c3",
    FOURTH: "--c4",
}
_SERIES = (FIRST, SECOND, THIRD, FOURTH)
_TOKENS = (1, 16, 128)


@dataclass(frozen=True)
class Plot:
    """``svg`` for the page, a ``title``, and a ``description`` of what is to be seen for those who cannot
    see it."""

    title: str
    description: str
    svg: str


def label(plot: Plot) -> str:
    """The attribute of an SVG that tells what is to be seen, every figure in it."""
    return _label(plot.description)


def standalone(plot: Plot) -> str:
    """A plot as a file of its own, with the colours of the page, light or dark as the reader's."""
    style = f"<style>{COLOURS} svg {{ font-family: system-ui, sans-serif; background: var(--paper); }}</style>"
    head, rest = plot.svg.split(">", 1)
    if "xmlns=" not in head:
        head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}>{style}{rest}\n"


def speedup_by_sparsity(report: Report) -> list[Plot]:
    """One plot a shape: speedup over the best dense against sparsity, a line for each number of tokens."""
    rows = finite(r for r in report.results if r.suite == "sparse" and r.op == "sparse_linear")
    made = []
    for shape in dict.fromkeys(tuple(r.shape) for r in rows):
        mine = [r for r in rows if tuple(r.shape) == shape]
        dtypes = [
            dtype
            for dtype in ("float32", "bfloat16")
            if any(len(speedup_points(mine, shape=shape, tokens=t, dtype=dtype)) > 1 for t in _TOKENS)
        ]
        if dtypes:
            made.append(_speedups_of_shape(mine, shape, dtypes))
    return made


def _speedups_of_shape(rows: Sequence[Result], shape: tuple[int, ...], dtypes: Sequence[str]) -> Plot:
    figure, all_axes = _panels(len(dtypes), height=3.9)
    size = f" {TIMES} ".join(map(str, shape))
    told = []
    highest = 1.0
    for axes, dtype in zip(all_axes, dtypes, strict=True):
        for tokens, colour in zip(_TOKENS, _SERIES, strict=False):
            points = speedup_points(rows, shape=shape, tokens=tokens, dtype=dtype)
            if not points:
                continue
            label = f"{tokens} token{'s' if tokens > 1 else ''}"
            x, y = [100 * s for s, _ in points], [v for _, v in points]
            highest = max(highest, *y)
            axes.plot(x, y, color=colour, marker="o", markersize=4.5, linewidth=1.8, label=label)
            at = break_even(points)
            if at is not None and at > points[0][0]:
                axes.plot(
                    [100 * at],
                    [1],
                    marker="o",
                    markersize=9,
                    markerfacecolor="none",
                    color=colour,
                    markeredgewidth=1.6,
                )
                axes.vlines(100 * at, 0, 1, color=colour, linewidth=1, linestyle=(0, (2, 2)))
            told.append(f"{dtype}, {label}: pays from {break_even_text(points)}")
            two_four = speedup_points(rows, shape=shape, tokens=tokens, dtype=dtype, format="2:4")
            if two_four:
                highest = max(highest, two_four[0][1])
                axes.plot(
                    [50],
                    [two_four[0][1]],
                    marker="D",
                    markersize=6,
                    color=colour,
                    linestyle="none",
                    markerfacecolor="none",
                    markeredgewidth=1.4,
                )
        axes.axhspan(0, 1, color=LOSS, alpha=0.07, linewidth=0)
        axes.axhline(1, color=MUTED, linewidth=1.2)
        axes.set_title(dtype, loc="left", color=INK)
        axes.set_xlabel("sparsity, %")
        axes.set_ylabel("speedup over the best dense")
        axes.text(
            0.99,
            1,
            "best dense",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            color=MUTED,
            fontsize=8.5,
        )
        axes.legend(loc="upper left", frameon=False, labelcolor=INK)
    for axes in all_axes:
        axes.set_ylim(0, highest * 1.12)
    description = (
        f"Speedup of sparse weights of {size} over the fastest dense linear against sparsity. "
        + "; ".join(told)
        + ". Diamonds are 2:4, rings mark the break-even; what lies in the shaded part is slower than dense."
    )
    return Plot(f"Weight {size}", description, _svg(figure, f"speedup {shape}", description))


def of_floor(report: Report) -> list[Plot]:
    """Share of the time's floor that each implementation reaches: the losses, and sparse weights at one
    token."""
    rows = finite(r for r in report.results if r.of_floor is not None and math.isfinite(r.of_floor))
    chosen = {
        "Losses": [r for r in rows if r.suite == "losses"],
        "Sparse weights, one token": [
            r for r in rows if r.suite == "sparse" and r.op == "sparse_linear" and r.tokens == 1
        ],
    }
    made = []
    for title, mine in chosen.items():
        groups: dict[str, list[Result]] = {}
        for r in mine:
            size = TIMES.join(map(str, r.shape))
            groups.setdefault(f"{r.case} {size}" if r.suite == "losses" else size, []).append(r)
        for name, group in groups.items():
            labels = [f"{r.impl} · {what(r)}{r.dtype}" for r in group]
            values = [100 * (r.of_floor or 0.0) for r in group]
            texts = [f"{v:.0f} %" for v in values]
            ours = [r.impl.startswith("pyfast") for r in group]
            description = f"{title}, {name}: share of the floor reached. " + "; ".join(
                f"{label} {text}" for label, text in zip(labels, texts, strict=True)
            )
            figure, (axes,) = _panels(1, height=0.9 + 0.27 * len(group))
            _bars(axes, labels, values, texts, [FIRST if own else DENSE for own in ours])
            axes.axvline(100, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_xlim(0, max(118.0, 1.15 * max(values)))
            axes.set_xlabel("share of the floor measured on this machine, %")
            made.append(Plot(f"{title}: {name}", description, _svg(figure, f"floor {title} {name}", description)))
    return made


def model_rates(report: Report) -> list[Plot]:
    """One plot a model: tokens a second, dense against each compression, with the prediction as a tick."""
    rows = finite(r for r in report.results if r.suite == "model" and r.op in ("decode", "prefill"))
    made = []
    for case in dict.fromkeys(r.case for r in rows):
        ops = [op for op in ("decode", "prefill") if any(r.case == case and r.op == op for r in rows)]
        groups = [[r for r in rows if r.case == case and r.op == op] for op in ops]
        figure, all_axes = _panels(len(ops), height=1.1 + 0.27 * max(map(len, groups)))
        told = []
        for axes, op, group in zip(all_axes, ops, groups, strict=True):
            rates = [1000 * r.tokens / r.ms for r in group]
            labels = [f"{what(r)}{r.dtype} · {r.impl}" for r in group]
            texts = [_rate_text(r, rate) for r, rate in zip(group, rates, strict=True)]
            colours = [DENSE if r.format == "dense" else THIRD if r.format == "layers" else FIRST for r in group]
            predicted = [_predicted_rate(r) for r in group]
            ends = [max(rate, other or 0.0) for rate, other in zip(rates, predicted, strict=True)]
            _bars(axes, labels, rates, texts, colours, ends)
            for place, rate in enumerate(predicted):
                if rate is not None:
                    axes.vlines(rate, place - 0.42, place + 0.42, color=INK, linewidth=2)
            axes.set_xlim(0, 1.6 * max(ends))
            axes.set_title("decode, one sequence" if op == "decode" else "prefill", loc="left", color=INK)
            axes.set_xlabel("tokens a second")
            told += [f"{op} {label} {text}" for label, text in zip(labels, texts, strict=True)]
        description = f"{case}: tokens a second. " + "; ".join(told) + ". Black ticks are predictions."
        made.append(Plot(case, description, _svg(figure, f"model {case}", description)))
    return made


def _predicted_rate(r: Result) -> float | None:
    """Tokens a second that the predicted speedup would give; None where nothing was predicted."""
    predicted = r.metrics.get("predicted_speedup")
    if predicted is None or not math.isfinite(predicted) or not r.baseline_ms:
        return None
    return 1000 * r.tokens / r.baseline_ms * predicted


def _rate_text(r: Result, rate: float) -> str:
    text = digits(rate)
    return text if r.speedup is None else f"{text} ({r.speedup:.2f}{TIMES})"


def encoder_quality(report: Report) -> list[Plot]:
    """One plot an encoder: cosine with the dense embeddings against speedup, one panel a size of batch."""
    rows = finite(
        r
        for r in report.results
        if r.suite == "model" and r.op == "embed" and r.speedup is not None and "cosine" in r.metrics
    )
    made = []
    for case in dict.fromkeys(r.case for r in rows):
        mine = [r for r in rows if r.case == case]
        counts = sorted({r.shape[0] for r in mine})
        figure, all_axes = _panels(len(counts), height=4.4)
        told = []
        for axes, count in zip(all_axes, counts, strict=True):
            group = [r for r in mine if r.shape[0] == count]
            for r, (dx, dy) in zip(group, _nudges(group), strict=True):
                colour, marker = _encoder_style(r)
                x, y = r.speedup or 0.0, r.metrics["cosine"]
                axes.plot(
                    [x],
                    [y],
                    marker=marker,
                    color=colour,
                    markersize=7,
                    linestyle="none",
                    markerfacecolor=colour if r.format != "dense" else "none",
                )
                if r.format != "dense":
                    axes.annotate(
                        _encoder_label(r),
                        (x, y),
                        xytext=(dx, dy),
                        textcoords="offset points",
                        fontsize=8,
                        color=INK,
                        va="center",
                    )
                told.append(f"{count} sentences, {what(r)}{r.dtype} {r.impl}: {x:.2f} times, cosine {y:.2f}")
            axes.axvline(1, color=MUTED, linewidth=1.2)
            axes.axvspan(0, 1, color=LOSS, alpha=0.07, linewidth=0)
            axes.set_xlim(0, 1.6 * max(r.speedup or 0.0 for r in group))
            axes.set_ylim(min(0.0, *(r.metrics["cosine"] for r in group)) - 0.03, 1.06)
            axes.set_title(f"{count} sentence{'s' if count > 1 else ''} at a time", loc="left", color=INK)
            axes.set_xlabel("speedup over the best dense")
            axes.set_ylabel("cosine with the dense embedding")
        description = f"{case}: what compression does to speed and to embeddings. " + "; ".join(told)
        made.append(Plot(case, description, _svg(figure, f"encoder {case}", description)))
    return made


def _encoder_style(r: Result) -> tuple[str, str]:
    if r.format == "layers":
        return (THIRD, "s") if "block influence" in r.impl else (FOURTH, "X")
    return (DENSE, "o") if r.format == "dense" else (FIRST if r.dtype == "float32" else SECOND, "o")


def _encoder_label(r: Result) -> str:
    short = {"float32": "f32", "bfloat16": "bf16"}.get(r.dtype, r.dtype)
    if r.format != "layers":
        return f"{what(r)}{short}".replace(" · ", " ")
    choice = "by influence" if "block influence" in r.impl else "the last"
    return f"{MINUS}{100 * r.sparsity:.0f} % layers, {choice}"


def _nudges(group: Sequence[Result]) -> list[tuple[float, float]]:
    """Offsets of labels in points: labels of points that nearly coincide are spread downwards."""
    placed: list[tuple[float, float]] = []
    offsets = []
    widest = max((r.speedup or 0.0 for r in group), default=1.0)
    for r in group:
        x, y, shift = (r.speedup or 0.0) / widest, r.metrics["cosine"], 0.0
        if r.format != "dense":
            while any(abs(x - px) < 0.3 and abs(y + shift - py) < 0.045 for px, py in placed):
                shift -= 0.045
            placed.append((x, y + shift))
        offsets.append((8.0, shift * 200))
    return offsets


def removal(report: Report) -> list[Plot]:
    """One plot a stack of layers: measured speedup of removing some of them, beside what was to be
    expected."""
    rows = finite(r for r in report.results if r.suite == "layers" and r.speedup is not None)
    made = []
    for case in dict.fromkeys(r.case for r in rows):
        ops = [op for op in ("decode", "prefill") if any(r.case == case and r.op == op for r in rows)]
        if not ops:
            continue
        figure, all_axes = _panels(len(ops), height=3.4)
        told = []
        for axes, op in zip(all_axes, ops, strict=True):
            group = sorted((r for r in rows if r.case == case and r.op == op), key=lambda r: r.sparsity)
            x = [100 * r.sparsity for r in group]
            y = [r.speedup or 0.0 for r in group]
            low = [v - (r.baseline_ms or 0.0) / r.ms_max for v, r in zip(y, group, strict=True)]
            high = [(r.baseline_ms or 0.0) / r.ms_min - v for v, r in zip(y, group, strict=True)]
            axes.errorbar(
                x,
                y,
                yerr=[[max(0.0, v) for v in low], [max(0.0, v) for v in high]],
                color=THIRD,
                marker="o",
                markersize=5,
                linewidth=1.8,
                capsize=3,
                label="measured",
            )
            expected = [r.metrics.get("predicted_speedup", math.nan) for r in group]
            axes.plot(x, expected, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="predicted")
            axes.set_title(op, loc="left", color=INK)
            axes.set_xlabel("layers removed, %")
            axes.set_ylabel("speedup over the whole stack")
            axes.legend(loc="upper left", frameon=False, labelcolor=INK)
            told += [
                f"{op}, {a:.0f} % removed: {b:.2f} times, predicted {c:.2f}"
                for a, b, c in zip(x, y, expected, strict=True)
            ]
        description = f"{case}: speedup of removing layers. " + "; ".join(told)
        made.append(Plot(case, description, _svg(figure, f"layers {case}", description)))
    return made


def finite(results: Iterable[Result]) -> list[Result]:
    """Those with a usable time, and whose speedup, if there is one, is a number."""
    return [
        r
        for r in results
        if math.isfinite(r.ms)
        and r.ms > 0
        and (r.speedup is None or math.isfinite(r.speedup))
        and math.isfinite(r.metrics.get("cosine", 0.0))
    ]


def digits(value: float) -> str:
    """Three digits, or all of the whole number where it has more."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def what(r: Result) -> str:
    """The format with its sparsity and a separator, e.g. ``bitmap 80 % · ``; empty where there is none."""
    if r.format == "none":
        return ""
    if r.format in ("dense", "2:4"):
        return f"{r.format} · "
    return f"{r.format} {MINUS if r.format == 'layers' else ''}{100 * r.sparsity:.0f} % · "


def _panels(count: int, *, height: float) -> tuple[Any, Sequence[Any]]:
    """A figure with ``count`` panels side by side, 4.6 inches each (7 for one), without frames."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0 if count == 1 else 5.2 * count, height), layout="constrained")
    all_axes = [figure.add_subplot(1, count, place + 1) for place in range(count)]
    for axes in all_axes:
        axes.set_facecolor("none")
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.tick_params(colors=MUTED, length=0, labelsize=9)
        axes.xaxis.label.set_color(MUTED)
        axes.yaxis.label.set_color(MUTED)
    return figure, all_axes


def _bars(
    axes: Any,
    labels: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    colours: Sequence[str],
    ends: Sequence[float] | None = None,
) -> None:
    """Horizontal bars, the first on top, each with its text beyond its end, or beyond ``ends`` where
    given."""
    places = range(len(values))
    axes.barh(places, values, color=list(colours), height=0.62)
    axes.set_yticks(list(places), labels)
    axes.tick_params(axis="y", colors=INK)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    for place, end, text in zip(places, ends or values, texts, strict=True):
        axes.annotate(
            text, (end, place), xytext=(5, 0), textcoords="offset points", va="center", color=INK, fontsize=8.5
        )


def _svg(figure: Any, salt: str, description: str) -> str:
    """The figure as an ``<svg>`` element: no prologue, no fixed size, colours as CSS variables, ids of its
    own."""
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9.5}
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    # The style element inside an SVG would hold for the whole page.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    width = re.search(r'viewBox="0 0 ([\d.]+)', text)
    # A point of the drawing is a third more than a CSS pixel; wider than that it would only look coarse.
    most = f' style="max-width:{float(width[1]) * 4 / 3:.0f}px"' if width else ""
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    return text.replace("<svg ", f'<svg role="img" {_label(description)}{most} ', 1)


def _label(description: str) -> str:
    return f'aria-label="{escape(description, quote=True)}"'
