"""The cases of the suite ``losses`` for pytest-benchmark: ``pytest --benchmark-enable benchmarks/bench_losses.py``."""

from __future__ import annotations

from pyfast.bench.suites import losses

CASES = (losses.every_case,)


def test_losses(benchmark, implementation):
    assert benchmark(implementation) is not None
