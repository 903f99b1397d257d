"""topk_distill: every ISA and mode against float64, then the contract of the public function."""

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

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What rounding the result to the dtype costs, and a little more.
GRAD_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
TAILS = ["bucket", "ignore", "renormalise"]
MODES = [*TAILS, "sampled"]
INF, NAN = float("inf"), float("nan")


def truth(student, ids, entries, mode, temperature=1.0):
    """Values and gradient in float64 by the formulas, from the teacher spread over all words."""
    z = student.detach().double() / temperature
    p = entries.double() if mode == "sampled" else entries.double().exp()
    t = torch.zeros_like(z).scatter_add(-1, torch.where(p > 0, ids.long(), 0), p)
    inside = t > 0
    if mode in ("renormalise", "sampled"):
        t = t / t.sum(-1, keepdim=True)
    if mode == "renormalise":
        z = z.masked_fill(~inside, -INF)
    log_s = torch.log_softmax(z, -1)
    s = log_s.exp()
    value = torch.where(inside, t * (t.log() - log_s), 0.0).sum(-1)
    grad = s - t
    if mode == "ignore":
        gap = torch.where(inside, s - t, 0.0)
        value = value + gap.sum(-1)
        grad = gap - s * gap.sum(-1, keepdim=True)
    if mode == "bucket" and not inside.all():
        t_rest = (1 - t.sum(-1, keepdim=True)).clamp(min=0)
        log_s_rest = log_s.masked_fill(inside, -INF).logsumexp(-1, keepdim=True)
        value = value + torch.where(t_rest > 0, t_rest * (t_rest.log() - log_s_rest), 0.0).squeeze(-1)
        grad = torch.where(inside, s - t, s - t_rest * (log_s - log_s_rest).exp())
    return value, grad / temperature


def loss_and_grad(student, ids, entries, mode="bucket", **options):
    student = student.detach().requires_grad_()
    if mode == "sampled":
        loss = pyfast.topk_distillation_loss(student, ids, None, weights=entries, **options)
    else:
        loss = pyfast.topk_distillation_loss(student, ids, entries, mode, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), grad


def logits(*shape, dtype=torch.float32, spread=3.0):
    return (torch.randn(*shape) * spread).to(dtype)


def teacher(rows, vocab, k, mode="bucket"):
    """The k likeliest words of a random teacher, or k drawn ones, likely repeated, with weights."""
    log_p = torch.log_softmax(logits(rows, vocab), -1)
    if mode == "sampled":
        return torch.randint(0, vocab, (rows, k)), torch.rand(rows, k) + 0.1
    entries, ids = log_p.topk(k)
    order = torch.rand(rows, k).argsort(-1)
    return ids.gather(-1, order), entries.gather(-1, order)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "k"), [(2, 1), (7, 3), (17, 17), (1000, 64), (1025, 1), (2049, 300), (151936, 64)])
def test_matches_float64(isa, mode, dtype, vocab, k):
    if isa == "serial" and vocab > 100000:
        vocab = 32003
    s, (ids, entries) = logits(3, vocab, dtype=dtype), teacher(3, vocab, k, mode)
    rows, grad = loss_and_grad(s, ids, entries, mode, temperature=1.5, reduction="none", scale_by_t2=False)
    true_rows, true_grad = truth(s, ids, entries, mode, 1.5)
    assert rows.dtype == torch.float32 and grad.dtype == dtype
    assert relative_error(rows, true_rows) < 2e-6 or float(true_rows.norm()) < 1e-12
    assert relative_error(grad, true_grad) < GRAD_TOLERANCE[dtype] or float(grad.abs().max()) < 1e-7


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 2100),
    k=st.integers(1, 80),
    mode=st.sampled_from(MODES),
    temperature=st.floats(0.25, 10.0),
    spread=st.floats(0.01, 20.0),
    distance=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0]),
    repeated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    variant=st.sampled_from(backends.isas_supported() or ["serial"]),
)
def test_never_negative_and_right(rows, vocab, k, mode, temperature, spread, distance, repeated, dtype, variant):
    # Repeats take mass away; it needs a word outside to belong to.
    k = min(k, max(1, vocab - 1) if repeated else vocab)
    s = logits(rows, vocab, dtype=dtype, spread=spread)
    log_t = torch.log_softmax(s.double() / temperature + logits(rows, vocab, spread=distance), -1)
    entries, ids = log_t.topk(k)
    if repeated:
        ids = ids[:, torch.randint(0, k, (k,))]
        entries = log_t.gather(-1, ids) - math.log(k)
    if mode == "sampled":
        entries = entries.exp() + 1e-3
    with backends.isa(variant):
        got, grad = loss_and_grad(s, ids, entries, mode, temperature=temperature, reduction="none", scale_by_t2=False)
    true_rows, true_grad = truth(s, ids, entries, mode, temperature)
    assert (got >= 0).all()
    rounding = 2.0**-23 * float(s.double().abs().max()) / temperature  # what float32 makes of exponents
    assert (got - true_rows).abs().max() <= 5e-6 * true_rows.abs().max() + rounding + 1e-12
    absolute = 1e-6 + rounding if dtype == torch.float32 else 1e-3 + rounding
    assert (grad - true_grad).abs().max() <= GRAD_TOLERANCE[dtype] * true_grad.abs().max() + absolute / temperature


@pytest.mark.parametrize("temperature", [1.0, 1.3, 5.0])
@pytest.mark.parametrize("mode", TAILS)
def test_near_convergence_keeps_its_digits(isa, mode, temperature):
    s = logits(4, 8192) * temperature
    log_t = torch.log_softmax((s + torch.randn_like(s) * 6e-4 * temperature).double() / temperature, -1)
    entries, ids = log_t.topk(64)
    rows, grad = loss_and_grad(s, ids, entries, mode, temperature=temperature, reduction="none", scale_by_t2=False)
    true_rows, true_grad = truth(s, ids, entries, mode, temperature)
    assert 1e-8 < true_rows.mean() < 1e-6
    assert ((rows - true_rows) / true_rows).abs().max() < 1e-3
    assert relative_error(grad, true_grad) < 1e-3


def test_a_small_mass_outside_keeps_its_digits(isa):
    """The student's and the teacher's words outside hold 1e-8, which no difference from 1 in float32 could say."""
    s = logits(3, 3000)
    entries, ids = torch.log_softmax(s.double(), -1).topk(8)
    s.scatter_(-1, ids, s.gather(-1, ids) + 18)
    rest = torch.log_softmax(s.double(), -1).scatter(-1, ids, -INF).logsumexp(-1, keepdim=True)
    entries = torch.log_softmax(s.double(), -1).gather(-1, ids) + torch.log1p(-2 * rest.exp())
    assert (rest.exp() < 2e-7).all()
    rows, grad = loss_and_grad(s, ids, entries, reduction="none")
    true_rows, true_grad = truth(s, ids, entries, "bucket")
    assert ((rows - true_rows) / true_rows).abs().max() < 1e-4
    outside = torch.ones_like(s).scatter(-1, ids, 0.0)
    assert relative_error(grad * outside, true_grad * outside) < 1e-4


@pytest.mark.parametrize("mode", TAILS)
def test_all_words_of_the_teacher_make_the_full_divergence(isa, mode):
    s, t = logits(4, 1500), logits(4, 1500)
    entries, ids = torch.log_softmax(t, -1).topk(1500)
    rows, grad = loss_and_grad(s, ids, entries, mode, temperature=2.0, reduction="none")
    student = s.clone().requires_grad_()
    full = pyfast.distillation_loss(student, t, temperature=2.0, teacher_temperature=1.0, reduction="none")
    (full_grad,) = torch.autograd.grad(full.sum(), student)
    assert relative_error(rows, full) < 3e-6 and relative_error(grad, full_grad) < 3e-6


@pytest.mark.parametrize("k", [64, 1500])
@pytest.mark.parametrize("mode", TAILS)
def test_the_student_itself_gives_zero(isa, mode, k):
    s = logits(4, 1500)
    entries, ids = torch.log_softmax(s.double(), -1).topk(k)
    rows, grad = loss_and_grad(s, ids, entries, mode, reduction="none")
    assert (rows >= 0).all() and rows.max() < 1e-12 and grad.abs().max() < 2e-7


def test_the_bucket_never_exceeds_the_full_divergence():
    s, t = logits(8, 500), logits(8, 500)
    full = pyfast.distillation_loss(s, t, reduction="none")
    before = torch.zeros(8)
    for k in (1, 4, 16, 64, 256, 500):  # more words say more
        entries, ids = torch.log_softmax(t, -1).topk(k)
        rows, _ = loss_and_grad(s, ids, entries, reduction="none")
        assert (rows >= before - 1e-6).all() and (rows <= full + 1e-5).all()
        before = rows


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_not_there(isa, mode):
    s, (ids, entries) = logits(3, 700), teacher(3, 700, 20, mode)
    expected, expected_grad = loss_and_grad(s, ids, entries, mode, reduction="none")
    absent = 0.0 if mode == "sampled" else -INF
    padded = torch.tensor([-1, 0, 699, 10**12, int(ids[0, 0])]).expand(3, 5)  # any id will do
    order = torch.randperm(25)
    ids = torch.cat([ids, padded], -1)[:, order]
    entries = torch.cat([entries, torch.full((3, 5), absent)], -1)[:, order]
    rows, grad = loss_and_grad(s, ids, entries, mode, reduction="none")
    assert relative_error(rows, expected) < 1e-6 and relative_error(grad, expected_grad) < 1e-6
    entries[1] = absent  # a token without entries
    rows, grad = loss_and_grad(s, ids, entries, mode, reduction="none")
    assert rows[1] == 0 and torch.equal(grad[1], torch.zeros(700))
    assert relative_error(rows[[0, 2]], expected[[0, 2]]) < 1e-6


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_repeated_ids_are_one_word(isa, mode, backend):
    s, (ids, entries) = logits(3, 700), teacher(3, 700, 20, mode)
    ids = torch.stack([torch.randperm(700)[:20] for _ in range(3)])
    expected, expected_grad = loss_and_grad(s, ids, entries, mode, reduction="none")
    third = entries / 3 if mode == "sampled" else entries - math.log(3)
    order = torch.randperm(60)
    again, shares = torch.cat([ids] * 3, -1)[:, order], torch.cat([third] * 3, -1)[:, order]
    rows, grad = loss_and_grad(s, again, shares, mode, reduction="none", backend=backend)
    assert relative_error(rows, expected) < 2e-6 and relative_error(grad, expected_grad) < 2e-6


@pytest.mark.parametrize("proposal", ["teacher", "tempered"])
def test_sampled_gradients_add_up_to_the_full_one(proposal):
    rows, k = 6000, 64
    s, log_p = logits(40, spread=1.0), torch.log_softmax(logits(40, spread=1.5), -1)
    log_q = log_p if proposal == "teacher" else torch.log_softmax(log_p * 0.7, -1)
    ids = torch.multinomial(log_q.exp(), rows * k, replacement=True).reshape(rows, k)
    weights = (log_p - log_q).exp()[ids]
    losses, grad = loss_and_grad(s.expand(rows, 40), ids, weights, "sampled", reduction="none")
    assert (losses >= 0).all()
    expected = torch.softmax(s, -1) - log_p.exp()
    assert relative_error(grad.mean(0), expected) < 0.01


@pytest.mark.parametrize("shape", [(5, 1037), (600, 2049)])  # the second takes streaming stores, not aligned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["bucket", "renormalise"])
def test_every_element_of_the_gradient_is_written(isa, mode, dtype, shape):
    if dtype != torch.float32 and shape[0] > 5:
        shape = (1200, 2049)
    s = logits(*shape, dtype=dtype)
    ids = torch.tensor([0, 7, 15, 16, 31, 1007, 1008, 1022, 1023, 1024, 1025, shape[1] - 1]).expand(shape[0], -1)
    entries = torch.full(ids.shape, 0.05 if mode == "sampled" else math.log(0.05))
    poison = [torch.full(shape, NAN, dtype=dtype) for _ in range(4)]
    del poison  # the allocator hands these pages out again
    _, grad = loss_and_grad(s, ids, entries, mode, reduction="sum")
    assert relative_error(grad, truth(s, ids, entries, mode)[1]) < GRAD_TOLERANCE[dtype]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", ["inside", "outside", "teacher"])
def test_nan_stays_in_its_row(isa, mode, bad, where):
    if where == "teacher" and bad == INF:
        pytest.skip("refused")
    s, (ids, entries) = logits(3, 1000), teacher(3, 1000, 30, mode)
    clean, clean_grad = loss_and_grad(s, ids, entries, mode, reduction="none")
    if where == "teacher":
        entries[1, 7] = bad
    else:
        free = next(word for word in range(1000) if word not in ids[1].tolist())
        s[1, ids[1, 7] if where == "inside" else free] = bad
    rows, grad = loss_and_grad(s, ids, entries, mode, reduction="none")
    assert torch.equal(rows[[0, 2]], clean[[0, 2]]) and torch.equal(grad[[0, 2]], clean_grad[[0, 2]])
    if mode == "renormalise" and where == "outside":  # which it does not look at
        assert rows[1] == clean[1] and torch.equal(grad[1], clean_grad[1])
    else:
        assert torch.isnan(rows[1]) and torch.isnan(grad[1]).any()


@pytest.mark.parametrize("mode", TAILS)
def test_infinite_where_the_student_has_no_mass(isa, mode):
    s, (ids, entries) = logits(4, 300), teacher(4, 300, 20)
    s[0, ids[0, 3]] = -INF
    s[1, 5], entries[1, ids[1] == 5] = -INF, -INF  # outside
    s[2] = torch.full((300,), -INF).scatter(-1, ids[2], s[2, ids[2]])  # nothing outside
    rows, grad = loss_and_grad(s, ids, entries, mode, reduction="none")
    assert rows[0] == INF and torch.isfinite(rows[[1, 3]]).all() and torch.isfinite(grad).all()
    assert rows[2] == INF if mode == "bucket" else torch.isfinite(rows[2])


def test_extreme_logits(isa):
    s = torch.tensor([[1e30, 0.0, -1e30, 1.0], [88.0, -88.0, 0.0, 80.0], [3e38, -3e38, 0.0, 3e38]])
    ids, entries = torch.tensor([[0, 3]] * 3), torch.tensor([[0.6, 0.3]] * 3).log()
    for mode in MODES:
        values = entries.exp() if mode == "sampled" else entries
        rows, grad = loss_and_grad(s, ids, values, mode, reduction="none")
        true_rows, true_grad = truth(s, ids, values, mode)
        torch.testing.assert_close(rows.double(), true_rows, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rows_that_do_not_count_are_not_read(isa, backend):
    s, (ids, entries) = logits(4, 500), teacher(4, 500, 16)
    expected = truth(s, ids, entries, "bucket")[0]
    s[1], entries[1], ids[1] = NAN, NAN, -7
    s[3], entries[3] = INF, 5.0
    mask = torch.tensor([True, False, True, False])
    rows, grad = loss_and_grad(s, ids, entries, mask=mask, reduction="none", backend=backend)
    assert torch.equal(rows[~mask], torch.zeros(2)) and torch.equal(grad[~mask], torch.zeros(2, 500))
    assert relative_error(rows[mask], expected[mask]) < 2e-6


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(6, -1),
    "strided columns": lambda x: torch.stack([x, x], -1)[..., 0],
    "strided rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "offset": lambda x: torch.cat([x.flatten()[:3], x.flatten()])[3:].reshape(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_views(isa, view, id_dtype):
    ids, entries = teacher(6, 333, 9)
    s, ids, entries = VIEWS[view](logits(6, 333)), VIEWS[view](ids.to(id_dtype)), VIEWS[view](entries)
    rows, grad = loss_and_grad(s, ids, entries, reduction="none")
    true_rows, true_grad = truth(s, ids, entries, "bucket")
    assert relative_error(rows, true_rows) < 2e-6 and relative_error(grad, true_grad) < 2e-6


def test_the_op_takes_strided_rows(isa):
    s, (ids, entries) = logits(4, 2 * 200)[:, 100:300], teacher(4, 200, 8)
    wide_ids, wide_entries = torch.cat([ids, ids], 1)[:, :8], torch.cat([entries, entries], 1)[:, :8].double()
    args = (torch.ones(4), "bucket", 1.0, True)
    got = torch.ops.pyfast.topk_distill(s, wide_ids, wide_entries, *args)
    expected = torch.ops.pyfast.topk_distill(s.contiguous(), ids.contiguous(), entries.double().contiguous(), *args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


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


def test_log_probabilities_rounded_to_bfloat16_pass():
    log_p = torch.log_softmax(torch.randn(4, 50) * 0.1, -1).bfloat16()
    rows = pyfast.topk_distillation_loss(torch.randn(4, 50), torch.arange(50).expand(4, 50), log_p, reduction="none")
    assert torch.isfinite(rows).all() and (rows > 0).all()


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
