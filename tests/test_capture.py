"""Captured queries and keys give the very attention of the model, which runs as it does without the capture."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tiny_models import batch, tiny
from torch import nn

from pyfast import capture_attention

GROUPED = {"num_key_value_heads": 2}
MODELS = {
    "llama": lambda: tiny("Llama", **GROUPED),
    "qwen2": lambda: tiny("Qwen2", **GROUPED),
    "qwen2 windows": lambda: tiny(
        "Qwen2", **GROUPED, use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"] * 2
    ),
    "gemma2": lambda: tiny("Gemma2", **GROUPED, head_dim=8),
    "bert": lambda: tiny("Bert", "ForMaskedLM"),
    "roberta": lambda: tiny("Roberta", "ForMaskedLM"),
}


def inputs(**options):
    return {name: value for name, value in batch(**options).items() if name != "labels"}


def attention(captured):
    """The attention matrix that the captured inputs give, by its definition."""
    query, key = captured.query, captured.key
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = captured.scaling * query @ key.mT
    if captured.softcap is not None:
        scores = captured.softcap * torch.tanh(scores / captured.softcap)
    if captured.mask is not None:
        mask = captured.mask
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    elif captured.causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
    return scores.softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_gives_the_attention_of_the_model(name):
    """With eager attention the model returns its matrices."""
    model = MODELS[name]()
    model.set_attn_implementation("eager")
    with capture_attention(model):
        out = model(**inputs(), output_attentions=True)
    assert sorted(out.attention_inputs) == [0, 1] and out.attention_inputs.depth == 2
    for layer, matrix in enumerate(out.attentions):
        captured = out.attention_inputs[layer]
        assert torch.allclose(attention(captured), matrix, atol=1e-5)
        assert captured.causal == (name not in ("bert", "roberta"))
        assert captured.softcap == (50.0 if name == "gemma2" else None)
        windows = {"qwen2 windows": [4, 4], "gemma2": [4096, None]}
        assert captured.sliding_window == windows.get(name, [None, None])[layer]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_runs_as_it_does_without(name, implementation, padded):
    if name == "gemma2" and implementation == "sdpa":
        pytest.skip("transformers has no sdpa with softcaps")
    model = MODELS[name]().train()  # with dropout, where the family has it
    model.set_attn_implementation(implementation)
    given = inputs() if padded else {"input_ids": inputs()["input_ids"]}
    torch.manual_seed(3)
    plain = model(**given).logits
    plain.sum().backward()
    expected = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    model.zero_grad()
    torch.manual_seed(3)
    with capture_attention(model):
        captured = model(**given).logits
    captured.sum().backward()
    assert torch.equal(plain, captured)
    got = [each.grad for each in model.parameters() if each.grad is not None]
    assert all(torch.equal(*pair) for pair in zip(expected, got, strict=True))
    assert model.config._attn_implementation == implementation
    assert not hasattr(model(**given), "attention_inputs")


def test_layers_are_chosen_and_refilled():
    model = tiny("Llama", num_hidden_layers=4, **GROUPED)
    with capture_attention(model, layers=[1, -1]) as capture:
        first = model(**inputs(length=9)).attention_inputs
        second = model(**inputs(length=5)).attention_inputs
    assert sorted(first) == sorted(second) == [1, 3] and first.depth == 4
    assert first[1].query.shape == (2, 4, 9, 8) and first[1].key.shape == (2, 2, 9, 8)
    assert second[3].query.shape[2] == 5 and capture.layers is second
    assert first[1].scaling == pytest.approx(8**-0.5)


def test_gradients_flow_to_the_model():
    model = tiny("Llama", **GROUPED)
    with capture_attention(model, layers=[1]):
        captured = model(**inputs()).attention_inputs[1]
    captured.query.square().sum().backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.norm() > 0
    assert model.model.layers[0].mlp.up_proj.weight.grad.norm() > 0
    assert model.model.layers[1].mlp.up_proj.weight.grad is None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpointed_layers_are_recorded_once():
    model = tiny("Llama", **GROUPED).train()
    with capture_attention(model):
        plain = model(**inputs()).attention_inputs[1].query
    model.gradient_checkpointing_enable()
    with capture_attention(model) as capture:
        out = model(**inputs(), use_cache=False)
        query = out.attention_inputs[1].query
        (out.logits.sum() + query.sum()).backward()
        assert capture.layers.depth == 2 and capture.layers[1].query is query
    assert torch.allclose(plain, query, atol=1e-6) and model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_two_models_of_one_configuration():
    student, teacher = tiny("Llama", **GROUPED), tiny("Llama", **GROUPED)
    teacher.config = student.config
    for module in teacher.modules():
        if hasattr(module, "config"):
            module.config = student.config
    with capture_attention(student) as ours, capture_attention(teacher) as theirs:
        student(**inputs())
        assert len(ours.layers) == 2 and not theirs.layers
        teacher(**inputs(length=4))
        assert ours.layers[0].query.shape[2] == 9 and theirs.layers[0].query.shape[2] == 4
    assert student.config._attn_implementation == "sdpa"


def test_two_captures_of_one_model():
    model = tiny("Llama", **GROUPED)
    with capture_attention(model, [0]) as outer:
        with capture_attention(model.model, [1]) as inner:
            model(**inputs())
        assert sorted(outer.layers) == [0] and sorted(inner.layers) == [1]
        model(**inputs(length=3))
        assert outer.layers[0].query.shape[2] == 3
    assert model.config._attn_implementation == "sdpa"


def test_an_error_inside_leaves_the_model_as_it_was():
    model = tiny("Llama", **GROUPED)
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    with contextlib.suppress(RuntimeError), capture_attention(model):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    assert hooks == (len(model._forward_hooks), len(model._forward_pre_hooks))


def test_bad_arguments():
    with pytest.raises(TypeError, match="model: got Linear"), capture_attention(nn.Linear(2, 2)):
        pass
    model = tiny("Llama", **GROUPED)
    for layers in ([-3], [0.5], [], "last"):
        with pytest.raises((TypeError, ValueError), match="layers"), capture_attention(model, layers):
            pass
    with capture_attention(model, [0, 7]), pytest.raises(ValueError, match=r"layers: got \[7\], accepted: 0 to 1"):
        model(**inputs())


def test_a_model_with_attention_of_its_own_is_refused():
    model = tiny("Llama", **GROUPED)
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with capture_attention(model), pytest.raises(ValueError, match="AttentionInterface"):
        model(**inputs())
