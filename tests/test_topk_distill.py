"""topk_distill: every ISA and mode against float64; the contract of the function is in test_topk_options.py."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_cases import DTYPES, GRAD_TOLERANCE, INF, MODES, NAN, TAILS, logits, loss_and_grad, teacher, truth

import pyfast
from pyfast import backends


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


def test_every_word_outside_keeps_its_digits(isa):
    """A softmax from 1 down to 1e-33 and 1e-39, each word by itself: powers looked up in a table, and others."""
    for lowest in (-75.0, -88.0):
        s = torch.linspace(lowest, 0.0, 4200).repeat(3, 1)
        s[1], s[2] = s[1].flip(0), s[2, torch.randperm(4200)]
        ids, entries = torch.tensor([[7, 2000]] * 3), torch.tensor([[0.3, 0.3]] * 3).log()
        _, grad = loss_and_grad(s, ids, entries, "bucket", reduction="none")
        _, true_grad = truth(s, ids, entries, "bucket")
        normal = true_grad.abs() > 2e-38
        rounding = 1e-5  # of exponents of 127 in float32, 5e-6, and of what 88 is multiplied by, 3e-6
        assert ((grad.double() - true_grad).abs() <= rounding * true_grad.abs())[normal].all()
        assert (grad.double() - true_grad).abs()[~normal].le(2e-38).all()


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
