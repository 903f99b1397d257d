"""The plan of a product: the cost model, the choice, the calibration and the file that keeps it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import warnings

import pytest
import torch
from conftest import relative_error
from sparse_cases import weight_24, weight_unstructured

import pyfast
from pyfast import BitmapWeight, Sparse24Weight, _changes, backends, sparse
from pyfast.sparse import calibration, cost_model, layouts, planning
from pyfast.sparse.built_in import built_in
from pyfast.sparse.cost_model import Work, predict

pytestmark = pytest.mark.skipif(not backends.isas_supported(), reason="no native kernels, nothing to choose")
AVX512 = built_in("avx512", 2)


def work(sparsity=0.8, tokens=1, n=4096, k=4096, dtype="float32", format="bitmap"):
    stored = n * k // 2 if format == "2:4" else round((1 - sparsity) * n * k)
    return Work(format, n, k, stored, dtype, tokens, 2, 32)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Calibrations are kept there, and none has been made."""
    monkeypatch.setenv("PYFAST_CACHE_DIR", str(tmp_path / "pyfast"))
    calibration.forget()
    yield tmp_path / "pyfast" / "calibration.json"
    calibration.forget()


def distinct(factor=1.0):
    """Constants in which every number is another one."""
    count = itertools.count(1)

    def number():
        return factor * (100 + next(count))

    def row(size):
        return tuple(number() for _ in range(size))

    groups, densities, tokens = map(len, (cost_model.GROUPS, cost_model.DENSITIES, cost_model.DENSE_TOKENS))
    rates = {
        dtype: cost_model.Rates(
            tuple(row(densities) for _ in range(groups)), row(groups), number(), number(), row(tokens), packed
        )
        for dtype, packed in (("float32", row(tokens)), ("bfloat16", ()))
    }
    tiles = len(cost_model.TILES)
    singles, pairs = (cost_model.Lists(row(tiles), row(tiles), number()) for _ in range(2))
    return cost_model.Constants("calibrated", number(), number(), singles, pairs, rates)


# --- the cost model ---


def test_bytes_are_those_of_the_containers():
    for n, k, sparsity in ((64, 256, 0.5), (320, 640, 0.9)):
        for dtype in (torch.float32, torch.bfloat16):
            weight = BitmapWeight.from_dense(weight_unstructured(n, k, sparsity, dtype))
            expected = planning.work_of(weight, 1).container_bytes
            assert abs(expected - weight.nbytes) <= 8 + 0.01 * weight.nbytes
            two_four = Sparse24Weight.from_dense(weight_24(n, k, dtype))
            assert planning.work_of(two_four, 1).container_bytes == two_four.nbytes


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95, 0.995])
def test_bytes_of_the_indexed_layout(sparsity):
    weight = BitmapWeight.from_dense(weight_unstructured(512, 1024, sparsity))
    expected = cost_model.layout_bytes(planning.work_of(weight, 16), "indexed")
    assert abs(expected - layouts.IndexedLayout.of(weight).nbytes) < 0.1 * expected
    assert cost_model.layout_bytes(planning.work_of(weight, 16), "dense") == 4 * 512 * 1024
    assert cost_model.layout_bytes(planning.work_of(weight, 16), "direct") == 0


def test_one_token_of_a_large_layer_is_bound_by_memory():
    """Then the expected time is that of reading the bytes."""
    fast = dataclasses.replace(AVX512, read_gbps=1.0, call_us=0.0)
    expected = predict(fast, work(0.5))
    assert expected["direct"] == pytest.approx(work(0.5).container_bytes / 1e6, rel=0.01)
    assert expected["dense"] == pytest.approx(work(0.5).dense_bytes / 1e6, rel=0.01)
    assert predict(dataclasses.replace(fast, call_us=50.0), work(0.5))["dense"] == pytest.approx(
        expected["dense"] + 0.05
    )


@pytest.mark.parametrize("isa", ["serial", "avx2", "avx512"])
@pytest.mark.parametrize("format", ["bitmap", "2:4"])
def test_time_grows_with_tokens_and_falls_with_sparsity(isa, format):
    constants = built_in(isa, 2)
    for dtype in ("float32", "bfloat16", "float16"):
        for name in ("direct", "indexed", "dense"):
            most = 6 if name == "direct" else 12  # beyond, the direct kernel is another one
            full = [predict(constants, work(0.5, 2**i, dtype=dtype, format=format))[name] for i in range(most)]
            assert all(b >= 0.999 * a for a, b in itertools.pairwise(full)), (dtype, name)
        sparser = [predict(constants, work(s, 16, dtype=dtype))["indexed"] for s in (0.3, 0.5, 0.8, 0.9, 0.99)]
        assert all(b < a for a, b in itertools.pairwise(sparser))


def test_memory_and_arithmetic_add_up():
    """What takes as long by either alone takes 1.4 times that together."""
    constants = dataclasses.replace(distinct(), read_gbps=1e9, call_us=0.0)
    arithmetic = predict(constants, work(0.5, 16))["packed"]
    both = dataclasses.replace(constants, read_gbps=work(0.5, 16).dense_bytes / (arithmetic * 1e6))
    assert predict(both, work(0.5, 16))["packed"] == pytest.approx(2**0.5 * arithmetic, rel=0.01)


def test_bfloat16_in_pairs_has_times_and_bytes_of_its_own():
    constants = dataclasses.replace(distinct(), read_gbps=1e9, call_us=0.0)
    single, pair = (dataclasses.replace(work(0.5, 64, dtype="bfloat16"), pairs=pairs) for pairs in (False, True))
    for one, times, columns in ((single, constants.singles, 128), (pair, constants.pairs, 192)):
        count, lists = one.stored, 4096 * -(-4096 // columns)
        ps = count * times.entry[-1] + lists * times.start[-1] + 64 * 8192 * times.turn
        assert predict(constants, one)["indexed"] == pytest.approx(1e-9 * ps)
    assert cost_model.layout_bytes(single, "indexed") == 5 * single.stored + 2 * 4096 * 32
    assert cost_model.layout_bytes(pair, "indexed") == 3 * pair.stored + 2 * 4096 * 22
    weight = BitmapWeight.from_dense(weight_unstructured(512, 1024, 0.5, torch.bfloat16))
    assert planning.work_of(weight, 16).pairs == layouts.pairs(torch.bfloat16)
    expected = cost_model.layout_bytes(planning.work_of(weight, 16), "indexed")
    assert abs(expected - layouts.IndexedLayout.of(weight).nbytes) < 0.1 * expected


def test_bfloat16_that_is_multiplied_in_pairs_pays_earlier():
    """With several tokens, against a dense library that has the same instructions."""
    for halves in (False, True):
        widened, paired = (built_in("avx512", 2, bfloat16=0.5, bf16=bf16, halves=halves) for bf16 in (False, True))
        of = {
            name: cost_model.break_even(constants, (4096, 4096), 512, "bfloat16", 2, 32)
            for name, constants in (("widened", widened), ("paired", paired))
        }
        assert of["paired"] < of["widened"] - 0.1


def test_units_of_256_bits_have_constants_of_their_own(cache, monkeypatch):
    whole, halves = (built_in("avx512", 2, halves=halves) for halves in (False, True))
    assert all(slow > fast for slow, fast in zip(halves.singles.entry[1:], whole.singles.entry[1:], strict=True))
    assert halves.of("float32").dense[-1] > whole.of("float32").dense[-1]
    monkeypatch.setattr(calibration, "built_in", lambda *device, halves, **facts: halves)
    for found in (False, True):
        monkeypatch.setattr(calibration, "takes_512_bits_in_halves", lambda found=found: found)
        calibration.forget()
        assert calibration.constants(2, "avx512") is found


@pytest.mark.parametrize(("looks_up", "kernel"), [(True, "direct"), (False, "indexed")])
def test_one_token_goes_by_lists_where_the_processor_cannot_look_up(looks_up, kernel):
    constants = built_in("avx512", 2, vbmi2=looks_up)
    assert planning.pick(predict(constants, work(0.8, 1))) == kernel
    assert planning.pick(predict(constants, work(0.85, 1))) == "indexed"


def test_the_direct_kernel_takes_tokens_by_four_two_and_one():
    rates = distinct().of("float32")
    constants = dataclasses.replace(distinct(), read_gbps=1e9, call_us=0.0)
    one, two, four = rates.sparse24
    expected = predict(constants, work(tokens=7, format="2:4"))["direct"]
    assert expected == pytest.approx((four + two + one) * 4096 * 4096 * 1e-9)
    beyond = predict(constants, work(tokens=64, format="2:4"))["direct"]
    assert beyond == pytest.approx((rates.sparse24_decompress + rates.dense[4]) * 4096 * 4096 * 1e-9)


def test_integers_are_never_decompressed():
    assert set(predict(AVX512, work(tokens=512, dtype="int8"))) == {"direct", "indexed"}


def test_interpolation():
    assert [cost_model.interpolate((1, 3), (10.0, 20.0), at) for at in (0, 1, 2, 3, 9)] == [10, 10, 15, 20, 20]


# --- break-even ---


def test_break_even_is_where_the_curves_cross():
    for tokens in (1, 16, 128):
        found = sparse.break_even((4096, 4096), tokens)
        constants = calibration.constants(torch.get_num_threads(), backends.active_isa())
        threads = torch.get_num_threads()

        def ratio(sparsity, tokens=tokens, constants=constants, threads=threads):
            stored = round((1 - sparsity) * 4096 * 4096)
            few = planning._native.CPU.few_tokens()
            ms = predict(constants, Work("bitmap", 4096, 4096, stored, "float32", tokens, threads, few))
            return min(ms["dense"], ms.get("packed", ms["dense"])) / min(ms["direct"], ms["indexed"])

        assert found is not None and ratio(found) >= 1 and (found == 0 or ratio(found - 0.01) < 1)


def test_break_even_never():
    """A machine whose sparse kernels are hopeless."""
    endless = (1e9,) * len(cost_model.TILES)
    hopeless = dataclasses.replace(distinct(), singles=cost_model.Lists(endless, endless, 1.0))
    slow = dataclasses.replace(hopeless.of("float32"), bitmap=((1e9,) * 4,) * 3, bitmap_decompress=1e9)
    constants = dataclasses.replace(hopeless, rates={"float32": slow})
    assert cost_model.break_even(constants, (1024, 1024), 16, "float32", 2, 32) is None


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (ValueError, "shape", ((0, 4), 1)),
        (ValueError, "tokens", ((4, 4), 0)),
        (TypeError, "dtype", ((4, 4), 1, torch.float64)),
    ],
)
def test_break_even_refuses(error, name, arguments):
    with pytest.raises(error, match=name):
        sparse.break_even(*arguments)


# --- the plan ---


def test_a_plan_says_what_it_expects():
    weight = BitmapWeight.from_dense(weight_unstructured(512, 512, 0.8))
    for tokens in (1, 16, 300):
        plan = sparse.plan(weight, tokens)
        assert plan.kernel in plan.alternatives and plan.ms == plan.alternatives[plan.kernel]
        assert {"direct", "indexed", "dense"} <= set(plan.alternatives)
        assert plan.source == "built-in" and plan.kernel in plan.reason and "ms" in plan.reason
        assert (plan.extra_bytes == 0) == (plan.kernel == "direct")
        assert plan.ms <= planning.NOISE * min(plan.alternatives.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.kernel = "dense"
    assert layouts.of(weight).held() == {}  # nothing was made


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_built_in_constants_choose_as_the_kernels_are_meant(isa):
    """One token: as stored, to where zeros cost more than the entries. Several, at high sparsity: by the entries.
    Nearly dense: the dense library."""
    constants = built_in(isa, 2)

    def best(*arguments, **options):
        expected = predict(constants, work(*arguments, **options))
        return planning.pick(expected)

    assert best(0.5, 1) == best(0.5, 1, format="2:4") == "direct"
    assert isa == "avx2" or (best(0.8, 1), best(0.9, 1)) == ("direct", "indexed")
    assert best(0.9, 16) == best(0.95, 128) == best(0.9, 512) == "indexed"
    assert best(0.05, 512) in ("dense", "packed")


@pytest.mark.parametrize("kernel", ["direct", "indexed", "dense", "packed"])
def test_every_choice_serves(kernel, monkeypatch):
    """Whatever the constants say, the answer is right and the layout is that of the plan."""
    if kernel == "packed" and "packed" not in sparse.plan(BitmapWeight.from_dense(torch.ones(16, 64)), 1).alternatives:
        pytest.skip("no library packs weights here")
    dense = weight_unstructured(200, 300, 0.6)
    weight = BitmapWeight.from_dense(dense)
    expected = {name: 1.0 if name == kernel else 2.0 for name in cost_model.KERNELS}
    monkeypatch.setattr(cost_model, "predict", lambda constants, work: expected)
    for tokens in (1, 5, 100):
        x = torch.randn(tokens, 300)
        assert relative_error(pyfast.sparse_linear(x, weight), x.double() @ dense.double().T) < 1e-5
    assert set(layouts.of(weight).held()) == {kernel} - {"direct"}


def test_the_choice_is_remembered_and_follows_threads_isa_and_calibration(monkeypatch):
    weight = BitmapWeight.from_dense(weight_unstructured(64, 64, 0.5))
    asked = []
    plan = planning.plan
    monkeypatch.setattr(planning, "plan", lambda *arguments: asked.append(1) or plan(*arguments))
    for _ in range(3):
        planning.choose(weight, 4)
    assert len(asked) == 1
    with backends.isa("serial"):
        planning.choose(weight, 4)
        assert len(asked) == 2
    planning.choose(weight, 4)
    assert len(asked) == 2  # the ISA is the one of before
    calibration.forget()
    planning.choose(weight, 4)
    assert len(asked) == 3
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    planning.choose(weight, 4)
    torch.set_num_threads(threads)
    assert len(asked) == 4
    for tokens in range(1, 2000):
        planning.choose(weight, tokens)
    assert len(layouts.of(weight).choices) <= 512


def test_where_there_is_nothing_to_choose():
    for weight in (
        BitmapWeight.from_dense(torch.ones(4, 4, dtype=torch.float64)),
        BitmapWeight.from_dense(torch.ones(0, 64)),
        BitmapWeight.from_dense(torch.ones(4, 4)).to("meta"),
    ):
        plan = sparse.plan(weight, 3)
        assert (plan.kernel, plan.ms, plan.alternatives, plan.source) == ("direct", None, {}, "fixed") and plan.reason


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "weight", (torch.ones(4, 4), 1)),
        (TypeError, "tokens", (BitmapWeight.from_dense(torch.ones(4, 4)), 1.0)),
        (ValueError, "tokens", (BitmapWeight.from_dense(torch.ones(4, 4)), 0)),
    ],
)
def test_plan_refuses(error, name, arguments):
    with pytest.raises(error, match=name):
        sparse.plan(*arguments)


# --- calibration ---


def steady(call):
    """A clock for which every call takes a millisecond; the call is made, for it must work."""
    call()
    return 1e-3


def test_calibration_is_kept_and_used(cache):
    told, before = [], _changes.number
    found = calibration.calibrate(measure=steady, say=told.append, shape=(64, 128))
    assert _changes.number > before  # choices that are remembered are asked for again
    assert found.source == "calibrated" and len(told) == 5
    assert set(found.rates) == {"float32", "bfloat16", "float16"}
    assert (found.pairs is not None) == layouts.pairs(torch.bfloat16)
    assert found.of("float32").dense == pytest.approx((1e9 / (64 * 128),) * len(cost_model.DENSE_TOKENS))
    threads, isa = torch.get_num_threads(), backends.active_isa()
    assert calibration.kept_in(threads, isa) == cache
    calibration.forget()  # as another process
    assert calibration.constants(threads, isa) == found
    weight = BitmapWeight.from_dense(weight_unstructured(64, 64, 0.5))
    assert sparse.plan(weight, 4).source == "calibrated"
    assert calibration.constants(threads + 1, isa).source == "built-in"  # another device
    assert sorted(os.listdir(cache.parent)) == [cache.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_solved_for_its_constants(dtype):
    """A clock that follows the model: the calibration finds the constants that the clock was made from."""
    true = distinct(1.0).singles
    calls = []

    def clock(call):
        call()
        return calls.pop(0)

    shape = n, k = 64, 128
    turn = 7.0
    calls.append(1e-12 * turn * 64 * 8 * k)
    generator = torch.Generator().manual_seed(0)
    twin = torch.Generator().manual_seed(0)
    calibration._random_bitmap((16, 8 * k), 0.0, dtype, twin)
    counts = []
    for density in (0.02, 0.5):
        weight = calibration._random_bitmap(shape, density, dtype, twin)
        counts.append(cost_model.entries(planning.work_of(weight, 1)))
    for i, tile in enumerate(cost_model.TILES):
        for entries, lists in counts:
            ps = entries * true.entry[i] + lists * true.start[i] + turn * tile * (n + k)
            calls.append(1e-12 * ps)
    found = calibration._indexed(clock, shape, dtype, generator)
    assert found.entry == pytest.approx(true.entry) and found.start == pytest.approx(true.start)
    assert found.turn == pytest.approx(turn) and not calls


def test_constants_survive_json():
    found = distinct()
    assert calibration.from_json(json.loads(json.dumps(calibration.to_json(found)))) == found


def test_an_entry_of_another_library_is_passed_over(cache, monkeypatch):
    calibration.save(distinct(), 2, "avx512")
    calibration.forget()
    monkeypatch.setattr(calibration, "library", lambda: "a later one")
    with pytest.warns(UserWarning, match="another library"):
        assert calibration.constants(2, "avx512").source == "built-in"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration.constants(2, "avx512")  # said once
    assert calibration.kept_in(2, "avx512") is None


def test_devices_share_the_file(cache):
    calibration.save(distinct(), 2, "avx512")
    calibration.save(distinct(2.0), 4, "avx2")
    calibration.forget()
    assert calibration.constants(2, "avx512") == distinct() and calibration.constants(4, "avx2") == distinct(2.0)


DAMAGE = {
    "not JSON": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1, 2]",
    "devices is a list": lambda text: json.dumps({"schema": 1, "devices": []}),
    "bytes": lambda text: b"\xff\xfe\x00",
    "a missing constant": lambda text: text.replace("read_gbps", "speed"),
    "a negative time": lambda text: text.replace('"call_us": ', '"call_us": -'),
    "a short row": lambda text: json.dumps(shortened(json.loads(text))),
}


def shortened(whole):
    for entry in whole["devices"].values():
        entry["constants"]["singles"]["entry"].pop()
    return whole


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_ignored_with_a_warning(cache, damage):
    calibration.save(distinct(), 2, "avx512")
    calibration.forget()
    broken = DAMAGE[damage](cache.read_text())
    cache.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    with pytest.warns(UserWarning, match="damaged"):
        assert calibration.constants(2, "avx512").source == "built-in"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibration.save(distinct(), 2, "avx512")
    calibration.forget()
    assert calibration.constants(2, "avx512") == distinct()


def test_a_later_schema_is_left_alone(cache):
    cache.parent.mkdir()
    cache.write_text(json.dumps({"schema": 99, "devices": {}}))
    assert calibration.constants(2, "avx512").source == "built-in"


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYFAST_CACHE_DIR", str(tmp_path / "file" / "below"))
    calibration.forget()
    with pytest.warns(UserWarning, match="cannot be (read|written)"):
        assert calibration.save(distinct(), 2, "avx512") is None
    assert calibration.constants(2, "avx512") == distinct()  # in this process
    calibration.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert calibration.constants(2, "avx512").source == "built-in"


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("PYFAST_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sparse.cache.cache_file() == tmp_path / "pyfast" / "calibration.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sparse.cache.cache_file() == tmp_path / "home" / ".cache" / "pyfast" / "calibration.json"
    for off in ("", "none"):
        monkeypatch.setenv("PYFAST_CACHE_DIR", off)
        assert sparse.cache.cache_file() is None and calibration.kept_in(2, "avx512") is None


def ticking(seconds):
    """A clock that is asked before and after each call, and a call that takes so long in turn."""
    now, left = [0.0], list(seconds)

    def call():
        now[0] += left.pop(0) if left else seconds[-1]

    return calibration.Clock(lambda: now[0]), call


def test_a_steady_clock_is_believed_soon():
    clock, call = ticking([9.0, 0.0010, 0.0011, 5.0])
    assert clock(call) == pytest.approx(0.0010) and not clock.busy()


def test_a_time_that_is_never_confirmed_is_told():
    clock, call = ticking([0.0] + [2.0**-i for i in range(40)])
    clock(call)
    assert clock.busy()


def test_a_busy_machine_is_not_calibrated(cache, monkeypatch):
    monkeypatch.setattr(calibration.Clock, "__call__", lambda self, call: steady(call))
    monkeypatch.setattr(calibration.Clock, "busy", lambda self: True)
    with pytest.raises(RuntimeError, match="busy"):
        calibration.calibrate(shape=(64, 128))
    assert not cache.exists() and calibration.constants(2, "avx512").source == "built-in"


def test_the_command_shows_the_constants(cache, monkeypatch, capsys):
    from typer.testing import CliRunner

    from pyfast import cli

    monkeypatch.setitem(calibration.calibrate.__kwdefaults__, "measure", steady)
    monkeypatch.setitem(calibration.calibrate.__kwdefaults__, "shape", (64, 128))
    before = torch.get_num_threads()
    done = CliRunner().invoke(cli.app, ["calibrate", "--threads", "1"])
    assert done.exit_code == 0, done.output
    for text in ("reading memory", "indexed kernel", "expected to pay from", "calibration.json", "float16"):
        assert text in done.output
    assert torch.get_num_threads() == before and cache.exists()
    assert next(iter(json.loads(cache.read_text())["devices"])).endswith(f"1 threads, {backends.active_isa()}")
