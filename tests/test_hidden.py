"""Hidden states: every kind against float64, masks, projections, maps between depths."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyfast
from pyfast.hidden import KINDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


def formula(student, teacher, kind):
    """Values of each token in float64, as the definitions write them."""
    s, t = student.double(), teacher.double()
    if kind == "mse":
        return ((s - t) ** 2).mean(-1)
    if kind == "normalised_mse":
        return ((s - t) ** 2).sum(-1) / (t**2).sum(-1)
    return 1 - nn.functional.cosine_similarity(s, t, dim=-1, eps=1e-300)


def value_and_grad(student, teacher, *args, **options):
    student = student.detach().requires_grad_()
    loss = pyfast.hidden_loss(student, teacher, *args, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), grad


def truth(student, teacher, kind):
    student = student.detach().double().requires_grad_()
    rows = formula(student, teacher, kind)
    return rows.detach(), torch.autograd.grad(rows.sum(), student)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_float64(kind, dtype):
    s, t = torch.randn(2, 5, 48, dtype=dtype), torch.randn(2, 5, 48, dtype=dtype)
    rows, grad = value_and_grad(s, t, kind, reduction="none")
    true_rows, true_grad = truth(s, t, kind)
    assert rows.dtype == torch.float32 and rows.shape == (2, 5) and grad.dtype == dtype
    assert relative_error(rows, true_rows) < 1e-6
    assert relative_error(grad, true_grad) < (2e-6 if dtype == torch.float32 else 4e-3)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 4),
    width=st.integers(2, 70),
    size=st.sampled_from([1e-12, 1, 1e12]),
)
def test_any_shape_and_size(kind, rows, width, size):
    s, t = size * torch.randn(rows, width), size * torch.randn(rows, width)
    got, grad = value_and_grad(s, t, kind, reduction="none", eps=1e-30)
    true_rows, true_grad = truth(s, t, kind)
    # cosine is ½‖d‖², d the difference of rows of length 1 whose numbers are rounded, by 2^-23 together at most; the
    # gradient is the part of d, up to 2 long and rounded six times, that lies across the student: the angle's sine.
    # Only where rows are nearly parallel or opposite is that more than the bounds of the other kinds.
    value_error, grad_error = 2e-6, 1e-5
    if kind == "cosine":
        sine = float((true_rows * (2 - true_rows)).min().clamp(min=0).sqrt())
        value_error, grad_error = max(value_error, 2**-21 / sine), max(grad_error, 2**-20 / sine)
    assert relative_error(got, true_rows) < value_error and relative_error(grad, true_grad) < grad_error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apart", [1e-2, 1e-4])
def test_keeps_its_digits_where_both_almost_agree(kind, apart):
    t = torch.randn(4, 256)
    s = t + apart * torch.randn(4, 256)
    assert relative_error(pyfast.hidden_loss(s, t, kind, reduction="none"), formula(s, t, kind)) < 1e-3 * 1e-4 / apart


@pytest.mark.parametrize("kind", KINDS)
def test_identical_states_give_zero(kind):
    s = torch.randn(3, 16)
    loss, grad = value_and_grad(s, s.clone(), kind)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(s))


@pytest.mark.parametrize("kind", KINDS)
def test_reductions_and_num_items(kind):
    s, t = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    rows = formula(s, t, kind)
    assert relative_error(pyfast.hidden_loss(s, t, kind), rows.mean()) < 1e-6
    assert relative_error(pyfast.hidden_loss(s, t, kind, reduction="sum", mask=mask), rows[mask].sum()) < 1e-6
    assert relative_error(pyfast.hidden_loss(s, t, kind, mask=mask), rows[mask].mean()) < 1e-6
    none = pyfast.hidden_loss(s, t, kind, mask=mask, reduction="none")
    assert relative_error(none, torch.where(mask, rows, 0.0)) < 1e-6
    for count in (20, torch.tensor(20)):
        assert relative_error(pyfast.hidden_loss(s, t, kind, mask=mask, num_items=count), rows[mask].sum() / 20) < 1e-6


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_do_not_count_may_hold_anything(kind, poison):
    s, t = torch.randn(4, 8), torch.randn(4, 8)
    mask = torch.tensor([True, False, True, False])
    expected, expected_grad = value_and_grad(s, t, kind, mask=mask)
    s[1], t[3] = poison, poison
    projection = nn.Linear(8, 8)
    loss, grad = value_and_grad(s, t, kind, mask=mask)
    assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)
    assert torch.equal(grad[~mask], torch.zeros(2, 8))
    pyfast.hidden_loss(s, t, kind, mask=mask, projection=projection).backward()
    assert projection.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_token(kind):
    s, t = torch.randn(3, 8), torch.randn(3, 8)
    s[1, 2] = NAN
    rows, grad = value_and_grad(s, t, kind, reduction="none")
    assert rows[1].isnan() and rows[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_counts(kind):
    s = torch.full((3, 8), NAN).requires_grad_()
    loss = pyfast.hidden_loss(s, torch.randn(3, 8), kind, mask=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and torch.equal(s.grad, torch.zeros(3, 8))
    empty = torch.randn(0, 8).requires_grad_()
    pyfast.hidden_loss(empty, torch.randn(0, 8), kind).backward()
    assert empty.grad.shape == (0, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_vectors(kind):
    s, t = torch.zeros(2, 4), torch.randn(2, 4)
    t[1] = 0
    rows, grad = value_and_grad(s, t, kind, reduction="none")
    expected = {"mse": [t[0].square().mean(), 0.0], "cosine": [1.0, 1.0], "normalised_mse": [1.0, 0.0]}[kind]
    assert torch.allclose(rows, torch.tensor(expected)) and grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    s, t = torch.randn(3, 5, dtype=torch.float64).requires_grad_(), torch.randn(3, 4, dtype=torch.float64)
    weight = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda x, w: pyfast.hidden_loss(x, t, kind, mask=mask, projection=w), (s, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_projections(dtype):
    s, t = torch.randn(6, 8, dtype=dtype), torch.randn(6, 12, dtype=dtype)
    linear = nn.Linear(8, 12, bias=False)
    expected = formula(nn.functional.linear(s.float(), linear.weight), t, "mse").mean()
    for projection in (linear, linear.weight, nn.Sequential(linear)):
        linear.zero_grad()
        loss = pyfast.hidden_loss(s, t, projection=projection)
        loss.backward()
        assert relative_error(loss, expected) < 1e-6 and linear.weight.grad.norm() > 0


def test_no_gradient_flows_to_the_teacher():
    s, t = torch.randn(3, 8).requires_grad_(), torch.randn(3, 8).requires_grad_()
    pyfast.hidden_loss(s, t, "cosine").backward()
    assert t.grad is None and s.grad is not None


def test_views():
    s, t = torch.randn(8, 6).t(), torch.randn(1, 8).expand(6, 8)
    assert relative_error(pyfast.hidden_loss(s, t), formula(s, t, "mse").mean()) < 1e-6


def test_compiles_in_one_graph():
    s, t, mask = torch.randn(4, 8).requires_grad_(), torch.randn(4, 8), torch.tensor([True, False, True, True])
    compiled = torch.compile(pyfast.hidden_loss, fullgraph=True, backend="aot_eager")
    for kind in KINDS:
        assert relative_error(compiled(s, t, kind, mask=mask), pyfast.hidden_loss(s, t, kind, mask=mask)) < 1e-6


def test_layers_are_paired_and_averaged():
    s = [torch.randn(2, 5, 8) for _ in range(4)]
    t = [torch.randn(2, 5, 8) for _ in range(7)]

    def mean(pairs):
        return torch.stack([pyfast.hidden_loss(s[i], t[j], "cosine") for i, j in pairs]).mean()

    assert torch.equal(pyfast.hidden_states_loss(s, t, kind="cosine"), mean([(1, 2), (2, 4), (3, 6)]))
    assert torch.equal(pyfast.hidden_states_loss(s, t, "last", "cosine"), mean([(1, 4), (2, 5), (3, 6)]))
    assert torch.equal(pyfast.hidden_states_loss(s, t, [(0, 5), (-1, -1)], "cosine"), mean([(1, 6), (3, 6)]))
    both = pyfast.hidden_states_loss(s, t, [(0, 0)], "cosine", embeddings=True)
    assert torch.equal(both, mean([(0, 0), (1, 1)]))
    assert pyfast.hidden_states_loss(s, t, reduction="none").shape == (2, 5)


def test_a_projection_for_each_pair():
    s = [torch.randn(3, 4) for _ in range(3)]
    t = [torch.randn(3, 6) for _ in range(3)]
    projections = nn.ModuleList([nn.Linear(4, 6, bias=False) for _ in range(2)])
    expected = sum(pyfast.hidden_loss(s[i], t[i], projection=projections[i - 1]) for i in (1, 2)) / 2
    assert relative_error(pyfast.hidden_states_loss(s, t, projection=projections), expected) < 1e-6
    assert relative_error(pyfast.hidden_states_loss(s, t, projection=[p.weight for p in projections]), expected) < 1e-6
    with pytest.raises(ValueError, match="projection: got 2"):
        pyfast.hidden_states_loss(s, t, projection=projections, embeddings=True)


@settings(max_examples=100, deadline=None)
@given(student=st.integers(1, 60), more=st.integers(0, 60))
def test_uniform_map(student, more):
    teacher = student + more
    pairs = pyfast.layer_map(student, teacher)
    assert [i for i, _ in pairs] == list(range(student))
    assert pairs[-1] == (student - 1, teacher - 1)
    chosen = [j for _, j in pairs]
    assert chosen == sorted(set(chosen)) and chosen[0] >= 0
    assert all(j == math.floor((i + 1) * teacher / student + 0.5 + 1e-9) - 1 for i, j in pairs)


def test_other_maps():
    assert pyfast.layer_map(3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert pyfast.layer_map(3, 6, "last") == [(0, 3), (1, 4), (2, 5)]
    assert pyfast.layer_map(3, 6, "first") == [(0, 0), (1, 1), (2, 2)]


H = torch.randn(3, 8)
BAD = {
    "no tensor": (TypeError, "student", ([1.0], H), {}),
    "integers": (TypeError, "teacher", (H, H.long()), {}),
    "shapes": (ValueError, "teacher", (H, torch.randn(4, 8)), {}),
    "widths": (ValueError, r"nn.Linear\(8, 9", (H, torch.randn(3, 9)), {}),
    "device": (ValueError, "teacher", (H, H.to("meta")), {}),
    "kind": (ValueError, "kind", (H, H, "l1"), {}),
    "mask": (TypeError, "mask", (H, H), {"mask": torch.ones(3)}),
    "mask shape": (ValueError, "mask", (H, H), {"mask": torch.ones(4, dtype=torch.bool)}),
    "eps": (ValueError, "eps", (H, H), {"eps": 0.0}),
    "reduction": (ValueError, "reduction", (H, H), {"reduction": "batchmean"}),
    "num_items": (ValueError, "num_items", (H, H), {"num_items": 3, "reduction": "sum"}),
    "projection type": (TypeError, "projection", (H, H), {"projection": "linear"}),
    "projection shape": (ValueError, "projection", (H, H), {"projection": torch.randn(8, 9)}),
    "projection dtype": (TypeError, "projection", (H, H), {"projection": torch.ones(8, 8).long()}),
    "projection width": (ValueError, "projection", (H, H), {"projection": nn.Linear(8, 9)}),
    "projection gives": (ValueError, "projection", (H, H), {"projection": nn.Sequential(nn.Linear(8, 9))}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    error, name, arguments, options = BAD[case]
    with pytest.raises(error, match=name):
        pyfast.hidden_loss(*arguments, **options)


BAD_LAYERS = {
    "a tensor": (TypeError, "student_hiddens", (H, [H, H]), {}),
    "embeddings alone": (ValueError, "teacher_hiddens", ([H, H], [H]), {}),
    "strategy": (ValueError, "layers", ([H, H], [H, H], "middle"), {}),
    "deeper": (ValueError, "student_layers", ([H, H, H], [H, H]), {}),
    "no pairs": (ValueError, "layers", ([H, H], [H, H], []), {}),
    "beyond": (ValueError, "teacher layer 1", ([H, H], [H, H], [(0, 1)]), {}),
    "no pair": (TypeError, "layers", ([H, H], [H, H], [0]), {}),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_bad_layers_are_named(case):
    error, name, arguments, options = BAD_LAYERS[case]
    with pytest.raises(error, match=name):
        pyfast.hidden_states_loss(*arguments, **options)


@pytest.mark.parametrize("depths", [(0, 3), (3, 0), (4, 3), (2.0, 3), (True, 3)])
def test_bad_depths(depths):
    with pytest.raises((TypeError, ValueError), match="_layers"):
        pyfast.layer_map(*depths)
    with pytest.raises(ValueError, match="strategy"):
        pyfast.layer_map(1, 2, "middle")
