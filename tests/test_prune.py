"""Choosing the mask of one matrix: counts, ties, scopes; Wanda and SparseGPT against their papers' equations."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyfast.nn import SparseLinear
from pyfast.reference import sparsegpt as sparsegpt_truth
from pyfast.reference import wanda as wanda_truth
from pyfast.sparse import choose_mask, sparsegpt
from pyfast.sparse.masks import Threshold, largest_of_all, largest_of_each_row, parse_pattern

PATTERNS = ["unstructured", "2:4", "4:8", "1:4", "3:5"]


def correlated(tokens, k, seed=0, rank=6):
    """Inputs [tokens, k] whose features depend on each other, with a few that are much larger."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
    x = mixed + 0.3 * torch.randn(tokens, k, generator=generator)
    x[:, torch.randperm(k, generator=generator)[: max(1, k // 12)]] *= 12.0
    return x


def hessian_of(x):
    return 2.0 * x.T @ x / len(x)


def output_error(weight, pruned, x):
    return relative_error(x.double() @ pruned.double().T, x.double() @ weight.double().T)


def groups_hold(mask, n, m):
    rows, k = mask.shape
    whole = k // m * m
    return bool((mask[:, :whole].reshape(rows, -1, m).sum(-1) == n).all()) and bool(
        (mask[:, whole:].sum(-1) == min(n, k - whole)).all()
    )


# --- thresholds -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    sparsity=st.floats(0.0, 0.999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    values=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_counts_are_exact_and_the_first_of_equals_stays(shape, sparsity, dtype, values, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randint(0, values, shape, generator=generator) / 7).to(dtype)
    for mask, lines in ((largest_of_each_row(scores, sparsity), scores), (largest_of_all(scores, sparsity), None)):
        ranked = scores.flatten().unsqueeze(0) if lines is None else lines
        kept = ranked.shape[1] - round(sparsity * ranked.shape[1])
        order = ranked.argsort(dim=1, descending=True, stable=True)[:, :kept]
        truth = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, order, True)
        assert torch.equal(mask.reshape(truth.shape), truth)


@pytest.mark.parametrize("removed", [0, 1, 57, 150, 299, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_over_several_matrices_is_that_of_all_of_them(removed, dtype):
    matrices = [torch.randint(0, 30, (10, k)).to(dtype) for k in (10, 3, 17)]
    threshold = Threshold(lambda: matrices, removed, dtype)
    together = torch.cat([threshold.mask(matrix).flatten() for matrix in matrices])
    flat = torch.cat([matrix.flatten() for matrix in matrices])
    truth = torch.zeros(300, dtype=torch.bool)
    truth[flat.argsort(descending=True, stable=True)[: 300 - removed]] = True
    assert torch.equal(together, truth)


def test_float64_scores_that_agree_in_float32_are_told_apart():
    scores = 1.0 + torch.arange(8, dtype=torch.float64).reshape(2, 4) * 1e-12
    assert largest_of_all(scores, 0.5).tolist() == [[False] * 4, [True] * 4]


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["magnitude", "gradient", "taylor", "wanda"])
def test_masks_follow_their_scores(method, pattern):
    weight, gradient, norms = torch.randn(12, 43), torch.randn(12, 43), torch.rand(43)
    needs = {"gradient": {"gradient": gradient}, "taylor": {"gradient": gradient}, "wanda": {"norms": norms}}
    sparsity = 0.5 if pattern == "unstructured" else None
    mask = choose_mask(weight, method, sparsity, pattern, **needs.get(method, {}))
    scores = {
        "magnitude": weight.abs(),
        "gradient": gradient.abs(),
        "taylor": (weight * gradient).abs(),
        "wanda": weight.abs() * norms,
    }[method]
    nm = parse_pattern(pattern)
    if nm is None and method == "wanda":
        assert (mask.sum(1) == 43 - round(0.5 * 43)).all()
    elif nm is None:
        assert int(mask.sum()) == mask.numel() - round(0.5 * mask.numel())
        assert scores[mask].min() >= scores[~mask].max()
    else:
        assert groups_hold(mask, *nm)
        assert bool(torch.where(mask, scores, 0).sum() > torch.where(~mask, scores, 0).sum() * nm[0] / nm[1])


@pytest.mark.parametrize(("method", "rows"), [("magnitude", False), ("wanda", True)])
def test_scope_row_and_layer(method, rows):
    weight = torch.randn(16, 40) * torch.logspace(-2, 2, 16).unsqueeze(1)
    needs = {"norms": torch.ones(40)} if method == "wanda" else {}
    default = choose_mask(weight, method, 0.7, **needs)
    by_row = choose_mask(weight, method, 0.7, scope="row", **needs)
    by_layer = choose_mask(weight, method, 0.7, scope="layer", **needs)
    assert torch.equal(default, by_row if rows else by_layer) and not torch.equal(by_row, by_layer)
    assert (by_row.sum(1) == 40 - round(0.7 * 40)).all() and int(by_layer.sum()) == 640 - round(0.7 * 640)


# --- the papers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("rows", "k", "seed"), [(7, 40, 0), (16, 64, 1), (5, 33, 2)])
def test_wanda_is_the_papers(rows, k, seed, pattern):
    torch.manual_seed(seed)
    weight, x = torch.randn(rows, k), correlated(200, k, seed)
    sparsity = 0.6 if pattern == "unstructured" else None
    mask = choose_mask(weight, "wanda", sparsity, pattern, norms=x.norm(dim=0))
    assert torch.equal(mask, wanda_truth.wanda(weight, x, 0.6, parse_pattern(pattern)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("rows", "k", "block"), [(7, 40, 16), (16, 64, 128), (6, 33, 10), (3, 12, 1)])
def test_sparsegpt_is_the_papers(rows, k, block, pattern, dtype):
    """Blocked updates with a Cholesky factor against one column at a time with the inverse Hessian, float64."""
    torch.manual_seed(k)
    weight, x = torch.randn(rows, k), correlated(300, k, k)
    x[:, 5] = 0.0  # a feature that no token uses
    hessian, nm = hessian_of(x), parse_pattern(pattern)
    sparsity = 0.6 if nm is None else None
    new, mask = sparsegpt(weight.to(dtype), hessian.to(dtype), sparsity, pattern, block_size=block)
    truth, truth_mask = sparsegpt_truth.sparsegpt(weight, hessian, 0.6, nm, block, 0.01)
    assert torch.equal(mask, truth_mask)
    assert relative_error(new, truth) < (1e-10 if dtype == torch.float64 else 2e-4)
    assert (new[~mask] == 0).all() and not bool(torch.signbit(new[~mask]).any())
    if nm is None:
        assert int((~mask).sum()) == round(0.6 * weight.numel())
    else:
        assert groups_hold(mask, *nm)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("unstructured", 0.5), ("unstructured", 0.7)])
def test_sparsegpt_loses_less_of_the_output_than_magnitude_and_wanda(pattern, sparsity):
    weight, x = torch.randn(48, 96), correlated(500, 96)
    new, _ = sparsegpt(weight, hessian_of(x), sparsity, pattern)
    errors = {"sparsegpt": output_error(weight, new, x)}
    for method, needs in (("magnitude", {}), ("wanda", {"norms": x.norm(dim=0)})):
        errors[method] = output_error(weight, weight * choose_mask(weight, method, sparsity, pattern, **needs), x)
    assert errors["sparsegpt"] < 0.7 * errors["wanda"] < 0.7 * errors["magnitude"]


def test_the_kept_weights_of_a_sparsegpt_mask_are_near_the_best_for_it():
    """Least squares at the same mask is the floor; the update that goes left to right stays close to it."""
    weight, x = torch.randn(20, 48).double(), correlated(400, 48).double()
    new, mask = sparsegpt(weight, hessian_of(x), 0.5, dampening=1e-6)
    best = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = mask[row]
        best[row, kept] = torch.linalg.lstsq(x[:, kept], (x @ weight[row]).unsqueeze(1)).solution.squeeze(1)
    floor, plain = output_error(weight, best, x), output_error(weight, weight * mask, x)
    assert floor <= output_error(weight, new, x) < floor + 0.4 * (plain - floor)


def test_sparsegpt_survives_fewer_tokens_than_features_and_no_tokens_at_all():
    weight = torch.randn(8, 64)
    new, mask = sparsegpt(weight, hessian_of(correlated(5, 64)), 0.5)
    assert bool(new.isfinite().all()) and int(mask.sum()) == 256
    new, _ = sparsegpt(weight, torch.zeros(64, 64), 0.5)
    assert not bool(new.any())  # features that nothing uses need no weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparsegpt_in_low_precision_rounds_only_at_the_end(dtype):
    weight, x = torch.randn(24, 64).to(dtype), correlated(300, 64)
    new, mask = sparsegpt(weight, hessian_of(x), None, "2:4")
    wide, wide_mask = sparsegpt(weight.float(), hessian_of(x), None, "2:4")
    assert new.dtype == dtype and torch.equal(mask, wide_mask) and torch.equal(new, wide.to(dtype))


# --- refusals ---------------------------------------------------------------------------------------------------------

W, H = torch.ones(4, 8), torch.eye(8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((W, "best"), {}, ValueError, "method: got 'best', accepted for a mask alone"),
        ((W, "sparsegpt"), {}, ValueError, "method: got 'sparsegpt'"),
        ((W, "magnitude"), {}, ValueError, "sparsity: got None"),
        ((W, "magnitude", 1.0), {}, ValueError, "sparsity: got 1.0"),
        ((W, "magnitude", math.nan), {}, ValueError, "sparsity: got nan"),
        ((W, "magnitude", "half"), {}, TypeError, "sparsity: got str"),
        ((W, "magnitude", 0.6, "2:4"), {}, ValueError, "sparsity: got 0.6, accepted for the pattern 2:4: 0.5"),
        ((W, "magnitude", None, "4:2"), {}, ValueError, "pattern: got '4:2'"),
        ((W, "magnitude", None, "2:64"), {}, ValueError, "pattern: got '2:64'"),
        ((W, "magnitude", None, "half"), {}, ValueError, "pattern: got 'half'"),
        ((W, "magnitude", None, 24), {}, TypeError, "pattern: got int"),
        ((W, "magnitude", 0.5), {"scope": "model"}, ValueError, "scope: got 'model'"),
        ((W, "magnitude", 0.5), {"scope": "global"}, ValueError, "scope: got 'global', accepted for one matrix"),
        ((W, "magnitude", 0.5, "2:4"), {"scope": "row"}, ValueError, "scope: got 'row', accepted: None"),
        ((W, "wanda", 0.5), {"scope": "global", "norms": H[0]}, ValueError, "scope: got 'global', accepted for wanda"),
        ((W, "wanda", 0.5), {}, TypeError, "norms: got None"),
        ((W, "wanda", 0.5), {"norms": torch.ones(4)}, ValueError, r"norms: got shape \[4\], accepted: \[8\]"),
        ((W, "magnitude", 0.5), {"norms": H[0]}, TypeError, "norms: got a tensor, accepted for magnitude: None"),
        ((W, "taylor", 0.5), {"gradient": H}, ValueError, r"gradient: got shape \[8, 8\]"),
        ((W.int(), "magnitude", 0.5), {}, TypeError, "weight: got torch.int32"),
        ((W[0], "magnitude", 0.5), {}, ValueError, r"weight: got shape \[8\]"),
        ((W * math.nan, "magnitude", 0.5), {}, ValueError, "weight: its scores hold NaN"),
    ],
)
def test_choose_mask_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        choose_mask(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((W, torch.ones(4, 4), 0.5), {}, ValueError, r"hessian: got shape \[4, 4\]"),
        ((W, H.int(), 0.5), {}, TypeError, "hessian: got torch.int32"),
        ((W, H * math.inf, 0.5), {}, ValueError, "hessian: holds NaN or infinity"),
        ((W * math.nan, H, 0.5), {}, ValueError, "weight: holds NaN or infinity"),
        ((W, -H, 0.5), {}, ValueError, "hessian: not positive definite"),
        ((W, H, 0.5), {"dampening": 0.0}, ValueError, "dampening: got 0.0"),
        ((W, H, 0.5), {"block_size": 0}, ValueError, "block_size: got 0"),
        ((W, H, 0.5), {"block_size": 1.5}, TypeError, "block_size: got float"),
    ],
)
def test_sparsegpt_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sparsegpt(*arguments, **options)


# --- training at a fixed mask -----------------------------------------------------------------------------------------


class Masked(nn.Module):
    """The dense twin: the mask is part of the formula, so that autograd gives the removed weights no gradient."""

    def __init__(self, linear, mask):
        super().__init__()
        self.weight = nn.Parameter(torch.where(mask, linear.weight.detach(), 0.0))
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.register_buffer("mask", mask)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


@pytest.mark.parametrize("format", ["2:4", "bitmap"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ],
    ids=["SGD", "AdamW"],
)
def test_a_sparse_layer_trains_as_a_dense_one_with_a_mask(format, optimizer):
    """Two layers and a nonlinearity, 25 steps: weights, biases and losses agree all along."""
    x, target = torch.randn(64, 24), torch.randn(64, 8)
    dense = [nn.Linear(24, 32), nn.Linear(32, 8)]
    pattern, sparsity = ("2:4", None) if format == "2:4" else ("unstructured", 0.6)
    masks = [choose_mask(layer.weight.detach(), "magnitude", sparsity, pattern) for layer in dense]
    sparse = nn.Sequential(
        SparseLinear.from_linear(dense[0], format, mask=masks[0]),
        nn.GELU(),
        SparseLinear.from_linear(dense[1], format, mask=masks[1]),
    )
    twin = nn.Sequential(Masked(dense[0], masks[0]), nn.GELU(), Masked(dense[1], masks[1]))
    losses = {}
    for model in (sparse, twin):
        steps = optimizer(model.parameters())
        losses[model] = []
        for _ in range(25):
            loss = (model(x) - target).square().mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses[model].append(float(loss.detach()))
    assert losses[sparse][-1] < 0.9 * losses[sparse][0]
    assert losses[sparse] == pytest.approx(losses[twin], rel=1e-4)
    for mine, theirs in ((sparse[0], twin[0]), (sparse[2], twin[2])):
        assert relative_error(mine.weight.to_dense(), theirs.weight.detach() * theirs.mask) < 1e-4
        assert relative_error(mine.bias, theirs.bias) < 1e-4
