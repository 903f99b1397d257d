"""The two ways of the KL of 16-bit logits on the CPU, of rows that lie near each other and of rows that lie apart; and
that float32, which has one, is as right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import pyfast
from pyfast.reference import distill_kl as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KLS = ("forward_kl", "reverse_kl")
SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cpu" / "distill_kl_apart.h"


def outcome(student, teacher, divergence, temperature=1.0):
    """Values and gradient of the op, and both in float64."""
    scale = torch.ones(len(student))
    options = (divergence, 0.0, temperature, temperature, 0.0, 0.0, None, None)
    rows, _, grad = torch.ops.pyfast.distill_kl(student, teacher, scale, *options, True)
    alone, _, nothing = torch.ops.pyfast.distill_kl(student, teacher, scale, *options, False)
    assert nothing.numel() == 0
    torch.testing.assert_close(alone, rows, rtol=2e-5, atol=0, equal_nan=True)
    exact = student.double().requires_grad_()
    true_rows, _ = reference.distill_kl(exact, teacher.double(), scale.double(), *options)
    (true_grad,) = torch.autograd.grad(true_rows.sum(), exact)
    return rows, grad, true_rows.detach(), true_grad


def check(student, teacher, divergence, temperature=1.0, tolerance=1e-5):
    rows, grad, true_rows, true_grad = outcome(student, teacher, divergence, temperature)
    torch.testing.assert_close(rows.double(), true_rows, rtol=tolerance, atol=1e-12)
    error, size = (grad.double() - true_grad).norm(dim=1), true_grad.norm(dim=1)
    rounding = (true_grad.to(grad.dtype).double() - true_grad).norm(dim=1)
    assert (error <= 1.02 * rounding + tolerance * size).all()
    return true_rows


@pytest.mark.parametrize("divergence", KLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_sides_of_the_border(isa, dtype, divergence):
    """Values around the one at which the way changes are right, and lie on both sides of it."""
    border = float(re.search(r"kNear = ([0-9.]+);", SOURCE.read_text())[1])
    teacher = torch.randn(12, 3001).to(dtype)
    spread = (2 * border) ** 0.5 * torch.linspace(0.5, 2.0, 12).unsqueeze(1)
    student = (teacher.float() + spread * torch.randn(12, 3001)).to(dtype)
    values = check(student, teacher, divergence)
    assert values.min() < 0.5 * border and values.max() > 2 * border


@pytest.mark.parametrize("divergence", KLS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("apart", ["first", "last"])
def test_a_first_chunk_that_misleads(isa, dtype, divergence, apart):
    """Rows that lie apart in their first words alone, or in all but those: little mass where they are near or much."""
    teacher = torch.randn(4, 6000)
    noise = torch.randn(4, 6000)
    there = slice(0, 1024) if apart == "first" else slice(1024, None)
    for mass in (-6.0, 0.0, 6.0):
        teacher[:, there] += mass
        student = teacher + 0.01 * noise
        student[:, there] += noise[:, there]
        check(student.to(dtype), teacher.to(dtype), divergence)


@pytest.mark.parametrize("divergence", KLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rising", ["student", "teacher", "both"])
def test_rising_logits(isa, dtype, divergence, rising):
    """Logits that rise along the row move the shift of later chunks, so that kept words belong to different ones."""
    slope = torch.linspace(-40, 40, 9001)
    student, teacher = torch.randn(3, 9001), torch.randn(3, 9001)
    student += slope if rising != "teacher" else 0
    teacher += slope if rising != "student" else 0
    check(student.to(dtype), teacher.to(dtype), divergence, temperature=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", KLS)
def test_excluded_words_of_rising_rows(isa, dtype, divergence):
    """-inf in the teacher (both), and in the student where the formula is finite, before and after a shift moved."""
    slope = torch.linspace(-20, 20, 5003)
    student, teacher = torch.randn(2, 5003) + slope, torch.randn(2, 5003) + slope
    excluded = torch.rand(5003) < 0.2
    if divergence == "forward_kl":
        teacher[:, excluded] = -torch.inf
        student[:, excluded & (torch.rand(5003) < 0.5)] = -torch.inf
        check(student.to(dtype), teacher.to(dtype), divergence)
        return
    student[:, excluded] = -torch.inf
    check(student.to(dtype), teacher.to(dtype), divergence)
    teacher[:, 100], teacher[:, 4900] = -torch.inf, -torch.inf  # no mass there, and h = -1
    rows, grad, _, _ = outcome(student.to(dtype), teacher.to(dtype), divergence)
    assert rows.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("divergence", KLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_streamed_gradients_of_odd_rows(isa, dtype, divergence):
    """More than 4 MB of gradient in rows that begin anywhere in a cache line."""
    teacher = (3 * torch.randn(520, 4099)).to(dtype)
    student = (teacher.float() + torch.randn(520, 4099)).to(dtype)
    check(student, teacher, divergence, temperature=4.0)


@pytest.mark.parametrize("divergence", KLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [700, 1500, 4800])
@pytest.mark.parametrize("level", [-90.0, -200.0, -torch.inf, 60.0, 120.0])
def test_words_far_from_the_rest(isa, dtype, divergence, at, level):
    """Logits for which powers of two are not looked up in a table, in one chunk of several and on one side or both."""
    sides = [{"student", "teacher"}]
    if level < 0:  # else all mass of one side lies where the other has none, and the gradient is a difference of ones
        sides.append({"teacher"})
    if level < 0 and (divergence == "reverse_kl" or level > -torch.inf):  # else the value is infinite
        sides.append({"student"})
    for far in sides:
        student, teacher = torch.randn(3, 5056), torch.randn(3, 5056)
        if "teacher" in far:
            teacher[1, at : at + 3] += level
        if "student" in far or (divergence == "reverse_kl" and level == -torch.inf):
            student[1, at : at + 3] += level
        check(student.to(dtype), teacher.to(dtype), divergence)


@pytest.mark.parametrize("divergence", KLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_what_is_no_number_stays_in_its_row(isa, dtype, divergence, value, whose):
    logits = {"student": torch.randn(3, 4096).to(dtype), "teacher": torch.randn(3, 4096).to(dtype)}
    logits[whose][1, 2600] = value
    rows, grad, true_rows, true_grad = outcome(logits["student"], logits["teacher"], divergence)
    assert rows[1].isnan() and grad[1].isnan().all()
    others = [0, 2]
    torch.testing.assert_close(rows[others].double(), true_rows[others], rtol=1e-5, atol=0)
    assert grad[others].isfinite().all() and true_grad[others].isfinite().all()


@pytest.mark.parametrize("moved", [700.0, -3000.0, 1e5, 1e6])  # the last one is beyond the steps of a table of powers
@pytest.mark.parametrize("divergence", KLS)
def test_logits_that_lie_elsewhere(isa, divergence, moved):
    """A constant added to all logits of one of the two costs what rounding them costs."""
    student, teacher = torch.randn(3, 5000, dtype=torch.float64), torch.randn(3, 5000, dtype=torch.float64)
    check((student + moved).float(), (teacher + moved).float(), divergence)
    check((student + moved).float(), teacher.float(), divergence, tolerance=1e-5 + abs(moved) * 2.0**-23)


def test_a_value_alone_is_that_of_the_loss(isa):
    student, teacher = torch.randn(4, 2000), torch.randn(4, 2000)
    with torch.no_grad():
        alone = pyfast.distillation_loss(student, teacher)
    torch.testing.assert_close(pyfast.distillation_loss(student.requires_grad_(), teacher).detach(), alone)
