"""The Triton distillation kernels against float64: in the interpreter, and on a GPU if there is one."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_cases
from triton_cases import BAD, CASES, WRONG_LABELS, bits, gradient, plain, tolerances, truth
from triton_programs import PLACES, check_compiled, saved_by

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", params=PLACES)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return saved_by(triton_cases.__file__, request.param, tmp_path_factory)


def rounded(exact: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    """``exact`` brought to ``dtype`` as the device does it, in float64."""
    if device == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts off
        return (exact.float().view(torch.int32) & -65536).view(torch.float32).double()
    return exact.to(dtype).double()


@pytest.mark.parametrize("name", CASES)
def test_against_float64(outcome: dict[str, Any], name: str) -> None:
    rows, ce_rows, grad = outcome["results"][name]
    inputs = CASES[name]("cpu")
    want_rows, want_ce, want_grad = truth(inputs)
    assert rows.dtype == ce_rows.dtype == torch.float32
    assert grad.dtype == inputs.student.dtype
    assert grad.is_contiguous()
    value_tolerance, slope_tolerance = tolerances(name)
    torch.testing.assert_close(rows.double(), want_rows, rtol=value_tolerance, atol=1e-13, equal_nan=True)
    torch.testing.assert_close(ce_rows.double(), want_ce, rtol=2e-5, atol=1e-13, equal_nan=True)
    if not inputs.with_grad:
        assert grad.shape == (0, 0)
        return
    counted = ~want_rows.isnan()
    assert grad[~counted].isnan().all()
    # As good as the exact gradient rounded to its dtype, and a little float32 noise; a row at a time.
    # Probabilities near 1 carry noise of their own size; near cases, whose gradient is t·x, must not show it.
    noise = 0.0 if name.startswith("near") else 2e-7 * inputs.row_scale.double().abs()[counted]
    rounding = (rounded(want_grad, grad.dtype, outcome["device"]) - want_grad)[counted].norm(dim=1)
    error = (grad.double() - want_grad)[counted].norm(dim=1)
    assert (error <= 1.02 * rounding + slope_tolerance * want_grad[counted].norm(dim=1) + noise).all()


def named(prefix: str) -> list[str]:
    names = [name for name in CASES if name.startswith(prefix)]
    assert names
    return names


@pytest.mark.parametrize("name", named("equal-"))
def test_equal_logits_give_zero(outcome: dict[str, Any], name: str) -> None:
    rows, _, grad = outcome["results"][name]
    assert rows.abs().max() < 1e-12
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", named("nan-"))
def test_nan_stays_in_its_row(outcome: dict[str, Any], name: str) -> None:
    rows, _, grad = outcome["results"][name]
    assert rows.isnan().tolist() == [False, True, False, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, False, True, False]
    assert grad[[1, 3]].isnan().all()


@pytest.mark.parametrize("name", named("unread-"))
def test_rows_that_do_not_count_are_not_read(outcome: dict[str, Any], name: str) -> None:
    rows, _, grad = outcome["results"][name]
    assert (rows == 0).tolist() == [False, True, False, False, True]
    assert (grad == 0).all(1).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("name", named("alone-"))
def test_a_divergence_of_factor_0_takes_no_part(outcome: dict[str, Any], name: str) -> None:
    rows, ce_rows, grad = outcome["results"][name]
    assert torch.equal(rows[:4], ce_rows[:4])
    assert rows.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("name", named("excluded-"))
def test_infinite_only_where_the_student_lacks_mass(outcome: dict[str, Any], name: str) -> None:
    rows, _, grad = outcome["results"][name]
    forward = CASES[name]("cpu").divergence == "forward_kl"
    assert rows.isfinite().tolist() == [True, True, not forward]
    assert rows[2] == math.inf or not forward
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_label_that_names_no_word_makes_its_row_nan(outcome: dict[str, Any], name: str) -> None:
    wrong = [False, True, True, True, False]
    for result in outcome["wrong labels"][name]:
        assert result.isnan().reshape(5, -1).any(1).tolist() == wrong
        assert result.isnan().reshape(5, -1).all(1).tolist() == wrong


@pytest.mark.parametrize("factors", ["apart", "ones", "half"])
@pytest.mark.parametrize("dtype", triton_cases.DTYPES)
def test_rows_are_scaled(outcome: dict[str, Any], dtype: str, factors: str) -> None:
    grad = gradient(dtype, "cpu").contiguous()
    factor = {"apart": [2.0, 1.0, 1.0, -0.5], "ones": [1.0] * 4, "half": [0.5] * 4}[factors]
    product = grad.double() * torch.tensor(factor).double().unsqueeze(1)
    want = rounded(product, grad.dtype, outcome["device"]).to(grad.dtype)
    for way in ("new", "transposed", "in place"):
        got = outcome["scaled"][f"{way}-{dtype}-{factors}"]
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bits(outcome["scaled"][f"kept-{dtype}-{factors}"]), bits(grad))


@pytest.mark.parametrize("dtype", triton_cases.DTYPES)
def test_rows_of_scale_one_are_not_touched(outcome: dict[str, Any], dtype: str) -> None:
    """A signalling NaN that went through a multiplication would have come back as another NaN."""
    grad = bits(gradient(dtype, "cpu").contiguous())
    for factors in ("apart", "ones"):
        in_place = bits(outcome["scaled"][f"in place-{dtype}-{factors}"])
        new = bits(outcome["scaled"][f"new-{dtype}-{factors}"])
        assert torch.equal(in_place[1:3], grad[1:3])
        assert not torch.equal(new[1:3], grad[1:3])


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(outcome: dict[str, Any], name: str) -> None:
    error, argument, _ = BAD[name]
    kind, message = outcome["errors"][name]
    assert kind == error.__name__
    assert message.startswith(argument + ":")
    assert "accepted" in message


def test_words_apart_are_not_scaled_in_place(outcome: dict[str, Any]) -> None:
    kind, message = outcome["words apart"]
    assert kind == "ValueError"
    assert message.startswith("grad:") and "accepted" in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_captured_in_a_graph(divergence: str) -> None:
    from pyfast.triton_kernels.distill_kl import distill_kl
    from pyfast.triton_kernels.scale_rows import scale_rows_

    inputs = plain(64, 32000, "bf16", divergence, student_temperature=2.0)("cuda")
    inputs.labels = torch.arange(64, device="cuda")
    inputs.ce_scale = torch.ones(64, device="cuda")
    factor = torch.tensor(0.5, device="cuda").expand(64)

    def step() -> tuple[torch.Tensor, ...]:
        rows, ce_rows, grad = distill_kl(*inputs.arguments())
        scale_rows_(grad, factor)
        return rows, ce_rows, grad

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs.student.copy_(inputs.student.flip(0))
    graph.replay()
    for result, again in zip(captured, step(), strict=True):
        assert torch.equal(result, again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("divergence", triton_cases.DIVERGENCES)
def test_public_loss_and_backward(divergence: str) -> None:
    """Through the op and autograd, with masked tokens and a gradient other than 1."""
    import pyfast

    inputs = plain(16, 10007, "f32", divergence)("cuda")
    labels = torch.arange(16, device="cuda").masked_fill(torch.arange(16, device="cuda") % 3 == 0, -100)
    results = []
    for backend in ("triton", "reference"):
        dtype = torch.float64 if backend == "reference" else torch.float32
        student = inputs.student.to(dtype, copy=True).requires_grad_()
        loss = pyfast.distillation_loss(
            student, inputs.teacher.to(dtype), divergence, labels=labels, ce_weight=0.5, softcap=30.0, backend=backend
        )
        (3.0 * loss).backward()
        results.append((loss.detach(), student.grad))
    (loss, grad), (want_loss, want_grad) = results
    torch.testing.assert_close(loss.double(), want_loss, rtol=2e-5, atol=0)
    assert (grad.double() - want_grad).norm() <= 2e-5 * want_grad.norm()


def test_compiles_ahead_of_time_without_spills(tmp_path: Path) -> None:
    """Some of each divergence and layout; ``python -m pyfast.triton_kernels.compile`` does all."""
    kernels = {"distill_kl_resident", "distill_kl_streamed", "scale_rows_kernel"}
    names = check_compiled("compile.sample()", kernels, tmp_path)
    assert all(any(divergence in name for name in names) for divergence in triton_cases.DIVERGENCES)


def test_refuses_to_be_a_top_level_module() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "pyfast.triton_kernels" in done.stderr
