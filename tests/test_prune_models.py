"""prune on whole models: what every layer saw, what was removed, what is left as it was when something fails."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
import transformers
from conftest import relative_error
from tiny_models import SMALL, batch, tiny
from torch import nn

import pyfast
from pyfast.bench import encoder
from pyfast.nn import SparseLinear
from pyfast.sparse import choose_mask, masks_of, prune, rewind, sparsegpt
from pyfast.sparse.pruning import statistics
from pyfast.sparse.pruning.stream import REST, plan

GROUPED = {"num_key_value_heads": 2}
GEMMA3 = {
    **GROUPED,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def gemma3(**options):
    """Sliding and full attention layers: each kind has a mask and rotary tables of its own."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**{**SMALL, **GEMMA3, **options})
    return transformers.Gemma3ForCausalLM(config).eval()


MODELS = {
    "llama": lambda: tiny("Llama"),
    "qwen2": lambda: tiny("Qwen2", **GROUPED),
    "qwen3": lambda: tiny("Qwen3", **GROUPED, head_dim=8),
    "phi3": lambda: tiny("Phi3", eos_token_id=1, bos_token_id=1),
    "gemma": lambda: tiny("Gemma", **GROUPED, head_dim=8),
    "gemma3": gemma3,
    "opt": lambda: tiny("OPT", word_embed_proj_dim=32, ffn_dim=48, bos_token_id=1, eos_token_id=1),
    "mixtral": lambda: tiny("Mixtral", **GROUPED),
    "bert": lambda: tiny("Bert", "ForMaskedLM"),
    "distilbert": lambda: tiny("DistilBert", "ForMaskedLM", dim=32, hidden_dim=48, n_heads=4, n_layers=2),
}


def calibration():
    return [batch(), batch(rows=3, length=12, seed=2), batch(rows=1, length=5, seed=3)]


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(model, weights):
    return all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def untouched(model):
    """No hook, no stand-in, no gradient left behind."""
    return all(
        not module._forward_pre_hooks and not module._forward_hooks and "forward" not in vars(module)
        for module in model.modules()
    ) and all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def inputs_of(model, layer, batches):
    """What a layer reads in runs of the whole model, at the tokens that count: [tokens, K]."""
    read = []
    for given in batches:
        keep = given["attention_mask"] != 0

        def hook(module, args, keep=keep):
            x = args[0]
            tokens = x.shape[:2] == keep.shape or len(x) == keep.numel()  # OPT lays them in one row
            read.append(x.flatten(0, -2)[keep.flatten()] if tokens else x.reshape(-1, x.shape[-1]))

        handle = layer.register_forward_pre_hook(hook)
        with torch.no_grad():
            model(**given)
        handle.remove()
    return torch.cat(read)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("method", "pattern"), [("wanda", "unstructured"), ("wanda", "2:4"), ("sparsegpt", "unstructured")]
)
def test_every_layer_is_pruned_by_what_it_reads_behind_pruned_blocks(name, method, pattern):
    """The streamed result against runs of the whole model, a block at a time, each behind the blocks pruned before."""
    model, twin = MODELS[name](), MODELS[name]()
    sparsity = 0.5 if pattern == "unstructured" else None
    results = prune(model, calibration(), method, sparsity, pattern)
    chosen = {result.name: twin.get_submodule(result.name) for result in results}
    for unit in plan(twin, chosen).units:
        new = {}
        for layer_name, layer in unit.layers.items():
            x = inputs_of(twin, layer, calibration())
            if method == "wanda":
                mask = choose_mask(layer.weight, "wanda", sparsity, pattern, norms=x.double().norm(dim=0))
                new[layer_name] = layer.weight.detach() * mask
            else:
                new[layer_name], _ = sparsegpt(layer.weight, 2 * x.T @ x / len(x), sparsity, pattern)
        for layer_name, weight in new.items():
            chosen[layer_name].weight.data = weight
    for result in results:
        mine, theirs = model.get_submodule(result.name).weight, chosen[result.name].weight
        assert torch.equal(mine != 0, theirs != 0), result.name
        assert relative_error(mine, theirs) < 1e-3, result.name
        assert result.removed == int((mine == 0).sum()) and result.shape == tuple(mine.shape)
    assert same(twin, {**weights_of(model), **{f"{n}.weight": layer.weight for n, layer in chosen.items()}})
    assert untouched(model)


def test_units_are_blocks_and_the_rest_comes_last():
    model = MODELS["bert"]()
    results = prune(model, calibration(), "wanda", 0.5)
    names = [result.name for result in results]
    assert [name.split(".")[3] for name in names[:-1]] == ["0"] * 6 + ["1"] * 6
    assert names[-1] == "cls.predictions.transform.dense"
    units = plan(model, {name: model.get_submodule(name) for name in names}).units
    assert [unit.name for unit in units] == ["bert.encoder.layer.0", "bert.encoder.layer.1", REST]


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_padding_does_not_count(name, method):
    """Sentences padded on the right, padding of any content, give what they give one by one without padding."""
    ids = torch.randint(1, 61, (2, 10))
    mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    padded, alone = MODELS[name](), MODELS[name]()
    only = f"{'bert.encoder.layer' if name == 'bert' else 'model.layers'}.*"
    prune(padded, [{"input_ids": ids, "attention_mask": mask}], method, 0.5, include=only)
    prune(alone, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :6]}], method, 0.5, include=only)
    for mine, theirs in zip(padded.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine == 0, theirs == 0) and relative_error(mine, theirs) < 1e-3


def test_only_one_block_s_statistics_are_alive(monkeypatch):
    alive, most = weakref.WeakSet(), 0
    started = statistics.Moments.__init__

    def counting(self):
        nonlocal most
        started(self)
        alive.add(self)
        most = max(most, len(alive))

    monkeypatch.setattr(statistics.Moments, "__init__", counting)
    prune(tiny("Llama", num_hidden_layers=5), calibration(), "sparsegpt", 0.5)
    assert most == 7  # the linear layers of one block


# --- methods without a stream -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("method", ["magnitude", "gradient", "taylor"])
def test_scored_methods_follow_their_scores(method, scope):
    model, twin = tiny("Llama"), tiny("Llama")
    results = prune(model, calibration(), method, 0.6, scope=scope)
    layers = {result.name: twin.get_submodule(result.name) for result in results}
    gradients = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    for given in calibration():
        twin.zero_grad()
        twin(**given).loss.backward()
        for name, layer in layers.items():
            gradients[name] += layer.weight.grad.abs() / 3
    scores = {
        name: {"magnitude": layer.weight.abs(), "gradient": gradients[name]}.get(
            method, layer.weight.abs() * gradients[name]
        )
        for name, layer in layers.items()
    }
    total = sum(layer.weight.numel() for layer in layers.values())
    if scope == "global":
        flat = torch.cat([score.flatten() for score in scores.values()])
        line = flat.kthvalue(round(0.6 * total)).values
        assert sum(result.removed for result in results) == round(0.6 * total)
        masks = {name: score > line for name, score in scores.items()}
        assert len({result.removed for result in results}) > 1  # layers differ in how much they lose
    else:
        needs = {name: {} if method == "magnitude" else {"gradient": gradients[name]} for name in layers}
        masks = {n: choose_mask(layer.weight, method, 0.6, scope=scope, **needs[n]) for n, layer in layers.items()}
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight, layers[name].weight * mask), name
    assert untouched(model)


def test_gradients_modes_and_wishes_are_put_back():
    model = tiny("Llama").train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    marks = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.grad = marks.get(name)
    modes = [module.training for module in model.modules()]
    for method in ("taylor", "wanda"):
        prune(model, calibration(), method, 0.5)
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is marks.get(name) for name, parameter in model.named_parameters())
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(marks)
        assert untouched(model)


@pytest.mark.parametrize("method", ["magnitude", "taylor", "wanda", "sparsegpt"])
def test_dtypes_and_a_sparse_model_afterwards(method):
    model = tiny("Llama").bfloat16()
    prune(model, calibration(), method, pattern="2:4", include="model.layers.*.mlp.*", exclude="*.down_proj")
    names = {name for name in masks_of(model)}
    assert names == {f"model.layers.{i}.mlp.{kind}_proj" for i in (0, 1) for kind in ("gate", "up")}
    dense = copy.deepcopy(model)
    sparse = pyfast.sparsify(model, "2:4", include="model.layers.*.mlp.*", exclude="*.down_proj")
    assert sum(isinstance(module, SparseLinear) for module in sparse.modules()) == 4
    for name in names:
        assert torch.equal(sparse.get_submodule(name).weight.to_dense(), dense.get_submodule(name).weight)


def test_plain_modules_are_pruned_as_one_unit():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    twin = copy.deepcopy(model)
    x = torch.randn(64, 16)
    prune(model, [x[:40], x[40:]], "wanda", 0.5)
    first = choose_mask(twin[0].weight, "wanda", 0.5, norms=x.norm(dim=0))
    second = choose_mask(twin[2].weight, "wanda", 0.5, norms=twin[1](twin[0](x)).norm(dim=0))
    assert torch.equal(model[0].weight, twin[0].weight * first)
    assert torch.equal(model[2].weight, twin[2].weight * second)


def test_the_head_is_pruned_by_all_its_tokens_where_it_is_asked_for():
    model = tiny("Llama", tie_word_embeddings=False)
    twin = copy.deepcopy(model)
    results = prune(model, calibration(), "wanda", 0.5, include="lm_head", head=True)
    x = inputs_of(twin, twin.lm_head, calibration())
    assert [result.name for result in results] == ["lm_head"]
    mask = choose_mask(twin.lm_head.weight, "wanda", 0.5, norms=x.double().norm(dim=0))
    assert torch.equal(model.lm_head.weight, twin.lm_head.weight * mask)


# --- failures ---------------------------------------------------------------------------------------------------------


class Strange(nn.Module):
    """Blocks between which the state is changed."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


def with_nan(name):
    model = tiny("Llama")
    model.get_submodule(name).weight.data[0, 0] = math.nan
    return model


UP = "model.layers.1.mlp.up_proj"
X = [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]
REFUSED = {
    "no model": (lambda: 3, (X, "wanda", 0.5), {}, TypeError, "model: got int"),
    "method": (lambda: tiny("Llama"), (X, "best", 0.5), {}, ValueError, "method: got 'best'"),
    "pattern": (lambda: tiny("Llama"), (X, "wanda", 0.5, "9:4"), {}, ValueError, "pattern: got '9:4'"),
    "nothing": (lambda: tiny("Llama"), (X, "wanda", 0.5), {"include": "x.*"}, ValueError, "include: 'x.*' matches no"),
    "conv1d": (
        lambda: tiny("GPT2", "LMHeadModel", n_embd=32, bos_token_id=1, eos_token_id=1),
        (X, "wanda", 0.5), {}, ValueError, "8 are Conv1D",
    ),
    "nan": (lambda: with_nan(UP), (X, "wanda", 0.5), {}, ValueError, f"{UP} holds NaN"),
    "no calibration": (lambda: tiny("Llama"), (None, "wanda", 0.5), {}, TypeError, "calibration: got None"),
    "one batch": (lambda: tiny("Llama"), (X[0], "wanda", 0.5), {}, TypeError, "calibration: got dict"),
    "empty": (lambda: tiny("Llama"), ([], "wanda", 0.5), {}, ValueError, "calibration: holds no batch"),
    "strange batch": (lambda: tiny("Llama"), ([3], "wanda", 0.5), {}, TypeError, r"calibration\[0\]: got int"),
    "mask": (
        lambda: tiny("Llama"), ([{**X[0], "attention_mask": torch.ones(4)}], "wanda", 0.5), {}, ValueError,
        "attention_mask has shape",
    ),
    "no labels": (lambda: tiny("Llama"), (X, "taylor", 0.5), {}, ValueError, r"calibration\[0\]: has no labels"),
    "no loss": (
        lambda: nn.Sequential(nn.Linear(8, 8)), ([{"input": torch.ones(1, 8), "labels": 1}], "gradient", 0.5), {},
        TypeError, "labels",
    ),
    "unreached": (
        lambda: tiny("Bert", "ForMaskedLM", add_cross_attention=True, is_decoder=True), (X, "wanda", 0.5), {},
        ValueError, "calibration: no token reaches bert.encoder.layer.0.crossattention",
    ),
    "no chain": (Strange, ([torch.ones(2, 8)], "wanda", 0.5), {}, ValueError, "the state is changed between them"),
    "two stacks": (
        lambda: tiny("T5", "ForConditionalGeneration", decoder_start_token_id=0), (X, "wanda", 0.5), {}, ValueError,
        "wanda takes a decoder or an encoder, not both",
    ),
    "all padding": (
        lambda: tiny("Llama"), ([{**X[0], "attention_mask": torch.zeros(1, 4)}], "sparsegpt", 0.5), {}, ValueError,
        "calibration: no token reaches model.layers.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_alone(case):
    make, arguments, options, error, message = REFUSED[case]
    model = make()
    before = weights_of(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        prune(model, *arguments, **options)
    if before is not None and case != "nan":
        assert same(model, before) and untouched(model)


@pytest.mark.parametrize(("method", "broken"), [("wanda", 0), ("sparsegpt", 0), ("wanda", 1), ("taylor", 1)])
def test_a_failure_in_the_middle_keeps_what_the_docstring_says(method, broken):
    """The block at fault and those after it are whole; nothing that watches is left; every module is in its mode."""
    model = tiny("Llama").train()
    before = weights_of(model)
    calls = 0

    def fail(module, args):
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("out of order")

    handle = model.model.layers[broken].mlp.act_fn.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of order"):
        prune(model, calibration(), method, 0.5)
    handle.remove()
    assert untouched(model) and all(module.training for module in model.modules())
    whole = {name: before[name] for name in before if f"layers.{broken}." in name or broken == 0 or method == "taylor"}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in whole.items())
    prune(model, calibration(), method, 0.5)  # and it can be pruned after all


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_are_not_finite_are_named(method):
    model = tiny("Llama")
    model.model.layers[1].input_layernorm.weight.data[3] = math.inf
    with pytest.raises(ValueError, match=r"the inputs of model\.layers\.1\.self_attn\.q_proj are not finite"):
        prune(model, calibration(), method, 0.5)


def test_a_loss_that_is_not_finite_is_named():
    given = batch()
    with pytest.raises(ValueError, match=r"calibration\[1\]: its loss is nan"):
        prune(tiny("Llama"), [given, {**given, "labels": torch.full_like(given["labels"], -100)}], "taylor", 0.5)


# --- lottery tickets --------------------------------------------------------------------------------------------------


def test_rewinding_keeps_the_mask_and_brings_back_the_initial_values():
    model = tiny("Llama")
    initial = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    prune(model, method="magnitude", sparsity=0.7)
    parameters = list(model.parameters())
    masks = masks_of(model)
    assert len(masks) == 14 and all(mask.float().mean() == pytest.approx(0.3, abs=0.01) for mask in masks.values())
    rewind(model, initial)
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
    for name, tensor in model.state_dict().items():
        mask = masks.get(name.removesuffix(".weight"))
        assert torch.equal(tensor, initial[name] if mask is None else torch.where(mask, initial[name], 0.0))
    pyfast.sparsify(model, "bitmap", 0.0)  # a sparse layer with the ticket's places
    again = masks_of(model)
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())


def test_rewind_refuses_what_does_not_fit():
    model = tiny("Llama")
    before, layer = weights_of(model), "model.layers.0.mlp.up_proj"
    for initial, masks, error, message in (
        ({}, None, ValueError, "initial: model and initial state differ in"),
        ({**before, "x": torch.ones(1)}, None, ValueError, "the first: x"),
        ({**before, f"{layer}.weight": torch.ones(1)}, None, ValueError, r"initial: .*up_proj.weight has shape \[1\]"),
        (before, {"lm": torch.ones(1)}, ValueError, r"masks: the model has no weight lm\.weight"),
        (before, {layer: torch.ones(1)}, TypeError, "masks: that of .* has dtype torch.float32"),
        (before, {layer: torch.ones(1, dtype=torch.bool)}, ValueError, r"masks: that of .* has shape \[1\]"),
    ):
        with pytest.raises(error, match=message):
            rewind(model, initial, masks)
    assert same(model, before)
    with pytest.raises(TypeError, match="model: got int"):
        masks_of(3)


# --- a pretrained model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained():
    found = encoder.load()
    if found is None:
        pytest.skip("the pretrained encoder is not installed")
    model = transformers.AutoModel.from_pretrained(str(found.folder), local_files_only=True).eval()
    texts = encoder.sentences(80)
    return found, model, [found.batch(texts[i : i + 16]) for i in range(0, 48, 16)], found.batch(texts[48:])


def test_a_pretrained_encoder_keeps_more_the_more_a_method_knows(pretrained):
    """2:4 over all 36 layers in one shot: cosine with the dense model's embeddings of sentences not calibrated on."""
    _, dense, calibrating, judged = pretrained
    reference = encoder.embed(dense, judged)
    cosines = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = copy.deepcopy(dense)
        results = prune(model, calibrating, method, pattern="2:4", exclude="pooler.*")
        assert len(results) == 36 and all(result.sparsity == 0.5 for result in results)
        if method == "sparsegpt":
            assert all(result.error is not None and result.error < 0.5 for result in results)
        cosines[method] = encoder.quality(reference, encoder.embed(model, judged))["cosine"]
    assert cosines["sparsegpt"] > cosines["wanda"] > 0.5 and cosines["sparsegpt"] > cosines["magnitude"]
