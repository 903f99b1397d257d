"""Row-major bitmasks and N:M patterns: import, export, damage; native against the reference and against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import DTYPES, SHAPES, awkward, same_bits, weight_unstructured

import pyfast
from pyfast import BitmapWeight
from pyfast.reference import bitmask_convert as reference


def exported(dense: torch.Tensor) -> dict[str, torch.Tensor]:
    """The layout by its definition: non-zeros row by row, NumPy's packed bits, sums of the rows before."""
    kept = dense != 0
    counts = kept.sum(-1)
    bits = torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little"))
    shape = torch.tensor(dense.shape)
    return {"shape": shape, "compressed": dense[kept], "bitmask": bits, "row_offsets": counts.cumsum(0) - counts}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 64), (16, 0), (0, 0)])
def test_import_and_export(shape, dtype):
    dense = weight_unstructured(*shape, 0.6, dtype)
    weight = BitmapWeight.from_bitmask(**exported(dense))
    assert weight.shape == shape and same_bits(weight.to_dense(), dense)
    for name, tensor in weight.to_bitmask().items():
        assert tensor.dtype == exported(dense)[name].dtype and torch.equal(tensor, exported(dense)[name]), name


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 70), k=st.integers(1, 200), sparsity=st.floats(0, 1), dtype=st.sampled_from(DTYPES))
def test_native_equals_the_reference(n, k, sparsity, dtype):
    weight = BitmapWeight.from_dense(weight_unstructured(n, k, sparsity, dtype))
    parts = weight.to_bitmask()
    expected = reference.to_bitmask(weight.values, weight.bitmaps, n, k)
    for got, true in zip((parts["compressed"], parts["bitmask"], parts["row_offsets"]), expected, strict=True):
        assert got.dtype == true.dtype and torch.equal(got, true)
    back = reference.from_bitmask(parts["compressed"], parts["bitmask"], k)
    for got, true, own in zip(
        BitmapWeight.from_bitmask(**parts).tensors().values(), back, weight.tensors().values(), strict=True
    ):
        assert torch.equal(got, true) and torch.equal(got, own)


def test_every_bit_and_stored_zeros_survive():
    dense = awkward(40, 150, torch.float32)
    weight = BitmapWeight.from_dense(dense)
    assert same_bits(BitmapWeight.from_bitmask(**weight.to_bitmask()).to_dense(), dense)
    with torch.no_grad():
        weight.values.zero_()
    again = BitmapWeight.from_bitmask(**weight.to_bitmask())
    assert torch.equal(again.bitmaps, weight.bitmaps) and again.values.numel() == weight.values.numel()


def test_int8_travels_with_its_scales():
    weight = BitmapWeight.from_dense(weight_unstructured(33, 130, 0.6)).quantize()
    parts = weight.to_bitmask()
    again = BitmapWeight.from_bitmask(**parts)
    assert parts["compressed"].dtype == torch.int8 and same_bits(again.to_dense(), weight.to_dense())
    del parts["scales"]
    with pytest.raises(ValueError, match="tensors"):
        BitmapWeight.from_bitmask(**parts)


def damage_bit(parts):
    parts["bitmask"] = parts["bitmask"].clone()
    parts["bitmask"][3, 2] ^= 4


def beyond(parts):
    parts["bitmask"] = parts["bitmask"].clone()
    parts["bitmask"][5, -1] |= 128


DAMAGE = {
    "a bit": (damage_bit, "row_offsets"),
    "a bit beyond the columns": (beyond, "bitmask: holds bits beyond column 129"),
    "offsets moved": (lambda p: p.update(row_offsets=p["row_offsets"] + 1), "row_offsets: do not agree"),
    "offsets as ends": (lambda p: p.update(row_offsets=p["row_offsets"].roll(-1)), "row_offsets: do not agree"),
    "offsets int32": (lambda p: p.update(row_offsets=p["row_offsets"].int()), "row_offsets: got dtype"),
    "offsets short": (lambda p: p.update(row_offsets=p["row_offsets"][:-1]), "row_offsets: got shape"),
    "values short": (lambda p: p.update(compressed=p["compressed"][:-1]), "compressed: got"),
    "values in a matrix": (lambda p: p.update(compressed=p["compressed"][None]), "compressed: got shape"),
    "values of integers": (lambda p: p.update(compressed=p["compressed"].long()), "compressed: got dtype"),
    "another width": (lambda p: p.update(shape=(33, 140)), "bitmask: got shape"),
    "another height": (lambda p: p.update(shape=(32, 130)), "bitmask: got shape"),
    "no shape": (lambda p: p.update(shape=(33,)), "shape: got"),
    "a shape of floats": (lambda p: p.update(shape=torch.tensor([33.0, 130.0])), "shape: got"),
    "a bitmask of bools": (lambda p: p.update(bitmask=p["bitmask"].bool()), "bitmask: got dtype"),
    "two devices": (lambda p: p.update(bitmask=p["bitmask"].to("meta")), "bitmask: got device"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused(case):
    change, message = DAMAGE[case]
    parts = exported(weight_unstructured(33, 130, 0.6))
    change(parts)
    with pytest.raises(ValueError, match=message):
        BitmapWeight.from_bitmask(**parts)


@pytest.mark.parametrize("name", ["compressed", "row_offsets", "bitmask"])
def test_the_op_follows_no_tensor_that_does_not_fit(name):
    parts = exported(weight_unstructured(33, 130, 0.6))
    del parts["shape"]
    if name == "row_offsets":
        parts[name] = parts[name] * 1000
    else:
        parts[name] = parts[name][:-1].contiguous()
    with pytest.raises(RuntimeError, match=name if name != "bitmask" else "row_offsets"):
        torch.ops.pyfast.bitmap_from_bitmask(*parts.values(), 130)
    weight = BitmapWeight.from_dense(weight_unstructured(33, 130, 0.6))
    with pytest.raises(RuntimeError, match="offsets"):
        torch.ops.pyfast.bitmap_to_bitmask(weight.values, weight.bitmaps, weight.offsets + 1000, 33, 130)


def test_opcheck():
    weight = BitmapWeight.from_dense(weight_unstructured(10, 70, 0.5))
    parts = weight.to_bitmask()
    ops = torch.ops.pyfast
    torch.library.opcheck(ops.bitmap_to_bitmask, (weight.values, weight.bitmaps, weight.offsets, 10, 70))
    torch.library.opcheck(ops.bitmap_from_bitmask, (parts["compressed"], parts["bitmask"], parts["row_offsets"], 70))


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (4, 8), (2, 8), (3, 5)])
def test_any_n_of_m_pattern_is_accepted(isa, pattern):
    kept, group = pattern
    rows, columns = 40, group * 24
    dense = torch.randn(rows, columns)
    ranks = dense.abs().reshape(rows, -1, group).argsort(-1, descending=True).argsort(-1)
    mask = (ranks < kept).reshape(rows, columns)
    weight = BitmapWeight.from_dense(dense, mask=mask)
    assert weight.density == kept / group
    assert same_bits(weight.to_dense(), torch.where(mask, dense, 0.0))
    x = torch.randn(3, columns)
    torch.testing.assert_close(pyfast.sparse_linear(x, weight), x @ (dense * mask).T, rtol=1e-4, atol=1e-4)
