"""The cases of the suite ``sparse`` for pytest-benchmark: ``pytest --benchmark-enable benchmarks/bench_sparse.py``."""

from __future__ import annotations

from pyfast.bench.suites import sparse

CASES = (sparse.cases, sparse.conversions)


def test_sparse(benchmark, implementation):
    assert benchmark(implementation) is not None
