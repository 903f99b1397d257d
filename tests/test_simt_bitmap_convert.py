"""bitmap_convert's CUDA kernels, executed on the host: every element bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from simt import host
from test_cuda_build import SHAPES, bitmap_case


def packed(k: int, size: int, stride: int | None = None) -> int:
    return int((k if stride is None else stride) * size % 16 == 0)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_both_ways(n: int, k: int, size: int, library: host.Library | None = None, order: int = 0) -> None:
    library = library or host.build("bitmap_convert")
    for density in (0.0, 0.1, 0.5, 1.0):
        values, bitmaps, offsets, dense = bitmap_case(n, k, size, density)
        numbers = [n, k, len(values), packed(k, size)]

        found, counts = host.Output(bitmaps.shape, np.int64), host.Output(len(bitmaps), np.int64)
        library.run(f"compress_{size}", dense, k, found, counts, None, *numbers, order=order)
        np.testing.assert_array_equal(found.array, bitmaps)
        np.testing.assert_array_equal(counts.array, np.diff(offsets))

        gathered = host.Output(len(values), dense.dtype)
        if len(values):
            library.run(f"compress_{size}", dense, k, bitmaps, offsets, gathered, *numbers, order=order)
        np.testing.assert_array_equal(gathered.array, values)

        out = host.Output((n, k), dense.dtype)
        library.run(f"decompress_{size}", values, bitmaps, offsets, out, *numbers, order=order)
        np.testing.assert_array_equal(out.array, dense)


@pytest.mark.parametrize("order", host.ORDERS)
def test_any_order_of_lanes_and_blocks(order: int) -> None:
    test_both_ways(40, 136, 2, order=order)


def test_rows_with_gaps() -> None:
    _, bitmaps, _, dense = bitmap_case(33, 70, 2, 0.5)
    for stride in (72, 75):
        wide = np.full((33, stride), 7, np.uint16)
        wide[:, :70] = dense
        found, counts = host.Output(bitmaps.shape, np.int64), host.Output(len(bitmaps), np.int64)
        numbers = [33, 70, 0, packed(70, 2, stride)]
        host.build("bitmap_convert").run("compress_2", wide, stride, found, counts, None, *numbers)
        np.testing.assert_array_equal(found.array, bitmaps)


def test_elements_outside_the_matrix_are_gathered_as_zeros() -> None:
    bitmaps = np.full((1, 16), -1, np.int64)
    dense = np.full((3, 5), 9, np.uint16)
    out = host.Output(1024, np.uint16)
    host.build("bitmap_convert").run("compress_2", dense, 5, bitmaps, np.array([0, 1024]), out, 3, 5, 1024, 0)
    expected = np.zeros((16, 64), np.uint16)
    expected[:3, :5] = 9
    np.testing.assert_array_equal(out.array.reshape(16, 64), expected)


@pytest.mark.parametrize("damage", [-(2**40), -1, 10**6, 2**62])
def test_offsets_that_point_elsewhere_are_not_followed(damage: int) -> None:
    values, bitmaps, offsets, dense = bitmap_case(40, 136, 2, 0.5)
    offsets = offsets.copy()
    offsets[4] = damage
    out = host.Output((40, 136), np.uint16)
    library = host.build("bitmap_convert")
    library.run("decompress_2", values, bitmaps, offsets, out, 40, 136, len(values), 1)
    expected = dense.copy()
    expected[16:32, 64:128] = 0  # tile 4 of three a row
    np.testing.assert_array_equal(out.array, expected)
    gathered = host.InOut(np.zeros(len(values), np.uint16))
    library.run("compress_2", dense, 136, bitmaps, offsets, gathered, 40, 136, len(values), 1)


# (text, replacement, message): the machine's rules or the comparison must see each.
MUTANTS = {
    "values read before all have come": (
        "  ptx::syncwarp();\n\n  const int64_t top",
        "\n  const int64_t top",
        "no barrier|nobody",
    ),
    "values written before all are staged": (
        "  ptx::syncwarp();\n\n  store_staged",
        "\n  store_staged",
        "no barrier|nobody",
    ),
    "rows past the last": ("if (row >= dense.rows) return pack;", "", "outside|past"),
    "columns past the last": (
        "if (column + i < dense.columns) pack.element[i] = from",
        "pack.element[i] = from",
        "outside|past|Mismatch|not equal",
    ),
    "tiles past the last": ("if (tile >= tiles) return;", "if (tile > tiles) return;", "outside|past"),
    "chunk of the tile before overwritten": (
        "      if (first + i >= head && first + i < head + readable) to[i] = staged[first + i];",
        "      if (first + i < head + readable) to[i] = staged[first + i];",
        "nobody|no barrier|wrote",
    ),
    "bits of the unit before": ("bits <<= Unit(step, lane).shift;", "", "not equal"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_fails(name: str) -> None:
    old, new, message = MUTANTS[name]
    file = "common.cuh" if "past the last" in name and "tiles" not in name else "bitmap_convert.cuh"
    library = host.build("bitmap_convert", {(file, old): new, ("bitmap_convert.cpp", "EXPORTS(4, uint32_t)"): ""})
    with pytest.raises((host.SimtError, AssertionError), match=message):
        for n, k in SHAPES:
            test_both_ways(n, k, 2, library)
