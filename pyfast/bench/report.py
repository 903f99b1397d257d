"""A report as one self-contained HTML page: the answer first, then plots and tables, nothing loaded from
elsewhere."""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pyfast.bench import headline, plots, tables
from pyfast.bench.options import SUITES
from pyfast.bench.page_style import SCRIPT, STYLE
from pyfast.bench.plots import TIMES, Plot
from pyfast.bench.schema import Bar, Report, Result

NAME = "index.html"
_NONE = "\N{EN DASH}"
_ABOUT = {
    "losses": "The fused distillation losses beside eager torch, torch.compile and other libraries: divergences of "
    "logits (the forward KL where none is named), top-k, attention, and hidden states times head. E bytes in one "
    "tensor of logits make a floor of 3E for loss and gradient: both are read, the gradient is written. The floors of "
    "attention and of the fused linear loss are arithmetic.",
    "sparse": "One linear layer with cold weights. The baseline is the fastest dense linear of any library and dtype "
    "in the same case, timed in turn with the others.",
    "layers": "A stack of layers of a real width, with its embedding and head, cut shorter and shorter. The "
    "prediction counts the head, which stays.",
    "model": "Whole models. The baseline is the fastest dense model of any library and dtype. Pruned weights are "
    "pruned in one shot, without training afterwards.",
}


def write(report: Report, directory: Path) -> Path:
    """Write the page of ``report`` into ``directory``, which is made where it is missing.

    Args:
        report: any report, an empty one included; figures that are missing or not finite are shown as
        missing.
        directory: where ``index.html`` is put, whole or not at all.

    Returns:
        The path of the page.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / NAME
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{NAME}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(render(report))
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target


def render(report: Report) -> str:
    """The page as text."""
    present = [suite for suite in SUITES if report.select(suite=suite)]
    others = [s for s in dict.fromkeys(r.suite for r in report.results) if s not in SUITES]
    device = str(report.environment.get("device") or "this machine")
    title = f"What compression buys on {device}"
    links = [("machine", "machine"), ("bars", "bars"), *((s, s) for s in (*present, *others))]
    navigation = "".join(f'<a href="#{escape(to)}">{escape(text)}</a>' for to, text in links)
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n",
            f"<header><h1>{escape(title)}</h1>{_lead(report)}<nav aria-label='Sections'>{navigation}</nav></header>",
            f"<main>\n{_findings(report)}{_machine(report.environment)}{_bars(report.bars)}",
            *(_suite(report, suite) for suite in (*present, *others)),
            _missing([suite for suite in SUITES if suite not in present]),
            f"</main>\n{_footer(report)}\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def _lead(report: Report) -> str:
    if not report.results:
        return '<p class="lead">This report holds no results yet.</p>'
    e = report.environment
    parts = [f"{len(report.results)} results, each beside the best dense baseline of the same run"]
    if e.get("threads"):
        parts.append("1 thread" if e["threads"] == 1 else f"{e['threads']} threads")
    if e.get("isa"):
        parts.append(f"kernels for {e['isa']}")
    if e.get("date"):
        parts.append(str(e["date"]))
    return f'<p class="lead">{escape(". ".join((parts[0], ", ".join(parts[1:]))).strip(". "))}.</p>'


def _findings(report: Report) -> str:
    found = headline.findings(report)
    if not found:
        return ""
    kinds = {True: "gain", False: "loss", None: ""}
    items = "".join(
        f'<li class="{kinds[f.good]}"><p class="question">{escape(f.question)}</p>'
        f'<p class="figure">{escape(f.figure)}</p><p class="sentence">{escape(f.sentence)}</p></li>\n'
        for f in found
    )
    return f'<ul class="findings" aria-label="Key figures">\n{items}</ul>\n'


def _machine(environment: Mapping[str, Any]) -> str:
    entries = "".join(
        f"<dt>{escape(_environment_name(key))}</dt><dd>{escape(_environment_text(key, value))}</dd>\n"
        for key, value in environment.items()
    )
    inner = f'<dl class="machine">\n{entries}</dl>' if entries else '<p class="empty">Nothing was recorded.</p>'
    return f'<h2 id="machine">The machine</h2>\n{inner}\n'


def _environment_name(key: str) -> str:
    """The key in words, without the unit that stands beside the value."""
    for unit in ("_gbps", "_gflops", "_bytes"):
        key = key.removesuffix(unit)
    return key.replace("_", " ")


def _environment_text(key: str, value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return _NONE
    if key.endswith("_gbps"):
        return f"{value} GB/s"
    if key.endswith("_gflops"):
        return f"{value} GFLOP/s"
    if key.endswith("_bytes") and isinstance(value, int | float):
        return f"{value / 2**20:.0f} MiB"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or _NONE
    return str(value)


def _bars(bars: Sequence[Bar]) -> str:
    if not bars:
        return '<h2 id="bars">The bars</h2>\n<p class="empty">This run judged none.</p>\n'
    words = {True: ("met", "gain"), False: ("not met", "loss"), None: ("undecided", "")}
    rows = []
    for bar in bars:
        word, kind = words[bar.met]
        measured = bar.measured if bar.measured is not None and math.isfinite(bar.measured) else None
        rows.append(
            f"<tr><td>{escape(bar.name)}</td>"
            + _number(bar.required, tables.required_text(bar))
            + _number(measured, _NONE if measured is None else tables.measured_text(bar))
            + f'<td class="w {kind}">{word}</td><td class="note">{escape(bar.note)}</td></tr>\n'
        )
    heads: list[str | tuple[str, str]] = ["bar", ("required", "n"), ("measured", "n"), "met", "note"]
    text = "<p>What the project asks of itself; each is judged where the run could tell.</p>"
    return f'<h2 id="bars">The bars</h2>\n{text}{_table("bars-table", "Bars", heads, rows)}'


def _suite(report: Report, suite: str) -> str:
    rows = report.select(suite=suite)
    parts = [f'<h2 id="{escape(suite)}">{escape(suite.capitalize())}</h2>\n']
    if suite in _ABOUT:
        parts.append(f"<p>{escape(_ABOUT[suite])}</p>\n")
    parts.append(_suite_plots(report, suite))
    parts.append(_losing(rows))
    parts.append(_results(suite, rows))
    return "".join(parts)


def _suite_plots(report: Report, suite: str) -> str:
    if suite == "losses":
        return _plots("Time against the floor", _floor_key(), _about(plots.of_floor(report), "Losses"))
    if suite == "sparse":
        key = (
            _swatches((("c1", "1 token"), ("c2", "16 tokens"), ("c3", "128 tokens")))
            + "lines are bitmap, diamonds 2:4, rings the break-even; shaded is slower than dense"
        )
        speedups = _plots("Speedup against sparsity", key, plots.speedup_by_sparsity(report), wide=True)
        return speedups + _plots("Time against the floor", _floor_key(), _about(plots.of_floor(report), "Sparse"))
    if suite == "layers":
        key = "measured with its spread, and predicted from bytes (decode) or operations (prefill)"
        return _plots("Measured and predicted", key, plots.removal(report), wide=True)
    if suite == "model":
        rates = _swatches((("dense", "dense"), ("c1", "sparse"), ("c3", "layers removed"))) + "tick: predicted"
        colours = ("c1", "c2", "c3", "c4", "dense")
        meanings = ("sparse, float32", "sparse, bfloat16", "layers removed by block influence")
        quality = _swatches(zip(colours, (*meanings, "the last layers removed", "dense"), strict=True))
        return _plots("Tokens a second", rates, plots.model_rates(report), wide=True) + _plots(
            "Speed and what is left of the embeddings", quality, plots.encoder_quality(report), wide=True
        )
    return ""


def _about(made: Iterable[Plot], what: str) -> list[Plot]:
    return [plot for plot in made if plot.title.startswith(what)]


def _floor_key() -> str:
    return _swatches((("c1", "pyfast"), ("dense", "others"))) + "dashed: the floor"


def _swatches(named: Iterable[tuple[str, str]]) -> str:
    """Coloured squares with their meaning, as HTML; names are this module's own."""
    return "".join(f'<span class="swatch" style="background:var(--{c})"></span>{n}' for c, n in named) + "; "


def _plots(title: str, key: str, made: Sequence[Plot], *, wide: bool = False) -> str:
    if not made:
        return ""
    figures = "".join(f"<figure><figcaption>{escape(plot.title)}</figcaption>{plot.svg}</figure>\n" for plot in made)
    return (
        f'<h3>{escape(title)}</h3>\n<p class="key">{key.strip("; ")}</p>\n'
        f'<div class="plots{" wide" if wide else ""}">\n{figures}</div>\n'
    )


def _losing(rows: Sequence[Result]) -> str:
    lost = sorted(headline.lost(plots.finite(rows)), key=lambda r: r.speedup or 0.0)
    if not lost:
        return ""
    items = "".join(f"<li>{escape(_losing_text(r))}</li>\n" for r in lost)
    count = "1 case" if len(lost) == 1 else f"{len(lost)} cases"
    return f"<details><summary>Where compression loses here: {count}</summary>\n<ul>{items}</ul></details>\n"


def _losing_text(r: Result) -> str:
    size = TIMES.join(map(str, r.shape))
    return f"{r.speedup:.2f}{TIMES}: {r.op}, {r.case}, {size}, {r.tokens} tokens, {plots.what(r)}{r.dtype}, {r.impl}"


def _results(suite: str, rows: Sequence[Result]) -> str:
    named = tables.metric_names(rows)
    errors = any(r.error is not None for r in rows)
    notes = any(r.note for r in rows)
    heads: list[str | tuple[str, str]] = ["op", "case", ("shape", "n"), ("tokens", "n"), "format", "dtype"]
    heads += ["implementation", ("ms", "n"), ("10 to 90 %", "n"), ("speedup", "n"), "baseline", ("of floor", "n")]
    heads += [("error", "n")] if errors else []
    heads += [(metric.replace("_", " "), "n") for metric in named]
    heads += ["note"] if notes else []
    lines = []
    for r in rows:
        cells = [f'<td class="w">{escape(r.op)}</td><td class="w">{escape(r.case)}</td>']
        cells += [_number(math.prod(r.shape), TIMES.join(map(str, r.shape))), _number(r.tokens, str(r.tokens))]
        cells += [f'<td class="w">{escape(text)}</td>' for text in (tables.format_text(r), r.dtype, r.impl)]
        cells += [
            _number(r.ms, plots.digits(r.ms)),
            _number(r.ms_max - r.ms_min, f"{plots.digits(r.ms_min)} to {plots.digits(r.ms_max)}"),
        ]
        cells += [_speedup(r, rows), f'<td class="w">{escape(r.baseline or _NONE)}</td>']
        cells.append(_number(r.of_floor, tables.percent(r.of_floor)))
        cells += [_number(r.error, "{:.1e}")] if errors else []
        for metric in named:
            figure = r.metrics.get(metric)
            cells.append(_number(figure, _NONE if figure is None else tables.figure(metric, figure)))
        cells += [f'<td class="note">{escape(r.note)}</td>'] if notes else []
        ours = ' class="ours"' if headline.compressed(r) else ""
        lines.append(f"<tr{ours}>{''.join(cells)}</tr>\n")
    name = f"{suite}-table"
    search = (
        f'<input type="search" hidden placeholder="Filter rows" aria-label="Filter the rows of {escape(suite)}" '
        f'aria-controls="{escape(name)}">\n'
    )
    return f"<h3>All figures</h3>\n{search}{_table(name, f'Results of {suite}', heads, lines)}"


def _speedup(r: Result, rows: Sequence[Result]) -> str:
    """The cell of the speedup: a word beside the colour where it loses, or where the spread hides the
    difference."""
    if r.speedup is None or not math.isfinite(r.speedup):
        return _number(None, _NONE)
    noise = any(
        other.ms == r.baseline_ms and r.baseline in (other.impl, f"{other.impl} {other.dtype}") and r.is_noise(other)
        for other in rows
        if other is not r and (other.op, other.case, other.tokens) == (r.op, r.case, r.tokens)
    )
    word = " (noise)" if noise else " (slower)" if r.speedup < 1 else ""
    kind = "" if noise or not headline.compressed(r) else "gain" if r.speedup >= 1 else "loss"
    return _number(r.speedup, f"{r.speedup:.2f}{TIMES}{word}", kind)


def _number(value: float | None, text: str, kind: str = "") -> str:
    """A cell aligned right that sorts by ``value``; ``text`` may be a format for it."""
    if value is None or not math.isfinite(value):
        return f'<td class="n" data-v="NaN">{_NONE}</td>'
    shown = text.format(value) if "{" in text else text
    return f'<td class="n{" " + kind if kind else ""}" data-v="{value:.9g}">{escape(shown)}</td>'


def _table(name: str, label: str, heads: Sequence[str | tuple[str, str]], rows: Sequence[str]) -> str:
    cells = []
    for head in heads:
        text, kind = head if isinstance(head, tuple) else (head, "")
        attribute = f' class="{kind}"' if kind else ""
        cells.append(f'<th scope="col"{attribute}><button type="button">{escape(text)}</button></th>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="sortable" id="{escape(name)}">\n<thead><tr>{"".join(cells)}</tr></thead>\n'
        f"<tbody>\n{''.join(rows)}</tbody></table></div>\n"
    )


def _missing(suites: Sequence[str]) -> str:
    if not suites:
        return ""
    listed = ", ".join(suites)
    return (
        f'<h2 id="missing">Not in this report</h2>\n<p class="empty">No results of {escape(listed)}: '
        f"<code>pyfast bench {escape(' '.join(suites))}</code> measures them.</p>\n"
    )


def _footer(report: Report) -> str:
    try:
        data = base64.b64encode(report.to_json().encode()).decode()
        link = f'<a download="report.json" href="data:application/json;base64,{data}">The figures as JSON</a>. '
    except ValueError:  # a figure that JSON cannot hold: the page still shows all the others
        link = ""
    return (
        f"<footer><p>{link}Times are medians, with the 10th and the 90th percentile; implementations were timed in "
        "turn in one process. A difference within the spread is called noise. Generated by pyfast.</p></footer>"
    )
