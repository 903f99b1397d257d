"""bitmap_convert: the words, values and rows of every variant against NumPy, and conversions of both formats by every
ISA against the definition, at sizes that tiles do not divide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sparse_cases import same_bits

from pyfast import _host
from pyfast.ops.nm_mask import nm_mask

ELEMENTS = ("uint8", "uint16", "uint32")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
# Rows and columns: one tile, cut ones, none, many words in a row, the last of 32 columns.
SHAPES = [(16, 64), (1, 1), (17, 65), (40, 96), (3, 1100), (33, 2080), (0, 64), (5, 0)]


def rows(count: int, density: float, elements: str) -> np.ndarray:
    """Elements of any bits but 0, and zeros."""
    rng = np.random.default_rng(count)
    values = rng.integers(1, np.iinfo(elements).max, (count, 64), elements, endpoint=True)
    return np.where(rng.random((count, 64)) < density, values, np.zeros((), elements))


@pytest.mark.parametrize("variant", _host.variants())
@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_words_values_and_rows(variant, elements, density):
    dense = rows(23, density, elements)
    words, values = _host.bitmap_pack(dense, variant=variant, room=64)
    assert not values[-64:].any()  # another thread's values may lie there
    values = values[:-64]
    np.testing.assert_array_equal(words, np.packbits(dense != 0, axis=1, bitorder="little").view(np.uint64)[:, 0])
    np.testing.assert_array_equal(values, dense[dense != 0])
    np.testing.assert_array_equal(_host.bitmap_expand(values, words, variant=variant), dense)


@pytest.mark.parametrize("variant", _host.variants())
@pytest.mark.parametrize("elements", ELEMENTS)
def test_every_column_by_itself(variant, elements):
    top = np.iinfo(elements).max
    dense = np.diag(np.full(64, 1 << (np.iinfo(elements).bits - 1), elements)) + np.tril(
        np.full((64, 64), top, elements), -1
    )
    words, values = _host.bitmap_pack(dense, variant=variant)
    assert [int(word) for word in words] == [(2 << row) - 1 for row in range(64)]
    np.testing.assert_array_equal(values, dense[dense != 0])
    np.testing.assert_array_equal(_host.bitmap_expand(values, words, variant=variant), dense)


def test_host_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"dense: accepted: \[rows, 64\]"):
        _host.bitmap_pack(np.zeros((2, 63), np.uint8))
    with pytest.raises(ValueError, match="elements of 1, 2 or 4 bytes"):
        _host.bitmap_pack(np.zeros((2, 64), np.uint64))
    with pytest.raises(ValueError, match="as many as the words have bits"):
        _host.bitmap_expand(np.zeros(3, np.uint8), np.array([1], np.uint64))


def stored_matrix(n: int, k: int, density: float, dtype: torch.dtype) -> torch.Tensor:
    """Random bits where something is stored: negative zeros, subnormals, infinities and NaN among them."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integers)
    bits = torch.randint(limits.min, limits.max, (n, k), dtype=torch.int64).to(integers)
    bits[::3] = limits.min  # negative zeros
    return torch.where(torch.rand(n, k) < density, bits, 0).to(integers).view(dtype)


def integers_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_bitmap_conversions(isa, dtype, n, k):
    ops = torch.ops.pyfast
    whole = stored_matrix(n, k + 5, 0.4, dtype)
    dense = whole[:, 3 : k + 3]
    values, bitmaps, offsets = ops.bitmap_compress(dense)
    kept = integers_of(dense) != 0
    tiles_n, tiles_k = -(-n // 16), -(-k // 64)
    padded = torch.zeros(16 * tiles_n, 64 * tiles_k, dtype=torch.bool)
    padded[:n, :k] = kept
    tiled = padded.view(tiles_n, 16, tiles_k, 64).transpose(1, 2).reshape(-1, 16, 64)
    expected = np.packbits(tiled.numpy(), axis=-1, bitorder="little").view(np.int64)[..., 0]
    np.testing.assert_array_equal(bitmaps.numpy(), expected.reshape(bitmaps.shape))
    assert offsets.tolist() == [0, *tiled.sum((1, 2)).cumsum(0).tolist()]
    back = ops.bitmap_decompress(values, bitmaps, offsets, n, k)
    assert same_bits(back, dense.contiguous())
    other = stored_matrix(n, k, 1.0, dtype)
    taken = ops.bitmap_decompress(ops.bitmap_gather(other, bitmaps, offsets, len(values)), bitmaps, offsets, n, k)
    assert same_bits(taken, torch.where(kept, integers_of(other), 0).to(integers_of(other).dtype).view(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_sparse24_conversions(isa, dtype, n, k):
    ops = torch.ops.pyfast
    mask = nm_mask(torch.rand(n, k + 8), 2, 4)[:, 4 : k + 4] if k else torch.zeros(n, 0, dtype=torch.bool)
    bits = integers_of(stored_matrix(n, k, 0.8, dtype))
    dense = torch.where(mask, bits, 0).to(bits.dtype).view(dtype)
    values, metadata, violation = ops.sparse24_compress(dense)
    assert violation.item() == -1
    assert same_bits(ops.sparse24_decompress(values, metadata, n, k), dense)
    assert same_bits(ops.sparse24_gather(dense, metadata), values)
    for row in range(n):
        for group in range(values.shape[1] // 2):
            nibble = (int(metadata[row, group // 4]) >> 4 * (group % 4)) & 15
            columns = [4 * group + (nibble & 3), 4 * group + (nibble >> 2)]
            stored = {
                4 * group + c for c in range(4) if 4 * group + c < k and integers_of(dense)[row, 4 * group + c] != 0
            }
            assert columns[0] < columns[1] and stored <= set(columns)
        if row == 2:
            break


@pytest.mark.parametrize("at", [(0, 0), (3, 61), (7, 64), (9, 1090), (9, 1099)])
def test_sparse24_violations_are_found_where_they_are(isa, at):
    row, column = at
    dense = torch.zeros(10, 1100)
    group = column // 4 * 4
    dense[row, group : group + 3] = 1.0
    _, _, violation = torch.ops.pyfast.sparse24_compress(dense)
    assert divmod(violation.item(), 1100) == (row, group)
