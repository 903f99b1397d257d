"""The benchmark: cases, timing, floors, baselines, tables and report.

``pyfast bench`` runs it; ``pyfast.bench.runner.run`` is the same from Python. Nothing else in the package
imports from here.
"""
