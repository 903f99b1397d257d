"""sparse24_linear's CUDA kernel, executed on the host and judged against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from simt import host
from test_cuda_build import stated_resources

from pyfast.reference import epilogue

PAIRS = np.array([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)])
ACTIVATIONS = {
    "none": lambda v: v,
    "relu": lambda v: np.maximum(v, 0),
    "gelu": lambda v: 0.5 * v * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "silu": lambda v: v / (1 + np.exp(-v)),
}


def weight(rng: np.random.Generator, n: int, k: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values [n, K/2], metadata uint16 [n, K/16] and the dense float64 [n, k] of a random 2:4 weight, where K is k
    rounded up to a multiple of 32."""
    groups = -(-k // 32) * 8
    pairs = PAIRS[rng.integers(6, size=(n, groups))]
    columns = pairs + 4 * np.arange(groups)[:, None]
    values = host.bits_from_float(rng.standard_normal((n, groups, 2)) * (columns < k), kind)
    dense = np.zeros((n, 4 * groups))
    np.put_along_axis(dense, columns.reshape(n, -1), host.float_from_bits(values, kind).reshape(n, -1), axis=1)
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).astype(np.uint16).reshape(n, -1, 4)
    metadata = (nibbles << np.array([0, 4, 8, 12], np.uint16)).sum(-1, dtype=np.uint16)
    return values.reshape(n, -1), metadata, dense[:, :k]


def error(
    tokens: int,
    n: int,
    k: int,
    kind: str = "bf16",
    activation: str = "none",
    extras: bool = False,
    splits: int = 1,
    cluster: bool = False,
    order: int = 0,
    library: host.Library | None = None,
) -> float:
    """Relative error of the kernel, in units of the rounding of its output."""
    rng = np.random.default_rng(tokens * 7919 + n * 31 + k)
    values, metadata, dense = weight(rng, n, k, kind)
    x = host.bits_from_float(rng.standard_normal((tokens, k)), kind)
    bias, mul = (host.bits_from_float(rng.standard_normal(shape), kind) for shape in (n, (tokens, n)))
    truth = host.float_from_bits(x, kind) @ dense.T / 1.0
    if extras:
        truth = truth + host.float_from_bits(bias, kind)
    truth = ACTIVATIONS[activation](truth)
    if extras:
        truth = truth * host.float_from_bits(mul, kind)
    y = host.Output((tokens, n), np.uint16)
    sizes = [tokens, n, k, 2 * values.shape[1], list(ACTIVATIONS).index(activation), splits, int(cluster)]
    pointers = [x, values, metadata, bias if extras else None, mul if extras else None, y]
    (library or host.build("sparse24_linear")).run(
        "sparse24_linear", *pointers, *sizes, int(kind == "bf16"), order=order
    )
    rounding = 2.0 ** (-9 if kind == "bf16" else -12)
    return np.linalg.norm(host.float_from_bits(y.array, kind) - truth) / np.linalg.norm(truth) / rounding


def test_the_activations_have_the_numbers_of_the_ops() -> None:
    assert tuple(ACTIVATIONS) == epilogue.ACTIVATIONS


# Odd rows, some in several tiles; columns in and out of the units (8 of x, 32 of the container, 64 and 128 of the
# stage, 128 of wide metadata), every number of token tiles.
SHAPES = [
    (1, 1, 8),
    (1, 40, 256),
    (5, 33, 136),
    (8, 32, 1664),
    (9, 31, 800),
    (16, 70, 512),
    (17, 65, 96),
    (32, 64, 776),
    (33, 50, 264),
    (64, 100, 640),
    (65, 130, 200),
    (200, 140, 264),
    (3, 300, 1000),
    (12, 257, 640),
    (40, 129, 1016),
]


@pytest.mark.parametrize(("tokens", "n", "k"), SHAPES)
def test_product(tokens: int, n: int, k: int) -> None:
    assert error(tokens, n, k) < 1.0


@pytest.mark.parametrize("order", host.ORDERS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_any_order_of_lanes_and_blocks(tokens: int, order: int) -> None:
    assert error(tokens, 66, 1032, "f16", order=order) < 1.0
    assert error(tokens, 66, 1032, "f16", splits=2, order=order) < 1.0
    assert error(tokens, 66, 1032, "f16", splits=2, cluster=True, order=order) < 1.0


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_splits(splits: int, cluster: bool) -> None:
    for tokens in (2, 12, 24, 130):
        assert error(tokens, 37, 1312, splits=splits, cluster=cluster, extras=True, activation="silu") < 1.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_epilogue(kind: str, activation: str) -> None:
    assert error(6, 48, 320, kind, activation, extras=True) < 1.0
    assert error(6, 48, 320, kind, activation) < 1.0


def test_shared_memory_is_what_the_head_of_the_kernel_says() -> None:
    stated = stated_resources("sparse24_linear")
    held = host.Output(5, np.int32)
    host.build("sparse24_linear").run("sparse24_shared_bytes", held)
    assert {f"sparse24_linear_kernel<T, {2**i}>": size for i, size in enumerate(held.memory)} == {
        name: shared for name, (_, shared) in stated.items() if "linear_kernel" in name
    }


# The real kernel, broken: what must see it is either the machine's rules or the numbers.
MUTANTS = {
    "no barrier before a stage is used": (
        "ptx::syncthreads();\n    fetch(shared",
        "fetch(shared",
        "no barrier|has not been|nobody has written",
    ),
    "one stage waited for too few": ("kStages - 2>();", "kStages - 1>();", "has not been waited for"),
    "no barrier between the last stage and the sums": (
        "cp_async_wait<0>();\n  ptx::syncthreads();",
        "cp_async_wait<0>();",
        "no barrier|has not been",
    ),
    "no barrier between the sums and their reader": (
        "sums[tile][token_tile][i];\n  ptx::syncthreads();",
        "sums[tile][token_tile][i];",
        "no barrier|nobody has written",
    ),
    "fetched into the stage that is read": (
        "fetch(shared + done,",
        "fetch(shared + (done + Plan::kStageBytes) % Plan::kSharedBytes,",
        "no barrier|in flight|under way|not been waited",
    ),
    "row tail not clipped": (
        "first_row + row < last_row ?",
        "first_row + row < last_row + 99 ?",
        "reads .* bytes outside all memory|past its end",
    ),
    "columns past the container": (
        "if (number >= whole[step])",
        "if (number >= whole[step] + 99)",
        "is none of 4, 8, 9, C, D, E",
    ),
    "values past the container": (
        "* Plan::kColumns, number < value_stages)",
        "* Plan::kColumns)",
        "outside all memory|past",
    ),
    "metadata past the container": ("word < words)", "word < words + 99)", "outside all memory|past"),
    "columns of x past its end": (
        "(2 * Plan::kColumns), number < x_stages[i])",
        "(2 * Plan::kColumns))",
        "outside all memory|past",
    ),
    "tokens past the last": ("at < static_cast<unsigned>(args.tokens) ?", "true ?", "outside all memory|past"),
    "values before the grid before has ended": (
        "  ptx::wait_prerequisites();\n",
        "",
        "before wait_prerequisites",
    ),
    "selectors exchanged": ("mma_sp_m16n8k32<T, 0>", "mma_sp_m16n8k32<T, 1>", None),
    "metadata halves exchanged": ("t % 2 == 0 ? 0x5410u : 0x7632u", "t % 2 == 1 ? 0x5410u : 0x7632u", None),
    "swizzle of the values forgotten": (
        "value_place = swizzled<Plan::kValueChunks>(row, chunk);",
        "value_place = (row * Plan::kValueChunks + chunk) * 16;",
        None,
    ),
    "place of the metadata forgotten": (
        "cuda::metadata_place(thread) * Plan",
        "thread * Plan",
        None,
    ),
    "cluster leaves too early": (
        "sum);\n  }\n  ptx::cluster_leave();",
        "sum);\n  }",
        "is the last of its block to exit|has exited",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_fails(name: str) -> None:
    old, new, message = MUTANTS[name]
    half = "choose<Float16>(args, static_cast<unsigned>(splits), cluster != 0);"  # saves half of the compilation
    file = "split_sums.cuh" if name == "cluster leaves too early" else "sparse24_linear.cuh"
    changes = {(file, old): new, ("sparse24_linear.cpp", half): ""}
    library = host.build("sparse24_linear", changes)
    cluster = "cluster" in name
    arguments = dict(tokens=13, n=50, k=1096, splits=2 if cluster else 1, cluster=cluster, library=library)
    if message is None:
        assert not error(**arguments) < 100
    else:
        with pytest.raises(host.SimtError, match=message):
            error(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "n", "k"), [*SHAPES, (7, 1000, 4097), (16, 4096, 4096), (48, 640, 14336)])
def test_on_the_gpu(tokens: int, n: int, k: int, dtype: torch.dtype) -> None:
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    values, metadata, dense = weight(np.random.default_rng(n + k), n, k, kind)
    packed = (
        torch.from_numpy(values.view(np.int16)).cuda().view(dtype),
        torch.from_numpy(metadata.view(np.int16)).cuda(),
    )
    x, mul = torch.randn(tokens, k, device="cuda", dtype=dtype), torch.randn(tokens, n, device="cuda", dtype=dtype)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    call = torch.ops.pyfast.sparse24_linear_mma
    y = call(x, *packed, bias, epilogue.ACTIVATIONS.index("silu"), mul)
    sums = x.double() @ torch.from_numpy(dense).cuda().T + bias.double()
    truth = torch.nn.functional.silu(sums) * mul.double()
    rounding = 2.0 ** (-9 if dtype == torch.bfloat16 else -12)
    assert (y.double() - truth).norm() < 1.1 * rounding * truth.norm()
    assert torch.equal(y, call(x, *packed, bias, 4, mul)), "not deterministic"
    torch.library.opcheck(call, (x, *packed, None, 0, None))

    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        replayed = call(x, *packed, bias, 4, mul)
    captured.replay()
    assert torch.equal(replayed, y)
