"""Sparse models on disk: save_pretrained and from_pretrained, the entry of config.json, damage, another ISA."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import batch, tiny
from transformers import AutoModel, AutoModelForCausalLM

import pyfast
from pyfast import backends
from pyfast.nn import SparseLinear
from pyfast.sparse import save_pretrained

SIZES = {
    "Qwen2": {"num_key_value_heads": 4},
    "Gemma2": {"num_key_value_heads": 4, "head_dim": 8},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
CASES = [("2:4", 0.5, False), ("bitmap", 0.8, False), ("bitmap", 0.6, True), ("2:4", 0.5, True)]


def sparse_model(format="bitmap", sparsity=0.8, int8=False, family="Qwen2", **options):
    model = pyfast.sparsify(tiny(family, **SIZES.get(family, {}), **options), format, sparsity)
    for module in model.modules():
        if int8 and isinstance(module, SparseLinear):
            module.quantize_()
    return model


def sparse_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def answers(model):
    ids = batch()["input_ids"][:1]
    with torch.no_grad():
        return model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize(("format", "sparsity", "int8"), CASES)
def test_a_model_comes_back_as_it_was_saved(format, sparsity, int8, tmp_path):
    model = sparse_model(format, sparsity, int8)
    save_pretrained(model, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(sparse_layers(again)) == list(sparse_layers(model)) != []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    logits, text = answers(model)
    assert torch.equal(answers(again)[0], logits) and torch.equal(answers(again)[1], text)
    assert type(again) is type(model) and not again.training


def test_saving_as_usual_is_enough_after_sparsify_and_after_loading(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    entry = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "pyfast" and entry["version"] == 1
    name, layer = next(iter(sparse_layers(model).items()))
    assert entry["layers"][name] == {"format": "bitmap", "stored": layer.values.numel(), "int8": False}
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(answers(third)[0], answers(model)[0])


def test_a_loaded_model_is_an_ordinary_one(tmp_path):
    sparse_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    example = batch()
    model(**example).loss.backward()
    layer = next(iter(sparse_layers(model).values()))
    assert layer.values.grad is not None and not getattr(model, "is_quantized", False)
    assert next(iter(sparse_layers(model.half()).values())).values.dtype == torch.float16


@pytest.mark.parametrize("int8", [False, True])
def test_another_dtype_and_the_base_model(int8, tmp_path):
    model = sparse_model(int8=int8)
    save_pretrained(model, tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = next(iter(sparse_layers(half).values()))
    assert layer.values.dtype == (torch.int8 if int8 else torch.bfloat16)
    if int8:
        assert layer.scales.dtype == torch.float32
    assert (answers(half)[0].float() - answers(model)[0]).norm() < 0.05 * answers(model)[0].norm()
    base = AutoModel.from_pretrained(tmp_path)
    assert {f"model.{name}" for name in sparse_layers(base)} == set(sparse_layers(model))
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_sparse_head_and_biases(tmp_path):
    model = tiny("Qwen2", **SIZES["Qwen2"])  # its q, k, v have biases
    pyfast.sparsify(model, "bitmap", 0.5, head=True)
    for layer in sparse_layers(model).values():
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
    assert "lm_head" in sparse_layers(model) or model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert torch.equal(answers(AutoModelForCausalLM.from_pretrained(tmp_path))[0], answers(model)[0])
    assert len(sparse_layers(AutoModel.from_pretrained(tmp_path))) == 14


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3", "OPT", "GPTNeoX"])
def test_families(family, tmp_path):
    model = sparse_model(family=family)
    model.save_pretrained(tmp_path)
    assert torch.equal(answers(AutoModelForCausalLM.from_pretrained(tmp_path))[0], answers(model)[0])


RELOAD = """
import sys, torch
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[1] + "/ids.pt")
with torch.no_grad():
    logits, text = model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
torch.save((logits, text, pyfast.backends.active_isa()), sys.argv[1] + "/answers.pt")
"""
PYFAST_FIRST = "import pyfast\nfrom transformers import AutoModelForCausalLM"
PYFAST_LAST = "from transformers import AutoModelForCausalLM\nimport pyfast"
WITHOUT_NATIVE = (
    "import sys, warnings\nwarnings.simplefilter('ignore')\nsys.modules['pyfast._C'] = None\n" + PYFAST_FIRST
)


@pytest.mark.parametrize(
    ("imports", "isa"),
    [(PYFAST_LAST, "serial"), (WITHOUT_NATIVE, None)],
    ids=["serial", "no native module"],
)
def test_another_process_gives_the_same_answers(imports, isa, tmp_path):
    """On another ISA, without the native module, and whichever of the two packages is imported first."""
    if isa is not None and isa not in backends.isas_supported():
        pytest.skip(f"this processor cannot run {isa}")
    model = sparse_model("bitmap", 0.8, int8=isa == "serial")
    save_pretrained(model, tmp_path)
    torch.save(batch()["input_ids"][:1], tmp_path / "ids.pt")
    environment = os.environ | ({} if isa is None else {"PYFAST_ISA": isa})
    command = [sys.executable, "-c", RELOAD.format(imports=imports), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits, text, active = torch.load(tmp_path / "answers.pt")
    assert active == isa
    torch.testing.assert_close(logits, answers(model)[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(text, answers(model)[1])


def rewrite(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def reentry(path, change):
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


LAYER = "model.layers.1.mlp.up_proj"


def flip(tensors):
    tensors[f"{LAYER}.bitmaps"][0, 3] ^= 2


TENSORS = {
    "a bit flipped": (flip, f"{LAYER}: offsets"),
    "offsets moved": (lambda t: t[f"{LAYER}.offsets"].add_(1), f"{LAYER}: offsets"),
    "values missing": (lambda t: t.pop(f"{LAYER}.values"), f"{LAYER}: the checkpoint has no such tensor"),
    "values short": (lambda t: t.update({f"{LAYER}.values": t[f"{LAYER}.values"][1:].clone()}), f"{LAYER}: the check"),
    "dense instead": (
        lambda t: (
            t.update({f"{LAYER}.weight": torch.ones(48, 32)})
            or [t.pop(f"{LAYER}.{part}") for part in ("values", "offsets", "bitmaps")]
        ),
        f"{LAYER}: is dense in the checkpoint",
    ),
}
ENTRIES = {
    "another version": (lambda e: e.update(version=2), "version"),
    "no layers": (lambda e: e.update(layers=None), "layers"),
    "a layer unknown": (lambda e: e["layers"].update({"model.layers.7.x": e["layers"][LAYER]}), "model.layers.7.x"),
    "a layer that is none": (lambda e: e["layers"].update({"model.norm": e["layers"][LAYER]}), "Qwen2RMSNorm"),
    "a layer forgotten": (lambda e: e["layers"].pop(LAYER), f"{LAYER}: is sparse in the checkpoint"),
    "another format": (lambda e: e["layers"][LAYER].update(format="2:4"), f"{LAYER}: stored"),
    "a format unknown": (lambda e: e["layers"][LAYER].update(format="csr"), f"{LAYER}: format"),
    "another count": (lambda e: e["layers"][LAYER].update(stored=3), f"{LAYER}: the checkpoint has shape"),
    "a negative count": (lambda e: e["layers"][LAYER].update(stored=-3), f"{LAYER}: got"),
    "a count too large": (lambda e: e["layers"][LAYER].update(stored=10**9), f"{LAYER}: stored"),
    "int8 that is not": (lambda e: e["layers"][LAYER].update(int8=True), f"{LAYER}: the checkpoint has no such"),
}


@pytest.mark.parametrize("case", [*TENSORS, *ENTRIES])
def test_damaged_and_mismatched_checkpoints_are_refused_with_the_layer(case, tmp_path):
    sparse_model().save_pretrained(tmp_path)
    change, message = (TENSORS | ENTRIES)[case]
    (rewrite if case in TENSORS else reentry)(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_that_others_share_is_not_written_to(tmp_path):
    teacher = tiny("Llama")
    student = type(teacher)(teacher.config).eval()
    pyfast.sparsify(student, "bitmap", 0.5)
    assert student.config is student.model.config is not teacher.config
    assert student.config.quantization_config and not hasattr(teacher.config, "quantization_config")
    with pytest.raises(ValueError, match="is dense in the checkpoint"):  # a dense model with a sparse model's config
        type(teacher)(student.config).save_pretrained(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layers_are_removed_from_a_sparse_model(tmp_path):
    model = sparse_model(family="Llama", num_hidden_layers=4)
    pyfast.structured.remove_layers(model, [1, 2])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(sparse_layers(again)) == 14 and torch.equal(answers(again)[0], answers(model)[0])
    pyfast.structured.remove_layers(again, [0])
    assert len(again.config.quantization_config["layers"]) == 7


def test_what_cannot_be_saved():
    with pytest.raises(TypeError, match="model"):
        save_pretrained(torch.nn.Linear(3, 3), "nowhere")
    with pytest.raises(ValueError, match="no SparseLinear"):
        save_pretrained(tiny("Llama"), "nowhere")
    model = sparse_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="'gptq'"):
        save_pretrained(model, "nowhere")
    assert not os.path.exists("nowhere")


def test_layers_made_dense_again_leave_the_entry(tmp_path):
    model = pyfast.sparsify(tiny("Llama"), include="*.0.mlp.up_proj")
    layer = model.model.layers[0].mlp.up_proj
    dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    dense.weight.data = layer.weight.to_dense().detach()
    model.model.layers[0].mlp.up_proj = dense
    with pytest.raises(ValueError, match="no SparseLinear"):
        save_pretrained(model, tmp_path)
    assert not hasattr(model.config, "quantization_config")
