"""Every divergence of distill_kl, the softcap and the cross-entropy in the same pass: each ISA against float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast import backends
from pyfast.ops.distill_kl import DIVERGENCES
from pyfast.reference import distill_kl as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRAD_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
INF = float("inf")


def loss_and_grad(student, teacher, divergence, **options):
    student = student.detach().requires_grad_()
    rows = pyfast.distillation_loss(student, teacher, divergence, reduction="none", **options)
    (grad,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach(), grad


def truth(student, teacher, divergence, **options):
    """The definitions in float64."""
    return loss_and_grad(student.double(), teacher.double(), divergence, backend="reference", **options)


def logits(*shape, dtype=torch.float32, spread=3.0):
    return (torch.randn(*shape) * spread).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 15, 33, 1025, 32000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_float64(isa, divergence, vocab, dtype):
    if isa == "serial":
        vocab = min(vocab, 3000)
    s, t = logits(3, vocab, dtype=dtype), logits(3, vocab, dtype=dtype)
    options = {"temperature": 2.0, "teacher_temperature": 1.5, "alpha": 0.2, "beta": 0.3}
    rows, grad = loss_and_grad(s, t, divergence, **options)
    true_rows, true_grad = truth(s, t, divergence, **options)
    assert rows.dtype == torch.float32 and grad.dtype == dtype
    if vocab == 1:
        assert rows.abs().max() < 1e-6 and grad.abs().max() < 1e-6
        return
    plain_rows, plain_grad = loss_and_grad(s.float(), t.float(), divergence, backend="reference", **options)
    assert relative_error(rows, true_rows) < 5e-6 + relative_error(plain_rows, true_rows)
    if dtype != torch.float16 or true_grad.abs().max() > 1e-2:  # else below the normal numbers of float16
        assert relative_error(grad, true_grad) < GRAD_TOLERANCE[dtype] + relative_error(plain_grad, true_grad)
    with torch.no_grad():  # values alone: another pass through the same terms
        alone = pyfast.distillation_loss(s, t, divergence, reduction="none", **options)
    assert relative_error(alone, true_rows) < 5e-6


@pytest.mark.parametrize("kl", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d not in ("tvd", "mse")])
def test_near_convergence_keeps_its_digits(isa, divergence, kl):
    s = logits(4, 8192)
    t = s + torch.randn_like(s) * math.sqrt(2 * kl)
    rows, grad = loss_and_grad(s, t, divergence, alpha=0.1, beta=0.3)
    true_rows, true_grad = truth(s, t, divergence, alpha=0.1, beta=0.3)
    assert ((rows - true_rows) / true_rows).abs().max() < 1e-3
    assert relative_error(grad, true_grad) < 1e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_logits_give_exactly_zero(isa, divergence):
    s = logits(4, 5000)
    rows, grad = loss_and_grad(s, s.clone(), divergence, temperature=3.0)
    assert torch.equal(rows, torch.zeros(4)) and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_excluded_words(isa, divergence):
    """-inf in the teacher, in both, and a teacher of one word: finite, and what the definition says."""
    s, t = logits(4, 3000), logits(4, 3000)
    t[0, 100:] = -INF
    t[1, ::2] = -INF
    s[1, ::2] = -INF
    t[2, 1:] = -INF
    rows, grad = loss_and_grad(s, t, divergence, temperature=2.0)
    true_rows, true_grad = truth(s, t, divergence, temperature=2.0)
    assert torch.isfinite(rows).all() and torch.isfinite(grad).all()
    assert relative_error(rows, true_rows) < 5e-6 and relative_error(grad, true_grad) < 3e-5


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "forward_kl"])
def test_words_the_student_excludes(isa, divergence):
    """Where the student alone excludes a word, only KL(t || s) is infinite."""
    s, t = logits(3, 100), logits(3, 100)
    s[0, 5], s[1, 10:90] = -INF, -INF
    rows, grad = loss_and_grad(s, t, divergence)
    true_rows, true_grad = truth(s, t, divergence)
    assert relative_error(rows, true_rows) < 5e-6 and relative_error(grad, true_grad) < 3e-5


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("tensor", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(isa, divergence, tensor, bad):
    s, t = logits(3, 1100), logits(3, 1100)
    clean, clean_grad = loss_and_grad(s, t, divergence)
    (s if tensor == "student" else t)[1, 1050] = bad
    rows, grad = loss_and_grad(s, t, divergence)
    assert torch.isnan(rows[1]) and torch.isnan(grad[1]).any()
    assert torch.equal(rows[[0, 2]], clean[[0, 2]]) and torch.equal(grad[[0, 2]], clean_grad[[0, 2]])


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_sums_follow_logits_that_rise(isa, divergence, order):
    """The shift of the log-sum-exp is moved when a later chunk rises by more than float32 can hold."""
    ramp = torch.linspace(-3000.0, 3000.0, 5000)
    ramp = ramp if order == "rising" else ramp.flip(0)
    s, t = ramp + logits(2, 5000), ramp + logits(2, 5000)
    t[1, 100:200] = -INF
    rows, grad = loss_and_grad(s, t, divergence)
    true_rows, true_grad = truth(s, t, divergence)
    assert relative_error(rows, true_rows) < 1e-4 and relative_error(grad, true_grad) < 1e-3


@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        ("jsd", {"beta": 0.01}),
        ("jsd", {"beta": 0.99}),
        ("skew_reverse_kl", {"alpha": 0.99}),
        ("skew_reverse_kl", {"alpha": 0.01}),
        ("skew_kl", {"alpha": 0.99}),
    ],
)
def test_mixtures_near_one_of_the_two_keep_their_digits(isa, divergence, options):
    s, t = logits(200, 5), logits(200, 5)
    rows, grad = loss_and_grad(s, t, divergence, **options)
    true_rows, true_grad = truth(s, t, divergence, **options)
    assert ((rows - true_rows) / true_rows).abs().quantile(0.95) < 2e-6
    assert relative_error(grad, true_grad) < 4e-6


@settings(max_examples=60, deadline=None)
@given(
    divergence=st.sampled_from(DIVERGENCES),
    rows=st.integers(1, 4),
    vocab=st.integers(2, 3000),
    temperature=st.floats(0.25, 10.0),
    teacher_temperature=st.floats(0.25, 10.0),
    share=st.floats(0.01, 0.99),
    spread=st.floats(0.01, 8.0),
    softcap=st.one_of(st.none(), st.floats(1.0, 50.0)),
    ce_weight=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from(DTYPES),
    variant=st.sampled_from(backends.isas_supported() or ["serial"]),
)
def test_any_options(
    divergence, rows, vocab, temperature, teacher_temperature, share, spread, softcap, ce_weight, dtype, variant
):
    s, t = logits(rows, vocab, dtype=dtype, spread=spread), logits(rows, vocab, dtype=dtype, spread=spread)
    options = {
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "scale_by_t2": False,
        "alpha": share,
        "beta": share,
        "softcap": softcap,
        "ce_weight": ce_weight,
        "labels": torch.randint(0, vocab, (rows,)),
    }
    with backends.isa(variant):
        got, grad = loss_and_grad(s, t, divergence, **options)
    true_rows, true_grad = truth(s, t, divergence, **options)
    # The rule: no worse than the textbook formula in float32, but for rounding to the dtype.
    plain_rows, plain_grad = loss_and_grad(s.float(), t.float(), divergence, backend="reference", **options)
    rounding = 2.0**-22 * float(torch.stack([s, t]).abs().max()) / min(temperature, teacher_temperature)
    # The error of the log-sum-exps, 3e-7 of x = log s - log t, and the rounding of x move tvd and mse in the first
    # order, KL in the second; cross-entropy has that of one of them. 1 + w_s·E of skew_kl, rounded like 1, may be as
    # small as w_t.
    first_order = max(1e-6, rounding) if divergence in ("tvd", "mse") else max(1e-8, 3e-7 * ce_weight)
    relative = max(1e-5, 2.0**-22 / share) if divergence == "skew_kl" else 1e-5
    slack = relative * true_rows.abs().max() + rounding * true_rows.abs().max().clamp(max=1.0) + first_order
    assert (got - true_rows).abs().max() <= 2 * (plain_rows - true_rows).abs().max() + slack
    absolute = (2e-6 if dtype == torch.float32 else 1e-3) + rounding
    slack = GRAD_TOLERANCE[dtype] * true_grad.abs().max() + absolute / temperature
    assert (grad - true_grad).abs().max() <= 2 * (plain_grad - true_grad).abs().max() + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("vocab", [5, 4099])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_cross_entropy_in_the_same_pass(isa, divergence, vocab, softcap, dtype):
    s, t = logits(6, vocab, dtype=dtype), logits(6, vocab, dtype=dtype)
    labels = torch.randint(0, vocab, (6,))
    labels[0], labels[1], labels[2] = 0, vocab - 1, -100
    options = {"temperature": 3.0, "softcap": softcap, "labels": labels, "ce_weight": 0.7}
    rows, grad = loss_and_grad(s, t, divergence, **options)
    true_rows, true_grad = truth(s, t, divergence, **options)
    assert rows[2] == 0 and torch.equal(grad[2], torch.zeros_like(grad[2]))
    assert relative_error(rows, true_rows) < 5e-6
    assert relative_error(grad, true_grad) < GRAD_TOLERANCE[dtype]
    parts = pyfast.distillation_loss(
        s.double(), t.double(), divergence, **(options | {"ce_weight": 0.0})
    ) + 0.7 * torch.nn.functional.cross_entropy(
        s.double() if softcap is None else softcap * torch.tanh(s.double() / softcap), labels
    )
    assert relative_error(pyfast.distillation_loss(s, t, divergence, **options), parts) < 5e-6


def cross_entropy_alone(vocab, dtype):
    """Rows 0 to 3, of factor 0, whose divergence is NaN or infinite; row 4 compares."""
    s, t = logits(5, vocab, dtype=dtype), logits(5, vocab, dtype=dtype)
    t[0] = torch.nan
    t[1] = -INF
    t[2, 0] = INF
    s[3, vocab // 3] = -INF
    t[3, vocab // 3] = 30.0
    labels = torch.randint(vocab // 2, vocab, (5,))
    return s, t, torch.tensor([0.0, -0.0, 0.0, 0.0, 0.7]), labels, torch.full((5,), 0.25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_of_factor_0_takes_no_part(isa, divergence, softcap, dtype):
    s, t, row_scale, labels, ce_scale = cross_entropy_alone(1063, dtype)
    options = (divergence, 0.3, 2.0, 3.0, softcap, softcap, labels, ce_scale)
    exact = s.double().requires_grad_()
    capped = torch.where(exact == -INF, exact, softcap * torch.tanh(exact / softcap)) if softcap else exact
    true_ce = 0.25 * torch.nn.functional.cross_entropy(capped, labels, reduction="none")
    (true_grad,) = torch.autograd.grad(true_ce.sum(), exact)
    for with_grad in (True, False):
        rows, ce_rows, grad = torch.ops.pyfast.distill_kl(s, t, row_scale, *options, with_grad)
        assert torch.equal(rows[:4], ce_rows[:4]) and torch.isfinite(rows).all() and rows[4] > ce_rows[4]
        assert relative_error(ce_rows, true_ce) < 5e-6
        if with_grad:
            assert relative_error(grad[:4], true_grad[:4]) < GRAD_TOLERANCE[dtype] and torch.isfinite(grad).all()
    exact = s.double().requires_grad_()
    rows, ce_rows = reference.distill_kl(exact, t.double(), row_scale.double(), *options)
    (grad,) = torch.autograd.grad(rows.sum(), exact)
    assert torch.equal(rows[:4], ce_rows[:4]) and relative_error(grad[:4], true_grad[:4]) < 1e-12


def test_every_word_can_be_the_label(isa):
    """The label's word is found in whole pairs of vectors, before and after them, at every alignment."""
    s, t = logits(71, 71, dtype=torch.bfloat16), logits(71, 71, dtype=torch.bfloat16)
    options = {"labels": torch.arange(71), "ce_weight": 1.0}
    for first in range(0, 36, 7):
        cut, words = {"labels": options["labels"][: 71 - first], "ce_weight": 1.0}, slice(0, 71)
        _, grad = loss_and_grad(s[first:, words], t[first:, words], "forward_kl", **cut)
        assert relative_error(grad, truth(s[first:, words], t[first:, words], "forward_kl", **cut)[1]) < 4e-3


def test_large_gradients_with_cross_entropy_are_streamed(isa):
    s, t = logits(600, 2049), logits(600, 2049)
    options = {"labels": torch.randint(0, 2049, (600,)), "ce_weight": 0.5}
    for divergence in ("forward_kl", "skew_kl"):
        _, grad = loss_and_grad(s, t, divergence, **options)
        assert relative_error(grad, truth(s, t, divergence, **options)[1]) < 5e-6


def test_softcap_of_one_side_and_of_excluded_words(isa):
    s, t = logits(3, 200, spread=20.0), logits(3, 200, spread=20.0)
    t[0, 7:100] = -INF
    for caps in ({"softcap": 10.0, "teacher_softcap": 30.0}, {"teacher_softcap": 5.0}):
        rows, grad = loss_and_grad(s, t, "forward_kl", **caps)
        true_rows, true_grad = truth(s, t, "forward_kl", **caps)
        assert relative_error(rows, true_rows) < 5e-6 and relative_error(grad, true_grad) < 3e-5


def test_teacher_softcap_defaults_to_the_students():
    s, t = logits(3, 200, spread=20.0), logits(3, 200, spread=20.0)
    both = pyfast.distillation_loss(s, t, softcap=10.0)
    assert torch.equal(both, pyfast.distillation_loss(s, t, softcap=10.0, teacher_softcap=10.0))
    assert relative_error(both, pyfast.distillation_loss(10 * torch.tanh(s / 10), 10 * torch.tanh(t / 10))) < 1e-5


def test_skew_of_nothing_is_the_plain_divergence():
    s, t = logits(3, 200), logits(3, 200)
    for skewed, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        skew = pyfast.distillation_loss(s, t, skewed, alpha=0.0)
        assert torch.equal(skew, pyfast.distillation_loss(s, t, plain))


def test_symmetries():
    s, t = logits(5, 300), logits(5, 300)
    for divergence in ("jsd", "tvd", "mse"):
        there = pyfast.distillation_loss(s, t, divergence, beta=0.5, reduction="none")
        assert relative_error(there, pyfast.distillation_loss(t, s, divergence, beta=0.5, reduction="none")) < 5e-6
    there = pyfast.distillation_loss(s, t, "forward_kl", reduction="none")
    assert relative_error(there, pyfast.distillation_loss(t, s, "reverse_kl", reduction="none")) < 5e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_grad_is_autograd_without_autograd(isa, divergence):
    s, t = logits(2, 3, 500), logits(2, 3, 600)
    labels = torch.randint(0, 500, (2, 3))
    options = {"vocab_size": 500, "temperature": 2.0, "labels": labels, "ce_weight": 0.25}
    student = s.clone().requires_grad_()
    loss = pyfast.distillation_loss(student, t, divergence, **options)
    loss.backward()
    value, grad = pyfast.distillation_value_and_grad(student, t, divergence, **options)
    assert not value.requires_grad and torch.equal(value, loss.detach()) and torch.equal(grad, student.grad)
    _, grad = pyfast.distillation_value_and_grad(t, s, divergence, **options)
    assert grad.shape == t.shape and torch.equal(grad[..., 500:], torch.zeros(2, 3, 100))
    value, grad = pyfast.distillation_value_and_grad(s.double(), t.double(), divergence, **options)
    assert relative_error(grad, student.grad) < 1e-5


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_opcheck(divergence, with_grad):
    s, t = logits(3, 100).requires_grad_(with_grad), logits(3, 100)
    labels, scale = torch.tensor([1, 99, 0]), torch.rand(3) + 0.5
    torch.library.opcheck(
        torch.ops.pyfast.distill_kl, (s, t, scale, divergence, 0.3, 2.0, 1.5, 0.0, 30.0, labels, scale, with_grad)
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_of_the_reference(divergence):
    s, t = logits(3, 7).double().requires_grad_(), logits(3, 7).double()
    t[0, 2] = -INF
    options = {"temperature": 2.0, "softcap": 5.0, "labels": torch.tensor([1, -100, 3]), "ce_weight": 0.5}
    assert torch.autograd.gradcheck(lambda x: pyfast.distillation_loss(x, t, divergence, **options), s)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_compiles_in_one_graph(divergence):
    @torch.compile(fullgraph=True)
    def step(student, teacher, labels):
        return pyfast.distillation_loss(student * 2, teacher, divergence, labels=labels, ce_weight=0.5, softcap=9.0)

    s, t, labels = logits(4, 200).requires_grad_(), logits(4, 200), torch.tensor([1, -100, 2, 3])
    loss = step(s, t, labels)
    (grad,) = torch.autograd.grad(loss, s)
    plain = pyfast.distillation_loss(s * 2, t, divergence, labels=labels, ce_weight=0.5, softcap=9.0)
    assert relative_error(loss, plain.detach()) < 1e-6
    assert relative_error(grad, torch.autograd.grad(plain, s)[0]) < 1e-6


def test_autocast_keeps_the_logits_as_they_are():
    s, t = logits(4, 300).requires_grad_(), logits(4, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pyfast.distillation_loss(s, t, "jsd")
    assert loss.dtype == torch.float32 and torch.equal(loss, pyfast.distillation_loss(s, t, "jsd"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"divergence": "jsd", "beta": 1.5}, "beta: got 1.5"),
        ({"divergence": "jsd", "beta": 0.0}, "forward_kl and reverse_kl are the limits"),
        ({"divergence": "skew_kl", "alpha": 1.0}, "alpha: got 1.0"),
        ({"divergence": "skew_reverse_kl", "alpha": -0.1}, "alpha: got -0.1"),
        ({"divergence": "kl"}, "divergence: got 'kl', accepted: forward_kl"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"teacher_softcap": INF}, "teacher_softcap: got inf"),
        ({"ce_weight": -1.0}, "ce_weight: got -1.0"),
        ({"ce_weight": 0.5}, "labels: got None"),
        ({"ce_weight": 0.5, "labels": torch.tensor([0, 1, 100])}, "labels: got 100, accepted: 0 to 99"),
        ({"ce_weight": 0.5, "labels": torch.tensor([0, -1, 3])}, "labels: got -1, accepted: 0 to 99"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pyfast.distillation_loss(logits(3, 100), logits(3, 100), **options)


@pytest.mark.parametrize("name", ["alpha", "beta", "softcap", "teacher_softcap", "ce_weight"])
def test_options_of_the_wrong_type(name):
    options = {"alpha": {"divergence": "skew_kl"}, "beta": {"divergence": "jsd"}}.get(name, {})
    with pytest.raises(TypeError, match=f"{name}: got str"):
        pyfast.distillation_loss(logits(3, 100), logits(3, 100), **options, **{name: "0.5"})


def test_a_label_that_names_no_word_gives_nan_in_its_row(isa):
    """Below the checks of the public function, as on a GPU, where they would stop the host."""
    s, t = logits(3, 50), logits(3, 50)
    ones = torch.ones(3)
    args = (t, ones, "forward_kl", 0.0, 1.0, 1.0, 0.0, 0.0, torch.tensor([1, 50, 2]), ones, True)
    rows, ce_rows, grad = torch.ops.pyfast.distill_kl(s, *args)
    assert torch.isnan(rows).tolist() == [False, True, False] and torch.isnan(grad[1]).all()
    assert torch.isfinite(grad[[0, 2]]).all() and torch.isfinite(ce_rows[[0, 2]]).all()


def test_scale_rows_in_place(isa):
    grad, scale = logits(5, 100), torch.tensor([1.0, 2.0, 1.0, 0.0, -1.5])
    expected = torch.ops.pyfast.scale_rows(grad, scale)
    assert relative_error(expected, grad * scale[:, None]) < 1e-6
    view = grad.clone()
    torch.ops.pyfast.scale_rows_(view, scale)
    assert torch.equal(view, expected)
    view = grad.clone()
    torch.ops.pyfast.scale_rows_(view, torch.ones(()).expand(5))
    assert torch.equal(view, grad)


def test_backward_scales_the_saved_gradient_where_it_lies():
    """No second tensor of the size of the logits for a loss that is one term of several; a kept graph is not harmed."""
    s, t = logits(64, 32000).requires_grad_(), logits(64, 32000)
    (three,) = torch.autograd.grad(3 * pyfast.distillation_loss(s, t), s)
    loss = pyfast.distillation_loss(s, t)
    (first,) = torch.autograd.grad(3 * loss, s, retain_graph=True)
    (again,) = torch.autograd.grad(3 * loss, s)
    assert torch.equal(first, again) and torch.equal(first, three)
