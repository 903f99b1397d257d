"""What the tests of linear_distill share: a case with both models' hidden states and heads, fused and not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from conftest import relative_error

import pyfast

# What rounding gradients of logits and results to the dtype costs beyond the plain formula in that dtype.
SLACK = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Case:
    """Hidden states, heads and biases of both, the student's requiring gradients."""

    def __init__(self, *leading, words=101, student=24, teacher=40, dtype=torch.float32):
        self.student_hidden = torch.randn(*leading, student).to(dtype).requires_grad_()
        self.student_head = (torch.randn(words, student) / 3).to(dtype).requires_grad_()
        self.student_bias = torch.randn(words).to(dtype).requires_grad_()
        self.teacher_hidden = torch.randn(*leading, teacher).to(dtype)
        self.teacher_head = (torch.randn(words, teacher) / 4).to(dtype)
        self.teacher_bias = torch.randn(words).to(dtype)

    @property
    def trained(self):
        return [self.student_hidden, self.student_head, self.student_bias]

    def fused(self, **options):
        """Loss and gradients of pyfast."""
        return self.differentiate(pyfast.linear_distillation_loss(**vars(self), **options))

    def plain(self, dtype=torch.float64, weight=1.0, **options):
        """Loss and gradients by the unfused formula over logits in full, in ``dtype``."""
        copy = Case.__new__(Case)
        for name, tensor in vars(self).items():
            setattr(copy, name, tensor.detach().to(dtype).requires_grad_(tensor.requires_grad))
        student = F.linear(copy.student_hidden, copy.student_head, copy.student_bias)
        teacher = F.linear(copy.teacher_hidden, copy.teacher_head, copy.teacher_bias)
        return copy.differentiate(pyfast.distillation_loss(student, teacher, backend="reference", **options), weight)

    def differentiate(self, loss, weight=1.0):
        return loss.detach(), torch.autograd.grad((loss * weight).sum(), self.trained)


def check(got, truth, tolerance=2e-6):
    assert relative_error(got[0], truth[0]) < tolerance
    for grad, true_grad in zip(got[1], truth[1], strict=True):
        assert relative_error(grad, true_grad) < tolerance
