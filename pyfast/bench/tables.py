"""Tables for the terminal, made from a report."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyfast.bench.breakeven import break_even_text, predicted_points, speedup_points
from pyfast.bench.schema import Bar, Report, Result


def suite(report: Report, name: str) -> RenderableType:
    """Everything that a suite found. The suite ``sparse`` begins with its speedups by number of tokens."""
    results = report.select(suite=name)
    parts: list[RenderableType] = []
    if name == "sparse":
        parts += [speedups(results, shape) for shape in sparse_shapes(results)]
        results = [r for r in results if r.op != "sparse_linear"]
    parts += [details(f"{name}: {op} {case}", group) for (op, case), group in _by_case(results).items()]
    return Group(*parts)


def details(title: str, results: Iterable[Result]) -> Table:
    """One line a result: time and spread, share of the floor, speedup over the baseline, error."""
    rows = list(results)
    table = Table(title=title, title_justify="left", title_style="bold")
    optional = {
        "tokens": len({r.tokens for r in rows}) > 1 and any(r.tokens != r.shape[0] for r in rows),
        "format": any(r.format != "none" for r in rows),
        "error": any(r.error is not None for r in rows),
        "floor": any(r.of_floor is not None for r in rows),
    }
    table.add_column("shape")
    if optional["tokens"]:
        table.add_column("tokens", justify="right")
    if optional["format"]:
        table.add_column("format")
    table.add_column("dtype")
    table.add_column("implementation")
    table.add_column("ms", justify="right")
    table.add_column("10-90 %", justify="right")
    if optional["floor"]:
        table.add_column("of floor", justify="right")
    table.add_column("speedup", justify="right")
    if optional["error"]:
        table.add_column("error", justify="right")
    named = metric_names(rows)
    for metric in named:
        table.add_column(metric.replace("_", " "), justify="right")
    notes = list(dict.fromkeys(r.note for r in rows if r.note))
    if notes:
        table.add_column("note", justify="right")
        table.caption = "\n".join(f"{number}  {note}" for number, note in enumerate(notes, 1))
        table.caption_justify = "left"
    for r in rows:
        cells = ["x".join(map(str, r.shape))]
        cells += [str(r.tokens)] if optional["tokens"] else []
        cells += [format_text(r)] if optional["format"] else []
        cells += [r.dtype, r.impl, f"{r.ms:.3g}", f"{r.ms_min:.3g}-{r.ms_max:.3g}"]
        cells += [percent(r.of_floor)] if optional["floor"] else []
        cells.append(speedup_text(r, _baseline_of(r, rows)))
        cells += [f"{r.error:.1e}" if r.error is not None else "-"] if optional["error"] else []
        cells += [figure(metric, r.metrics[metric]) if metric in r.metrics else "-" for metric in named]
        cells += [str(notes.index(r.note) + 1) if r.note else ""] if notes else []
        table.add_row(*map(Text, cells), style="bold" if r.impl == "pyfast" else "")
    return table


def sparse_shapes(results: Iterable[Result]) -> list[list[int]]:
    """The shapes of the suite ``sparse``, in order of appearance."""
    return [list(s) for s in dict.fromkeys(tuple(r.shape) for r in results if r.op == "sparse_linear")]


def speedups(results: Iterable[Result], shape: list[int]) -> Table:
    """Of one shape: a line a format, sparsity and dtype; for each number of tokens the time and, beside it,
    the speedup over the best dense of any kind and dtype. The last lines tell the break-even sparsities."""
    rows = [r for r in results if r.op == "sparse_linear" and list(r.shape) == shape]
    tokens = sorted({r.tokens for r in rows})
    size = "x".join(map(str, shape))
    table = Table(title=f"sparse: x @ W.T, W {size}, ms (speedup)", title_justify="left", title_style="bold")
    for heading in ("format", "dtype", "implementation"):
        table.add_column(heading)
    table.add_column("MB", justify="right")
    for count in tokens:
        table.add_column(f"{count} token{'s' if count > 1 else ''}", justify="right")
    lines = dict.fromkeys((r.format, r.sparsity, r.dtype, r.impl) for r in rows)
    for line in lines:
        cells: dict[int, Result] = {r.tokens: r for r in rows if (r.format, r.sparsity, r.dtype, r.impl) == line}
        first = next(iter(cells.values()))
        texts = [Text(f"{first.metrics.get('weight_bytes', 0) / 1e6:.1f}")]
        for count in tokens:
            r = cells.get(count)
            texts.append(_timed(r, _baseline_of(r, rows)) if r else Text("-"))
        table.add_row(
            format_text(first),
            first.dtype,
            Text(first.impl),
            *texts,
            style="bold" if first.impl == "pyfast" else "",
        )
    table.add_section()
    for dtype in ("float32", "bfloat16"):
        points = [speedup_points(rows, shape=shape, tokens=count, dtype=dtype) for count in tokens]
        if any(len(p) > 1 for p in points):
            table.add_row("bitmap pays from", dtype, "", "", *map(break_even_text, points))
            predicted = [predicted_points(rows, shape=shape, tokens=count, dtype=dtype) for count in tokens]
            if any(len(p) > 1 for p in predicted):
                table.add_row("by the cost model", f"{dtype} dense", "", "", *map(break_even_text, predicted))
    return table


def bars(found: Iterable[Bar]) -> Table:
    """The project's own bars, each with what was measured."""
    table = Table(title="bars", title_justify="left", title_style="bold")
    table.add_column("bar")
    table.add_column("required", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("met", justify="center")
    table.add_column("note", overflow="fold")
    for bar in found:
        met = {True: Text("yes", "green"), False: Text("no", "bold red"), None: Text("?", "dim")}[bar.met]
        table.add_row(Text(bar.name), required_text(bar), measured_text(bar), met, Text(bar.note))
    return table


def environment(report: Report) -> Table:
    """Where the figures come from, in two columns."""
    e = report.environment
    table = Table.grid(padding=(0, 2))
    table.add_row("device", str(e.get("device")))
    table.add_row("kernels", f"{e.get('isa') or 'reference only'}, {e.get('threads')} threads")
    table.add_row("versions", f"pyfast {e.get('pyfast')}, torch {e.get('torch')}, Python {e.get('python')}")
    if "copy_gbps" in e:
        table.add_row(
            "floors",
            f"copy {e['copy_gbps']:.1f} GB/s, read {e['read_gbps']:.1f} GB/s, dense float32 "
            f"{e['dense_gflops']:.0f} GFLOP/s, bfloat16 {e.get('dense_bf16_gflops', 0):.0f} GFLOP/s",
        )
    cache = e.get("last_level_cache_bytes")
    if cache:
        table.add_row("last-level cache", f"{cache / 2**20:.0f} MiB")
    return table


def format_text(r: Result) -> str:
    """Such as "bitmap 80 %", "2:4", "dense"."""
    if r.format in ("dense", "2:4", "none"):
        return r.format
    return f"{r.format} {r.sparsity * 100:.0f} %"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f} %"


def speedup_text(r: Result, baseline: Result | None) -> str:
    """Such as "2.31x"; "noise" is added where the difference from the baseline is smaller than the spread."""
    if r.speedup is None:
        return "-"
    noisy = baseline is not None and baseline is not r and r.is_noise(baseline)
    return f"{r.speedup:.2f}x{' noise' if noisy else ''}"


def required_text(bar: Bar) -> str:
    return f"{'≤' if bar.at_most else '≥'} {_in_unit(bar.required, bar.unit)}"


def measured_text(bar: Bar) -> str:
    return "-" if bar.measured is None else _in_unit(bar.measured, bar.unit)


def _in_unit(value: float, unit: str) -> str:
    if unit.startswith("of "):
        return f"{value * 100:.1f} % {unit}"
    return f"{value:.2f}x" if unit == "x" else f"{value:.0f} {unit}"


def figure(metric: str, value: float) -> str:
    """A metric for people: bytes in MB, the rest with three digits."""
    if metric.endswith("bytes"):
        return f"{value / 1e6:.1f} MB"
    if "error" in metric:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


# The metrics that a terminal has room for; the JSON and the page hold them all.
_SHOWN = (
    "tokens_per_s",
    "weight_bytes",
    "peak_bytes",
    "extra_bytes",
    "predicted_speedup",
    "speedup_vs_compile",
    "speedup_vs_full_kl",
    "speedup_vs_products",
    "cosine",
    "mweights_per_s",
)


def metric_names(results: Iterable[Result]) -> list[str]:
    """The names of the metrics of the results that are shown, in order of appearance."""
    return [m for m in dict.fromkeys(metric for r in results for metric in r.metrics) if m in _SHOWN]


def _timed(r: Result, baseline: Result | None) -> Text:
    text = Text(f"{r.ms:.3g} ({speedup_text(r, baseline)})")
    if r.speedup is not None and r.speedup >= 1 and r.format != "dense":
        text.stylize("green")
    return text


def _baseline_of(r: Result, rows: Iterable[Result]) -> Result | None:
    """The result of the same case that ``r.baseline`` names, as "impl" or "impl dtype"."""
    for other in rows:
        same_case = (other.op, other.case, other.shape, other.tokens) == (r.op, r.case, r.shape, r.tokens)
        names = (other.impl, f"{other.impl} {other.dtype}")
        if same_case and r.baseline in names and other.ms == r.baseline_ms:
            return other
    return None


def _by_case(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        groups.setdefault((r.op, r.case), []).append(r)
    return groups
