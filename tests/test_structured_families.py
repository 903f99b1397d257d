"""remove_layers on every taught family: the cut model is the old one with the removed layers passed over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import pyfast.structured.verify as verify
from pyfast.structured import SurgeryError, block_influence, remove_layers
from pyfast.structured.families import CONFIG_RULES, FAMILIES, anatomy, edited_fields

LAYERS = 6
REMOVED = [1, 4]
KEPT = [0, 2, 3, 5]
# Wide initial weights: every layer turns the hidden state a good deal, so that a wrong one shows.
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
DECODER: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
ENCODER: dict[str, Any] = {**SMALL, "max_position_embeddings": 64}
MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
MIXED += ["full_attention"]


def build(name: str, family: str, base: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**base, **options})
    return getattr(transformers, name)(config).eval()


CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: build("LlamaForCausalLM", "Llama", DECODER),
    "llama-tied": lambda: build("LlamaForCausalLM", "Llama", DECODER, tie_word_embeddings=True),
    "llama-bfloat16": lambda: build("LlamaForCausalLM", "Llama", DECODER).to(torch.bfloat16),
    "llama-float64": lambda: build("LlamaForCausalLM", "Llama", DECODER).double(),
    "qwen2": lambda: build("Qwen2ForCausalLM", "Qwen2", DECODER, tie_word_embeddings=True),
    "qwen2-window": lambda: build(
        "Qwen2ForCausalLM", "Qwen2", DECODER, use_sliding_window=True, sliding_window=8, max_window_layers=3
    ),
    "qwen2-mixed": lambda: build(
        "Qwen2ForCausalLM", "Qwen2", DECODER, use_sliding_window=True, sliding_window=8, layer_types=MIXED
    ),
    "qwen3": lambda: build("Qwen3ForCausalLM", "Qwen3", DECODER, head_dim=16, tie_word_embeddings=True),
    "qwen3-mixed": lambda: build(
        "Qwen3ForCausalLM", "Qwen3", DECODER, use_sliding_window=True, sliding_window=8, layer_types=MIXED
    ),
    "mistral": lambda: build("MistralForCausalLM", "Mistral", DECODER, sliding_window=8),
    "mistral-full": lambda: build("MistralForCausalLM", "Mistral", DECODER, sliding_window=None),
    "bert-decoder": lambda: build("BertLMHeadModel", "Bert", ENCODER, is_decoder=True),
}
BODIES: dict[str, Callable[[], Any]] = {
    "llama-body": lambda: build("LlamaModel", "Llama", DECODER),
    "llama-classifier": lambda: build("LlamaForSequenceClassification", "Llama", DECODER),
    "llama-answers": lambda: build("LlamaForQuestionAnswering", "Llama", DECODER),
    "bert-body": lambda: build("BertModel", "Bert", ENCODER),
    "bert-words": lambda: build("BertForMaskedLM", "Bert", ENCODER),
    "bert-pretraining": lambda: build("BertForPreTraining", "Bert", ENCODER),
    "bert-classifier": lambda: build("BertForSequenceClassification", "Bert", ENCODER),
    "bert-tokens": lambda: build("BertForTokenClassification", "Bert", ENCODER),
    "bert-answers": lambda: build("BertForQuestionAnswering", "Bert", ENCODER),
    "bert-choice": lambda: build("BertForMultipleChoice", "Bert", ENCODER),
    "roberta-body": lambda: build("RobertaModel", "Roberta", ENCODER),
    "roberta-words": lambda: build("RobertaForMaskedLM", "Roberta", ENCODER),
    "roberta-classifier": lambda: build("RobertaForSequenceClassification", "Roberta", ENCODER),
    "xlm-roberta-words": lambda: build("XLMRobertaForMaskedLM", "XLMRoberta", ENCODER),
    "camembert-body": lambda: build("CamembertModel", "Camembert", ENCODER),
}
ALL = {**CAUSAL, **BODIES}
SAME = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def layers_of(model: Any) -> Any:
    base = model.base_model
    return base.layers if hasattr(base, "layers") else base.encoder.layer


def inputs(model: Any) -> dict[str, Tensor]:
    """Two rows of 40 tokens, the second padded at the end; longer than every sliding window here."""
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 31:] = 0
    ids = torch.where(mask == 0, 1 if model.config.pad_token_id is None else model.config.pad_token_id, ids)
    if type(model).__name__.endswith("ForMultipleChoice"):
        return {"input_ids": ids[:, None], "attention_mask": mask[:, None]}
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outputs(model: Any, **extra: Any) -> dict[str, Tensor]:
    found = model(**inputs(model), **extra)
    return {name: value.double() for name, value in found.items() if isinstance(value, Tensor)}


def without(model: Any, removed: list[int]) -> Any:
    """A copy of the whole model in which the removed layers hand on what they are given: nothing is cut."""
    model = copy.deepcopy(model)
    for index in removed:
        layers_of(model)[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    assert wanted
    for name in wanted:
        error = float((got[name] - wanted[name]).norm() / wanted[name].norm())
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("case", ALL)
def test_outputs_are_those_of_the_kept_layers(case: str) -> None:
    model = ALL[case]()
    options = {} if case.startswith(("bert", "roberta", "xlm", "camembert")) else {"use_cache": False}
    wanted, untouched = outputs(without(model, REMOVED), **options), outputs(model, **options)
    kept = [layers_of(model)[index] for index in KEPT]
    container = layers_of(model)
    types = getattr(model.config, "layer_types", None)

    assert remove_layers(model, REMOVED) is model

    assert_close(outputs(model, **options), wanted, SAME[model.dtype])
    with pytest.raises(AssertionError):  # the cut shows: the comparison can fail
        assert_close(outputs(model, **options), untouched, 1e-3)
    assert layers_of(model) is container
    assert all(mine is old for mine, old in zip(container, kept, strict=True))
    assert model.config.num_hidden_layers == len(KEPT)
    if types is not None:
        assert model.config.layer_types == [types[index] for index in KEPT]
    for index, layer in enumerate(container):
        stored = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
        assert stored == {index}


@pytest.mark.parametrize("case", ALL)
def test_saved_and_reloaded(case: str, tmp_path: Path) -> None:
    model = remove_layers(ALL[case](), REMOVED)
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, dtype=model.dtype, output_loading_info=True)
    assert not any(report.values()), report
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert len(layers_of(again)) == len(KEPT)
    assert getattr(again.config, "layer_types", None) == getattr(model.config, "layer_types", None)
    assert_close(outputs(again), outputs(model), 2e-2 if model.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("case", CAUSAL)
def test_generation_with_the_cache(case: str) -> None:
    model = remove_layers(CAUSAL[case](), REMOVED)
    prompt = inputs(model)["input_ids"][:1, :12]
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    cached = torch.stack(made.logits, dim=1).double()
    assert cached.shape[1] == 10
    ids = prompt
    for step in range(10):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, -1].double()
        error = float((logits - cached[:, step]).norm() / logits.norm())
        assert error <= (3e-2 if model.dtype == torch.bfloat16 else 1e-5)
        if model.dtype != torch.bfloat16:  # where rounding cannot change which word is likeliest
            assert int(logits.argmax()) == int(made.sequences[0, ids.shape[1]])
        ids = made.sequences[:, : ids.shape[1] + 1]


@pytest.mark.parametrize("case", ["llama-tied", "qwen2", "qwen3", "bert-words", "roberta-words", "bert-decoder"])
def test_tied_embeddings_stay_tied(case: str, tmp_path: Path) -> None:
    model = ALL[case]()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    remove_layers(model, [0, 5])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_untied_head_stays_untied() -> None:
    model = remove_layers(CAUSAL["llama"](), [0])
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_sliding_layers_keep_their_kind() -> None:
    """The trap: rebuilding layer_types from max_window_layers would give other layers the window."""
    model = remove_layers(CAUSAL["qwen2-window"](), [0, 1])
    assert model.config.layer_types == ["full_attention"] + ["sliding_attention"] * 3
    assert model.config.max_window_layers == 1
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [None, 8, 8, 8]
    remove_layers(model, [1, 2, 3])
    assert model.config.layer_types == ["full_attention"]
    assert model.model.has_sliding_layers is False


def test_removing_in_two_steps_is_removing_at_once() -> None:
    once, twice = CAUSAL["qwen3-mixed"](), CAUSAL["qwen3-mixed"]()
    remove_layers(once, [1, 2, 5])
    remove_layers(remove_layers(twice, [2]), [1, 4])
    assert once.config.to_dict() == twice.config.to_dict()
    assert list(once.state_dict()) == list(twice.state_dict())
    assert_close(outputs(twice), outputs(once), 0.0)


def test_body_without_a_pooler() -> None:
    torch.manual_seed(7)
    model = transformers.BertModel(transformers.BertConfig(**ENCODER), add_pooling_layer=False).eval()
    wanted = outputs(without(model, REMOVED))
    assert_close(outputs(remove_layers(model, REMOVED)), wanted, 1e-6)


def test_decoder_with_cross_attention_numbers_both_attentions() -> None:
    model = build("BertLMHeadModel", "Bert", ENCODER, is_decoder=True, add_cross_attention=True)
    remove_layers(model, [0])
    for index, layer in enumerate(model.bert.encoder.layer):
        assert layer.attention.self.layer_idx == index
        assert layer.crossattention.self.layer_idx == index


def test_every_model_type_of_every_family_is_tried_here() -> None:
    tried = {make().config.model_type for make in ALL.values()}
    assert tried == {kind for family in FAMILIES for kind in family.model_types}


@pytest.mark.parametrize("case", ["qwen2-mixed", "mistral", "bert-classifier", "roberta-body", "llama-answers"])
def test_block_influence_runs_on_every_kind(case: str) -> None:
    model = ALL[case]()
    influence = block_influence(model, [inputs(model)])
    assert influence.shape == (LAYERS,)
    assert influence.dtype == torch.float64
    assert bool(((influence > 0) & (influence < 2)).all())


def test_rules_for_fields_that_count_layers() -> None:
    config = SimpleNamespace(
        num_hidden_layers=6,
        layer_types=list("abcdef"),
        mlp_layer_types=tuple("uvwxyz"),
        no_rope_layers=[1, 1, 0, 1, 1, 0],
        mlp_only_layers=[0, 1, 5],
        max_window_layers=28,
        first_k_dense_replace=2,
        num_kv_shared_layers=3,
    )
    assert set(vars(config)) == set(CONFIG_RULES)
    before = copy.deepcopy(vars(config))
    assert edited_fields(config, 6, KEPT) == {
        "num_hidden_layers": 4,
        "layer_types": list("acdf"),
        "mlp_layer_types": tuple("uwxz"),
        "no_rope_layers": [1, 0, 1, 0],
        "mlp_only_layers": [0, 3],
        "max_window_layers": 26,
        "first_k_dense_replace": 1,
        "num_kv_shared_layers": 2,
    }
    assert vars(config) == before
    assert edited_fields(SimpleNamespace(num_hidden_layers=6, layer_types=None), 6, KEPT) == {"num_hidden_layers": 4}
    with pytest.raises(ValueError, match=r"config\.layer_types does not fit the model: it has 2 entries for 6"):
        edited_fields(SimpleNamespace(layer_types=["a", "b"]), 6, KEPT)


def test_a_head_that_comes_untied_is_found() -> None:
    model = CAUSAL["llama-tied"]()
    parts = anatomy(model)
    ties = verify.outer_ties(model, parts)
    assert ties == {frozenset({"lm_head.weight", "model.embed_tokens.weight"})}
    verify.check_ties(model, parts, ties)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(SurgeryError, match=r"ties nothing; before surgery lm_head.weight = model.embed_tokens.weight"):
        verify.check_ties(model, parts, ties)


def test_rounding_that_the_uncut_model_shows_too_is_not_held_against_the_surgery() -> None:
    model = build("LlamaForCausalLM", "Llama", DECODER, num_hidden_layers=24, initializer_range=0.5)
    model.to(torch.bfloat16)
    parts = anatomy(model)
    expected = verify.expect(model, parts, {3, 20})
    assert expected.rounding > verify.CACHED[torch.bfloat16]  # beyond the table: this model needs the allowance
    remove_layers(model, [3, 20])
    shallow = CAUSAL["llama"]()
    assert verify.expect(shallow, anatomy(shallow), {3}).rounding < 1e-4


def test_the_cut_model_can_be_trained() -> None:
    model = remove_layers(CAUSAL["llama"]().train(), [2, 3])
    ids = inputs(model)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
