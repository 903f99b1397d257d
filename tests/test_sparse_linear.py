"""sparse_linear: every ISA, any number of tokens, any N and K, against float64; gradients; modules; bad input."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import DTYPES, SHAPES, TOLERANCE, weight_24, weight_unstructured

import pyfast
from pyfast import BitmapWeight, Sparse24Weight, backends
from pyfast.nn import SparseLinear

FORMATS = {"2:4": Sparse24Weight, "bitmap": BitmapWeight}


def make(format, n, k, dtype=torch.float32, sparsity=0.6):
    dense = weight_24(n, k, dtype) if format == "2:4" else weight_unstructured(n, k, sparsity, dtype)
    return dense, FORMATS[format].from_dense(dense)


def check(x, dense, weight, bias=None, backend=None):
    y = pyfast.sparse_linear(x, weight, bias, backend=backend)
    true = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    assert y.shape == (*x.shape[:-1], dense.shape[0]) and y.dtype == x.dtype
    scale = x.double().abs() @ dense.double().abs().T + (0 if bias is None else bias.double().abs())
    error = (y.double() - true).norm() / scale.norm().clamp(min=1e-30)
    assert error < TOLERANCE[x.dtype], float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_matches_float64(isa, format, shape, dtype):
    dense, weight = make(format, *shape, dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for tokens in (0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 33, 40):
        x = torch.randn(tokens, shape[1]).to(dtype)
        check(x, dense, weight)
        check(x, dense, weight, bias)


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS)),
    n=st.integers(1, 100),
    k=st.integers(1, 300),
    tokens=st.integers(0, 20),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from(DTYPES),
    variant=st.sampled_from(backends.isas_supported() or ["serial"]),
)
def test_any_shape(format, n, k, tokens, sparsity, dtype, variant):
    dense, weight = make(format, n, k, dtype, sparsity)
    with backends.isa(variant):
        check(torch.randn(tokens, k).to(dtype), dense, weight, torch.randn(n).to(dtype))


@pytest.mark.parametrize("tokens", [1, 3, 30])
@pytest.mark.parametrize("format", FORMATS)
def test_views_and_leading_shapes(isa, format, tokens):
    dense, weight = make(format, 24, 96)
    wide = torch.randn(tokens, 200)
    check(wide[:, 3:99], dense, weight)
    check(torch.randn(96, tokens).t(), dense, weight)
    check(torch.randn(1, 96).expand(tokens, 96), dense, weight)
    check(torch.randn(tokens, 96, 2)[..., 0], dense, weight)
    check(torch.randn(2, tokens, 5, 96), dense, weight)
    check(torch.randn(96), dense, weight)


def test_bias_views_are_honoured(isa):
    dense, weight = make("bitmap", 24, 96)
    check(torch.randn(1, 96), dense, weight, torch.randn(24, 2)[:, 0])
    check(torch.randn(30, 96), dense, weight, torch.randn(1).expand(24))


@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
@pytest.mark.parametrize("format", FORMATS)
def test_nan_in_one_token_stays_there(isa, format, tokens):
    _, weight = make(format, 40, 128)
    x = torch.randn(tokens + 1, 128)
    clean = pyfast.sparse_linear(x, weight)
    x[tokens] = float("nan")
    y = pyfast.sparse_linear(x, weight)
    assert torch.equal(y[:tokens], clean[:tokens]) and torch.isnan(y[tokens]).all()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_nan_in_one_weight_stays_in_its_row(isa, format, tokens):
    """Kernels read a few values of the next rows: they must not reach the sums."""
    dense, _ = make(format, 40, 128)
    column = int(dense[17].nonzero()[0])
    x = torch.randn(tokens, 128)
    clean = pyfast.sparse_linear(x, FORMATS[format].from_dense(dense))
    for bad in (float("nan"), float("inf")):
        dense[17, column] = bad
        y = pyfast.sparse_linear(x, FORMATS[format].from_dense(dense))
        others = torch.arange(40) != 17
        assert torch.equal(y[:, others], clean[:, others]) and not torch.isfinite(y[:, 17]).any()


def test_values_that_end_where_the_buffer_ends(isa):
    """The last tile's values are read by whole vectors: from a copy, for nothing may be read behind the buffer."""
    dense, weight = make("bitmap", 16, 64, sparsity=0.97)
    guard = torch.full((weight.values.numel() + 64,), float("nan"))
    guard[: weight.values.numel()] = weight.values
    tight = BitmapWeight(guard[: weight.values.numel()], weight.bitmaps, weight.offsets, weight.shape)
    check(torch.randn(1, 64), dense, tight)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("tokens", [1, 6, 25])
@pytest.mark.parametrize("format", FORMATS)
def test_gradients(isa, format, tokens, backend):
    dense, weight = make(format, 20, 70)
    x, bias = torch.randn(tokens, 70, requires_grad=True), torch.randn(20, requires_grad=True)
    weight.values.requires_grad_()
    y = pyfast.sparse_linear(x, weight, bias, backend=backend)
    upstream = torch.randn(1).expand_as(y)
    grads = torch.autograd.grad(y, (x, weight.values, bias), upstream)
    full = dense.double().requires_grad_()
    x64, b64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    true = torch.autograd.grad(x64 @ full.T + b64, (x64, full, b64), upstream.double())
    stored = dense != 0 if format == "bitmap" else None
    assert relative_error(grads[0], true[0]) < 1e-5 and relative_error(grads[2], true[2]) < 1e-5
    if stored is not None:
        pattern = BitmapWeight.from_dense(true[1].float(), mask=stored)
        assert relative_error(grads[1], pattern.values) < 1e-5
    else:
        rebuilt = Sparse24Weight(grads[1], weight.metadata, weight.shape).to_dense()
        assert relative_error(rebuilt[dense != 0], true[1][dense != 0]) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_are_only_made_where_wanted(format):
    _, weight = make(format, 8, 64)
    x = torch.randn(2, 64, requires_grad=True)
    pyfast.sparse_linear(x, weight).sum().backward()
    assert x.grad is not None and weight.values.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format, tokens, dtype):
    _, weight = make(format, 20, 70, dtype)
    x = torch.randn(tokens, 70).to(dtype).requires_grad_()
    bias = torch.randn(20).to(dtype).requires_grad_()
    values = weight.values.requires_grad_()
    if format == "2:4":
        torch.library.opcheck(torch.ops.pyfast.sparse24_linear, (x, values, weight.metadata, None, bias, 0, None))
    else:
        arguments = (x, values, weight.bitmaps, weight.offsets, None, bias, 20, 0, None)
        torch.library.opcheck(torch.ops.pyfast.bitmap_linear, arguments)


@pytest.mark.parametrize("format", FORMATS)
def test_float64_is_served_by_the_reference(format):
    dense, weight = make(format, 20, 70, torch.float64)
    x = torch.randn(3, 70, dtype=torch.float64)
    assert relative_error(pyfast.sparse_linear(x, weight), x @ dense.T) < 1e-14


@pytest.mark.parametrize("format", FORMATS)
def test_module_trains_saves_and_compiles(format):
    torch.manual_seed(1)
    linear = torch.nn.Linear(64, 32)
    module = SparseLinear.from_linear(linear, format, 0.5)
    x = torch.randn(16, 64)
    assert relative_error(module(x), x @ module.weight.to_dense().T + linear.bias) < 1e-5
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    before = module.weight.to_dense().detach()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = module.weight.to_dense().detach()
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(after[before == 0], before[before == 0]) and not torch.equal(after, before)
    twin = SparseLinear.from_linear(linear, format, 0.5)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))
    half = module.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert format in repr(module)


X = torch.randn(3, 64)
B = torch.randn(20)
BAD = {
    "weight is dense": (TypeError, "weight", {"weight": torch.ones(20, 64)}),
    "x is a list": (TypeError, "x", {"x": [1.0]}),
    "x of another dtype": (TypeError, "x", {"x": X.double()}),
    "x of another width": (ValueError, "x", {"x": torch.randn(3, 63)}),
    "x is a scalar": (ValueError, "x", {"x": torch.tensor(1.0)}),
    "x elsewhere": (ValueError, "x", {"x": X.to("meta")}),
    "bias of another dtype": (TypeError, "bias", {"bias": B.half()}),
    "bias of another length": (ValueError, "bias", {"bias": torch.randn(64)}),
    "bias as a matrix": (ValueError, "bias", {"bias": torch.randn(1, 20)}),
    "backend unknown": (ValueError, "backend", {"backend": "mkl"}),
    "backend elsewhere": (ValueError, "backend", {"backend": "cuda"}),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("format", FORMATS)
def test_bad_input_names_the_argument(format, case):
    error, name, options = BAD[case]
    arguments = {"x": X, "weight": make(format, 20, 64)[1], "bias": B, **options}
    with pytest.raises(error, match=name):
        pyfast.sparse_linear(arguments["x"], arguments["weight"], arguments["bias"], backend=arguments.get("backend"))


@pytest.mark.parametrize("case", ["bitmaps", "offsets", "values", "metadata"])
def test_the_ops_refuse_tensors_that_do_not_fit(case):
    _, bitmap = make("bitmap", 20, 64)
    _, two_four = make("2:4", 20, 64)
    tensors = bitmap.tensors()
    with pytest.raises(RuntimeError, match=case):
        if case == "metadata":
            torch.ops.pyfast.sparse24_linear(X, two_four.values, two_four.metadata[:, :1], None, None, 0, None)
        else:
            tensors[case] = tensors[case][:-1]
            torch.ops.pyfast.bitmap_linear(X, *tensors.values(), None, None, 20, 0, None)
