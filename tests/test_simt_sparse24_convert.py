"""The CUDA kernel that makes dense rows of a 2:4 weight, executed on the host: exact in every bit."""

from __future__ import annotations

import numpy as np
import pytest
from simt import host
from test_cuda_build import SHAPES, sparse24_case


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("multiple", [16, 32])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dense_rows(n: int, k: int, multiple: int, size: int) -> None:
    values, metadata, dense = sparse24_case(n, k, size, multiple)
    for order in host.ORDERS:
        out = host.Output((n, k), f"u{size}")
        packed = int(k * size % 16 == 0)
        library = host.build("sparse24_convert")
        library.run(f"decompress_{size}", values, metadata, out, n, k, 2 * values.shape[1], packed, order=order)
        np.testing.assert_array_equal(out.array, dense)


def test_a_row_too_many_is_seen() -> None:
    values, metadata, _ = sparse24_case(17, 65, 2, 32)
    library = host.build("sparse24_convert", {("sparse24_convert.cuh", "if (at >= dense.rows) continue;"): ""})
    with pytest.raises(host.SimtError, match="outside all memory"):
        library.run("decompress_2", values, metadata, host.Output((17, 65), np.uint16), 17, 65, 96, 0)
