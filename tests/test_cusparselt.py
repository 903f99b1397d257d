"""cuSPARSELt's layout of a 2:4 weight: refusals, what is handed to torch, and with a GPU the product."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from sparse_cases import weight_24

from pyfast import Sparse24Weight
from pyfast.sparse import cusparselt
from pyfast.sparse.cusparselt import CusparseltLayout, available, bucket

N, K = 48, 96


def weight(n=N, k=K, dtype=torch.bfloat16, device="cpu"):
    return Sparse24Weight.from_dense(weight_24(n, k, dtype).to(device))


def test_refusals(monkeypatch):
    with pytest.raises(RuntimeError, match="no cuSPARSELt on cpu, accepted: a CUDA device"):
        CusparseltLayout.of(weight())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available() == (False, "no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.delattr(torch._C, "_cusparselt", raising=False)
    assert available() == (False, f"torch {torch.__version__} is built without cuSPARSELt")
    monkeypatch.setattr(torch._C, "_cusparselt", object(), raising=False)
    assert available() == (False, "compute capability 7.5, cuSPARSELt needs 8.0")


@pytest.mark.parametrize(("n", "k"), [(40, 96), (48, 100)])
def test_shapes_outside_the_units(n, k):
    with pytest.raises(ValueError, match=rf"got shape \[{n}, {k}\], cuSPARSELt accepts multiples of 16"):
        cusparselt._compressed(weight(n, k))


def test_other_dtypes():
    with pytest.raises(ValueError, match="float32"):
        cusparselt._compressed(weight(dtype=torch.float32))


@pytest.fixture
def searched(monkeypatch):
    """torch's calls, played by dense products; the list gets the tokens of each search."""
    searches = []

    def mm(compressed, columns, bias, alg_id, split_k, split_k_mode):
        assert columns.shape[1] % 8 == 0 and columns.t().is_contiguous()
        assert (alg_id, split_k, split_k_mode) in ((3, 2, 1), cusparselt._UNSEARCHED)
        product = compressed @ columns
        return product if bias is None else product + bias[:, None]

    def search(compressed, columns, bias):
        searches.append(columns.shape[1])
        return 3, 2, 1

    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", mm)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cusparselt, "_search", search)
    return searches


@pytest.mark.parametrize("tokens", [0, 1, 8, 13])
def test_tokens_are_padded(searched, tokens):
    stored = weight()
    layout, x, bias = CusparseltLayout(cusparselt._compressed(stored), (N, K)), torch.randn(tokens, K), torch.randn(N)
    x, bias = x.bfloat16(), bias.bfloat16()
    for given in (None, bias):
        y = layout.linear(x, given)
        assert y.shape == (tokens, N)
        if tokens:
            truth = x.double() @ stored.to_dense().double().T + (0 if given is None else given.double())
            assert relative_error(y, truth) < 1e-2
    assert layout.nbytes == N * K * 2


def test_one_search_a_bucket_and_none_in_a_capture(searched, monkeypatch):
    layout = CusparseltLayout(cusparselt._compressed(weight()), (N, K))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layout.linear(torch.randn(100, K).bfloat16())
    assert searched == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for tokens in (100, 128, 70, 129):
        layout.linear(torch.randn(tokens, K).bfloat16())
    assert searched == [104, 136]
    assert [bucket(tokens) for tokens in (1, 8, 9, 128, 129)] == [8, 8, 16, 128, 256]


@pytest.mark.gpu
@pytest.mark.skipif(not available()[0], reason=available()[1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 16, 100, 512])
def test_on_the_gpu(tokens, dtype):
    stored = weight(1024, 512, dtype, "cuda")
    layout = CusparseltLayout.of(stored)
    x, bias = torch.randn(tokens, 512, device="cuda", dtype=dtype), torch.randn(1024, device="cuda", dtype=dtype)
    for given in (None, bias):
        truth = x.double() @ stored.to_dense().double().T + (0 if given is None else given.double())
        assert relative_error(layout.linear(x, given), truth) < (1e-2 if dtype == torch.bfloat16 else 1e-3)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        replayed = layout.linear(x, bias)
    captured.replay()
    assert relative_error(replayed, truth) < (1e-2 if dtype == torch.bfloat16 else 1e-3)
