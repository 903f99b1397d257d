"""Dense products by either library: beside float64 whatever the memory of the operands, the choice between them, and
what of pyfast multiplies by them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error
from linear_cases import Case, check
from sparse_cases import weight_24, weight_unstructured
from torch._subclasses.fake_tensor import FakeTensorMode

from pyfast import _native, _products
from pyfast.ops import _linear_chunks
from pyfast.sparse import BitmapWeight, Sparse24Weight, set_layouts, sparse_linear

pytestmark = pytest.mark.skipif(
    _native.CPU is None or not torch.backends.mkldnn.is_available(), reason="needs native kernels and oneDNN"
)


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def library(request):
    """Every product of the test by one of the libraries."""
    before = _products.multiply_by_onednn(request.param)
    yield request.param
    _products.multiply_by_onednn(before)


def _matrices():
    """By name, matrices of 12 x 10 in every kind of memory."""
    return {
        "plain": torch.randn(12, 10),
        "transposed": torch.randn(10, 12).t(),
        "columns of a wider one": torch.randn(12, 30)[:, 7:17],
        "every other column": torch.randn(12, 20)[:, ::2],
        "every other row": torch.randn(24, 10)[::2],
        "one row expanded": torch.randn(1, 10).expand(12, 10),
        "one column expanded": torch.randn(12, 1).expand(12, 10),
        "one number expanded": torch.randn(1, 1).expand(12, 10),
        "windows": torch.randn(40).as_strided((12, 10), (2, 1)),
        "windows, transposed": torch.randn(40).as_strided((12, 10), (1, 2)),
        "parameter": torch.nn.Parameter(torch.randn(12, 10), requires_grad=False),
    }


@pytest.mark.parametrize("memory", _matrices())
def test_products_do_not_depend_on_memory(library, memory):
    weight, bias = _matrices()[memory], torch.randn(24)[::2]
    x = torch.randn(5, 10)
    truth = x.double() @ weight.double().t()
    assert relative_error(_products.linear(x, weight), truth) < 1e-6
    assert relative_error(_products.linear(x, weight, bias), truth + bias.double()) < 1e-6
    assert relative_error(_products.mm(x, weight.t()), truth) < 1e-6
    assert relative_error(_products.linear(weight, x), truth.t()) < 1e-6
    assert relative_error(_products.mm(weight.t(), weight), weight.double().t() @ weight.double()) < 1e-6


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (1, 7, 1), (3, 1, 9), (0, 4, 5), (4, 0, 5), (4, 5, 0)])
def test_products_of_odd_sizes(library, rows, n, k):
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k), torch.randn(n)
    got = _products.linear(x, weight, bias)
    assert got.shape == (rows, n)
    assert relative_error(got, x.double() @ weight.double().t() + bias.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_other_dtypes_are_torchs(library, dtype):
    a, b = torch.randint(-9, 9, (4, 6)).to(dtype), torch.randint(-9, 9, (6, 5)).to(dtype)
    assert not _products.by_onednn(a, b)
    torch.testing.assert_close(_products.mm(a, b), a @ b, rtol=0, atol=0)


def test_gradients_and_tracing_go_by_torch(library):
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 5)
    (grad,) = torch.autograd.grad(_products.mm(a, b).sum(), a)
    assert relative_error(grad, b.double().sum(1).expand(4, 6)) < 1e-6
    with torch.no_grad():
        assert _products.by_onednn(a, b) == library
    with FakeTensorMode() as mode:
        fake = _products.mm(mode.from_tensor(torch.randn(4, 6)), mode.from_tensor(b))
    assert fake.shape == (4, 5)


@pytest.mark.parametrize(
    ("isas", "intel", "mkl", "expected"),
    [
        (["serial", "avx2", "avx512"], False, True, True),
        (["serial", "avx2", "avx512"], True, True, False),
        (["serial", "avx2"], False, True, False),
        (["serial", "avx2", "avx512"], False, False, False),
    ],
)
def test_the_choice_goes_by_the_processor(monkeypatch, isas, intel, mkl, expected):
    monkeypatch.setattr(_native, "CPU", SimpleNamespace(supported_isas=lambda: isas, is_intel=lambda: intel))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert _products._onednn_is_faster() == expected


def test_is_intel_says_what_the_system_says():
    with open("/proc/cpuinfo") as lines:
        vendors = {line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")}
    assert _native.CPU.is_intel() == (vendors == {"GenuineIntel"})


@pytest.mark.parametrize("panel", [16, 101, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_distill(library, monkeypatch, panel, dtype):
    """Several chunks of tokens, several panels of words, the last of each a shorter one."""
    monkeypatch.setattr(_linear_chunks, "PANEL", panel)
    case = Case(23, dtype=dtype)
    check(case.fused(chunk_size=9), case.plain(), 2e-6 if dtype == torch.float32 else 2e-2)


def _sparse(format_, n, k, dtype):
    if format_ == "2:4":
        return Sparse24Weight.from_dense(weight_24(n, k, dtype))
    return BitmapWeight.from_dense(weight_unstructured(n, k, 0.7, dtype))


@pytest.mark.parametrize("format_", ["2:4", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_by_panels(library, format_, dtype):
    weight = _sparse(format_, 150, 96, dtype)
    x, bias = torch.randn(70, 96).to(dtype), torch.randn(300).to(dtype)[::2]
    before = set_layouts("none")
    try:
        got = sparse_linear(x, weight, bias, activation="relu")
    finally:
        set_layouts(before)
    truth = (x.double() @ weight.to_dense().double().t() + bias.double()).relu()
    assert relative_error(got, truth) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("format_", ["2:4", "bitmap"])
def test_gradients_of_sparse_products(library, format_):
    weight = _sparse(format_, 48, 64, torch.float32)
    weight.values.requires_grad_()
    x = torch.randn(33, 64, requires_grad=True)
    towards = torch.randn(33, 48)
    grad_x, grad_values = torch.autograd.grad((sparse_linear(x, weight) * towards).sum(), (x, weight.values))
    assert relative_error(grad_x, towards.double() @ weight.to_dense().detach().double()) < 1e-6
    dense = towards.double().t() @ x.detach().double()
    assert relative_error(grad_values, _like(weight, dense.float())) < 1e-6


def _like(weight, dense):
    """Elements of ``dense`` at the stored places."""
    if isinstance(weight, Sparse24Weight):
        return torch.ops.pyfast.sparse24_gather(dense, weight.metadata)
    return torch.ops.pyfast.bitmap_gather(dense, weight.bitmaps, weight.offsets, weight.values.numel())


def test_the_library_that_was_chosen_multiplies(library):
    """In Python and in C++: by the names of the operators that run."""
    weight = BitmapWeight.from_dense(weight_unstructured(64, 64, 0.5))
    case = Case(70)
    before = set_layouts("none")
    try:
        for product in (lambda: sparse_linear(torch.randn(70, 64), weight), case.fused):
            with torch.profiler.profile() as profile:
                product()
            assert any(event.key == "mkldnn::_linear_pointwise" for event in profile.key_averages()) == library
    finally:
        set_layouts(before)
