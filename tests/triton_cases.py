"""Cases of the distillation kernels on a GPU, and the program that runs Triton's: this file (triton_programs.py).

``test_triton_distill_kl.py`` judges what it saves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from triton_programs import error_of, poisoned

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
MIXTURES = ("jsd", "skew_kl", "skew_reverse_kl")
DIVERGENCES = ("forward_kl", "reverse_kl", *MIXTURES, "tvd", "mse")


@dataclass
class Inputs:
    """Arguments of one call, in the order of the schema of ``pyfast::distill_kl``."""

    student: torch.Tensor
    teacher: torch.Tensor
    row_scale: torch.Tensor
    divergence: str = "forward_kl"
    mix: float = 0.3
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    student_softcap: float = 0.0
    teacher_softcap: float = 0.0
    labels: torch.Tensor | None = None
    ce_scale: torch.Tensor | None = None
    with_grad: bool = True

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


Case = Callable[[str], Inputs]
CASES: dict[str, Case] = {}


def case(build: Case) -> Case:
    CASES[build.__name__] = build
    return build


def draw(rows: int, width: int, dtype: str, device: str, seed: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator) * spread).to(DTYPES[dtype]).to(device)


def scales(rows: int, device: str) -> torch.Tensor:
    return torch.linspace(0.5, -1.75, rows).to(device)


def plain(rows: int, width: int, dtype: str, divergence: str = "forward_kl", **options: Any) -> Case:
    def build(device: str) -> Inputs:
        student = draw(rows, width, dtype, device, seed=width)
        teacher = draw(rows, width, dtype, device, seed=width + 1)
        return Inputs(student, teacher, scales(rows, device), divergence, **options)

    return build


def full(width: int, dtype: str, divergence: str) -> Case:
    """Temperatures apart, caps and cross-entropy. Row 1 has no cross-entropy and no label; row 2 only that."""

    def build(device: str) -> Inputs:
        inputs = plain(4, width, dtype, divergence)(device)
        inputs.labels = torch.tensor([0, -100, width // 2, width - 1], device=device)
        inputs.ce_scale = torch.tensor([1.5, 0.0, 0.5, -1.0], device=device)
        inputs.row_scale[2] = 0.0
        return replace(
            inputs, student_temperature=2.0, teacher_temperature=0.5, student_softcap=5.0, teacher_softcap=7.0
        )

    return build


def near(
    width: int, distance: float, divergence: str = "forward_kl", temperature: float = 1.0, cap: float = 0.0
) -> Case:
    def build(device: str) -> Inputs:
        teacher = draw(2, width, "f32", device, seed=5)
        student = teacher + draw(2, width, "f32", device, seed=6, spread=distance)
        scale = torch.ones(2, device=device)
        return Inputs(student, teacher, scale, divergence, 0.3, temperature, temperature, cap, cap)

    return build


def equal(width: int, divergence: str) -> Case:
    def build(device: str) -> Inputs:
        logits = draw(1, width, "f32", device, seed=9)
        scale = torch.ones(1, device=device)
        return Inputs(logits, logits.clone(), scale, divergence, 0.3, 3.0, 3.0, 20.0, 20.0)

    return build


def with_nan(width: int, dtype: str, divergence: str) -> Case:
    def build(device: str) -> Inputs:
        inputs = plain(5, width, dtype, divergence)(device)
        inputs.student[1, width // 2] = math.nan
        inputs.teacher[3, width - 1] = math.nan
        inputs.teacher[3, 0] = -math.inf
        return inputs

    return build


def unread(width: int, dtype: str, divergence: str, labelled: bool) -> Case:
    """Rows 1 and 4 do not count, whatever they hold."""

    def build(device: str) -> Inputs:
        inputs = plain(5, width, dtype, divergence)(device)
        inputs.student[1] = math.nan
        inputs.teacher[4] = math.inf
        without = torch.tensor([1, 4], device=device)
        inputs.row_scale[without] = torch.tensor([0.0, -0.0], device=device)
        if labelled:
            inputs.ce_scale = inputs.row_scale.clone()
            inputs.labels = torch.tensor([3, -100, 5, 7, width], device=device)
        return inputs

    return build


def labels_alone(width: int, dtype: str, divergence: str) -> Case:
    """Rows 0 to 3 have their cross-entropy alone: their divergence is NaN or infinite."""

    def build(device: str) -> Inputs:
        inputs = plain(5, width, dtype, divergence, student_softcap=20.0)(device)
        inputs.teacher[0] = math.nan
        inputs.teacher[1] = -math.inf
        inputs.teacher[2, 0] = math.inf
        inputs.student[3, width // 3] = -math.inf
        inputs.row_scale = torch.tensor([0.0, -0.0, 0.0, 0.0, 0.7], device=device)
        inputs.labels = torch.tensor([0, width - 1, 5, 7, width // 2], device=device)
        inputs.ce_scale = torch.full((5,), 0.25, device=device)
        return inputs

    return build


def excluded(width: int, dtype: str, divergence: str) -> Case:
    """Row 0: the teacher excludes words; row 1: both do; row 2: the student lacks one of the teacher's."""

    def build(device: str) -> Inputs:
        inputs = plain(3, width, dtype, divergence)(device)
        inputs.teacher[:2, ::3] = -math.inf
        inputs.student[1, ::6] = -math.inf
        inputs.student[2, width // 3] = -math.inf
        inputs.row_scale.fill_(0.5)
        return inputs

    return build


def underflow(width: int, divergence: str) -> Case:
    """Probabilities far below the smallest float32 on either side, and logits with an offset."""

    def build(device: str) -> Inputs:
        inputs = plain(2, width, "f32", divergence)(device)
        inputs.teacher[:, 100:200] -= 300.0
        inputs.student[:, 150:300] -= 300.0
        inputs.student += 50.0
        return inputs

    return build


for _d in DIVERGENCES:
    for _dtype in DTYPES:
        for _rows, _width in ((3, 1), (5, 17), (2, 1000), (1, 8192), (1, 8193)):
            CASES[f"plain-{_d}-{_width}-{_dtype}"] = plain(_rows, _width, _dtype, _d)
    CASES[f"plain-{_d}-32000-bf16"] = plain(1, 32000, "bf16", _d)
    for _width, _dtype in ((1000, "f32"), (9001, "bf16")):
        CASES[f"full-{_d}-{_width}"] = full(_width, _dtype, _d)
        CASES[f"near-{_d}-{_width}"] = near(_width, 4.5e-4, _d)
        CASES[f"nearcap-{_d}-{_width}"] = near(_width, 4.5e-4, _d, cap=30.0)
        CASES[f"equal-{_d}-{_width}"] = equal(_width, _d)
        CASES[f"nan-{_d}-{_width}"] = with_nan(_width, _dtype, _d)
        CASES[f"unread-{_d}-{_width}"] = unread(_width, _dtype, _d, labelled=False)
        CASES[f"alone-{_d}-{_width}"] = labels_alone(_width, _dtype, _d)
        CASES[f"excluded-{_d}-{_width}"] = excluded(_width, _dtype, _d)
        CASES[f"underflow-{_d}-{_width}"] = underflow(_width, _d)
        CASES[f"value-{_d}-{_width}"] = plain(2, _width, _dtype, _d, with_grad=False, student_temperature=2.0)
    CASES[f"border-{_d}"] = near(1000, 0.25, _d)  # where series end
for _d in MIXTURES:
    CASES[f"share-{_d}-little"] = plain(3, 1000, "f32", _d, mix=0.01)
    CASES[f"share-{_d}-much"] = plain(3, 9000, "f32", _d, mix=0.99)
for _width, _dtype in ((1000, "f32"), (9001, "bf16")):
    CASES[f"unread-labels-{_width}"] = unread(_width, _dtype, "forward_kl", labelled=True)
for _d in ("forward_kl", "jsd"):
    CASES[f"plain-{_d}-151936-bf16"] = plain(1, 151936, "bf16", _d)
CASES["hot"] = plain(3, 1000, "f32", student_temperature=4.0, teacher_temperature=4.0)
CASES["cold"] = plain(3, 9001, "bf16", "reverse_kl", student_temperature=0.5, teacher_temperature=0.5)
CASES["near-hot"] = near(1000, 1.8e-3, temperature=4.0)
CASES["near-11"] = near(1000, 4.5e-6)
CASES["excluded-half"] = excluded(100, "f16", "forward_kl")
CASES["no rows"] = plain(0, 100, "f32")


@case
def padded_rows(device: str) -> Inputs:
    student = draw(5, 1007, "f32", device, seed=11)[:, :1000]
    teacher = draw(10, 1003, "f32", device, seed=12)[::2, 3:]
    return Inputs(student, teacher, scales(5, device))


@case
def padded_rows_wide(device: str) -> Inputs:
    student = draw(3, 9000, "bf16", device, seed=11)[:, :8999]
    teacher = draw(6, 9016, "bf16", device, seed=12)[::2, :8999]
    return Inputs(student, teacher, scales(3, device), "jsd")


@case
def expanded(device: str) -> Inputs:
    """The teacher's rows are one, and so are the factors and labels."""
    teacher = draw(1, 333, "f32", device, seed=13).expand(4, 333)
    one = torch.tensor(0.5, device=device).expand(4)
    labels = torch.tensor(7, device=device).expand(4)
    return Inputs(draw(4, 333, "f32", device, seed=14), teacher, one, labels=labels, ce_scale=one)


@case
def words_apart(device: str) -> Inputs:
    student = draw(333, 4, "f32", device, seed=19).T
    teacher = draw(4, 666, "f32", device, seed=20)[:, ::2]
    return Inputs(student, teacher, scales(4, device))


@case
def mixed_dtypes(device: str) -> Inputs:
    return Inputs(draw(3, 777, "bf16", device, seed=15), draw(3, 777, "f32", device, seed=16), scales(3, device))


@case
def far_rows(device: str) -> Inputs:
    """Row 3 begins 3·2³⁰ words after row 0; only the pages of the rows are ever touched."""
    words = draw(4, 65, "bf16", device, seed=17)
    student = torch.empty(3 * 2**30 + 65, dtype=torch.bfloat16, device=device).as_strided((4, 65), (2**30, 1))
    student.copy_(words)
    return Inputs(student, draw(4, 65, "bf16", device, seed=18), scales(4, device))


def wrong_labels(width: int) -> Case:
    """Labels below, at and above the range count in rows 1, 2 and 3; they do not in row 4."""

    def build(device: str) -> Inputs:
        inputs = plain(5, width, "f32", "jsd")(device)
        inputs.labels = torch.tensor([width - 1, -1, width, 2**40, -100], device=device)
        inputs.ce_scale = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0], device=device)
        return inputs

    return build


WRONG_LABELS = {"resident": wrong_labels(100), "streamed": wrong_labels(9000)}

BAD: dict[str, tuple[type[Exception], str, Callable[[], dict[str, Any]]]] = {
    "shapes": (ValueError, "teacher", lambda: {"teacher": torch.zeros(2, 5)}),
    "one dimension": (ValueError, "student", lambda: {"student": torch.zeros(4)}),
    "no words": (ValueError, "student", lambda: {"student": torch.zeros(2, 0), "teacher": torch.zeros(2, 0)}),
    "dtype": (TypeError, "student", lambda: {"student": torch.zeros(2, 4, dtype=torch.float64)}),
    "teacher dtype": (TypeError, "teacher", lambda: {"teacher": torch.zeros(2, 4, dtype=torch.int32)}),
    "scale shape": (ValueError, "row_scale", lambda: {"row_scale": torch.zeros(3)}),
    "scale dtype": (TypeError, "row_scale", lambda: {"row_scale": torch.zeros(2, dtype=torch.float64)}),
    "device": (ValueError, "teacher", lambda: {"teacher": torch.zeros(2, 4, device="meta")}),
    "divergence": (ValueError, "divergence", lambda: {"divergence": "backward_kl"}),
    "share": (ValueError, "mix", lambda: {"divergence": "jsd", "mix": 1.0}),
    "zero temperature": (ValueError, "student_temperature", lambda: {"student_temperature": 0.0}),
    "nan temperature": (ValueError, "teacher_temperature", lambda: {"teacher_temperature": math.nan}),
    "negative cap": (ValueError, "student_softcap", lambda: {"student_softcap": -1.0}),
    "nan cap": (ValueError, "teacher_softcap", lambda: {"teacher_softcap": math.nan}),
    "labels alone": (ValueError, "ce_scale", lambda: {"labels": torch.zeros(2, dtype=torch.int64)}),
    "ce_scale alone": (ValueError, "labels", lambda: {"ce_scale": torch.zeros(2)}),
    "labels dtype": (TypeError, "labels", lambda: {"labels": torch.zeros(2), "ce_scale": torch.zeros(2)}),
    "labels shape": (
        ValueError,
        "labels",
        lambda: {"labels": torch.zeros(3, dtype=torch.int64), "ce_scale": torch.zeros(2)},
    ),
}


# Relative tolerances of value and gradient close to convergence. A KL of 1e-7 is an |x| of 4.5e-4; float32 leaves an
# error c of 3e-7 in the log-sum-exps, and so in every x. It moves a KL by c²/2, and the gradient t·x of the forward
# one by t·c. tvd and mse are sums of |x| and x², which feel it in the value; and where |x| is below it, tvd takes the
# wrong sign. A cap adds the rounding of tanh, 1e-6 a logit.
NEAR = {"forward_kl": (1e-4, 5e-3), "tvd": (3e-3, 1e-1), "mse": (5e-3, 5e-3)}
NEAR_KL = (1e-4, 1e-4)
CAPPED = (1e-2, 1e-1)


def tolerances(name: str) -> tuple[float, float]:
    kind, _, rest = name.partition("-")
    if kind == "near":
        return {"11": (1e-2, 3e-1), "hot": NEAR["forward_kl"]}.get(rest) or NEAR.get(rest.split("-")[0], NEAR_KL)
    return CAPPED if kind == "nearcap" else (2e-5, 2e-5)


def truth(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, the cross-entropy's part and the gradient, by the formulas in float64."""
    from pyfast.reference import distill_kl as reference  # not where Triton is chosen

    student = inputs.student.double().requires_grad_()
    _, teacher, row_scale, *options, labels, ce_scale, _ = inputs.arguments()
    ce_scale = None if ce_scale is None else ce_scale.double()
    if labels is not None:
        labels = labels.clamp(0, student.shape[1] - 1)
    rows, ce_rows = reference.distill_kl(student, teacher.double(), row_scale.double(), *options, labels, ce_scale)
    (grad,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach(), ce_rows, grad


#: A NaN that becomes another one when it is multiplied by 1: shows whether a row was touched.
SIGNALLING = {torch.float32: 0x7F800001, torch.bfloat16: 0x7F81, torch.float16: 0x7C01}


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def gradient(dtype: str, device: str) -> torch.Tensor:
    """[4, 4099] with padding behind the rows; rows 1 and 2 hold signalling NaNs besides."""
    grad = draw(4, 4100, dtype, device, seed=21)[:, :4099]
    bits(grad)[1:3, ::7] = SIGNALLING[grad.dtype]
    return grad


def scaled(device: str) -> dict[str, torch.Tensor]:
    """Rows scaled in place and into a new tensor, by factors of stride 1 and 0."""
    from pyfast.triton_kernels.scale_rows import scale_rows, scale_rows_

    factors = {"apart": torch.tensor([2.0, 1.0, 1.0, -0.5]), "ones": torch.tensor(1.0).expand(4)}
    factors["half"] = torch.tensor(0.5).expand(4)
    results = {}
    for dtype in DTYPES:
        for name, factor in factors.items():
            factor = factor.to(device)
            grad = gradient(dtype, device)
            with poisoned():
                results[f"new-{dtype}-{name}"] = scale_rows(grad, factor).cpu()
                results[f"transposed-{dtype}-{name}"] = scale_rows(grad.T.contiguous().T, factor).cpu()
            results[f"kept-{dtype}-{name}"] = grad.cpu().contiguous()
            scale_rows_(grad, factor)
            results[f"in place-{dtype}-{name}"] = grad.cpu().contiguous()
    return results


def worker(device: str, target: str) -> None:
    """Run every case on ``device`` and save what came out to ``target``."""
    from pyfast.triton_kernels.distill_kl import distill_kl
    from pyfast.triton_kernels.scale_rows import scale_rows_

    def run(build: Case) -> tuple[torch.Tensor, ...]:
        arguments = build(device).arguments()
        with poisoned():
            return tuple(result.cpu() for result in distill_kl(*arguments))

    good = Inputs(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(2))
    outcome = {
        "results": {name: run(build) for name, build in CASES.items()},
        "wrong labels": {name: run(build) for name, build in WRONG_LABELS.items()},
        "scaled": scaled(device),
        "errors": {
            name: error_of(lambda change=change: distill_kl(*replace(good, **change()).arguments()))
            for name, (_, _, change) in BAD.items()
        },
        "words apart": error_of(lambda: scale_rows_(torch.zeros(4, 2).T, torch.ones(2))),
    }
    torch.save(outcome, target)


if __name__ == "__main__":
    worker(*sys.argv[1:])
