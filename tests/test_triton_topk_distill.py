"""The Triton kernels of topk_distill against float64: in the interpreter, and on a GPU if there is one.

The cases run in this file started as a program, see ``triton_programs.py``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from topk_cases import truth
from triton_cases import draw, scales
from triton_programs import PLACES, check_compiled, error_of, poisoned, saved_by

MODES = ("bucket", "ignore", "renormalise", "sampled")


@dataclass
class Inputs:
    """Arguments of one call."""

    student: torch.Tensor
    ids: torch.Tensor
    entries: torch.Tensor
    row_scale: torch.Tensor
    mode: str = "bucket"
    temperature: float = 1.0
    with_grad: bool = True


Case = Callable[[str], Inputs]
CASES: dict[str, Case] = {}


def case(build: Case) -> Case:
    CASES[build.__name__] = build
    return build


def plain(
    rows: int, width: int, count: int, dtype: str, mode: str, temperature: float = 1.0, with_grad: bool = True
) -> Case:
    def build(device: str) -> Inputs:
        log_p = torch.log_softmax(draw(rows, width, "f32", "cpu", seed=width + count).double(), -1)
        entries, ids = log_p.topk(min(count, width))
        generator = torch.Generator().manual_seed(width)
        if mode == "sampled":  # some of them twice
            ids = torch.randint(0, width, (rows, count), generator=generator)
            entries = torch.rand(rows, count, generator=generator).double() + 0.1
        student = draw(rows, width, dtype, device, seed=width)
        return Inputs(student, ids.to(device), entries.to(device), scales(rows, device), mode, temperature, with_grad)

    return build


for _mode in MODES:
    for _rows, _width, _count in ((3, 1, 1), (4, 17, 5), (3, 600, 64), (2, 4099, 130), (2, 50257, 20)):
        CASES[f"{_mode}_{_width}_{_count}"] = plain(_rows, _width, _count, "f32", _mode, 1.5)
    for _dtype in ("bf16", "f16"):
        CASES[f"{_mode}_{_dtype}"] = plain(3, 2500, 33, _dtype, _mode, 2.0)
    CASES[f"{_mode}_value"] = plain(3, 900, 16, "f32", _mode, 1.0, with_grad=False)
CASES["wide"] = plain(1, 151936, 64, "bf16", "bucket")  # two masks of 32 blocks
for _mode in MODES[:3]:
    CASES[f"{_mode}_every_word"] = plain(2, 80, 80, "f32", _mode)


def near(mode: str, temperature: float) -> Case:
    def build(device: str) -> Inputs:
        student = draw(3, 3000, "f32", "cpu", seed=5, spread=3.0 * temperature)
        other = student + draw(3, 3000, "f32", "cpu", seed=6, spread=6e-4 * temperature)
        entries, ids = torch.log_softmax(other.double() / temperature, -1).topk(48)
        ones = torch.ones(3, device=device)
        return Inputs(student.to(device), ids.to(device), entries.to(device), ones, mode, temperature)

    return build


for _mode in MODES[:3]:
    for _temperature in (1.0, 1.3):
        CASES[f"near_{_mode}_{_temperature}"] = near(_mode, _temperature)


@case
def repeated(device: str) -> Inputs:
    inputs = plain(3, 700, 50, "f32", "bucket")(device)
    inputs.ids = torch.cat([inputs.ids, inputs.ids.flip(1)], 1)
    inputs.entries = torch.cat([inputs.entries, inputs.entries.flip(1)], 1) - math.log(2)
    return inputs


@case
def padded(device: str) -> Inputs:
    """Ids of entries that are not there are anything; the last row has no other."""
    inputs = plain(3, 700, 50, "f32", "bucket")(device)
    inputs.ids[:, ::3] = torch.tensor([-5, 700, 2**40, 3] * 5, device=device)[:17]
    inputs.entries[:, ::3] = -math.inf
    inputs.entries[2] = -math.inf
    return inputs


@case
def views(device: str) -> Inputs:
    inputs = plain(4, 500, 20, "f32", "bucket")(device)
    inputs.student = draw(4, 1000, "f32", device, seed=2)[:, ::2]
    inputs.ids, inputs.entries = inputs.ids[:1].expand(4, -1), inputs.entries.T.contiguous().T
    inputs.entries = inputs.entries[:1].expand(4, -1)
    return inputs


@case
def far_rows(device: str) -> Inputs:
    """Row 3 begins 3·2³⁰ words after row 0; only the pages of the rows are ever touched."""
    inputs = plain(4, 65, 7, "bf16", "bucket")(device)
    student = torch.empty(3 * 2**30 + 65, dtype=torch.bfloat16, device=device).as_strided((4, 65), (2**30, 1))
    inputs.student = student.copy_(inputs.student)
    return inputs


@case
def no_rows(device: str) -> Inputs:
    return plain(0, 100, 5, "f32", "bucket")(device)


@case
def no_mass(device: str) -> Inputs:
    """Row 0: the student lacks a word of the teacher's; row 1: it has none of the others, whose share is lost."""
    inputs = plain(3, 300, 20, "f32", "bucket")(device)
    inputs.student[0, inputs.ids[0, 3]] = -math.inf
    kept = inputs.student[1, inputs.ids[1]].clone()
    inputs.student[1] = -math.inf
    inputs.student[1, inputs.ids[1]] = kept
    inputs.row_scale.fill_(0.5)
    return inputs


@case
def extreme(device: str) -> Inputs:
    inputs = plain(2, 6, 2, "f32", "bucket")(device)
    inputs.student[0] = torch.tensor([3e38, -3e38, 0.0, 3e38, -1e38, -2e38])
    inputs.student[1] = torch.tensor([88.0, -88.0, 0.0, 80.0, 1.0, 2.0])
    inputs.ids[:] = torch.tensor([0, 3])
    inputs.entries[:] = torch.tensor([0.6, 0.3]).double().log()
    return inputs


def broken(mode: str) -> Case:
    """Row 0 is sound; 1: NaN among the teacher's words; 2: a NaN entry; 3: an id that names no word; 4: scale 0."""

    def build(device: str) -> Inputs:
        inputs = plain(5, 400, 20, "f32", mode)(device)
        inputs.student[1, inputs.ids[1, 7]] = math.nan
        inputs.entries[2, 3] = math.nan
        inputs.ids[3, 5] = 400
        inputs.student[4], inputs.entries[4], inputs.ids[4] = math.nan, math.nan, -1
        inputs.row_scale.copy_(torch.tensor([1.0, 1.0, 1.0, 1.0, -0.0]))
        return inputs

    return build


BROKEN = [f"broken_{mode}" for mode in MODES]
CASES |= {f"broken_{mode}": broken(mode) for mode in MODES}

BAD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "student dtype": ("TypeError", "student", {"student": torch.zeros(2, 4, dtype=torch.float64)}),
    "student shape": ("ValueError", "student", {"student": torch.zeros(4)}),
    "id dtype": ("TypeError", "ids", {"ids": torch.zeros(2, 3, dtype=torch.int32)}),
    "id rows": ("ValueError", "ids", {"ids": torch.zeros(3, 3, dtype=torch.int64)}),
    "entry dtype": ("TypeError", "entries", {"entries": torch.zeros(2, 3)}),
    "entry shape": ("ValueError", "entries", {"entries": torch.zeros(2, 4, dtype=torch.float64)}),
    "scale dtype": ("TypeError", "row_scale", {"row_scale": torch.zeros(2, dtype=torch.float64)}),
    "scale shape": ("ValueError", "row_scale", {"row_scale": torch.zeros(3)}),
    "device": ("ValueError", "entries", {"entries": torch.zeros(2, 3, dtype=torch.float64, device="meta")}),
    "tail": ("ValueError", "tail", {"tail": "cut"}),
    "temperature": ("ValueError", "temperature", {"temperature": 0.0}),
}


def worker(device: str, target: str) -> None:
    """Run every case on ``device`` and save {"results": …, "errors": …} to ``target``."""
    from pyfast.triton_kernels.topk_distill import topk_distill

    results = {}
    for name, build in CASES.items():
        inputs = build(device)
        arguments = (inputs.student, inputs.ids, inputs.entries, inputs.row_scale, inputs.mode, inputs.temperature)
        with poisoned():
            rows, grad = topk_distill(*arguments, inputs.with_grad)
        results[name] = rows.cpu(), grad.cpu()
    sound: dict[str, Any] = {
        "student": torch.zeros(2, 4),
        "ids": torch.zeros(2, 3, dtype=torch.int64),
        "entries": torch.zeros(2, 3, dtype=torch.float64),
        "row_scale": torch.ones(2),
    }
    errors = {
        name: error_of(lambda change=change: topk_distill(**{**sound, **change}))
        for name, (_, _, change) in BAD.items()
    }
    torch.save({"results": results, "errors": errors}, target)


@pytest.fixture(scope="module", params=PLACES)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return saved_by(__file__, request.param, tmp_path_factory)


@pytest.mark.parametrize("name", [name for name in CASES if name not in BROKEN])
def test_against_float64(outcome: dict[str, Any], name: str) -> None:
    rows, grad = outcome["results"][name]
    inputs = CASES[name]("cpu")
    scale = inputs.row_scale.double()
    there = (inputs.entries != 0) if inputs.mode == "sampled" else inputs.entries > -math.inf
    listed = there.any(-1)
    want_rows, want_grad = truth(inputs.student, inputs.ids, inputs.entries, inputs.mode, inputs.temperature)
    want_rows = torch.where(listed, want_rows * scale, 0.0)
    assert rows.dtype == torch.float32 and grad.dtype == inputs.student.dtype and grad.is_contiguous()
    tolerance = 1e-3 if name.startswith("near") else 1e-5
    torch.testing.assert_close(rows.double(), want_rows, rtol=tolerance, atol=1e-12)
    if not inputs.with_grad:
        assert grad.shape == (0, 0)
        return
    want_grad = torch.where(listed[:, None], want_grad * scale[:, None], 0.0).nan_to_num(0.0)
    error = (grad.double() - want_grad).norm(dim=1)
    rounding = {torch.float32: 0.0, torch.float16: 5e-4, torch.bfloat16: 4e-3}[grad.dtype]
    if outcome["device"] == "cpu" and grad.dtype == torch.bfloat16:
        rounding *= 2  # the interpreter cuts off instead
    slack = 2e-3 if name.startswith("near") else 3e-6 + rounding
    assert (error <= slack * want_grad.norm(dim=1) + 2e-7 * scale.abs() * (not name.startswith("near"))).all()


def test_special_rows(outcome: dict[str, Any]) -> None:
    assert (outcome["results"]["padded"][1][2] == 0).all()
    rows, grad = outcome["results"]["no_mass"]
    assert rows.isinf().tolist() == [True, True, False] and grad.isfinite().all()
    assert (outcome["results"]["bucket_1_1"][0] == 0).all()
    for name, (rows, _) in outcome["results"].items():
        if name not in BROKEN:
            scale = CASES[name]("cpu").row_scale
            assert (rows * scale.sign() >= 0).all(), name


@pytest.mark.parametrize("name", BROKEN)
def test_nan_stays_in_its_row(outcome: dict[str, Any], name: str) -> None:
    rows, grad = outcome["results"][name]
    assert rows.isnan().tolist() == [False, True, True, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, True, True, False]
    assert rows[4] == 0 and (grad[4] == 0).all()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(outcome: dict[str, Any], name: str) -> None:
    error, argument, _ = BAD[name]
    kind, message = outcome["errors"][name]
    assert kind == error and message.startswith(argument + ":") and "accepted" in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_captured_in_a_graph() -> None:
    from pyfast.triton_kernels.topk_distill import topk_distill

    inputs = plain(64, 32000, 64, "bf16", "bucket")("cuda")
    arguments = (inputs.student, inputs.ids, inputs.entries, inputs.row_scale)
    topk_distill(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, grad = topk_distill(*arguments)
    inputs.student.copy_(inputs.student.flip(0))
    graph.replay()
    again_rows, again_grad = topk_distill(*arguments)
    assert torch.equal(rows, again_rows) and torch.equal(grad, again_grad)


def test_compiles_ahead_of_time_without_spills(tmp_path: Path) -> None:
    """Every kernel for one target, and those that need most registers for all."""
    pairs = (
        "[(case, target) for target in compile.TARGETS for case in compile.cases(target)"
        " if case.name.startswith('topk') and ' fp16 ' not in case.name"
        " and (target == 90 or case.name.endswith(('fp32 block 4096 bucket', '256 entries bucket')))]"
    )
    check_compiled(pairs, {"topk_teacher", "topk_student"}, tmp_path)


if __name__ == "__main__":
    worker(*sys.argv[1:])
