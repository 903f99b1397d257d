"""sliced_linear: the layout made from a bitmap weight, bit for bit, and its CUDA kernels, executed on the host and
judged against float64."""

from __future__ import annotations

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
from pyfast.ops import sliced_linear as op
from pyfast.reference import sliced_linear as reference
from pyfast.sparse import sliced
from pyfast.sparse.sliced import SlicedLayout

INFINITE = float("inf")


def layout_of(dense: Tensor, blocks: int = 3) -> SlicedLayout:
    return SlicedLayout.of(pyfast.BitmapWeight.from_dense(dense), multiprocessors=blocks)


def run(
    x: Tensor,
    layout: SlicedLayout,
    bias: Tensor | None = None,
    activation: int = 0,
    mul: Tensor | None = None,
    order: int = 0,
    library: host.Library | None = None,
) -> Tensor:
    """What the kernel gives. Its counters are zero before, and must be after."""
    tokens, k = x.shape
    columns = -(-k // 8) * 8
    blocks = len(layout.starts) // op.BLOCK_WARPS
    y, counters = host.Output((tokens, layout.n), np.uint16), host.InOut(np.zeros(blocks, np.uint32))
    arguments = [bits_of(torch.nn.functional.pad(x, (0, columns - k))), bits_of(layout.values), layout.deltas.numpy()]
    arguments += [bits_of(layout.starts), layout.segments.numpy(), layout.ends.numpy(), layout.rows.numpy()]
    arguments += [None if extra is None else bits_of(extra) for extra in (bias, mul)]
    numbers = [tokens, layout.n, columns, len(layout.values), blocks, layout.deltas.shape[-1], activation]
    (library or host.build("sliced_linear")).run(
        "sliced_linear", *arguments, y, counters, *numbers, int(x.dtype == torch.bfloat16), order=order
    )
    assert not counters.array.any()
    return torch.from_numpy(y.array.view(np.int16)).view(x.dtype)


def error(
    dense: Tensor,
    tokens: int,
    blocks: int = 3,
    activation: str = "none",
    extras: bool = False,
    order: int = 0,
    library: host.Library | None = None,
) -> float:
    """Relative error of the kernel, in units of the largest that rounding its output makes."""
    layout = layout_of(dense, blocks)

    def multiply(x: Tensor, *given: Any) -> Tensor:
        return run(x, layout, *given, order=order, library=library)

    return product_error(multiply, dense, tokens, activation, extras)


def uneven(n: int, k: int, kind: str = "bf16") -> Tensor:
    """A full row among nearly empty and empty ones."""
    dense = sparse(n, k, 0.01, kind)
    dense[n // 2] = torch.randn(k).to(dense.dtype)
    dense[: n // 4] = 0
    return dense


# ---- The layout -----------------------------------------------------------------------------------------------------

SHAPES = [(1, 1), (3, 5), (31, 7), (33, 130), (64, 256), (130, 896), (48, 4096), (5, 20001)]


@pytest.mark.parametrize("dtype", HALVES.values())
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_layout_holds_the_weight_bit_for_bit(n: int, k: int, dtype: torch.dtype) -> None:
    """−0.0, NaN and infinities, full and empty rows, distances of both widths."""
    dense = [weight_unstructured(n, k, sparsity, dtype) for sparsity in (0.0, 0.5, 0.95, 0.999, 1.0)]
    for weight in (awkward(n, k, dtype), *dense):
        for blocks in (1, 3, 132):
            layout = layout_of(weight, blocks)
            back = reference.decompress(layout.values, layout.deltas, layout.ends, layout.rows, n, k)
            assert same_bits(back, weight)
            assert layout.nbytes == sum(t.nbytes for t in vars(layout).values() if isinstance(t, Tensor))


def test_blocks_of_rows_give_the_same_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = sparse(100, 200, 0.3)
    whole = layout_of(dense)
    monkeypatch.setattr(sliced, "BLOCK_ELEMENTS", 200 * 16)
    for name, tensor in vars(layout_of(dense)).items():
        assert name == "n" or torch.equal(tensor.view(torch.uint8), getattr(whole, name).view(torch.uint8)), name


def test_the_width_of_distances_goes_by_the_bytes() -> None:
    """4 bits where few gaps are longer than 15 columns."""
    for sparsity, bits in ((0.5, 4), (0.8, 4), (0.95, 8)):
        assert layout_of(weight_unstructured(64, 4096, sparsity, torch.float16)).deltas.shape[-1] == bits
    dense = torch.zeros(64, 4096, dtype=torch.float16)
    dense[:, ::64] = 1  # every gap is 64: four bridges for each entry of 4 bits, none at 8
    layout = layout_of(dense)
    assert layout.deltas.shape[-1] == 8 and layout.values.numel() == 64 * 64


def test_bytes_are_those_of_the_formula() -> None:
    """docs/formats.md: 2.5 or 3 bytes an entry, rows filled up to whole chunks, and the tables."""
    layout = layout_of(sparse(4096, 1024, 0.5), 8)
    assert layout.values.nbytes + layout.deltas.nbytes == len(layout.values) * 32 * (16 + 4)
    assert layout.nbytes < 1.04 * 2.5 * 4096 * 512
    warps, slices = 8 * op.BLOCK_WARPS, 4096 // 32
    assert layout.nbytes - len(layout.values) * 640 == warps * (64 + 16) + slices * (4 + 128)


def test_rows_are_sorted_and_slices_have_as_many_chunks_as_their_longest() -> None:
    dense = torch.zeros(40, 64, dtype=torch.float16)
    for row in range(40):
        dense[row, : (7 * row) % 40] = 1
    layout = layout_of(dense, 1)
    counts = (dense != 0).sum(1)
    order = layout.rows.reshape(-1)[:40].long()
    assert counts[order].tolist() == sorted(counts.tolist(), reverse=True)
    assert (layout.rows.reshape(-1)[40:] == -1).all()
    assert layout.ends.tolist() == [5, 6]  # 39 entries, then 7
    assert layout.segments[0].tolist() == [0, 0, 5, 0]


def test_the_layout_refuses_what_the_kernel_cannot_do() -> None:
    check_refusals(SlicedLayout)
    half = pyfast.BitmapWeight.from_dense(torch.randn(4, 64, dtype=torch.float16))
    with pytest.raises(ValueError, match="multiprocessors: got 0"):
        SlicedLayout.of(half, multiprocessors=0)
    with pytest.raises(ValueError, match="weight: got shape"):
        layout_of(torch.zeros(1, 65537, dtype=torch.float16))


# ---- The op ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES.values())
def test_the_reference_is_the_dense_product(dtype: torch.dtype) -> None:
    check_reference(layout_of, dtype)


def test_it_has_a_fake_and_no_gradient() -> None:
    layout = layout_of(sparse(70, 300, 0.2))
    pattern = layout.deltas, layout.starts, layout.segments, layout.ends, layout.rows
    x = torch.randn(3, 300, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y = torch.ops.pyfast.sliced_linear(x, layout.values.to("meta"), *(t.to("meta") for t in pattern), None, 70, 0, None)
    assert y.shape == (3, 70) and y.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="sliced_linear: has no gradient"):
        y.sum().backward()


# ---- The kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 131), (70, 776), (129, 2050)])
def test_product(n: int, k: int, tokens: int, kind: str) -> None:
    assert error(sparse(n, k, 0.4, kind), tokens) < 1.0


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_densities(tokens: int, density: float) -> None:
    """Nothing stored; bridges of both widths; full rows."""
    assert error(sparse(100, 1000, density, "f16"), tokens) < 1.0


@pytest.mark.parametrize("order", host.ORDERS)
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_any_cut_and_any_order_of_lanes_and_blocks(blocks: int, order: int) -> None:
    """Slices within a warp, within a block, over two and over many blocks, and blocks within a slice."""
    assert error(sparse(300, 300, 0.3), 2, blocks, order=order) < 1.0
    assert error(sparse(20, 3000, 0.5, "f16"), 3, blocks, order=order) < 1.0
    assert error(uneven(200, 2000), 1, blocks, order=order) < 1.0
    assert error(sparse(1200, 40, 0.1, "f16"), 5, blocks, order=order) < 1.0


@pytest.mark.parametrize("blocks", [1, 5, 16, 40])
@pytest.mark.parametrize("tokens", [1, 8])
def test_one_huge_row(tokens: int, blocks: int) -> None:
    assert error(uneven(64, 8000), tokens, blocks) < 1.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation: str) -> None:
    for tokens in (1, 6):
        assert error(uneven(150, 1500), tokens, 3, activation, extras=True) < 1.0


def test_rows_that_store_nothing() -> None:
    check_rows_that_store_nothing(lambda x, dense, *given: run(x, layout_of(dense), *given))


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
def test_nan_and_infinity_reach_only_rows_that_store_something_there(density: float, tokens: int) -> None:
    """Bridges and filling stand at columns that the row does not store."""
    dense = sparse(90, 700, density, "f16")
    x = torch.randn(tokens, 700).half()
    bad = torch.zeros(700, dtype=torch.bool)
    bad[[0, 350, 699]] = True
    x[-1] = torch.where(bad, torch.tensor([float("nan"), INFINITE])[torch.randint(2, (700,))], x[-1].float()).half()
    y = run(x, layout_of(dense))
    reached = ((dense != 0) & bad).any(1)
    assert not y[-1, reached].isfinite().any() and y[-1, ~reached].isfinite().all()
    assert y[:-1].isfinite().all()
    assert not reached.all()


def test_stored_zeros() -> None:
    """−0.0 is a stored value; a stored +0.0 is no entry."""
    dense = torch.zeros(32, 64, dtype=torch.float16)
    dense[3, 5] = -0.0
    weight = pyfast.BitmapWeight.from_dense(dense + 1)
    weight.values[:] = dense.reshape(-1)  # one row of tiles, one column: row by row
    x = torch.ones(1, 64, dtype=torch.float16)
    x[0, 5] = INFINITE
    y = run(x, SlicedLayout.of(weight, multiprocessors=1))
    assert y[0].isnan().nonzero().tolist() == [[3]]


def test_shared_memory_is_what_the_head_of_the_kernel_says() -> None:
    held = host.Output(4, np.int32)
    host.build("sliced_linear").run("sliced_shared_bytes", held, 4096)
    stated = stated_resources("sliced_linear")
    assert [stated[f"sliced_linear_kernel<T, {2**i}, {bits}>"][1] for bits in (4, 8) for i in range(4)] == [
        *held.memory.tolist() * 2
    ]
    host.build("sliced_linear").run("sliced_shared_bytes", held, 14336)
    assert held.memory[3] <= 227 * 1024


# The real kernels, broken: what must see it is either the machine's rules or the numbers.
# (text, replacement, tokens, message)
KERNEL = "sliced_linear.cuh"
MUTANTS = {
    "x used before it is there": (
        "(Plan::kColumnBytes);\n  ptx::syncthreads();",
        "(Plan::kColumnBytes);",
        2,
        "no barrier|nobody",
    ),
    "sums put down while others read x": (
        "  }\n  ptx::syncthreads();\n\n  // The sums",
        "  }\n\n  // The sums",
        2,
        "no barrier",
    ),
    "parts read before they are there": (
        "= tail_part.slice;\n  ptx::syncthreads();",
        "= tail_part.slice;",
        2,
        "no barrier|nobody",
    ),
    "ticket before the sums": (
        "  ptx::syncwarp();\n  const int own_parts",
        "  const int own_parts",
        2,
        "no barrier|nobody",
    ),
    "sums read without a barrier after the ticket": (
        "(own_parts));\n  ptx::syncwarp();",
        "(own_parts));",
        2,
        "no barrier|nobody",
    ),
    "every block finishes": ("number + 1 != parts[i]", "number < 0", 2, "no barrier|nobody"),
    "chunks past the last": ("if (first + i < last) ring", "ring", 1, "outside|past"),
    "chunks past the last of a turn": (
        "if (kAhead + i < more) ring",
        "if (kAhead + i < more + 1) ring",
        1,
        "outside|past",
    ),
    "rows past the last": ("  if (row < 0) return;\n", "", 1, "outside|past"),
    "tokens past the last": ("unit < units && token < args.tokens", "unit < units", 3, "outside|past"),
    "columns past the last": (
        "unit < units && token < args.tokens",
        "unit < units + 1 && token < args.tokens",
        1,
        "outside|past",
    ),
    "a chunk too many before the slice ends": ("if (i + 1 == left)", "if (i == left)", 1, "nobody"),
    "ring not turned": ("turn < turned", "turn < 0", 1, None),
    "the column of the slice before": ("    at = base;\n", "", 1, "nobody"),
    "sums of the slice before": ("sums[token] = 0.0f;", "sums[token] += 0.0f;", 1, None),
    "start of a warp forgotten": ("base + start *", "base + 0 * start *", 1, None),
    "deltas in another order": ("deltas >> 4 * half &", "deltas >> 4 * (1 - half) &", 1, None),
    "addresses of single deltas": ("kScale >> 8 * (3 - i)", "kScale & 255u << 8 * i", 1, None),
    "halves of a pair exchanged": ("half == 0 ? weights.x : weights.y", "half == 1 ? weights.x : weights.y", 1, None),
    "tokens exchanged": ("ptx::byte_permute(pair, other, 0x5410u)", "ptx::byte_permute(pair, other, 0x1054u)", 2, None),
    "head as a tail": (
        "(left ? 0 : 1)",
        "(left ? 1 : 0)",
        2,
        "no barrier|nobody|outside|not all|wrong",
    ),
    "one part too few": ("add_parts(total, parts[i],", "add_parts(total, parts[i] - 1,", 2, None),
    "x before the grid that wrote it has ended": (
        "  ptx::wait_prerequisites();\n",
        "  if (args.x[0] == 1) return;\n  ptx::wait_prerequisites();\n",
        1,
        "before wait_prerequisites",
    ),
    "x loaded as if it never changed": (
        "ptx::ld_global(reinterpret_cast<const Unit*>",
        "ptx::ld_nc(reinterpret_cast<const Unit*>",
        1,
        "ld_nc after launch_dependents",
    ),
    "row of the slice before": ("if (i == 0 && begins) {", "if (i == 0 && begins && row < 0) {", 1, "nobody"),
    "slots of others": ("ballot(slot_slice == part.slice)", "ballot(slot_slice >= 0)", 1, None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_fails(name: str) -> None:
    old, new, tokens, message = MUTANTS[name]
    # One dtype and width and the kernels in question save most of the compilation.
    spared = ["choose_bits<Float16>(args, static_cast<unsigned>(blocks), bits);", "choose<T, 8>(args, blocks);"]
    library = host.build("sliced_linear", {("sliced_linear.cpp", text): "{}" for text in spared} | {(KERNEL, old): new})
    # A slice that blocks share, and many that end within a warp; 10 chunks a warp, more than the ring holds, or fewer.
    blocks = 8 if name == "chunks past the last" else 2
    weights = torch.zeros(360, 8000, dtype=torch.bfloat16)
    weights[:32], weights[32:, :60] = sparse(32, 8000, 0.3), sparse(328, 60, 0.1)
    if message is None:
        assert not error(weights, tokens, blocks, library=library) < 10
    else:
        with pytest.raises((host.SimtError, AssertionError), match=message):
            error(weights, tokens, blocks, library=library)


def test_a_zero_entry_that_counts_is_seen() -> None:
    old, new = "const uint32_t stored = pair & (half == 0 ? 0xffffu : 0xffff0000u);", "const uint32_t stored = 1;"
    library = host.build("sliced_linear", {(KERNEL, old): new})
    x = torch.full((1, 100), INFINITE).half()
    dense = torch.zeros(40, 100).half()
    dense[:20, 3] = 1
    assert run(x, layout_of(dense, 1)).isfinite().sum() == 20
    assert not run(x, layout_of(dense, 1), library=library).isfinite().any()


# ---- On a GPU -------------------------------------------------------------------------------------------------------

GPU_SHAPES = [(1, 1), (33, 131), (70, 776), (1000, 4097), (4096, 4096), (14336, 4096), (3584, 18944)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", HALVES.values())
@pytest.mark.parametrize("density", [0.05, 0.1, 0.5])
@pytest.mark.parametrize(("n", "k"), GPU_SHAPES)
def test_on_the_gpu(n: int, k: int, density: float, dtype: torch.dtype) -> None:
    weight = pyfast.BitmapWeight.from_dense(
        torch.randn(n, k, device="cuda", dtype=dtype), mask=torch.rand(n, k, device="cuda") < density
    )
    layout = SlicedLayout.of(weight)
    dense = weight.to_dense()
    assert same_bits(reference.decompress(layout.values, layout.deltas, layout.ends, layout.rows, n, k), dense)
    pattern = layout.values, layout.deltas, layout.starts, layout.segments, layout.ends, layout.rows
    call = torch.ops.pyfast.sliced_linear
    check_on_the_gpu(lambda x, *given: call(x, *pattern, *given), dense, (1, 2, 3, 4, 5, 8, 11))
    x = torch.randn(11, k, device="cuda", dtype=dtype)
    torch.library.opcheck(call, (x, *pattern, None, n, 0, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_streams_and_a_graph_at_once() -> None:
    """Launches that overlap do not share counters."""
    weight = pyfast.BitmapWeight.from_dense(sparse(1000, 4096, 0.3).cuda())
    layout = SlicedLayout.of(weight)
    rows = [torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    truth = [layout.linear(x, None, 0, None) for x in rows]
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        replayed = layout.linear(rows[2], None, 0, None)
    streams = [torch.cuda.Stream() for _ in rows]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(200):
        for stream, x, into in zip(streams, rows[:2], results, strict=False):
            with torch.cuda.stream(stream):
                into.append(layout.linear(x, None, 0, None))
        with torch.cuda.stream(streams[2]):
            captured.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, truth[i]) for i, into in enumerate(results) for y in into)
    assert torch.equal(replayed, truth[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_products_that_overlap_wait_for_each_other() -> None:
    """Each takes what the one before writes, in memory that earlier ones have read; weights are written in between."""
    dense = sparse(1024, 1024, 0.2).cuda()
    weight = pyfast.BitmapWeight.from_dense(dense)
    layout = SlicedLayout.of(weight)
    pairs = torch.randn(1024, 256, 4, device="cuda", dtype=torch.bfloat16)
    pairs[..., 1:3] = 0
    halves = pyfast.Sparse24Weight.from_dense(pairs.reshape(1024, 1024))
    x, zeros = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16), torch.zeros_like(layout.values)
    ops = torch.ops.pyfast
    kept = layout.values.clone()

    def steps(pause: bool) -> Tensor:
        y = x
        for i in range(60):
            if i % 7 == 0:
                layout.values.copy_(zeros)
                layout.values.copy_(kept)
            y = layout.linear(y, None, 0, None)
            y = ops.sparse24_linear_mma(y, halves.values, halves.metadata, None, 0, None)
            y = ops.bitmap_linear_few(y, weight.values, weight.bitmaps, weight.offsets, None, 1024, 0, None)
            y = y / y.float().norm().to(y.dtype)
            if pause:
                torch.cuda.synchronize()
        return y

    truth = steps(pause=True)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        replayed = steps(pause=False)
    for _ in range(20):
        assert torch.equal(steps(pause=False), truth)
        captured.replay()
        assert torch.equal(replayed, truth)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_huge_row_on_the_gpu() -> None:
    dense = uneven(2000, 18944).cuda()
    layout = SlicedLayout.of(pyfast.BitmapWeight.from_dense(dense))
    x = torch.randn(8, 18944, device="cuda", dtype=torch.bfloat16)
    y = layout.linear(x, None, 0, None)
    truth = x.double() @ dense.double().T
    assert (y.double() - truth).norm() < 1.1 * 2.0**-8 * truth.norm()
