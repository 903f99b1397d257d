"""Surgery that goes wrong: bad arguments, sabotaged rules, failing checks; and what success leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from structured_models import bert, llama, qwen2, tokens
from torch import Tensor, nn

import pyfast.structured.families as families
import pyfast.structured.surgery as surgery
import pyfast.structured.verify as verify
from pyfast.structured import SurgeryError, block_influence, remove_layers


def fingerprint(model: Any) -> dict[str, Any]:
    """All of a model that surgery must not leave changed: values, keys, objects, modes, configuration."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers: Any = surgery.anatomy(model).layers if model.config.num_hidden_layers else []
    return {
        "keys": list(state),
        "values": state,
        "config": copy.deepcopy(model.config.to_dict()),
        "config fields": copy.deepcopy(vars(model.config)),
        "generation": copy.deepcopy(vars(model.generation_config)) if model.can_generate() else None,
        "layers": [id(layers), *map(id, layers)],
        "indices": [getattr(module, "layer_idx", None) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "sliding": getattr(model.base_model, "has_sliding_layers", None),
        "attributes": sorted(vars(model)) + sorted(vars(model.base_model)),
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "random": torch.random.get_rng_state(),
    }


def assert_unchanged(model: Any, before: dict[str, Any]) -> None:
    now = fingerprint(model)
    for name in before.keys() - {"values", "random"}:
        assert now[name] == before[name], name
    assert torch.equal(now["random"], before["random"])
    for name, value in before["values"].items():
        assert torch.equal(now["values"][name], value), name


# --- what remove_layers refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([6], ValueError, "layers: there is no layer 6; the model has 6, 0 to 5"),
        ([0, 60], ValueError, "layers: there is no layer 60"),
        ([-1], ValueError, "layers: -1 is negative"),
        ([2, 3, 2], ValueError, "layers: 2 is given twice"),
        ([], ValueError, "layers: empty"),
        (range(6), ValueError, "layers: all 6 layers"),
        ([True], TypeError, "layers: True is bool"),
        ([0, False], TypeError, "layers: False is bool"),
        ([1.0], TypeError, "layers: 1.0 is float"),
        ([None], TypeError, "layers: None is NoneType"),
        (["1"], TypeError, "layers: '1' is str"),
        ("12", TypeError, "layers: got str"),
        (3, TypeError, "layers: got int"),
        (None, TypeError, "layers: got NoneType"),
        ([[1, 2]], TypeError, r"layers: \[1, 2\] is list"),
        (torch.tensor([1.0]), TypeError, r"layers: got a tensor of shape \(1,\) and dtype torch.float32"),
        (torch.tensor([True, False]), TypeError, "dtype torch.bool"),
        (torch.tensor([[1, 2]]), TypeError, r"shape \(1, 2\)"),
        (torch.tensor(1), TypeError, r"shape \(\)"),
        ([torch.tensor(True)], TypeError, "is torch.bool"),
        ([torch.tensor(1.0)], TypeError, "is torch.float32"),
        ([np.float32(1)], TypeError, "is float32"),
        ([np.bool_(True)], TypeError, "is bool"),
    ],
)
def test_layers_are_refused(layers: Any, error: type[Exception], message: str) -> None:
    model = llama()
    before = fingerprint(model)
    for check in (True, False):
        with pytest.raises(error, match=message):
            remove_layers(model, layers, verify=check)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "layers",
    [
        [4, 1],
        (1, 4),
        {1, 4},
        torch.tensor([4, 1]),
        torch.tensor([1, 4], dtype=torch.int32),
        np.array([1, 4]),
        [torch.tensor(1), np.int64(4)],
        (index for index in (1, 4)),
        range(1, 5, 3),
    ],
)
def test_layers_are_accepted(layers: Any) -> None:
    model = llama()
    kept = [model.model.layers[index] for index in (0, 2, 3, 5)]
    remove_layers(model, layers, verify=False)
    assert list(model.model.layers) == kept


class Wrapper(nn.Module):
    """Passes attributes on, as wrappers for compiled and parallel models do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2))


def changed(change: Callable[[Any], Any]) -> Callable[[], Any]:
    def make() -> Any:
        model = llama()
        change(model)
        return model

    return make


def share_a_layer(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def drop_a_layer_by_hand(model: Any) -> None:
    del model.model.layers[5]


def quantise(model: Any) -> None:
    model.config.quantization_config = {"quant_method": "bitsandbytes"}


def adapt(model: Any) -> None:
    model._hf_peft_config_loaded = True


def move_a_weight(model: Any) -> None:
    model.model.norm.to("meta")


class Packed(Tensor):
    pass


def pack_a_weight(model: Any) -> None:
    packed = torch.ones(32).as_subclass(Packed)
    model.model.norm.weight = nn.Parameter(packed)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            gpt2,
            ValueError,
            "model: the family 'gpt2' of GPT2LMHeadModel has not been taught; taught are Llama",
        ),
        (lambda: nn.Linear(2, 2), TypeError, "model: Linear has no transformers configuration"),
        (lambda: None, TypeError, "model: got NoneType"),
        (lambda: bert().encoder, TypeError, "model: got BertEncoder, a part of a model or a wrapper"),
        (lambda: Wrapper(llama()), TypeError, "model: got Wrapper, a part of a model or a wrapper"),
        (
            lambda: torch.compile(llama()),
            TypeError,
            "model: got OptimizedModule, a part of a model or a wrapper",
        ),
        (
            changed(drop_a_layer_by_hand),
            ValueError,
            "config.num_hidden_layers is 6, but LlamaForCausalLM holds 5",
        ),
    ],
)
def test_models_are_refused_by_both(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    model = make()
    with pytest.raises(error, match=message):
        remove_layers(model, [0])
    with pytest.raises(error, match=message):
        block_influence(model, [tokens(1, 4)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantise, "model: LlamaForCausalLM is quantised"),
        (adapt, "model: LlamaForCausalLM carries adapters"),
        (share_a_layer, "model: one layer stands at two positions"),
        (move_a_weight, "model: LlamaForCausalLM is on cpu, meta"),
        (pack_a_weight, "model: LlamaForCausalLM holds Packed"),
        (
            lambda model: setattr(model.config, "layer_types", ["full_attention"] * 5),
            "5 entries for 6 layers",
        ),
        (lambda model: model.to(torch.float8_e4m3fn), "is in torch.float8_e4m3fn; torch.float64"),
    ],
)
def test_models_are_refused(change: Callable[[Any], Any], message: str) -> None:
    model = changed(change)()
    layers = list(model.model.layers)
    config = copy.deepcopy(vars(model.config))
    with pytest.raises(ValueError, match=message):
        remove_layers(model, [2])
    assert list(model.model.layers) == layers
    assert vars(model.config) == config


def test_verify_must_be_a_flag() -> None:
    with pytest.raises(TypeError, match="verify: got str"):
        remove_layers(llama(), [0], verify="yes")  # type: ignore[arg-type]


# --- surgery that fails puts everything back --------------------------------------------------------------


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the check that runs nothing, so that only running the model can find the fault."""
    monkeypatch.setattr(surgery, "check_structure", lambda *args: None)
    monkeypatch.setattr(verify, "check_structure", lambda *args: None)


def config_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "CONFIG_RULES", {})


def stale_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "layer_indices", lambda layers: [])


def rebuilt_layer_types(monkeypatch: pytest.MonkeyPatch) -> None:
    def rebuilt(value: list[str], total: int, kept: list[int]) -> list[str]:
        return value[: len(kept)]

    monkeypatch.setitem(families.CONFIG_RULES, "layer_types", rebuilt)


def stale_layer_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(families.CONFIG_RULES, "layer_types")


def wrong_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = surgery._cut

    def shifted(parts: Any, removed: set[int], *rest: Any) -> None:
        cut(parts, {index + 1 for index in removed}, *rest)

    monkeypatch.setattr(surgery, "_cut", shifted)


def reload_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "from_pretrained", broken)


def save_changes_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    reload = verify._reloaded

    def changed(*args: Any) -> Any:
        again = reload(*args)
        with torch.no_grad():
            again.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
        return again

    monkeypatch.setattr(verify, "_reloaded", changed)


def fails_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = surgery._cut

    def halfway(*args: Any) -> None:
        cut(*args)
        raise RuntimeError("halfway")

    monkeypatch.setattr(surgery, "_cut", halfway)


@pytest.mark.parametrize(
    ("sabotage", "blinded", "message"),
    [
        (config_unchanged, False, "holds 4 layers, its config.num_hidden_layers says 6"),
        (config_unchanged, True, "in memory|missing_keys"),
        (stale_indices, False, r"layer 0 of Qwen2ForCausalLM has Qwen2Attention.layer_idx = 1"),
        (stale_indices, True, "IndexError"),
        (rebuilt_layer_types, False, "layer 0 of Qwen2ForCausalLM is .*full_attention"),
        (rebuilt_layer_types, True, "the model in memory: body last_hidden_state: off by"),
        (stale_layer_types, True, "the model in memory|layer_types"),
        (wrong_layers, True, "the model in memory: body last_hidden_state: off by"),
        (reload_fails, False, "OSError: no space left on device"),
        (save_changes_a_weight, False, "layers.1.mlp.up_proj.weight is .* comes back"),
        (fails_halfway, False, "RuntimeError: halfway"),
    ],
)
def test_sabotage_is_found_and_undone(
    sabotage: Callable[[pytest.MonkeyPatch], None],
    blinded: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = qwen2().train()
    model.model.layers[3].eval()
    before = fingerprint(model)
    model.eval()
    with torch.no_grad():
        wanted = model(tokens(1, 20)).logits
    model.train()
    model.model.layers[3].eval()
    with monkeypatch.context() as patch:
        sabotage(patch)
        if blinded:
            blind(patch)
        with pytest.raises(SurgeryError, match=message) as caught:
            remove_layers(model, [0, 3])
    assert isinstance(caught.value, RuntimeError)
    assert_unchanged(model, before)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 20)).logits, wanted)
    assert remove_layers(model, [0, 3]).config.num_hidden_layers == 4  # and it can still be done rightly


def test_a_full_config_of_an_encoder_loses_no_layer_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers gone and the configuration unchanged: reloading would make up the missing weights."""
    model = bert()
    before = fingerprint(model)
    with monkeypatch.context() as patch:
        config_unchanged(patch)
        blind(patch)
        patch.setattr(verify, "anatomy", lambda model: None)
        with pytest.raises(SurgeryError, match=r"saving and reloading BertModel goes wrong: {'missing_keys'"):
            remove_layers(model, [5])
    assert_unchanged(model, before)


def test_interruption_is_passed_on_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = fingerprint(model)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "_check_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove_layers(model, [1])
    assert_unchanged(model, before)


def test_a_head_that_reloading_would_untie_is_found() -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight  # tied by hand, which config.json does not say
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match="reload"):
        remove_layers(model, [1])
    assert_unchanged(model, before)


def test_not_finite_weights_are_not_taken_for_equal() -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(SurgeryError, match=r"not finite"):
        remove_layers(model, [1])
    assert len(model.model.layers) == 6


def test_comparison_is_by_the_worst_row() -> None:
    wanted = torch.ones(1, 100, 8, dtype=torch.float64)
    got = wanted.clone()
    verify._compare(got, wanted, 0.0, "x")
    got[0, 57] *= 1.01
    verify._compare(got, wanted, 0.0101, "x")
    with pytest.raises(SurgeryError, match=r"x: off by 1\.0e-02"):
        verify._compare(got, wanted, 0.009, "x")
    got[0, 3, 3] = float("nan")
    with pytest.raises(SurgeryError, match="off by nan"):
        verify._compare(got, wanted, 1.0, "x")
    with pytest.raises(SurgeryError, match="shape"):
        verify._compare(got[:, 1:], wanted, 1.0, "x")


# --- what success leaves alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, qwen2, bert])
def test_success_changes_nothing_else(make: Callable[[], Any]) -> None:
    model = make().train()
    parts = surgery.anatomy(model)
    parts.layers[3].eval()
    if model.can_generate():
        model.generation_config.temperature = 0.5
        model.generation_config.do_sample = True
        model.generation_config.num_return_sequences = 3
    before = fingerprint(model)
    kept = [index for index in range(6) if index not in (0, 2)]
    modes = [[module.training for module in parts.layers[index].modules()] for index in kept]
    parameters = {id(parameter) for index in kept for parameter in parts.layers[index].parameters()}
    remove_layers(model, [0, 2])
    after = fingerprint(model)
    for name in ("generation", "attributes"):
        assert after[name] == before[name], name
    assert torch.equal(after["random"], before["random"])
    assert after["layers"] == [before["layers"][0], *(before["layers"][1 + index] for index in kept)]
    differing = {name for name, value in after["config fields"].items() if before["config fields"][name] != value}
    counted = {"num_hidden_layers", "layer_types", "max_window_layers"}
    assert differing == counted & {name for name in counted if hasattr(model.config, name)}
    assert [[module.training for module in layer.modules()] for layer in parts.layers] == modes
    assert {id(parameter) for parameter in parts.layers.parameters()} == parameters
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_verification_nothing_runs_and_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not to be called")

    model = qwen2()
    with monkeypatch.context() as patch:
        for name in ("forward", "save_pretrained", "from_pretrained", "generate"):
            patch.setattr(transformers.Qwen2ForCausalLM, name, forbidden)
        remove_layers(model, [0, 3], verify=False)
    verified = remove_layers(qwen2(), [0, 3])
    assert model.config.to_dict() == verified.config.to_dict()
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 30)).logits, verified(tokens(1, 30)).logits)


def test_structure_is_checked_without_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen2()
    before = fingerprint(model)
    with monkeypatch.context() as patch:
        rebuilt_layer_types(patch)
        with pytest.raises(SurgeryError, match="layer 0"):
            remove_layers(model, [0, 3], verify=False)
    assert_unchanged(model, before)


def test_long_generation_settings_of_the_model_do_not_disturb_the_check() -> None:
    model = llama()
    for name, value in {"num_beams": 4, "repetition_penalty": 3.0, "eos_token_id": list(range(97))}.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    remove_layers(model, [1])
    assert model.generation_config is own
