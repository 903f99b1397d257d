"""The Triton distillation kernel against float64: in the interpreter, and on a GPU if there is one.

Triton chooses between interpreter and compiler when it is imported. The cases therefore run in a process of
their own, which is this file started as a program; it saves its results and the tests judge them here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass
class Inputs:
    """Arguments of one call."""

    student: torch.Tensor
    teacher: torch.Tensor
    row_scale: torch.Tensor
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    with_grad: bool = True


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


def plain(rows: int, width: int, dtype: str, student_temperature: float, teacher_temperature: float) -> Case:
    def build(device: str) -> Inputs:
        student = draw(rows, width, dtype, device, seed=width)
        teacher = draw(rows, width, dtype, device, seed=width + 1)
        return Inputs(student, teacher, scales(rows, device), student_temperature, teacher_temperature)

    return build


SHAPES = [(3, 1), (5, 17), (4, 1000), (3, 1024), (2, 8192), (2, 8193), (3, 32000), (3, 50257), (2, 151936)]
for _rows, _width in SHAPES:
    for _dtype in DTYPES:
        CASES[f"plain_{_width}_{_dtype}"] = plain(_rows, _width, _dtype, 1.0, 1.0)
for _name, _student, _teacher in (("hot", 4.0, 4.0), ("cold", 0.5, 0.5), ("apart", 2.0, 0.5)):
    CASES[f"temperature_{_name}"] = plain(3, 1000, "f32", _student, _teacher)
    CASES[f"temperature_{_name}_wide"] = plain(2, 10007, "bf16", _student, _teacher)


def near(rows: int, width: int, distance: float, dtype: str, temperature: float) -> Case:
    def build(device: str) -> Inputs:
        teacher = draw(rows, width, "f32", device, seed=5)
        student = teacher + draw(rows, width, "f32", device, seed=6, spread=distance)
        logits = student.to(DTYPES[dtype]), teacher.to(DTYPES[dtype])
        return Inputs(*logits, torch.ones(rows, device=device), temperature, temperature)

    return build


# KL near 1e-7, 1e-11 and, where q changes its formula (|x| = 1/4), 3e-2. An error c of 3e-7 in the
# log-sum-exps, which is what float32 allows, moves the value by c²/2 and the gradient t·x by t·c. Relative
# tolerances of value and gradient:
NEAR = {
    "near_7": (1e-4, 5e-3),
    "near_7_wide": (1e-4, 5e-3),
    "near_7_hot": (1e-4, 5e-3),
    "near_11": (1e-2, 3e-1),
}
CASES["near_7"] = near(4, 1000, 4.5e-4, "f32", 1.0)
CASES["near_7_wide"] = near(2, 50257, 4.5e-4, "f32", 1.0)
CASES["near_7_hot"] = near(4, 1000, 1.8e-3, "f32", 4.0)
CASES["near_11"] = near(4, 1000, 4.5e-6, "f32", 1.0)
CASES["near_border"] = near(4, 1000, 0.25, "f32", 1.0)


@case
def equal(device: str) -> Inputs:
    logits = draw(3, 1000, "f32", device, seed=9)
    return Inputs(logits, logits.clone(), torch.ones(3, device=device))


@case
def padded_rows(device: str) -> Inputs:
    student = draw(5, 1007, "f32", device, seed=11)[:, :1000]
    teacher = draw(10, 1003, "f32", device, seed=12)[::2, 3:]
    return Inputs(student, teacher, scales(5, device))


@case
def padded_rows_wide(device: str) -> Inputs:
    student = draw(3, 9000, "bf16", device, seed=11)[:, :8999]
    teacher = draw(6, 9016, "bf16", device, seed=12)[::2, :8999]
    return Inputs(student, teacher, scales(3, device))


@case
def expanded_teacher(device: str) -> Inputs:
    teacher = draw(1, 333, "f32", device, seed=13).expand(4, 333)
    return Inputs(draw(4, 333, "f32", device, seed=14), teacher, scales(4, device))


@case
def words_apart(device: str) -> Inputs:
    student = draw(333, 4, "f32", device, seed=19).T
    teacher = draw(4, 666, "f32", device, seed=20)[:, ::2]
    return Inputs(student, teacher, torch.tensor(0.5, device=device).expand(4))


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


@case
def value_only(device: str) -> Inputs:
    inputs = plain(4, 1000, "f32", 2.0, 2.0)(device)
    inputs.with_grad = False
    return inputs


@case
def value_only_wide(device: str) -> Inputs:
    inputs = plain(2, 10007, "bf16", 2.0, 2.0)(device)
    inputs.with_grad = False
    return inputs


@case
def no_rows(device: str) -> Inputs:
    return plain(0, 100, "f32", 1.0, 1.0)(device)


def with_nan(width: int, dtype: str) -> Case:
    def build(device: str) -> Inputs:
        inputs = plain(5, width, dtype, 1.0, 1.0)(device)
        inputs.student[1, width // 2] = math.nan
        inputs.teacher[3, width - 1] = math.nan
        return inputs

    return build


CASES["nan"] = with_nan(100, "f32")
CASES["nan_wide"] = with_nan(10007, "bf16")


def unread(width: int, dtype: str) -> Case:
    def build(device: str) -> Inputs:
        inputs = plain(5, width, dtype, 1.0, 1.0)(device)
        inputs.student[1] = math.nan
        inputs.teacher[4] = math.inf
        inputs.row_scale[torch.tensor([1, 4])] = torch.tensor([0.0, -0.0], device=device)
        return inputs

    return build


CASES["unread"] = unread(100, "f32")
CASES["unread_wide"] = unread(10007, "bf16")


def excluded(width: int, dtype: str) -> Case:
    """Row 0: the teacher excludes words; row 1: both do; row 2: the student lacks one of the teacher's."""

    def build(device: str) -> Inputs:
        inputs = plain(3, width, dtype, 1.0, 1.0)(device)
        inputs.teacher[:2, ::3] = -math.inf
        inputs.student[1, ::6] = -math.inf
        inputs.student[2, width // 3] = -math.inf
        inputs.row_scale.fill_(0.5)
        return inputs

    return build


CASES["excluded"] = excluded(100, "f32")
CASES["excluded_half"] = excluded(100, "f16")
CASES["excluded_wide"] = excluded(10007, "bf16")


@case
def underflow(device: str) -> Inputs:
    """Probabilities far below the smallest float32 on either side."""
    inputs = plain(2, 600, "f32", 1.0, 1.0)(device)
    inputs.teacher[:, 100:200] -= 300.0
    inputs.student[:, 150:300] -= 300.0
    return inputs


def truth(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient in float64."""
    scale = inputs.row_scale.cpu().double()
    log_s = torch.log_softmax(inputs.student.cpu().double() / inputs.student_temperature, 1)
    log_t = torch.log_softmax(inputs.teacher.cpu().double() / inputs.teacher_temperature, 1)
    s, t = log_s.exp(), log_t.exp()
    rows = scale * torch.where(t == 0, 0.0, t * (log_t - log_s)).sum(1)
    grad = scale[:, None] / inputs.student_temperature * (s - t)
    return torch.where(scale == 0, 0.0, rows), torch.where(scale[:, None] == 0, 0.0, grad)


BAD: dict[str, tuple[type[Exception], str, Callable[[], dict[str, Any]]]] = {
    "shapes": (ValueError, "teacher", lambda: {"teacher": torch.zeros(2, 5)}),
    "one dimension": (ValueError, "student", lambda: {"student": torch.zeros(4)}),
    "no words": (ValueError, "student", lambda: {"student": torch.zeros(2, 0), "teacher": torch.zeros(2, 0)}),
    "dtype": (TypeError, "student", lambda: {"student": torch.zeros(2, 4, dtype=torch.float64)}),
    "teacher dtype": (TypeError, "teacher", lambda: {"teacher": torch.zeros(2, 4, dtype=torch.int32)}),
    "scale shape": (ValueError, "row_scale", lambda: {"row_scale": torch.zeros(3)}),
    "scale dtype": (TypeError, "row_scale", lambda: {"row_scale": torch.zeros(2, dtype=torch.float64)}),
    "device": (ValueError, "teacher", lambda: {"teacher": torch.zeros(2, 4, device="meta")}),
    "zero temperature": (ValueError, "student_temperature", lambda: {"student_temperature": 0.0}),
    "nan temperature": (ValueError, "teacher_temperature", lambda: {"teacher_temperature": math.nan}),
    "divergence": (ValueError, "divergence", lambda: {"divergence": "backward_kl"}),
}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let torch.empty give NaN, so that an element that nobody wrote shows."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).fill_(math.nan)

    torch.empty = filled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


def worker(device: str, target: str) -> None:
    """Run every case on ``device`` and save {"results": …, "errors": …} to ``target``."""
    from pyfast.triton_kernels.distill_kl import distill_kl

    results = {}
    for name, build in CASES.items():
        inputs = build(device)
        with poisoned():
            rows, grad = distill_kl(
                inputs.student,
                inputs.teacher,
                inputs.row_scale,
                "forward_kl",
                inputs.student_temperature,
                inputs.teacher_temperature,
                inputs.with_grad,
            )
        results[name] = rows.cpu(), grad.cpu()
    errors = {}
    for name, (_, _, change) in BAD.items():
        arguments: dict[str, Any] = {
            "student": torch.zeros(2, 4),
            "teacher": torch.zeros(2, 4),
            "row_scale": torch.ones(2),
            "student_temperature": 1.0,
            "teacher_temperature": 1.0,
        }
        try:
            distill_kl(**{**arguments, **change()})
        except (TypeError, ValueError) as error:
            errors[name] = type(error).__name__, str(error)
    torch.save({"results": results, "errors": errors}, target)


def broken_interpreter() -> bool:
    """Triton's interpreter before 3.7 fails on every loop under NumPy 2.4 and later (its issue 9171)."""
    import numpy

    major, minor = (int(part) for part in version("triton").split(".")[:2])
    numpy_major, numpy_minor = (int(part) for part in numpy.__version__.split(".")[:2])
    return (major, minor) < (3, 7) and (numpy_major, numpy_minor) >= (2, 4)


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton", reason="Triton is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if request.param == "interpreter" and broken_interpreter():
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    device = "cuda" if request.param == "cuda" else "cpu"
    target = tmp_path_factory.mktemp("triton") / f"{request.param}.pt"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(Path(__file__).resolve()), device, str(target)]
    done = subprocess.run(command, env=environment, cwd=target.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {"device": device, **torch.load(target)}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(outcome: dict[str, Any], name: str) -> None:
    rows, grad = outcome["results"][name]
    inputs = CASES[name]("cpu")
    want_rows, want_grad = truth(inputs)
    assert rows.dtype == torch.float32
    assert grad.dtype == inputs.student.dtype
    assert grad.is_contiguous()
    value_tolerance, slope_tolerance = NEAR.get(name, (2e-5, 2e-5))
    torch.testing.assert_close(rows.double(), want_rows, rtol=value_tolerance, atol=1e-13, equal_nan=True)
    if not inputs.with_grad:
        assert grad.shape == (0, 0)
        return
    finite = want_grad.isfinite().all(1)
    assert grad[~finite].isnan().all()
    # As good as the exact gradient rounded to its dtype, and a little float32 noise; a row at a time.
    # Probabilities near 1 carry noise of their own size; near cases, whose gradient is t·x, must not show it.
    noise = 0.0 if name.startswith("near") else 2e-7 * inputs.row_scale.cpu().double().abs()[finite]
    rounded = want_grad.to(grad.dtype).double()
    if outcome["device"] == "cpu" and grad.dtype == torch.bfloat16:  # the interpreter cuts off instead
        rounded = (want_grad.float().view(torch.int32) & -65536).view(torch.float32).double()
    rounding = (rounded - want_grad)[finite].norm(dim=1)
    error = (grad.double() - want_grad)[finite].norm(dim=1)
    assert (error <= 1.02 * rounding + slope_tolerance * want_grad[finite].norm(dim=1) + noise).all()


def test_equal_logits_give_zero(outcome: dict[str, Any]) -> None:
    rows, grad = outcome["results"]["equal"]
    assert rows.abs().max() < 1e-12
    assert grad.abs().max() < 1e-7


@pytest.mark.parametrize("name", ["nan", "nan_wide"])
def test_nan_stays_in_its_row(outcome: dict[str, Any], name: str) -> None:
    rows, grad = outcome["results"][name]
    assert rows.isnan().tolist() == [False, True, False, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("name", ["unread", "unread_wide"])
def test_rows_of_scale_zero_are_not_read(outcome: dict[str, Any], name: str) -> None:
    rows, grad = outcome["results"][name]
    assert (rows == 0).tolist() == [False, True, False, False, True]
    assert (grad == 0).all(1).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("name", ["excluded", "excluded_half", "excluded_wide"])
def test_infinite_where_the_student_lacks_mass(outcome: dict[str, Any], name: str) -> None:
    rows, grad = outcome["results"][name]
    assert rows.isfinite().tolist() == [True, True, False]
    assert rows[2] == math.inf
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(outcome: dict[str, Any], name: str) -> None:
    error, argument, _ = BAD[name]
    kind, message = outcome["errors"][name]
    assert kind == error.__name__
    assert message.startswith(argument + ":")
    assert "accepted" in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_captured_in_a_graph() -> None:
    from pyfast.triton_kernels.distill_kl import distill_kl

    inputs = plain(64, 32000, "bf16", 2.0, 2.0)("cuda")
    arguments = (inputs.student, inputs.teacher, inputs.row_scale, "forward_kl", 2.0, 2.0)
    distill_kl(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, grad = distill_kl(*arguments)
    inputs.student.copy_(inputs.student.flip(0))
    graph.replay()
    again_rows, again_grad = distill_kl(*arguments)
    assert torch.equal(rows, again_rows)
    assert torch.equal(grad, again_grad)


def test_compiles_ahead_of_time_without_spills(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    program = (
        "import json\n"
        "from pyfast.triton_kernels import compile\n"
        "cases = [case for case in compile.cases() if case.name.startswith('distill_kl')]\n"
        "cases = [case for case in cases if ' fp16 ' not in case.name]\n"
        "pairs = [(case, target) for case in cases for target in compile.TARGETS]\n"
        "print(json.dumps([compile.resources(*pair) for pair in pairs]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert {target for _, target, *_ in table} == {80, 90, 100}
    assert {name.split()[0] for name, *_ in table} == {"distill_kl_resident", "distill_kl_streamed"}
    for name, target, warps, registers, stack, shared in table:
        assert stack == 0, f"{name} spills {stack} bytes on sm_{target}"
        assert registers * warps * 32 <= 65536, f"{name} does not fit sm_{target}"
        assert shared <= 99 * 1024, f"{name} asks sm_{target} for {shared} bytes of shared memory"


def test_refuses_to_be_a_top_level_module() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "pyfast.triton_kernels" in done.stderr


if __name__ == "__main__":
    worker(*sys.argv[1:])
