"""The loss through a linear head on a GPU: whole and in chunks against float64, and its memory."""

from __future__ import annotations

import pytest
import torch

import pyfast

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

TOKENS, WORDS, WIDTH = 300, 4099, 128


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    draw = [torch.randn(*shape, device="cuda") for shape in ((TOKENS, WIDTH), (WORDS, WIDTH)) * 2]
    hidden, head, teacher_hidden, teacher_head = (x.div_(WIDTH**0.25).to(dtype) for x in draw)
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_size", [None, 128])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_against_float64(divergence: str, chunk_size: int | None, dtype: torch.dtype) -> None:
    given = operands(dtype)
    labels = torch.randint(0, WORDS, (TOKENS,), device="cuda")
    labels[::7] = -100
    options = {"labels": labels, "ce_weight": 0.3, "temperature": 2.0}
    loss = pyfast.linear_distillation_loss(*given, divergence, chunk_size=chunk_size, **options)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    truth = pyfast.linear_distillation_loss(*exact, divergence, backend="reference", **options)
    # Logits are rounded to the dtype; float32 products may run in tf32.
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-11}[dtype]
    assert abs(loss.item() - truth.item()) < 2 * rounding * abs(truth.item())
    gradients = torch.autograd.grad(loss, given[:2])
    for got, want in zip(gradients, torch.autograd.grad(truth, exact[:2]), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() < 4 * rounding * want.norm()


def test_memory_is_that_of_the_gradients_and_a_few_chunks() -> None:
    hidden, head, teacher_hidden, teacher_head = operands(torch.bfloat16)
    chunk = 30
    pyfast.linear_distillation_loss(hidden, head, teacher_hidden, teacher_head, chunk_size=chunk).backward()
    hidden.grad = head.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pyfast.linear_distillation_loss(hidden, head, teacher_hidden, teacher_head, chunk_size=chunk).backward()
    grown = torch.cuda.max_memory_allocated() - before
    logits, gradient = chunk * WORDS * 2, WORDS * WIDTH * (4 + 2)
    assert grown < 4 * logits + 1.2 * gradient + (1 << 20) < TOKENS * WORDS * 4 * 3
