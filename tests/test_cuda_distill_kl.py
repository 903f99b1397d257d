"""The CUDA kernels of distill_kl against float64: executed on the host, and on a GPU if there is one.

The cases are those of the Triton kernel. On the host each runs in another layout (streamed, or held by 1 to 8 blocks).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from simt import host
from triton_cases import CASES, DIVERGENCES, MIXTURES, WRONG_LABELS, Inputs, near, plain, tolerances, truth

from pyfast import _native

KINDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Layout:
    """Blocks that hold a row (0: it is streamed), how many such groups share the rows, and threads a block."""

    cluster: int
    groups: int
    threads: int


LAYOUTS = [Layout(0, 2, 64), Layout(1, 1, 32), Layout(2, 2, 64), Layout(4, 1, 32), Layout(8, 2, 32), Layout(0, 1, 96)]
# What the launcher or the public function sees to, and rows that are 6 GB apart.
NOT_HERE = {"words_apart", "mixed_dtypes", "no rows", "far_rows"}


def width_of(name: str) -> int:
    return max((int(part) for part in name.split("-") if part.isdigit()), default=0)


# float16 differs from bfloat16 in two conversions, and a third element type costs a third of the time to compile.
ON_HOST = [name for name in CASES if name not in NOT_HERE and width_of(name) <= 1000 and "f16" not in name.split("-")]
ON_HOST.remove("excluded-half")


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """All that the tensor's storage holds."""
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return flat.numpy() if tensor.dtype == torch.float32 else flat.view(torch.int16).numpy().view(np.uint16)


def run(library: host.Library, inputs: Inputs, layout: Layout, order: int = 0) -> tuple[torch.Tensor, ...]:
    """Rows, the cross-entropy's part of them, and the gradient."""
    student, teacher = inputs.student, inputs.teacher
    count, words = student.shape
    rows = host.Output(count, np.float32)
    ce_rows = None if inputs.labels is None else host.Output(count, np.float32)
    grad = host.Output((count, words), bits_of(student).dtype) if inputs.with_grad else None
    library.run(
        f"distill_kl_{KINDS[student.dtype]}",
        bits_of(student),
        bits_of(teacher),
        inputs.row_scale.contiguous().numpy(),
        None if inputs.labels is None else inputs.labels.contiguous().numpy(),
        None if inputs.ce_scale is None else inputs.ce_scale.contiguous().numpy(),
        rows,
        ce_rows,
        grad,
        count,
        words,
        student.stride(0),
        teacher.stride(0),
        student.storage_offset(),
        teacher.storage_offset(),
        DIVERGENCES.index(inputs.divergence),
        float(inputs.mix),
        inputs.student_temperature,
        inputs.teacher_temperature,
        inputs.student_softcap,
        inputs.teacher_softcap,
        layout.cluster,
        layout.groups,
        layout.threads,
        order=order,
    )
    slopes = np.zeros((0, 0), np.float32) if grad is None else grad.array
    signed = torch.from_numpy(slopes if slopes.dtype == np.float32 else slopes.view(np.int16))
    return (
        torch.from_numpy(rows.array),
        torch.from_numpy(np.zeros(0, np.float32) if ce_rows is None else ce_rows.array),
        signed if slopes.dtype == np.float32 else signed.view(student.dtype),
    )


def check(results: tuple[torch.Tensor, ...], inputs: Inputs, tolerance: tuple[float, float], near: bool) -> None:
    """``results`` are as good as float64 rounded to their dtypes, within ``tolerance`` of value and gradient."""
    rows, ce_rows, grad = results
    want_rows, want_ce, want_grad = truth(inputs)
    torch.testing.assert_close(rows.double(), want_rows, rtol=tolerance[0], atol=1e-13, equal_nan=True)
    torch.testing.assert_close(ce_rows.double(), want_ce, rtol=2e-5, atol=1e-13, equal_nan=True)
    if not inputs.with_grad:
        assert grad.shape == (0, 0)
        return
    counted = ~want_rows.isnan()
    assert grad[~counted].isnan().all()
    noise = 0.0 if near else 2e-7 * inputs.row_scale.double().abs()[counted]
    rounding = (want_grad.to(grad.dtype).double() - want_grad)[counted].norm(dim=1)
    error = (grad.double() - want_grad)[counted].norm(dim=1)
    assert (error <= 1.02 * rounding + tolerance[1] * want_grad[counted].norm(dim=1) + noise).all()


def check_case(name: str, results: tuple[torch.Tensor, ...], inputs: Inputs) -> None:
    check(results, inputs, tolerances(name), name.startswith("near"))
    if name.startswith("equal-"):
        assert results[0].abs().max() < 1e-12 and results[2].abs().max() < 1e-12
    if name.startswith("unread-"):
        assert (results[0] == 0).tolist() == [False, True, False, False, True]
        assert (results[2] == 0).all(1).tolist() == [False, True, False, False, True]


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.build("distill_kl")


@pytest.mark.parametrize(("name", "layout"), list(zip(ON_HOST, itertools.cycle(LAYOUTS))), ids=str)
def test_on_the_host(library: host.Library, name: str, layout: Layout) -> None:
    inputs = CASES[name]("cpu")
    check_case(name, run(library, inputs, layout), inputs)


# Errors of powers, logarithms and reciprocals as large as a GPU's: at random, or of all logarithms alike, which no sum
# averages away.
ERRORS = {"random": {"rough": 2**-22}, "up": {"bias": 2**-22}, "down": {"bias": -(2**-22)}}


@pytest.mark.parametrize(("name", "layout"), list(zip(ON_HOST, itertools.cycle(LAYOUTS))), ids=str)
def test_with_rough_powers_on_the_host(library: host.Library, name: str, layout: Layout) -> None:
    inputs = CASES[name]("cpu")
    with library.off_by(**ERRORS["random"]):
        check_case(name, run(library, inputs, layout), inputs)


@pytest.mark.parametrize("errors", ERRORS)
def test_errors_of_a_gpu_are_simulated(library: host.Library, errors: str) -> None:
    inputs = CASES["full-jsd-1000"]("cpu")
    exact = run(library, inputs, LAYOUTS[0])[0]
    with library.off_by(**ERRORS[errors]):
        assert not torch.equal(run(library, inputs, LAYOUTS[0])[0], exact)
    assert torch.equal(run(library, inputs, LAYOUTS[0])[0], exact)


@pytest.mark.parametrize("teacher", [0.09375, 0.1, 0.3, 0.5, 0.7, 0.9, 0.90625])
@pytest.mark.parametrize("divergence", MIXTURES)
def test_series(library: host.Library, divergence: str, teacher: float) -> None:
    """value / (t x^2) and h / x of csrc/cuda/distill_kl_series.h, to the end of its reach."""
    value, slope, reach = (host.InOut(np.zeros(count, dtype)) for count, dtype in ((8, "f8"), (8, "f8"), (1, "f4")))
    library.run("series", DIVERGENCES.index(divergence), teacher, value, slope, reach)
    x = np.linspace(-reach.array[0], reach.array[0], 400, dtype=np.longdouble)
    teacher_share = np.longdouble(np.float32(teacher))
    student_share = 1 - teacher_share
    u = np.log1p(student_share * np.expm1(x))  # log m / t
    over_t = {
        "jsd": student_share * np.exp(x) * (x - u) - teacher_share * u,
        "skew_kl": student_share * np.expm1(x) - u,
        "skew_reverse_kl": np.exp(x) * (x - u) - teacher_share * np.expm1(x),
    }
    excess = student_share * np.exp(x - u) - student_share
    h = {"jsd": student_share * (x - u), "skew_kl": student_share / teacher_share * excess}
    h["skew_reverse_kl"] = (x - u) - excess
    for found, want in ((value, over_t[divergence] / x**2), (slope, h[divergence] / x)):
        np.testing.assert_allclose(np.polynomial.polynomial.polyval(x, found.array), want, rtol=2e-6)


def moved(inputs: Inputs, student: float, teacher: float) -> Inputs:
    """The same distributions, of logits that lie elsewhere."""
    inputs.student += student
    inputs.teacher += teacher
    return inputs


# Rows on both sides of where near ones end, weights on both sides of where a mixture is `shared`, logits far from 0.
BORDERS: dict[str, Callable[[], Inputs]] = {
    f"{d}-{distance}": lambda d=d, distance=distance: near(1000, distance, d)("cpu")
    for d in DIVERGENCES
    for distance in (0.03, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0, 2.0)
}
BORDERS |= {
    f"{d}-{mix}-{distance}": lambda d=d, mix=mix, distance=distance: replace(near(1000, distance, d)("cpu"), mix=mix)
    for d in MIXTURES
    for mix in (0.01, 0.09, 0.09375, 0.1, 0.9, 0.90625)
    for distance in (0.01, 0.4, 3.0)
}
BORDERS |= {
    f"{d}-{distance}-moved": lambda d=d, distance=distance: moved(near(1000, distance, d)("cpu"), 700.0, 700.0)
    for d in DIVERGENCES
    for distance in (0.2, 3.0)
}


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("name", BORDERS)
def test_borders_on_the_host(library: host.Library, name: str, errors: str) -> None:
    inputs = BORDERS[name]()
    with library.off_by(**ERRORS[errors]):
        check(run(library, inputs, LAYOUTS[2]), inputs, tolerances(""), near=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 2, 7, 63, 65, 515, 4003])
def test_widths_on_the_host(library: host.Library, width: int, layout: Layout) -> None:
    inputs = plain(5, width, "bf16", "jsd" if width % 2 else "forward_kl")("cpu")
    check(run(library, inputs, layout), inputs, tolerances(""), near=False)


@pytest.mark.parametrize("order", host.ORDERS)
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[4]])
def test_orders_on_the_host(library: host.Library, layout: Layout, order: int) -> None:
    inputs = CASES["full-skew_reverse_kl-1000"]("cpu")
    results = run(library, inputs, layout, order)
    assert all(map(torch.equal, results, run(library, inputs, layout)))


@pytest.mark.parametrize("offsets", [(1, 0), (0, 3), (2, 2)])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]])
def test_unaligned_rows_on_the_host(library: host.Library, layout: Layout, offsets: tuple[int, int]) -> None:
    """Rows of the teacher, or of the gradient, that lie otherwise than the student's."""
    inputs = plain(4, 333, "bf16", "skew_kl")("cpu")
    inputs.student, inputs.teacher = (
        torch.nn.functional.pad(logits, (offset, 2))[:, offset : offset + 333]
        for logits, offset in zip((inputs.student, inputs.teacher), offsets, strict=True)
    )
    check(run(library, inputs, layout), inputs, tolerances(""), near=False)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_label_that_names_no_word_on_the_host(library: host.Library, layout: Layout) -> None:
    for result in run(library, WRONG_LABELS["resident"]("cpu"), layout):
        assert result.isnan().reshape(5, -1).all(1).tolist() == [False, True, True, True, False]
        assert result.isnan().reshape(5, -1).any(1).tolist() == [False, True, True, True, False]


# One text of the kernel each, replaced by another; and what the host says to it.
MUTANTS = {
    "no barrier of the cluster": (
        ("distill_kl_group.cuh", "      ptx::cluster_sync_relaxed();"),
        "      ptx::syncthreads();",
        "no barrier|exit|begun",
    ),
    "wrong block": (
        ("distill_kl_group.cuh", "group.memory.blocks[group.half][group.rank()]"),
        "group.memory.blocks[group.half][group.size - 1]",
        "races|wrote|no barrier",
    ),
    "no wait": (("distill_kl_store.cuh", "        ptx::cp_async_wait<1>();\n"), "        ;\n", "cp_async"),
    "one half": (("distill_kl_group.cuh", "  group.half ^= 1;\n"), "", "no barrier"),
    "no barrier of the block": (
        ("distill_kl_group.cuh", "  ptx::syncthreads();\n  if (warp"),
        "  if (warp",
        "nobody has written|no barrier",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail_on_the_host(name: str) -> None:
    place, instead, said = MUTANTS[name]
    broken = host.build("distill_kl_mutant", {place: instead})
    inputs = plain(6, 1500, "bf16", "forward_kl")("cpu")
    with pytest.raises(host.SimtError, match=said):
        for order in host.ORDERS:
            run(broken, inputs, Layout(2, 1, 64), order)


# How rows are laid out on an H100, an A100 and an RTX 4090: words, bytes a word, blocks that hold a row (0: streamed).
PLANS = {
    (232448, 233472, 1): [(1000, 4, 1), (32000, 2, 2), (128256, 2, 8), (151936, 2, 8), (262144, 2, 8), (262144, 4, 0)],
    (166912, 167936, 0): [(8192, 2, 1), (32000, 2, 1), (128256, 2, 0)],
    (101376, 102400, 0): [(8192, 2, 1), (32000, 2, 0)],
}


@pytest.mark.parametrize("limits", PLANS)
def test_plan(library: host.Library, limits: tuple[int, int, int]) -> None:
    for words, size, cluster in PLANS[limits]:
        out = host.InOut(np.zeros(4, np.int64))
        library.run("plan", words, size, 0, *limits, out)
        got, share, threads, shared = out.array
        assert got == cluster and threads % 32 == 0 and 32 <= threads <= 768
        assert shared + 2048 <= limits[0]
        if cluster:
            assert shared == 32 * share
            most = (words * size + 16 - size + 15) // 16  # vectors, where the row begins within one
            assert (cluster - 1) * share < most <= cluster * share


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(_native.CUDA is None or not torch.cuda.is_available(), reason="no GPU or no pyfast._cuda"),
]


def on_gpu(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    import pyfast  # noqa: F401

    arguments = [value.cuda() if isinstance(value, torch.Tensor) else value for value in inputs.arguments()]
    return tuple(result.cpu() for result in torch.ops.pyfast.distill_kl(*arguments))


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("name", [name for name in CASES if name not in ("mixed_dtypes", "far_rows")])
    def test_against_float64(self, name: str) -> None:
        inputs = CASES[name]("cpu")
        check_case(name, on_gpu(inputs), inputs)

    @pytest.mark.parametrize("name", BORDERS)
    def test_borders(self, name: str) -> None:
        inputs = BORDERS[name]()
        check(on_gpu(inputs), inputs, tolerances(""), near=False)

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    @pytest.mark.parametrize(
        ("width", "dtype"), [(128256, "bf16"), (151936, "bf16"), (262144, "bf16"), (262144, "f32")]
    )
    def test_real_widths(self, width: int, dtype: str, divergence: str) -> None:
        inputs = plain(3, width, dtype, divergence, student_temperature=2.0, teacher_temperature=2.0)("cpu")
        inputs.labels, inputs.ce_scale = torch.tensor([0, -100, width - 1]), torch.tensor([0.5, 0.0, 1.0])
        check(on_gpu(inputs), inputs, tolerances(""), near=False)

    @pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
    def test_many_rows_agree_with_triton(self, divergence: str) -> None:
        """More rows than run at once: each group does several, and asks for the next while it writes one."""
        pytest.importorskip("triton")
        student, teacher = (torch.randn(1500, 50257, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        options: list[Any] = [divergence, 0.5, 1.0, 1.0, 0.0, 0.0, None, None, True]
        scale = torch.ones(1500, device="cuda")
        scale[::7] = 0.0
        rows, _, grad = torch.ops.pyfast.distill_kl(student, teacher, scale, *options)
        want_rows, _, want_grad = torch.ops.pyfast.distill_kl_triton(student, teacher, scale, *options)
        torch.testing.assert_close(rows, want_rows, rtol=2e-5, atol=0)
        assert (grad.float() - want_grad.float()).norm() <= 4e-3 * want_grad.float().norm()

    def test_captured_in_a_graph(self) -> None:
        inputs = plain(64, 32000, "bf16", "jsd")("cuda")
        step = lambda: torch.ops.pyfast.distill_kl(*inputs.arguments())  # noqa: E731
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        inputs.student.copy_(inputs.student.flip(0))
        graph.replay()
        assert all(map(torch.equal, captured, step()))

    @pytest.mark.parametrize("dtype", KINDS)
    def test_rows_are_scaled(self, dtype: torch.dtype) -> None:
        grad = torch.randn(4, 4100, device="cuda").to(dtype)[:, 1:]
        scale = torch.tensor([2.0, 1.0, 0.0, -0.5], device="cuda")
        want = (grad.float() * scale.unsqueeze(1)).to(dtype)
        assert torch.equal(torch.ops.pyfast.scale_rows(grad, scale), want)
        torch.ops.pyfast.scale_rows_(grad, scale)
        assert torch.equal(grad, want)
