"""topk_distill: the contract of the public function; its numbers are in test_topk_distill.py."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from topk_cases import DTYPES, GRAD_TOLERANCE, INF, MODES, NAN, logits, loss_and_grad, teacher, truth

import pyfast
from pyfast import backends
from pyfast.bench.hardware import peak_growth_bytes


def test_temperature_and_its_scale():
    s, (ids, entries) = logits(4, 100), teacher(4, 100, 10)
    plain = pyfast.topk_distillation_loss(s, ids, entries, temperature=2.0, scale_by_t2=False)
    assert relative_error(plain, truth(s, ids, entries, "bucket", 2.0)[0].mean()) < 2e-6
    assert relative_error(pyfast.topk_distillation_loss(s, ids, entries, temperature=2.0), 4 * plain) < 1e-6


def test_reductions_labels_and_num_items():
    s, (ids, entries) = logits(2, 5, 64), teacher(10, 64, 8)
    rows = truth(s.reshape(10, 64), ids, entries, "bucket")[0].reshape(2, 5)
    ids, entries = ids.reshape(2, 5, 8), entries.reshape(2, 5, 8)
    labels = torch.randint(0, 64, (2, 5))
    labels[0, :3] = -100
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 4] = False
    keep = (labels != -100) & mask

    def loss(**options):
        return pyfast.topk_distillation_loss(s, ids, entries, **options)

    assert relative_error(loss(), rows.mean()) < 1e-6
    assert relative_error(loss(reduction="sum"), rows.sum()) < 1e-6
    assert relative_error(loss(labels=labels, mask=mask), rows[keep].mean()) < 1e-6
    none = loss(reduction="none", labels=labels, mask=mask)
    assert none.shape == (2, 5) and relative_error(none, torch.where(keep, rows, 0.0)) < 1e-6
    assert relative_error(loss(num_items=40, mask=mask), rows[mask].sum() / 40) < 1e-6
    assert relative_error(loss(num_items=torch.tensor(40)), rows.sum() / 40) < 1e-6
    shifted = torch.where(labels == -100, 7, 8)
    assert relative_error(loss(labels=shifted, ignore_index=7), rows[labels != -100].mean()) < 1e-6


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_token_counts(backend):
    ids, entries = teacher(3, 50, 5)
    s = logits(3, 50).requires_grad_()
    loss = pyfast.topk_distillation_loss(s, ids, entries, labels=torch.full((3,), -100), backend=backend)
    loss.backward()
    assert loss == 0 and torch.equal(s.grad, torch.zeros(3, 50))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(mode, backend):
    ids, entries = teacher(0, 50, 5, mode)
    loss, grad = loss_and_grad(logits(0, 50), ids, entries, mode, backend=backend)
    assert loss == 0 and grad.shape == (0, 50)


@pytest.mark.parametrize("mode", MODES)
def test_one_word_in_all(isa, mode):
    entries = torch.full((3, 1), 1.0 if mode == "sampled" else 0.0)
    rows, grad = loss_and_grad(logits(3, 1), torch.zeros(3, 1, dtype=torch.int64), entries, mode, reduction="none")
    assert torch.equal(rows, torch.zeros(3)) and torch.equal(grad, torch.zeros(3, 1))


def test_one_row_without_batch():
    s, (ids, entries) = logits(64), teacher(1, 64, 6)
    loss = pyfast.topk_distillation_loss(s, ids[0], entries[0], reduction="none")
    assert loss.shape == () and relative_error(loss, truth(s[None], ids, entries, "bucket")[0][0]) < 2e-6


@pytest.mark.parametrize("factor", [1.0, 0.125, 3.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_incoming_gradients_are_honoured(factor, dtype):
    s, (ids, entries) = logits(4, 1000, dtype=dtype), teacher(4, 1000, 64)
    shares = torch.tensor([1.0, 2.0, -0.5, 0.0])
    student = s.clone().requires_grad_()
    rows = pyfast.topk_distillation_loss(student, ids, entries, reduction="none")
    (grad,) = torch.autograd.grad((rows * shares * factor).sum(), student)
    expected = truth(s, ids, entries, "bucket")[1] * shares[:, None] * factor
    assert relative_error(grad, expected) < GRAD_TOLERANCE[dtype]


def test_backward_twice_with_retained_graph():
    s, (ids, entries) = logits(3, 100).requires_grad_(), teacher(3, 100, 5)
    loss = pyfast.topk_distillation_loss(s, ids, entries)
    first = torch.autograd.grad(loss, s, retain_graph=True)[0].clone()
    scaled = torch.autograd.grad(2 * loss, s, retain_graph=True)[0].clone()
    again = torch.autograd.grad(loss, s)[0]
    assert torch.equal(first, again) and relative_error(scaled, 2 * first) < 1e-6


def test_double_backward_is_refused():
    s, (ids, entries) = logits(3, 100).requires_grad_(), teacher(3, 100, 5)
    rows = pyfast.topk_distillation_loss(s, ids, entries, reduction="none")
    (grad,) = torch.autograd.grad((rows * s.sum(-1)).sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_no_gradient_flows_to_the_teacher_or_under_no_grad():
    s, (ids, entries) = logits(3, 100).requires_grad_(), teacher(3, 100, 5)
    entries.requires_grad_()
    pyfast.topk_distillation_loss(s, ids, entries).backward()
    assert entries.grad is None and s.grad is not None
    with torch.no_grad():
        assert not pyfast.topk_distillation_loss(s, ids, entries).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_float64_is_served_by_the_reference(mode):
    s, (ids, entries) = logits(3, 50, dtype=torch.float64), teacher(3, 50, 6, mode)
    loss, grad = loss_and_grad(s, ids, entries, mode, temperature=2.0)
    true_rows, true_grad = truth(s, ids, entries, mode, 2.0)
    assert loss.dtype == torch.float64
    assert relative_error(loss, 4 * true_rows.mean()) < 1e-12 and relative_error(grad, 4 / 3 * true_grad) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_of_the_reference(mode):
    s, (ids, entries) = logits(4, 9, dtype=torch.float64).requires_grad_(), teacher(4, 9, 4, mode)
    ids[2, 3] = ids[2, 2]
    entries[3, 1] = 0.0 if mode == "sampled" else -INF
    entries = entries.double() if mode == "sampled" else entries.double() - math.log(2)
    mask = torch.tensor([True, False, True, True])

    def loss(x):
        chosen = {"weights": entries} if mode == "sampled" else {"tail": mode}
        return pyfast.topk_distillation_loss(x, ids, entries, temperature=2.0, mask=mask, backend="reference", **chosen)

    assert torch.autograd.gradcheck(loss, s)


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode, with_grad):
    s, (ids, entries) = logits(3, 100).requires_grad_(with_grad), teacher(3, 100, 5, mode)
    torch.library.opcheck(
        torch.ops.pyfast.topk_distill, (s, ids, entries.double(), torch.ones(3), mode, 2.0, with_grad)
    )


@pytest.mark.parametrize("mode", ["bucket", "sampled"])
def test_compiles_in_one_graph(mode):
    @torch.compile(fullgraph=True)
    def step(student, ids, entries, mask):
        weights = {"weights": entries} if mode == "sampled" else {}
        loss = pyfast.topk_distillation_loss(student * 2, ids, entries, temperature=4.0, mask=mask, **weights)
        return loss * 3

    s, (ids, entries) = logits(4, 200).requires_grad_(), teacher(4, 200, 9, mode)
    mask = torch.tensor([True, False, True, True])
    loss = step(s, ids, entries, mask)
    (grad,) = torch.autograd.grad(loss, s)
    true_rows, true_grad = truth(s.detach() * 2, ids, entries, mode, 4.0)
    assert relative_error(loss, 16 * true_rows[mask].sum()) < 2e-6
    assert relative_error(grad, 32 * true_grad * mask[:, None]) < 2e-6


def test_allocates_nothing_of_the_size_of_the_logits_but_the_gradient():
    s, (ids, entries) = logits(256, 32000).requires_grad_(), teacher(1, 32000, 64)
    ids, entries = ids.expand(256, -1), entries.expand(256, -1)
    one = s.numel() * s.element_size()

    def evaluate():
        with torch.no_grad():
            return pyfast.topk_distillation_loss(s, ids, entries, temperature=4.0)

    def step():
        return torch.autograd.grad(pyfast.topk_distillation_loss(s, ids, entries, temperature=4.0), s)

    for run in (evaluate, step):  # what is set up once
        run()
    backends.release_memory()
    assert peak_growth_bytes(evaluate) < 0.1 * one
    assert 0.9 * one < peak_growth_bytes(step) < 1.15 * one


def test_offsets_are_64_bit(tmp_path):
    """Rows at element offsets past 2^32 of a sparse file: no such memory is needed."""
    rows, stride, vocab = 5, 2**30 + 64, 40
    s = torch.from_file(str(tmp_path / "sparse.bin"), size=rows * stride, dtype=torch.bfloat16, shared=True)
    s = s.as_strided((rows, vocab), (stride, 1))
    s.copy_(logits(rows, vocab, dtype=torch.bfloat16))
    ids, entries = teacher(rows, vocab, 4)
    args = (ids, entries.double(), torch.ones(rows), "bucket", 1.0, True)
    got, expected = torch.ops.pyfast.topk_distill(s, *args), torch.ops.pyfast.topk_distill(s.clone(), *args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_where_nothing_is_looked_at_an_id_out_of_range_gives_nan(isa, mode, backend):
    """As on a GPU: the kernel itself keeps from reading elsewhere."""
    s, (ids, entries) = logits(3, 100), teacher(3, 100, 5, mode)
    clean = truth(s, ids, entries, mode)[0]
    for wrong in (-1, 100, 2**40):
        ids[1, 2] = wrong
        args = (s, ids, entries.double(), torch.ones(3), mode, 1.0)
        if backend == "native":
            rows, grad = torch.ops.pyfast.topk_distill(*args, True)
            assert torch.isnan(grad[1]).all() and torch.isfinite(grad[[0, 2]]).all()
        else:
            rows = pyfast.reference.topk_distill.topk_distill(*args)
        assert torch.isnan(rows[1]) and relative_error(rows[[0, 2]], clean[[0, 2]]) < 2e-6


S, IDS = torch.randn(3, 10), torch.arange(4).expand(3, 4)
LOGPROBS, WEIGHTS = torch.full((3, 4), -2.0), torch.ones(3, 4)
BAD = {
    "student is no tensor": (TypeError, "student_logits", {"student_logits": [1.0]}),
    "integer logits": (TypeError, "student_logits", {"student_logits": torch.ones(3, 10, dtype=torch.int64)}),
    "no words": (ValueError, "student_logits", {"student_logits": torch.ones(3, 0)}),
    "ids are no tensor": (TypeError, "teacher_ids", {"teacher_ids": [[1]]}),
    "float ids": (TypeError, "teacher_ids", {"teacher_ids": IDS.float()}),
    "boolean ids": (TypeError, "teacher_ids", {"teacher_ids": IDS > 1}),
    "ids of other rows": (ValueError, "teacher_ids", {"teacher_ids": IDS[:2], "teacher_logprobs": LOGPROBS[:2]}),
    "ids without a row": (ValueError, "teacher_ids", {"teacher_ids": IDS[0], "teacher_logprobs": LOGPROBS[0]}),
    "no entries": (ValueError, "teacher_ids", {"teacher_ids": IDS[:, :0], "teacher_logprobs": LOGPROBS[:, :0]}),
    "more entries than words": (
        ValueError, "K = 11", {"teacher_ids": torch.zeros(3, 11).long(), "teacher_logprobs": torch.full((3, 11), -9.0)}
    ),
    "ids on another device": (ValueError, "teacher_ids", {"teacher_ids": IDS.to("meta")}),
    "id above": (ValueError, "teacher_ids: got 10, accepted: 0 to 9", {"teacher_ids": IDS + 7}),
    "id below": (ValueError, "teacher_ids: got -1", {"teacher_ids": IDS - 1}),
    "id above, weights": (ValueError, "teacher_ids: got 10", {"teacher_ids": IDS + 7, "weights": WEIGHTS}),
    "no log-probabilities": (TypeError, "teacher_logprobs", {"teacher_logprobs": None}),
    "log-probabilities are no tensor": (TypeError, "teacher_logprobs", {"teacher_logprobs": [[0.0]]}),
    "integer log-probabilities": (TypeError, "teacher_logprobs", {"teacher_logprobs": IDS}),
    "other shape": (ValueError, "teacher_logprobs", {"teacher_logprobs": LOGPROBS[:, :3]}),
    "other device": (ValueError, "teacher_logprobs", {"teacher_logprobs": LOGPROBS.to("meta")}),
    "probabilities": (ValueError, "teacher_logprobs", {"teacher_logprobs": LOGPROBS.exp()}),
    "logits": (ValueError, "teacher_logprobs", {"teacher_logprobs": LOGPROBS + 9}),
    "sum above 1": (ValueError, "sum to 1.472", {"teacher_logprobs": LOGPROBS + 1}),
    "tail": (ValueError, "tail: got 'drop', accepted: bucket, ignore, renormalise", {"tail": "drop"}),
    "tail sampled": (ValueError, "tail", {"tail": "sampled"}),
    "tail and weights": (ValueError, "tail", {"tail": "bucket", "weights": WEIGHTS}),
    "weights shape": (ValueError, "weights", {"weights": WEIGHTS[:, :1]}),
    "weights integer": (TypeError, "weights", {"weights": IDS}),
    "weights below 0": (ValueError, "weights: got -1", {"weights": -WEIGHTS}),
    "weights infinite": (ValueError, "weights: got inf", {"weights": WEIGHTS * INF}),
    "weights device": (ValueError, "weights", {"weights": WEIGHTS.to("meta")}),
    "temperature zero": (ValueError, "temperature", {"temperature": 0.0}),
    "temperature nan": (ValueError, "temperature", {"temperature": NAN}),
    "temperature text": (TypeError, "temperature", {"temperature": "2"}),
    "reduction": (ValueError, "reduction", {"reduction": "batchmean"}),
    "labels shape": (ValueError, "labels", {"labels": IDS}),
    "mask integer": (TypeError, "mask", {"mask": torch.ones(3, dtype=torch.int64)}),
    "num_items with sum": (ValueError, "num_items", {"num_items": 3, "reduction": "sum"}),
    "backend unknown": (ValueError, "backend", {"backend": "cudnn"}),
    "backend elsewhere": (ValueError, "backend", {"backend": "triton"}),
    "float64 on native": (ValueError, "backend", {"student_logits": S.double(), "backend": "native"}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    error, message, options = BAD[case]
    arguments = {"student_logits": S, "teacher_ids": IDS, "teacher_logprobs": LOGPROBS, **options}
    with pytest.raises(error, match=message) as caught:
        pyfast.topk_distillation_loss(**arguments)
    assert "accepted" in str(caught.value) or "num_items" in message


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_log_probabilities_rounded_to_bfloat16_pass(backend):
    """Whether they sum to less or more than 1, and whether there is a word besides: what is missing, or too much,
    moves value and gradient by no more than itself."""
    s = torch.randn(4, 51)
    log_p = torch.log_softmax(torch.randn(4, 50) * 0.1, -1)
    for shift in (-0.02, 0.0, 0.02):
        entries = (log_p + shift).bfloat16()
        for student in (s, s[:, :50]):
            options = {"reduction": "none", "backend": backend}
            rows, grad = loss_and_grad(student, torch.arange(50).expand(4, 50), entries, **options)
            true_rows, true_grad = truth(student, torch.arange(50).expand(4, 50), entries, "bucket")
            assert (rows - true_rows).abs().max() < 0.03 and (rows > 0).all()
            assert relative_error(grad, true_grad) < 0.03


def test_a_float16_mean_is_divided_last():
    """Small gradients reach a loss scale before they are rounded to float16."""
    s, (ids, entries) = logits(4096, 64, dtype=torch.float16), teacher(4096, 64, 8)
    student = s.clone().requires_grad_()
    (2.0**14 * pyfast.topk_distillation_loss(student, ids, entries)).backward()
    expected = truth(s, ids, entries, "bucket")[1] * (2.0**14 / 4096)
    assert relative_error(student.grad, expected) < GRAD_TOLERANCE[torch.float16]


def test_the_op_itself_refuses_what_the_function_would():
    op, entries = torch.ops.pyfast.topk_distill, LOGPROBS.double()
    for message, arguments in {
        "dtype": (S.double(), IDS, entries, torch.ones(3), "bucket", 1.0, False),
        "ids": (S, IDS.int(), entries, torch.ones(3), "bucket", 1.0, False),
        "entries": (S, IDS, LOGPROBS, torch.ones(3), "bucket", 1.0, False),
        "row_scale": (S, IDS, entries, torch.ones(4), "bucket", 1.0, False),
        "temperature": (S, IDS, entries, torch.ones(3), "bucket", 0.0, False),
        "tail": (S, IDS, entries, torch.ones(3), "cut", 1.0, False),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
