"""distill_kl: every ISA against float64, then the contract of the public function."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast import backends
from pyfast.bench.hardware import peak_growth_bytes
from pyfast.nn import LogitDistillationLoss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What rounding the result to the dtype costs, and a little more.
GRAD_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
INF = float("inf")
# mix, temperatures, softcaps, labels, ce_scale, with_grad of the op
PLAIN = (0.0, 1.0, 1.0, 0.0, 0.0, None, None, False)


def truth(student, teacher, temperature=1.0, teacher_temperature=None):
    """Loss rows and the gradient of their sum, in float64, by the formula."""
    student = student.detach().double().requires_grad_()
    log_s = torch.log_softmax(student / temperature, -1)
    log_t = torch.log_softmax(teacher.double() / (teacher_temperature or temperature), -1)
    t = log_t.exp()
    rows = torch.where(t == 0, 0.0, t * (log_t - log_s)).sum(-1)
    (grad,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach(), grad


def loss_and_grad(student, teacher, **options):
    student = student.detach().requires_grad_()
    loss = pyfast.distillation_loss(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), grad


def logits(*shape, dtype=torch.float32, spread=3.0):
    return (torch.randn(*shape) * spread).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 17, 1000, 1024, 1025, 32000, 151936])
def test_matches_float64(isa, dtype, vocab):
    if isa == "serial" and vocab > 32000:
        vocab = 50257
    s, t = logits(3, vocab, dtype=dtype), logits(3, vocab, dtype=dtype)
    rows, grad = loss_and_grad(s, t, temperature=2.0, reduction="none", scale_by_t2=False)
    true_rows, true_grad = truth(s, t, 2.0)
    assert rows.dtype == torch.float32 and grad.dtype == dtype
    if vocab == 1:
        assert torch.equal(rows, torch.zeros(3)) and torch.equal(grad, torch.zeros_like(grad))
        return
    assert relative_error(rows, true_rows) < 2e-6
    assert relative_error(grad, true_grad) < GRAD_TOLERANCE[dtype]


@settings(max_examples=200, deadline=None, derandomize=True)  # many, and the same ones in every run
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 3000),
    temperature=st.floats(0.25, 10.0),
    teacher_temperature=st.one_of(st.none(), st.floats(0.25, 10.0)),
    spread=st.floats(0.01, 20.0),
    dtype=st.sampled_from(DTYPES),
    variant=st.sampled_from(backends.isas_supported() or ["serial"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_temperature(rows, vocab, temperature, teacher_temperature, spread, dtype, variant, seed):
    torch.manual_seed(seed)  # an example that fails can be run again
    s, t = logits(rows, vocab, dtype=dtype, spread=spread), logits(rows, vocab, dtype=dtype, spread=spread)
    options = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    with backends.isa(variant):
        got, grad = loss_and_grad(s, t, reduction="none", scale_by_t2=False, **options)
    true_rows, true_grad = truth(s, t, **options)
    # What float32 cannot hold: logits over the temperature, rounded.
    rounding = 2.0**-23 * float(torch.stack([s, t]).abs().max()) / min(temperature, teacher_temperature or temperature)
    assert (got - true_rows).abs().max() <= 5e-6 * true_rows.abs().max() + rounding + 1e-12
    absolute = 1e-6 + rounding if dtype == torch.float32 else 1e-3 + rounding
    assert (grad - true_grad).abs().max() <= GRAD_TOLERANCE[dtype] * true_grad.abs().max() + absolute / temperature


@pytest.mark.parametrize("kl", [1e-7, 1e-5, 1e-3])
def test_near_convergence_keeps_its_digits(isa, kl):
    s = logits(4, 8192)
    t = s + torch.randn_like(s) * math.sqrt(2 * kl)
    rows, grad = loss_and_grad(s, t, reduction="none")
    true_rows, true_grad = truth(s, t)
    assert 0.1 * kl < true_rows.mean() < 10 * kl
    assert ((rows - true_rows) / true_rows).abs().max() < 1e-4
    assert relative_error(grad, true_grad) < 1e-3


def test_identical_logits_give_exactly_zero(isa):
    s = logits(4, 5000)
    rows, grad = loss_and_grad(s, s.clone(), temperature=3.0, reduction="none")
    assert torch.equal(rows, torch.zeros(4)) and torch.equal(grad, torch.zeros_like(grad))


def test_words_the_teacher_excludes_add_nothing(isa):
    s, t = logits(4, 3000), logits(4, 3000)
    t[0, 100:] = -INF
    t[1, ::2] = -INF
    t[2, 1:] = -INF  # one word left
    s[1, ::2] = -INF  # excluded by both
    rows, grad = loss_and_grad(s, t, reduction="none", temperature=2.0, scale_by_t2=False)
    true_rows, true_grad = truth(s, t, 2.0)
    assert torch.isfinite(rows).all() and torch.isfinite(grad).all()
    assert relative_error(rows, true_rows) < 2e-6 and relative_error(grad, true_grad) < 2e-6


def test_student_without_mass_where_the_teacher_has_some_is_infinite(isa):
    s, t = logits(2, 100), logits(2, 100)
    s[0, 5] = -INF
    rows, _ = loss_and_grad(s, t, reduction="none")
    assert rows[0] == INF and torch.isfinite(rows[1])


@pytest.mark.parametrize("where", [0, 15, 999])
@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("tensor", ["student", "teacher"])
def test_nan_stays_in_its_row(isa, where, bad, tensor):
    s, t = logits(3, 1000), logits(3, 1000)
    clean, clean_grad = loss_and_grad(s, t, reduction="none")
    (s if tensor == "student" else t)[1, where] = bad
    rows, grad = loss_and_grad(s, t, reduction="none")
    assert torch.isnan(rows[1]) and torch.isnan(grad[1]).any()
    assert torch.equal(rows[[0, 2]], clean[[0, 2]]) and torch.equal(grad[[0, 2]], clean_grad[[0, 2]])


def test_extreme_logits(isa):
    s = torch.tensor([[1e30, 0.0, -1e30], [88.0, -88.0, 0.0], [3e38, -3e38, 0.0]])
    t = torch.tensor([[1e30, 0.0, -1e30], [-88.0, 88.0, 0.0], [3e38, -3e38, 0.0]])
    rows, grad = loss_and_grad(s, t, reduction="none")
    true_rows, true_grad = truth(s, t)
    torch.testing.assert_close(rows.double(), true_rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_count_are_not_read(isa):
    s, t = logits(4, 500), logits(4, 500)
    s[1], t[3] = float("nan"), float("nan")
    mask = torch.tensor([True, False, True, False])
    rows, grad = loss_and_grad(s, t, mask=mask, reduction="none")
    assert rows[1] == 0 and rows[3] == 0 and torch.equal(grad[[1, 3]], torch.zeros(2, 500))
    assert relative_error(rows[mask], truth(s[mask], t[mask])[0]) < 2e-6


@pytest.mark.parametrize("shape", [(5, 1037), (600, 2049)])  # the second takes streaming stores, not aligned
def test_every_element_of_the_gradient_is_written(isa, shape):
    s, t = logits(*shape), logits(*shape)
    poison = [torch.full(shape, float("nan")) for _ in range(4)]
    del poison  # the allocator hands these pages out again
    _, grad = loss_and_grad(s, t, reduction="sum")
    assert relative_error(grad, truth(s, t)[1]) < 2e-6


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(6, -1),
    "strided columns": lambda x: torch.stack([x, x], -1)[..., 0],
    "strided rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "offset": lambda x: torch.cat([x.flatten()[:3], x.flatten()])[3:].reshape(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(isa, view):
    s, t = VIEWS[view](logits(6, 333)), VIEWS[view](logits(6, 333))
    rows, grad = loss_and_grad(s, t, reduction="none")
    true_rows, true_grad = truth(s, t)
    assert relative_error(rows, true_rows) < 2e-6 and relative_error(grad, true_grad) < 2e-6


def test_temperatures_and_their_scale():
    s, t = logits(4, 100), logits(4, 100)
    apart = pyfast.distillation_loss(s, t, temperature=2.0, teacher_temperature=5.0, reduction="none")
    assert relative_error(apart, 4.0 * truth(s, t, 2.0, 5.0)[0]) < 2e-6
    plain = pyfast.distillation_loss(s, t, temperature=2.0, scale_by_t2=False)
    assert relative_error(pyfast.distillation_loss(s, t, temperature=2.0), 4 * plain) < 1e-6


def test_reductions_labels_and_num_items():
    s, t = logits(2, 5, 64), logits(2, 5, 64)
    rows = truth(s, t)[0]
    labels = torch.randint(0, 64, (2, 5))
    labels[0, :3] = -100
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 4] = False
    keep = (labels != -100) & mask
    options = {"labels": labels, "mask": mask}
    assert relative_error(pyfast.distillation_loss(s, t), rows.mean()) < 1e-6
    assert relative_error(pyfast.distillation_loss(s, t, reduction="sum"), rows.sum()) < 1e-6
    assert relative_error(pyfast.distillation_loss(s, t, **options), rows[keep].mean()) < 1e-6
    none = pyfast.distillation_loss(s, t, reduction="none", **options)
    assert none.shape == (2, 5) and relative_error(none, torch.where(keep, rows, 0.0)) < 1e-6
    shared = pyfast.distillation_loss(s, t, num_items=40, **options)
    assert relative_error(shared, rows[keep].sum() / 40) < 1e-6
    shared = pyfast.distillation_loss(s, t, num_items=torch.tensor(40), **options)
    assert relative_error(shared, rows[keep].sum() / 40) < 1e-6
    seven = pyfast.distillation_loss(s, t, labels=torch.where(labels == -100, 7, 8), ignore_index=7)
    assert relative_error(seven, rows[labels != -100].mean()) < 1e-6


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_token_counts(backend):
    s = logits(3, 50).requires_grad_()
    loss = pyfast.distillation_loss(s, logits(3, 50), labels=torch.full((3,), -100), backend=backend)
    loss.backward()
    assert loss == 0 and torch.equal(s.grad, torch.zeros(3, 50))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction):
    s = logits(0, 50).requires_grad_()
    loss = pyfast.distillation_loss(s, logits(0, 50), reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0 and s.grad.shape == (0, 50)


def test_one_row_without_batch():
    s, t = logits(64), logits(64)
    loss = pyfast.distillation_loss(s, t, reduction="none")
    assert loss.shape == () and relative_error(loss, truth(s[None], t[None])[0][0]) < 2e-6


def test_vocab_size_compares_the_first_words():
    s, t = logits(3, 120), logits(3, 100)
    loss, grad = loss_and_grad(s, t, vocab_size=90, reduction="none")
    true_rows, true_grad = truth(s[:, :90], t[:, :90])
    assert relative_error(loss, true_rows) < 2e-6 and relative_error(grad[:, :90], true_grad) < 2e-6
    assert torch.equal(grad[:, 90:], torch.zeros(3, 30))


@pytest.mark.parametrize("factor", [1.0, 0.125, 3.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_incoming_gradients_are_honoured(isa, factor, dtype):
    s, t = logits(4, 1000, dtype=dtype), logits(4, 1000, dtype=dtype)
    weights = torch.tensor([1.0, 2.0, -0.5, 0.0])
    student = s.clone().requires_grad_()
    rows = pyfast.distillation_loss(student, t, reduction="none")
    (grad,) = torch.autograd.grad((rows * weights * factor).sum(), student)
    assert relative_error(grad, truth(s, t)[1] * weights[:, None] * factor) < GRAD_TOLERANCE[dtype]


def test_backward_twice_with_retained_graph():
    s, t = logits(3, 100).requires_grad_(), logits(3, 100)
    loss = pyfast.distillation_loss(s, t)
    first = torch.autograd.grad(loss, s, retain_graph=True)[0].clone()
    scaled = torch.autograd.grad(2 * loss, s, retain_graph=True)[0].clone()
    again = torch.autograd.grad(loss, s)[0]
    assert torch.equal(first, again) and relative_error(scaled, 2 * first) < 1e-6


def test_double_backward_is_refused():
    s, t = logits(3, 100).requires_grad_(), logits(3, 100)
    (grad,) = torch.autograd.grad(pyfast.distillation_loss(s, t), s, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
    rows = pyfast.distillation_loss(s, t, reduction="none")
    (grad,) = torch.autograd.grad((rows * s.sum(-1)).sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_no_gradient_flows_to_the_teacher_or_under_no_grad():
    s, t = logits(3, 100).requires_grad_(), logits(3, 100).requires_grad_()
    pyfast.distillation_loss(s, t).backward()
    assert t.grad is None
    with torch.no_grad():
        assert not pyfast.distillation_loss(s, t).requires_grad


def test_mixed_dtypes_use_the_wider():
    s, t = logits(3, 100, dtype=torch.bfloat16), logits(3, 100)
    loss, grad = loss_and_grad(s, t)
    assert grad.dtype == torch.bfloat16 and relative_error(loss, truth(s, t)[0].mean()) < 2e-6


def test_a_float16_mean_is_divided_last():
    """Small gradients reach a loss scale before they are rounded to float16."""
    s, t = logits(4096, 64, dtype=torch.float16), logits(4096, 64, dtype=torch.float16)
    student = s.clone().requires_grad_()
    (2.0**14 * pyfast.distillation_loss(student, t)).backward()
    _, grad = truth(s, t)
    assert relative_error(student.grad, grad * (2.0**14 / 4096)) < GRAD_TOLERANCE[torch.float16]


def test_float64_is_served_by_the_reference():
    s, t = logits(3, 50, dtype=torch.float64), logits(3, 50, dtype=torch.float64)
    loss, grad = loss_and_grad(s, t, temperature=2.0)
    true_rows, true_grad = truth(s, t, 2.0)
    assert loss.dtype == torch.float64
    assert relative_error(loss, 4 * true_rows.mean()) < 1e-14 and relative_error(grad, 4 / 3 * true_grad) < 1e-13


def test_gradcheck_of_the_reference():
    s, t = logits(3, 7, dtype=torch.float64).requires_grad_(), logits(3, 7, dtype=torch.float64)
    t[0, 2] = -INF
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(
        lambda x: pyfast.distillation_loss(x, t, temperature=2.0, mask=mask, backend="reference"), s
    )


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, with_grad):
    s, t = logits(3, 100, dtype=dtype).requires_grad_(with_grad), logits(3, 100, dtype=dtype)
    arguments = (s, t, torch.ones(3), "forward_kl", 0.0, 2.0, 2.0, 0.0, 0.0, None, None, with_grad)
    torch.library.opcheck(torch.ops.pyfast.distill_kl, arguments)
    torch.library.opcheck(torch.ops.pyfast.scale_rows, (s.detach(), torch.rand(3)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(reduction):
    @torch.compile(fullgraph=True)
    def step(student, teacher, labels):
        loss = pyfast.distillation_loss(student * 2, teacher, temperature=4.0, labels=labels, reduction=reduction)
        return loss.sum() * 3

    s, t = logits(4, 200).requires_grad_(), logits(4, 200)
    labels = torch.tensor([1, -100, 2, 3])
    loss = step(s, t, labels)
    (grad,) = torch.autograd.grad(loss, s)
    plain = 3 * pyfast.distillation_loss(s * 2, t, temperature=4.0, labels=labels, reduction=reduction).sum()
    assert relative_error(loss, plain.detach()) < 1e-6
    assert relative_error(grad, torch.autograd.grad(plain, s)[0]) < 1e-6


def test_allocates_nothing_of_the_size_of_the_logits_but_the_gradient():
    s, t = logits(256, 32000).requires_grad_(), logits(256, 32000)
    one = s.numel() * s.element_size()

    def evaluate():
        with torch.no_grad():
            return pyfast.distillation_loss(s, t, temperature=4.0)

    def step():
        return torch.autograd.grad(pyfast.distillation_loss(s, t, temperature=4.0), s)

    for run in (evaluate, step):  # what is set up once
        run()
    backends.release_memory()
    assert peak_growth_bytes(evaluate) < 0.1 * one
    assert 0.9 * one < peak_growth_bytes(step) < 1.1 * one


def test_the_memory_of_gradients_is_kept_and_reused():
    s, t = logits(64, 32000).requires_grad_(), logits(64, 32000)

    def gradient():
        return torch.autograd.grad(pyfast.distillation_loss(s, t), s)[0]

    def of_rows(rows):
        return pyfast.distillation_value_and_grad(s[:rows].detach(), t[:rows])[1]

    backends.release_memory()
    one, page = s.numel() * s.element_size(), 2**21
    first, second = gradient(), gradient()
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    addresses = {first.data_ptr(), second.data_ptr()}
    del first, second
    third = gradient()
    assert third.data_ptr() in addresses
    del third
    assert 2 * one <= backends.release_memory() < 2 * (one + page)  # two were in use at once
    assert backends.release_memory() == 0
    grad = of_rows(64)
    del grad
    grad = of_rows(48)  # too small for what is kept: that goes, for both were never in use at once
    assert backends.release_memory() < page
    del grad
    assert 0.75 * one <= backends.release_memory() < 0.75 * one + page  # in use when the most was counted anew
    grad = of_rows(48)
    del grad
    grad = of_rows(64)  # what is kept is too small
    del grad
    assert one <= backends.release_memory() < one + page


def test_offsets_are_64_bit(tmp_path):
    """Rows at element offsets past 2^32 of a sparse file: no such memory is needed."""
    rows, stride, vocab = 5, 2**30 + 64, 40
    s = torch.from_file(str(tmp_path / "sparse.bin"), size=rows * stride, dtype=torch.bfloat16, shared=True)
    s = s.as_strided((rows, vocab), (stride, 1))
    t = logits(rows, vocab, dtype=torch.bfloat16)
    s.copy_(logits(rows, vocab, dtype=torch.bfloat16))
    args = (t, torch.ones(rows), "forward_kl", 0.0, 1.0, 1.0, 0.0, 0.0, None, None, True)
    value, _, grad = torch.ops.pyfast.distill_kl(s, *args)
    dense_value, _, dense_grad = torch.ops.pyfast.distill_kl(s.clone(), *args)
    assert torch.equal(value, dense_value) and torch.equal(grad, dense_grad)


def test_module_twin():
    s, t = logits(3, 50), logits(3, 50)
    labels = torch.tensor([1, -100, 3])
    module = LogitDistillationLoss(temperature=4.0, reduction="sum")
    expected = pyfast.distillation_loss(s, t, temperature=4.0, reduction="sum", labels=labels)
    assert torch.equal(module(s, t, labels=labels), expected)
    assert "temperature=4.0" in repr(module)
    with pytest.raises(TypeError, match="temprature"):
        LogitDistillationLoss(temprature=4.0)


S, T = torch.randn(3, 10), torch.randn(3, 10)
BAD = {
    "student is no tensor": (TypeError, "student", {"student": [1.0]}),
    "integer logits": (TypeError, "student", {"student": torch.ones(3, 10, dtype=torch.int64)}),
    "float8 teacher": (TypeError, "teacher", {"teacher": T.to(torch.float8_e4m3fn)}),
    "scalar logits": (ValueError, "student", {"student": torch.tensor(1.0)}),
    "no words": (ValueError, "student", {"student": torch.ones(3, 0)}),
    "rows differ": (ValueError, "teacher", {"teacher": torch.randn(4, 10)}),
    "ranks differ": (ValueError, "teacher", {"teacher": torch.randn(1, 3, 10)}),
    "vocabularies differ": (ValueError, "vocab_size=10", {"teacher": torch.randn(3, 12)}),
    "device": (ValueError, "teacher", {"teacher": T.to("meta")}),
    "vocab_size above": (ValueError, "vocab_size", {"vocab_size": 11}),
    "vocab_size zero": (ValueError, "vocab_size", {"vocab_size": 0}),
    "vocab_size float": (ValueError, "vocab_size", {"vocab_size": 4.0}),
    "divergence": (ValueError, "divergence", {"divergence": "kl"}),
    "temperature zero": (ValueError, "temperature", {"temperature": 0.0}),
    "temperature negative": (ValueError, "temperature", {"temperature": -1}),
    "temperature nan": (ValueError, "temperature", {"temperature": float("nan")}),
    "temperature text": (TypeError, "temperature", {"temperature": "2"}),
    "teacher temperature": (ValueError, "teacher_temperature", {"teacher_temperature": 0}),
    "reduction": (ValueError, "reduction", {"reduction": "batchmean"}),
    "labels float": (TypeError, "labels", {"labels": torch.zeros(3)}),
    "labels bool": (TypeError, "labels", {"labels": torch.zeros(3, dtype=torch.bool)}),
    "labels list": (TypeError, "labels", {"labels": [1, 2, 3]}),
    "labels shape": (ValueError, "labels", {"labels": torch.zeros(3, 10, dtype=torch.int64)}),
    "mask integer": (TypeError, "mask", {"mask": torch.ones(3, dtype=torch.int64)}),
    "mask shape": (ValueError, "mask", {"mask": torch.ones(4, dtype=torch.bool)}),
    "mask device": (ValueError, "mask", {"mask": torch.ones(3, dtype=torch.bool, device="meta")}),
    "num_items zero": (ValueError, "num_items", {"num_items": 0}),
    "num_items many": (ValueError, "num_items", {"num_items": torch.ones(3)}),
    "num_items with sum": (ValueError, "num_items", {"num_items": 3, "reduction": "sum"}),
    "backend unknown": (ValueError, "backend", {"backend": "cudnn"}),
    "backend elsewhere": (ValueError, "backend", {"backend": "triton"}),
    "float64 on native": (ValueError, "backend", {"student": S.double(), "backend": "native"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    error, name, options = BAD[case]
    arguments = {"student": S, "teacher": T, **options}
    with pytest.raises(error, match=name):
        pyfast.distillation_loss(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def test_the_op_itself_refuses_what_the_function_would():
    s = torch.randn(3, 10)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ops.pyfast.distill_kl(s.double(), s.double(), torch.ones(3), "forward_kl", *PLAIN)
    with pytest.raises(RuntimeError, match="row_scale"):
        torch.ops.pyfast.distill_kl(s, s, torch.ones(4), "forward_kl", *PLAIN)
    with pytest.raises(RuntimeError, match="divergence"):
        torch.ops.pyfast.distill_kl(s, s, torch.ones(3), "chi2", *PLAIN)
