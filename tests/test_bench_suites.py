"""The suites losses and sparse, the runner, the tables and the generated README."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from bench_samples import FLOORS, loss_result, report, result
from rich.console import Console

from pyfast.bench import baselines, hardware, readme, runner, tables
from pyfast.bench.cases import is_pyfast, keep_runnable, relative_error
from pyfast.bench.options import Options
from pyfast.bench.progress import Progress
from pyfast.bench.schema import Bar, Report
from pyfast.bench.suites import losses, sparse
from pyfast.bench.timing import ImplementationError

QUIET = Progress(quiet=True)


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
def test_the_truth_of_a_loss_case_is_torchs_in_float64(dtype):
    case = losses.LossCase(6, 50, dtype, gradient=True)
    student, teacher = (x.detach().double() for x in case.logits())
    student.requires_grad_()
    loss = losses.eager(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    value, rows = case.truth()
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(rows, gradient[: len(rows)])


def test_suite_losses(monkeypatch):
    tried = [
        losses.LossCase(8, 300, "float32", True, every_isa=True),
        losses.LossCase(8, 300, "bfloat16", False),
    ]
    monkeypatch.setattr(losses, "cases", lambda options: tried)
    # The compiler for C++ would take most of a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found, judged = losses.run(Options(quick=True), FLOORS, QUIET)
    assert {r.impl for r in found} == set(tried[0].names)
    assert {"pyfast", "eager", "torch.compile"} <= {r.impl for r in found}
    assert all(r.error is not None and r.error < (1e-5 if r.dtype == "float32" else 0.05) for r in found)
    assert {r.bytes for r in found if r.dtype == "float32"} == {3 * 4 * 8 * 300}
    assert {r.bytes for r in found if r.dtype == "bfloat16"} == {2 * 2 * 8 * 300}
    assert all(r.speedup == pytest.approx(1.0) for r in found if r.impl == "eager")
    assert len(judged) == 8 and all(b.met is None for b in judged)
    Report.from_json(Report(results=found, bars=judged).to_json())


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
        ]
    )
    tried = [sparse.SparseCase((64, 128), tokens, variants) for tokens in (1, 3)]
    monkeypatch.setattr(sparse, "cases", lambda options: tried)
    monkeypatch.setattr(sparse, "conversions", lambda options: [sparse.ConversionCase("to_dense", "bitmap", (64, 128))])
    monkeypatch.setattr(hardware, "last_level_cache_bytes", lambda: 50_000)
    found, judged = sparse.run(Options(quick=True), FLOORS, QUIET)
    linear = [r for r in found if r.op == "sparse_linear"]
    assert len(linear) == 2 * (len(variants) + len(baselines.available("cpu")))
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
    assert [b.met for b in judged] == [None] * 7


def test_every_case_has_its_own_name():
    for options in (Options(), Options(quick=True)):
        for tried in (losses.cases(options), [*sparse.cases(options), *sparse.conversions(options)]):
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
