"""scattered_linear: the layout made from a bitmap weight, bit for bit, and its CUDA kernels, executed on the host and
judged against float64."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from layout_cases import (
    HALVES,
    bits_of,
    check_on_the_gpu,
    check_reference,
    check_refusals,
    check_rows_that_store_nothing,
    product_error,
    sparse,
)
from simt import host
from sparse_cases import awkward, same_bits, weight_unstructured
from test_cuda_build import stated_resources
from test_simt_bitmap_linear import ACTIVATIONS
from torch import Tensor

import pyfast
from pyfast.reference import scattered_linear as reference
from pyfast.sparse import sliced
from pyfast.sparse.scattered import ScatteredLayout


def layout_of(dense: Tensor) -> ScatteredLayout:
    return ScatteredLayout.of(pyfast.BitmapWeight.from_dense(dense))


def run(
    x: Tensor,
    layout: ScatteredLayout,
    bias: Tensor | None = None,
    activation: int = 0,
    mul: Tensor | None = None,
    splits: int = 1,
    cluster: bool = False,
    order: int = 0,
    library: host.Library | None = None,
) -> Tensor:
    """What the kernel gives."""
    tokens, k = x.shape
    columns = -(-k // reference.IMAGE_COLUMNS) * reference.IMAGE_COLUMNS
    y = host.Output((tokens, layout.n), np.uint16)
    arguments = [bits_of(torch.nn.functional.pad(x, (0, columns - k))), bits_of(layout.values), layout.deltas.numpy()]
    arguments += [layout.extras.numpy().view(np.uint32), layout.ends.numpy()]
    arguments += [None if extra is None else bits_of(extra) for extra in (bias, mul)]
    numbers = [tokens, layout.n, columns, activation, splits, int(cluster), int(x.dtype == torch.bfloat16)]
    (library or host.build("scattered_linear")).run("scattered_linear", *arguments, y, *numbers, order=order)
    return torch.from_numpy(y.array.view(np.int16)).view(x.dtype)


def error(
    dense: Tensor,
    tokens: int,
    activation: str = "none",
    extras: bool = False,
    splits: int = 1,
    cluster: bool = False,
    order: int = 0,
    library: host.Library | None = None,
) -> float:
    """Relative error of the kernel, in units of the largest that rounding its output makes."""
    layout = layout_of(dense)

    def multiply(x: Tensor, *given: Any) -> Tensor:
        return run(x, layout, *given, splits=splits, cluster=cluster, order=order, library=library)

    return product_error(multiply, dense, tokens, activation, extras)


def uneven(n: int, k: int, kind: str = "bf16") -> Tensor:
    """A full row and full columns among nearly empty and empty ones: lanes with far more entries than others."""
    dense = sparse(n, k, 0.01, kind)
    dense[n // 2] = torch.randn(k).to(dense.dtype)
    dense[:, ::17] = torch.randn(n, len(range(0, k, 17))).to(dense.dtype)
    dense[: n // 4] = 0
    return dense


# ---- The layout -----------------------------------------------------------------------------------------------------

SHAPES = [(1, 1), (3, 5), (64, 64), (65, 63), (130, 896), (5, 5001)]


@pytest.mark.parametrize("dtype", HALVES.values())
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_layout_holds_the_weight_bit_for_bit(n: int, k: int, dtype: torch.dtype) -> None:
    """−0.0, NaN and infinities, full and empty tiles, long distances, lanes with many entries and with none."""
    dense = [weight_unstructured(n, k, sparsity, dtype) for sparsity in (0.0, 0.5, 0.9, 0.99, 1.0)]
    for weight in (awkward(n, k, dtype), uneven(n, k).to(dtype), *dense):
        layout = layout_of(weight)
        back = reference.decompress(layout.values, layout.deltas, layout.extras, layout.ends, n, k)
        assert same_bits(back, weight)
        assert layout.nbytes == sum(t.nbytes for t in vars(layout).values() if isinstance(t, Tensor))


def test_blocks_of_rows_give_the_same_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = sparse(300, 200, 0.3)
    whole = layout_of(dense)
    monkeypatch.setattr(sliced, "BLOCK_ELEMENTS", 200 * 64)
    for name, tensor in vars(layout_of(dense)).items():
        assert name == "n" or torch.equal(tensor.view(torch.uint8), getattr(whole, name).view(torch.uint8)), name


def test_every_position_of_a_tile_has_its_place() -> None:
    """The picture of csrc/cuda/scattered_linear.cuh, written out."""
    dense = torch.arange(4096, dtype=torch.float32).view(64, 64)
    images = reference.to_images(dense)
    assert images.shape == (1, 128, 32)
    for row in range(64):
        for column in range(64):
            row_tile, g, lower = row // 16, row % 8, row % 16 // 8
            step, t, right, half = column // 32 * 2 + column % 8 // 4, column % 32 // 8, column % 4 // 2, column % 2
            fragment, lane, register = 4 * row_tile + step, 4 * g + t, lower + 2 * right
            word = 128 * fragment + 4 * lane + register
            assert images[0, word // 32 + 64 * half, word % 32] == dense[row, column]
    assert torch.equal(reference.from_images(images, 64, 64), dense)


@pytest.mark.parametrize(("sparsity", "smaller"), [(0.5, 1.49), (0.7, 2.38), (0.8, 3.46), (0.9, 5.7), (0.95, 9.6)])
def test_bytes_are_those_that_the_kernel_states(sparsity: float, smaller: float) -> None:
    layout = layout_of(weight_unstructured(512, 2048, sparsity, torch.bfloat16))
    assert smaller < 2 * 512 * 2048 / layout.nbytes < 1.04 * smaller


def test_a_tile_has_as_many_chunks_as_make_it_smallest() -> None:
    """A chunk has 640 bytes, 32 extras have 128: one entry in every lane is extras, six are a chunk."""
    dense = torch.zeros(64, 128, dtype=torch.float16)
    words = reference.to_images(torch.arange(4096, dtype=torch.float32).view(64, 64))[0, :6].long()
    first, second = torch.zeros(4096, dtype=torch.float16), torch.zeros(4096, dtype=torch.float16)
    first[words[0]], second[words.reshape(-1)] = 1, 2
    dense[:, :64], dense[:, 64:] = first.view(64, 64), second.view(64, 64)
    layout = layout_of(dense)
    assert layout.ends.tolist() == [[0, 0], [0, 8], [1, 8]]
    assert (layout.values == 2).all()  # two times the last one again
    assert layout.deltas[0].tolist() == [[17, 17, 1, 1]] * 32  # six times 1, two times 0


def test_a_lane_without_entries_writes_a_zero_at_its_first_place() -> None:
    images = torch.zeros(1, 128, 32)
    images[0, 5:11] = torch.randn(6, 32)
    images[0, :, 7] = 0
    dense = reference.from_images(images, 64, 64).bfloat16()
    layout = layout_of(dense)
    assert layout.ends.tolist() == [[0, 0], [1, 0]]
    assert layout.deltas[0, 7].tolist() == [1, 0, 0, 0] and not layout.values[0, 7].any()
    assert error(dense, 8) < 1.0


def test_the_layout_refuses_what_the_kernel_cannot_do() -> None:
    check_refusals(ScatteredLayout)


# ---- The op ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES.values())
def test_the_reference_is_the_dense_product(dtype: torch.dtype) -> None:
    check_reference(layout_of, dtype)


def test_it_has_a_fake_and_no_gradient() -> None:
    layout = layout_of(sparse(70, 300, 0.2))
    pattern = layout.deltas, layout.extras, layout.ends
    x = torch.randn(3, 300, dtype=torch.bfloat16, device="meta", requires_grad=True)
    tensors = layout.values.to("meta"), *(t.to("meta") for t in pattern)
    y = torch.ops.pyfast.scattered_linear(x, *tensors, None, 70, 0, None)
    assert y.shape == (3, 70) and y.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="scattered_linear: has no gradient"):
        y.sum().backward()


# ---- The kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 16, 17, 27, 32])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (65, 131), (200, 776)])
def test_product(n: int, k: int, tokens: int, kind: str) -> None:
    assert error(sparse(n, k, 0.4, kind), tokens) < 1.0


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("tokens", [3, 12, 20])
def test_densities(tokens: int, density: float) -> None:
    """Nothing stored, extras alone, bridges, full tiles."""
    assert error(sparse(100, 1000, density, "f16"), tokens) < 1.0


@pytest.mark.parametrize("order", host.ORDERS)
@pytest.mark.parametrize(("splits", "cluster"), [(1, False), (2, True), (3, False), (8, True)])
def test_any_split_and_any_order_of_lanes_and_blocks(splits: int, cluster: bool, order: int) -> None:
    """Warps with several tiles, with one and with none."""
    assert error(sparse(70, 2000, 0.3), 8, splits=splits, cluster=cluster, order=order) < 1.0
    assert error(sparse(300, 300, 0.5, "f16"), 13, splits=splits, cluster=cluster, order=order) < 1.0
    assert error(uneven(130, 900), 30, splits=splits, cluster=cluster, order=order) < 1.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation: str) -> None:
    for tokens in (6, 14, 25):
        assert error(uneven(150, 500), tokens, activation, extras=True) < 1.0


def test_rows_that_store_nothing() -> None:
    check_rows_that_store_nothing(lambda x, dense, *given: run(x, layout_of(dense), *given))


@pytest.mark.parametrize(
    ("row_blocks", "stages", "balanced", "counted"),
    [
        (64, 16, 8, 8),  # 4096 x 4096: 512 blocks of 2 tiles a warp
        (224, 16, 4, 2),  # 14336 x 4096: 896 blocks, 7 on the busiest multiprocessor; 448, all at once
        (56, 74, 7, 8),  # 3584 x 18944: 392 blocks, 3 on each; 448 are 4 on some
        (1, 1, 1, 1),
        (1, 3, 3, 1),
        (5000, 64, 1, 2),
    ],
)
def test_blocks_that_share_columns(row_blocks: int, stages: int, balanced: int, counted: int) -> None:
    """On 132 multiprocessors, of 4 blocks each: by the busiest multiprocessor, and by what runs at once."""
    splits = host.Output(2, np.int64)
    host.build("scattered_linear").run("count_blocks", splits, row_blocks, stages, 132, 528)
    assert splits.memory.tolist() == [balanced, counted]


def test_shared_memory_is_what_the_head_of_the_kernel_says() -> None:
    held = host.Output(3, np.int32)
    host.build("scattered_linear").run("scattered_shared_bytes", held)
    stated = stated_resources("scattered_linear")
    assert [stated[f"scattered_linear_kernel<T, {2**i}>"][1] for i in range(3)] == held.memory.tolist()


# The real kernels, broken: what must see it is either the machine's rules or the numbers.
# (text, replacement, message; None: the numbers, or some rule as luck has it)
KERNEL = "scattered_linear.cuh"
MUTANTS = {
    "entries before the zeros": (
        "  ptx::syncwarp();\n  if (left > 0 && lane < 2)",
        "  if (left > 0 && lane < 2)",
        "no barrier",
    ),
    "fragments read before they are there": (
        "      ptx::syncwarp();\n      PYFAST_UNROLL",
        "      PYFAST_UNROLL",
        "no barrier",
    ),
    "entries before the last tile is read": (
        "      x += 2 * kImageColumns;\n      ptx::syncwarp();",
        "      x += 2 * kImageColumns;",
        "no barrier",
    ),
    "sums put down while others read fragments": (
        "  ptx::syncthreads();\n\n  float* const totals",
        "\n  float* const totals",
        "no barrier",
    ),
    "sums read before they are there": ("  ptx::syncthreads();\n  finish_sums", "  finish_sums", "no barrier|nobody"),
    "a fragment keeps its entries": ("        ptx::st_shared(from, Words4{});\n", "", None),
    "chunks used before they arrive": (
        "cp_async_wait<Plan::kAhead - 1>",
        "cp_async_wait<Plan::kAhead>",
        "not waited|wait",
    ),
    "chunks past the last": ("      if (more > 0) {", "      {", "outside|past"),
    "extras of lanes that have none": ("if (lane < groups) scatter(extra", "scatter(extra", "no barrier"),
    "extras of a long list forgotten": (
        "for (int i = 32; i < groups; i += 32)",
        "for (int i = 64; i < groups; i += 32)",
        None,
    ),
    "the end of the tile before": ("      begin = end, end = next_end;", "      begin = end;", None),
    "upper halves in the lower ones": ("kAllImageBytes - 2;", "kAllImageBytes;", None),
    "addresses of another block": (
        "images + entry_place(at)",
        "entry_place(images + at)",
        "outside|may not have begun",
    ),
    "distances of another stride": ("kLineBytes / 16 * 0x01010101u", "kLineBytes / 32 * 0x01010101u", "outside"),
    "nibbles exchanged": ("half == 0 ? deltas << 4 : deltas", "half == 1 ? deltas << 4 : deltas", None),
    "halves of a pair exchanged": (">> 16 * (i % 2));", ">> 16 * (1 - i % 2));", None),
    "steps exchanged": ("step % 2 == 0 ? four.x : four.z", "step % 2 == 1 ? four.x : four.z", None),
    "the next columns of x": ("b[i][step / 2]", "b[i][1 - step / 2]", None),
    "x of the tile before": ("      x += 2 * kImageColumns;\n", "", None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_fails(name: str) -> None:
    """Several tiles a warp, one of them with a long list of extras, and warps with fewer tiles than others."""
    old, new, message = MUTANTS[name]
    # One dtype and width save most of the compilation.
    spared = ["choose<Float16>(args, static_cast<unsigned>(splits), cluster != 0);"]
    spared += [f"launch<T, {tiles}>(args, splits, cluster);" for tiles in (2, 4)]
    changes = {("scattered_linear.cpp", text): "{}" for text in spared} | {(KERNEL, old): new}
    library = host.build("scattered_linear", changes)
    dense = sparse(64, 64 * 10, 0.4)
    dense[:, 64:128] = sparse(64, 64, 0.06)
    try:
        found = error(dense, 8, splits=2, cluster=True, library=library)
    except host.SimtError as refused:
        assert message is None or re.search(message, str(refused)), refused
    else:
        assert message is None and not found < 3.0


# ---- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", HALVES.values())
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (130, 896), (200, 1500), (1000, 18944), (4096, 4096), (14336, 4096)])
def test_on_the_gpu(n: int, k: int, density: float, dtype: torch.dtype) -> None:
    """The layout of the host, groups of tokens, and blocks that share columns in clusters."""
    weight = pyfast.BitmapWeight.from_dense(
        torch.randn(n, k, device="cuda", dtype=dtype), mask=torch.rand(n, k, device="cuda") < density
    )
    layout, dense = ScatteredLayout.of(weight), weight.to_dense()
    pattern = layout.values, layout.deltas, layout.extras, layout.ends
    assert same_bits(reference.decompress(*pattern, n, k), dense)
    if n * k < 10**6:
        for name, tensor in vars(layout_of(dense.cpu())).items():
            assert name == "n" or same_bits(getattr(layout, name).cpu(), tensor), name
    call = torch.ops.pyfast.scattered_linear
    check_on_the_gpu(lambda x, *given: call(x, *pattern, *given), dense, (1, 8, 13, 32, 40))
    x = torch.randn(11, k, device="cuda", dtype=dtype)
    torch.library.opcheck(call, (x, *pattern, None, n, 0, None))
