"""The cases of the suite ``model`` under pytest-benchmark: ``pytest benchmarks/bench_model.py``."""

from __future__ import annotations

from pyfast.bench.suites import model

CASES = (model.operation_cases,)


def test_model(benchmark, implementation):
    assert benchmark.pedantic(implementation, rounds=16, warmup_rounds=2) is not None
