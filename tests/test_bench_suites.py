"""The suites losses and sparse, the runner, the tables and the generated README."""

from __future__ import annotations

import gc
import math
import weakref
from functools import partial
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from bench_samples import FLOORS, loss_result, other_losses, report, result
from rich.console import Console

from pyfast import _native
from pyfast.bench import bars, baselines, hardware, headline, plots, readme, runner, tables
from pyfast.bench.cases import is_pyfast, keep_runnable, relative_error
from pyfast.bench.options import Options
from pyfast.bench.progress import Progress
from pyfast.bench.schema import Bar, Report, Result
from pyfast.bench.suites import losses, losses_attention, losses_linear, losses_topk, sparse
from pyfast.bench.timing import ImplementationError
from pyfast.ops._memory import reusable_empty
from pyfast.reference import distill_kl as reference

QUIET = Progress(quiet=True)
PEERS = {"trl", "liger"}  # optional


# --- suites ---


def test_another_librarys_failure_is_said_and_ours_is_raised():
    def broken() -> None:
        raise RuntimeError("no compiler\nmore")

    said: list[str] = []
    kept = keep_runnable({"pyfast": lambda: 1, "torch.compile": broken}, is_pyfast, said.append)
    assert list(kept) == ["pyfast"]
    assert said == ["torch.compile left out: RuntimeError: no compiler"]
    with pytest.raises(ImplementationError, match=r"pyfast\[avx2\]"):
        keep_runnable({"pyfast[avx2]": broken}, is_pyfast, said.append)


def test_relative_error_of_nonsense_is_none():
    truth = torch.ones(4, dtype=torch.float64)
    assert relative_error(torch.full((4,), 1.5), truth) == 0.5
    assert relative_error(torch.tensor([1.0, math.nan, 1, 1]), truth) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("divergence", bars.LOSS_CASES)
def test_the_truth_of_a_loss_case_is_the_references_in_float64(divergence, dtype):
    case = losses.LossCase(6, 50, divergence, dtype=dtype)
    student, teacher = (x.detach().double() for x in case.inputs())
    student.requires_grad_()
    mix = {"jsd": losses.BETA, "skew_kl": losses.ALPHA}.get(divergence, 0.0)
    scale = torch.full((6,), losses.TEMPERATURE**2 / 6, dtype=torch.float64)
    rows, _ = reference.distill_kl(student, teacher, scale, divergence, mix, losses.TEMPERATURE, losses.TEMPERATURE)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    value, first = case.truth()
    torch.testing.assert_close(value, rows.sum().detach())
    torch.testing.assert_close(first, gradient[: len(first)])


TINY = [
    losses.LossCase(8, 300, every_isa=True),
    losses.LossCase(8, 300, gradient=False, dtype="bfloat16"),
    losses.LossCase(8, 300, "reverse_kl"),
    losses.LossCase(8, 300, "jsd", dtype="bfloat16"),
    losses.LossCase(8, 300, "skew_kl"),
    losses_topk.TopKCase(6, 300, k=5),
    losses_topk.TopKCase(6, 300, k=5, dtype="bfloat16"),
    losses_attention.AttentionCase(24, heads=2, width=8),
    losses_linear.LinearCase(6, 16, 300),
    losses_linear.LinearCase(6, 16, 300, "jsd"),
]


@pytest.fixture(scope="module")
def measured_losses():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "every_case", lambda options: TINY)
        # The compiler for C++ would take most of a minute.
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        return losses.run(Options(quick=True), FLOORS, QUIET)


@pytest.mark.parametrize("case", TINY, ids=[case.id for case in TINY])
def test_suite_losses(measured_losses, case):
    found = [r for r in measured_losses[0] if (r.op, r.case, r.dtype) == (case.op, case.task, case.dtype)]
    assert {r.shape == case.shape and r.bytes == case.bytes and r.flops == case.flops for r in found} == {True}
    assert set(case.names) - PEERS <= {r.impl for r in found} <= set(case.names)
    assert {"pyfast", "eager", *case.ratios.values(), *case.beside} <= {r.impl for r in found}
    for r in found:
        if r.impl in case.beside:
            assert r.error is None and r.speedup is None and r.note == case.beside[r.impl]
        else:
            # A peer may compute in the dtype of the logits; pyfast rounds the gradient alone.
            allowed = 1e-5 if r.dtype == "float32" else 0.5 if r.impl in PEERS else 0.01
            assert r.error is not None and r.error < allowed, r
        if r.impl == "eager":
            assert r.speedup == pytest.approx(1.0)
        for ratio, other in case.ratios.items():
            assert r.metrics[ratio] == pytest.approx(next(o.ms for o in found if o.impl == other) / r.ms)


def test_the_losses_declare_what_must_be_moved():
    assert losses.LossCase(8, 300).bytes == 3 * 4 * 8 * 300
    assert losses.LossCase(8, 300, gradient=False, dtype="bfloat16").bytes == 2 * 2 * 8 * 300
    assert losses_topk.TopKCase(6, 300, k=5).bytes == 2 * 4 * 6 * 300


def test_a_report_of_the_losses_names_the_absent_and_survives_json(measured_losses):
    found, judged = measured_losses
    assert len(judged) == 16 and all(b.met is None for b in judged)
    assert Report.from_json(Report(results=found, bars=judged).to_json()).results == found
    notes = {(r.op, r.dtype): r.note for r in found if r.impl == "pyfast" and r.case == "jsd loss+gradient"}
    present = any(r.impl == "trl" for r in found)
    assert notes["distill_kl", "bfloat16"].startswith("" if present else "trl left out: ")
    assert present or notes["distill_kl", "bfloat16"]


def test_eager_is_left_out_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 1000)
    said: list[str] = []
    case = losses_linear.LinearCase(6, 16, 300, say=said.append)
    assert set(case.implementations()) == {"pyfast", losses_linear.PRODUCTS}
    assert len(said) == 1 and said[0].startswith("eager left out: MemoryError: ")


@pytest.mark.parametrize(("format", "sparsity"), [("2:4", 0.5), ("bitmap", 0.8)])
def test_pruning_follows_the_pattern(format, sparsity):
    pruned = sparse.prune(torch.randn(64, 256), format, sparsity)
    assert (pruned == 0).double().mean().item() == pytest.approx(sparsity, abs=0.02)
    if format == "2:4":
        assert ((pruned.reshape(64, -1, 4) != 0).sum(-1) == 2).all()


def test_suite_sparse(monkeypatch):
    variants = tuple(
        sparse.Variant(*v)
        for v in [
            ("2:4", 0.5, "float32"),
            ("bitmap", 0.5, "float32"),
            ("bitmap", 0.9, "bfloat16"),
            ("csr", 0.9, "float32"),
            ("bitmap", 0.5, "float32", "serial"),
        ]
    )
    tried = [sparse.SparseCase((64, 128), tokens, variants) for tokens in (1, 16, 3)]
    monkeypatch.setattr(sparse, "cases", lambda options: tried)
    monkeypatch.setattr(sparse, "conversions", lambda options: [sparse.ConversionCase("to_dense", "bitmap", (64, 128))])
    monkeypatch.setattr(hardware, "last_level_cache_bytes", lambda: 50_000)
    found, judged = sparse.run(Options(quick=True), FLOORS, QUIET)
    linear = [r for r in found if r.op == "sparse_linear"]
    dense = len(baselines.available("cpu"))
    assert [sum(r.tokens == t for r in linear) for t in (1, 16, 3)] == [5 + dense, 4 + dense, 3 + dense]
    for weight in tried[0].weights().sparse.values():
        assert len(weight.ring) * weight.nbytes > 4 * 50_000 and len(weight.ring) > 1
    for r in linear:
        assert r.error is not None and r.error < (1e-5 if r.dtype == "float32" else 0.02), r
        fastest = min(d.ms for d in linear if d.format == "dense" and d.tokens == r.tokens)
        assert r.baseline_ms == fastest and r.speedup == pytest.approx(fastest / r.ms)
    pyfast = next(r for r in linear if r.impl == "pyfast" and r.format == "bitmap" and r.tokens == 3)
    assert pyfast.bytes == pyfast.metrics["weight_bytes"] + 3 * (64 + 128) * 4
    assert pyfast.flops == pytest.approx(2 * 3 * 64 * 128 * 0.5, rel=0.1)
    assert found[-1].op == "to_dense" and found[-1].error == 0.0
    assert pyfast.note.startswith("kernel: ") and pyfast.metrics["predicted_ms"] > 0
    assert [b.met for b in judged] == [None] * 25


def test_every_case_has_its_own_name():
    for options in (Options(), Options(quick=True)):
        for tried in (losses.every_case(options), [*sparse.cases(options), *sparse.conversions(options)]):
            ids = [case.id for case in tried]
            assert len(set(ids)) == len(ids)
            assert all(len(set(case.names)) == len(case.names) for case in tried)


# --- runner, tables, README ---


class FakeSuite:
    def __init__(self, outcome) -> None:
        self.outcome = outcome

    def run(self, options, measured, progress):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome, [Bar("bar", 1.0, 2.0, True)]


@pytest.fixture
def fake_suites(monkeypatch):
    def install(**outcomes):
        modules = {f"pyfast.bench.suites.{name}": FakeSuite(outcome) for name, outcome in outcomes.items()}
        monkeypatch.setattr(runner.importlib, "import_module", modules.__getitem__)
        monkeypatch.setattr(runner.floors, "measure", lambda device, quick: FLOORS)

    return install


def test_figures_are_written_after_each_suite(fake_suites, tmp_path):
    fake_suites(losses=[loss_result("pyfast", 1.0, [4, 4])], sparse=RuntimeError("broken"), layers=[result(3.0)])
    path = tmp_path / "new" / "r.json"
    seen: list[tuple[str, int]] = []

    def on_suite(name: str, so_far: Report) -> None:
        seen.append((name, len(runner.read(path).results)))

    outcome = runner.run(["layers", "losses", "sparse"], Options(), json_path=path, on_suite=on_suite)
    assert seen == [
        ("losses", 1),
        ("layers", 2),
    ]  # the order is the schema's; the broken one costs nothing else
    assert list(outcome.failures) == ["sparse"]
    assert runner.read(path) == outcome.report
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_a_suite_leaves_no_memory_to_the_next(monkeypatch):
    """Neither what waits to be collected nor what is kept for reuse is there when the next suite begins."""
    left, seen = [], []

    class Leaving:
        def run(self, options, measured, progress):
            assert not any(reference() for reference in left)
            seen.append(0 if _native.CPU is None else _native.CPU.kept_memory())
            tensor = reusable_empty(torch.empty(0), 4096, 4096)
            tensor.itself = SimpleNamespace(tensor=tensor)
            left.append(weakref.ref(tensor))
            return [], []

    monkeypatch.setattr(runner.importlib, "import_module", lambda name: Leaving())
    monkeypatch.setattr(runner.floors, "measure", lambda device, quick: FLOORS)
    gc.disable()
    try:
        outcome = runner.run(["losses", "sparse"], Options())
    finally:
        gc.enable()
    assert not outcome.failures and seen[1] == 0


def test_threads_are_set_and_put_back(fake_suites):
    before = torch.get_num_threads()
    fake_suites(losses=[])
    outcome = runner.run(["losses"], Options(threads=1))
    assert outcome.report.environment["threads"] == 1
    assert torch.get_num_threads() == before


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    runner.write(report(), path)
    with pytest.raises(ValueError):
        runner.write(Report(results=[result(math.nan)]), path)
    assert runner.read(path) == report()
    with pytest.raises(ValueError, match=r"gone\.json"):
        runner.read(tmp_path / "gone.json")


def shown(thing) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(thing)
    return console.export_text()


def test_tables_show_the_figures():
    r = report()
    text = shown(tables.suite(r, "sparse"))
    assert "3.2 (1.25x)" in text and "bitmap 70 %" in text
    assert "5 (0.80x)" in text
    assert "59 %" in text  # where the line from 0.8 at 50 % to 1.25 at 70 % crosses 1
    text = shown(tables.suite(r, "losses"))
    assert "pyfast[avx2]" in text and "50 %" in text and "10.00x" in text and "a note" in text
    text = shown(tables.bars(r.bars))
    assert "≥ 1.50x" in text and "2.00x" in text and "≤ 5.0 % of the logits" in text and "20.0 % of the logits" in text
    assert "Some CPU" in shown(tables.environment(r))


def test_noise_is_called_noise():
    dense = result(2.0, impl="F.linear", format="dense", sparsity=0.0, baseline="F.linear float32", baseline_ms=2.0)
    close = result(1.9, baseline="F.linear float32", baseline_ms=2.0)
    far = result(0.5, spread=0.1, sparsity=0.9, baseline="F.linear float32", baseline_ms=2.0)
    text = shown(tables.speedups([dense, close, far], [4096, 4096]))
    assert "1.05x noise" in text and "4.00x)" in text and "1.00x)" in text


README = """# A project
words
<!-- summary:begin -->
<!-- summary:end -->
<!-- results:begin -->
old
<!-- results:end -->
more words
<!-- backends:begin -->
<!-- backends:end -->
"""


def test_readme_is_generated_and_an_edit_is_found(tmp_path, capsys):
    path, figures = tmp_path / "README.md", tmp_path / "r.json"
    path.write_text(README)
    runner.write(report(), figures)
    assert readme.main([str(path), str(figures), "--check"]) == 1
    assert path.read_text() == README
    assert readme.main([str(path), str(figures)]) == 0
    text = path.read_text()
    assert text.startswith("# A project\nwords\n") and "more words" in text and "\nold\n" not in text
    assert "Some CPU" in text and "1.25x" in text and "4.00x" in text and "`distill_kl`" in text
    assert readme.main([str(path), str(figures), "--check"]) == 0
    path.write_text(text.replace("1.25x", "9.25x"))
    capsys.readouterr()
    assert readme.main([str(path), str(figures), "--check"]) == 1
    assert "9.25x" in capsys.readouterr().err


def test_each_page_gets_the_blocks_that_it_has(tmp_path):
    front, page, figures = tmp_path / "README.md", tmp_path / "results.md", tmp_path / "r.json"
    front.write_text("<!-- summary:begin -->\n<!-- summary:end -->\n")
    page.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    runner.write(report(), figures)
    assert readme.main([str(front), str(page), str(figures)]) == 0
    assert "| question | answer | in full |" in front.read_text() and "| weight | format |" in page.read_text()
    assert "| question |" not in page.read_text() and "| weight |" not in front.read_text()
    page.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    assert readme.main([str(front), str(page), str(figures), "--check"]) == 1
    assert readme.main([str(front), str(page)]) == 2 and readme.main([str(figures)]) == 2


def test_plots_lie_beside_their_figures_and_old_ones_are_found(tmp_path):
    page, figures = tmp_path / "docs" / "page.md", tmp_path / "results" / "r.json"
    page.parent.mkdir()
    figures.parent.mkdir()
    page.write_text("<!-- summary:begin -->\n<!-- summary:end -->\n")
    runner.write(report(), figures)
    assert readme.main([str(page), str(figures)]) == 0
    drawn = figures.parent / "speedup.svg"
    (plot,) = readme.pictures(report()).values()
    assert f"![{plot.description}](../results/speedup.svg)" in page.read_text()
    root = ElementTree.fromstring(drawn.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("aria-label") == plot.description
    assert "--c1: #" in drawn.read_text() and "var(--c1)" in drawn.read_text()
    assert readme.main([str(page), str(figures), "--check"]) == 0
    drawn.write_text(drawn.read_text().replace("pays from", "pays at"))
    assert readme.main([str(page), str(figures), "--check"]) == 1
    drawn.unlink()
    assert readme.main([str(page), str(figures), "--check"]) == 1 and not drawn.exists()
    assert readme.main([str(page), str(figures)]) == 0 and drawn.exists()


def test_the_summary_has_the_findings_and_the_missed_bars():
    bars = [Bar.judge("fast", 1.5, 2.0), Bar.judge("lean", 1.5, 1.25), Bar.judge("open", 1.5, None)]
    text = readme.summary(Report({"device": "Some CPU"}, report().results, bars))
    for finding in headline.findings(report()):
        assert f"| {finding.question} | **{finding.figure}** | {finding.sentence} |" in text
    assert "1 of 2 are met. Missed:\n\n- lean: 1.25x (≥ 1.50x)" in text and "fast" not in text and "open" not in text
    assert readme.summary(Report({"device": "Some CPU"}, [], bars[:1])).endswith("1 of 1 are met.")


def test_readme_gives_every_other_loss_a_line():
    text = readme.results(Report({"device": "Some CPU"}, [*report().results, *other_losses()]))
    forward, others = (text[text.index(head) :].split("\n\n")[0] for head in ("| forward KL", "| other losses"))
    assert "| loss+gradient, 512x32000 float32 | pyfast[avx2] | 10 |" in forward and "jsd" not in forward
    assert others.splitlines()[2:] == [
        "| jsd, 512x32000 float32 | 20 | - | 3.00x | 4.25x | 2 MB (4000 MB) |",
        "| top-64, 128x151936 float32 | 20 | - | 3.00x, 2.75x full KL | - | 2 MB (4000 MB) |",
        "| attention, 1x16x2048x64 float32 | 20 | - | 3.00x | - | 2 MB (4000 MB) |",
        "| fused linear forward_kl, 1024x896x151936 float32 | 20 | - | 3.00x, 0.95x its products alone | - "
        "| 2 MB (4000 MB) |",
    ]
    assert text.count("(trl left out: ImportError: trl)") == 1


def test_readme_says_where_the_plan_stays_dense():
    def line(sparsity: float, one: float, many: float, kernel: str) -> list[Result]:
        cells = [(1, one, "kernel: bitmap"), (16, many, kernel)]
        return [result(ms, sparsity=sparsity, tokens=t, note=note, baseline_ms=4.0) for t, ms, note in cells]

    found = [*line(0.5, 5.0, 4.0, "kernel: dense"), *line(0.9, 1.0, 4.0, "kernel: dense")]
    table = readme.results(Report({"device": "Some CPU"}, found)).split("| weight |")[1].split("\n\n")[0]
    assert table.splitlines()[2:] == [
        "| 4096x4096 float32 | bitmap 50 % | 0.80x | dense |",
        "| 4096x4096 float32 | bitmap 90 % | 4.00x | dense |",
        "| 4096x4096 float32 | bitmap pays from | 52 % | - |",
    ]


def test_readme_lists_bars_once_one_is_decided():
    open_bars = [Bar.judge(name, 1.5, None, note="set for another device") for name in ("fast", "lean")]
    text = readme.results(Report({"device": "Some CPU"}, [], open_bars))
    assert "None of the 2 bars is decided: set for another device." in text and "| bar |" not in text
    text = readme.results(Report({"device": "Some CPU"}, [], [*open_bars, Bar.judge("near", 1.5, 2.0)]))
    assert "None of the" not in text and "| near | ≥ 1.50x | 2.00x | yes |" in text and text.count("not decided") == 2


def test_headline_and_plots_take_every_loss():
    mixed = Report({"device": "Some CPU"}, other_losses())
    assert not [f for f in headline.findings(mixed) if f.question == "Fused distillation loss"]
    mixed.results.append(loss_result("pyfast", 5.0, [512, 32000], baseline="eager", baseline_ms=60.0, floor_ms=3.0))
    (finding,) = [f for f in headline.findings(mixed) if f.question == "Fused distillation loss"]
    assert "forward KL, loss+gradient" in finding.sentence and "12.0" in finding.figure
    assert [plot.title for plot in plots.of_floor(mixed)] == [f"Losses: loss+gradient 512{plots.TIMES}32000"]


def test_readme_without_markers_is_refused(tmp_path, capsys):
    path, figures = tmp_path / "README.md", tmp_path / "r.json"
    runner.write(report(), figures)
    path.write_text("# no markers\n")
    assert readme.main([str(path), str(figures)]) == 2
    path.write_text(README)
    figures.write_text("{}")
    assert readme.main([str(path), str(figures)]) == 2
    assert "r.json" in capsys.readouterr().err
    assert path.read_text() == README


def test_backend_table_holds_priorities():
    text = readme.backends([("distill_kl", "avx512"), ("distill_kl", "serial"), ("other", "serial")])
    assert "| `distill_kl` | 1 | 2 |" in text and "| `other` | - | 1 |" in text
