"""DistillationLoss: each part is the function it names, over the positions that count; the sum, weights, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error
from tiny_models import batch, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyfast
from pyfast import capture_attention
from pyfast.logit_lens import logit_lens_loss
from pyfast.nn import DistillationLoss, cosine_schedule, linear_schedule
from pyfast.ops.attention_distill import attention_distillation_loss

NAN = float("nan")


def outputs(student, teacher, tokens, **options):
    """Outputs of both models with everything that a signal may need."""
    given = {name: value for name, value in tokens.items() if name != "labels"}
    with capture_attention(student), capture_attention(teacher):
        ours = student(**given, output_hidden_states=True, use_cache=False, **options)
        with torch.no_grad():
            theirs = teacher(**given, output_hidden_states=True, use_cache=False, **options)
    return ours, theirs


@pytest.fixture(scope="module")
def models():
    return tiny("Llama", num_key_value_heads=2), tiny("Llama", seed=1, num_hidden_layers=4, hidden_size=48)


def counted(tokens):
    """Positions that count, by hand: the next token has a label, and the position is no padding."""
    keep = torch.zeros_like(tokens["labels"], dtype=torch.bool)
    keep[:, :-1] = tokens["labels"][:, 1:] != -100
    return keep & tokens["attention_mask"].bool()


def test_every_part_and_their_sum(models):
    student, teacher = models
    projection = nn.Linear(32, 48, bias=False)
    loss = DistillationLoss(
        logits=0.5,
        hidden=2.0,
        attention=0.25,
        lens=0.125,
        temperature=2.0,
        shift=True,
        hidden_options={"kind": "cosine", "projection": projection},
        attention_options={"layers": [(0, 1), (-1, -1)], "divergence": "forward_kl"},
        lens_options={"divergence": "forward_kl", "layers": [(0, 1)]},
    )
    tokens = batch(rows=3)
    ours, theirs = outputs(student, teacher, tokens)
    out = loss(
        ours, theirs, labels=tokens["labels"], attention_mask=tokens["attention_mask"], student=student, teacher=teacher
    )
    keep, real = counted(tokens), tokens["attention_mask"].bool()
    lens = (student.model.norm, student.lm_head.weight, teacher.model.norm, teacher.lm_head.weight)
    q = [
        attention_distillation_loss(s.query, s.key, t.query, t.key, causal=True, mask=real, query_mask=keep)
        for s, t in ((ours.attention_inputs[i], theirs.attention_inputs[j]) for i, j in ((0, 1), (1, 3)))
    ]
    expected = {
        "logits": pyfast.distillation_loss(ours.logits[keep], theirs.logits[keep], temperature=2.0),
        "hidden": pyfast.hidden_states_loss(
            ours.hidden_states, theirs.hidden_states, kind="cosine", projection=projection, mask=keep
        ),
        "attention": sum(q) / 2,
        "lens": logit_lens_loss(
            ours.hidden_states, theirs.hidden_states, *lens, layers=[(0, 1)], divergence="forward_kl", mask=keep
        ),
    }
    assert list(out.parts) == list(expected)
    for name, value in expected.items():
        assert relative_error(out.parts[name], value) < 1e-5 and not out.parts[name].requires_grad
    assert out.weights == {"logits": 0.5, "hidden": 2.0, "attention": 0.25, "lens": 0.125}
    total = sum(out.weights[name] * value for name, value in expected.items())
    assert relative_error(out.loss, total) < 1e-5
    got = torch.autograd.grad(out.loss, [*student.parameters(), projection.weight], retain_graph=True)
    true = torch.autograd.grad(total, [*student.parameters(), projection.weight])
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(got, true, strict=True))
    assert [name for name, _ in loss.named_parameters()] == ["projection.weight"]


def test_cross_entropy_is_that_of_transformers(models):
    student, _ = models
    tokens = batch(rows=3)
    ours = student(**tokens)
    loss = DistillationLoss(ce_weight=1.0, shift=True, backend="reference")
    out = loss(ours, ours, labels=tokens["labels"])  # of itself: no divergence is left
    assert relative_error(out.loss, ours.loss) < 1e-6
    half = DistillationLoss(ce_weight=0.5, shift=True, backend="reference")(ours, ours, labels=tokens["labels"])
    assert relative_error(half.loss, 0.5 * ours.loss) < 1e-6


def test_masked_language_models_are_not_shifted():
    student = tiny("Bert", "ForMaskedLM")
    tokens = batch(rows=3)
    ours = student(**tokens)
    loss = DistillationLoss(ce_weight=1.0, shift=False, backend="reference")
    assert relative_error(loss(ours, ours, labels=tokens["labels"]).loss, ours.loss) < 1e-6


def test_classification_has_one_label_a_sequence():
    student = tiny("Bert", "ForSequenceClassification", num_labels=5)
    teacher = tiny("Bert", "ForSequenceClassification", seed=1, num_labels=5)
    tokens = {**batch(rows=3), "labels": torch.tensor([1, 4, 0])}
    ours, theirs = outputs(student, teacher, tokens)
    loss = DistillationLoss(ce_weight=1.0, hidden=1.0, shift=False, backend="reference")
    out = loss(ours, theirs, labels=tokens["labels"], attention_mask=tokens["attention_mask"])
    real = tokens["attention_mask"].bool()
    assert relative_error(out.parts["hidden"], pyfast.hidden_states_loss(ours[1], theirs[1], mask=real)) < 1e-6
    ce = nn.functional.cross_entropy(ours.logits, tokens["labels"])
    divergence = pyfast.distillation_loss(ours.logits, theirs.logits)
    assert relative_error(out.parts["logits"], ce + divergence) < 1e-6


def states(rows=2, length=7, words=11, width=6, seed=0):
    """Outputs of no model: logits and hidden states of two layers."""
    torch.manual_seed(seed)
    hidden = tuple(torch.randn(rows, length, width) for _ in range(3))
    return SimpleNamespace(logits=torch.randn(rows, length, words).requires_grad_(), hidden_states=hidden)


def test_labels_and_mask_are_shifted_alike():
    ours, theirs = states(), states(seed=1)
    labels = torch.randint(0, 11, (2, 7))
    labels[:, :3] = -100
    labels[1, 6] = -100
    expected = pyfast.distillation_loss(ours.logits[:, :-1], theirs.logits[:, :-1], labels=labels[:, 1:])
    loss = DistillationLoss(hidden=1.0, shift=True)
    by_labels = loss(ours, theirs, labels=labels)
    by_mask = loss(ours, theirs, mask=labels != -100)
    assert relative_error(by_labels.parts["logits"], expected) < 1e-6
    assert relative_error(by_mask.parts["logits"], expected) < 1e-6
    keep = (labels != -100)[:, 1:]
    hidden = [[each[:, :-1][keep] for each in x.hidden_states] for x in (ours, theirs)]
    assert relative_error(by_labels.parts["hidden"], pyfast.hidden_states_loss(*hidden)) < 1e-6
    assert torch.equal(by_labels.parts["hidden"], by_mask.parts["hidden"])
    aligned = DistillationLoss(hidden=1.0, shift=False)(ours, theirs, mask=labels != -100)
    assert torch.equal(aligned.loss, loss(ours, theirs, mask=labels != -100, shift=False).loss)
    assert not torch.equal(aligned.loss, by_mask.loss)
    others = DistillationLoss(hidden=1.0, shift=True, ignore_index=-7)
    assert torch.equal(others(ours, theirs, labels=torch.where(labels == -100, -7, labels)).loss, by_labels.loss)


def test_attention_is_compared_as_the_models_compute_it(models):
    """Each with its own factor of the scores, and with later keys where the models see them."""
    ours, theirs = outputs(*models, batch())
    options = {"layers": [(0, 1)], "divergence": "forward_kl"}
    s = ours.attention_inputs[0] = replace(ours.attention_inputs[0], scaling=0.5, causal=False)
    t = theirs.attention_inputs[1] = replace(theirs.attention_inputs[1], scaling=0.7, causal=False)
    out = DistillationLoss(logits=0.0, attention=1.0, attention_options=options)(ours, theirs)
    keys = (s.query, s.key, t.query, t.key)
    expected = attention_distillation_loss(*keys, causal=False, student_scale=0.5, teacher_scale=0.7)
    assert relative_error(out.loss, expected) < 1e-6


def test_no_query_looks_at_padding_before_it(models):
    student, teacher = models
    tokens = batch(rows=3)
    real = tokens["attention_mask"].flip(1)
    assert not real[:, 0].all()
    ours, theirs = outputs(student, teacher, {**tokens, "attention_mask": real})
    options = {"layers": [(0, 1)], "divergence": "forward_kl"}
    out = DistillationLoss(logits=0.0, attention=1.0, attention_options=options)(ours, theirs, attention_mask=real)
    s, t = ours.attention_inputs[0], theirs.attention_inputs[1]
    expected = attention_distillation_loss(s.query, s.key, t.query, t.key, mask=real.bool())
    assert relative_error(out.loss, expected) < 1e-5


def test_padding_counts_in_no_signal_and_may_hold_nan():
    ours, theirs = states(), states(seed=1)
    attention_mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    loss = DistillationLoss(hidden=1.0)
    expected = loss(ours, theirs, attention_mask=attention_mask)
    expected_grad = torch.autograd.grad(expected.loss, ours.logits)[0]
    with torch.no_grad():
        for x in (ours, theirs):
            x.logits[1, 4:] = NAN
            for each in x.hidden_states:
                each[1, 4:] = NAN
    out = loss(ours, theirs, attention_mask=attention_mask)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(torch.autograd.grad(out.loss, ours.logits)[0], expected_grad)


def test_dicts_and_objects_do_as_well_as_model_outputs():
    ours, theirs = states(), states(seed=1)
    loss = DistillationLoss(hidden=0.5)
    assert torch.equal(loss(vars(ours), vars(theirs)).loss, loss(ours, theirs).loss)


def test_num_items_make_accumulation_one_large_batch(models):
    student, teacher = models
    tokens = batch(rows=4)
    loss = DistillationLoss(
        hidden=1.0,
        attention=1.0,
        lens=1.0,
        shift=True,
        hidden_options={"projection": torch.randn(48, 32)},
        lens_options={"divergence": "forward_kl"},
    )

    def run(part, **options):
        ours, theirs = outputs(student, teacher, part)
        rest = {"attention_mask": part["attention_mask"], "student": student, "teacher": teacher}
        return loss(ours, theirs, labels=part["labels"], **rest, **options)

    whole = run(tokens)
    items = counted(tokens).sum()
    for count in (items, int(items)):
        parts = [
            run({name: value[rows] for name, value in tokens.items()}, num_items=count)
            for rows in (slice(1), slice(1, 4))
        ]
        for name, value in whole.parts.items():
            assert relative_error(sum(part.parts[name] for part in parts), value) < 1e-5


def test_logits_from_last_hidden_states(models):
    student, teacher = models
    tokens = batch(rows=3)
    ours, theirs = outputs(student, teacher, tokens)
    loss = DistillationLoss(shift=True, temperature=2.0)
    rest = {"labels": tokens["labels"], "attention_mask": tokens["attention_mask"]}
    expected = loss(ours, theirs, **rest)
    last = [{"last_hidden_state": x.hidden_states[-1]} for x in (ours, theirs)]
    out = loss(*last, **rest, student=student, teacher=teacher)
    assert relative_error(out.loss, expected.loss) < 1e-5
    weights = [student.lm_head.weight, student.model.embed_tokens.weight]
    got = torch.autograd.grad(out.loss, weights, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(expected.loss, weights), strict=True):
        assert relative_error(a, b) < 1e-4
    del rest["labels"]
    padded = loss(*last, **rest, student=student, teacher=teacher)
    assert relative_error(padded.loss, loss(ours, theirs, **rest).loss) < 1e-5
    with pytest.raises(ValueError, match="student: got None"):
        loss(*last, **rest)


def test_the_models_own_softcaps_are_laid_on_fused_logits():
    student, teacher = (tiny("Gemma2", seed=seed, head_dim=8, num_key_value_heads=2) for seed in (0, 1))
    assert student.config.final_logit_softcapping == 30.0
    student.config.final_logit_softcapping, teacher.config.final_logit_softcapping = 1.5, 2.0
    tokens = batch()
    given = {"input_ids": tokens["input_ids"], "output_hidden_states": True}
    ours, theirs = student(**given), teacher(**given)
    last = [{"last_hidden_state": x.hidden_states[-1]} for x in (ours, theirs)]
    loss = DistillationLoss(backend="reference")
    out = loss(*last, student=student, teacher=teacher)
    assert relative_error(out.loss, loss(ours, theirs).loss) < 1e-5
    with pytest.raises(ValueError, match="softcap"):
        DistillationLoss(softcap=3.0)(*last, student=student, teacher=teacher)
    teacher.config.final_logit_softcapping = None
    with pytest.raises(ValueError, match="student"):
        loss(*last, student=student, teacher=teacher)
    student.config.final_logit_softcapping, student.config.logit_scale = None, 0.5
    with pytest.raises(ValueError, match="logit_scale"):
        loss(*last, student=student, teacher=teacher)


def test_schedules():
    linear, cosine = linear_schedule(1.0, 0.2, 10), cosine_schedule(1.0, 0.2, 10)
    for schedule in (linear, cosine):
        assert schedule(0) == 1.0 and schedule(10) == schedule(99) == 0.2 and schedule(5) == pytest.approx(0.6)
    assert linear(1) == pytest.approx(0.92) and cosine(1) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 10)))
    for bad in ((-1.0, 0.0, 5), (0.0, NAN, 5), (0.0, 1.0, 0), (0.0, 1.0, 2.5)):
        with pytest.raises(ValueError, match=r"start|end|steps"):
            linear_schedule(*bad)


def test_weights_may_be_schedules():
    ours, theirs = states(), states(seed=1)
    loss = DistillationLoss(logits=linear_schedule(1.0, 0.0, 4), hidden=lambda step: float(step))
    at = {step: loss(ours, theirs, step=step) for step in (0, 2, 4)}
    assert at[0].weights == {"logits": 1.0} and at[2].weights == {"logits": 0.5, "hidden": 2.0}
    assert at[4].weights == {"hidden": 4.0}
    assert relative_error(at[2].loss, 0.5 * at[0].parts["logits"] + 2 * at[4].parts["hidden"]) < 1e-6
    with pytest.raises(ValueError, match="step: got None"):
        loss(ours, theirs)
    with pytest.raises(ValueError, match="every schedule gives 0 at step 7"):
        DistillationLoss(logits=linear_schedule(1.0, 0.0, 4))(ours, theirs, step=7)
    with pytest.raises(ValueError, match="hidden: got -1"):
        DistillationLoss(hidden=lambda step: -1.0)(ours, theirs, step=0)


class NoSync(TorchDispatchMode):
    """Refuses every operation whose result the host waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return function(*args, **(kwargs or {}))


def test_no_host_sync(models):
    student, teacher = models
    tokens = batch()
    ours, theirs = outputs(student, teacher, tokens)
    loss = DistillationLoss(hidden=1.0, attention=1.0, shift=True, hidden_options={"projection": torch.randn(48, 32)})
    with NoSync():
        out = loss(ours, theirs, labels=tokens["labels"], num_items=torch.tensor(9))
    assert out.loss.isfinite()


def test_projections_are_parts_of_the_module():
    projections = [nn.Linear(6, 6) for _ in range(2)]
    loss = DistillationLoss(hidden=1.0, hidden_options={"projection": projections})
    assert len(list(loss.parameters())) == 4 and len(loss.state_dict()) == 4
    out = loss(states(), states(seed=1))
    out.loss.backward()
    assert all(each.weight.grad.norm() > 0 for each in projections)
    single = DistillationLoss(hidden=1.0, hidden_options={"projection": nn.Linear(6, 6)})
    single.load_state_dict(single.state_dict())
    assert "hidden=1.0" in repr(single) and "forward_kl" in repr(single)


CONSTRUCTED = {
    "negative weight": (ValueError, "hidden", {"hidden": -0.1}),
    "weight text": (TypeError, "lens", {"lens": "much"}),
    "no weight": (ValueError, "all 0", {"logits": 0.0}),
    "shift": (TypeError, "shift", {"shift": 1}),
    "unknown option": (TypeError, "temprature", {"temprature": 2.0}),
    "reduction": (TypeError, "reduction", {"reduction": "sum"}),
    "hidden option": (TypeError, "hidden_options", {"hidden_options": {"mask": None}}),
    "attention option": (TypeError, "attention_options", {"attention_options": {"causal": True}}),
}


@pytest.mark.parametrize("case", CONSTRUCTED)
def test_bad_options_are_named(case):
    error, name, options = CONSTRUCTED[case]
    with pytest.raises(error, match=name):
        DistillationLoss(**options)


CALLED = {
    "shift not said": (ValueError, "shift", {}, {"labels": torch.zeros(2, 7).long()}),
    "shift not said of a mask": (ValueError, "shift", {}, {"mask": torch.ones(2, 7).bool()}),
    "mask shape": (ValueError, "mask", {"shift": False}, {"mask": torch.ones(2, 6).bool()}),
    "mask shape, no logits": (
        ValueError,
        "mask",
        {"logits": 0.0, "hidden": 1.0, "shift": False},
        {"mask": torch.ones(2, 6).bool()},
    ),
    "mask dtype": (TypeError, "mask", {"shift": False}, {"mask": torch.ones(2, 7)}),
    "attention_mask": (ValueError, "attention_mask", {}, {"attention_mask": torch.ones(2, 6)}),
    "no attention": (ValueError, r"capture_attention\(model\)", {"attention": 1.0}, {}),
    "no models": (ValueError, "student: got None", {"lens": 1.0}, {}),
    "num_items": (ValueError, "num_items", {}, {"num_items": 0}),
}


@pytest.mark.parametrize("case", CALLED)
def test_bad_calls_are_named(case):
    error, name, options, arguments = CALLED[case]
    with pytest.raises(error, match=name):
        DistillationLoss(**options)(states(), states(seed=1), **arguments)


def test_missing_pieces_say_how_to_get_them():
    ours, theirs = states(), SimpleNamespace(logits=states(seed=1).logits, hidden_states=None)
    with pytest.raises(ValueError, match=r"teacher_outputs: has no hidden_states.*output_hidden_states=True"):
        DistillationLoss(hidden=1.0)(ours, theirs)
    with pytest.raises(ValueError, match="teacher_outputs: has no hidden_states"):
        DistillationLoss(logits=0.0, lens=1.0)(ours, theirs)
    with pytest.raises(ValueError, match="student_outputs: has no last_hidden_state"):
        DistillationLoss()({"logits": None}, theirs)


def test_attention_that_is_not_supported_is_refused(models):
    student, teacher = models
    tokens = batch()
    loss = DistillationLoss(logits=0.0, attention=1.0)
    ours, theirs = outputs(student, teacher, tokens)
    gemma = tiny("Gemma2", head_dim=8, num_key_value_heads=2)
    with pytest.raises(ValueError, match="teacher_outputs: caps its attention scores"):
        loss(ours, outputs(student, gemma, tokens)[1])
    windowed = tiny("Mistral", num_key_value_heads=2, sliding_window=4)
    with pytest.raises(ValueError, match="student_outputs: attends 4 of 9 keys"):
        loss(outputs(windowed, teacher, tokens)[0], theirs)
    bert = tiny("Bert", "ForMaskedLM")
    with pytest.raises(ValueError, match="causally"):
        loss(ours, outputs(student, bert, tokens)[1])
    with torch.no_grad():
        frozen = outputs(student, teacher, tokens)[0]
    with pytest.raises(ValueError, match="carry no gradient"):
        loss(frozen, theirs)
    with capture_attention(student, [0]):
        first = student(tokens["input_ids"])
    with pytest.raises(ValueError, match=r"student layers \[1\], captured: \[0\]"):
        DistillationLoss(attention=1.0, attention_options={"layers": [(1, 1)]})(first, theirs)
    with pytest.raises(ValueError, match="no final norm"):
        DistillationLoss(logits=0.0, lens=1.0)(*outputs(bert, bert, tokens), student=bert, teacher=bert)
