"""attention_distill: values and gradients against the formula in float64, then the contract of the public function."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast.bench.hardware import peak_growth_bytes
from pyfast.ops import _attention_blocks as blocks

ALPHA, BETA = 0.2, 0.3
# By probabilities s and t, positive here, over the keys that are allowed.
FORMULAS = {
    "forward_kl": lambda s, t: t * (t / s).log(),
    "reverse_kl": lambda s, t: s * (s / t).log(),
    "jsd": lambda s, t: (
        BETA * t * (t / (BETA * t + (1 - BETA) * s)).log() + (1 - BETA) * s * (s / (BETA * t + (1 - BETA) * s)).log()
    ),
    "skew_kl": lambda s, t: t * (t / (ALPHA * t + (1 - ALPHA) * s)).log(),
    "skew_reverse_kl": lambda s, t: s * (s / ((1 - ALPHA) * t + ALPHA * s)).log(),
    "tvd": lambda s, t: (s - t).abs() / 2,
    "mse": lambda s, t: (s - t).square(),
}


def heads(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def inputs(batch=2, student=(4, 4), teacher=(4, 4), tokens=9, keys=None, widths=(16, 16), dtype=torch.float32):
    """q_s, k_s, q_t, k_t; ``student`` and ``teacher``: heads of queries and of keys."""
    keys = tokens if keys is None else keys
    return tuple(
        heads(batch, count, length, width, dtype=dtype)
        for counts, width in ((student, widths[0]), (teacher, widths[1]))
        for count, length in zip(counts, (tokens, keys), strict=True)
    )


def attention(q, k, scale, allowed):
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * scale
    weights = torch.where(allowed, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
    return weights / weights.sum(-1, keepdim=True)


def truth(q_s, k_s, q_t, k_t, divergence="forward_kl", causal=True, mask=None, query_mask=None, temperature=1.0):
    """Values [B, G, T], the queries that count [B, T], and the gradient of the mean, from the definitions."""
    q_s, k_s = q_s.detach().double().requires_grad_(), k_s.detach().double().requires_grad_()
    q_t, k_t = q_t.double(), k_t.double()
    tokens, keys = q_s.shape[2], k_s.shape[2]
    allowed = torch.ones(tokens, keys, dtype=torch.bool)
    for i in range(tokens):
        if causal:
            allowed[i, max(0, i + keys - tokens + 1) :] = False
    allowed = allowed.expand(q_s.shape[0], 1, -1, -1)
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    counted = allowed.any(-1).squeeze(1)
    if query_mask is None and mask is not None and tokens == keys:
        query_mask = mask
    if query_mask is not None:
        counted = counted & query_mask
    safe = allowed | ~counted[:, None, :, None]
    groups = math.gcd(q_s.shape[1], q_t.shape[1])
    s, t = (
        attention(q, k, q.shape[3] ** -0.5 / temperature, safe).unflatten(1, (groups, -1)).mean(2)
        for q, k in ((q_s, k_s), (q_t, k_t))
    )
    terms = FORMULAS[divergence](torch.where(safe, s, 1.0), torch.where(safe, t, 1.0))
    rows = torch.where(counted[:, None], torch.where(safe, terms, 0.0).sum(-1), 0.0)
    mean = rows.sum() / (counted.sum() * groups).clamp(min=1)
    return rows.detach(), counted, mean.detach(), *torch.autograd.grad(mean, (q_s, k_s))


def loss_and_grads(q_s, k_s, q_t, k_t, **options):
    q_s, k_s = q_s.detach().requires_grad_(), k_s.detach().requires_grad_()
    loss = pyfast.attention_distillation_loss(q_s, k_s, q_t, k_t, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (q_s, k_s))


def agrees(arguments, tolerance=3e-6, backend=None, **options):
    """Mean, its gradients and the single values are those of the formula."""
    rows, counted, *want = truth(*arguments, **options)
    options |= {"alpha": ALPHA, "beta": BETA, "backend": backend}
    for got, exact in zip(loss_and_grads(*arguments, **options), want, strict=True):
        assert relative_error(got, exact) < tolerance or (got - exact).abs().max() < 1e-6
    none, *grads = loss_and_grads(*arguments, reduction="none", **options)
    assert none.shape == rows.shape and (relative_error(none, rows) < tolerance or rows.max() < 1e-10)
    assert (none.transpose(1, 2)[~counted] == 0).all()
    total = (counted.sum() * rows.shape[1]).clamp(min=1)
    for got, exact in zip(grads, want[1:], strict=True):
        assert relative_error(got / total, exact) < tolerance or (got / total - exact).abs().max() < 1e-6


HEADS = {
    "as many heads": ((4, 4), (4, 4)),
    "grouped queries": ((8, 2), (8, 8)),
    "one key head": ((8, 8), (8, 1)),
    "fewer heads": ((4, 2), (8, 4)),
    "more heads": ((6, 3), (4, 4)),
    "nothing in common": ((3, 1), (2, 2)),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_matches_float64(name, causal, backend):
    agrees(inputs(student=HEADS[name][0], teacher=HEADS[name][1], widths=(16, 24)), backend=backend, causal=causal)


@pytest.mark.parametrize("name", ["grouped queries", "fewer heads"])
@pytest.mark.parametrize("divergence", FORMULAS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_divergence(divergence, name, backend):
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    arguments = inputs(student=HEADS[name][0], teacher=HEADS[name][1])
    agrees(arguments, 1e-5, backend, divergence=divergence, mask=mask, temperature=0.5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens, keys", [(1, 1), (7, 7), (129, 129), (1, 33), (5, 130), (130, 5)])
def test_lengths(isa, tokens, keys, causal):
    agrees(inputs(1, (2, 1), (2, 2), tokens, keys), causal=causal)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    divisors=st.tuples(*(st.sampled_from([1, 2, 3]) for _ in range(4))),
    tokens=st.integers(1, 70),
    keys=st.integers(1, 70),
    width=st.integers(1, 40),
    causal=st.booleans(),
    masked=st.booleans(),
    scratch=st.sampled_from([1 << 10, 1 << 15, 1 << 18]),
)
def test_any_shape_in_blocks_of_any_size(batch, divisors, tokens, keys, width, causal, masked, scratch):
    student, teacher = ((repeat * count, count) for repeat, count in (divisors[:2], divisors[2:]))
    mask = torch.rand(batch, keys) < 0.7 if masked else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocks.SCRATCH, "cpu", scratch)
        agrees(inputs(batch, student, teacher, tokens, keys, (width, 16)), 1e-5, causal=causal, mask=mask)


@pytest.mark.parametrize("sides", ["left", "right", "holes"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding(sides, causal):
    place = torch.arange(20)
    mask = {"left": place >= 7, "right": place < 13, "holes": place % 3 > 0}[sides]
    mask = torch.stack([torch.ones(20, dtype=torch.bool), mask, torch.zeros(20, dtype=torch.bool)])
    agrees(inputs(3, (4, 2), (4, 4), 20), causal=causal, mask=mask)
    agrees(inputs(3, (4, 2), (2, 2), 20), causal=causal, mask=mask)
    queries = torch.rand(3, 20) < 0.5
    agrees(inputs(3, (4, 2), (4, 4), 20), causal=causal, mask=mask, query_mask=queries)
    agrees(inputs(3, (4, 2), (4, 4), 20, 20), causal=causal, query_mask=queries)
    agrees(inputs(3, (4, 2), (4, 4), 6, 20), causal=causal, mask=mask)
    agrees(inputs(3, (4, 2), (4, 4), 6, 20), causal=causal, mask=mask, query_mask=queries[:, :6])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("teacher", [(4, 4), (2, 2)])
def test_what_does_not_count_may_hold_anything(backend, teacher):
    mask = torch.arange(20) < torch.tensor([[20], [12]])
    arguments = inputs(2, (4, 2), teacher, 20)
    clean = loss_and_grads(*arguments, mask=mask, backend=backend)
    for tensor in arguments:
        tensor[1, :, 12:] = math.nan
    for got, want in zip(loss_and_grads(*arguments, mask=mask, backend=backend), clean, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("side", [0, 2])
def test_nan_stays_in_its_query(side):
    arguments = inputs()
    clean = loss_and_grads(*arguments, reduction="none")
    arguments[side][1, 2, 5, 3] = math.nan
    rows, grad_q, grad_k = loss_and_grads(*arguments, reduction="none")
    other = torch.ones(2, 4, 9, dtype=torch.bool)
    other[1, 2, 5] = False
    assert rows[~other].isnan().all() and torch.equal(rows[other], clean[0][other])
    assert grad_q[~other].isnan().all() and torch.equal(grad_q[other], clean[1][other])
    assert grad_k[1, 2, :6].isnan().all()
    grad_k[1, 2] = clean[2][1, 2]
    assert torch.equal(grad_k, clean[2])


def test_identical_models_give_zero():
    q, k, _, _ = inputs(tokens=50)
    rows, *grads = loss_and_grads(q, k, q, k, reduction="none")
    assert torch.equal(rows, torch.zeros(2, 4, 50)) and all(torch.equal(grad, grad * 0) for grad in grads)


def textbook(q_s, k_s, q_t, k_t):
    """What one writes by hand, in the dtype of the inputs; causal."""
    shut = torch.ones(q_s.shape[2], k_s.shape[2], dtype=torch.bool).triu(1)
    log_s, log_t = (
        (q @ k.mT * q.shape[3] ** -0.5).masked_fill(shut, -1e4).log_softmax(-1) for q, k in ((q_s, k_s), (q_t, k_t))
    )
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


@pytest.mark.parametrize("kl", [1e-7, 1e-5, 1e-3])
def test_near_convergence_keeps_its_digits(kl):
    q_t, k_t = heads(1, 2, 300, 64), heads(1, 2, 300, 64)
    q_s, k_s = q_t + math.sqrt(2 * kl) * heads(1, 2, 300, 64), k_t.clone()
    _, _, mean, grad_q, grad_k = truth(q_s, k_s, q_t, k_t)
    assert 0.2 * kl < mean < 5 * kl
    got, got_q, got_k = loss_and_grads(q_s, k_s, q_t, k_t)
    assert relative_error(got, mean) < 1e-4
    assert relative_error(got_q, grad_q) < 2e-3 and relative_error(got_k, grad_k) < 2e-3
    assert relative_error(got, mean) <= relative_error(textbook(q_s, k_s, q_t, k_t), mean) + 1e-6


@pytest.mark.parametrize("teacher", [(4, 4), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_as_good_as_their_rounded_gradients(dtype, teacher):
    arguments = inputs(student=(4, 2), teacher=teacher, tokens=70, dtype=dtype)
    _, _, mean, *grads = truth(*arguments)
    loss, *got = loss_and_grads(*arguments)
    assert loss.dtype == torch.float32 and relative_error(loss, mean) < 3e-6
    for mine, exact in zip(got, grads, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, exact) <= 1.02 * relative_error(exact.to(dtype), exact) + 1e-6


def test_probabilities_below_float32_count_in_means():
    """In both heads of the student a key has probability e^-120, in the teacher 1/2: log s is -120, not -inf."""
    q_s, k_s = torch.ones(1, 2, 1, 1), torch.tensor([0.0, -120.0]).expand(1, 2, 2).unsqueeze(-1)
    q_t, k_t = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 2, 1)
    rows, grad_q, _ = loss_and_grads(q_s, k_s, q_t, k_t, reduction="none")
    want = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 120)
    assert relative_error(rows, torch.tensor([[[want]]])) < 1e-6
    assert relative_error(grad_q, torch.full((1, 2, 1, 1), 30.0)) < 1e-6


def test_scales_and_temperature():
    q_s, k_s, q_t, k_t = inputs(widths=(16, 24))
    plain = pyfast.attention_distillation_loss(q_s, k_s, q_t, k_t, temperature=2.0)
    assert relative_error(plain, truth(q_s, k_s, q_t, k_t, temperature=2.0)[2]) < 3e-6
    scaled = pyfast.attention_distillation_loss(
        q_s, k_s, q_t, k_t, student_scale=16**-0.5 / 2, teacher_scale=24**-0.5 / 2
    )
    assert relative_error(scaled, plain) < 1e-6
    scaled = pyfast.attention_distillation_loss(3 * q_s, k_s, q_t, 5 * k_t, student_scale=1 / 12, teacher_scale=0.2)
    assert relative_error(scaled, truth(q_s, k_s, 24**0.5 * q_t, k_t)[2]) < 3e-6


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_reductions(backend):
    arguments, mask = inputs(), torch.arange(9) < torch.tensor([[9], [4]])
    rows = truth(*arguments, mask=mask)[0]
    options = {"mask": mask, "backend": backend}
    total = pyfast.attention_distillation_loss(*arguments, reduction="sum", **options)
    assert relative_error(total, rows.sum()) < 3e-6
    assert relative_error(pyfast.attention_distillation_loss(*arguments, **options), rows.sum() / (4 * 13)) < 3e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nothing_counts(backend, reduction):
    options = {"reduction": reduction, "backend": backend}
    masked = inputs(), {"mask": torch.zeros(2, 9, dtype=torch.bool)}
    for arguments, more in (masked, (inputs(batch=0), {}), (inputs(tokens=0, keys=5), {})):
        loss, *grads = loss_and_grads(*arguments, **options, **more)
        assert loss.sum() == 0
        for grad, of in zip(grads, arguments, strict=False):
            assert torch.equal(grad, torch.zeros_like(of))


VIEWS = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "width first": lambda x: x.mT.contiguous().mT,
    "one head expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
    "one batch entry expanded": lambda x: x[:1].expand(x.shape[0], -1, -1, -1),
    "part of a wider tensor": lambda x: torch.cat([x, x], -1)[..., 5 : 5 + x.shape[3]],
    "every other token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    agrees(tuple(VIEWS[view](x) for x in inputs(3, (4, 2), (4, 4), 20)))


def test_mixed_dtypes_use_the_widest():
    q_s, k_s, q_t, k_t = inputs()
    q_s, k_s = q_s.bfloat16(), k_s.half()
    _, _, mean, *_ = truth(q_s, k_s, q_t, k_t)
    loss, grad_q, grad_k = loss_and_grads(q_s, k_s, q_t, k_t)
    assert relative_error(loss, mean) < 3e-6 and (grad_q.dtype, grad_k.dtype) == (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_changes_nothing(backend):
    q_s, k_s, q_t, k_t = inputs(tokens=40)
    leaves = q_s.requires_grad_(), k_s.requires_grad_()
    plain = pyfast.attention_distillation_loss(*leaves, q_t, k_t, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = pyfast.attention_distillation_loss(*leaves, q_t, k_t, backend=backend)
    assert torch.equal(plain, under)
    for got, want in zip(torch.autograd.grad(under, leaves), torch.autograd.grad(plain, leaves), strict=True):
        assert torch.equal(got, want)


def test_float64_is_served_by_the_reference():
    arguments = inputs(dtype=torch.float64)
    loss, *grads = loss_and_grads(*arguments)
    assert loss.dtype == torch.float64
    for got, want in zip((loss, *grads), truth(*arguments)[2:], strict=True):
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("divergence", FORMULAS)
@pytest.mark.parametrize("teacher", [(2, 2), (1, 1)])
def test_gradcheck_of_the_reference(divergence, teacher):
    q_s, k_s, q_t, k_t = inputs(1, (2, 1), teacher, 4, 5, (3, 2), torch.float64)
    mask = torch.tensor([[False, True, True, False, True]])

    def loss(q, k):
        options = {"mask": mask, "query_mask": torch.tensor([[True, True, False, True]])}
        return pyfast.attention_distillation_loss(q, k, q_t, k_t, divergence=divergence, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, (q_s.requires_grad_(), k_s.requires_grad_()))


@pytest.mark.parametrize("teacher, with_grad, masked", [((4, 4), True, False), ((2, 1), False, True)])
def test_opcheck(teacher, with_grad, masked):
    q_s, k_s, q_t, k_t = inputs(student=(4, 2), teacher=teacher)
    scale = torch.rand(2, math.gcd(4, teacher[0]), 9)
    mask = torch.arange(9) < torch.tensor([[9], [4]]) if masked else None
    options = (scale, mask, not masked, "forward_kl", 0.0, 0.25, 0.2, with_grad)
    leaves = q_s.requires_grad_(), k_s.requires_grad_()
    torch.library.opcheck(torch.ops.pyfast.attention_distill, (*leaves, q_t, k_t, *options))


@pytest.mark.parametrize("reduction, compiler", [("mean", "inductor"), ("none", "aot_eager")])
def test_compiles_in_one_graph(reduction, compiler):
    def step(q_s, k_s, q_t, k_t, mask):
        loss = pyfast.attention_distillation_loss(2 * q_s, k_s, q_t, k_t, mask=mask, reduction=reduction)
        return loss.square().sum() * 3

    q_s, k_s, q_t, k_t = inputs()
    leaves = q_s.requires_grad_(), k_s.requires_grad_()
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    plain = step(*leaves, q_t, k_t, mask)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)(*leaves, q_t, k_t, mask)
    assert relative_error(compiled, plain.detach()) < 1e-6
    for got, want in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves), strict=True):
        assert relative_error(got, want) < 1e-6


def test_incoming_gradients_are_honoured():
    q_s, k_s, q_t, k_t = inputs()
    leaves = q_s.requires_grad_(), k_s.requires_grad_()
    _, _, _, *want = truth(*leaves, q_t, k_t)
    loss = pyfast.attention_distillation_loss(*leaves, q_t, k_t)
    for factor in (1.0, 3.7, -0.5):  # a graph that is kept: the gradients saved in it must stay as they are
        for got, exact in zip(torch.autograd.grad(factor * loss, leaves, retain_graph=True), want, strict=True):
            assert relative_error(got, factor * exact) < 3e-6
    for got, exact in zip(torch.autograd.grad(2.5 * loss, leaves), want, strict=True):
        assert relative_error(got, 2.5 * exact) < 3e-6
    weights = torch.randn(2, 4, 9)
    native, plain = (
        torch.autograd.grad(
            (weights * pyfast.attention_distillation_loss(*x, reduction="none", backend=backend)).sum(), x[:2]
        )
        for x, backend in (((*leaves, q_t, k_t), None), ((*leaves, q_t, k_t), "reference"))
    )
    assert all(relative_error(got, exact) < 3e-6 for got, exact in zip(native, plain, strict=True))


def test_no_gradient_flows_to_the_teacher_or_under_no_grad():
    arguments = [x.requires_grad_() for x in inputs()]
    pyfast.attention_distillation_loss(*arguments).backward()
    assert arguments[2].grad is None and arguments[3].grad is None
    with torch.no_grad():
        assert not pyfast.attention_distillation_loss(*arguments).requires_grad
    keys_only = [x.detach().requires_grad_(place == 1) for place, x in enumerate(arguments)]
    pyfast.attention_distillation_loss(*keys_only).backward()
    assert keys_only[0].grad is None and torch.equal(keys_only[1].grad, arguments[1].grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction):
    q_s, k_s, q_t, k_t = inputs()
    q_s.requires_grad_()
    loss = pyfast.attention_distillation_loss(q_s, k_s, q_t, k_t, reduction=reduction)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        (grad,) = torch.autograd.grad((loss * q_s.sum()).sum(), q_s, create_graph=True)
        torch.autograd.grad(grad.sum(), q_s)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_grows_with_the_tokens_not_their_square(monkeypatch, reduction):
    monkeypatch.setitem(blocks.SCRATCH, "cpu", 2 << 20)

    def growth(tokens):
        q_s, k_s, q_t, k_t = inputs(1, (1, 1), (1, 1), tokens)
        leaves = q_s.requires_grad_(), k_s.requires_grad_()

        def step():
            loss = pyfast.attention_distillation_loss(*leaves, q_t, k_t, reduction=reduction)
            return torch.autograd.grad(loss.sum(), leaves)

        step()
        return peak_growth_bytes(step)

    matrix = 4 * 4096**2
    assert growth(4096) < min(matrix / 3, 2 * growth(2048) + (4 << 20))


ROWS, KEYS = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
BAD = {
    "queries no tensor": (TypeError, "q_s", {"q_s": [1.0]}),
    "integer queries": (TypeError, "q_s", {"q_s": ROWS.long()}),
    "three dimensions": (ValueError, "q_s", {"q_s": ROWS[0]}),
    "keys of three dimensions": (ValueError, "k_t", {"k_t": KEYS[0]}),
    "no width": (ValueError, "q_s", {"q_s": ROWS[..., :0]}),
    "no heads": (ValueError, "k_s", {"k_s": KEYS[:, :0]}),
    "no keys": (ValueError, "k_s", {"k_s": KEYS[:, :, :0]}),
    "tokens before heads": (ValueError, "k_s", {"k_s": KEYS.transpose(1, 2)[:, :, :1].expand(2, 6, 4, 8)}),
    "key heads do not divide": (ValueError, "k_s.*3 heads", {"k_s": torch.randn(2, 3, 6, 8)}),
    "key width": (ValueError, "k_s", {"k_s": torch.randn(2, 2, 6, 7)}),
    "key batch": (ValueError, "k_t", {"k_t": torch.randn(1, 2, 6, 8)}),
    "teacher's batch": (ValueError, "q_t", {"q_t": ROWS[:1], "k_t": KEYS[:1]}),
    "teacher's tokens": (ValueError, "q_t", {"q_t": ROWS[:, :, :5]}),
    "teacher's keys": (ValueError, "k_t", {"k_t": KEYS[:, :, :5]}),
    "keys elsewhere": (ValueError, "k_s", {"k_s": KEYS.to("meta")}),
    "teacher elsewhere": (ValueError, "q_t", {"q_t": ROWS.to("meta"), "k_t": KEYS.to("meta")}),
    "divergence": (ValueError, "divergence", {"divergence": "kl"}),
    "alpha": (ValueError, "alpha", {"divergence": "skew_kl", "alpha": 1.0}),
    "beta": (ValueError, "beta", {"divergence": "jsd", "beta": 0.0}),
    "causal": (TypeError, "causal", {"causal": 1}),
    "mask of floats": (TypeError, "mask", {"mask": torch.ones(2, 6)}),
    "mask of scores": (ValueError, "mask", {"mask": torch.ones(2, 6, 6, dtype=torch.bool)}),
    "mask elsewhere": (ValueError, "mask", {"mask": torch.ones(2, 6, dtype=torch.bool, device="meta")}),
    "mask a list": (TypeError, "mask", {"mask": [[True] * 6] * 2}),
    "query mask": (ValueError, "query_mask", {"query_mask": torch.ones(2, 5, dtype=torch.bool)}),
    "student scale": (ValueError, "student_scale", {"student_scale": 0.0}),
    "teacher scale": (TypeError, "teacher_scale", {"teacher_scale": "1"}),
    "temperature": (ValueError, "temperature", {"temperature": -1.0}),
    "reduction": (ValueError, "reduction", {"reduction": "batchmean"}),
    "backend": (ValueError, "backend", {"backend": "triton"}),
    "float64 on native": (ValueError, "backend", {"q_s": ROWS.double(), "backend": "native"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    error, name, options = BAD[case][0], BAD[case][1], dict(BAD[case][2])
    tensors = [options.pop(key, of) for key, of in (("q_s", ROWS), ("k_s", KEYS), ("q_t", ROWS), ("k_t", KEYS))]
    with pytest.raises(error, match=f"^{name}"):
        pyfast.attention_distillation_loss(*tensors, **options)
