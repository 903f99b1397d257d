"""The CUDA kernel of topk_distill against float64: executed on the host, and on a GPU if there is one.

The cases are those of the Triton kernel. On the host each runs in another layout (held by 1 to 8 blocks).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from simt import host
from test_triton_topk_distill import BROKEN, CASES, MODES, Inputs, plain
from topk_cases import truth

from pyfast import _native
from pyfast.ops import topk_distill as op
from pyfast.reference import topk_distill as reference

KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Layout:
    """Blocks that hold a row, how many such groups share the rows, and threads a block."""

    cluster: int
    groups: int
    threads: int


LAYOUTS = [Layout(1, 1, 32), Layout(2, 2, 64), Layout(8, 2, 32), Layout(4, 1, 96), Layout(1, 2, 128)]
# What the launcher sees to, rows that are 6 GB apart, and what takes long on the host.
NOT_HERE = {"views", "no_rows", "far_rows", "wide"}


def of_float16(name: str) -> bool:
    return "f16" in name.split("_")


# float16 differs from bfloat16 in two conversions, and a third element type costs a third of the time to compile.
ON_HOST = [name for name in CASES if name not in NOT_HERE and "50257" not in name and not of_float16(name)]


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """All that the tensor's storage holds."""
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return flat.numpy() if tensor.dtype == torch.float32 else flat.view(torch.int16).numpy().view(np.uint16)


def run(library: host.Library, inputs: Inputs, layout: Layout, order: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and gradient."""
    student = inputs.student
    count, words = student.shape
    rows = host.Output(count, np.float32)
    grad = host.Output((count, words), bits_of(student).dtype) if inputs.with_grad else None
    library.run(
        f"topk_distill_{KINDS[student.dtype]}",
        bits_of(student),
        inputs.ids.contiguous().numpy(),
        inputs.entries.contiguous().numpy(),
        inputs.row_scale.contiguous().numpy(),
        rows,
        grad,
        count,
        words,
        inputs.ids.shape[1],
        student.stride(0),
        student.storage_offset(),
        MODES.index(inputs.mode),
        np.array([inputs.temperature]),
        layout.cluster,
        layout.groups,
        layout.threads,
        order=order,
    )
    slopes = np.zeros((0, 0), np.float32) if grad is None else grad.array
    signed = torch.from_numpy(slopes if slopes.dtype == np.float32 else slopes.view(np.int16))
    return torch.from_numpy(rows.array), signed if slopes.dtype == np.float32 else signed.view(student.dtype)


def check(results: tuple[torch.Tensor, torch.Tensor], inputs: Inputs, near: bool = False) -> None:
    """``results`` are as good as float64 rounded to their dtypes; ``near``: of rows whose KL is 1e-7."""
    rows, grad = results
    scale = inputs.row_scale.double()
    there = (inputs.entries != 0) if inputs.mode == "sampled" else inputs.entries > -math.inf
    listed = there.any(-1)
    want_rows, want_grad = truth(inputs.student, inputs.ids, inputs.entries, inputs.mode, inputs.temperature)
    want_rows = torch.where(listed, want_rows * scale, 0.0)
    by_reference = reference.topk_distill(
        inputs.student.double(), inputs.ids, inputs.entries, scale, inputs.mode, inputs.temperature
    )
    torch.testing.assert_close(by_reference, want_rows, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(rows.double(), want_rows, rtol=1e-4 if near else 1e-5, atol=1e-12)
    if not inputs.with_grad:
        assert grad.shape == (0, 0)
        return
    want_grad = torch.where(listed[:, None], want_grad * scale[:, None], 0.0).nan_to_num(0.0)
    rounding = (want_grad.to(grad.dtype).double() - want_grad).norm(dim=1)
    error = (grad.double() - want_grad).norm(dim=1)
    slack = (1e-3 if near else 3e-6) * want_grad.norm(dim=1) + (0.0 if near else 2e-7) * scale.abs()
    assert (error <= 1.02 * rounding + slack).all()


def check_case(name: str, results: tuple[torch.Tensor, torch.Tensor], inputs: Inputs) -> None:
    rows, grad = results
    if name in BROKEN:
        assert rows.isnan().tolist() == [False, True, True, True, False]
        assert grad.isnan().any(1).tolist() == [False, True, True, True, False]
        assert rows[4] == 0 and (grad[4] == 0).all()
        return
    check(results, inputs, near=name.startswith("near"))
    assert (rows * inputs.row_scale.sign() >= 0).all()
    if name == "padded":
        assert rows[2] == 0 and (grad[2] == 0).all()
    if name == "no_mass":
        assert rows.isinf().tolist() == [True, True, False] and grad.isfinite().all()


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.build("topk_distill")


@pytest.mark.parametrize(("name", "layout"), list(zip(ON_HOST, itertools.cycle(LAYOUTS))), ids=str)
def test_on_the_host(library: host.Library, name: str, layout: Layout) -> None:
    inputs = CASES[name]("cpu")
    check_case(name, run(library, inputs, layout), inputs)


# Errors of powers and logarithms as large as a GPU's: at random, or of all logarithms alike.
ERRORS = {"random": {"rough": 2**-22}, "up": {"bias": 2**-22}}


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize(("name", "layout"), list(zip(ON_HOST, itertools.cycle(LAYOUTS))), ids=str)
def test_with_rough_powers_on_the_host(library: host.Library, name: str, layout: Layout, errors: str) -> None:
    inputs = CASES[name]("cpu")
    with library.off_by(**ERRORS[errors]):
        check_case(name, run(library, inputs, layout), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 2, 7, 63, 65, 515, 4003])
def test_widths(library: host.Library, width: int, layout: Layout) -> None:
    for mode, count in zip(MODES, (1, 3, 40, 64), strict=True):
        inputs = plain(5, width, min(count, width), "bf16" if width % 2 else "f32", mode)("cpu")
        check(run(library, inputs, layout), inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 64, 300])
def test_entries(library: host.Library, count: int, mode: str) -> None:
    """More than there are threads, and as many ids of a few words as of many."""
    inputs = plain(3, 1500, count, "f32", mode)("cpu")
    check(run(library, inputs, LAYOUTS[1]), inputs)
    inputs.ids %= 40  # the lists of the blocks are of very unequal length, and most words stand in them several times
    check(run(library, inputs, LAYOUTS[2]), inputs)


@pytest.mark.parametrize("order", host.ORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_orders(library: host.Library, mode: str, order: int) -> None:
    inputs = plain(5, 700, 90, "f32", mode)("cpu")
    inputs.ids[:, 20:60] = inputs.ids[:, :40]
    for layout in LAYOUTS[1:3]:
        results = run(library, inputs, layout, order)
        assert all(map(torch.equal, results, run(library, inputs, layout)))


@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_unaligned_rows(library: host.Library, mode: str, offset: int) -> None:
    """Rows that begin anywhere, and a gradient that lies otherwise."""
    for width, layout in ((333, LAYOUTS[1]), (1000, LAYOUTS[2])):
        inputs = plain(5, width, 20, "bf16", mode)("cpu")
        inputs.student = torch.nn.functional.pad(inputs.student, (offset, 2))[:, offset : offset + width]
        check(run(library, inputs, layout), inputs)


@pytest.mark.parametrize("mode", MODES)
def test_words_where_blocks_meet(library: host.Library, mode: str) -> None:
    """The last word of each block, the first of the next, and both ends of the row."""
    inputs = plain(3, 512, 16, "bf16", mode)("cpu")
    ends = torch.arange(0, 512, 64)
    inputs.ids = torch.cat([ends, (ends - 1) % 512]).expand(3, -1)
    inputs.entries = torch.full((3, 16), 1 / 20 if mode == "sampled" else math.log(1 / 20), dtype=torch.float64)
    for layout in (*LAYOUTS, Layout(8, 1, 64)):
        check(run(library, inputs, layout), inputs)


def test_logits_far_from_each_other(library: host.Library) -> None:
    """Words that a thread meets late and that are e^100 times those before, vectors of -inf, rows far from 0."""
    for shift in (0.0, 700.0, -3000.0):
        inputs = plain(4, 1000, 20, "f32", "bucket")("cpu")
        inputs.student[0, 700:] += 100.0
        inputs.student[1, :500] = -math.inf
        inputs.student[2, 900] = 90.0
        inputs.student[2] = inputs.student[2].sort().values
        inputs.student[3, 1:998] = -math.inf
        inputs.student += shift
        rows, grad = run(library, inputs, LAYOUTS[1])
        want, _ = truth(inputs.student, inputs.ids, inputs.entries, inputs.mode)
        torch.testing.assert_close(rows.double(), want * inputs.row_scale.double(), rtol=1e-5, atol=0)
        assert grad.isfinite().all()


def test_nan_outside_stays_in_its_row(library: host.Library) -> None:
    for layout in LAYOUTS:
        inputs = plain(4, 400, 20, "bf16", "bucket")("cpu")
        outside = next(word for word in range(400) if word not in inputs.ids[1])
        inputs.student[1, outside] = math.nan
        rows, grad = run(library, inputs, layout)
        assert rows.isnan().tolist() == [False, True, False, False]
        assert grad.isnan().any(1).tolist() == [False, True, False, False]


# One text of the kernel each, replaced by another; and what the host says to it (None: a wrong result).
MUTANTS: dict[str, tuple[tuple[str, str], str, str | None]] = {
    "the words stay in the row": (("topk_distill.cuh", "    place = kExcluded<T>;\n"), "", None),
    "row not awaited by all": (
        ("topk_distill_store.cuh", "    ptx::cp_async_wait<0>();\n    ptx::syncthreads();"),
        "    ptx::cp_async_wait<0>();",
        "no barrier|cp_async",
    ),
    "row not awaited": (("topk_distill_store.cuh", "    ptx::cp_async_wait<0>();\n"), "", "cp_async"),
    "summed before the words are out": (
        ("topk_distill.cuh", "      ptx::syncthreads();\n      add_outside"),
        "      add_outside",
        "no barrier",
    ),
    "words written before the others": (
        ("topk_distill.cuh", "    ptx::syncthreads();  // the words of the teacher come after all others"),
        "    ;",
        "no barrier",
    ),
    "list read before it is complete": (
        ("topk_distill_teacher.cuh", "// what fours reach beyond\n    ptx::syncthreads();"),
        "\n",
        "no barrier|nobody",
    ),
    "counts in one half": (
        ("topk_distill_teacher.cuh", "half = half == counts ? counts + kMaxWarps : counts;"),
        "",
        "no barrier",
    ),
    "a block too far": (
        ("topk_distill_store.cuh", "return static_cast<uint32_t>(share_ * kVectorWords<T>)"),
        "return static_cast<uint32_t>(share_ * kVectorWords<T> + 1)",
        "no barrier|outside|past|nobody|buffer",
    ),
    "the last vector is not read": (
        ("topk_distill_store.cuh", "      for (; slot < past; slot += step()) visit_at<1>(slot, visit);"),
        "      ;",
        None,
    ),
    "ends are written as a whole": (
        ("topk_distill_store.cuh", "words_past_multiple(grad) == row.lead ? inside : 0u"),
        "words_past_multiple(grad) == row.lead ? inside + 7 : 0u",
        "writes|past|outside|no barrier",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name: str) -> None:
    place, instead, said = MUTANTS[name]
    broken = host.build("topk_distill_mutant", {place: instead})

    def try_all() -> None:
        for mode, width, order in itertools.product(("bucket", "ignore"), (1500, 1003), host.ORDERS):
            inputs = plain(5, width, 150, "bf16", mode)("cpu")
            inputs.ids[:, :16] = torch.arange(752, 768)
            check(run(broken, inputs, Layout(2, 1, 64), order), inputs)

    with pytest.raises(host.SimtError if said else AssertionError, match=said):
        try_all()


# How rows are laid out on an H100 and an A100: words, bytes a word, entries, blocks that hold a row (0: Triton serves).
PLANS = {
    (232448, 233472, 1): [
        (1000, 4, 5, 1),
        (32000, 2, 64, 1),
        (128256, 2, 64, 4),
        (151936, 2, 64, 8),
        (151936, 2, 1024, 8),
        (262144, 2, 256, 8),
        (262144, 4, 64, 8),
        (600000, 4, 64, 0),
        (32000, 2, 1025, 0),
    ],
    (166912, 167936, 0): [(8192, 2, 64, 0)],
}


@pytest.mark.parametrize("limits", PLANS)
def test_plan(library: host.Library, limits: tuple[int, int, int]) -> None:
    for words, size, named, cluster in PLANS[limits]:
        out = host.InOut(np.zeros(4, np.int64))
        library.run("plan", words, size, named, *limits, out)
        got, share, threads, shared = out.array
        assert got == cluster
        if cluster:
            assert threads % 32 == 0 and 32 <= threads <= 1024 and shared + 2048 <= limits[0]
            most = (words * size + 2 * (16 - size)) // 16  # vectors, where the row begins within one
            assert (cluster - 1) * share < most <= cluster * share


@pytest.mark.parametrize(
    ("built", "fits", "served"), [(True, True, "cuda"), (True, False, "triton"), (False, True, "triton")]
)
def test_what_serves_on_a_gpu(monkeypatch: pytest.MonkeyPatch, built: bool, fits: bool, served: str) -> None:
    monkeypatch.setattr(_native, "CUDA", object() if built else None)
    monkeypatch.setattr(
        torch.ops.pyfast, "topk_distill_fits", lambda student, named: fits and named == 5, raising=False
    )
    for name in ("cuda", "triton"):
        monkeypatch.setattr(torch.ops.pyfast, f"topk_distill_{name}", lambda *_, name=name: name, raising=False)
    inputs = plain(2, 10, 5, "f32", "bucket")("cpu")
    assert op._on_gpu(inputs.student, inputs.ids, inputs.entries, inputs.row_scale, "bucket", 1.0, True) == served


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(_native.CUDA is None or not torch.cuda.is_available(), reason="no GPU or no pyfast._cuda"),
]


def on_gpu(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    import pyfast  # noqa: F401

    tensors = (inputs.student, inputs.ids, inputs.entries, inputs.row_scale)
    arguments = [tensor.cuda() for tensor in tensors]
    assert torch.ops.pyfast.topk_distill_fits(arguments[0], inputs.ids.shape[1])
    rows, grad = torch.ops.pyfast.topk_distill_cuda(*arguments, inputs.mode, inputs.temperature, inputs.with_grad)
    return rows.cpu(), grad.cpu()


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def _clusters(self) -> None:
        if torch.cuda.get_device_capability()[0] < 9:
            pytest.skip("no clusters")

    @pytest.mark.parametrize("name", [name for name in CASES if name != "far_rows"])
    def test_against_float64(self, name: str) -> None:
        inputs = CASES[name]("cpu")
        check_case(name, on_gpu(inputs), inputs)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("count", [64, 256, 1024])
    @pytest.mark.parametrize(("width", "dtype"), [(128256, "bf16"), (151936, "bf16"), (262144, "f16"), (262144, "f32")])
    def test_real_widths(self, width: int, dtype: str, count: int, mode: str) -> None:
        inputs = plain(3, width, count, dtype, mode, 2.0)("cpu")
        check(on_gpu(inputs), inputs)

    @pytest.mark.parametrize("mode", MODES)
    def test_many_rows_agree_with_triton(self, mode: str) -> None:
        """More rows than run at once: each group does several, and asks for the next while it writes one."""
        pytest.importorskip("triton")
        student = torch.randn(1500, 50257, device="cuda", dtype=torch.bfloat16)
        entries, ids = torch.randn(1500, 50257, device="cuda").log_softmax(-1).topk(50)
        scale = torch.ones(1500, device="cuda")
        scale[::7] = 0.0
        inputs = (student, ids, (entries.exp() if mode == "sampled" else entries).double(), scale, mode, 1.0, True)
        rows, grad = torch.ops.pyfast.topk_distill_cuda(*inputs)
        want_rows, want_grad = torch.ops.pyfast.topk_distill_triton(*inputs)
        torch.testing.assert_close(rows, want_rows, rtol=2e-5, atol=0)
        assert (grad.float() - want_grad.float()).norm() <= 4e-3 * want_grad.float().norm()

    def test_what_does_not_fit_is_done_by_triton(self) -> None:
        pytest.importorskip("triton")
        inputs = plain(3, 4000, 1025, "f32", "bucket")("cuda")
        tensors = (inputs.student, inputs.ids, inputs.entries, inputs.row_scale)
        assert not torch.ops.pyfast.topk_distill_fits(inputs.student, 1025)
        rows, grad = torch.ops.pyfast.topk_distill(*tensors, "bucket", 1.0, True)
        check((rows.cpu(), grad.cpu()), plain(3, 4000, 1025, "f32", "bucket")("cpu"))
        with pytest.raises(RuntimeError, match="1025 entries"):
            torch.ops.pyfast.topk_distill_cuda(*tensors, "bucket", 1.0, True)

    def test_captured_in_a_graph(self) -> None:
        inputs = plain(64, 32000, 64, "bf16", "bucket")("cuda")
        tensors = (inputs.student, inputs.ids, inputs.entries, inputs.row_scale)
        step = lambda: torch.ops.pyfast.topk_distill_cuda(*tensors, "bucket", 1.0, True)  # noqa: E731
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        inputs.student.copy_(inputs.student.flip(0))
        graph.replay()
        assert all(map(torch.equal, captured, step()))
