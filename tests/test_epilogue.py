"""The epilogue of many tokens, by every ISA: what the sums become beside float64, on the way of the lists and on that
of decompressed panels. Weights are the identity, so that the sums are the activations themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from pyfast import BitmapWeight, sparse_linear
from pyfast.reference.epilogue import ACTIVATIONS
from pyfast.sparse.layouts import IndexedLayout

N, TOKENS = 37, 40
FORMULAS = {
    "none": lambda v: v,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
}
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def by_lists(x, bias, activation, mul):
    layout = IndexedLayout.of(BitmapWeight.from_dense(torch.eye(N, dtype=x.dtype)))
    return layout.linear(x, bias, ACTIVATIONS.index(activation), mul)


def by_panels(x, bias, activation, mul):
    weight = BitmapWeight.from_dense(torch.eye(N, dtype=x.dtype))
    name = None if activation == "none" else activation
    return sparse_linear(x, weight, bias, activation=name, mul=mul, backend="native")


@pytest.mark.parametrize("way", [by_lists, by_panels])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("extras", [(), ("bias",), ("mul",), ("bias", "mul")], ids="-".join)
def test_outputs(isa, way, dtype, activation, extras):
    x = (torch.randn(TOKENS, N) * 9).to(dtype)
    bias = torch.randn(N).to(dtype) if "bias" in extras else None
    mul = torch.randn(TOKENS, 3 * N)[:, N : 2 * N].to(dtype) if "mul" in extras else None
    sums = x.double() if bias is None else x.double() + bias.double()
    truth = FORMULAS[activation](sums) * (1.0 if mul is None else mul.double())
    got = way(x, bias, activation, mul)
    # the library behind the panels rounds to 16 bits before the epilogue does
    assert relative_error(got, truth) < ROUNDING[dtype] * (1 if way is by_lists or dtype == torch.float32 else 3)


@pytest.mark.parametrize("activation", FORMULAS)
def test_far_away_and_special_sums(isa, activation):
    special = torch.tensor([0.0, -0.0, 1e-40, 88.0, -88.0, 300.0, -300.0, 3e38, -3e38, float("inf"), float("nan")])
    x = torch.zeros(TOKENS, N)
    x[:, : len(special)] = special
    got = by_lists(x, None, activation, None)[:, : len(special)]
    wanted = FORMULAS[activation](special.double()).float().expand_as(got)
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-37, equal_nan=True)
    assert not by_lists(x, None, activation, None)[:, len(special) :].any()
