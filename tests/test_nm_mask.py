"""nm_mask: every kernel against a sort of every group, ties and NaN included, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfast import _host, backends
from pyfast.ops.nm_mask import nm_mask
from pyfast.reference import nm_mask as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scores_with_ties(rows, k, dtype, seed=0):
    """Few different values, so that most groups hold ties; both zeros and both infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-math.inf, -2.0, -0.0, 0.0, 0.5, 1.0, 3.0, math.inf])
    return values[torch.randint(0, len(values), (rows, k), generator=generator)].to(dtype)


def by_hand(scores, n, m):
    """The definition, element by element: fewer than n of the group rank before it."""
    kept = []
    for row in scores.double().tolist():
        line = []
        for start in range(0, len(row), m):
            group = [-math.inf if value != value else value for value in row[start : start + m]]
            for i, own in enumerate(group):
                before = sum(v > own for v in group) + sum(v == own for v in group[:i])
                line.append(before < n)
        kept.append(line)
    return torch.tensor(kept, dtype=torch.bool).reshape(scores.shape)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    k=st.integers(1, 90),
    pattern=st.integers(1, 32).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    isa=st.sampled_from(backends.isas_supported() or ["none"]),
)
def test_every_isa_is_the_definition(rows, k, pattern, dtype, seed, isa):
    scores = scores_with_ties(rows, k, dtype, seed)
    scores[torch.rand(rows, k) < 0.05] = math.nan
    truth = by_hand(scores, *pattern)
    assert torch.equal(reference.nm_mask(scores, *pattern), truth)
    if isa != "none":
        with backends.isa(isa):
            assert torch.equal(nm_mask(scores, *pattern, backend="native"), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5), (8, 16), (5, 11), (8, 32), (16, 17)])
def test_isas_agree_on_a_matrix_that_threads_share(isa, dtype, n, m):
    scores = torch.randn(700, 523).to(dtype)
    mask = nm_mask(scores, n, m)
    assert torch.equal(mask, reference.nm_mask(scores, n, m))
    length = scores.shape[1] // m * m
    counts = mask[:, :length].reshape(700, -1, m).sum(-1)
    assert (counts == n).all() and (mask[:, length:].sum(-1) == min(n, scores.shape[1] - length)).all()


def test_ties_go_to_the_lower_column(isa):
    assert nm_mask(torch.ones(1, 6), 2, 4).tolist() == [[True, True, False, False, True, True]]
    assert nm_mask(torch.tensor([[0.0, -0.0, 0.0]]), 1, 3).tolist() == [[True, False, False]]
    nan = math.nan
    assert nm_mask(torch.tensor([[nan, -1.0, nan, -math.inf]]), 2, 4).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (7,), (2, 3, 10), (0,)])
def test_shapes(isa, shape):
    scores = torch.randn(shape)
    mask = nm_mask(scores, 2, 4)
    assert mask.shape == scores.shape and mask.dtype == torch.bool
    flat = scores.reshape(-1, shape[-1]) if scores.numel() else scores.new_zeros(0, 1)
    assert torch.equal(mask.reshape(flat.shape), reference.nm_mask(flat, 2, 4))


def test_views(isa):
    wide = torch.randn(60, 90)
    for view in (wide.T, wide[:, 3:70], wide[::2], wide[:, ::3], wide[:1].expand(9, 90)):
        assert torch.equal(nm_mask(view, 2, 4), reference.nm_mask(view, 2, 4))


def test_float64_and_backends():
    scores = torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(nm_mask(scores, 1, 3), by_hand(scores, 1, 3))
    with pytest.raises(ValueError, match="backend: got 'native'"):
        nm_mask(scores, 1, 3, backend="native")
    assert torch.equal(nm_mask(scores.float(), 1, 3, backend="reference"), by_hand(scores.float(), 1, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k"), [(3, 37), (0, 8), (2, 0)])
def test_opcheck(dtype, rows, k):
    torch.library.opcheck(torch.ops.pyfast.nm_mask.default, (torch.randn(rows, k).to(dtype), 2, 4))


def test_compiles_whole():
    compiled = torch.compile(lambda x: nm_mask(x, 2, 4).sum(), fullgraph=True, backend="eager", dynamic=True)
    assert int(compiled(torch.randn(3, 8))) == 12 and int(compiled(torch.randn(5, 16))) == 40


@pytest.mark.parametrize("variant", _host.variants())
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 7), (9, 24)])
def test_host_variants_need_no_torch(variant, n, m):
    scores = np.random.default_rng(0).standard_normal((5, 61)).astype(np.float32)
    mask = _host.nm_mask(scores, n, m, variant=variant)
    assert mask.dtype == np.bool_
    assert np.array_equal(mask, reference.nm_mask(torch.from_numpy(scores), n, m).numpy())
    with pytest.raises(ValueError, match="n, m: accepted"):
        _host.nm_mask(scores, 5, 4, variant=variant)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], 1, 1), TypeError, "scores: got list"),
        ((torch.ones(2, 4, dtype=torch.int64), 2, 4), TypeError, "scores: got dtype torch.int64"),
        ((torch.tensor(1.0), 1, 1), ValueError, r"scores: got shape \[\]"),
        ((torch.ones(2, 4), 2.0, 4), TypeError, "n: got float"),
        ((torch.ones(2, 4), True, 4), TypeError, "n: got bool"),
        ((torch.ones(2, 4), 5, 4), ValueError, "n: got 5, accepted: 1 to 4"),
        ((torch.ones(2, 4), 0, 4), ValueError, "n: got 0, accepted: 1 to 4"),
        ((torch.ones(2, 4), 2, 33), ValueError, "m: got 33, accepted: 1 to 32"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        nm_mask(*arguments)


@pytest.mark.parametrize(
    ("scores", "n", "m"), [(torch.ones(4), 2, 4), (torch.ones(1, 4), 0, 4), (torch.ones(1, 4).double(), 2, 4)]
)
def test_the_op_itself_refuses(scores, n, m):
    with pytest.raises(RuntimeError, match=r"scores|n, m"):
        torch.ops.pyfast.nm_mask(scores, n, m)
