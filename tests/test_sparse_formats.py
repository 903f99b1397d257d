"""Sparse24Weight and BitmapWeight: conversions bit for bit, files, damage, bad input; native against reference."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sparse_cases import DTYPES, SHAPES, awkward, mask_24, same_bits, weight_24, weight_unstructured

from pyfast import BitmapWeight, Sparse24Weight
from pyfast.reference import bitmap_convert, sparse24_convert

BOTH = [Sparse24Weight, BitmapWeight]


def example(cls, n=33, k=130, dtype=torch.float32):
    return weight_24(n, k, dtype) if cls is Sparse24Weight else weight_unstructured(n, k, 0.6, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cls", BOTH)
def test_round_trip_is_exact(cls, shape, dtype):
    dense = example(cls, *shape, dtype)
    weight = cls.from_dense(dense)
    assert weight.shape == shape and weight.dtype == dtype
    assert same_bits(weight.to_dense(), dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitmap_keeps_every_bit(dtype):
    dense = awkward(40, 150, dtype)
    assert same_bits(BitmapWeight.from_dense(dense).to_dense(), dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_24_keeps_every_bit(dtype):
    dense = weight_24(8, 64, dtype)
    dense[0, :4] = torch.tensor([0.0, -0.0, float("nan"), 0.0])
    dense[1, 60:] = torch.tensor([float("inf"), 0.0, 0.0, -float("inf")])
    dense[2] = 0
    assert same_bits(Sparse24Weight.from_dense(dense).to_dense(), dense)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 70), k=st.integers(1, 200), sparsity=st.floats(0, 1), dtype=st.sampled_from(DTYPES))
def test_native_conversions_equal_the_reference(n, k, sparsity, dtype):
    dense = weight_unstructured(n, k, sparsity, dtype)
    weight = BitmapWeight.from_dense(dense)
    for got, expected in zip(weight.tensors().values(), bitmap_convert.compress(dense), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert same_bits(bitmap_convert.decompress(weight.values, weight.bitmaps, n, k), dense)
    dense = torch.where(mask_24(dense), dense, 0)
    weight = Sparse24Weight.from_dense(dense)
    values, metadata, violation = sparse24_convert.compress(dense)
    assert torch.equal(weight.values, values) and torch.equal(weight.metadata, metadata) and violation == -1
    assert same_bits(sparse24_convert.decompress(values, metadata, n, k), dense)


@pytest.mark.parametrize("cls", BOTH)
def test_views_convert(cls):
    dense = example(cls, 20, 64)
    for view in (dense.t().contiguous().t(), torch.cat([dense, dense], 1)[:, :64], dense[3:, :]):
        assert same_bits(cls.from_dense(view).to_dense(), view.contiguous())


@pytest.mark.parametrize("cls", BOTH)
def test_nbytes_is_what_the_format_says(cls):
    dense = example(cls, 64, 512)
    weight = cls.from_dense(dense)
    if cls is Sparse24Weight:
        assert weight.nbytes == dense.numel() * 4 * 17 // 32
    else:
        tiles = dense.numel() // 1024
        assert weight.nbytes == 4 * int((dense != 0).sum()) + 128 * tiles + 8 * (tiles + 1)
        assert weight.density == int((dense != 0).sum()) / dense.numel()


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_save_load_pickle_deepcopy_to(cls, dtype, tmp_path):
    dense = example(cls, 21, 100, dtype)
    weight = cls.from_dense(dense)
    weight.save(tmp_path / "w.safetensors")
    for twin in (cls.load(tmp_path / "w.safetensors"), pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight)):
        assert twin.shape == weight.shape and same_bits(twin.to_dense(), dense)
    half = weight.to(torch.float16)
    assert half.dtype == torch.float16 and torch.equal(half.to_dense(), dense.to(torch.float16))
    assert weight.to("meta").device.type == "meta"
    assert str(dtype) in repr(weight)


@pytest.mark.parametrize("cls", BOTH)
def test_truncated_and_foreign_files_are_refused(cls, tmp_path):
    path = tmp_path / "w.safetensors"
    cls.from_dense(example(cls)).save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            cls.load(path)
    path.write_bytes(b"PK\x03\x04" + b"x" * 500)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        cls.load(path)
    save_file({"values": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="no pyfast weight"):
        cls.load(path)
    other = BOTH[1 - BOTH.index(cls)]
    other.from_dense(example(other)).save(path)
    with pytest.raises(ValueError, match=re.escape(f"holds '{other.format}'")):
        cls.load(path)
    with pytest.raises(FileNotFoundError):
        cls.load(tmp_path / "nowhere.safetensors")


def rewrite(path, change_tensors=lambda tensors: None, **about):
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path, metadata | about)


DAMAGE = {
    "version": ({}, {"version": "1"}, "version"),
    "shape text": ({}, {"shape": "banana"}, "shape"),
    "shape float": ({}, {"shape": "[1.5, 2]"}, "shape"),
    "shape negative": ({}, {"shape": "[-33, 130]"}, "shape"),
    "shape other": ({}, {"shape": json.dumps([33, 400])}, "shape"),
    "values missing": ({"values": None}, {}, "tensors"),
    "values integer": ({"values": lambda v: v.to(torch.int32)}, {}, "dtype"),
    "values short": ({"values": lambda v: v[:-1].contiguous()}, {}, "values|metadata"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("cls", BOTH)
def test_damaged_files_are_refused(cls, damage, tmp_path):
    path = tmp_path / "w.safetensors"
    cls.from_dense(example(cls)).save(path)
    changes, about, message = DAMAGE[damage]

    def change(tensors):
        for name, how in changes.items():
            old = tensors.pop(name)
            if how is not None:
                tensors[name] = how(old)

    rewrite(path, change, **about)
    with pytest.raises(ValueError, match=message):
        cls.load(path)


def test_bits_that_do_not_agree_are_refused(tmp_path):
    weight = BitmapWeight.from_dense(example(BitmapWeight))
    tensors = weight.tensors()
    bitmaps = tensors["bitmaps"].clone()
    bitmaps[0, 0] ^= 1
    with pytest.raises(ValueError, match="offsets"):
        BitmapWeight.from_tensors(tensors | {"bitmaps": bitmaps}, weight.shape)
    with pytest.raises(ValueError, match="offsets"):
        BitmapWeight.from_tensors(tensors | {"offsets": tensors["offsets"] + 1}, weight.shape)
    with pytest.raises(ValueError, match="values"):
        BitmapWeight.from_tensors(tensors | {"values": tensors["values"][:-1]}, weight.shape)
    weight = Sparse24Weight.from_dense(example(Sparse24Weight))
    metadata = weight.metadata.clone()
    metadata[1, 1] = 0
    with pytest.raises(ValueError, match="nibble"):
        Sparse24Weight.from_tensors({"values": weight.values, "metadata": metadata}, weight.shape)


@pytest.mark.parametrize(("word", "bit"), [(0, 3), (0, 63), (1, 32), (2, 0), (15, 63)])
def test_bits_in_the_padding_are_refused_and_never_followed(word, bit):
    weight = BitmapWeight.from_dense(torch.zeros(2, 3))
    bitmaps = weight.bitmaps.clone()
    bitmaps[0, word] = 1 << bit if bit < 63 else -(1 << 63)
    tensors = {"values": torch.ones(1), "bitmaps": bitmaps, "offsets": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="outside the shape"):
        BitmapWeight.from_tensors(tensors, (2, 3))
    dense = torch.ops.pyfast.bitmap_decompress(*tensors.values(), 2, 3)
    assert torch.equal(dense, torch.zeros(2, 3))
    assert torch.equal(torch.ops.pyfast.bitmap_gather(torch.ones(2, 3), bitmaps, tensors["offsets"], 1), torch.zeros(1))
    whole = BitmapWeight.from_tensors(tensors, (16, 64))
    assert whole.to_dense().sum() == 1


def test_a_weight_that_is_not_24_is_refused_with_its_place():
    dense = weight_24(6, 64)
    dense[4, 20:24] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(ValueError, match=r"row 4 columns 20 to 23 hold \[1.0, 2.0, 3.0, 0.0\]"):
        Sparse24Weight.from_dense(dense)
    dense[4, 20:24] = torch.tensor([1.0, -0.0, 3.0, 0.0])
    with pytest.raises(ValueError, match="negative zeros"):
        Sparse24Weight.from_dense(dense)
    assert torch.equal(Sparse24Weight.from_dense(dense + 0.0).to_dense(), dense)


@pytest.mark.parametrize("cls", BOTH)
def test_mask(cls):
    dense = -torch.rand(16, 64) - 0.1
    mask = mask_24(dense)
    weight = cls.from_dense(dense, mask=mask)
    assert same_bits(weight.to_dense(), torch.where(mask, dense, 0.0))
    if cls is BitmapWeight:
        assert weight.density == 0.5


W = torch.ones(4, 8)
BAD = {
    "list": (TypeError, "dense", [[1.0]], None),
    "integers": (TypeError, "dense", torch.ones(4, 8, dtype=torch.int32), None),
    "vector": (ValueError, "dense", torch.ones(8), None),
    "three dimensions": (ValueError, "dense", torch.ones(2, 4, 8), None),
    "sparse layout": (ValueError, "dense", W.to_sparse(), None),
    "mask of floats": (TypeError, "mask", W, W),
    "mask of another shape": (ValueError, "mask", W, torch.ones(8, 4, dtype=torch.bool)),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("cls", BOTH)
def test_bad_input_names_the_argument(cls, case):
    error, name, dense, mask = BAD[case]
    with pytest.raises(error, match=name):
        cls.from_dense(dense, mask=mask)


@pytest.mark.parametrize("shape", [(0, 64), (16, 0), (0, 0)])
@pytest.mark.parametrize("cls", BOTH)
def test_empty_weights(cls, shape):
    dense = torch.empty(shape)
    assert cls.from_dense(dense).to_dense().shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    ops = torch.ops.pyfast
    dense = weight_24(10, 70, dtype)
    values, metadata, _ = ops.sparse24_compress(dense)
    torch.library.opcheck(ops.sparse24_compress, (dense,))
    torch.library.opcheck(ops.sparse24_decompress, (values, metadata, 10, 70))
    torch.library.opcheck(ops.sparse24_gather, (dense, metadata))
    values, bitmaps, offsets = ops.bitmap_compress(dense)
    torch.library.opcheck(ops.bitmap_compress, (dense,))
    torch.library.opcheck(ops.bitmap_decompress, (values, bitmaps, offsets, 10, 70))
    torch.library.opcheck(ops.bitmap_gather, (dense, bitmaps, offsets, values.numel()))
