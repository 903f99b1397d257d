"""sparsify and the magnitude masks: what is kept, what is swapped, what is left alone, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import relative_error
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import pyfast
from pyfast.nn import SparseLinear
from pyfast.sparse import magnitude_mask


def tiny_llama(tied=False):
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def sparse_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitmap_mask_removes_the_smallest(sparsity, dtype):
    weight = torch.randn(30, 70).to(dtype)  # bfloat16 has many ties
    mask = magnitude_mask(weight, "bitmap", sparsity)
    assert int(mask.sum()) == weight.numel() - round(sparsity * weight.numel())
    if sparsity:
        assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_24_mask_keeps_the_two_largest_of_four():
    weight = torch.randn(20, 64).bfloat16()
    groups = magnitude_mask(weight, "2:4", 0.5).reshape(20, 16, 4)
    assert torch.equal(groups.sum(-1), torch.full((20, 16), 2))
    magnitude = weight.abs().reshape(20, 16, 4).float()
    kept = torch.where(groups, magnitude, float("inf")).amin(-1)
    removed = torch.where(groups, -1.0, magnitude).amax(-1)
    assert (kept >= removed).all()
    ties = magnitude_mask(torch.ones(1, 6), "2:4", 0.5)
    assert ties.tolist() == [[True, True, False, False, True, True]]


@pytest.mark.parametrize(("format", "sparsity"), [("2:4", 0.5), ("bitmap", 0.5), ("bitmap", 0.8)])
def test_model_gives_what_the_masked_dense_model_gives(format, sparsity):
    model = tiny_llama()
    masked = copy.deepcopy(model)
    for name, module in masked.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data = torch.where(magnitude_mask(module.weight, format, sparsity), module.weight.data, 0.0)
    returned = pyfast.sparsify(model, format, sparsity)
    assert returned is model
    assert len(sparse_names(model)) == 14 and type(model.lm_head) is nn.Linear
    ids = torch.randint(0, 96, (2, 13))
    with torch.no_grad():
        assert relative_error(model(ids).logits, masked(ids).logits) < 1e-5
        sparse = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(sparse, masked.generate(ids, max_new_tokens=8, do_sample=False))


def test_include_exclude_and_head():
    model = pyfast.sparsify(tiny_llama(), include="model.layers.*.mlp.*", exclude=["*.down_proj"])
    assert {name.rpartition(".")[2] for name in sparse_names(model)} == {"gate_proj", "up_proj"}
    assert len(sparse_names(model)) == 4
    assert "lm_head" in sparse_names(pyfast.sparsify(tiny_llama(), head=True))


def test_a_tied_head_stays_dense_or_is_untied(tmp_path):
    model = tiny_llama(tied=True)
    shared = model.config
    embedding = model.model.embed_tokens.weight
    dense, before = pyfast.sparsify(copy.deepcopy(model)), embedding.detach().clone()
    assert type(dense.lm_head) is nn.Linear and dense.lm_head.weight is dense.model.embed_tokens.weight

    pyfast.sparsify(model, "bitmap", 0.5, head=True)
    assert "lm_head" in sparse_names(model) and model.model.embed_tokens.weight is embedding
    assert torch.equal(embedding, before)
    mask = magnitude_mask(before, "bitmap", 0.5)
    assert torch.equal(model.lm_head.weight.to_dense(), torch.where(mask, before, 0.0))
    assert not model.config.tie_word_embeddings and shared.tie_word_embeddings
    model.tie_weights()
    ids = torch.randint(0, 96, (2, 13))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 17)
    assert type(again.lm_head) is SparseLinear and torch.equal(again.model.embed_tokens.weight, before)
    assert torch.equal(type(model.model).from_pretrained(tmp_path).embed_tokens.weight, before)


def test_a_tied_head_of_a_plain_module():
    model = nn.ModuleDict({"embedding": nn.Embedding(32, 16), "lm_head": nn.Linear(16, 32)})
    model["lm_head"].weight = model["embedding"].weight
    pyfast.sparsify(model, head=True)
    assert type(model["lm_head"]) is SparseLinear and model["embedding"].weight.shape == (32, 16)


def test_a_shared_module_is_swapped_once():
    linear = nn.Linear(32, 32)
    model = pyfast.sparsify(nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)}))
    assert isinstance(model["a"], SparseLinear) and model["a"] is model["b"][0]


def test_subclasses_modes_and_requires_grad_are_respected():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 32, bias=False), Mine(32, 32), nn.Linear(32, 8)).eval()
    model[2].weight.requires_grad_(False)
    pyfast.sparsify(model)
    assert type(model[1]) is Mine
    assert not model[0].training and model[0].bias is None and model[0].values.requires_grad
    assert not model[2].values.requires_grad and model[2].bias.requires_grad


def nan_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[0, 0] = float("nan")
    return model


BAD = {
    "no module": (TypeError, "model", lambda: torch.ones(3), {}),
    "format": (ValueError, "format", tiny_llama, {"format": "1:4"}),
    "sparsity one": (ValueError, "sparsity", tiny_llama, {"format": "bitmap", "sparsity": 1.0}),
    "sparsity negative": (ValueError, "sparsity", tiny_llama, {"format": "bitmap", "sparsity": -0.1}),
    "sparsity nan": (ValueError, "sparsity", tiny_llama, {"format": "bitmap", "sparsity": float("nan")}),
    "sparsity text": (TypeError, "sparsity", tiny_llama, {"format": "bitmap", "sparsity": "0.5"}),
    "sparsity of 2:4": (ValueError, "sparsity", tiny_llama, {"format": "2:4", "sparsity": 0.8}),
    "include matches nothing": (ValueError, "include", tiny_llama, {"include": "layers.*"}),
    "exclude matches nothing": (ValueError, "exclude", tiny_llama, {"exclude": ["*.q_prj"]}),
    "include of integers": (TypeError, "include", tiny_llama, {"include": [3]}),
    "all excluded": (ValueError, "no eligible", tiny_llama, {"exclude": "*"}),
    "no linear layer": (ValueError, "no eligible", lambda: nn.Sequential(nn.ReLU()), {}),
    "nan": (ValueError, "1 holds NaN", nan_model, {}),
    "meta": (ValueError, "meta", lambda: nn.Sequential(nn.Linear(8, 8, device="meta")), {}),
    "complex": (TypeError, "dtype", lambda: nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64)), {}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case):
    error, message, build, options = BAD[case]
    model = build()
    before = list(model.modules()) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        pyfast.sparsify(model, **options)
    if before is not None:
        assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_from_linear_refuses_other_modules():
    with pytest.raises(TypeError, match="linear"):
        SparseLinear.from_linear(nn.Conv1d(3, 3, 1))
    with pytest.raises(ValueError, match="format"):
        SparseLinear.from_linear(nn.Linear(3, 3), "4:8")
