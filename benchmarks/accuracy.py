"""The generated table of accuracy in docs/kernels.md: losses and gradients against float64, pyfast's and others'.

    python benchmarks/accuracy.py [--json benchmarks/results/<device>/accuracy.json] [--write docs/kernels.md]

Pairs of rows of logits are drawn so that their forward KL, as they are given to the losses, has a chosen size; every
divergence is computed of the same pairs, a row at a time. The truth is the textbook formula in float64 of the
same logits: where these are bfloat16, their rounding is no error of anybody. A loss's error is relative, a gradient's
the norm of the difference over the norm; the worst row counts. TRL's and Liger's formulas are run where those packages
are importable, in the dtype of the logits, as they would be.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from generated import publish
from torch import Tensor

import pyfast
from pyfast.bench import environment
from pyfast.bench.options import Options
from pyfast.bench.readme import markdown

ROWS, VOCAB, SEED = 32, 32000, 0
TARGETS = (1e-7, 1e-5, 1e-3, 1.0, 10.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALPHA, BETA = 0.1, 0.5  # the defaults of pyfast.distillation_loss

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [1, V] of student and teacher to a scalar


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _mixture(log_t: Tensor, log_s: Tensor, share: float) -> Tensor:
    return torch.logaddexp(log_t + math.log(share), log_s + math.log1p(-share))


def _jsd(log_s: Tensor, log_t: Tensor) -> Tensor:
    log_m = _mixture(log_t, log_s, BETA)
    return BETA * _kl(log_t, log_m) + (1 - BETA) * _kl(log_s, log_m)


TEXTBOOK = {
    "forward_kl": lambda log_s, log_t: _kl(log_t, log_s),
    "reverse_kl": lambda log_s, log_t: _kl(log_s, log_t),
    "jsd": _jsd,
    "skew_kl": lambda log_s, log_t: _kl(log_t, _mixture(log_t, log_s, ALPHA)),
}
# What generalised Jensen-Shannon divergences call ours: their share β.
GENERALISED = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}


def textbook(divergence: str) -> Loss:
    """The definition, in the dtype of the logits."""
    return lambda s, t: TEXTBOOK[divergence](s.log_softmax(-1), t.log_softmax(-1))


def peers() -> dict[str, Callable[[Tensor, Tensor, float], Tensor]]:
    """Generalised Jensen-Shannon divergences of other packages that are importable, by name."""
    found: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {}
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.gkd import GKDTrainer

        found["TRL"] = lambda s, t, beta: GKDTrainer.generalized_jsd_loss(s, t, beta=beta, reduction="sum")
    except ImportError:
        pass
    try:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

        # The formula of its fused linear loss, which calls it with logits in the dtype of the product.
        liger = LigerFusedLinearJSDFunction.distillation_loss_fn
        found["Liger"] = lambda s, t, beta: liger(s, t, beta=beta)
    except ImportError:
        pass
    return found


def implementations(divergence: str) -> dict[str, Loss]:
    """Losses by name, those that know the divergence."""
    found: dict[str, Loss] = {
        "pyfast": lambda s, t: pyfast.distillation_loss(s, t, divergence, alpha=ALPHA, beta=BETA, reduction="sum"),
        "textbook": textbook(divergence),
    }
    if divergence in GENERALISED:
        for name, loss in peers().items():
            found[name] = lambda s, t, loss=loss: loss(s, t, GENERALISED[divergence])
    return found


def pair(target: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [ROWS, VOCAB] of student and teacher, in ``dtype``, with a forward KL close to ``target`` in every row."""
    generator = torch.Generator().manual_seed(SEED)
    student = (torch.randn(ROWS, VOCAB, generator=generator) * 3).to(dtype)
    noise = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    exact = student.double()
    # A word that would add too much in a single step of the dtype keeps its logit.
    step = exact * torch.finfo(dtype).eps
    noise[exact.softmax(-1) * step.square() > target / 10] = 0.0

    def teacher(log_scale: Tensor) -> Tensor:
        return (exact + noise * log_scale.exp()).to(dtype)

    low, high = (torch.full((ROWS, 1), math.log(scale), dtype=torch.float64) for scale in (1e-8, 1e2))
    for _ in range(40):
        middle = (low + high) / 2
        log_s, log_t = exact.log_softmax(-1), teacher(middle).double().log_softmax(-1)
        below = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1, keepdim=True) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return student, teacher(low)


def value_and_grad(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    return value.detach().double(), student.grad.double()


def worst_errors(loss: Loss, truth: Loss, student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """Of loss and gradient, the worst of the rows."""
    losses, gradients = [], []
    for row in range(len(student)):
        s, t = student[row : row + 1], teacher[row : row + 1]
        value, grad = value_and_grad(loss, s, t)
        true_value, true_grad = value_and_grad(truth, s.double(), t.double())
        losses.append(float(abs(value - true_value) / true_value))
        gradients.append(float((grad - true_grad).norm() / true_grad.norm()))
    return float(torch.tensor(losses).max()), float(torch.tensor(gradients).max())  # NaN stays


def measure() -> dict[str, Any]:
    """Everything that the table shows."""
    results = []
    for dtype_name, dtype in DTYPES.items():
        for target in TARGETS:
            student, teacher = pair(target, dtype)
            for divergence in TEXTBOOK:
                truth = textbook(divergence)
                value = float(truth(student.double(), teacher.double())) / ROWS
                for name, loss in implementations(divergence).items():
                    of_loss, of_gradient = worst_errors(loss, truth, student, teacher)
                    results.append(
                        {
                            "dtype": dtype_name,
                            "divergence": divergence,
                            "kl": target,
                            "value": value,
                            "impl": name,
                            "loss_error": of_loss,
                            "gradient_error": of_gradient,
                        }
                    )
    versions = {"trl": environment.version("trl"), "liger_kernel": environment.version("liger_kernel")}
    return {
        "environment": {**environment.describe(Options(seed=SEED)), **versions},
        "rows": ROWS,
        "vocab": VOCAB,
        "results": results,
    }


def text(figures: dict) -> str:
    """Two tables, float32 and bfloat16 logits."""
    about = figures["environment"]
    named = [("TRL", "trl"), ("Liger", "liger_kernel")]
    others = "".join(f", {name} {about[key]}" for name, key in named if about.get(key))
    results = figures["results"]
    parts = [
        f"**{about['device']}**, kernels {about['isa']}, torch {about['torch']}{others}; {figures['rows']} rows of "
        f"{figures['vocab']} words. *KL* is the forward KL of the rows, *value* the mean divergence. Cells: "
        "relative error of the loss / of the gradient, the worst row."
    ]
    for dtype in dict.fromkeys(r["dtype"] for r in results):
        mine = [r for r in results if r["dtype"] == dtype]
        names = list(dict.fromkeys(r["impl"] for r in mine))
        rows = []
        for divergence, kl in dict.fromkeys((r["divergence"], r["kl"]) for r in mine):
            found = {r["impl"]: r for r in mine if (r["divergence"], r["kl"]) == (divergence, kl)}
            cells = [
                f"{found[name]['loss_error']:.1e} / {found[name]['gradient_error']:.1e}" if name in found else "-"
                for name in names
            ]
            rows.append([f"`{divergence}`", f"{kl:g}", f"{found['pyfast']['value']:.1e}", *cells])
        rows.sort(key=lambda row: [f"`{each}`" for each in TEXTBOOK].index(row[0]))
        parts.append(markdown([f"{dtype} logits", "KL", "value", *names], rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    publish("accuracy", __doc__.splitlines()[0], measure, text)
