"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from pyfast import backends
from pyfast._version import __version__
from pyfast.bench import runner
from pyfast.bench.floors import Floors
from pyfast.bench.schema import Bar, Report, Result
from pyfast.bench.timing import Timing
from pyfast.cli import app

FLOORS = Floors(20.0, 10.0, 200.0)


def call(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    """The message of a call that must end with exit code 2 and no traceback."""
    outcome = call(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert isinstance(outcome.exception, SystemExit)
    assert "Traceback" not in outcome.output
    return outcome.output


class FakeSuite:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.options = None

    def run(self, options, floors, progress):
        self.options = options
        if self.error:
            raise self.error
        r = Result.timed(
            Timing(2.0, 1.5, 2.5, 9), suite="losses", op="distill_kl", case="loss", shape=[4, 8], tokens=4,
            format="none", sparsity=0.0, dtype="float32", impl="pyfast", baseline="eager", baseline_ms=8.0,
        )  # fmt: skip
        return [r], [Bar.judge("a bar of this suite", 3.0, 4.0)]


@pytest.fixture
def suite(monkeypatch):
    fake = FakeSuite()
    monkeypatch.setattr(runner.importlib, "import_module", lambda name: fake)
    monkeypatch.setattr(runner.floors, "measure", lambda device, quick: FLOORS)
    return fake


def test_version():
    outcome = call("--version")
    assert outcome.exit_code == 0
    assert outcome.output.strip() == f"pyfast {__version__}"


def test_info_names_every_op_and_every_reason():
    outcome = call("info")
    assert outcome.exit_code == 0, outcome.output
    text = " ".join(outcome.output.split())
    for row in backends.op_table():
        assert row.op in text and row.backend in text
        assert row.reason.split()[0] in text
    assert torch.__version__ in text and "ISA active" in text
    if backends.isas_built():
        assert "PYFAST_ISA=" in text


def test_info_as_json():
    facts = json.loads(call("info", "--json").output)
    assert facts["versions"]["pyfast"] == __version__
    assert facts["isa_active"] == backends.active_isa()
    rows = [(op, row["backend"], row["available"]) for op, rows in facts["ops"].items() for row in rows]
    assert rows == [(row.op, row.backend, row.available) for row in backends.op_table()]
    assert all(row["available"] or row["reason"] for rows in facts["ops"].values() for row in rows)


def test_bench_prints_and_writes(suite, tmp_path):
    path = tmp_path / "deep" / "r.json"
    outcome = call("bench", "losses", "--quick", "--threads", "1", "--json", str(path))
    assert outcome.exit_code == 0, outcome.output
    assert "4.00x" in outcome.output and "a bar of this suite" in outcome.output
    written = Report.from_json(path.read_text())
    assert written.results[0].speedup == 4.0 and written.bars[0].met is True
    assert written.environment["threads"] == 1 and written.environment["copy_gbps"] == 20.0
    assert suite.options.quick and suite.options.threads == 1


def test_a_failing_suite_ends_with_1_and_its_trace(suite):
    suite.error = RuntimeError("kernel lost")
    outcome = call("bench", "losses")
    assert outcome.exit_code == 1
    assert "suite losses failed: RuntimeError: kernel lost" in outcome.output and "Traceback" in outcome.output


def test_models_are_names_or_one_checkpoint(suite, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert call("bench", "model", "--model", "llama-3.1-8b", "--model", "Qwen2.5-3B").exit_code == 0
    assert suite.options.models == ("llama-3.1-8b", "qwen2.5-3b") and suite.options.model_path is None
    assert call("bench", "model", "--model", str(tmp_path)).exit_code == 0
    assert suite.options.model_path == str(tmp_path)
    assert call("bench", "model").exit_code == 0
    assert suite.options.models == ("qwen2.5-0.5b",)


def test_an_unknown_suite_is_refused():
    text = refused("bench", "lossess")
    assert "'lossess'" in text and "losses, sparse, layers, model" in text


def test_an_unknown_device_is_refused():
    assert "'tpu'" in refused("bench", "losses", "--device", "tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused():
    assert "no GPU" in refused("bench", "losses", "--device", "cuda")


def test_bad_thread_counts_are_refused():
    assert "threads" in refused("bench", "losses", "--threads", "0")
    refused("bench", "losses", "--threads", "two")


def test_unknown_models_are_refused(tmp_path):
    assert "'gpt-9'" in refused("bench", "model", "--model", "gpt-9")
    assert "config.json" in refused("bench", "model", "--model", str(tmp_path))


def test_paths_that_cannot_be_written_are_refused_before_any_work(tmp_path, suite):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert "is a directory" in refused("bench", "losses", "--json", str(tmp_path))
    assert "--json" in refused("bench", "losses", "--json", str(blocker / "r.json"))
    assert "--report" in refused("bench", "losses", "--report", str(blocker))
    assert suite.options is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_read_only_directory_is_refused(tmp_path, suite):
    tmp_path.chmod(0o555)
    assert "cannot be written" in refused("bench", "losses", "--json", str(tmp_path / "r.json"))
