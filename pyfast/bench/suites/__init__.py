"""The suites. Each is a module with ``run(options, floors, progress) -> (results, bars)``; ``losses`` and
``sparse`` also offer ``cases(options)``, which ``benchmarks/bench_*.py`` time under pytest-benchmark."""
