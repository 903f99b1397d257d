"""logit_lens_loss and layer_map: against layers written out one by one, and against a Hugging Face model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

import pyfast
from pyfast.layer_map import layer_map

BACKENDS = ["native", "reference"]


class Model:
    """The end of a language model of random hidden states: [embeddings, layer 0, …], final norm, head."""

    def __init__(self, depth, width, words=53, leading=(2, 7)):
        self.hiddens = [(3 * torch.randn(*leading, width)).requires_grad_() for _ in range(depth + 1)]
        self.norm = torch.nn.RMSNorm(width)
        self.norm.weight = torch.nn.Parameter(torch.rand(width) + 0.5)
        self.head = (torch.randn(words, width) / 4).requires_grad_()

    @property
    def trained(self):
        return [*self.hiddens, self.norm.weight, self.head]


def lens(student, teacher, **options):
    return pyfast.logit_lens_loss(
        student.hiddens, teacher.hiddens, student.norm, student.head, teacher.norm, teacher.head, **options
    )


def by_hand(student, teacher, pairs, weights=None, divergence="jsd", normed_last=True, **options):
    """The formula over logits in full: Σ wᵢ · divergence(head(norm(hiddenᵢ₊₁))) / Σ wᵢ."""
    weights = weights or [1.0] * len(pairs)

    def logits(model, layer):
        hidden = model.hiddens[layer + 1]
        last = layer == len(model.hiddens) - 2
        return F.linear(hidden if last and normed_last else model.norm(hidden), model.head)

    losses = [
        pyfast.distillation_loss(logits(student, i), logits(teacher, j), divergence, backend="reference", **options)
        for i, j in pairs
    ]
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)


def check(got, expected, trained):
    """Losses and gradients agree, and reach the same tensors."""
    assert relative_error(got, expected) < 1e-5
    grads = torch.autograd.grad(got.sum(), trained, allow_unused=True)
    truths = torch.autograd.grad(expected.sum(), trained, allow_unused=True)
    for grad, truth in zip(grads, truths, strict=True):
        assert (grad is None) == (truth is None)
        assert grad is None or relative_error(grad, truth) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["jsd", "forward_kl"])
def test_matches_the_layers_one_by_one(divergence, backend):
    student, teacher = Model(4, 12), Model(8, 20)
    labels = torch.randint(0, 53, (2, 7))
    labels[0, :3] = -100
    options = {"divergence": divergence, "temperature": 2.0, "labels": labels}
    got = lens(student, teacher, backend=backend, chunk_size=5, **options)
    check(got, by_hand(student, teacher, [(0, 1), (1, 3), (2, 5)], **options), student.trained)


def test_gradients_reach_the_layers_that_require_them():
    student, teacher = Model(3, 12), Model(3, 12)
    student.norm.requires_grad_(False)
    student.hiddens[1].requires_grad_(False)  # of layer 0, compared beside layer 1
    trained = [student.hiddens[2], student.head]
    check(lens(student, teacher), by_hand(student, teacher, [(0, 0), (1, 1)]), trained)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_layer_weights_and_reductions(reduction):
    student, teacher = Model(4, 12), Model(4, 12)
    mask = torch.rand(2, 7) < 0.6
    options = {"divergence": "forward_kl", "reduction": reduction, "mask": mask}
    got = lens(student, teacher, layers=[0, 2], layer_weights=[3.0, 1], **options)
    assert got.shape == ((2, 7) if reduction == "none" else ())
    check(got, by_hand(student, teacher, [(0, 0), (2, 2)], [3.0, 1.0], **options), student.trained)


def test_num_items_and_cross_entropy():
    student, teacher = Model(3, 12), Model(3, 12)
    options = {"num_items": 40, "ce_weight": 0.5, "labels": torch.randint(0, 53, (2, 7)), "backend": "reference"}
    got = lens(student, teacher, **options)
    del options["backend"]
    check(got, by_hand(student, teacher, [(0, 0), (1, 1)], **options), student.trained)


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        (None, [(0, 1), (1, 4)]),
        ([1], [(1, 4)]),
        ((2, 0), [(2, 6), (0, 1)]),
        ({0: 5, 1: 1}, [(0, 5), (1, 1)]),
        ([(1, 0), (2, 3)], [(1, 0), (2, 3)]),
        (layer_map(3, 7, "last"), [(0, 4), (1, 5), (2, 6)]),
    ],
)
def test_choice_of_layers(layers, pairs):
    student, teacher = Model(3, 12), Model(7, 12)
    got = lens(student, teacher, layers=layers, divergence="forward_kl")
    check(got, by_hand(student, teacher, pairs, divergence="forward_kl"), student.trained)


def test_the_last_layer_without_its_norm():
    student, teacher = Model(2, 12), Model(2, 12)
    got = lens(student, teacher, layers=[1], divergence="forward_kl", last_is_normed=False)
    expected = by_hand(student, teacher, [(1, 1)], divergence="forward_kl", normed_last=False)
    check(got, expected, student.trained)


@pytest.mark.parametrize("backend", BACKENDS)
def test_head_can_be_left_out_of_training(backend):
    student, teacher = Model(3, 12), Model(3, 12)
    bias, teacher_bias = torch.randn(53, requires_grad=True), torch.randn(53)
    options = {"divergence": "forward_kl", "student_bias": bias, "teacher_bias": teacher_bias, "backend": backend}
    whole = lens(student, teacher, **options)
    hidden, norm = torch.autograd.grad(whole, [student.hiddens[1], student.norm.weight])
    lens(student, teacher, train_head=False, **options).backward()
    assert student.head.grad is None and bias.grad is None
    assert relative_error(student.hiddens[1].grad, hidden) < 1e-6
    assert relative_error(student.norm.weight.grad, norm) < 1e-6


def test_no_gradient_flows_to_the_teacher():
    student, teacher = Model(3, 12), Model(3, 12)
    lens(student, teacher, divergence="forward_kl").backward()
    assert all(tensor.grad is None for tensor in teacher.trained)


def test_equal_models_give_zero():
    student = Model(3, 12)
    assert lens(student, student, divergence="forward_kl") == 0


def test_gradcheck_of_the_reference():
    student, teacher = Model(2, 4, words=6, leading=(3,)), Model(3, 5, words=6, leading=(3,))
    hiddens = [hidden.detach().double().requires_grad_() for hidden in student.hiddens]
    teachers = [hidden.detach().double() for hidden in teacher.hiddens]
    head = student.head.detach().double().requires_grad_()

    def loss(head, *hiddens):
        norm = torch.nn.functional.normalize
        return pyfast.logit_lens_loss(
            hiddens, teachers, norm, head, norm, teacher.head.detach().double(), layers=[0, 1]
        )

    assert torch.autograd.gradcheck(loss, (head, *hiddens))


def test_index_of_a_hugging_face_model():
    """Entry i + 1 of hidden_states is the output of layer i, and the last has been through the final norm."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 1.5)
    outputs = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, i=i: outputs.__setitem__(i, output))
        for i, layer in enumerate(model.model.layers)
    ]
    ids = torch.randint(0, 53, (2, 7))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(out.hidden_states) == 4
    for i in (0, 1):
        captured = outputs[i][0] if isinstance(outputs[i], tuple) else outputs[i]
        assert torch.equal(out.hidden_states[i + 1], captured)
    # Through the lens the last layer is the model's own output: as if its logits were the teacher's.
    weights = (model.model.norm, model.lm_head.weight)
    same = pyfast.logit_lens_loss(
        out.hidden_states, out.hidden_states, *weights, *weights, layers={0: 2}, divergence="forward_kl"
    )
    early = F.linear(model.model.norm(out.hidden_states[1]), model.lm_head.weight)
    assert relative_error(same, pyfast.distillation_loss(early, out.logits)) < 1e-5


S, T = Model(3, 12), Model(5, 16)
GOOD = {
    "student_hiddens": S.hiddens,
    "teacher_hiddens": T.hiddens,
    "student_norm": S.norm,
    "student_head": S.head,
    "teacher_norm": T.norm,
    "teacher_head": T.head,
}
BAD = {
    "one tensor for all layers": (TypeError, "student_hiddens", {"student_hiddens": torch.randn(4, 7, 12)}),
    "hiddens of no tensors": (TypeError, "teacher_hiddens", {"teacher_hiddens": [1, 2]}),
    "embeddings alone": (ValueError, "teacher_hiddens", {"teacher_hiddens": T.hiddens[:1]}),
    "norm is a weight": (TypeError, "student_norm", {"student_norm": S.norm.weight}),
    "no norm": (TypeError, "teacher_norm", {"teacher_norm": None}),
    "heads swapped": (ValueError, "student_head", {"student_head": T.head, "teacher_head": S.head}),
    "batches differ": (ValueError, "teacher_hidden", {"teacher_hiddens": [h[:1] for h in T.hiddens]}),
    "layers differ": (
        ValueError,
        "student_hidden",
        {"student_hiddens": [h[: i // 2 + 1] for i, h in enumerate(S.hiddens)]},
    ),
    "layer above": (ValueError, "layers", {"layers": [3]}),
    "layer below": (ValueError, "layers", {"layers": [-1]}),
    "teacher layer above": (ValueError, "layers", {"layers": {0: 5}}),
    "layers a number": (TypeError, "layers", {"layers": 2}),
    "layers a name": (TypeError, "layers", {"layers": "uniform"}),
    "layers of names": (TypeError, "layers", {"layers": ["a"]}),
    "layers of triples": (TypeError, "layers", {"layers": [(0, 1, 2)]}),
    "no layers": (ValueError, "layers", {"layers": []}),
    "one layer": (ValueError, "layers", {"student_hiddens": S.hiddens[:2]}),
    "weights too few": (ValueError, "layer_weights", {"layer_weights": [1.0]}),
    "weights negative": (ValueError, "layer_weights", {"layer_weights": [1.0, -1.0]}),
    "weights zero": (ValueError, "layer_weights", {"layer_weights": [0, 0]}),
    "teacher logits": (TypeError, "teacher_logits", {"teacher_logits": torch.randn(2, 7, 53)}),
    "unknown option": (TypeError, "temprature", {"temprature": 2.0}),
    "divergence": (ValueError, "divergence", {"divergence": "kl"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    error, message, options = BAD[name]
    with pytest.raises(error, match=message):
        pyfast.logit_lens_loss(**{**GOOD, **options})
