"""Generated parts of pages: ``python -m pyfast.bench.readme README.md docs/results.md RESULTS.json [MORE.json]``.

Rewrites, in each page, what stands between the markers of a block (``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``):
``summary`` (the answer in a few figures, from the JSON files, each file with its device named), ``results`` (all of
their tables) and ``backends`` (which backend serves which op). The plots of a summary are written beside its JSON file.
With ``--check`` nothing is written, and the exit code is 1 where a page, or what a plot tells, differs from what would
be.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from os.path import relpath
from pathlib import Path

from pyfast.bench import headline, plots, runner, tables
from pyfast.bench.breakeven import break_even_text, speedup_points, stays_dense
from pyfast.bench.plots import Plot
from pyfast.bench.schema import Report, Result

_TOKENS = {"cpu": (1, 16, 128), "cuda": (1, 8, 32, 512)}


def update(text: str, reports: Sequence[Report], ops: Iterable[tuple[str, str]], folders: Sequence[str] = ()) -> str:
    """The text of a page with its blocks made anew. ``ops`` are pairs of op and backend in priority order, ``folders``
    the places of the reports' plots, as the page has to link them. Raises ValueError where a marker is doubled, alone
    or out of order, or the page has no block."""
    blocks: dict[str, Callable[[], str]] = {
        "summary": lambda: "\n\n".join(summary(*each) for each in zip_longest(reports, folders)),
        "results": lambda: "\n\n".join(results(report) for report in reports),
        "backends": lambda: backends(ops),
    }
    present = [name for name in blocks if f"<!-- {name}:" in text]
    if not present:
        raise ValueError(f"page: has none of the blocks {', '.join(blocks)}")
    for name in present:
        text = replace_block(text, name, blocks[name]())
    return text


def replace_block(text: str, name: str, content: str) -> str:
    """The text with ``content`` between the markers of a block."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"page: one {begin} and after it one {end} were expected")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{content}\n{end}{tail}"


def pictures(report: Report) -> dict[str, Plot]:
    """The plots of a summary by the names of their files: of the first weight and of the first model."""
    chosen = {"speedup": plots.speedup_by_sparsity(report)[:1], "model": plots.model_rates(report)[:1]}
    return {f"{name}.svg": plot for name, found in chosen.items() for plot in found}


def summary(report: Report, folder: str | None = None) -> str:
    """Markdown of one report: a paragraph on the device, the findings, the plots in ``folder``, and the bars that are
    missed."""
    found = [[each.question, f"**{each.figure}**", each.sentence] for each in headline.findings(report)]
    parts = [_about(report), markdown(["question", "answer", "in full"], found, right=1) if found else ""]
    if folder is not None:
        parts += [f"![{plot.description}]({folder}/{name})" for name, plot in pictures(report).items()]
    decided = [bar for bar in report.bars if bar.met is not None]
    missed = [f"{b.name}: {tables.measured_text(b)} ({tables.required_text(b)})" for b in decided if not b.met]
    if decided:
        met = f"Of the project's own bars {len(decided) - len(missed)} of {len(decided)} are met."
        parts += [f"{met} Missed:" if missed else met, "\n".join(f"- {line}" for line in missed)]
    return "\n\n".join(part for part in parts if part)


def results(report: Report) -> str:
    """Markdown of one report: a paragraph on the device, then a table a suite, then the bars."""
    parts = [_about(report)]
    parts += [part for part in (_losses(report), _sparse(report)) if part]
    parts += [_others(report, suite) for suite in ("layers", "model") if report.select(suite=suite)]
    parts += [_bars(report)] if report.bars else []
    return "\n\n".join(parts)


def _about(report: Report) -> str:
    """The device of a report, what it can do at best, and the commit that was measured."""
    e = report.environment
    if e.get("device_type") == "cuda":
        about = f"**{e.get('device')}**: torch {e.get('torch')}, CUDA {e.get('cuda')}, Triton {e.get('triton')}"
        dense = f"dense bfloat16 at {e.get('dense_bf16_gflops', 0) / 1e3:.0f} TFLOP/s"
    else:
        about = f"**{e.get('device')}**: {e.get('threads')} threads, torch {e.get('torch')}"
        about += f", kernels {e['isa']}" if e.get("isa") else ""
        dense = f"dense float32 at {e.get('dense_gflops', 0):.0f} GFLOP/s"
    if "copy_gbps" in e:
        about += f"; copies at {e['copy_gbps']:.0f} GB/s, {dense}"
    return about + (f" (commit {e['commit']})." if e.get("commit") else ".")


def backends(ops: Iterable[tuple[str, str]]) -> str:
    """A table of ops by backends; a cell holds the place in the priority order."""
    order: dict[str, list[str]] = {}
    for op, backend in ops:
        order.setdefault(op, []).append(backend)
    names = list(dict.fromkeys(name for row in order.values() for name in row))
    rows = [[f"`{op}`", *(str(row.index(n) + 1) if n in row else "-" for n in names)] for op, row in order.items()]
    return markdown(["op", *names], rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: int | None = None) -> str:
    """A Markdown table; the first column to the left, ``right`` columns after it (None: all of them) to the right."""
    to_the_right = len(header) - 1 if right is None else right
    rule = ["---", *["---:"] * to_the_right, *["---"] * (len(header) - 1 - to_the_right)]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _losses(report: Report) -> str:
    """The forward KL with everyone that was measured, then a line for each other loss."""
    forward: list[Result] = []
    others: list[Result] = []
    for r in report.select(suite="losses"):
        (forward if r.op == "distill_kl" and r.case in ("loss+gradient", "loss") else others).append(r)
    absent = "; ".join(dict.fromkeys(r.note for r in (*forward, *others) if r.impl == "pyfast" and r.note))
    parts = [_forward_kl(forward), _other_losses(others), f"({absent})" if absent else ""]
    return "\n\n".join(part for part in parts if part)


def _forward_kl(results: Iterable[Result]) -> str:
    rows = []
    for r in results:
        rows.append(
            [
                f"{r.case}, {'x'.join(map(str, r.shape))} {r.dtype}",
                r.impl,
                f"{r.ms:.3g}",
                tables.percent(r.of_floor),
                tables.speedup_text(r, None),
                _extra_memory(r),
            ]
        )
    header = [
        "forward KL, T = 4",
        "implementation",
        "ms",
        "of floor",
        "against eager",
        "memory beyond the gradient",
    ]
    return markdown(header, rows) if rows else ""


# What a loss is compared with beside eager and torch.compile, by the metric that holds the ratio.
_COMPARED = {"speedup_vs_full_kl": "full KL", "speedup_vs_products": "its products alone"}


def _other_losses(results: Sequence[Result]) -> str:
    """pyfast's results alone, each beside the memory that eager takes."""
    eager = {(r.case, tuple(r.shape), r.dtype): r for r in results if r.impl == "eager"}
    rows = []
    for r in results:
        if r.impl != "pyfast":
            continue
        same = eager.get((r.case, tuple(r.shape), r.dtype))
        compiled = r.metrics.get("speedup_vs_compile")
        also = [f"{r.metrics[metric]:.2f}x {name}" for metric, name in _COMPARED.items() if metric in r.metrics]
        rows.append(
            [
                f"{r.case.removesuffix(' loss+gradient')}, {'x'.join(map(str, r.shape))} {r.dtype}",
                f"{r.ms:.3g}",
                tables.percent(r.of_floor),
                ", ".join([tables.speedup_text(r, None), *also]),
                "-" if compiled is None else f"{compiled:.2f}x",
                f"{_extra_memory(r)} ({_extra_memory(same) if same else '-'})",
            ]
        )
    header = [
        "other losses, with gradients",
        "ms",
        "of floor",
        "against eager",
        "against torch.compile",
        "extra memory (eager's)",
    ]
    return markdown(header, rows) if rows else ""


def _extra_memory(r: Result) -> str:
    memory = r.metrics.get("extra_bytes")
    return "-" if memory is None else f"{memory / 1e6:.0f} MB"


def _sparse(report: Report) -> str:
    found = [r for r in report.select(suite="sparse", op="sparse_linear") if r.format != "dense"]
    candidates = _TOKENS[str(report.environment.get("device_type", "cpu"))]
    tokens = [t for t in candidates if any(r.tokens == t for r in found)]
    rows = []
    for shape in tables.sparse_shapes(found):
        size = "x".join(map(str, shape))
        here = [r for r in found if r.shape == shape]
        for line in dict.fromkeys((r.impl, tables.format_text(r), r.dtype) for r in here):
            cells: dict[int, Result] = {r.tokens: r for r in here if (r.impl, tables.format_text(r), r.dtype) == line}
            speedups = [_both_speedups(cells[t]) if t in cells else "-" for t in tokens]
            name = line[1] if line[0] == "pyfast" else f"{line[1]} ({line[0]})"
            rows.append([f"{size} {line[2]}", name, *speedups])
        for dtype in dict.fromkeys(r.dtype for r in here):
            points = [speedup_points(here, shape=shape, tokens=t, dtype=dtype) for t in tokens]
            if any(len(p) > 1 for p in points):
                pays = [break_even_text(p) if p else "-" for p in points]
                rows.append([f"{size} {dtype}", "bitmap pays from", *pays])
    if not rows:
        return ""
    table = markdown(["weight", "format", *(f"{t} token{'s' if t > 1 else ''}" for t in tokens)], rows)
    text = "Speedup over the fastest dense linear of any library and dtype (in brackets: of the same dtype)"
    text += ", or dense where the plan stays so"
    return f"{text}; cold weights:\n\n{table}"


def _both_speedups(r: Result) -> str:
    if stays_dense(r):
        return "dense"
    same = r.metrics.get("speedup_same_dtype")
    return (f"{r.speedup:.2f}x" if r.speedup else "-") + (f" ({same:.2f}x)" if same else "")


def _others(report: Report, suite: str) -> str:
    shown = report.select(suite=suite)
    metrics = [name for name in tables.metric_names(shown) if any(name in r.metrics for r in shown)][:4]
    rows = [
        [
            f"{r.case} {r.op}",
            r.impl,
            tables.format_text(r),
            r.dtype,
            f"{r.ms:.3g}",
            tables.speedup_text(r, None),
            *(tables.figure(m, r.metrics[m]) if m in r.metrics else "-" for m in metrics),
        ]
        for r in shown
    ]
    notes = "; ".join(dict.fromkeys(r.note for r in shown if r.note))
    header = [
        suite,
        "implementation",
        "format",
        "dtype",
        "ms",
        "speedup",
        *(m.replace("_", " ") for m in metrics),
    ]
    return markdown(header, rows) + (f"\n\n({notes})" if notes else "")


def _bars(report: Report) -> str:
    words = {True: "yes", False: "no", None: "not decided"}
    decided = [b for b in report.bars if b.met is not None]
    if not decided:
        return f"None of the {len(report.bars)} bars is decided: {report.bars[0].note}."
    rows = [[b.name, tables.required_text(b), tables.measured_text(b), words[b.met]] for b in report.bars]
    return markdown(["bar", "required", "measured", "met"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pyfast.bench.readme", description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="pages (.md), and JSON files written by pyfast bench")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page differs")
    given = parser.parse_args(arguments)
    from pyfast import backends as served

    pages = [path for path in given.files if path.suffix == ".md"]
    try:
        if not pages or len(pages) == len(given.files):
            raise ValueError("files: got no page, or no figures; accepted: .md files and JSON files")
        figures = [path for path in given.files if path not in pages]
        reports = [runner.read(path) for path in figures]
        ops = [(row.op, row.backend) for row in served.op_table()]
        before = {page: page.read_text(encoding="utf-8") for page in pages}
        after = {
            page: update(text, reports, ops, [relpath(path.parent, page.parent) for path in figures])
            for page, text in before.items()
        }
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    drawn = {
        path.parent / name: plot
        for path, report in zip(figures, reports, strict=True)
        for name, plot in pictures(report).items()
    }
    stale = [path for path, plot in drawn.items() if not _tells(path, plot)]
    changed = [page for page in pages if before[page] != after[page]]
    for page in changed:
        if given.check:
            lines = difflib.unified_diff(
                before[page].splitlines(), after[page].splitlines(), "present", "generated", lineterm=""
            )
            print("\n".join(lines), file=sys.stderr)
        else:
            page.write_text(after[page], encoding="utf-8")
    for path in stale:
        if given.check:
            print(f"{path}: is missing, or tells of other figures", file=sys.stderr)
        else:
            path.write_text(plots.standalone(drawn[path]), encoding="utf-8")
    return 1 if given.check and (changed or stale) else 0


def _tells(path: Path, plot: Plot) -> bool:
    """Whether a file holds a plot of the same figures; how it is drawn differs between versions of matplotlib."""
    return path.is_file() and plots.label(plot) in path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
