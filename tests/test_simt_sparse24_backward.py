"""The gradients of sparse24_linear on CUDA, executed on the host and judged against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simt import host
from test_cuda_build import stated_resources
from test_simt_bitmap_backward import ROUNDING, broken, padded_rows, relative
from test_simt_sparse24_linear import weight
from torch._subclasses.fake_tensor import FakeTensorMode

SHAPES = [(1, 1, 1), (3, 70, 70), (8, 160, 300), (9, 33, 64), (32, 129, 130)]
LONG = [(2, 700, 40), (20, 900, 34)]  # a warp goes around its ring


def case(tokens: int, n: int, k: int, kind: str):
    """grad [tokens, n] and x [tokens, k]; values, metadata and the dense matrix of a weight."""
    rng = np.random.default_rng(tokens * 7919 + n * 31 + k)
    grad, x = (host.bits_from_float(rng.standard_normal((tokens, width)), kind) for width in (n, k))
    return grad, x, *weight(rng, n, k, kind)


def grad_x(
    grad: np.ndarray,
    values: np.ndarray,
    metadata: np.ndarray,
    k: int,
    kind: str,
    splits: int = 1,
    cluster: bool = False,
    order: int = 0,
    library: host.Library | None = None,
) -> np.ndarray:
    rows, out = padded_rows(grad, 16), host.Output((grad.shape[0], k), np.uint16)
    numbers = [*grad.shape, rows.shape[1], k, 2 * values.shape[1], splits, int(cluster), int(kind == "bf16")]
    (library or host.build("sparse24_backward")).run(
        "sparse24_grad_x", rows, values, metadata, out, *numbers, order=order
    )
    return out.array


def grad_x_error(tokens: int, n: int, k: int, kind: str = "bf16", **how) -> float:
    """Relative error, in units of the largest that rounding the result makes."""
    grad, _, values, metadata, dense = case(tokens, n, k, kind)
    got = grad_x(grad, values, metadata, k, kind, **how)
    return relative(got, host.float_from_bits(grad, kind) @ dense, kind)


def grad_values(
    grad: np.ndarray,
    x: np.ndarray,
    metadata: np.ndarray,
    kind: str,
    order: int = 0,
    library: host.Library | None = None,
) -> np.ndarray:
    rows, columns, padded_k = padded_rows(grad), padded_rows(x), 16 * metadata.shape[1]
    out = host.Output((grad.shape[1], padded_k // 2), np.uint16)
    numbers = [*grad.shape, rows.shape[1], x.shape[1], columns.shape[1], padded_k, int(kind == "bf16")]
    (library or host.build("sparse24_backward")).run(
        "sparse24_grad_values", rows, columns, metadata, out, *numbers, order=order
    )
    return out.array


def gathered(dense: np.ndarray, metadata: np.ndarray) -> np.ndarray:
    """The elements at the places that the metadata name, [n, K/2], zeros past the last column."""
    n, words = metadata.shape
    places = metadata[..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    columns = places.reshape(n, -1) + np.repeat(4 * np.arange(4 * words), 2)
    return np.take_along_axis(np.pad(dense, ((0, 0), (0, 16 * words - dense.shape[1]))), columns, axis=1)


def grad_values_error(tokens: int, n: int, k: int, kind: str = "bf16", **how) -> float:
    grad, x, _, metadata, _ = case(tokens, n, k, kind)
    truth = gathered(host.float_from_bits(grad, kind).T @ host.float_from_bits(x, kind), metadata)
    return relative(grad_values(grad, x, metadata, kind, **how), truth, kind)


def damaged(metadata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Metadata whose third word of each row holds any nibbles, and which columns that touches."""
    damaged = metadata.copy()
    damaged[:, 2] = np.random.default_rng(0).integers(2**16, size=len(metadata))
    return damaged, np.arange(16 * metadata.shape[1]) // 16 == 2


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize(("tokens", "n", "k"), SHAPES + LONG)
def test_grad_x(tokens: int, n: int, k: int, kind: str) -> None:
    assert grad_x_error(tokens, n, k, kind) < 1.0


@pytest.mark.parametrize("order", host.ORDERS)
def test_grad_x_in_any_order_and_with_splits(order: int) -> None:
    assert grad_x_error(5, 300, 200, "f16", order=order) < 1.0
    assert grad_x_error(5, 300, 200, "f16", splits=3, order=order) < 1.0
    assert grad_x_error(20, 300, 200, "f16", splits=3, cluster=True, order=order) < 1.0


def test_every_pair_of_places_is_expanded_where_it_belongs() -> None:
    """Rows of one value each, every legal nibble in every group: bit for bit."""
    grad = host.bits_from_float(np.eye(6), "bf16")
    nibbles = np.array([0x4, 0x8, 0x9, 0xC, 0xD, 0xE])
    metadata = np.stack([sum(nibbles[(row + j) % 6] << 4 * j for j in range(4)) for row in range(6)])
    metadata = np.repeat(metadata[:, None], 4, axis=1).astype(np.uint16)
    values = host.bits_from_float(np.arange(1, 6 * 32 + 1).reshape(6, 32), "bf16")
    dense = np.zeros((6, 64), np.uint16)
    places = metadata[..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    np.put_along_axis(dense, places.reshape(6, -1) + np.repeat(4 * np.arange(16), 2), values, axis=1)
    np.testing.assert_array_equal(grad_x(grad, values, metadata, 64, "bf16"), dense)


def test_damaged_metadata_are_wrong_in_their_own_groups_alone() -> None:
    grad, x, values, metadata, dense = case(7, 40, 100, "f16")
    metadata, touched = damaged(metadata)
    got = grad_x(grad, values, metadata, 100, "f16")[:, ~touched[:100]]
    assert relative(got, (host.float_from_bits(grad, "f16") @ dense)[:, ~touched[:100]], "f16") < 1.0
    truth = gathered(host.float_from_bits(grad, "f16").T @ host.float_from_bits(x, "f16"), metadata)
    assert relative(grad_values(grad, x, metadata, "f16"), truth, "f16") < 1.0


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1, 1), (3, 70, 70), (40, 33, 200), (100, 129, 64), (33, 16, 130)])
def test_grad_values(tokens: int, n: int, k: int, kind: str) -> None:
    assert grad_values_error(tokens, n, k, kind) < 1.0


@pytest.mark.parametrize("order", host.ORDERS)
def test_grad_values_in_any_order(order: int) -> None:
    assert grad_values_error(70, 140, 136, "f16", order=order) < 1.0


def test_places_past_the_last_column_stay_zero_whatever_the_gradient_holds() -> None:
    grad, x, _, metadata, _ = case(3, 20, 41, "f16")
    metadata[:] = 0xEEEE  # columns 2 and 3 of every group
    grad[:, 5] = host.bits_from_float(np.array([np.inf, np.nan, 1.0]), "f16")
    got = grad_values(grad, x, metadata, "f16")
    assert not got[:, 20:].any()
    assert np.isnan(host.float_from_bits(got[5, :20], "f16")).all()
    assert np.isfinite(host.float_from_bits(np.delete(got, 5, 0), "f16")).all()


def test_shared_memory_is_what_the_head_of_the_kernels_says() -> None:
    held = host.Output(3, np.int32)
    host.build("sparse24_backward").run("sparse24_backward_shared_bytes", held)
    names = ["sparse24_grad_x_kernel<T, 1>", "sparse24_grad_x_kernel<T, 4>", "sparse24_grad_values_kernel<T>"]
    stated = {name: shared for name, (_, shared) in stated_resources("sparse24_backward").items() if name in names}
    assert dict(zip(names, held.memory.tolist(), strict=True)) == stated


# (text, replacement, of grad_x, message). What the kernels share with those of bitmap weights is broken in
# test_simt_bitmap_backward.py.
MUTANTS = {
    "grad_x: one tile waited for too few": (
        "ptx::cp_async_wait<Plan::kStages - 2>();\n    ptx::syncwarp();",
        "ptx::cp_async_wait<Plan::kStages - 1>();\n    ptx::syncwarp();",
        True,
        "has not been waited for",
    ),
    "grad_x: lanes do not meet before metadata are used": (
        "    ptx::syncwarp();\n    fetch(done);",
        "    fetch(done);",
        True,
        "no barrier|nobody|has not been",
    ),
    "grad_x: into the slot that is read": ("fetch(done);", "fetch(0 * done + now);", True, "has not been|no barrier"),
    "grad_x: sums over rings that are read": (
        "  ptx::syncthreads();\n  finish_grad_x",
        "  finish_grad_x",
        True,
        "no barrier|has not been",
    ),
    "grad_x: ends with copies under way": (
        "  ptx::cp_async_wait<0>();\n  ptx::syncthreads();\n  finish",
        "  ptx::syncthreads();\n  finish",
        True,
        "under way|not been waited",
    ),
    "grad_x: upper rows past the last": ("upper_from, rows > 0", "upper_from, rows > -8", True, "outside|past"),
    "grad_x: lower rows past the last": ("lower_from, rows > 8", "lower_from, rows > 0", True, "outside|past"),
    "grad_x: metadata past the last row": ("metadata_rows > 0", "metadata_rows > -8", True, "outside|past"),
    "grad_x: a part into the next one": ("most < all ? most : all", "most < 2 * all ? most : 2 * all", True, None),
    "grad_x: values of columns past the container": (
        "column + 16 * t < args.padded_k ? left",
        "column < args.padded_k ? left",
        True,
        "outside|past",
    ),
    "grad_x: metadata of columns past the container": (
        "column + 32 * metadata_half < args.padded_k ? left",
        "column < args.padded_k ? left",
        True,
        "outside|past",
    ),
    "grad_x: words of metadata exchanged": ("t % 2 == 0 ? 0x5410u", "t % 2 == 1 ? 0x5410u", True, None),
    "grad_x: values exchanged": (
        "first ? 0x54 : column == second ? 0x76",
        "first ? 0x76 : column == second ? 0x54",
        True,
        None,
    ),
    "grad_x: groups exchanged": (
        "expand_group(upper_takes, 2, upper_pairs.z",
        "expand_group(upper_takes, 3, upper_pairs.z",
        True,
        None,
    ),
    "values: written before they are staged": (
        "  ptx::syncwarp();\n  const int chunk",
        "  const int chunk",
        False,
        "no barrier|nobody",
    ),
    "values: rows past the last": ("if (row + at >= args.rows || column", "if (column", False, "outside|past"),
    "values: columns past the container": (
        "|| column + 16 * chunk >= args.padded_k) continue",
        ") continue",
        False,
        "outside|past|no barrier",
    ),
    "values: metadata past the last row": ("if (row + at < args.rows && column", "if (column", False, "outside|past"),
    "values: metadata past the container": (
        "args.rows && column + 32 * i < args.padded_k)",
        "args.rows)",
        False,
        "outside|past",
    ),
    "values: halves not exchanged": ("ptx::shfl_xor(odd ? one : other, 1)", "(odd ? one : other)", False, None),
    "values: places exchanged": ("0x22u * (nibble & 3u)", "0x22u * (nibble >> 2 & 3u)", False, None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_fails(name: str) -> None:
    old, new, of_grad_x, message = MUTANTS[name]
    library = broken("sparse24_backward", old, new)
    shapes = dict(tokens=5, n=997, k=70) if of_grad_x else dict(tokens=101, n=226, k=70)
    judge = grad_x_error if of_grad_x else grad_values_error
    if message is None:
        assert not judge(**shapes, library=library) < 10
    else:
        with pytest.raises(host.SimtError, match=message):
            judge(**shapes, library=library)


def test_fakes_have_the_shapes_of_the_ops() -> None:
    import pyfast  # noqa: F401

    with FakeTensorMode():
        grad, x = torch.empty(5, 24, dtype=torch.bfloat16), torch.empty(5, 70, dtype=torch.bfloat16)
        values, metadata = torch.empty(24, 48, dtype=torch.bfloat16), torch.empty(24, 6, dtype=torch.int16)
        found = torch.ops.pyfast.sparse24_grad_x_few(grad, values, metadata, 70)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        found = torch.ops.pyfast.sparse24_grad_values(grad, x, metadata)
        assert (found.shape, found.dtype) == (values.shape, values.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "n", "k"),
    [(1, 1, 1), (3, 70, 70), (8, 14336, 4096), (32, 4096, 4096), (32, 4096, 14336), (33, 640, 1030), (1000, 640, 1030)],
)
def test_on_the_gpu(tokens: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Both gradients at real shapes, through autograd, against the dense product's in float64."""
    import pyfast
    from pyfast.ops import sparse24_convert

    dense = torch.randn(n, k, device="cuda", dtype=dtype)
    stored = pyfast.Sparse24Weight(*sparse24_convert.prune(dense), (n, k))
    stored.values.requires_grad_(True)
    x, grad = (torch.randn(tokens, width, device="cuda", dtype=dtype) for width in (k, n))
    x.requires_grad_(True)
    found = torch.autograd.grad(pyfast.sparse_linear(x, stored), (x, stored.values), grad)
    rounding = ROUNDING["bf16" if dtype == torch.bfloat16 else "f16"]
    truth = grad.double() @ stored.to_dense().detach().double()
    assert (found[0].double() - truth).norm() < 1.1 * rounding * truth.norm()
    truth = sparse24_convert.gather((grad.double().T @ x.detach().double()).float(), stored.metadata)
    assert (found[1].double() - truth.double()).norm() < 1.1 * rounding * truth.double().norm()
    again = torch.ops.pyfast.sparse24_grad_values(grad, x.detach(), stored.metadata)
    assert torch.equal(found[1], again), "not deterministic"
    if tokens <= 32:
        few = (grad, stored.values.detach(), stored.metadata, k)
        assert torch.equal(found[0], torch.ops.pyfast.sparse24_grad_x_few(*few)), "not deterministic"
        torch.library.opcheck(torch.ops.pyfast.sparse24_grad_x_few, few)
    torch.library.opcheck(torch.ops.pyfast.sparse24_grad_values, (grad, x.detach(), stored.metadata))
