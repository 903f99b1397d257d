"""bitmap_linear's CUDA kernels, executed on the host and judged against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from simt import host
from test_cuda_build import stated_resources

from pyfast.reference import epilogue

ACTIVATIONS = {
    "none": lambda v: v,
    "relu": lambda v: np.maximum(v, 0),
    "gelu": lambda v: 0.5 * v * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "silu": lambda v: v / (1 + np.exp(-v)),
}
assert tuple(ACTIVATIONS) == epilogue.ACTIVATIONS


def tiles_of(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bitmaps uint64 [tiles, 16], offsets int64 [tiles + 1] and the places (row, column) [stored, 2], in storage order,
    of a boolean [n, k]."""
    n, k = stored.shape
    rows, columns = -(-n // 16), -(-k // 64)
    whole = np.zeros((16 * rows, 64 * columns), bool)
    whole[:n, :k] = stored
    tiles = whole.reshape(rows, 16, columns, 64).transpose(0, 2, 1, 3).reshape(-1, 16, 64)
    bitmaps = np.packbits(tiles, axis=-1, bitorder="little").view(np.uint64)[..., 0]
    offsets = np.append(0, tiles.sum((1, 2)).cumsum())
    tile, row, column = tiles.nonzero()
    places = np.stack([tile // columns * 16 + row, tile % columns * 64 + column], 1)
    return bitmaps, offsets, places


def pattern(rng: np.random.Generator, n: int, k: int, density: float) -> np.ndarray:
    """Random, but for a full and an empty tile."""
    stored = rng.random((n, k)) < density
    if 0 < density < 1:
        stored[:16, :64] = True
        stored[-16:, -64:] = False
    return stored


def whole_rows(x: np.ndarray) -> np.ndarray:
    """Rows of a multiple of 64 elements, as the launcher makes them."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % 64)))


def error(
    tokens: int,
    n: int,
    k: int,
    density: float = 0.4,
    kind: str = "bf16",
    activation: str = "none",
    extras: bool = False,
    splits: int = 1,
    cluster: bool = False,
    order: int = 0,
    mean: int | None = None,
    library: host.Library | None = None,
) -> float:
    """Relative error of the kernel, in units of the largest that rounding its output makes."""
    rng = np.random.default_rng(tokens * 7919 + n * 31 + k)
    bitmaps, offsets, places = tiles_of(pattern(rng, n, k, density))
    values = host.bits_from_float(rng.standard_normal(len(places)), kind)
    dense = np.zeros((n, k))
    dense[places[:, 0], places[:, 1]] = host.float_from_bits(values, kind)
    x = host.bits_from_float(rng.standard_normal((tokens, k)), kind)
    bias, mul = (host.bits_from_float(rng.standard_normal(shape), kind) for shape in (n, (tokens, n)))
    truth = host.float_from_bits(x, kind) @ dense.T
    if extras:
        truth = truth + host.float_from_bits(bias, kind)
    truth = ACTIVATIONS[activation](truth)
    if extras:
        truth = truth * host.float_from_bits(mul, kind)
    y = host.Output((tokens, n), np.uint16)
    mean = len(values) // len(bitmaps) if mean is None else mean
    numbers = [tokens, n, k, k + -k % 64, len(values), mean, list(ACTIVATIONS).index(activation), splits, int(cluster)]
    pointers = [whole_rows(x), values, bitmaps, offsets, bias if extras else None, mul if extras else None, y]
    (library or host.build("bitmap_linear")).run("bitmap_linear", *pointers, *numbers, int(kind == "bf16"), order=order)
    rounding = 2.0 ** (-8 if kind == "bf16" else -11)
    return np.linalg.norm(host.float_from_bits(y.array, kind) - truth) / max(np.linalg.norm(truth), 1e-9) / rounding


# Odd rows, columns in and out of the units (8 of x, 64 of a tile, the stage), every number of token tiles.
SHAPES = [
    (1, 1, 8),
    (1, 70, 1160),
    (2, 33, 392),
    (3, 64, 136),
    (4, 17, 264),
    (5, 33, 136),
    (8, 64, 576),
    (9, 31, 800),
    (16, 70, 512),
    (17, 65, 96),
    (32, 129, 200),
    (33, 50, 264),
    (64, 140, 640),
]


@pytest.mark.parametrize(("tokens", "n", "k"), SHAPES)
def test_product(tokens: int, n: int, k: int) -> None:
    assert error(tokens, n, k) < 1.0


@pytest.mark.parametrize("density", [0.0, 0.02, 0.7, 1.0])
@pytest.mark.parametrize("tokens", [1, 4, 12, 40])
def test_densities(tokens: int, density: float) -> None:
    """Nothing stored; rows with few values; tiles that do not fit in a slot (above 768 values) among them."""
    assert error(tokens, 40, 328, density, "f16") < 1.0


@pytest.mark.parametrize("tokens", [2, 9, 20])
def test_tiles_that_do_not_fit_are_read_where_they_lie(tokens: int) -> None:
    assert error(tokens, 40, 328, 0.5, mean=1) < 1.0


@pytest.mark.parametrize("order", host.ORDERS)
@pytest.mark.parametrize("tokens", [3, 7, 40])
def test_any_order_of_lanes_and_blocks(tokens: int, order: int) -> None:
    assert error(tokens, 66, 648, 0.3, "f16", order=order) < 1.0
    assert error(tokens, 66, 648, 0.3, "f16", splits=2, order=order) < 1.0
    assert error(tokens, 66, 648, 0.3, "f16", splits=2, cluster=True, order=order) < 1.0


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("splits", [2, 3, 5])
def test_splits(splits: int, cluster: bool) -> None:
    for tokens in (1, 12, 24):
        assert error(tokens, 37, 1088, 0.2, splits=splits, cluster=cluster, extras=True, activation="silu") < 1.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation: str) -> None:
    for tokens in (2, 6):
        assert error(tokens, 48, 320, 0.3, "bf16", activation, extras=True) < 1.0


@pytest.mark.parametrize("damage", [-(2**40), -1, 1, 10**6, 2**62])
def test_damaged_offsets_are_not_followed(damage: int) -> None:
    """The tiles on both sides of a wrong offset count as empty."""
    rng = np.random.default_rng(0)
    bitmaps, offsets, places = tiles_of(pattern(rng, 16, 256, 0.3))
    values = host.bits_from_float(rng.standard_normal(len(places)), "f16")
    damaged = offsets.copy()
    damaged[2] = damage
    kept = np.isin(places[:, 1] // 64, (0, 3))
    dense = np.zeros((16, 256))
    dense[places[kept, 0], places[kept, 1]] = host.float_from_bits(values[kept], "f16")
    for tokens in (1, 8):
        x = host.bits_from_float(rng.standard_normal((tokens, 256)), "f16")
        y = host.Output((tokens, 16), np.uint16)
        numbers = [tokens, 16, 256, len(values), 300, 0, 1, 0, 0]
        host.build("bitmap_linear").run("bitmap_linear", x, values, bitmaps, damaged, None, None, y, *numbers)
        np.testing.assert_allclose(
            host.float_from_bits(y.array, "f16"), host.float_from_bits(x, "f16") @ dense.T, rtol=2e-3, atol=2e-3
        )


def test_shared_memory_is_what_the_head_of_the_kernel_says() -> None:
    held = host.Output(7, np.int32)
    host.build("bitmap_linear").run("bitmap_shared_bytes", held, 512, 8)
    names = [f"bitmap_linear_kernel<T, {2**i}>" for i in range(4)] + [
        f"bitmap_vector_kernel<T, {2**i}>" for i in range(3)
    ]
    stated = {name: shared for name, (_, shared) in stated_resources("bitmap_linear").items() if name in names}
    assert dict(zip(names, held.memory.tolist(), strict=True)) == stated


# The real kernels, broken: what must see it is either the machine's rules or the numbers.
# (file, text, replacement, tokens, message)
MUTANTS = {
    "values used before they have come": (
        "bitmap_linear.cuh",
        "cp_async_wait<Plan::kStages - 2>",
        "cp_async_wait<Plan::kStages - 1>",
        6,
        "has not been waited for",
    ),
    "no barrier before x of a stage is used": (
        "bitmap_linear.cuh",
        "    ptx::syncthreads();\n    fetch_x(",
        "    ptx::syncwarp();\n    fetch_x(",
        6,
        "no barrier",
    ),
    "no barrier between the stages and the sums": (
        "bitmap_linear.cuh",
        "cp_async_wait<0>();\n  ptx::syncthreads();",
        "cp_async_wait<0>();",
        6,
        "no barrier|has not been",
    ),
    "lanes do not meet before a stage is used": (
        "bitmap_vector.cuh",
        "    ptx::syncwarp();\n",
        "",
        1,
        "no barrier|has not been",
    ),
    "offsets used before they have come": (
        "bitmap_stream.cuh",
        "ptx::cp_async_wait<0>();\n",
        "",
        1,
        "has not been|not been",
    ),
    "no word beyond the last value": (
        "bitmap_stream.cuh",
        "+ tile.count) + 4 + 15)",
        "+ tile.count) + 15)",
        1,
        "nobody|wrote",
    ),
    "reads past the values": ("bitmap_stream.cuh", "left >= 8 ? 16 :", "left >= 0 ? 16 :", 1, "outside|past"),
    "tiles past the last row": ("bitmap_stream.cuh", "&& row < weight.tiles ?", "?", 6, "outside|past"),
    "tokens past the last": ("bitmap_linear.cuh", "token < args.tokens && column", "column", 6, "outside|past"),
    "columns of x past its end": (
        "bitmap_vector.cuh",
        "token < args.tokens && at < args.k",
        "token < args.tokens",
        1,
        "outside|past",
    ),
    "rows exchanged": (
        "bitmap_linear.cuh",
        "first = quarters[stream.lane], second",
        "second = quarters[stream.lane], first",
        6,
        None,
    ),
    "odd runs not cut out": ("bitmap_vector.cuh", "static_cast<uint32_t>(at % 2) * 16", "0", 1, None),
    "values of the tile before": (
        "bitmap_stream.cuh",
        "static_cast<int>(begin & 7)",
        "0",
        6,
        "not at a multiple|multiple of",
    ),
    "swizzle of x forgotten": (
        "bitmap_linear.cuh",
        "row + (chunk ^ (token & 1)) * 16)",
        "row + chunk * 16)",
        6,
        None,
    ),
    "cluster leaves too early": (
        "split_sums.cuh",
        "sum);\n  }\n  ptx::cluster_sync();",
        "sum);\n  }",
        1,
        "is the last of its block to exit|has exited",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_fails(name: str) -> None:
    file, old, new, tokens, message = MUTANTS[name]
    # One dtype and the kernels in question save most of the compilation.
    spared = [
        "choose<Float16>(args, static_cast<unsigned>(splits), cluster != 0);",
        "vector<T, 2>(args, splits, cluster);",
        "vector<T, 4>(args, splits, cluster);",
        "matrix<T, 2>(args, splits, cluster);",
        "matrix<T, 4>(args, splits, cluster);",
        "matrix<T, 8>(args, splits, cluster);",
    ]
    library = host.build("bitmap_linear", {("bitmap_linear.cpp", text): "{}" for text in spared} | {(file, old): new})
    cluster = "cluster" in name
    arguments = dict(tokens=tokens, n=40, k=776, splits=2 if cluster else 1, cluster=cluster, library=library)
    if message is None:
        assert not error(**arguments) < 100
    else:
        with pytest.raises(host.SimtError, match=message):
            error(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize(
    ("tokens", "n", "k"), [*SHAPES, (1, 4096, 4096), (3, 1000, 4097), (16, 4096, 4096), (48, 640, 14336)]
)
def test_on_the_gpu(tokens: int, n: int, k: int, density: float, dtype: torch.dtype) -> None:
    import pyfast

    weight = pyfast.BitmapWeight.from_dense(
        torch.randn(n, k, device="cuda", dtype=dtype), mask=torch.rand(n, k, device="cuda") < density
    )
    x, mul = torch.randn(tokens, k, device="cuda", dtype=dtype), torch.randn(tokens, n, device="cuda", dtype=dtype)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    packed = (weight.values, weight.bitmaps, weight.offsets)
    call = torch.ops.pyfast.bitmap_linear_few
    y = call(x, *packed, bias, n, 4, mul)
    truth = torch.nn.functional.silu(x.double() @ weight.to_dense().double().T + bias.double()) * mul.double()
    rounding = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    assert (y.double() - truth).norm() < 1.1 * rounding * truth.norm()
    assert torch.equal(y, call(x, *packed, bias, n, 4, mul)), "not deterministic"
    torch.library.opcheck(call, (x, *packed, None, n, 0, None))

    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        replayed = call(x, *packed, bias, n, 4, mul)
    captured.replay()
    assert torch.equal(replayed, y)
