"""linear_distill: the reference, the op, torch.compile, memory, bad input."""

from __future__ import annotations

import pytest
import torch
from linear_cases import SLACK, Case, check

import pyfast
from pyfast import _native, backends
from pyfast.bench.hardware import peak_growth_bytes
from pyfast.ops import _linear_chunks, _memory


def test_float64_is_served_by_the_reference():
    case = Case(9, dtype=torch.float64)
    check(case.fused(temperature=2.0), case.plain(temperature=2.0), 1e-13)


def test_gradcheck_of_the_reference():
    case = Case(3, words=7, student=4, teacher=5, dtype=torch.float64)
    mask = torch.tensor([True, False, True])

    def loss(hidden, head, bias):
        return pyfast.linear_distillation_loss(
            hidden,
            head,
            case.teacher_hidden,
            case.teacher_head,
            "jsd",
            student_bias=bias,
            temperature=2.0,
            mask=mask,
            backend="reference",
        )

    assert torch.autograd.gradcheck(loss, case.trained)


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("dtype", SLACK)
def test_opcheck(dtype, summed):
    case = Case(9, dtype=dtype)
    teacher = (case.teacher_hidden, case.teacher_head, case.teacher_bias)
    objective = ("forward_kl", 0.0, 2.0, 2.0, 0.0, 0.0)
    rest = (None, None, 90, 4, dtype, dtype, summed, [summed] * 3)
    torch.library.opcheck(
        torch.ops.pyfast.linear_distill, (*case.trained, *teacher, torch.rand(9) / 9, *objective, *rest)
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(reduction, autocast):
    case, labels = Case(6), torch.tensor([1, -100, 3, 4, 5, -100])

    def step(hidden, head, bias, teacher_hidden, teacher_head, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return pyfast.linear_distillation_loss(
                hidden * 2,
                head,
                teacher_hidden,
                teacher_head,
                student_bias=bias,
                temperature=4.0,
                labels=labels,
                reduction=reduction,
            )

    inputs = (*case.trained, case.teacher_hidden, case.teacher_head, labels)
    eager = case.differentiate(step(*inputs))
    compiled = case.differentiate(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs))
    check(compiled, eager)


def test_logits_never_exist_in_full():
    case = Case(512, words=32000, student=16, teacher=16)
    logits = 512 * 32000 * 4
    gradients = 32000 * 17 * 4

    def step(**options):
        loss = pyfast.linear_distillation_loss(**vars(case), **options).sum()
        return torch.autograd.grad(loss, case.trained)

    step(chunk_size=16)
    backends.release_memory()
    for reduction in ("mean", "none"):
        grown = peak_growth_bytes(lambda reduction=reduction: step(chunk_size=16, reduction=reduction))
        if grown is None:
            pytest.skip("this system does not tell the peak of its memory")
        assert grown < gradients + logits / 2
    whole = peak_growth_bytes(lambda: step(backend="reference"))
    assert whole is not None and whole > 3 * logits  # what the bound above is worth


def test_what_is_kept_is_at_hand(monkeypatch):
    before = _memory.memory_at_hand(torch.device("cpu"))
    monkeypatch.setattr(_native.CPU, "kept_memory", lambda: 1 << 50)
    assert before is not None and before < 1 << 50 <= _memory.memory_at_hand(torch.device("cpu"))


def test_chunks_fit_the_memory_at_hand(monkeypatch):
    device, row = torch.device("cpu"), 151936 * 4
    size = _linear_chunks.tokens_a_chunk

    def at_hand(amount):
        monkeypatch.setattr(_linear_chunks, "memory_at_hand", lambda device: amount)

    at_hand(1 << 40)
    plenty = size(151936, torch.float32, device)
    assert 128 <= plenty <= 1024 * 6 / 8 / 3  # of 1024 tokens: three blocks in an eighth of six tensors of logits
    assert size(100, torch.float32, device) >= 16384  # small logits need no chunks
    at_hand(None)
    assert size(151936, torch.float32, device) == plenty
    at_hand(100 * 3 * 8 * row)
    assert size(151936, torch.float32, device) == 100 and size(151936, torch.bfloat16, device) == 200
    at_hand(0)
    assert size(151936, torch.float32, device) == 1


def test_memory_at_hand_of_the_cpu(monkeypatch, tmp_path):
    backends.release_memory()
    assert 1 << 20 < _memory.memory_at_hand(torch.device("cpu")) < 1 << 50
    monkeypatch.setattr(_memory.Path, "read_text", lambda self: "no such line")
    assert _memory.memory_at_hand(torch.device("cpu")) == 4 << 30


H, W, HT, WT = torch.randn(3, 8), torch.randn(10, 8), torch.randn(3, 6), torch.randn(10, 6)
BAD = {
    "hidden is no tensor": (TypeError, "student_hidden", {"student_hidden": [1.0]}),
    "integer hidden": (TypeError, "student_hidden", {"student_hidden": torch.ones(3, 8, dtype=torch.int64)}),
    "head is a module": (TypeError, "student_head", {"student_head": torch.nn.Linear(8, 10)}),
    "head transposed": (ValueError, "student_head", {"student_head": torch.randn(8, 10)}),
    "head of three dimensions": (ValueError, "student_head", {"student_head": torch.randn(1, 10, 8)}),
    "head without words": (ValueError, "student_head", {"student_head": torch.randn(0, 8)}),
    "head of another dtype": (TypeError, "student_head", {"student_head": W.bfloat16()}),
    "head elsewhere": (ValueError, "student_head", {"student_head": W.to("meta")}),
    "bias shape": (ValueError, "student_bias", {"student_bias": torch.randn(8)}),
    "bias of another dtype": (TypeError, "student_bias", {"student_bias": torch.randn(10).half()}),
    "teacher missing": (ValueError, "got neither", {"teacher_hidden": None}),
    "teacher twice": (ValueError, "got both", {"teacher_logits": torch.randn(3, 10)}),
    "teacher head missing": (TypeError, "teacher_head", {"teacher_head": None}),
    "logits and head": (ValueError, "teacher_head", {"teacher_logits": torch.randn(3, 10), "teacher_hidden": None}),
    "heads swapped": (ValueError, "student_head", {"student_head": WT, "teacher_head": W}),
    "teacher rows": (ValueError, "teacher_hidden", {"teacher_hidden": torch.randn(4, 6)}),
    "teacher elsewhere": (
        ValueError,
        "teacher_hidden",
        {"teacher_hidden": HT.to("meta"), "teacher_head": WT.to("meta")},
    ),
    "teacher bias": (ValueError, "teacher_bias", {"teacher_bias": torch.randn(11)}),
    "vocabularies differ": (ValueError, "vocab_size=9", {"teacher_head": WT[:9]}),
    "vocab_size above": (ValueError, "vocab_size", {"vocab_size": 11}),
    "chunk_size zero": (ValueError, "chunk_size", {"chunk_size": 0}),
    "chunk_size float": (ValueError, "chunk_size", {"chunk_size": 4.0}),
    "divergence": (ValueError, "divergence", {"divergence": "kl"}),
    "temperature": (ValueError, "temperature", {"temperature": 0.0}),
    "reduction": (ValueError, "reduction", {"reduction": "batchmean"}),
    "labels shape": (ValueError, "labels", {"labels": torch.zeros(3, 10, dtype=torch.int64)}),
    "labels beyond vocab_size": (
        ValueError,
        "labels",
        {"labels": torch.full((3,), 9), "ce_weight": 0.5, "vocab_size": 9},
    ),
    "ce_weight without labels": (ValueError, "labels", {"ce_weight": 0.5}),
    "mask dtype": (TypeError, "mask", {"mask": torch.ones(3)}),
    "backend elsewhere": (ValueError, "backend", {"backend": "triton"}),
    "float64 on native": (
        ValueError,
        "backend",
        {"student_hidden": H.double(), "student_head": W.double(), "backend": "native"},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    error, message, options = BAD[name]
    arguments = {"student_hidden": H, "student_head": W, "teacher_hidden": HT, "teacher_head": WT, **options}
    with pytest.raises(error, match=message):
        pyfast.linear_distillation_loss(**arguments)
