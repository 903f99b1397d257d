"""indexed_linear: the product driven by the stored values. :func:`pyfast.sparse_linear` is the
public door; :mod:`pyfast.sparse.layouts` derives the layout from a container.

Kernels: ``csrc/cpu/indexed_linear*``, ``csrc/cpu/indexed_convert*``; truth: ``pyfast/reference/indexed_linear.py``.
For inference: it has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast import backends
from pyfast.ops._library import LIBRARY, define
from pyfast.reference import indexed_linear as reference


def indexed_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    n: int,
    panel: int,
    block: int,
    activation: int,
    mul: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]. values, columns: float32 and uint8 [steps, 4]; or, of pairs,
    bfloat16 and uint8 [steps, 4, 2], and x bfloat16 too."""
    if backends.select("indexed_linear", x.device.type, x.dtype, backend) == "reference":
        return reference.indexed_linear(x, values, columns, starts, rows, bias, n, panel, block, activation, mul)
    return torch.ops.pyfast.indexed_linear(x, values, columns, starts, rows, bias, n, panel, block, activation, mul)


define(
    "indexed_linear(Tensor x, Tensor values, Tensor columns, Tensor starts, Tensor rows, Tensor? bias, int n, "
    "int panel, int block, int activation, Tensor? mul) -> Tensor"
)
define(
    "bitmap_to_indexed(Tensor values, Tensor bitmaps, Tensor offsets, Tensor? scales, int n, int k, int panel, "
    "int block, bool pairs) -> (Tensor values, Tensor columns, Tensor starts, Tensor rows)"
)
define(
    "sparse24_to_indexed(Tensor values, Tensor metadata, Tensor? scales, int k, int panel, int block, "
    "bool pairs) -> (Tensor values, Tensor columns, Tensor starts, Tensor rows)"
)


@torch.library.register_fake("pyfast::indexed_linear", lib=LIBRARY)
def _fake(x: Tensor, values, columns, starts, rows, bias, n: int, panel: int, block: int, activation, mul) -> Tensor:
    return x.new_empty(x.shape[0], n)


def _fake_layout(
    values: Tensor, n: int, k: int, panel: int, block: int, pairs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    steps = torch.library.get_ctx().new_dynamic_size()
    quads = -(-n // panel) * -(-k // block) * (panel // reference.QUAD)
    size = (steps, reference.QUAD, 2) if pairs else (steps, reference.QUAD)
    return (
        values.new_empty(size, dtype=torch.bfloat16 if pairs else torch.float32),
        values.new_empty(size, dtype=torch.uint8),
        values.new_empty(quads + 1, dtype=torch.int32),
        values.new_empty(quads, reference.QUAD, dtype=torch.uint8),
    )


@torch.library.register_fake("pyfast::bitmap_to_indexed", lib=LIBRARY)
def _fake_bitmap(values: Tensor, bitmaps, offsets, scales, n: int, k: int, panel: int, block: int, pairs: bool):
    return _fake_layout(values, n, k, panel, block, pairs)


@torch.library.register_fake("pyfast::sparse24_to_indexed", lib=LIBRARY)
def _fake_sparse24(values: Tensor, metadata, scales, k: int, panel: int, block: int, pairs: bool):
    return _fake_layout(values, values.shape[0], k, panel, block, pairs)
