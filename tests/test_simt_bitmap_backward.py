"""The gradients of bitmap_linear on CUDA, executed on the host and judged against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simt import host
from test_cuda_build import stated_resources
from test_simt_bitmap_linear import pattern, tiles_of

ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11}


def padded_rows(values: np.ndarray, multiple: int = 8) -> np.ndarray:
    """Rows of a multiple of 8 elements, as the launcher makes them; 16 for grad_x."""
    return np.pad(values, ((0, 0), (0, -values.shape[1] % multiple)))


def case(tokens: int, n: int, k: int, density: float, kind: str):
    rng = np.random.default_rng(tokens * 7919 + n * 31 + k)
    bitmaps, offsets, places = tiles_of(pattern(rng, n, k, density))
    return [
        host.bits_from_float(rng.standard_normal(shape), kind) for shape in ((tokens, n), (tokens, k), len(places))
    ], (
        bitmaps,
        offsets,
        places,
    )


def relative(got: np.ndarray, truth: np.ndarray, kind: str) -> float:
    return np.linalg.norm(host.float_from_bits(got, kind) - truth) / max(np.linalg.norm(truth), 1e-9) / ROUNDING[kind]


def grad_x_error(
    tokens: int,
    n: int,
    k: int,
    density: float = 0.4,
    kind: str = "bf16",
    splits: int = 1,
    cluster: bool = False,
    order: int = 0,
    library: host.Library | None = None,
) -> float:
    """Relative error, in units of the largest that rounding the result makes."""
    (grad, _, values), (bitmaps, offsets, places) = case(tokens, n, k, density, kind)
    dense = np.zeros((n, k))
    dense[places[:, 0], places[:, 1]] = host.float_from_bits(values, kind)
    rows, out = padded_rows(grad, 16), host.Output((tokens, k), np.uint16)
    numbers = [tokens, n, rows.shape[1], k, len(values), splits, int(cluster)]
    (library or host.build("bitmap_backward")).run(
        "bitmap_grad_x", rows, values, bitmaps, offsets, out, *numbers, int(kind == "bf16"), order=order
    )
    return relative(out.array, host.float_from_bits(grad, kind) @ dense, kind)


def grad_values_error(
    tokens: int,
    n: int,
    k: int,
    density: float = 0.4,
    kind: str = "bf16",
    order: int = 0,
    library: host.Library | None = None,
) -> float:
    (grad, x, _), (bitmaps, offsets, places) = case(tokens, n, k, density, kind)
    truth = host.float_from_bits(grad, kind).T @ host.float_from_bits(x, kind)
    rows, columns, out = padded_rows(grad), padded_rows(x), host.Output(len(places), np.uint16)
    numbers = [tokens, n, rows.shape[1], k, columns.shape[1], len(places), int(kind == "bf16")]
    (library or host.build("bitmap_backward")).run(
        "bitmap_grad_values", rows, columns, bitmaps, offsets, out, *numbers, order=order
    )
    return relative(out.array, truth[places[:, 0], places[:, 1]], kind)


@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1, 1), (3, 70, 70), (8, 160, 300), (9, 33, 64), (32, 129, 130)])
def test_grad_x(tokens: int, n: int, k: int) -> None:
    for density in (0.05, 0.5, 1.0):
        assert grad_x_error(tokens, n, k, density) < 1.0


@pytest.mark.parametrize("order", host.ORDERS)
def test_grad_x_in_any_order_and_with_splits(order: int) -> None:
    assert grad_x_error(5, 200, 100, 0.3, "f16", order=order) < 1.0
    assert grad_x_error(5, 200, 100, 0.3, "f16", splits=3, order=order) < 1.0
    assert grad_x_error(20, 200, 100, 0.3, "f16", splits=3, cluster=True, order=order) < 1.0


@pytest.mark.parametrize("damage", [-(2**40), -1, 1, 10**6, 2**62])
def test_damaged_offsets_are_not_followed(damage: int) -> None:
    """The tiles on both sides of a wrong offset count as empty."""
    (grad, _, values), (bitmaps, offsets, places) = case(6, 80, 64, 0.3, "f16")
    offsets[2] = damage
    kept = np.isin(places[:, 0] // 16, (0, 3, 4))
    dense = np.zeros((80, 64))
    dense[places[kept, 0], places[kept, 1]] = host.float_from_bits(values[kept], "f16")
    out = host.Output((6, 64), np.uint16)
    numbers = [6, 80, 80, 64, len(values), 1, 0, 0]
    host.build("bitmap_backward").run("bitmap_grad_x", grad, values, bitmaps, offsets, out, *numbers)
    assert relative(out.array, host.float_from_bits(grad, "f16") @ dense, "f16") < 1.0


@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1, 1), (3, 70, 70), (40, 33, 200), (100, 129, 64)])
def test_grad_values(tokens: int, n: int, k: int) -> None:
    for density in (0.05, 0.5, 1.0):
        assert grad_values_error(tokens, n, k, density) < 1.0


@pytest.mark.parametrize("order", host.ORDERS)
def test_grad_values_in_any_order(order: int) -> None:
    assert grad_values_error(70, 40, 136, 0.3, "f16", order=order) < 1.0


def test_shared_memory_is_what_the_head_of_the_kernels_says() -> None:
    held = host.Output(3, np.int32)
    host.build("bitmap_backward").run("bitmap_backward_shared_bytes", held)
    names = ["bitmap_grad_x_kernel<T, 1>", "bitmap_grad_x_kernel<T, 4>", "bitmap_grad_values_kernel<T>"]
    stated = {name: shared for name, (_, shared) in stated_resources("bitmap_backward").items() if name in names}
    assert dict(zip(names, held.memory.tolist(), strict=True)) == stated


def broken(driver: str, old: str, new: str) -> host.Library:
    """The driver with ``old`` replaced where the kernels of gradients hold it; of grad_x in bfloat16 alone."""
    files = (f"{driver}.cuh", "grad_x_tiles.cuh", "grad_values_tiles.cuh")
    (file,) = (name for name in files if old in (host.CSRC / "cuda" / name).read_text())
    half = "choose<Float16>(args, static_cast<unsigned>(splits), cluster != 0);"  # saves half of the compilation
    return host.build(driver, {(f"{driver}.cpp", half): "", (file, old): new})


# (text, replacement, of grad_x, message)
MUTANTS = {
    "grad_x: values used before they have come": (
        "    ptx::cp_async_wait<0>();\n    ptx::syncwarp();",
        "    ptx::syncwarp();",
        True,
        "has not been waited for",
    ),
    "grad_x: lanes do not meet before a stage is used": (
        "    ptx::cp_async_wait<0>();\n    ptx::syncwarp();",
        "    ptx::cp_async_wait<0>();",
        True,
        "no barrier|has not been",
    ),
    "grad_x: a stage into the slots of the one before": ("stage ^= 1;", "", True, "no barrier|has not been"),
    "grad_x: no barrier between the stages and the sums": (
        "  ptx::syncthreads();\n  finish_grad_x",
        "  finish_grad_x",
        True,
        "no barrier",
    ),
    "grad_x: past the values": ("if (stored - end >= 8)", "if (stored >= end)", True, "outside|past"),
    "grad_x: values of the tile before": ("2 * (begin - (begin & 7))", "2 * begin", True, "multiple"),
    "grad_x: tiles past the last row": (
        "row_tiles = args.k / kTileRows",
        "row_tiles = args.k / kTileRows + 1",
        True,
        "outside|past",
    ),
    "grad_x: bits past the last row": (
        "second ? 64 * tiles_a_row",
        "(second || left > 0) ? 64 * tiles_a_row",
        True,
        "outside|past",
    ),
    "grad_x: offsets past the last row": (
        "second ? tiles_a_row",
        "(second || left > 0) ? 2 * tiles_a_row",
        True,
        "outside|past",
    ),
    "grad_x: sums of one warp": ("Plan::kParts, Plan::kSumBytes / 4", "1, Plan::kSumBytes / 4", True, None),
    "grad_x: not transposed": ("upper[pair] = ptx::transpose_matrix(upper[pair]);", "", True, None),
    "grad_x: tokens past the last": ("(g < args.tokens ? g : 0)", "g", True, "outside|past"),
    "values: one stage waited for too few": (
        "cp_async_wait<Plan::kStages - 2>();\n    ptx::syncthreads();\n    fetch(stage",
        "cp_async_wait<Plan::kStages - 1>();\n    ptx::syncthreads();\n    fetch(stage",
        False,
        "has not been waited for",
    ),
    "values: staged over the last stage": (
        "ptx::cp_async_wait<0>();\n  ptx::syncthreads();\n}",
        "ptx::cp_async_wait<0>();\n}",
        False,
        "no barrier",
    ),
    "values: written before they are staged": (
        "    ptx::syncwarp();\n    store_staged",
        "    store_staged",
        False,
        "no barrier|nobody",
    ),
    "values: tokens past the last": (
        "first_token + token < tokens && at",
        "tokens > 0 && at",
        False,
        "outside|past|nobody",
    ),
    "values: tiles past the last row": ("if (at >= args.weight.tiles) return;", "", False, "outside|past"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_fails(name: str) -> None:
    old, new, of_grad_x, message = MUTANTS[name]
    library = broken("bitmap_backward", old, new)
    judge = grad_x_error if of_grad_x else grad_values_error
    arguments = dict(tokens=5 if of_grad_x else 101, n=230, k=70, library=library)
    if message is None:
        assert not judge(**arguments) < 100
    else:
        with pytest.raises(host.SimtError, match=message):
            judge(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1, 1), (3, 70, 70), (32, 4096, 4096), (1000, 640, 1030)])
def test_on_the_gpu(tokens: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Both gradients at real shapes, through autograd, against the dense product's in float64."""
    import pyfast

    whole = torch.randn(n, k, device="cuda", dtype=dtype)
    whole[0, 0] = 1.0
    stored = (torch.rand(n, k, device="cuda") < 0.3) & (whole != 0)  # +0.0 is not stored, whatever the mask says
    stored[0, 0] = True
    weight = pyfast.BitmapWeight.from_dense(whole, mask=stored)
    weight.values.requires_grad_(True)
    x, grad = (torch.randn(tokens, width, device="cuda", dtype=dtype) for width in (k, n))
    x.requires_grad_(True)
    grad_x, grad_values = torch.autograd.grad(pyfast.sparse_linear(x, weight), (x, weight.values), grad)
    rounding = ROUNDING["bf16" if dtype == torch.bfloat16 else "f16"]
    truth = grad.double() @ weight.to_dense().double()
    assert (grad_x.double() - truth).norm() < 1.1 * rounding * truth.norm()
    dense = grad.double().T @ x.detach().double()
    truth = pyfast.BitmapWeight.from_dense(dense.cpu(), mask=stored.cpu())
    assert truth.values.numel() == grad_values.numel()
    assert (grad_values.double().cpu() - truth.values).norm() < 1.1 * rounding * truth.values.norm()
