"""fuse: the gated MLP of Hugging Face decoders in one kernel; what it computes, keeps, and leaves alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import relative_error
from tiny_models import batch, tiny
from torch import nn
from transformers import AutoModelForCausalLM

import pyfast
from pyfast.nn import SparseLinear
from pyfast.sparse import FusedGatedMLP, fuse

FAMILIES = {"Llama": "silu", "Qwen2": "silu", "Qwen3": "silu", "Mistral": "silu", "Gemma": "gelu_tanh"}


def sparse(family="Llama", format="bitmap", **options):
    if family in ("Qwen3", "Gemma", "Mistral"):
        options["head_dim"] = 8
    options["num_key_value_heads"] = 4
    return pyfast.sparsify(tiny(family, **options), format, 0.5)


def fused_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, FusedGatedMLP)]


@pytest.mark.parametrize("format", ["2:4", "bitmap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_give_the_same_and_keep_their_names(isa, family, format):
    model = sparse(family, format)
    plain = copy.deepcopy(model)
    assert fuse(model) is model
    assert fused_names(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert f"activation='{FAMILIES[family]}'" in repr(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert relative_error(model(ids).logits, plain(ids).logits) < 1e-5
        text = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
        assert torch.equal(text, plain.generate(ids[:1], max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_int8(dtype):
    model = sparse().to(dtype)
    plain = copy.deepcopy(model)
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert relative_error(fuse(model)(ids).logits, plain(ids).logits) < 0.03
        for layer in plain.modules():
            if isinstance(layer, SparseLinear):
                layer.quantize_()
        expected = plain(ids).logits
        assert relative_error(fuse(plain)(ids).logits, expected) < 0.03


def test_gradients_go_through_the_layers_one_by_one():
    model = sparse().train()
    plain = copy.deepcopy(model)
    fuse(model)
    for each in (model, plain):
        each(**batch()).loss.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    model.requires_grad_(False)
    plain.requires_grad_(False)
    x = torch.randn(3, 32, requires_grad=True)  # of a prompt that is trained
    for each in (model, plain):
        each.model.layers[0].mlp(x).sum().backward()
    assert x.grad is not None


def test_pickle_deepcopy_save_compile(tmp_path):
    model = fuse(sparse())
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert fused_names(twin) == fused_names(model) and torch.equal(twin(ids).logits, expected)
        mlp = model.model.layers[0].mlp
        x = torch.randn(4, 32)
        assert torch.equal(torch.compile(mlp, fullgraph=True)(x), mlp(x))
    model.save_pretrained(tmp_path)
    again = fuse(AutoModelForCausalLM.from_pretrained(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)


class Odd(nn.Module):
    """The children of a gated MLP around another formula."""

    def __init__(self, act=None, **extra):
        super().__init__()
        for name, size in (("gate_proj", (32, 48)), ("up_proj", (32, 48)), ("down_proj", (48, 32))):
            setattr(self, name, SparseLinear.from_linear(nn.Linear(*size), "bitmap", 0.5))
        self.act_fn = nn.SiLU() if act is None else act
        for name, module in extra.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Gated(Odd):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def hooked():
    mlp = Gated()
    mlp.register_forward_hook(lambda *_: None)
    return mlp


def dense_gate():
    mlp = Gated()
    mlp.gate_proj = nn.Linear(32, 48)
    return mlp


@pytest.mark.parametrize(
    "mlp",
    [Odd(), Gated(nn.Tanh()), Gated(nn.PReLU()), Gated(dropout=nn.Dropout()), hooked(), dense_gate()],
    ids=["formula", "activation", "trained activation", "another child", "hooks", "dense gate"],
)
def test_what_is_something_else_is_left_alone(mlp):
    model = nn.Sequential(mlp)
    with pytest.raises(ValueError, match="no gated MLP"):
        fuse(model)
    assert model[0] is mlp


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()])
def test_activations_and_biases(isa, act):
    model = nn.Sequential(Gated(act))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model(x)
        assert relative_error(fuse(model)(x), expected) < 1e-5
    assert isinstance(model[0], FusedGatedMLP)


def test_nothing_to_fuse():
    with pytest.raises(ValueError, match="no gated MLP"):
        fuse(sparse("Phi3"))
    with pytest.raises(TypeError, match="model"):
        fuse(torch.ones(3))
