"""The vocabulary-parallel losses on 1, 2 and 4 processes against the loss of the whole vocabulary in float64.

Each world size is one set of processes, which are ``parallel_rank.py`` started as a program; what their ranks saved is
judged here.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_rank
import pytest
import torch
from conftest import relative_error
from parallel_cases import (
    CASES,
    COMPILED_WORLD,
    LINEAR,
    LINEAR_DTENSORS,
    TOKENS,
    TOLERANCE,
    WORDS,
    WORLDS,
    draw,
    linear_truth,
    pair,
    truth,
)
from parallel_errors import BAD, BAD_OF_SEVERAL

from pyfast.ops.distill_kl import DIVERGENCES
from pyfast.parallel import vocab_parallel_distillation_loss
from pyfast.reference import shard_distill as reference


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of a world saved."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"world{world}")
    program = [sys.executable, str(Path(parallel_rank.__file__).resolve())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*program, str(rank), str(world), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0] * world, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("name", CASES)
def test_against_the_whole_vocabulary_in_float64(ranks: list[dict[str, Any]], name: str) -> None:
    of = CASES[name]()
    if of.kind == "compiled" and len(ranks) != COMPILED_WORLD:
        pytest.skip("compiled in one world only")
    true_loss, true_grad = truth(of)
    tolerance = TOLERANCE[of.student.dtype]
    results = [rank["results"][name] for rank in ranks]
    of_tokens = {result["tokens"]: result["loss"] for result in results}  # all ranks, unless a mesh shards the tokens
    wide = torch.float64 in (of.student.dtype, of.teacher.dtype)
    close = {"rtol": 1e-13 if wide else 1e-6, "atol": 1e-15, "equal_nan": True}
    torch.testing.assert_close(torch.stack(list(of_tokens.values())).sum(0).double(), true_loss, **close)
    for result in results:
        torch.testing.assert_close(result["loss"], of_tokens[result["tokens"]], rtol=0, atol=0, equal_nan=True)
        assert result["loss"].dtype == (torch.float64 if wide else torch.float32)
        if of.kind == "evaluation":
            assert not result["attached"]
            continue
        expected, grad = true_grad[..., result["words"]], result["grad"]
        assert grad.dtype == of.student.dtype and grad.shape == expected.shape and result.get("placed", True)
        numbers = expected.isfinite().all(-1)
        assert grad[~numbers].isnan().all()
        error = (grad.double() - expected)[numbers].norm()
        subnormal = torch.finfo(grad.dtype).tiny * torch.finfo(grad.dtype).eps
        assert error <= tolerance * expected[numbers].norm() + subnormal * grad.numel() ** 0.5 + 1e-15


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_logits_give_zero(ranks: list[dict[str, Any]], divergence: str) -> None:
    for rank in ranks:
        result = rank["results"][f"equal-{divergence}"]
        assert result["loss"].abs().max() < 1e-15 and torch.equal(result["grad"], torch.zeros_like(result["grad"]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(ranks: list[dict[str, Any]], divergence: str) -> None:
    for rank in ranks:
        result = rank["results"][f"nan-{divergence}"]
        assert result["loss"].isnan().tolist() == [False, True, False, True]
        if result["grad"].shape[-1]:  # of |s − t| autograd has the slope 0 where t alone is NaN
            assert result["grad"].isnan().any(-1).tolist() == [False, True, False, divergence != "tvd"]


@pytest.mark.parametrize("name", [name for name in CASES if name != "compiled"])
def test_two_collectives_in_forward_and_none_in_backward(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank["results"][name]["collectives"] == [2, 0]


@pytest.mark.parametrize("name", LINEAR)
def test_linear_form_against_the_whole_vocabulary_in_float64(ranks: list[dict[str, Any]], name: str) -> None:
    options = LINEAR[name]
    true_loss, true_grads = linear_truth(**options)
    dtype = options.get("dtype", torch.float32)
    # 16 bits: the logits and their gradients are rounded to it before the products.
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[
        torch.bfloat16 if options.get("autocast") else dtype
    ]
    counting = TOKENS if "labels" not in options else int((options["labels"] != -100).sum())
    counting = 0 if "mask" in options else counting
    chunks = max(1, math.ceil(counting / options.get("chunk_size", 512)))
    for rank in ranks:
        result = rank["linear"][name]
        assert relative_error(result["loss"], true_loss) < tolerance
        assert torch.equal(result["loss"], ranks[0]["linear"][name]["loss"])
        assert result["forward"] == 2 * chunks + ("student_hidden" in result["grads"]) and result["backward"] == 0
        assert set(result["grads"]) == set(true_grads) - set(options.get("frozen", []))
        for operand, grad in result["grads"].items():
            expected = true_grads[operand]
            expected = expected if operand == "student_hidden" else expected[result["words"]]
            assert grad.dtype == dtype and grad.shape == expected.shape
            assert (grad.double() - expected).norm() <= tolerance * expected.norm()


def test_linear_form_with_dtensors(ranks: list[dict[str, Any]]) -> None:
    true_loss, true_grads = linear_truth(bias=True, **LINEAR_DTENSORS)
    for rank in ranks:
        result = rank["linear dtensors"]
        assert result["collectives"] == (2 * 3 + 1, 0) and result["placed"] == [True, True]
        assert relative_error(result["loss"], true_loss) < 1e-6
        for name, expected in true_grads.items():
            assert relative_error(result["grads"][name], expected) < 5e-6


def test_a_graph_that_is_kept(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        first, second, again = rank["twice"]
        assert torch.equal(first, again) and torch.equal(second, 2 * first)


def test_unknown_labels_give_nan_in_their_rows(ranks: list[dict[str, Any]]) -> None:
    if len(ranks) != COMPILED_WORLD:
        pytest.skip("compiled in one world only")
    for rank in ranks:
        assert rank["unknown label"].isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("name", [*BAD, *BAD_OF_SEVERAL])
def test_bad_input_is_named_on_every_rank(ranks: list[dict[str, Any]], name: str) -> None:
    if name in BAD_OF_SEVERAL and len(ranks) == 1:
        pytest.skip("one rank is the whole vocabulary")
    error, message, _ = (BAD | BAD_OF_SEVERAL)[name]
    for rank in ranks:
        kind, said = rank["errors"][name]
        assert kind == error.__name__ and message in said


def test_without_a_group() -> None:
    with pytest.raises(ValueError, match="is not initialised"):
        vocab_parallel_distillation_loss(torch.randn(3, 5), torch.randn(3, 5))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_opcheck(divergence: str) -> None:
    student, teacher = draw(3, 20, seed=1, dtype=torch.bfloat16), draw(3, 20, seed=2, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.pyfast.shard_stats, (student, [2.0, 1.0], 5.0))
    lse = torch.rand(3, 2, dtype=torch.float64)
    labels = torch.tensor([4, -1, 19])
    options = (torch.ones(3), divergence, 0.3, 2.0, 1.0, 5.0, 0.0, lse, lse[:, :1])
    for center in (None, lse[:, 0]):
        for with_grad in (False, True):
            inputs = (student, teacher, *options, center, labels, torch.ones(3), with_grad)
            torch.library.opcheck(torch.ops.pyfast.shard_distill, inputs)


def stages(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and gradient of jsd where this process holds all words."""
    lse = [
        reference.log_sum_exps(torch.ops.pyfast.shard_stats(logits, [2.0], 0.0).unsqueeze(0), [2.0])
        for logits in (student, teacher)
    ]
    inputs = (student, teacher, torch.ones(len(student)), "jsd", 0.5, 2.0, 2.0, 0.0, 0.0, *lse)
    sums, _ = torch.ops.pyfast.shard_distill(*inputs, None, None, None, True)
    return sums, torch.ops.pyfast.shard_distill(*inputs, sums[:, 1], None, None, True)[1]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_of_factor_0_takes_no_part(divergence: str) -> None:
    """Its gradient is that of the cross-entropy, whatever the teacher holds."""
    logits, labels = draw(2, 40, seed=3), torch.tensor([7, 3])
    teacher = torch.full((2, 40), torch.nan)
    lse = torch.stack([logits.double().logsumexp(-1)] * 2, -1)
    center = torch.full((2,), torch.nan, dtype=torch.float64) if divergence in reference.PULLS else None
    inputs = (logits, teacher, torch.zeros(2), divergence, 0.5, 1.0, 1.0, 0.0, 0.0, lse, lse[:, :1] * torch.nan)
    _, grad = torch.ops.pyfast.shard_distill(*inputs, center, labels, torch.ones(2), True)
    expected = logits.softmax(-1) - torch.nn.functional.one_hot(labels, 40)
    torch.testing.assert_close(grad, expected)


def test_rows_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = pair(7)
    whole = stages(*logits)
    monkeypatch.setitem(reference._SCRATCH_WORDS, "cpu", 2 * WORDS)  # two rows, and one left
    for got, expected in zip(stages(*logits), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


MEMORY = """
import sys
sys.path[:0] = [sys.argv[1]]
from pyfast.bench.hardware import peak_growth_bytes
from test_parallel import draw, stages

student, teacher = draw(150, 32000, seed=1), draw(150, 32000, seed=2)
stages(student[:8], teacher[:8])  # what is set up once
print(peak_growth_bytes(lambda: stages(student, teacher)), student.nbytes)
"""


def test_allocates_little_beside_the_gradient() -> None:
    """In a process of its own: what a heap keeps of other tests, in pieces, would count as growth."""
    command = [sys.executable, "-c", MEMORY, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, gradient = map(int, done.stdout.split())
    assert gradient < grown < gradient + (24 << 20)
