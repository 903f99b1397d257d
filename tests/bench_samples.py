"""Made-up results for the tests of the benchmark."""

from __future__ import annotations

import math

import pytest

from pyfast.bench.floors import Floors
from pyfast.bench.schema import Bar, Report, Result
from pyfast.bench.timing import Timing

FLOORS = Floors(copy_gbps=20.0, read_gbps=10.0, dense_gflops=200.0, dense_bf16_gflops=400.0)


def result(ms: float = 2.0, *, spread: float = 0.5, floor_ms: float | None = None, **fields) -> Result:
    defaults = {
        "suite": "sparse",
        "op": "sparse_linear",
        "case": "4096x4096",
        "shape": [4096, 4096],
        "tokens": 1,
        "format": "bitmap",
        "sparsity": 0.5,
        "dtype": "float32",
        "impl": "pyfast",
    }
    return Result.timed(Timing(ms, ms - spread, ms + spread, 9), floor_ms=floor_ms, **{**defaults, **fields})


def report() -> Report:
    dense = result(4.0, impl="onednn-prepacked", format="dense", sparsity=0.0, baseline_ms=4.0)
    points = [(0.5, 5.0), (0.7, 3.2), (0.9, 1.0)]
    rows = [result(ms, sparsity=s, baseline="onednn-prepacked float32", baseline_ms=4.0) for s, ms in points]
    loss = result(
        10.0,
        suite="losses",
        op="distill_kl",
        case="loss+gradient",
        shape=[512, 32000],
        tokens=512,
        format="none",
        sparsity=0.0,
        impl="pyfast[avx2]",
        floor_ms=5.0,
        baseline_ms=100.0,
        metrics={"extra_bytes": 0.0},
        note="a note",
    )
    found = [Bar.judge("fast", 1.5, 2.0), Bar.judge("lean", 0.05, 0.2, unit="of the logits", at_most=True)]
    return Report({"device": "Some CPU", "threads": 2, "isa": "avx512", "torch": "2.11"}, [dense, *rows, loss], found)


def loss_result(impl: str, ms: float, shape: list[int], **fields) -> Result:
    kind = {"suite": "losses", "op": "distill_kl", "case": "loss+gradient", "format": "none", "sparsity": 0.0}
    return result(ms, **{**kind, "tokens": shape[0], **fields}, shape=shape, impl=impl)


def other_losses() -> list[Result]:
    """A line of each kind of loss that is not the forward KL between logits, with its eager and what it is compared
    with."""
    kinds = [
        ("distill_kl", "jsd loss+gradient", [512, 32000], {"speedup_vs_compile": 4.25}),
        ("topk_distill", "top-64 loss+gradient", [128, 151936], {"speedup_vs_full_kl": 2.75}),
        ("attention_distill", "attention loss+gradient", [1, 16, 2048, 64], {}),
        ("linear_distill", "fused linear forward_kl loss+gradient", [1024, 896, 151936], {"speedup_vs_products": 0.95}),
    ]
    made = []
    for op, case, shape, metrics in kinds:
        same = {"op": op, "case": case, "baseline": "eager", "baseline_ms": 60.0}
        ours = {**metrics, "extra_bytes": 2e6}
        made.append(loss_result("pyfast", 20.0, shape, **same, metrics=ours, note="trl left out: ImportError: trl"))
        made.append(loss_result("eager", 60.0, shape, **same, metrics={"extra_bytes": 4e9}))
    return made


def check_rows(rows):
    """What holds of every result where memory moves 10 GB/s and a dense product does 100 GFLOP/s: figures are finite,
    the baseline is dense, of its case, and the fastest there."""
    Report.from_json(Report(results=rows).to_json())
    assert len({r.key for r in rows}) == len(rows)
    for r in rows:
        assert r.ms_min <= r.ms <= r.ms_max and r.bytes > 0 and r.flops > 0
        assert r.floor_ms == pytest.approx(max(r.bytes / 1e7, r.flops / 1e8))
        assert all(math.isfinite(value) for value in r.metrics.values())
        assert r.speedup == pytest.approx(r.baseline_ms / r.ms)
