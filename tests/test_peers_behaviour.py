"""What the tests of Liger-Kernel (KL, JSD, TVD) and of TRL (GKD's generalised JSD) demand, of our losses.

Their inputs are log-probabilities or logits; a softmax of log-probabilities is the distribution itself, so that the
same tensors go into both. Their shapes are scaled down to what a CPU does in a moment.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

import pyfast
from pyfast.integrations.trl import generalized_jsd_loss

BACKENDS = [None, "reference"]
SHAPES = [(2, 17, 320), (3, 5, 1271), (1, 8, 4001)]  # batch, tokens, words
# What rounding to the dtype costs the gradient.
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
BETAS = [0.1, 0.5]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def log_probabilities(shape, dtype=torch.float32):
    return torch.randn(shape[0] * shape[1], shape[2]).log_softmax(-1).to(dtype)


def value_and_grad(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    value.backward()
    return value.detach(), x.grad


# Liger-Kernel: test_kl_div, test_jsd, test_tvd


@pytest.mark.parametrize("factor", [1.0, 2.0])  # of the loss: "not the last layer" of their tests
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_that_of_torch(backend, shape, dtype, factor):
    log_s, log_t = log_probabilities(shape, dtype), log_probabilities(shape, dtype)
    reference = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    ours = value_and_grad(lambda x: factor * pyfast.distillation_loss(x, log_t, backend=backend), log_s)
    theirs = value_and_grad(
        lambda x: factor * reference(x.log_softmax(-1), log_t.double().log_softmax(-1)), log_s.double()
    )
    assert relative_error(ours[0], theirs[0]) < 1e-5 and relative_error(ours[1], theirs[1]) < DTYPES[dtype]


def test_reductions_are_those_of_torch(backend):
    """Over tokens: never over words, as their ``mean`` does."""
    log_s, log_t = log_probabilities((2, 9, 50)), log_probabilities((2, 9, 50))
    words = F.kl_div(log_s, log_t, reduction="none", log_target=True)
    expected = {"none": words.sum(-1), "sum": words.sum(), "mean": words.sum() / 18}
    for reduction, value in expected.items():
        got = pyfast.distillation_loss(log_s, log_t, reduction=reduction, backend=backend)
        assert got.shape == value.shape and relative_error(got, value) < 1e-5
    batchmean = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    assert relative_error(expected["mean"], batchmean) < 1e-6


def torch_jsd(log_s, log_t, beta):
    s, t = log_s.double().softmax(-1), log_t.double().softmax(-1)
    log_m = (beta * t + (1 - beta) * s).log()
    first = F.kl_div(log_m, t, reduction="batchmean")
    return beta * first + (1 - beta) * F.kl_div(log_m, s, reduction="batchmean")


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_jsd_is_that_of_torch(backend, shape, dtype, beta):
    log_s, log_t = log_probabilities(shape, dtype), log_probabilities(shape, dtype)
    ours = value_and_grad(lambda x: pyfast.distillation_loss(x, log_t, "jsd", beta=beta, backend=backend), log_s)
    theirs = value_and_grad(lambda x: torch_jsd(x, log_t, beta), log_s.double())
    assert relative_error(ours[0], theirs[0]) < 1e-5 and relative_error(ours[1], theirs[1]) < DTYPES[dtype]


def test_jsd_is_symmetric_at_one_half_alone(backend):
    log_s, log_t = log_probabilities((2, 9, 300)), log_probabilities((2, 9, 300))

    def both(beta):
        return [
            pyfast.distillation_loss(*pair, "jsd", beta=beta, backend=backend)
            for pair in ((log_s, log_t), (log_t, log_s))
        ]

    there, back = both(0.5)
    assert relative_error(there, back) < 1e-6
    there, back = both(0.1)
    assert relative_error(there, back) > 1e-3


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_ignored_labels_count_nowhere(backend, divergence):
    log_s, log_t = log_probabilities((2, 8, 200)), log_probabilities((2, 8, 200))
    labels = torch.randint(0, 200, (16,))
    labels[torch.randperm(16)[:9]] = 7  # as many as they draw, with an index that is also a word
    keep = labels != 7
    ours = value_and_grad(
        lambda x: pyfast.distillation_loss(x, log_t, divergence, labels=labels, ignore_index=7, backend=backend), log_s
    )
    kept = value_and_grad(lambda x: pyfast.distillation_loss(x, log_t[keep], divergence, backend=backend), log_s[keep])
    assert relative_error(ours[0], kept[0]) < 1e-6 and relative_error(ours[1][keep], kept[1]) < 1e-6
    assert torch.equal(ours[1][~keep], torch.zeros_like(log_s[~keep]))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_a_batch_that_is_ignored_whole(backend, divergence):
    log_s, log_t = log_probabilities((2, 4, 50)), log_probabilities((2, 4, 50))
    labels = torch.full((8,), -100)
    value, grad = value_and_grad(
        lambda x: pyfast.distillation_loss(x, log_t, divergence, labels=labels, backend=backend), log_s
    )
    assert value == 0 and torch.equal(grad, torch.zeros_like(log_s))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tvd_is_half_the_distance(backend, dtype):
    log_s, log_t = log_probabilities((2, 9, 300), dtype), log_probabilities((2, 9, 300), dtype)
    ours = value_and_grad(lambda x: pyfast.distillation_loss(x, log_t, "tvd", backend=backend), log_s)
    theirs = value_and_grad(
        lambda x: 0.5 * (x.softmax(-1) - log_t.double().softmax(-1)).abs().sum(-1).mean(), log_s.double()
    )
    assert relative_error(ours[0], theirs[0]) < 1e-5 and relative_error(ours[1], theirs[1]) < DTYPES[dtype]


# TRL: test_gkd_trainer, TestGeneralizedJSDLoss


def trl_formula(student, teacher, labels=None, beta=0.5, temperature=1.0, reduction="batchmean"):
    """The convention, restated from the definition: a value a word, masked, then reduced."""
    s, t = ((x.double() / temperature).softmax(-1) for x in (student, teacher))
    m = beta * t + (1 - beta) * s
    words = {0: t * (t / s).log(), 1: s * (s / t).log()}.get(
        beta, beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()
    )
    first = words.shape[0]
    if labels is not None:
        words = words[labels != -100]
        first = words.shape[0]
    return {"batchmean": words.sum() / first, "sum": words.sum(), "mean": words.mean(), "none": words}[reduction]


@pytest.fixture
def logits():
    return torch.randn(2, 3, 5), torch.randn(2, 3, 5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_generalised_jsd_is_that_of_trl(backend, logits, beta, masked, reduction, temperature):
    student, teacher = logits
    labels = torch.tensor([[-100, 1, 4], [3, -100, -100]]) if masked else None
    options = {"labels": labels, "beta": beta, "temperature": temperature, "reduction": reduction}
    ours = value_and_grad(lambda x: generalized_jsd_loss(x, teacher, **options, backend=backend).sum(), student)
    theirs = value_and_grad(lambda x: trl_formula(x, teacher, **options).sum(), student.double())
    assert relative_error(ours[0], theirs[0]) < 1e-5 and relative_error(ours[1], theirs[1]) < 1e-5


def test_uniform_distributions_agree(backend):
    uniform = torch.ones(1, 1, 5)
    assert round(generalized_jsd_loss(uniform, uniform, backend=backend).item(), 5) == 0


def test_limits_of_beta_are_the_two_kls(backend):
    student, teacher = (torch.tensor([[p]]).log() for p in ([0.1, 0.9], [0.9, 0.1]))
    for beta, (p, q) in {1: (student, teacher), 0: (teacher, student)}.items():
        expected = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
        assert relative_error(generalized_jsd_loss(student, teacher, beta=beta, backend=backend), expected) < 1e-6


def test_shapes_of_the_reductions(backend, logits):
    assert generalized_jsd_loss(*logits, backend=backend).shape == ()
    for reduction in ("batchmean", "sum", "mean"):
        assert generalized_jsd_loss(*logits, reduction=reduction, backend=backend).shape == ()
    assert generalized_jsd_loss(*logits, reduction="none", backend=backend).shape == logits[0].shape
    labels = torch.tensor([[-100, 1, 4], [3, -100, -100]])
    assert generalized_jsd_loss(*logits, labels, reduction="none", backend=backend).shape == (3, 5)


def test_beta_and_temperature_matter(backend, logits):
    values = [generalized_jsd_loss(*logits, beta=beta, backend=backend) for beta in (0, 0.5, 1)]
    values += [generalized_jsd_loss(*logits, temperature=2, backend=backend)]
    assert len({float(value) for value in values}) == 4 and all(value > 0 for value in values)


def test_symmetry_of_the_generalised_jsd(backend, logits):
    student, teacher = logits
    there, back = (generalized_jsd_loss(*pair, beta=0.1, backend=backend) for pair in (logits, (teacher, student)))
    assert relative_error(there, back) > 1e-3
    there, back = (generalized_jsd_loss(*pair, beta=0.5, backend=backend) for pair in (logits, (teacher, student)))
    assert relative_error(there, back) < 1e-6


def test_identical_logits_give_zero(backend, logits):
    for beta in (0, 0.3, 0.5, 1):
        assert round(generalized_jsd_loss(logits[0], logits[0].clone(), beta=beta, backend=backend).item(), 6) == 0


def test_where_theirs_gives_nan(backend, logits):
    student, teacher = logits
    value, grad = value_and_grad(
        lambda x: generalized_jsd_loss(x, teacher, torch.full((2, 3), -100), backend=backend), student
    )
    assert value == 0 and torch.equal(grad, torch.zeros_like(grad))
    teacher[..., 2] = -torch.inf
    for beta in (0, 0.5):
        value, grad = value_and_grad(
            lambda x, b=beta: generalized_jsd_loss(x, teacher, beta=b, backend=backend), student
        )
        assert value.isfinite() and grad.isfinite().all()
        words = generalized_jsd_loss(student, teacher, beta=beta, reduction="none", backend=backend)
        assert relative_error(words.sum() / 2, value) < 1e-5


def test_bad_input_names_the_argument(backend, logits):
    for name, options in {
        "reduction": {"reduction": "total"},
        "beta": {"beta": 1.5},
        "temperature": {"temperature": 0.0},
    }.items():
        with pytest.raises(ValueError, match=name):
            generalized_jsd_loss(*logits, **options, backend=backend)
        if name == "temperature":
            with pytest.raises(ValueError, match=name):
                generalized_jsd_loss(*logits, **options, reduction="none", backend=backend)
    with pytest.raises(ValueError, match="vocab_size"):
        generalized_jsd_loss(logits[0], torch.randn(2, 3, 6), backend=backend)
    cut = generalized_jsd_loss(
        logits[0], torch.cat([logits[1], torch.randn(2, 3, 1)], -1), vocab_size=5, backend=backend
    )
    assert torch.equal(cut, generalized_jsd_loss(*logits, backend=backend))
