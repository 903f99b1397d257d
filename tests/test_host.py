"""pyfast._host: every variant of every kernel on NumPy arrays against float64, and no torch anywhere near it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from pyfast import _host

VARIANTS = _host.variants()
DTYPES = ("float32", "float16", "bfloat16")
# Half a unit of the result's last place.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
INF, NAN = float("inf"), float("nan")


def stored(a: np.ndarray, dtype: str) -> np.ndarray:
    """The array in the form that the module takes: bfloat16 as its bits, rounded to nearest even."""
    if dtype != "bfloat16":
        return a.astype(dtype)
    bits = a.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(a), np.uint16(0x7FC0), rounded)


def wide(a: np.ndarray) -> np.ndarray:
    """float64 values of what the module takes or gives."""
    if a.dtype == np.uint16:
        a = (a.astype(np.uint32) << 16).view(np.float32)
    return a.astype(np.float64)


def relative_error(got: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(wide(got) - truth) / max(np.linalg.norm(truth), 1e-300))


def check_product(y: np.ndarray, x: np.ndarray, dense: np.ndarray, dtype: str) -> None:
    """y = x Wᵀ but for the rounding of the result and of sums in float32, whatever cancels in them."""
    x = x.astype(np.float64)
    error = np.linalg.norm(wide(y) - x @ dense.T)
    size = np.linalg.norm(np.abs(x) @ np.abs(dense).T)
    assert error <= ROUNDING[dtype] * np.linalg.norm(x @ dense.T) + 2e-7 * size, error


def log_softmax(a: np.ndarray) -> np.ndarray:
    shifted = a - a.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_and_grad(student: np.ndarray, teacher: np.ndarray, ts: float, tt: float) -> tuple[np.ndarray, np.ndarray]:
    log_s, log_t = log_softmax(wide(student) / ts), log_softmax(wide(teacher) / tt)
    t = np.exp(log_t)
    with np.errstate(invalid="ignore"):
        terms = np.where(t == 0, 0.0, t * (log_t - log_s))
    return terms.sum(-1), (np.exp(log_s) - t) / ts


def test_variants() -> None:
    assert VARIANTS[0] == "serial"
    assert ["serial", "avx2", "avx512", "avx512_lookup", "avx512_vbmi2", "avx512_bf16"][: len(VARIANTS)] == VARIANTS
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(next(line for line in file if line.startswith("flags")).split())
    except (OSError, StopIteration):
        pytest.skip("the processor's flags are not known")
    avx2 = {"avx2", "fma", "f16c", "bmi2"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    assert ("avx2" in VARIANTS) == avx2
    assert ("avx512" in VARIANTS) == avx512
    vbmi2 = avx512 and {"avx512vbmi", "avx512_vbmi2"} <= flags
    assert ("avx512_lookup" in VARIANTS) == vbmi2
    assert ("avx512_bf16" in VARIANTS) == (vbmi2 and "avx512_bf16" in flags)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 7, 16, 33, 1000, 1025, 8191])
@pytest.mark.parametrize("temperatures", [(1.0, None), (2.0, None), (4.0, 0.5)])
def test_distill_kl(vocab: int, dtype: str, temperatures: tuple[float, float | None], variant: str) -> None:
    rng = np.random.default_rng(vocab)
    s, t = (stored(3 * rng.standard_normal((3, vocab)), dtype) for _ in range(2))
    ts, tt = temperatures
    rows, grad = _host.distill_kl(s, t, ts, tt, variant=variant)
    true_rows, true_grad = kl_and_grad(s, t, ts, tt or ts)
    assert rows.dtype == np.float32 and rows.shape == (3,)
    assert grad.dtype == s.dtype and grad.shape == s.shape
    assert relative_error(rows, true_rows) < 2e-6
    assert relative_error(grad, true_grad) < {"float32": 2e-6, "float16": 4e-3, "bfloat16": 4e-3}[dtype]
    alone, none = _host.distill_kl(s, t, ts, tt, variant=variant, grad=False)
    assert np.array_equal(alone, rows) and none.shape == (0, 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distill_kl_special_values(dtype: str, variant: str) -> None:
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 5, 100))
    t[0, 10:60] = -INF  # excluded words
    t[1, 7], s[1, 7] = -INF, -INF
    s[2, 33] = -INF  # no student mass where the teacher has some
    s[3, 99] = NAN
    s, t = stored(s, dtype), stored(t, dtype)
    rows, grad = _host.distill_kl(s, t, variant=variant)
    with np.errstate(invalid="ignore"):
        true_rows, true_grad = kl_and_grad(s, t, 1.0, 1.0)
    sound = [0, 1, 4]
    assert relative_error(rows[sound], true_rows[sound]) < 2e-6
    assert relative_error(grad[sound], true_grad[sound]) < 4e-3
    assert rows[2] == INF and np.isnan(rows[3]) and np.isnan(wide(grad[3])).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_distill_kl_takes_views(variant: str) -> None:
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 50, 8)).astype(np.float32)
    expected = _host.distill_kl(s.T.copy(), t.T.copy(), variant=variant)
    got = _host.distill_kl(s.T, t.T, variant=variant)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalise", "sampled"])
def test_topk_distill(tail: str, dtype: str, variant: str) -> None:
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 3, 2500)) * 3
    s = stored(s, dtype)
    ids = np.argsort(-t, -1)[:, :40]
    kept, log_s = np.take_along_axis(log_softmax(t), ids, -1), log_softmax(wide(s) / 1.5)
    p, log_p = np.exp(kept), np.take_along_axis(log_s, ids, -1)
    if tail in ("renormalise", "sampled"):
        p /= p.sum(-1, keepdims=True)
    if tail == "renormalise":
        log_p = log_softmax(log_p)
    expected = (p * (np.log(p) - log_p)).sum(-1)
    rest_s = 1 - np.exp(np.take_along_axis(log_s, ids, -1)).sum(-1)
    rest_p = 1 - p.sum(-1)
    slope = np.exp(log_p) - p
    if tail == "ignore":
        expected += slope.sum(-1)
        slope -= np.exp(log_p) * slope.sum(-1, keepdims=True)
    if tail == "bucket":
        expected += rest_p * np.log(rest_p / rest_s)
    outside = {"bucket": rest_s - rest_p, "ignore": rest_s * (rest_s - rest_p), "renormalise": 0 * rest_s}
    grad = np.exp(log_s) * (outside.get(tail, rest_s) / rest_s).reshape(3, 1)
    np.put_along_axis(grad, ids, slope, -1)
    rows, got = _host.topk_distill(s, ids, p if tail == "sampled" else kept, tail, 1.5, variant=variant)
    assert rows.dtype == np.float32 and got.dtype == s.dtype
    assert relative_error(rows, expected) < 2e-6 and relative_error(got, grad / 1.5) < ROUNDING[dtype] + 2e-6
    alone, none = _host.topk_distill(s, ids, p if tail == "sampled" else kept, tail, 1.5, variant=variant, grad=False)
    assert np.array_equal(alone, rows) and none.shape == (0, 0)


def sparse24_case(n: int, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values [n, k/2], metadata uint16 [n, k/16], dense float64 [n, k]; every legal pair of columns."""
    rng = np.random.default_rng(n * 1000 + k)
    values = stored(rng.standard_normal((n, k // 2)), dtype)
    pairs = np.array([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)])[rng.integers(6, size=(n, k // 4))]
    dense = np.zeros((n, k // 4, 4))
    np.put_along_axis(dense, pairs, wide(values).reshape(n, k // 4, 2), -1)
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).reshape(n, k // 16, 4)
    metadata = (nibbles << np.arange(0, 16, 4)).sum(-1).astype(np.uint16)
    return values, metadata, dense.reshape(n, k)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (5, 64), (17, 96), (33, 352), (8, 2048)])
def test_sparse24_linear(n: int, k: int, tokens: int, dtype: str, variant: str) -> None:
    values, metadata, dense = sparse24_case(n, k, dtype)
    x = np.random.default_rng(tokens).standard_normal((tokens, k)).astype(np.float32)
    y = _host.sparse24_linear(x, values, metadata, variant=variant)
    assert y.shape == (tokens, n) and y.dtype == values.dtype
    check_product(y, x, dense, dtype)


def bitmap_case(n: int, k: int, density: float, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """values flat, bitmaps uint64 [tiles, 16], offsets int64 [tiles + 1], dense float64 [n, k]; k a multiple of 64."""
    rng = np.random.default_rng(n * 1000 + k)
    dense = stored(np.where(rng.random((n, k)) < density, rng.standard_normal((n, k)), 0), dtype)
    padded = np.zeros((-(-n // 16) * 16, k), dense.dtype)
    padded[:n] = dense
    tiles = padded.reshape(-1, 16, k // 64, 64).transpose(0, 2, 1, 3).reshape(-1, 16, 64)
    kept = tiles != 0
    bitmaps = np.packbits(kept, axis=-1, bitorder="little").view("<u8").reshape(-1, 16)
    offsets = np.concatenate([[0], kept.sum((1, 2)).cumsum()]).astype(np.int64)
    return tiles[kept], bitmaps, offsets, wide(dense)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (16, 64), (17, 128), (33, 192), (130, 320)])
def test_bitmap_linear(n: int, k: int, tokens: int, density: float, dtype: str, variant: str) -> None:
    values, bitmaps, offsets, dense = bitmap_case(n, k, density, dtype)
    x = np.random.default_rng(tokens).standard_normal((tokens, k)).astype(np.float32)
    if variant == "avx512_bf16" and dtype == "bfloat16":  # whose activations come from bfloat16
        x = wide(stored(x, dtype)).astype(np.float32)
    y = _host.bitmap_linear(x, values, bitmaps, offsets, n, variant=variant)
    assert y.shape == (tokens, n) and y.dtype == values.dtype
    check_product(y, x, dense, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_stays_in_its_row(variant: str) -> None:
    """A NaN among the weights reaches one output of every token, one among the activations every output of one."""
    x = np.ones((4, 128), np.float32)
    values, metadata, _ = sparse24_case(40, 128, "float32")
    flat, bitmaps, offsets, _ = bitmap_case(40, 128, 0.5, "float32")
    values[17, 3] = NAN
    row = 16 + int(np.flatnonzero(bitmaps[2])[0])  # rows 16 to 31, columns 0 to 63: the first that stores anything
    flat[offsets[2]] = NAN
    for y, marked in (
        (_host.sparse24_linear(x, values, metadata, variant=variant), 17),
        (_host.bitmap_linear(x, flat, bitmaps, offsets, 40, variant=variant), row),
    ):
        assert np.array_equal(np.isnan(y), np.broadcast_to(np.arange(40) == marked, (4, 40)))
    values, metadata, _ = sparse24_case(40, 128, "float32")
    flat, bitmaps, offsets, _ = bitmap_case(40, 128, 1.0, "float32")
    x[2, 100] = NAN
    full = _host.bitmap_linear(x, flat, bitmaps, offsets, 40, variant=variant)
    half = _host.sparse24_linear(x, values, metadata, variant=variant)
    assert np.isnan(full[2]).all() and np.isfinite(np.delete(full, 2, 0)).all()
    assert np.isnan(half[2]).any() and np.isfinite(np.delete(half, 2, 0)).all()


@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_variant_is_what_the_isa_runs(variant: str) -> None:
    """The ops of torch give bit for bit what the variant of that name gives; avx512_lookup where its time has come, and
    the variant for narrow values elsewhere."""
    import torch

    import pyfast
    from pyfast import backends

    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 4, 3000)).astype(np.float32)
    n, k = 64, 512
    x = rng.standard_normal((1, k)).astype(np.float32)
    values, metadata, _ = sparse24_case(n, k, "float32")
    weight_24 = pyfast.Sparse24Weight(torch.from_numpy(values), torch.from_numpy(metadata.view(np.int16)), (n, k))
    with backends.isa(variant):
        rows = pyfast.distillation_loss(
            torch.from_numpy(s), torch.from_numpy(t), reduction="none", scale_by_t2=False
        ).numpy()
        assert np.array_equal(rows, _host.distill_kl(s, t, variant=variant)[0])
        y = pyfast.sparse_linear(torch.from_numpy(x), weight_24, backend="native").numpy()
        assert np.array_equal(y, _host.sparse24_linear(x, values, metadata, variant=variant))
        for density in (0.1, 0.5):
            flat, bitmaps, offsets, _ = bitmap_case(n, k, density, "float32")
            parts = (torch.from_numpy(a) for a in (flat, bitmaps.view(np.int64), offsets))
            weight = pyfast.BitmapWeight(*parts, (n, k))
            y = pyfast.sparse_linear(torch.from_numpy(x), weight, backend="native").numpy()
            looked_up = variant == "avx512" and density < 0.3 and "avx512_lookup" in VARIANTS
            expected = _host.bitmap_linear(x, flat, bitmaps, offsets, n, "avx512_lookup" if looked_up else variant)
            assert np.array_equal(y, expected)


# Loads the module by its path, nothing else of the package; every array ends where readable memory ends.
ALONE = """
import ctypes, importlib.util, mmap, sys
import numpy as np

spec = importlib.util.spec_from_file_location("_host", sys.argv[1])
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
assert "torch" not in sys.modules and "pyfast" not in sys.modules

libc, PAGE = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE

def fenced(a):
    room = -(-max(a.nbytes, 1) // PAGE) * PAGE
    memory = np.frombuffer(mmap.mmap(-1, room + PAGE), np.uint8)
    assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + room), ctypes.c_size_t(PAGE), 0) == 0
    copy = memory[room - a.nbytes : room].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy

rng = np.random.default_rng(0)
for variant in host.variants():
    for dtype in (np.float32, np.float16, np.uint16):
        for vocab in (1, 7, 17, 1025):
            s = fenced((rng.random((2, vocab)) * 9).astype(dtype))
            rows, _ = host.distill_kl(s, fenced(s[::-1]), variant=variant)
            assert np.isfinite(rows).all()
            ids = fenced(np.stack([rng.permutation(vocab)[: vocab // 2 + 1] for _ in range(2)]))
            for tail in ("bucket", "renormalise", "sampled"):
                weights = rng.random(ids.shape) if tail == "sampled" else np.full(ids.shape, -9.0)
                rows, _ = host.topk_distill(s, ids, fenced(weights), tail, variant=variant)
                assert np.isfinite(rows).all()
        for n, k, tokens in ((1, 32, 1), (5, 96, 4), (16, 352, 5)):
            x = fenced(rng.random((tokens, k)).astype(np.float32))
            v = fenced((rng.random((n, k // 2)) * 9).astype(dtype))
            m = fenced(np.full((n, k // 16), 0x4E9C, np.uint16))
            host.sparse24_linear(x, v, m, variant=variant)
        for n, k, tokens in ((1, 64, 1), (17, 128, 3), (40, 192, 4)):
            x = fenced(rng.random((tokens, k)).astype(np.float32))
            for low in range(1, 64, 6):
                tiles = -(-n // 16) * (k // 64)
                bits = rng.integers(0, 2**low, (tiles, 16), np.uint64)
                if n % 16:  # no bit below the last row
                    for tile in range(tiles - k // 64, tiles):
                        rows = np.clip(n % 16 - 8 * (np.arange(16) % 2), 0, 8)
                        bits[tile] &= np.array([2 ** (8 * int(r)) - 1 for r in rows], np.uint64)
                counts = np.unpackbits(bits.view(np.uint8).reshape(tiles, -1), axis=1).sum(1)
                offsets = fenced(np.concatenate([[0], counts.cumsum()]).astype(np.int64))
                v = fenced((rng.random(int(offsets[-1])) * 9).astype(dtype))
                host.bitmap_linear(x, v, fenced(bits), offsets, n, variant=variant)
assert "torch" not in sys.modules
print("alone", len(host.variants()))
"""


def test_loads_without_torch_and_reads_nothing_past_its_arrays() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE, _host.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit status {done.returncode} (-11 is a read past an array)\n{done.stderr}"
    assert done.stdout == f"alone {len(VARIANTS)}\n"


def ones(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


def pairs(*shape: int) -> np.ndarray:
    return np.full(shape, 0x4444, np.uint16)


def words(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint64)


def places(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


WRONG = {
    "unknown variant": ("distill_kl", (ones(2, 3), ones(2, 3)), {"variant": "sse9"}, ValueError, "variant: got 'sse9'"),
    "vectors": ("distill_kl", (ones(3), ones(3)), {}, ValueError, "student, teacher"),
    "three axes": ("distill_kl", (ones(1, 2, 3), ones(1, 2, 3)), {}, ValueError, "student, teacher"),
    "two vocabularies": ("distill_kl", (ones(2, 3), ones(2, 4)), {}, ValueError, "student, teacher"),
    "two batches": ("distill_kl", (ones(2, 3), ones(1, 3)), {}, ValueError, "student, teacher"),
    "float64": ("distill_kl", (ones(2, 3, dtype="f8"), ones(2, 3, dtype="f8")), {}, TypeError, "student: accepted"),
    "int32": ("distill_kl", (ones(2, 3, dtype="i4"), ones(2, 3, dtype="i4")), {}, TypeError, "student: accepted"),
    "int16": ("distill_kl", (ones(2, 3, dtype="i2"), ones(2, 3, dtype="i2")), {}, TypeError, "student: accepted"),
    "two dtypes": ("distill_kl", (ones(2, 3), ones(2, 3, dtype="f2")), {}, (TypeError, ValueError), "teacher"),
    "no array": ("distill_kl", ([[1.0]], [[1.0]]), {}, TypeError, "student: numpy.ndarray"),
    "temperature 0": ("distill_kl", (ones(2, 3), ones(2, 3), 0.0), {}, ValueError, "temperature: accepted: above 0"),
    "temperature NaN": ("distill_kl", (ones(2, 3), ones(2, 3), NAN), {}, ValueError, "temperature"),
    "teacher's below 0": ("distill_kl", (ones(2, 3), ones(2, 3), 1.0, -1.0), {}, ValueError, "temperature"),
    "top-k unknown variant": (
        "topk_distill", (ones(2, 3), places(1, 2)[:, None], ones(2, 1, dtype="f8")), {"variant": "sse9"}, ValueError,
        "variant: got 'sse9'",
    ),
    "top-k int32 ids": (
        "topk_distill", (ones(2, 3), ones(2, 1, dtype="i4"), ones(2, 1, dtype="f8")), {}, TypeError, "ids: accepted",
    ),
    "top-k float32 entries": (
        "topk_distill", (ones(2, 3), places(1, 2)[:, None], ones(2, 1)), {}, TypeError, "entries: accepted: float64",
    ),
    "top-k two batches": (
        "topk_distill", (ones(3, 3), places(1, 2)[:, None], ones(2, 1, dtype="f8")), {}, ValueError, "ids, entries",
    ),
    "top-k tail": (
        "topk_distill", (ones(2, 3), places(1, 2)[:, None], ones(2, 1, dtype="f8"), "cut"), {}, ValueError, "tail",
    ),
    "top-k temperature": (
        "topk_distill", (ones(2, 3), places(1, 2)[:, None], ones(2, 1, dtype="f8"), "bucket", 0.0), {}, ValueError,
        "temperature: accepted: above 0",
    ),
    "2:4 unknown variant": (
        "sparse24_linear", (ones(1, 32), ones(5, 16), pairs(5, 2)), {"variant": ""}, ValueError, "variant: got ''",
    ),
    "2:4 token without its axis": (
        "sparse24_linear", (ones(32), ones(5, 16), pairs(5, 2)), {}, ValueError, "x, values, metadata",
    ),
    "2:4 narrow x": ("sparse24_linear", (ones(1, 31), ones(5, 16), pairs(5, 2)), {}, ValueError, "x, values, metadata"),
    "2:4 width": ("sparse24_linear", (ones(1, 16), ones(5, 8), pairs(5, 1)), {}, ValueError, "k a multiple of 32"),
    "2:4 metadata rows": ("sparse24_linear", (ones(1, 32), ones(5, 16), pairs(4, 2)), {}, ValueError, "metadata"),
    "2:4 metadata columns": ("sparse24_linear", (ones(1, 32), ones(5, 16), pairs(5, 1)), {}, ValueError, "metadata"),
    "2:4 float64": (
        "sparse24_linear", (ones(1, 32), ones(5, 16, dtype="f8"), pairs(5, 2)), {}, TypeError, "values: accepted",
    ),
    "bitmap unknown variant": (
        "bitmap_linear", (ones(1, 64), ones(0), words(1, 16), places(0, 0), 5), {"variant": "avx"}, ValueError,
        "variant: got 'avx'",
    ),
    "bitmap width": ("bitmap_linear", (ones(1, 32), ones(0), words(1, 16), places(0, 0), 5), {}, ValueError, "x: acc"),
    "bitmap token without its axis": (
        "bitmap_linear", (ones(64), ones(0), words(1, 16), places(0, 0), 5), {}, ValueError, "x: accepted",
    ),
    "bitmap tiles": (
        "bitmap_linear", (ones(1, 64), ones(0), words(1, 16), places(0, 0), 17), {}, ValueError, "bitmaps: accepted",
    ),
    "bitmap words": (
        "bitmap_linear", (ones(1, 64), ones(0), words(1, 15), places(0, 0), 5), {}, ValueError, "bitmaps: accepted",
    ),
    "bitmap offsets": (
        "bitmap_linear", (ones(1, 64), ones(0), words(1, 16), places(0), 5), {}, ValueError, "offsets: accepted",
    ),
    "bitmap values missing": (
        "bitmap_linear", (ones(1, 64), ones(3), words(1, 16), places(0, 4), 5), {}, ValueError, "offsets: accepted",
    ),
    "bitmap values in a matrix": (
        "bitmap_linear", (ones(1, 64), ones(1, 0), words(1, 16), places(0, 0), 5), {}, ValueError, "offsets: accepted",
    ),
    "bitmap float64": (
        "bitmap_linear", (ones(1, 64), ones(0, dtype="f8"), words(1, 16), places(0, 0), 5), {}, TypeError,
        "values: accepted",
    ),
    "bitmap rows below 0": (
        "bitmap_linear", (ones(1, 64), ones(0), words(0, 16), places(0), -1), {}, ValueError, "n: accepted",
    ),
    "bitmap bits without values": (
        "bitmap_linear", (ones(1, 64), ones(0), words(1, 16) + 1, places(0, 0), 5), {}, ValueError, "offsets: do not",
    ),
    "bitmap float words": (
        "bitmap_linear", (ones(1, 64), ones(0), ones(1, 16), places(0, 0), 5), {}, TypeError, "bitmaps: accepted",
    ),
    "x of bfloat16 bits": (
        "sparse24_linear", (ones(1, 32, dtype="u2"), ones(5, 16), pairs(5, 2)), {}, TypeError, "x: accepted: float32",
    ),
    "2:4 float metadata": (
        "sparse24_linear", (ones(1, 32), ones(5, 16), ones(5, 2)), {}, TypeError, "metadata: accepted: uint16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    function, arguments, options, error, message = WRONG[case]
    with pytest.raises(error) as caught:
        getattr(_host, function)(*arguments, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_in_nothing_out(variant: str) -> None:
    rows, grad = _host.distill_kl(ones(0, 7), ones(0, 7), variant=variant)
    assert rows.shape == (0,) and grad.shape == (0, 7)
    assert _host.sparse24_linear(ones(0, 32), ones(5, 16), pairs(5, 2), variant=variant).shape == (0, 5)
    assert _host.bitmap_linear(ones(0, 64), ones(0), words(1, 16), places(0, 0), 5, variant=variant).shape == (0, 5)
    assert _host.bitmap_linear(ones(2, 64), ones(0), words(0, 16), places(0), 0, variant=variant).shape == (2, 0)
