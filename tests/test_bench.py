"""The benchmark's core: schema, timing, floors, baselines, break-even, bars."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench_samples import FLOORS, loss_result, report, result

from pyfast._cpu import halves_in, name_in
from pyfast._cuda_clock import Captured
from pyfast.bench import bars, baselines, environment, floors, hardware, timing
from pyfast.bench.breakeven import break_even, break_even_text, speedup_points, stays_dense
from pyfast.bench.cases import relative_error
from pyfast.bench.floors import floor_ms
from pyfast.bench.options import Options
from pyfast.bench.schema import Bar, Report
from pyfast.bench.timing import ImplementationError, Timing, interleave

# --- schema ---


def test_report_survives_json():
    before = report()
    after = Report.from_json(before.to_json())
    assert after == before
    assert json.loads(before.to_json())["schema"] == 1


def test_timed_works_out_floor_and_speedup():
    r = result(2.0, floor_ms=0.5, baseline_ms=6.0)
    assert (r.of_floor, r.speedup) == (0.25, 3.0)
    assert result(2.0).of_floor is None and result(2.0).speedup is None


@pytest.mark.parametrize("keep", [0, 1, 40, 400, -3])
def test_a_truncated_report_is_refused(keep):
    with pytest.raises(ValueError, match="not JSON, or cut short"):
        Report.from_json(report().to_json()[:keep])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[]", "not a benchmark report"),
        ('{"machine_info": {}, "benchmarks": []}', "not a benchmark report"),
        ('{"schema": 2, "environment": {}, "results": [], "bars": []}', "schema 2 is unknown"),
        ('{"schema": 1, "environment": {}, "bars": []}', "'results' is missing"),
        (
            '{"schema": 1, "environment": {}, "results": {}, "bars": []}',
            "'results' is missing or is not a list",
        ),
        ('{"schema": 1, "environment": {}, "results": [3], "bars": []}', r"results\[0\] is not an object"),
    ],
)
def test_a_foreign_report_is_refused(text, what):
    with pytest.raises(ValueError, match=what):
        Report.from_json(text)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"ms": "fast"}, r"results\[0\].ms is 'fast'"),
        ({"tokens": True}, r"results\[0\].tokens is True"),
        ({"shape": ["a"]}, r"results\[0\].shape"),
        ({"metrics": {"a": "b"}}, r"results\[0\].metrics"),
        ({"colour": 1}, "unknown fields"),
        ({"ms": None}, r"results\[0\].ms is None"),
    ],
)
def test_a_wrong_field_is_refused(change, what):
    whole = json.loads(report().to_json())
    whole["results"][0].update(change)
    with pytest.raises(ValueError, match=what):
        Report.from_json(json.dumps(whole))


def test_a_missing_field_is_refused():
    whole = json.loads(report().to_json())
    del whole["results"][1]["impl"]
    with pytest.raises(ValueError, match=r"results\[1\] lacks 'impl'"):
        Report.from_json(json.dumps(whole))


def test_nan_never_reaches_the_file():
    with pytest.raises(ValueError, match="not finite"):
        Report(results=[result(math.nan)]).to_json()


def test_add_replaces_what_was_measured_again():
    r = Report(results=[result(2.0), result(3.0, tokens=16)], bars=[Bar("a", 1.0)])
    r.add([result(1.0)], [Bar("a", 1.0, 2.0, True), Bar("b", 1.0)])
    assert [x.ms for x in r.results] == [1.0, 3.0]
    assert [(b.name, b.measured) for b in r.bars] == [("a", 2.0), ("b", None)]


def test_merge_keeps_devices_apart():
    a, b = (
        Report({"device": "X"}, [result(2.0)]),
        Report({"device": "X"}, [result(1.0), result(1.0, tokens=16)]),
    )
    assert [r.ms for r in a.merge(b).results] == [1.0, 1.0]
    assert [r.ms for r in a.results] == [2.0]
    with pytest.raises(ValueError, match="'Y' cannot be merged"):
        a.merge(Report({"device": "Y"}))


def test_noise_is_a_difference_within_the_spread():
    assert result(2.0, spread=0.5).is_noise(result(2.3, spread=0.5))
    assert not result(2.0, spread=0.1).is_noise(result(2.3, spread=0.5))


def test_select_filters_by_fields():
    assert [r.ms for r in report().select(suite="sparse", sparsity=0.7)] == [3.2]


# --- timing ---


class FakeClock:
    """A clock that implementations move, so that times are known exactly."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: list[float]):
        left = list(seconds)

        def run() -> str:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return name

        return run


def test_implementations_take_turns_and_medians_are_theirs():
    clock = FakeClock()
    impls = {"a": clock.work("a", [9.0, 1.0, 5.0, 2.0, 1.0, 1.5]), "b": clock.work("b", [0.25])}
    timings = interleave(impls, budget_s=0.0, min_rounds=5, clock=clock)
    assert clock.calls == ["a", "b", *["a", "b"] * 5]  # one of each to warm up, then in turn
    assert timings["a"].ms == pytest.approx(1500)  # of 1, 5, 2, 1, 1.5: the 9 of the warm-up does not count
    assert timings["a"].ms_min == pytest.approx(1000)
    assert timings["a"].ms_max == pytest.approx(3800)
    assert timings["b"] == Timing(*(pytest.approx(250),) * 3, rounds=5)


def test_rounds_go_on_until_the_budget_is_spent():
    clock = FakeClock()
    timings = interleave({"a": clock.work("a", [0.1])}, budget_s=2.05, min_rounds=2, clock=clock)
    assert timings["a"].rounds == 21
    timings = interleave({"a": clock.work("a", [0.1])}, budget_s=9, min_rounds=2, max_rounds=7, clock=clock)
    assert timings["a"].rounds == 7


def test_an_error_under_the_clock_names_its_implementation():
    def broken() -> None:
        raise KeyError("lost")

    with pytest.raises(ImplementationError, match="slow: KeyError") as caught:
        interleave({"fast": lambda: None, "slow": broken})
    assert caught.value.impl == "slow"
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(("impls", "rounds"), [({}, 5), ({"a": lambda: None}, 0)])
def test_interleave_refuses_nothing_to_do(impls, rounds):
    with pytest.raises(ValueError):
        interleave(impls, min_rounds=rounds)


def test_a_captured_graph_keeps_what_its_calls_hold(monkeypatch):
    """Its kernels read it where it lay when they were captured. A stand-in for torch.cuda, that captures nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda other: contextlib.nullcontext(),
        synchronize=lambda: None,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        graph=lambda graph: contextlib.nullcontext(),
    )
    prompt = torch.ones(3)
    alive = weakref.ref(prompt)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "cuda", cuda)
        captured = Captured([lambda prompt=prompt: float(prompt.sum())])
        del prompt
        gc.collect()
        assert alive() is not None and captured() == 3.0
    del captured
    gc.collect()
    assert alive() is None


def test_percentiles_are_those_of_numpy():
    numpy = pytest.importorskip("numpy")
    samples = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert timing.percentile(samples, q) == pytest.approx(float(numpy.quantile(samples, q)))


@pytest.mark.parametrize(("nbytes", "cache", "copies"), [(64, 32, 3), (10, 100, 41), (1000, 10, 1), (5, 0, 1)])
def test_copies_exceed_four_times_the_cache(nbytes, cache, copies):
    ring = timing.cold(lambda: object(), nbytes, cache)
    assert len(ring) == copies
    assert copies * nbytes > 4 * cache
    first = [ring() for _ in range(copies)]
    assert len(set(map(id, first))) == copies  # all different, then from the start again
    assert [ring() for _ in range(copies)] == first


# --- the machine ---


def test_the_largest_cache_level_is_found(tmp_path):
    for i, (level, size) in enumerate([(1, "32K"), (1, "48K"), (2, "1024K"), (3, "33M"), (9, "broken")]):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{i}" / "size").write_text(f"{size}\n")
    (tmp_path / "index7").mkdir()
    assert hardware.cache_bytes_under(tmp_path) == 33 << 20
    assert hardware.cache_bytes_under(tmp_path / "index7") is None


def test_a_name_that_many_processors_have_gets_family_and_model():
    lines = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t:  AMD  EPYC\n"
    assert name_in(lines) == "AMD EPYC, family 26 model 2"
    assert name_in(lines.replace("EPYC", "EPYC 9654") + lines) == "AMD EPYC 9654"
    assert name_in("model name : Some CPU\n") == "Some CPU" and name_in("Hardware : a board\n") is None


def test_which_processors_take_512_bits_in_halves():
    """A Zen 4 does; a Zen 3 has no AVX-512, a Zen 5 and Intel's have whole units."""
    zen4 = "vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 17\nflags : fpu avx2 avx512f avx512bw\n"
    assert halves_in(zen4)
    for change in (("AuthenticAMD", "GenuineIntel"), (": 25", ": 26"), ("avx512f", "")):
        assert not halves_in(zen4.replace(*change))
    assert not halves_in("")


def test_peak_growth_sees_what_was_touched():
    size = 48 << 20
    if (grown := hardware.peak_growth_bytes(lambda: torch.ones(size, dtype=torch.uint8))) is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 0.95 * size < grown < 1.3 * size
    assert hardware.peak_growth_bytes(lambda: None) < 0.1 * size

    def freed_within() -> None:
        torch.ones(size, dtype=torch.uint8)

    assert hardware.peak_growth_bytes(freed_within) > 0.95 * size


def test_floors_are_measured():
    found = floors.measure("cpu", quick=True)
    assert 0.5 < found.copy_gbps < 5000 and 0.5 < found.read_gbps < 5000
    assert found.dense_gflops > 0.5
    assert set(found.to_dict()) == {"copy_gbps", "read_gbps", "dense_gflops", "dense_bf16_gflops"}


def test_floor_is_the_larger_of_transfer_and_arithmetic():
    assert floor_ms(20_000_000, 0, FLOORS) == pytest.approx(1.0)
    assert floor_ms(20_000_000, 0, FLOORS, by="read") == pytest.approx(2.0)
    assert floor_ms(1, 800_000_000, FLOORS) == pytest.approx(4.0)
    assert floor_ms(1, 800_000_000, FLOORS, dtype="bfloat16") == pytest.approx(2.0)
    with pytest.raises(ValueError, match="by"):
        floor_ms(1, 1, FLOORS, by="write")


def test_environment_has_what_the_schema_names():
    found = environment.describe(Options(), FLOORS)
    for name in (
        "device",
        "isa",
        "threads",
        "torch",
        "triton",
        "cuda",
        "copy_gbps",
        "dense_gflops",
        "commit",
    ):
        assert name in found
    assert found["last_level_cache_bytes"] > 0 and found["copy_gbps"] == 20.0
    Report(found).to_json()


@pytest.mark.parametrize("wrong", [{"device": "tpu"}, {"threads": 0}, {"models": ("gpt-9",)}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Options(**wrong)


# --- baselines and break-even ---


@pytest.mark.parametrize("tokens", [1, 5])
def test_every_baseline_is_a_linear(tokens):
    weight, x = torch.randn(48, 80), torch.randn(tokens, 80)
    found = baselines.available("cpu")
    assert "F.linear float32" in [b.name for b in found]
    for baseline in found:
        y = baseline.cold(weight.to(baseline.dtype), tokens, llc_bytes=20_000)(x.to(baseline.dtype))
        assert y.dtype is baseline.dtype
        truth = F.linear(x.to(baseline.dtype).double(), weight.to(baseline.dtype).double())
        assert relative_error(y, truth) < (1e-5 if baseline.dtype is torch.float32 else 1e-2), baseline.name


def test_mkl_refuses_other_dtypes():
    with pytest.raises(TypeError, match="weight"):
        baselines.mkl_prepacked(torch.ones(8, 8, dtype=torch.bfloat16), 1)


def test_the_best_baseline_is_the_fastest():
    timings = {"slow": Timing(3, 3, 3, 5), "fast": Timing(1, 1, 1, 5), "sparse": Timing(0.1, 0.1, 0.1, 5)}
    assert baselines.best(timings, ["slow", "fast", "absent"])[0] == "fast"
    with pytest.raises(ValueError, match="names"):
        baselines.best(timings, ["absent"])


@pytest.mark.parametrize(
    ("points", "found", "text"),
    [
        ([(0.5, 0.5), (0.7, 1.5), (0.9, 3.0)], 0.6, "60 %"),
        ([(0.9, 3.0), (0.5, 0.5), (0.7, 1.5)], 0.6, "60 %"),
        ([(0.5, 1.2), (0.9, 3.0)], 0.5, "50 % or less"),
        ([(0.5, 0.2), (0.95, 0.9)], None, "above 95 %"),
        ([(0.5, 1.1), (0.7, 0.8), (0.9, 1.2)], 0.8, "80 %"),
        ([(0.5, 0.5), (0.7, 1.0)], 0.7, "70 %"),
        ([], None, "not measured"),
    ],
)
def test_break_even(points, found, text):
    assert break_even(points) == (None if found is None else pytest.approx(found))
    assert break_even_text(points) == text


def test_speedup_points_are_those_of_one_line():
    others = [result(1.0, tokens=16, baseline_ms=4.0), result(1.0, dtype="bfloat16", baseline_ms=4.0)]
    csr = [
        result(9.0, impl="torch CSR", format="csr", baseline_ms=4.0),
        result(1.0, format="2:4", baseline_ms=9.0),
    ]
    found = speedup_points([*report().results, *others, *csr], shape=(4096, 4096), tokens=1, dtype="float32")
    assert found == [(0.5, 0.8), (0.7, 1.25), (0.9, 4.0)]


def test_points_where_the_plan_stayed_dense_say_nothing_of_a_format():
    served = [result(2.0, sparsity=0.8, note="kernel: bitmap", baseline_ms=4.0)]
    dense = [result(4.0, sparsity=s, note="kernel: dense", baseline_ms=4.0) for s in (0.5, 0.7)]
    assert [stays_dense(r) for r in [*served, *dense]] == [False, True, True]
    found = speedup_points([*dense, *served], shape=(4096, 4096), tokens=1, dtype="float32")
    assert found == [(0.8, 2.0)] and break_even_text(found) == "80 % or less"
    assert speedup_points(dense, shape=(4096, 4096), tokens=1, dtype="float32") == []


# --- bars ---


@pytest.mark.parametrize(
    ("required", "measured", "at_most", "met"),
    [(2.0, 2.0, False, True), (2.0, 1.99, False, False), (0.05, 0.04, True, True), (0.05, 0.06, True, False),
     (2.0, None, False, None), (2.0, math.inf, False, None)],
)  # fmt: skip
def test_a_bar_is_judged(required, measured, at_most, met):
    assert Bar.judge("b", required, measured, at_most=at_most).met is met


@pytest.fixture
def on_avx512(monkeypatch):
    monkeypatch.setattr(bars, "active_isa", lambda: "avx512")


def test_bars_between_logits_hold_for_the_worst_shape(on_avx512):
    def kl(shape: list[int], dtype: str, compiled: float, extra: float, **fields):
        nbytes = 3 * shape[0] * shape[1] * (4 if dtype == "float32" else 2)
        metrics = {"speedup_vs_compile": compiled, "extra_bytes": extra * nbytes / 3}
        impl, case = fields.get("impl", "pyfast"), fields.get("case", "loss+gradient")
        return loss_result(impl, 10.0, shape, floor_ms=6.0, bytes=nbytes, dtype=dtype, metrics=metrics, case=case)

    reverse = {"case": "reverse_kl loss+gradient"}
    found = [
        kl([512, 32000], "float32", 7.0, 0.0),
        kl([128, 151936], "float32", 4.5, 0.0),
        kl([512, 32000], "bfloat16", 6.0, 0.5),
        kl([128, 151936], "bfloat16", 8.0, 0.0),
        kl([64, 32000], "float32", 1.0, 1.0),  # a shape without a bar
        kl([512, 32000], "float32", 3.0, 0.0, impl="pyfast[avx2]"),
        kl([512, 32000], "float32", 9.0, 0.0, **reverse),  # one of four
    ]
    judged = {b.name: b for b in bars.losses(found, Options())}
    assert {name: (b.measured, b.met) for name, b in judged.items() if name.startswith("forward_kl")} == {
        "forward_kl: share of the copy floor": (0.6, True),
        "forward_kl: against torch.compile": (4.5, False),
        "forward_kl: memory beyond the gradient": (0.5, False),
        "forward_kl under AVX2: against torch.compile": (3.0, True),
    }
    assert "128x151936 float32" in judged["forward_kl: against torch.compile"].note
    assert judged["reverse_kl: against torch.compile"].met is None
    assert "not every shape" in judged["reverse_kl: against torch.compile"].note


def test_bars_of_the_other_losses(on_avx512):
    attention = {"op": "attention_distill", "case": "attention loss+gradient", "baseline_ms": 30.0}
    linear = {"op": "linear_distill", "case": "fused linear forward_kl loss+gradient"}
    topk = {"op": "topk_distill", "case": "top-64 loss+gradient"}
    size = [1024, 896, 151936]
    found = [
        loss_result("pyfast", 10.0, [128, 151936], **topk, metrics={"speedup_vs_full_kl": 2.5}),
        loss_result("pyfast", 10.0, [512, 32000], **topk, metrics={"speedup_vs_full_kl": 1.5}),
        loss_result("pyfast", 20.0, [1, 16, 2048, 64], tokens=2048, **attention, metrics={"extra_bytes": 50.0}),
        loss_result("pyfast", 5.0, [1, 16, 1024, 64], tokens=1024, **attention, metrics={"extra_bytes": 20.0}),
        loss_result("pyfast", 8.0, size, **linear, metrics={"extra_bytes": 1.0, "speedup_vs_products": 0.8}),
        loss_result("eager", 9.0, size, **linear, metrics={"extra_bytes": 16.0}),
    ]
    judged = bars.losses(found, Options())[-5:]
    assert [(b.measured, b.met) for b in judged] == [
        (2.5, True),
        (1.5, True),  # against eager
        (2.5, False),  # memory of twice the tokens
        (1 / 16, True),
        (1.25, False),
    ]


def test_bars_of_the_sparse_suite(on_avx512):
    def product(sparsity: float, same: float, shape: list[int], **fields):
        fields = {"tokens": 16, "baseline_ms": 1.7, "baseline": "F.linear bfloat16", **fields}
        return result(1.0, sparsity=sparsity, shape=shape, metrics={"speedup_same_dtype": same}, **fields)

    square, flat = bars.SPARSE_SHAPES
    found = [
        product(0.5, 2.5, square),
        product(0.5, 1.2, flat, note="kernel: indexed"),
        product(0.8, 3.0, square),
        product(0.8, 2.5, flat),
        product(0.9, 9.0, square),  # one shape of two
        product(0.5, 1.5, square, format="2:4"),
        product(0.5, 1.4, flat, format="2:4"),
        product(0.5, 0.1, [896, 4864]),  # a shape without a bar
        product(0.5, 0.1, square, impl="pyfast[avx2]"),
        product(0.5, 3.0, square, tokens=1, dtype="bfloat16"),
        product(0.8, 2.6, square, tokens=1, impl="pyfast[avx2]"),
        result(1.0, op="from_dense", tokens=0, metrics={"mweights_per_s": 300.0}),
        result(1.0, op="to_indexed", tokens=0, format="2:4", metrics={"mweights_per_s": 190.0}),
    ]
    judged = bars.sparse(found, Options())
    some = [b for b in judged if " 16 tokens" in b.name]
    assert [(b.required, b.measured, b.met) for b in some] == [
        (1.3, 1.2, False),
        (2.4, 2.5, True),
        (4.5, None, None),
        (7.0, None, None),
        (1.4, 1.4, True),
    ]
    assert "4864x896" in some[0].note and "indexed" in some[0].note and "1.70x the best of any dtype" in some[0].note
    assert "not every shape" in some[2].note
    assert [(b.measured, b.met) for b in judged[-5:]] == [
        (1.7, True),  # bfloat16, against any dtype
        (None, None),
        (None, None),
        (2.6, True),
        (190.0, False),
    ]
    assert judged[-1].note == "slowest: to_indexed 2:4"


def test_bars_of_the_model(on_avx512):
    def speedup(op: str, same: float, **fields):
        fields = {
            "suite": "model",
            "case": "qwen2.5-0.5b",
            "sparsity": 0.8,
            "metrics": {"speedup_same_dtype": same},
        } | fields
        return result(1.0, op=op, **fields)

    found = [
        speedup("decode", 9.0, dtype="bfloat16"),
        speedup("decode", 9.0, sparsity=0.9),
        speedup("decode", 9.0, case="llama-3.2-1b"),
        speedup("decode", 2.4),
        speedup("decode", 3.0, impl=bars.HEAD_TOO),
        speedup("prefill", 1.9),
    ]
    judged = bars.model(found, Options())
    assert [(b.required, b.measured, b.met) for b in judged] == [
        (2.5, 2.4, False),
        (2.5, 3.0, True),
        (1.8, 1.9, True),
        (1.8, None, None),
    ]
    assert "head dense" in judged[0].name and "head at 80 % too" in judged[1].name and judged[3].note == "not measured"


@pytest.mark.parametrize(
    ("options", "isa"),
    [(Options(quick=True), "avx512"), (Options(device="cuda"), "avx512"), (Options(), "avx2")],
)
def test_bars_stay_open_elsewhere(monkeypatch, options, isa):
    monkeypatch.setattr(bars, "active_isa", lambda: isa)
    found = [result(1.0, baseline_ms=9.0), loss_result("pyfast", 1.0, [512, 32000], baseline_ms=99.0)]
    found.append(result(1.0, suite="model", case="qwen2.5-0.5b", op="decode", sparsity=0.8))
    judged = bars.sparse(found, options) + bars.losses(found, options) + bars.model(found, options)
    assert all(b.met is None and b.measured is None and b.note for b in judged)
