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


@pytest.mark.parametrize("density", [0.0, 0.02, 0.7, 0.97, 1.0])
@pytest.mark.parametrize("tokens", [1, 4, 12, 40])
def test_densities(tokens: int, density: float) -> None:
    """Nothing stored; rows with few values; tiles that do not fit in a slot (above 768 values) among them; streams that
    go round their ring and come late for a full stage."""
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


@pytest.mark.parametrize("place", [0, 2, 4, 8])
@pytest.mark.parametrize("damage", [-(2**40), -1, 1, 10**6, 2**62])
def test_damaged_offsets_are_not_followed(damage: int, place: int) -> None:
    """One token: the tiles on both sides of a wrong offset count as empty. More: only the offsets at the ends of a part
    are read; where they lie outside the values or ask for more than its tiles hold, the part counts as empty."""
    rng = np.random.default_rng(0)
    bitmaps, offsets, places = tiles_of(pattern(rng, 16, 512, 0.3))
    values = host.bits_from_float(rng.standard_normal(len(places)), "f16")
    damaged = offsets.copy()
    damaged[place] = damage
    column_tile = places[:, 1] // 64

    def product(tokens: int, splits: int) -> tuple[np.ndarray, np.ndarray]:
        """What the kernel gives, and the sum over each tile."""
        x = host.bits_from_float(rng.standard_normal((tokens, 512)), "f16")
        y = host.Output((tokens, 16), np.uint16)
        numbers = [tokens, 16, 512, 512, len(values), 300, 0, splits, int(splits > 1), 0]
        host.build("bitmap_linear").run("bitmap_linear", x, values, bitmaps, damaged, None, None, y, *numbers)
        sums = []
        for tile in range(8):
            dense = np.zeros((16, 512))
            kept = column_tile == tile
            dense[places[kept, 0], places[kept, 1]] = host.float_from_bits(values[kept], "f16")
            sums.append(host.float_from_bits(x, "f16") @ dense.T)
        return host.float_from_bits(y.array, "f16"), np.stack(sums)

    close = dict(rtol=2e-3, atol=2e-3)
    got, sums = product(1, 1)
    np.testing.assert_allclose(got, sum(sums[i] for i in range(8) if place not in (i, i + 1)), **close)
    for splits in (1, 2):
        got, sums = product(8, splits)
        part = 4 // splits
        if damage != 1 or place % part != 0:
            np.testing.assert_allclose(
                got, sum(sums[i] for i in range(8) if place not in (i // part * part, (i // part + 1) * part)), **close
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
# (file, text, replacement, tokens, message, changes to the case)
MUTANTS = {
    "values used before they have come": (
        "bitmap_linear.cuh",
        "    ptx::cp_async_wait<0>();\n    ptx::syncwarp();",
        "    ptx::syncwarp();",
        6,
        "has not been waited for",
        {},
    ),
    "lanes do not meet before a stage is used": (
        "bitmap_linear.cuh",
        "    ptx::cp_async_wait<0>();\n    ptx::syncwarp();",
        "    ptx::cp_async_wait<0>();",
        6,
        "no barrier|has not been waited for",
        {},
    ),
    "values that are asked for late are not waited for": (
        "bitmap_linear.cuh",
        "if (late)",
        "if (late && left < 0)",
        6,
        "has not been waited for",
        {"density": 0.9},
    ),
    "a tile that is not there yet is not asked for": (
        "bitmap_linear.cuh",
        "rings[i].fetch(lane, begin[i]);",
        "rings[i].fetch(lane, begin[i] - Plan::kRingBytes);",
        6,
        None,
        {"density": 0.97},
    ),
    "lanes do not meet before a tile is written over": (
        "bitmap_linear.cuh",
        "if (right > 0) ptx::syncwarp();",
        "",
        6,
        "no barrier",
        {"density": 0.9},
    ),
    "the bits of the last stage once more": (
        "bitmap_linear.cuh",
        "quarters += 64 * Plan::kColumnTiles",
        "quarters += 0",
        6,
        None,
        {},
    ),
    "bits past the last tile": (
        "bitmap_linear.cuh",
        "second ? 64 : 0)",
        "second || left > 0 ? 64 : 0)",
        6,
        "outside|past",
        {"n": 16, "k": 64},
    ),
    "bits of the stage past the last": (
        "bitmap_linear.cuh",
        "if (left > Plan::kColumnTiles) quarters",
        "quarters",
        6,
        "outside|past",
        {"n": 16, "k": 64},
    ),
    "no barrier between the stages and the sums": (
        "bitmap_linear.cuh",
        "cp_async_wait<0>();\n  ptx::syncthreads();",
        "cp_async_wait<0>();",
        6,
        "no barrier|has not been",
        {},
    ),
    "the ring without its mirror": (
        "bitmap_ring.cuh",
        "if (place == 0 && lane < kMirrorLanes) ptx",
        "if (place == 1) ptx",
        6,
        "nobody|past",
        {},
    ),
    "a position beyond the ring": ("bitmap_ring.cuh", "base + (from[1] & (Bytes - 1))", "base + from[1]", 6, ".", {}),
    "reads past the values": (
        "bitmap_ring.cuh",
        "copy_last_chunk(own + place + rest - cut, from + rest - cut, cut);",
        "ptx::cp_async<16>(own + place + rest - cut, from + rest - cut);",
        6,
        "outside|past",
        {},
    ),
    "the last chunk counts as whole": (
        "bitmap_ring.cuh",
        "from - head + whole <= weight.stored ? whole : values",
        "whole",
        6,
        "outside|past",
        {},
    ),
    "no zeros behind the last value": (
        "bitmap_tiles.cuh",
        "  *reinterpret_cast<Words4*>(to) = Words4{};\n",
        "",
        1,
        "nobody|wrote",
        {"n": 9, "k": 70},
    ),
    "a step past the values": ("bitmap_ring.cuh", "room < end ? room : end", "room", 6, "outside|past", {}),
    "values of the tile before": ("bitmap_ring.cuh", "at = 2 * head", "at = 0", 6, None, {}),
    "tiles past the last row": ("bitmap_linear.cuh", "row >= row_tiles ? 0 : ", "", 6, "outside|past", {}),
    "tiles past the last column": (
        "bitmap_linear.cuh",
        "if (right > 0 && left <= right) break;",
        "",
        6,
        "outside|past",
        {},
    ),
    "tokens past the last": ("bitmap_linear.cuh", "(g < args.tokens ? g : 0)", "g", 6, "outside|past", {}),
    "tokens stored twice": ("token_tiles.cuh", "if (token >= 8 * token_tile)", "", 13, "no barrier", {}),
    "rows exchanged": ("bitmap_expand.cuh", "before, 0x0002u, begin", "before, 0x0200u, begin", 6, None, {}),
    "both halves of a run from its beginning": ("bitmap_expand.cuh", "  from = at[4];", "", 6, None, {}),
    "lanes do not meet before a stage is used, one token": (
        "bitmap_vector.cuh",
        "    ptx::syncwarp();\n",
        "",
        1,
        "no barrier|has not been",
        {},
    ),
    "offsets used before they have come": (
        "bitmap_stream.cuh",
        "ptx::cp_async_wait<0>();\n",
        "",
        1,
        "has not been|not been",
        {},
    ),
    "no word beyond the last value": (
        "bitmap_stream.cuh",
        "+ tile.count) + 4 + 15)",
        "+ tile.count) + 15)",
        1,
        "nobody|wrote",
        {},
    ),
    "reads past the values, one token": (
        "bitmap_stream.cuh",
        "if (left >= 8)",
        "if (left >= 0)",
        1,
        "outside|past",
        {},
    ),
    "tiles past the last row, one token": (
        "bitmap_stream.cuh",
        "&& row < weight.tiles ?",
        "?",
        1,
        "outside|past",
        {},
    ),
    "columns of x past its end": (
        "bitmap_vector.cuh",
        "token < args.tokens && at < args.k",
        "token < args.tokens",
        1,
        "outside|past",
        {},
    ),
    "odd runs not cut out": ("bitmap_vector.cuh", "static_cast<uint32_t>(at % 2) * 16", "0", 1, None, {}),
    "cluster leaves too early": (
        "split_sums.cuh",
        "sum);\n  }\n  ptx::cluster_leave();",
        "sum);\n  }",
        1,
        "is the last of its block to exit|has exited",
        {"splits": 2, "cluster": True},
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_fails(name: str) -> None:
    file, old, new, tokens, message, changes = MUTANTS[name]
    # One dtype and the kernel in question save most of the compilation.
    calls = {1: "vector<T, 1>", 2: "vector<T, 2>", 4: "vector<T, 4>", 8: "matrix<T, 1>", 16: "matrix<T, 2>"}
    calls |= {32: "matrix<T, 4>", 64: "matrix<T, 8>"}
    needed = min(most for most in calls if most >= tokens)
    spared = [f"{call}(args, splits, cluster);" for most, call in calls.items() if most != needed]
    spared.append("choose<Float16>(args, static_cast<unsigned>(splits), cluster != 0);")
    library = host.build("bitmap_linear", {("bitmap_linear.cpp", text): "{}" for text in spared} | {(file, old): new})
    arguments = dict(tokens=tokens, n=40, k=776, library=library) | changes
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
