"""int8 values with a scale a row: the rule, exactness, files, products, gradients; native against the reference."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import relative_error
from sparse_cases import DTYPES, SHAPES, TOLERANCE, mask_24, same_bits, weight_24, weight_unstructured

import pyfast
from pyfast import BitmapWeight, Sparse24Weight, backends
from pyfast.nn import SparseLinear

FORMATS = {"2:4": Sparse24Weight, "bitmap": BitmapWeight}


def make(format, n, k, dtype=torch.float32, sparsity=0.6):
    dense = weight_24(n, k, dtype) if format == "2:4" else weight_unstructured(n, k, sparsity, dtype)
    return dense, FORMATS[format].from_dense(dense).quantize()


def rule(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scales and the codes of a float32 matrix, as docs/formats.md states them."""
    largest = np.abs(dense).max(1, initial=0.0)
    scales = np.maximum(largest / np.float32(127), np.finfo(np.float32).tiny)
    return scales, np.rint(dense / scales[:, None]).astype(np.int8)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 64), (16, 0)])
@pytest.mark.parametrize("format", FORMATS)
def test_values_and_scales_follow_the_rule(format, shape):
    dense, weight = make(format, *shape) if 0 not in shape else (torch.empty(shape), None)
    weight = weight or FORMATS[format].from_dense(dense).quantize()
    scales, codes = rule(dense.numpy())
    assert weight.dtype == torch.int8 and np.array_equal(weight.scales.numpy(), scales)
    back = weight.to_dense()
    assert back.dtype == torch.float32
    assert np.array_equal(back.numpy(), codes.astype(np.float32) * scales[:, None])
    half = weight.scales[:, None] * (0.5 + 1e-5)
    assert ((back - dense).abs() <= half).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_scaled_in_float32_or_better(dtype):
    dense, weight = make("bitmap", 33, 130, dtype)
    assert weight.scales.dtype == torch.float32
    error = (weight.to_dense().double() - dense.double()).abs() / weight.scales[:, None]
    assert error.max() <= 0.5 + 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_native_conversions_of_int8_equal_the_reference(format, monkeypatch):
    dense, weight = make(format, 37, 150)
    back = weight.to_dense()
    monkeypatch.setattr(backends._native, "CPU_REASON", "switched off")
    assert same_bits(weight.to_dense(), back)
    again = FORMATS[format].from_dense(dense).quantize()
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), weight.tensors().values(), strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_zeros_tiny_rows_and_ties(format):
    dense = torch.zeros(4, 64)
    dense[1, 0] = 1e-44  # subnormal: the scale is the smallest normal number
    dense[2, :8:4] = torch.tensor([127.0, 0.5])
    dense[3, :16:4] = torch.tensor([-127.0, 1.5, 2.5, -0.5])
    weight = FORMATS[format].from_dense(dense).quantize()
    tiny = torch.finfo(torch.float32).tiny
    assert weight.scales.tolist() == [tiny, tiny, 1.0, 1.0]
    expected = torch.zeros(4, 64)
    expected[2, 0] = 127.0
    expected[3, :12:4] = torch.tensor([-127.0, 2.0, 2.0])  # ties to even; 0.5 becomes 0 and stays stored
    assert torch.equal(weight.to_dense(), expected)
    if format == "bitmap":
        assert weight.values.numel() == 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_has_no_scale_is_refused(bad):
    dense = torch.ones(3, 64)
    dense[1, 5] = bad
    with pytest.raises(ValueError, match="row 1"):
        BitmapWeight.from_dense(dense).quantize()
    with pytest.raises(ValueError, match="row 0"):
        BitmapWeight.from_dense(torch.full((1, 4), 1e300, dtype=torch.float64)).quantize()
    with pytest.raises(ValueError, match="int8 values already"):
        make("bitmap", 4, 4)[1].quantize()


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_files_pickle_to(format, tmp_path):
    dense, weight = make(format, 64, 512)
    stored = weight.values.numel()
    plain = FORMATS[format].from_dense(dense)
    assert weight.nbytes == plain.nbytes - 3 * stored + 4 * 64
    weight.save(tmp_path / "w.safetensors")
    for twin in (FORMATS[format].load(tmp_path / "w.safetensors"), pickle.loads(pickle.dumps(weight))):
        assert torch.equal(twin.scales, weight.scales) and same_bits(twin.to_dense(), weight.to_dense())
    assert torch.equal(copy.deepcopy(weight).values, weight.values) and "int8" in repr(weight)
    half = weight.to(torch.float16)
    assert half.dtype == torch.int8 and half.scales.dtype == torch.float32
    meta = weight.to("meta")
    assert {tensor.device.type for tensor in meta.tensors().values()} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scales"), "tensors"),
        (lambda t: t.update(scales=t["scales"][:-1]), "scales: got shape"),
        (lambda t: t.update(scales=t["scales"].half()), "scales: got dtype"),
        (lambda t: t.update(scales=-t["scales"]), "not positive and finite"),
        (lambda t: t.update(scales=t["scales"] * float("nan")), "not positive and finite"),
        (lambda t: t.update(values=t["values"].float()), "tensors"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_refused(format, change, message):
    _, weight = make(format, 20, 64)
    tensors = weight.tensors()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        FORMATS[format].from_tensors(tensors, weight.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_products_match_float64(isa, format, dtype):
    for n, k, sparsity in ((33, 130, 0.6), (17, 65, 0.9), (48, 256, 0.0)):
        _, weight = make(format, n, k, sparsity=sparsity)
        true_weight = weight.to_dense().double()
        bias = torch.randn(n).to(dtype)
        for tokens in (0, 1, 2, 3, 5, 8, 9, 33, 40):
            x = torch.randn(tokens, k).to(dtype)
            y = pyfast.sparse_linear(x, weight, bias)
            true = x.double() @ true_weight.T + bias.double()
            scale = x.double().abs() @ true_weight.abs().T + bias.double().abs()
            error = (y.double() - true).norm() / scale.norm().clamp(min=1e-30)
            assert y.dtype == dtype and error < TOLERANCE[dtype], (n, k, tokens, float(error))


@pytest.mark.parametrize("format", FORMATS)
def test_float64_is_served_by_the_reference(format):
    _, weight = make(format, 20, 70)
    x = torch.randn(3, 70, dtype=torch.float64)
    assert relative_error(pyfast.sparse_linear(x, weight), x @ weight.to_dense().double().T) < 1e-12
    with pytest.raises(TypeError, match=r"x: got dtype torch\.int64"):
        pyfast.sparse_linear(x.long(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("format", FORMATS)
def test_module_gives_gradients_to_input_and_bias(isa, format, tokens, dtype):
    linear = torch.nn.Linear(70, 20).to(dtype)
    module = SparseLinear.from_linear(linear, format, 0.5).quantize_()
    assert module.values.dtype == torch.int8 and not module.values.requires_grad
    assert {name for name, _ in module.named_parameters() if _.requires_grad} == {"bias"}
    x = torch.randn(tokens, 70, dtype=dtype, requires_grad=True)
    upstream = torch.randn(tokens, 20).to(dtype)
    module(x).backward(upstream)
    true = upstream.double() @ module.weight.to_dense().double()
    assert relative_error(x.grad, true) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert relative_error(module.bias.grad, upstream.double().sum(0)) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("format", FORMATS)
def test_casting_a_module_leaves_scales_alone(format):
    module = SparseLinear.from_linear(torch.nn.Linear(64, 20), format, 0.5).quantize_()
    scales = module.scales.clone()
    module.half()
    assert module.bias.dtype == torch.float16 and torch.equal(module.scales, scales)
    assert module(torch.randn(2, 64).half()).dtype == torch.float16
    module.to(torch.bfloat16)
    assert module.scales.dtype == torch.float32 and "int8" in repr(module)
    assert module.to("meta").scales.dtype == torch.float32 and module.scales.is_meta


def test_a_row_s_error_is_that_of_the_codes():
    """Product of a quantized 2:4 weight against the product of its float original: bounded by half a code each."""
    dense = torch.randn(64, 256)
    dense = torch.where(mask_24(dense), dense, 0)
    x = torch.randn(5, 256)
    weight = Sparse24Weight.from_dense(dense)
    difference = pyfast.sparse_linear(x, weight.quantize()) - pyfast.sparse_linear(x, weight)
    bound = 0.5 * weight.quantize().scales * (x.abs() @ (dense != 0).float().T)
    assert (difference.abs() <= bound * 1.01).all()
