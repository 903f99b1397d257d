"""The cases of the suite ``layers`` under pytest-benchmark: ``pytest benchmarks/bench_layers.py``."""

from __future__ import annotations

from pyfast.bench.suites import layers

CASES = (layers.cases,)


def test_layers(benchmark, implementation):
    assert benchmark(implementation) is not None
