"""The contrastive loss of DistiLLM-2 against its formula, each response by itself."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error

import pyfast
from pyfast.contrastive import Response

WORDS = 37


def response(length, rows=2, dtype=torch.float32):
    student, teacher = (3 * torch.randn(rows, length, WORDS).to(dtype) for _ in range(2))
    labels = torch.randint(0, WORDS, (rows, length))
    labels[:, : length // 3] = -100  # the prompt
    return Response(student, teacher, labels)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def formula(on_teacher, on_student, alpha, student_alpha, balance):
    """The loss in float64, as the paper writes it."""
    s, t = (x.double().softmax(-1) for x in on_teacher[:2])
    first = kl(t, alpha * t + (1 - alpha) * s)[on_teacher.tokens != -100].mean()
    s, t = (x.double().softmax(-1) for x in on_student[:2])
    second = kl(s, (1 - student_alpha) * t + student_alpha * s)[on_student.tokens != -100].mean()
    return (1 - balance) * first + balance * second


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("student_alpha", [None, 0.4])
def test_matches_the_formula(backend, balance, student_alpha):
    on_teacher, on_student = response(9), response(6)
    truth = [x.student.double().requires_grad_() for x in (on_teacher, on_student)]
    expected = formula(
        on_teacher._replace(student=truth[0]),
        on_student._replace(student=truth[1]),
        0.1,
        0.1 if student_alpha is None else student_alpha,
        balance,
    )
    expected.backward()
    for each in (on_teacher, on_student):
        each.student.requires_grad_()
    options = {"balance": balance, "student_alpha": student_alpha, "backend": backend}
    loss = pyfast.contrastive_distillation_loss(on_teacher, on_student, **options)
    loss.backward()
    assert relative_error(loss, expected) < 2e-6
    for got, true in zip((on_teacher, on_student), truth, strict=True):
        assert relative_error(got.student.grad, true.grad) < 1e-5


def test_tokens_as_labels_as_mask_and_shifted():
    on_teacher, on_student = response(9), response(6)
    expected = pyfast.contrastive_distillation_loss(on_teacher, on_student, backend="reference")
    masks = [x._replace(tokens=x.tokens != -100) for x in (on_teacher, on_student)]
    assert torch.equal(pyfast.contrastive_distillation_loss(*masks, backend="reference"), expected)
    plain = tuple(on_teacher), tuple(on_student)
    assert torch.equal(pyfast.contrastive_distillation_loss(*plain, backend="reference"), expected)
    for each in ((on_teacher, on_student), masks):
        cut = [Response(x.student[:, :-1], x.teacher[:, :-1], x.tokens[:, 1:]) for x in each]
        shifted = pyfast.contrastive_distillation_loss(*each, shift=True, backend="reference")
        aligned = pyfast.contrastive_distillation_loss(*cut, backend="reference")
        assert relative_error(shifted, aligned) < 1e-6
    others = [x._replace(tokens=torch.where(x.tokens == -100, 7, -100)) for x in (on_teacher, on_student)]
    assert torch.equal(pyfast.contrastive_distillation_loss(*others, ignore_index=7, backend="reference"), expected)
    everything = [x._replace(tokens=None) for x in (on_teacher, on_student)]
    ones = [x._replace(tokens=torch.ones_like(x.tokens, dtype=torch.bool)) for x in (on_teacher, on_student)]
    assert torch.equal(
        pyfast.contrastive_distillation_loss(*everything, backend="reference"),
        pyfast.contrastive_distillation_loss(*ones, backend="reference"),
    )


def test_num_items_make_accumulation_one_large_batch():
    on_teacher, on_student = response(9, rows=4), response(6, rows=4)
    whole = pyfast.contrastive_distillation_loss(on_teacher, on_student, backend="reference")
    items = tuple(int((x.tokens != -100).sum()) for x in (on_teacher, on_student))
    parts = [
        [Response(*(field[rows] for field in x)) for x in (on_teacher, on_student)] for rows in (slice(1), slice(1, 4))
    ]
    summed = sum(pyfast.contrastive_distillation_loss(*part, num_items=items, backend="reference") for part in parts)
    assert relative_error(summed, whole) < 1e-6
    sums = pyfast.contrastive_distillation_loss(
        on_teacher, on_student, reduction="sum", balance=0.0, backend="reference"
    )
    means = pyfast.contrastive_distillation_loss(on_teacher, on_student, balance=0.0, backend="reference")
    assert relative_error(sums, means * items[0]) < 1e-6


def test_temperature_reaches_both_terms():
    on_teacher, on_student = response(5), response(5)
    hot = [x._replace(student=x.student / 2, teacher=x.teacher / 2) for x in (on_teacher, on_student)]
    options = {"temperature": 2.0, "scale_by_t2": False, "backend": "reference"}
    got = pyfast.contrastive_distillation_loss(on_teacher, on_student, **options)
    assert relative_error(got, pyfast.contrastive_distillation_loss(*hot, backend="reference")) < 1e-6


def test_no_token_counts():
    on_teacher, on_student = (x._replace(tokens=torch.full_like(x.tokens, -100)) for x in (response(4), response(5)))
    on_teacher.student.requires_grad_()
    loss = pyfast.contrastive_distillation_loss(on_teacher, on_student, backend="reference")
    loss.backward()
    assert loss == 0 and torch.equal(on_teacher.student.grad, torch.zeros_like(on_teacher.student))


def test_both_terms_move_the_student_towards_the_teacher():
    """Descent raises the word that only the teacher has, and lowers the word that only the student has."""
    teacher = torch.tensor([[[4.0, -4.0, 0.0]]])
    for balance in (0.0, 1.0):
        student = torch.tensor([[[-4.0, 4.0, 0.0]]]).requires_grad_()
        loss = pyfast.contrastive_distillation_loss(
            (student, teacher, None), (student, teacher, None), balance=balance, backend="reference"
        )
        (grad,) = torch.autograd.grad(loss, student)
        assert grad[0, 0, 0] < 0 < grad[0, 0, 1]


S, T = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
BAD = {
    "no tuple": (TypeError, "teacher_response", (S, (S, T, None)), {}),
    "two fields": (TypeError, "student_response", ((S, T, None), (S, T)), {}),
    "tokens": (TypeError, "student_response", ((S, T, None), (S, T, [1])), {}),
    "shapes": (ValueError, "teacher_response: teacher", ((S, T[:1], None), (S, T, None)), {}),
    "labels": (ValueError, "student_response: tokens", ((S, T, None), (S, T, torch.zeros(2, 2).long())), {}),
    "float tokens": (TypeError, "student_response: tokens", ((S, T, None), (S, T, torch.zeros(2, 3))), {}),
    "alpha": (ValueError, "alpha", ((S, T, None), (S, T, None)), {"alpha": 1.0}),
    "balance": (ValueError, "balance", ((S, T, None), (S, T, None)), {"balance": 1.5}),
    "balance text": (TypeError, "balance", ((S, T, None), (S, T, None)), {"balance": "half"}),
    "reduction": (ValueError, "reduction", ((S, T, None), (S, T, None)), {"reduction": "none"}),
    "num_items": (TypeError, "num_items", ((S, T, None), (S, T, None)), {"num_items": 4}),
    "option": (TypeError, "divergence", ((S, T, None), (S, T, None)), {"divergence": "jsd"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    error, name, responses, options = BAD[case]
    with pytest.raises(error, match=name):
        pyfast.contrastive_distillation_loss(*responses, **options)
