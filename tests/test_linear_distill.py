"""linear_distill: against the unfused formula in float64, then layouts and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import SLACK, Case, check

import pyfast
from pyfast.ops import _linear_chunks
from pyfast.ops._arguments import LossOptions
from pyfast.reference.distill_kl import DIVERGENCES

NAN = float("nan")
OPTIONS = {
    "plain": {},
    "temperatures": {"temperature": 2.0, "teacher_temperature": 3.0},
    "softcaps": {"softcap": 5.0, "teacher_softcap": 7.0},
    "cross-entropy": {"ce_weight": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_float64(divergence, options):
    case, options = Case(23), OPTIONS[options]
    if "ce_weight" in options:
        options = {**options, "labels": torch.randint(0, 101, (23,))}
    truth = case.plain(divergence=divergence, **options)
    check(case.fused(divergence=divergence, chunk_size=7, **options), truth, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_no_worse_than_the_plain_formula(dtype):
    """The head's gradient is summed over 16 chunks; summing in 16 bits would lose digits at each."""
    case = Case(128, words=300, student=64, dtype=dtype)
    loss, grads = case.fused(temperature=2.0, chunk_size=8, reduction="sum")
    true_loss, true_grads = case.plain(temperature=2.0, reduction="sum")
    plain_loss, plain_grads = case.plain(dtype, temperature=2.0, reduction="sum")
    assert relative_error(loss, true_loss) <= relative_error(plain_loss, true_loss) + 1e-3
    for grad, true_grad, plain_grad in zip(grads, true_grads, plain_grads, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, true_grad) <= relative_error(plain_grad, true_grad) + SLACK[dtype]


def test_many_chunks_round_the_gradient_of_a_16_bit_head_once(monkeypatch):
    case = Case(96, words=64, student=16, dtype=torch.bfloat16)
    monkeypatch.setattr(_linear_chunks, "PANEL", 5)  # panels of 5 rows, the last of 4
    one = case.fused(chunk_size=96)[1][1]
    many = case.fused(chunk_size=1)[1][1]
    assert relative_error(many, one) < 4e-3


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
def test_float16_gradients_of_a_mean_over_many_tokens_survive(loss_scale):
    """1 / 2^20 of a probability is 0 in float16: the divisor comes last, together with the loss scale."""
    case = Case(16, dtype=torch.float16)
    loss = pyfast.linear_distillation_loss(**vars(case), num_items=2**20, chunk_size=5)
    got = case.differentiate(loss, loss_scale)
    truth = case.plain(num_items=2**20, weight=loss_scale)
    assert relative_error(got[0], truth[0]) < 1e-3
    if loss_scale > 1:
        assert all(relative_error(grad, true) < 5e-3 for grad, true in zip(got[1], truth[1], strict=True))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20),
    words=st.integers(1, 70),
    student=st.integers(1, 20),
    teacher=st.integers(1, 20),
    chunk_size=st.one_of(st.none(), st.integers(1, 25)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    masked=st.booleans(),
)
def test_any_shape(rows, words, student, teacher, chunk_size, reduction, masked):
    case = Case(rows, words=words, student=student, teacher=teacher)
    options = {"reduction": reduction, "mask": torch.rand(rows) < 0.5 if masked else None}
    got, truth = case.fused(chunk_size=chunk_size, **options), case.plain(**options)
    for value, true in zip([got[0], *got[1]], [truth[0], *truth[1]], strict=True):
        torch.testing.assert_close(value.double(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 6, 30, 1000, None])
@pytest.mark.parametrize("leading", [(30,), (5, 6), (2, 3, 5)])
def test_chunks_of_any_size(leading, chunk_size):
    case = Case(*leading)
    got = case.fused(chunk_size=chunk_size)
    check(got, case.plain())
    assert got[1][0].shape == (*leading, 24)


def test_one_token_without_batch():
    case = Case()
    got = case.fused(reduction="none")
    assert got[0].shape == ()
    check(got, case.plain(reduction="none"))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction):
    loss, grads = Case(0).fused(reduction=reduction)
    assert loss.sum() == 0 and grads[0].shape == (0, 24)
    assert torch.equal(grads[1], torch.zeros(101, 24)) and torch.equal(grads[2], torch.zeros(101))


def test_teacher_logits():
    case = Case(4, 9)
    logits = F.linear(case.teacher_hidden, case.teacher_head, case.teacher_bias)
    mask = torch.rand(4, 9) < 0.5
    for chosen in (None, mask):
        loss = pyfast.linear_distillation_loss(
            case.student_hidden,
            case.student_head,
            student_bias=case.student_bias,
            teacher_logits=logits,
            mask=chosen,
            chunk_size=5,
        )
        check(case.differentiate(loss), case.plain(mask=chosen))


def test_vocab_size_multiplies_the_first_words():
    case = Case(9)
    case.teacher_head, case.teacher_bias = case.teacher_head[:90], case.teacher_bias[:90]
    _, grads = got = case.fused(vocab_size=80, chunk_size=4)
    narrow = Case(9)
    for name, tensor in vars(case).items():
        cut = tensor.detach()[:80] if "head" in name or "bias" in name else tensor.detach()
        setattr(narrow, name, cut.requires_grad_(name.startswith("student")))
    truth = narrow.plain()
    check((got[0], [grads[0], grads[1][:80], grads[2][:80]]), truth)
    assert torch.equal(grads[1][80:], torch.zeros(21, 24)) and torch.equal(grads[2][80:], torch.zeros(21))


@pytest.mark.parametrize(
    ("student", "teacher"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_teacher_of_another_dtype(student, teacher):
    case, other = Case(9, dtype=student), Case(9, dtype=teacher)
    case.teacher_hidden, case.teacher_head, case.teacher_bias = (
        other.teacher_hidden,
        other.teacher_head,
        other.teacher_bias,
    )
    loss, grads = case.fused(chunk_size=4)
    true_loss, true_grads = case.plain()
    assert relative_error(loss, true_loss) < 2e-2
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert grad.dtype == student and relative_error(grad, true_grad) < 2e-2


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["student_hidden", "student_head", "student_bias"])
def test_only_gradients_that_are_required_are_computed(frozen, reduction):
    case = Case(9)
    truth = dict(zip(("student_hidden", "student_head", "student_bias"), case.plain()[1], strict=True))
    getattr(case, frozen).requires_grad_(False)
    pyfast.linear_distillation_loss(**vars(case), reduction=reduction, chunk_size=4).mean().backward()
    for name, grad in truth.items():
        if name == frozen:
            assert getattr(case, name).grad is None
        else:
            assert relative_error(getattr(case, name).grad, grad) < 2e-6


def test_no_gradient_under_no_grad_or_to_the_teacher():
    case = Case(9)
    with torch.no_grad():
        assert not pyfast.linear_distillation_loss(**vars(case)).requires_grad
    case.teacher_hidden.requires_grad_()
    case.teacher_head.requires_grad_()
    pyfast.linear_distillation_loss(**vars(case)).backward()
    assert case.teacher_hidden.grad is None and case.teacher_head.grad is None


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tokens_that_do_not_count_are_not_read(backend, reduction):
    case = Case(8)
    mask = torch.tensor([True, False, True, True, False, True, False, True])
    labels = torch.randint(0, 101, (8,))
    labels[5] = -100
    keep = mask & (labels != -100)
    options = {"mask": mask, "labels": labels, "reduction": reduction}
    truth = case.plain(**options)
    with torch.no_grad():
        case.student_hidden[1], case.student_hidden[5], case.teacher_hidden[4] = NAN, NAN, NAN
    got = case.fused(chunk_size=3, backend=backend, **options)
    check(got, truth)
    assert torch.equal(got[1][0][~keep], torch.zeros(4, 24))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_token_counts(backend):
    loss, grads = Case(5).fused(labels=torch.full((5,), -100), backend=backend)
    assert loss == 0 and all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_nan_stays_in_its_token():
    case = Case(6)
    clean = case.fused(reduction="none")
    with torch.no_grad():
        case.student_hidden[2] = NAN
    loss, grads = case.fused(reduction="none", chunk_size=2)
    others = [0, 1, 3, 4, 5]
    assert torch.isnan(loss[2]) and relative_error(loss[others], clean[0][others]) < 1e-6
    assert relative_error(grads[0][others], clean[1][0][others]) < 1e-6


LAYOUTS = {
    "head transposed": ("student_head", lambda x: x.t().contiguous().t()),
    "head of strided columns": ("student_head", lambda x: torch.stack([x, x], -1)[..., 0]),
    "teacher's head transposed": ("teacher_head", lambda x: x.t().contiguous().t()),
    "hidden transposed": ("student_hidden", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "hidden expanded": ("student_hidden", lambda x: x[:1, :1].expand(4, 5, -1)),
    "hidden of strided columns": ("student_hidden", lambda x: torch.stack([x, x], -1)[..., 0]),
    "teacher's hidden transposed": ("teacher_hidden", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "bias strided": ("student_bias", lambda x: torch.stack([x, x], -1)[..., 0]),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, reduction):
    case = Case(4, 5)
    name, view = LAYOUTS[layout]
    original = getattr(case, name)
    setattr(case, name, view(original.detach()).requires_grad_(original.requires_grad))
    check(case.fused(reduction=reduction, chunk_size=6), case.plain(reduction=reduction))


def test_head_tied_to_the_embedding():
    case = Case(12, teacher=24)
    ids = torch.randint(0, 101, (12,))

    def backward(embedding, loss):
        hidden = torch.tanh(F.embedding(ids, embedding))
        return torch.autograd.grad(loss(hidden, embedding), embedding)[0]

    def unfused(hidden, head):
        logits = F.linear(case.teacher_hidden.double(), case.teacher_head.double())
        return pyfast.distillation_loss(F.linear(hidden, head), logits)

    fused = backward(
        case.student_head,
        lambda hidden, head: pyfast.linear_distillation_loss(hidden, head, case.teacher_hidden, case.teacher_head),
    )
    assert relative_error(fused, backward(case.student_head.detach().double().requires_grad_(), unfused)) < 2e-6


@pytest.mark.parametrize("dtype", SLACK)
@pytest.mark.parametrize("factor", [0.125, 3.7])
def test_incoming_gradients_are_honoured(factor, dtype):
    case = Case(7, dtype=dtype)
    loss = pyfast.linear_distillation_loss(**vars(case), chunk_size=3)
    got, plain = case.differentiate(loss, factor), case.plain(dtype, factor)
    truth = case.plain(weight=factor)
    weights = torch.tensor([1.0, 2.0, -0.5, 0.0, 0.3, 1.0, 8.0])
    rows = pyfast.linear_distillation_loss(**vars(case), chunk_size=3, reduction="none")
    got_rows, plain_rows = case.differentiate(rows, weights), case.plain(dtype, weights, reduction="none")
    truth_rows = case.plain(weight=weights, reduction="none")
    for (_, grads), (_, plains), (_, trues) in ((got, plain, truth), (got_rows, plain_rows, truth_rows)):
        for grad, plain_grad, true in zip(grads, plains, trues, strict=True):
            assert relative_error(grad, true) <= relative_error(plain_grad, true) + SLACK[dtype]


def test_incoming_gradients_of_rows_with_cross_entropy():
    """Each row takes its own in both parts; what comes in for a row that does not count goes nowhere."""
    case, shares = Case(7), torch.linspace(-1.0, 2.0, 7)
    labels = torch.randint(0, 101, (7,))
    labels[2] = -100
    options = {"labels": labels, "ce_weight": 0.5, "reduction": "none"}
    got = case.differentiate(pyfast.linear_distillation_loss(**vars(case), chunk_size=3, **options), shares)
    check(got, case.plain(weight=shares, **options), 1e-5)
    shares[2] = torch.nan
    rows = pyfast.linear_distillation_loss(**vars(case), chunk_size=3, **options)
    for grad, same in zip(case.differentiate(rows, shares)[1], got[1], strict=True):
        assert torch.equal(grad, same)


def test_the_op_counts_rows_of_cross_entropy_alone():
    case, labels = Case(7), torch.randint(0, 101, (7,))
    operands = _linear_chunks.Operands(
        (case.student_hidden,),
        case.student_head,
        case.student_bias,
        (case.teacher_hidden,),
        case.teacher_head,
        case.teacher_bias,
    )
    inputs, _ = operands.joined(LossOptions(labels=labels, ce_weight=1.0, reduction="sum"), 101, 3)
    loss, *_ = torch.ops.pyfast.linear_distill(*inputs._replace(row_scale=torch.zeros(7)))
    logits = F.linear(case.student_hidden, case.student_head, case.student_bias)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    check(case.differentiate(loss), case.differentiate(expected))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_with_retained_graph(reduction):
    case = Case(7)
    loss = pyfast.linear_distillation_loss(**vars(case), reduction=reduction).sum()
    first = [grad.clone() for grad in torch.autograd.grad(loss, case.trained, retain_graph=True)]
    doubled = torch.autograd.grad(2 * loss, case.trained, retain_graph=True)
    for once, twice, again in zip(first, doubled, torch.autograd.grad(loss, case.trained), strict=True):
        assert torch.equal(once, again) and relative_error(twice, 2 * once) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction):
    case = Case(7)
    loss = pyfast.linear_distillation_loss(**vars(case), reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, case.trained, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_dtype(dtype, reduction):
    case = Case(40)
    truth = case.plain(reduction=reduction)
    with torch.autocast("cpu", dtype=dtype):
        student = F.linear(case.student_hidden, case.student_head, case.student_bias)
        teacher = F.linear(case.teacher_hidden, case.teacher_head, case.teacher_bias)
        assert student.dtype == dtype
        plain = case.differentiate(pyfast.distillation_loss(student, teacher, reduction=reduction))
        loss = pyfast.linear_distillation_loss(**vars(case), chunk_size=7, reduction=reduction)
    got = case.differentiate(loss)
    assert relative_error(got[0], plain[0]) < 1e-3 < relative_error(got[0], truth[0]) * 100
    for grad, plain_grad, true_grad in zip(got[1], plain[1], truth[1], strict=True):
        assert grad.dtype == torch.float32
        assert relative_error(grad, true_grad) <= relative_error(plain_grad, true_grad) + SLACK[dtype]
