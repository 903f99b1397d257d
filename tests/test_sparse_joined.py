"""Projections that read the same x as one product: what each gives, when it is multiplied, and what is left apart."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from conftest import relative_error
from tiny_models import tiny
from torch import nn

import pyfast
from pyfast import sparse
from pyfast.nn import SparseLinear
from pyfast.sparse import FrozenLinear, JoinedPart, freeze
from pyfast.sparse.joined import Rows, bias_of, joinable, weight_of


class SelfAttention(nn.Module):
    """Three projections of the same x."""

    def __init__(self, format="bitmap", sizes=(32, 16, 24), biases=(True, False, True), k=48):
        super().__init__()
        for name, n, bias in zip(("q_proj", "k_proj", "v_proj"), sizes, biases, strict=True):
            layer = SparseLinear.from_linear(nn.Linear(k, n, bias=bias), format, 0.5)
            self.add_module(name, layer)

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class CrossAttention(SelfAttention):
    pass


class Counting(nn.Module):
    """x to the rows' sums and differences, counting its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.cat([x, -x, 2 * x], -1)


def frozen(model, tokens=(1, 8)):
    return freeze(copy.deepcopy(nn.Sequential(model)), tokens)[0]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("format", ["2:4", "bitmap"])
def test_the_joined_weight_holds_the_rows_of_all(format, int8):
    model = SelfAttention(format)
    layers = [model.q_proj, model.k_proj, model.v_proj]
    if int8:
        for layer in layers:
            layer.quantize_()
    joined = weight_of(layers)
    type(joined).from_tensors(joined.tensors(), joined.shape)  # sound
    assert torch.equal(joined.to_dense(), torch.cat([layer.weight.to_dense() for layer in layers]))
    assert torch.equal(bias_of(layers), torch.cat([model.q_proj.bias, torch.zeros(16), model.v_proj.bias]))
    assert bias_of([model.k_proj]) is None


@pytest.mark.parametrize("format", ["2:4", "bitmap"])
def test_each_part_is_what_its_layer_gave(isa, format):
    model = SelfAttention(format)
    twin = frozen(model)
    assert all(type(part) is JoinedPart for part in twin.children())
    assert twin.q_proj.rows is twin.k_proj.rows is twin.v_proj.rows and type(twin.q_proj.rows.layer) is FrozenLinear
    for mode in (torch.no_grad, torch.inference_mode):
        for shape in ((1, 48), (2, 5, 48), (48,), (0, 48)):
            with mode():
                x = torch.randn(shape)
                for got, expected in zip(twin(x), model(x), strict=True):
                    assert got.shape == expected.shape and (x.numel() == 0 or relative_error(got, expected) < 1e-6)
            assert twin.q_proj.rows._waiting is None


def test_one_product_serves_all_who_ask_with_the_same_x():
    layer = Counting()
    parts = [JoinedPart(Rows(layer, [4, 4, 4]), 0)]
    parts += [JoinedPart(parts[0].rows, place) for place in (1, 2)]
    x, other = torch.randn(3, 4), torch.randn(3, 4)
    expected = [x, -x, 2 * x]
    for order in ((0, 1, 2), (2, 0, 1)):
        layer.calls = 0
        assert all(torch.equal(parts[place](x), expected[place]) for place in order)
        assert layer.calls == 1
    assert torch.equal(parts[0](x), x) and torch.equal(parts[1](other), -other)  # another x between them
    assert torch.equal(parts[2](x), 2 * x) and layer.calls == 4
    assert torch.equal(parts[2](x), 2 * x) and layer.calls == 5  # the same part again
    assert torch.equal(parts[0](x), x) and layer.calls == 5


def test_an_x_that_was_written_to_is_multiplied_anew():
    layer = Counting()
    first = JoinedPart(Rows(layer, [4, 4, 4]), 0)
    second, x = JoinedPart(first.rows, 1), torch.randn(3, 4)
    first(x)
    x.add_(1)
    assert torch.equal(second(x), -x) and layer.calls == 2


def test_another_thread_multiplies_for_itself():
    layer = Counting()
    first = JoinedPart(Rows(layer, [4, 4, 4]), 0)
    second, x, got = JoinedPart(first.rows, 1), torch.randn(3, 4), []
    first(x)
    thread = threading.Thread(target=lambda: got.append(second(x)))
    thread.start()
    thread.join()
    assert torch.equal(got[0], -x) and layer.calls == 2


def test_threads_at_the_same_time():
    twin, model = frozen(model := SelfAttention()), model
    wrong = []

    def work(seed):
        x = torch.randn(2, 48, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = model(x)
            for _ in range(50):
                wrong.extend(1 for a, b in zip(twin(x), expected, strict=True) if relative_error(a, b) > 1e-6)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("format", ["2:4", "bitmap"])
def test_compiled_and_exported_code_multiplies_once(format):
    model = SelfAttention(format)
    twin, x = frozen(model, 4), torch.randn(4, 48)
    torch._dynamo.reset()
    calls = []

    def backend(graph, inputs):
        calls.append(sum("linear" in str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return graph

    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            for got, expected in zip(compiled(x), model(x), strict=True):
                assert relative_error(got, expected) < 1e-6
        for got, expected in zip(torch.compile(twin, fullgraph=True)(x), model(x), strict=True):
            assert relative_error(got, expected) < 1e-6
        exported = torch.export.export(twin, (x,))
        for got, expected in zip(exported.module()(x), model(x), strict=True):
            assert relative_error(got, expected) < 1e-6
    assert calls == [1]
    assert sum("linear" in str(node.target) for node in exported.graph.nodes if node.op == "call_function") == 1


def hooked():
    model = SelfAttention()
    model.k_proj.register_forward_hook(lambda *_: None)
    return model


def one_dense():
    model = SelfAttention()
    model.v_proj = nn.Linear(48, 24)
    return model


def one_int8():
    model = SelfAttention()
    model.q_proj.quantize_()
    return model


def one_wider():
    model = SelfAttention()
    model.v_proj = SparseLinear.from_linear(nn.Linear(64, 24), "bitmap", 0.5)
    return model


def one_shared():
    model = SelfAttention(sizes=(32, 32, 32))
    model.k_proj = model.q_proj
    return model


@pytest.mark.parametrize(
    "model",
    [SelfAttention(sizes=(32, 20, 24)), hooked(), one_dense(), one_int8(), one_wider(), one_shared(), CrossAttention()],
    ids=["rows within a tile", "hook", "dense", "int8", "width", "shared", "two sequences"],
)
def test_what_cannot_be_joined_is_frozen_apart(model):
    assert joinable(model) == []
    twin = frozen(model)
    assert not [module for module in twin.modules() if isinstance(module, JoinedPart)]
    assert any(isinstance(module, FrozenLinear) for module in twin.modules())


def test_an_attention_in_two_places_is_left_apart():
    attention = SelfAttention()
    model = freeze(nn.ModuleDict({"a": attention, "b": attention}), 1)
    assert type(model["a"].q_proj) is FrozenLinear and model["a"] is model["b"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Mistral", {"head_dim": 16}),
        ("Gemma2", {"head_dim": 16}),
    ],
)
def test_models_of_transformers(family, options):
    model = tiny(family, num_key_value_heads=4, **options).eval()
    pyfast.sparsify(model, format="bitmap", sparsity=0.5)
    ids = torch.randint(0, model.config.vocab_size, (1, 9))
    with torch.no_grad():
        truth, text = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
        freeze(sparse.fuse(model), (1, 9))
        assert type(model.model.layers[1].self_attn.k_proj) is JoinedPart
        assert relative_error(model(ids).logits, truth) < 1e-5
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)


def test_copies_and_pickles_do_not_hold_what_waits():
    twin, x = frozen(SelfAttention()), torch.randn(2, 48)
    with torch.no_grad():
        expected = twin(x)
        twin.q_proj(x)  # two parts wait
        for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
            assert other.q_proj.rows._waiting is None and other.q_proj.rows is other.k_proj.rows
            for got, part in zip(other(x), expected, strict=True):
                assert torch.equal(got, part)


def test_no_gradient():
    twin = frozen(SelfAttention())
    with pytest.raises(RuntimeError, match="FrozenLinear: has no gradient"):
        twin(torch.randn(2, 48, requires_grad=True))
    assert "part 2 of 3" in repr(twin)
