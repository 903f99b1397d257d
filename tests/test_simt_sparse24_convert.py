"""sparse24_convert's CUDA kernels, executed on the host: every element bit for bit against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simt import host
from test_cuda_build import SHAPES, sparse24_case

from pyfast.reference import sparse24_convert as reference

ELEMENTS = {2: torch.bfloat16, 4: torch.float32}


def tensor_of(bits: np.ndarray) -> torch.Tensor:
    size = bits.dtype.itemsize
    return torch.from_numpy(bits.view(f"i{size}")).view(ELEMENTS[size])


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    size = tensor.element_size()
    return tensor.view({2: torch.int16, 4: torch.int32}[size]).numpy().view(f"u{size}")


def convert(
    dense: np.ndarray,
    scores: np.ndarray | None = None,
    magnitude: bool = False,
    order: int = 0,
    library: host.Library | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """values, metadata and violation of the kernel."""
    (n, k), size = dense.shape, dense.dtype.itemsize
    padded = -(-k // 32) * 32
    values, metadata = host.Output((n, padded // 2), dense.dtype), host.Output((n, padded // 16), np.int16)
    violation = host.InOut(np.full(1, -1, np.int64))
    pointers = [dense, None if scores is None else scores.view(np.uint32), values, metadata, violation]
    numbers = [n, k, padded, int(k * size % 16 == 0), int(magnitude)]
    (library or host.build("sparse24_convert")).run(f"compress_{size}", *pointers, *numbers, order=order)
    return values.array, metadata.array, int(violation.array[0])


def judge(n: int, k: int, size: int, library: host.Library | None = None, order: int = 0) -> None:
    *_, dense = sparse24_case(n, k, size, 32)
    dense[::3, ::5] = 0  # groups with one or none
    if size == 2:
        dense[tensor_of(dense).isnan().numpy()] = 0xFFFF  # torch's gather on the CPU changes other NaN of 16 bits
    expected = reference.compress(tensor_of(dense))
    values, metadata, violation = convert(dense, order=order, library=library)
    np.testing.assert_array_equal(values, bits_of(expected[0]))
    np.testing.assert_array_equal(metadata, expected[1].numpy())
    assert violation == -1

    rng = np.random.default_rng(k)
    full = tensor_of(dense).float().nan_to_num(3.0, 4.0, -5.0) + torch.from_numpy(rng.integers(-2, 3, (n, k))).float()
    full = full.to(ELEMENTS[size])
    scores = rng.integers(-2, 3, (n, k)).astype(np.float32)  # with ties
    for ranks in (None, scores):
        expected = reference.prune(full, None if ranks is None else torch.from_numpy(ranks))
        values, metadata, _ = convert(bits_of(full), ranks, True, order, library)
        np.testing.assert_array_equal(values, bits_of(expected[0]))
        np.testing.assert_array_equal(metadata, expected[1].numpy())

        gathered = host.Output(values.shape, values.dtype)
        numbers = [n, k, 2 * values.shape[1], int(k * size % 16 == 0)]
        library = library or host.build("sparse24_convert")
        library.run(f"gather_{size}", bits_of(full), metadata, gathered, *numbers, order=order)
        np.testing.assert_array_equal(gathered.array, values)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dense_to_24(n: int, k: int, size: int) -> None:
    judge(n, k, size)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("multiple", [16, 32])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_24_to_dense(n: int, k: int, multiple: int, size: int) -> None:
    values, metadata, dense = sparse24_case(n, k, size, multiple)
    out = host.Output((n, k), dense.dtype)
    numbers = [n, k, 2 * values.shape[1], int(k * size % 16 == 0)]
    host.build("sparse24_convert").run(f"decompress_{size}", values, metadata.view(np.uint8), out, *numbers)
    np.testing.assert_array_equal(out.array, dense)


@pytest.mark.parametrize("order", host.ORDERS)
def test_any_order_of_lanes_and_blocks(order: int) -> None:
    judge(40, 136, 2, order=order)


@pytest.mark.parametrize("order", host.ORDERS)
def test_the_first_group_that_is_not_24_is_reported(order: int) -> None:
    dense = np.zeros((70, 100), np.uint16)
    dense[[3, 40, 69], 96] = dense[[3, 40, 69], 97] = dense[[3, 40, 69], 99] = 1
    assert convert(dense, order=order)[2] == 3 * 100 + 96


def test_scores_that_are_not_numbers_and_zeros_of_both_signs() -> None:
    scores = np.array([[np.nan, np.inf, -np.inf, 0.0, -0.0, 0.0, -1.0, -np.inf]], np.float32)
    dense = np.arange(1, 9, dtype=np.uint16)[None]
    values, metadata, _ = convert(dense, scores)
    np.testing.assert_array_equal(values[0, :4], [1, 2, 5, 6])
    assert metadata[0, 0] & 0xFF == 0x44


# (text, replacement, message)
MUTANTS = {
    "columns past the container": (
        "if (unit * kUnitColumns >= out.padded_columns) return;",
        "",
        "outside|past|no barrier",
    ),
    "equals: the later first": ("keys[j] > keys[i]", "keys[j] >= keys[i]", "not equal"),
    "sign counts": ("static_cast<U>(U(~U{0}) >> 1)", "U(~U{0})", "not equal"),
    "padding counts": ("column + i < dense.columns ? keys[i] + 1 : 0", "keys[i] + 1", "not equal"),
    "pair of stored columns": ("0x000E0DCC09884444ull", "0x000E0DCC09844444ull", "not equal"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_fails(name: str) -> None:
    old, new, message = MUTANTS[name]
    changes = {("sparse24_convert.cuh", old): new, ("sparse24_convert.cpp", "EXPORTS(4, uint32_t)"): ""}
    library = host.build("sparse24_convert", changes)
    with pytest.raises((host.SimtError, AssertionError), match=message):
        for n, k in SHAPES:
            judge(n, k, 2, library)
