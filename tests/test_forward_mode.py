"""Forward-mode AD: every public function gives the tangent, against differences in float64, or says why not."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from torch.autograd import forward_ad

import pyfast
from pyfast.sparse import BitmapWeight, Sparse24Weight, layouts, sparse_linear

STEP = 1e-5
WORDS = 40


def losses(dtype: torch.dtype):
    """name -> (the student's tensor, its loss as a function of it)"""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    logits, teacher, hidden = rand(6, WORDS), rand(6, WORDS), rand(6, 8)
    head, teacher_head, teacher_hidden = rand(WORDS, 8), rand(WORDS, 8), rand(6, 8)
    log_probabilities, ids = teacher.log_softmax(-1).topk(5)
    queries, keys, teacher_queries, teacher_keys = (rand(1, 2, 6, 4) for _ in range(4))
    cases = {
        f"distillation, {divergence}": (logits, lambda s, d=divergence: pyfast.distillation_loss(s, teacher, d))
        for divergence in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd")
    }
    return cases | {
        "linear": (hidden, lambda h: pyfast.linear_distillation_loss(h, head, teacher_hidden, teacher_head)),
        "head": (head, lambda w: pyfast.linear_distillation_loss(hidden, w, teacher_hidden, teacher_head)),
        "top-k": (logits, lambda s: pyfast.topk_distillation_loss(s, ids, log_probabilities)),
        "hidden": (hidden, lambda h: pyfast.hidden_loss(h, teacher_hidden)),
        "attention": (
            queries,
            lambda q: pyfast.attention_distillation_loss(q, keys, teacher_queries, teacher_keys, causal=True),
        ),
    }


def tangent_of(function, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


@pytest.mark.parametrize("name", losses(torch.float32))
@pytest.mark.parametrize("how", ["func", "dual"])
def test_losses_give_the_tangent(name, how):
    x, loss = losses(torch.float32)[name]
    exact_x, exact = losses(torch.float64)[name]
    direction = torch.randn_like(exact_x)
    truth = (exact(exact_x + STEP * direction) - exact(exact_x - STEP * direction)) / (2 * STEP)
    if how == "func":
        _, tangent = torch.func.jvp(loss, (x,), (direction.float(),))
    else:
        tangent = tangent_of(loss, x, direction.float())
    assert relative_error(tangent, truth) < 1e-3


@pytest.mark.parametrize("weight_class", [BitmapWeight, Sparse24Weight])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_a_product_gives_the_tangent_though_it_was_remembered_without(weight_class, grad_mode):
    dense = torch.randn(48, 64)
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[:, ::4] = True
    weight = weight_class.from_dense(dense, mask=mask)
    x, direction = torch.randn(3, 64), torch.randn(3, 64)
    with torch.no_grad():
        sparse_linear(x, weight)
    assert layouts.of(weight).last is not None
    with torch.set_grad_enabled(grad_mode):
        tangent = tangent_of(lambda x: sparse_linear(x, weight, activation="silu"), x, direction)
        plain = tangent_of(lambda x: sparse_linear(x, weight), x, direction)
    assert relative_error(plain, direction.double() @ weight.to_dense().double().T) < 1e-5
    truth = torch.func.jvp(
        lambda x: torch.nn.functional.silu(x @ weight.to_dense().double().T), (x.double(),), (direction.double(),)
    )[1]
    assert relative_error(tangent, truth) < 1e-5


def test_a_kernel_that_is_asked_for_by_name_says_that_it_has_no_tangent():
    logits = torch.randn(4, WORDS)
    with pytest.raises(ValueError, match="the native kernel has no forward-mode derivative"):
        tangent_of(lambda s: pyfast.distillation_loss(s, logits, backend="native"), logits.clone(), logits)
    pyfast.distillation_loss(logits, logits.flip(0), backend="native")  # serves again behind the level
