"""Every CUDA kernel once or twice at small and odd shapes, its results compared with plain torch: what gpu.sh runs
under compute-sanitizer. Raises AssertionError where a result is wrong; prints ok at the end."""

from __future__ import annotations

import torch

import pyfast
from pyfast.ops import bitmap_convert, sparse24_convert
from pyfast.ops.distill_kl import DIVERGENCES
from pyfast.ops.topk_distill import TAILS
from pyfast.sparse.scattered import ScatteredLayout
from pyfast.sparse.sliced import SlicedLayout

SHAPES = ((50, 136), (97, 1029))
TOKENS = (1, 3, 8, 13)
BFLOAT16 = 2.0**-8


def near(got: torch.Tensor, truth: torch.Tensor, tolerance: float = BFLOAT16) -> None:
    """Asserts that the relative error is at most the tolerance."""
    got, truth = got.detach(), truth.detach()
    error = (got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)
    assert float(error) <= tolerance, f"relative error {float(error):.2e}, accepted: {tolerance:.2e}"


def products() -> None:
    """Products with both formats, their conversions and gradients."""
    for n, k in SHAPES:
        dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        mask = torch.rand(n, k, device="cuda") < 0.4
        bitmap = pyfast.BitmapWeight.from_dense(dense, mask=mask)
        assert torch.equal(bitmap.to_dense(), torch.where(mask, dense, 0))
        pair = sparse24_convert.prune(dense)
        two_four = pyfast.Sparse24Weight(*pair, (n, k))
        sliced, scattered = SlicedLayout.of(bitmap), ScatteredLayout.of(bitmap)
        for tokens in TOKENS:
            x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
            for weight in (bitmap, two_four):
                near(pyfast.sparse_linear(x, weight, backend="cuda"), x.double() @ weight.to_dense().double().T)
            near(scattered.linear(x, None, 0, None), x.double() @ bitmap.to_dense().double().T)
            if tokens <= 8:
                near(sliced.linear(x, None, 0, None), x.double() @ bitmap.to_dense().double().T)
        for tokens in TOKENS[1::2]:
            x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            grad = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16)
            exact = (grad.double().T @ x.detach().double()).float()
            stored = bitmap.values.numel()
            for weight, truth in (
                (bitmap, bitmap_convert.gather(exact, bitmap.bitmaps, bitmap.offsets, stored)),
                (two_four, sparse24_convert.gather(exact, two_four.metadata)),
            ):
                wanted = (x, weight.values.requires_grad_())
                grad_x, grad_values = torch.autograd.grad(pyfast.sparse_linear(x, weight), wanted, grad)
                near(grad_x, grad.double() @ weight.to_dense().double())
                near(grad_values, truth)


def losses() -> None:
    """Every divergence, in one block and in a cluster of them."""
    for rows, words in ((3, 1000), (2, 130001)):
        student, teacher = (torch.randn(rows, words, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for divergence in DIVERGENCES:
            leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
            loss = pyfast.distillation_loss(leaf, teacher, divergence, backend="cuda")
            truth = pyfast.distillation_loss(exact, teacher.double(), divergence, backend="reference")
            near(loss, truth, 1e-4)
            near(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(truth, exact)[0], 2 * BFLOAT16)


def topk_losses() -> None:
    """Every tail, in one block and in a cluster of them; ids that repeat."""
    for rows, words, named in ((3, 1000, 40), (2, 130001, 300)):
        student = torch.randn(rows, words, device="cuda", dtype=torch.bfloat16)
        entries, ids = torch.randn(rows, words, device="cuda").log_softmax(-1).topk(named)
        ids[:, 1] = ids[:, 0]
        for tail in (*TAILS, None):
            leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
            weights = entries.exp() if tail is None else None
            loss = pyfast.topk_distillation_loss(leaf, ids, entries, tail, weights=weights, backend="cuda")
            truth = pyfast.topk_distillation_loss(exact, ids, entries, tail, weights=weights, backend="reference")
            near(loss, truth, 1e-4)
            near(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(truth, exact)[0], 2 * BFLOAT16)


if __name__ == "__main__":
    torch.manual_seed(0)
    products()
    losses()
    topk_losses()
    torch.cuda.synchronize()
    print("ok")
