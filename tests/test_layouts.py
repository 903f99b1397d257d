"""Derived layouts: when they are made, that they never outlive the values they were made from, and that they are not
saved, copied or compiled in."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from conftest import relative_error
from sparse_cases import weight_24, weight_unstructured

import pyfast
from pyfast import BitmapWeight, Sparse24Weight, backends, sparse
from pyfast.nn import SparseLinear
from pyfast.sparse import layouts, linear

KINDS = ("indexed", "packed", "dense")  # those of a CPU
N, K, TOKENS = 96, 160, 16


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """Every product without gradients goes by this layout, whatever would be fastest."""
    monkeypatch.setattr(linear, "choose", lambda weight, tokens: request.param)
    return request.param


def module(format="bitmap", dtype=torch.float32):
    layer = torch.nn.Linear(K, N).to(dtype)
    return SparseLinear.from_linear(layer, format, 0.5).eval()


def truth(layer, x):
    y = x.double() @ layer.weight.to_dense().detach().double().T
    return y if layer.bias is None else y + layer.bias.detach().double()


def check(layer, x=None):
    """The module's answer is that of the values it holds now."""
    x = torch.randn(TOKENS, K).to(layer.values.dtype) if x is None else x
    with torch.no_grad():
        y = layer(x)
    assert relative_error(y, truth(layer, x)) < (1e-5 if x.dtype == torch.float32 else 1e-2)
    return y


def held(layer):
    return layouts.of(layer.weight).held()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["bitmap", "2:4"])
def test_made_at_the_first_call_and_kept(kind, format, dtype):
    layer = module(format, dtype)
    assert held(layer) == {}
    check(layer)
    assert list(held(layer)) == [kind] and sparse.layout_bytes(layer) > 0
    made = layouts.of(layer.weight).get(kind, layer.weight)
    check(layer, torch.randn(2, 3, K).to(dtype))
    assert layouts.of(layer.weight).get(kind, layer.weight) is made
    sparse.drop_layouts(layer)
    assert sparse.layout_bytes(layer) == 0


def test_views_of_x_and_bias(kind):
    layer = module()
    for x in (torch.randn(K, TOKENS).t(), torch.randn(1, K).expand(TOKENS, K), torch.randn(TOKENS, 2 * K)[:, ::2]):
        for bias in (torch.randn(1).expand(N), torch.randn(N, 2)[:, 0]):
            y = pyfast.sparse_linear(x, layer.weight.to("cpu"), bias)
            with torch.no_grad():
                assert relative_error(pyfast.sparse_linear(x, layer.weight, bias), y) < 1e-5


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_activation_and_mul(kind, activation):
    layer, x, mul = module(), torch.randn(4, 5, K), torch.randn(4, 5, N)
    with torch.no_grad():
        fused = pyfast.sparse_linear(x, layer.weight, layer.bias, activation=activation, mul=mul)
    composed = pyfast.sparse_linear(x, layer.weight, layer.bias, activation=activation, mul=mul)
    assert composed.requires_grad and not fused.requires_grad
    assert relative_error(fused, composed) < 1e-5
    assert kind in held(layer)


def test_nothing_is_made_where_a_gradient_is_wanted(kind):
    layer, x = module(), torch.randn(TOKENS, K)
    layer(x).sum().backward()
    layer.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    mul = torch.randn(TOKENS, N, requires_grad=True)
    pyfast.sparse_linear(x.detach(), layer.weight, mul=mul).sum().backward()
    assert x.grad is not None and mul.grad is not None and layer.values.grad is not None
    assert held(layer) == {}
    layer(x.detach())
    assert kind in held(layer)


CHANGES = {
    "in place": lambda layer: layer.values.mul_(2),
    "copied into": lambda layer: layer.values.copy_(torch.randn_like(layer.values)),
    "load_state_dict": lambda layer: layer.load_state_dict({**layer.state_dict(), "values": layer.values * 3}),
    "load_state_dict, assign": lambda layer: layer.load_state_dict(
        {**layer.state_dict(), "values": layer.values * 3}, assign=True
    ),
    "another parameter": lambda layer: setattr(layer, "values", torch.nn.Parameter(layer.values * 2)),
    "data replaced": lambda layer: setattr(layer.values, "data", layer.values.data * 2),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "there and back": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "another pattern": lambda layer: layer.load_state_dict(other_pattern(layer)),
}


def other_pattern(layer):
    kept = layer.weight.to_dense().flip(1)
    return {**layer.state_dict(), **BitmapWeight.from_dense(kept).tensors()}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_values_are_seen(kind, change):
    layer = module()
    check(layer)
    with torch.no_grad():
        CHANGES[change](layer)
    for _ in range(3):  # the layout is back at the second call
        check(layer)
    assert list(held(layer)) == [kind]


def test_a_change_in_inference_mode_is_seen(kind):
    layer = module()
    with torch.inference_mode():
        check(layer)
        layer.values.mul_(2)
        check(layer)
    check(layer)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_an_optimizer_step_is_seen(kind, options):
    """Fused optimizers do not raise the version of a tensor."""
    layer, x = module(), torch.randn(TOKENS, K)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
    before = check(layer, x)
    for _ in range(2):
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        check(layer, x)  # a call without gradients between forward and backward
        loss.backward()
        optimizer.step()
        assert not torch.equal(check(layer, x), before)


def test_a_weight_in_training_makes_no_layout_at_every_step(kind, monkeypatch):
    made = []
    maker = layouts._MAKERS[kind]
    monkeypatch.setitem(layouts._MAKERS, kind, lambda weight: made.append(1) or maker(weight))
    layer, x = module(), torch.randn(TOKENS, K)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
        optimizer.step()
    assert len(made) == 1


def test_copies_and_files_carry_no_layout(kind):
    layer = module()
    check(layer)
    nbytes = len(pickle.dumps(module()))
    assert len(pickle.dumps(layer)) <= nbytes + 200
    assert sorted(layer.state_dict()) == ["bias", "bitmaps", "offsets", "values"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    twins += [copy.copy(layer)]
    weights = [copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))]
    assert all(held(twin) == {} for twin in twins) and all(layouts.of(w).held() == {} for w in weights)
    with torch.no_grad():
        twins[0].values.mul_(-1)
    check(twins[0])
    check(layer)
    assert twins[0].weight is not layer.weight and twins[0].weight.values is twins[0].values


def test_the_module_keeps_one_container():
    layer = module()
    first = layer.weight
    assert layer.weight is first and layer(torch.randn(2, K)).shape == (2, N) and layer.weight is first
    layer.values = torch.nn.Parameter(layer.values.detach() * 2)
    assert layer.weight is not first and layer.weight.values is layer.values


def test_layouts_go_with_the_module(kind):
    layer = module()
    check(layer)
    gc.collect()
    found = weakref.ref(layouts.of(layer.weight))
    watched = len(layouts._watched)
    del layer
    gc.collect()
    assert found() is None and len(layouts._watched) == watched - 1


def test_threads_that_race_make_one_layout(kind, monkeypatch):
    made = []
    maker = layouts._MAKERS[kind]
    monkeypatch.setitem(layouts._MAKERS, kind, lambda weight: made.append(1) or maker(weight))
    for _ in range(5):
        layer, x = module(), torch.randn(TOKENS, K)
        made.clear()
        barrier, answers, errors = threading.Barrier(8), [], []

        def work(layer=layer, x=x, barrier=barrier, answers=answers, errors=errors):
            try:
                barrier.wait()
                with torch.no_grad():
                    answers.append(layer(x))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and len(answers) == 8 and len(made) == 1
        assert all(torch.equal(answer, answers[0]) for answer in answers)
        assert relative_error(answers[0], truth(layer, x)) < 1e-5


@pytest.mark.parametrize("format", ["bitmap", "2:4"])
def test_compiled_and_exported_code_reads_the_weight_as_it_is_stored(kind, format):
    layer, x = module(format), torch.randn(TOKENS, K)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        assert relative_error(compiled(x), truth(layer, x)) < 1e-5
        assert held(layer) == {}
        check(layer, x)  # and with a layout there, again
        torch.compiler.reset()
        assert relative_error(torch.compile(layer, fullgraph=True)(x), truth(layer, x)) < 1e-5
        exported = torch.export.export(layer, (x,))
    names = {str(node.target) for node in exported.graph.nodes}
    assert any("sparse24_linear" in name or "bitmap_linear" in name for name in names)
    assert not any("indexed" in name for name in names)
    assert relative_error(exported.module()(x), truth(layer, x)) < 1e-5


def test_watched_operators_see_the_direct_kernel(kind):
    """Under a dispatch mode (tracing, counting) nothing is made: it could hold tensors of the mode."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer = module()
    with Names() as names, torch.no_grad():
        layer(torch.randn(TOKENS, K))
    assert any("bitmap_linear" in name for name in names.seen) and held(layer) == {}


def test_weights_made_in_inference_mode_get_none(kind):
    """Their changes cannot be seen."""
    with torch.inference_mode():
        layer = module()
        check(layer)
        layer.values.mul_(2)
        check(layer)
        assert held(layer) == {}


def test_other_backends_and_dtypes_are_left_alone(kind):
    layer, x = module(), torch.randn(TOKENS, K)
    with torch.no_grad():
        for backend in ("native", "reference"):
            y = pyfast.sparse_linear(x, layer.weight, layer.bias, backend=backend)
            assert relative_error(y, truth(layer, x)) < 1e-5
        check(layer.double(), x.double())
        layer(x[:0].double())
    assert held(layer) == {}


def test_a_layout_that_cannot_be_made_is_not_tried_again(kind, monkeypatch):
    tried = []

    def fail(weight):
        tried.append(weight)
        raise RuntimeError("not enough memory: you tried to allocate 1 byte\nand more")

    monkeypatch.setitem(layouts._MAKERS, kind, fail)
    layer = module()
    with pytest.warns(UserWarning, match=f"no {kind} layout .* not enough memory") as told:
        for _ in range(3):
            check(layer)
    assert len(tried) == len(told) == 1 and held(layer) == {}


def test_a_policy_forbids():
    weight = BitmapWeight.from_dense(weight_unstructured(512, 512, 0.5))
    x = torch.randn(64, 512)
    before = sparse.set_layouts("none")
    try:
        assert sparse.plan(weight, 64).kernel == "direct" and "set_layouts" in sparse.plan(weight, 64).reason
        pyfast.sparse_linear(x, weight)
        assert layouts.of(weight).held() == {}
        assert sparse.set_layouts("indexed") == "none"
        assert sparse.plan(weight, 64).kernel in ("direct", "indexed")
        with pytest.raises(ValueError, match="policy"):
            sparse.set_layouts("some")
    finally:
        sparse.set_layouts(before)


def test_prepare_makes_what_the_plans_want():
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512)).eval()
    pyfast.sparsify(model, format="bitmap", sparsity=0.8)
    wanted = {sparse.plan(layer.weight, tokens).kernel for layer in model for tokens in (1, 16)} - {"direct"}
    nbytes = sparse.prepare(model, (1, 16))
    assert nbytes == sparse.layout_bytes(model) and all(set(held(layer)) == wanted for layer in model)
    with pytest.raises(TypeError, match="weight"):
        sparse.drop_layouts([model])


def test_vmap(kind):
    layer, x = module().requires_grad_(False), torch.randn(3, TOKENS, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert relative_error(torch.func.vmap(layer)(x), truth(layer, x)) < 1e-5


@pytest.mark.parametrize("format", ["bitmap", "2:4"])
def test_every_isa(isa, kind, format):
    dense = weight_24(70, 200) if format == "2:4" else weight_unstructured(70, 200, 0.6)
    weight = (Sparse24Weight if format == "2:4" else BitmapWeight).from_dense(dense)
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 200)
        assert relative_error(pyfast.sparse_linear(x, weight), x.double() @ dense.double().T) < 1e-5
    assert backends.active_isa() == isa
