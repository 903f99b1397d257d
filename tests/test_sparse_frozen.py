"""Frozen layers: the product of the layers that they stand for, in eager, compiled and exported code."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from sparse_cases import weight_24, weight_unstructured
from tiny_models import tiny
from torch import Tensor, nn

import pyfast
from pyfast import sparse
from pyfast.backends import isa as use_isa
from pyfast.sparse import BitmapWeight, FrozenLinear, Sparse24Weight, SparseLinear, freeze, layouts
from pyfast.sparse import frozen as frozen_module

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def layer(
    format: str, sparsity: float, dtype: torch.dtype, n: int = 384, k: int = 512, bias: bool = True
) -> SparseLinear:
    if format == "2:4":
        weight = Sparse24Weight.from_dense(weight_24(n, k).to(dtype))
    else:
        weight = BitmapWeight.from_dense(weight_unstructured(n, k, sparsity, dtype))
    return SparseLinear(weight, torch.randn(n).to(dtype) if bias else None)


def frozen(module: nn.Module, tokens=(1, 64)) -> nn.Module:
    return freeze(copy.deepcopy(nn.Sequential(module)), tokens)


def near(y: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    return bool((y.double() - truth.double()).norm() <= ROUNDING[dtype] * truth.double().norm())


CASES = [("bitmap", 0.9), ("bitmap", 0.5), ("bitmap", 0.0), ("2:4", 0.5)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("format", "sparsity"), CASES)
def test_every_number_of_tokens_gives_the_product(format: str, sparsity: float, dtype: torch.dtype) -> None:
    module = layer(format, sparsity, dtype)
    twin = frozen(module, (1, 16, 256))
    for shape in ((1,), (7,), (16,), (2, 3, 5), (300,), (0,)):
        x = torch.randn(*shape, 512).to(dtype)
        with torch.no_grad():
            truth = torch.nn.functional.linear(x.double(), module.weight.to_dense().double(), module.bias.double())
            y = twin(x)
            assert y.shape == truth.shape and y.dtype == dtype and near(y, truth, dtype)


def test_forms_are_those_of_the_plan_and_nothing_else_is_held() -> None:
    module = layer("bitmap", 0.8, torch.float32, 1024, 1024)
    one = frozen(module, (1, 256))[0]
    assert isinstance(one, FrozenLinear)
    expected = {tokens: sparse.plan(module.weight, tokens).kernel for tokens in (1, 256)}
    assert dict(one.kernels) == expected == {1: "direct", 256: "indexed"}
    assert [one.kernel(tokens) for tokens in (0, 1, 2, 256, 1000)] == ["direct", "direct", *["indexed"] * 3]
    few = frozen(module, 1)[0]
    held = sum(buffer.nbytes for buffer in few.buffers())
    assert held == module.weight.nbytes + module.bias.nbytes and not list(few.parameters())
    assert "direct to 1, indexed to 256" in repr(one)


@pytest.mark.parametrize("policy", layouts.POLICIES)
def test_the_policy_of_layouts_holds(policy: str) -> None:
    before = layouts.set_layouts(policy)
    try:
        kernel = frozen(layer("bitmap", 0.0, torch.float32), 64)[0].kernel(64)
    finally:
        layouts.set_layouts(before)
    assert kernel == {"auto": "dense", "indexed": kernel, "none": "direct"}[policy] and kernel != "packed"
    assert policy == "auto" or kernel in ("direct", "indexed")


@pytest.mark.parametrize(("format", "sparsity"), CASES)
def test_compiled_and_exported_code_takes_the_same_kernels(format: str, sparsity: float) -> None:
    module = layer(format, sparsity, torch.float32)
    twin = frozen(module)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 5, 64, 100):
            x = torch.randn(tokens, 512)
            assert near(compiled(x), module(x), torch.float32)
        exported = torch.export.export(twin, (torch.randn(64, 512),))
        x = torch.randn(64, 512)
        assert near(exported.module()(x), module(x), torch.float32)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    op = {"indexed": "pyfast.indexed_linear.default", "dense": "aten.linear.default"}.get(twin[0].kernel(64), "pyfast.")
    assert any(target.startswith(op) for target in called), called


def test_a_model_of_transformers_with_a_fused_mlp() -> None:
    model = tiny("Llama").eval()
    pyfast.sparsify(model, format="bitmap", sparsity=0.8)
    ids = torch.randint(0, model.config.vocab_size, (1, 9))
    with torch.no_grad():
        truth = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        same = freeze(sparse.fuse(model), (1, 9))
        assert same is model and not [m for m in model.modules() if isinstance(m, SparseLinear)]
        assert near(model(ids).logits, truth, torch.float32)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)


def test_what_was_trained_a_moment_ago_is_frozen_as_it_is_now() -> None:
    module = layer("bitmap", 0.9, torch.float32)
    x = torch.randn(64, 512)
    with torch.no_grad():
        module(x)  # a layout is kept, and forgotten by the step
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x).square().mean().backward()
    optimizer.step()
    twin = freeze(nn.Sequential(module), (1, 64))  # not of a copy, which remembers nothing
    assert twin[0].kernel(64) == sparse.plan(module.weight, 64).kernel == "indexed"
    with torch.no_grad():
        truth = torch.nn.functional.linear(x.double(), module.weight.to_dense().double(), module.bias.double())
        assert near(twin(x), truth, torch.float32)


def test_a_layer_in_two_places_is_one() -> None:
    shared = layer("bitmap", 0.5, torch.float32, 64, 64)
    model = freeze(nn.ModuleDict({"a": shared, "b": shared}))
    assert model["a"] is model["b"] and isinstance(model["a"], FrozenLinear)


def test_int8_and_no_bias() -> None:
    module = layer("bitmap", 0.5, torch.float32, bias=False).quantize_()
    x = torch.randn(3, 512)
    with torch.no_grad():
        assert near(frozen(module)(x), module(x), torch.float32)
        assert near(frozen(module)(x.bfloat16()), module(x.bfloat16()), torch.bfloat16)


def test_activation_and_gate() -> None:
    module = layer("bitmap", 0.8, torch.float32)
    twin, x, mul = frozen(module)[0], torch.randn(2, 3, 512), torch.randn(2, 3, 384)
    with torch.no_grad():
        y = twin.product(x, activation="silu", mul=mul)
        assert near(y, module.product(x, activation="silu", mul=mul), torch.float32)


def test_what_belongs_to_a_library_is_taken_where_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer("bitmap", 0.5, torch.float32)
    expected = sparse.plan(module.weight, 64)
    fastest = dataclasses.replace(expected, alternatives={"direct": 2.0, "dense": 1.5, "packed": 1.0})
    monkeypatch.setattr("pyfast.sparse.frozen.plan", lambda weight, tokens: fastest)
    assert frozen(module, 64)[0].kernel(64) == "dense"
    twin, x = freeze(copy.deepcopy(nn.Sequential(module)), 64, traceable=False), torch.randn(64, 512)
    assert twin[0].kernel(64) == "packed" and twin[0].forms["packed"].weight_nbytes == 4 * 384 * 512
    with torch.no_grad():
        for _ in range(2):
            assert near(twin(x), module(x), torch.float32)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="frozen with traceable=False"):
            torch.compile(twin, fullgraph=True)(x)


@pytest.mark.parametrize(("format", "sparsity"), CASES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_call_that_comes_again_goes_a_short_way(
    format: str, sparsity: float, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before is remembered: for x of its shape and dtype alone, without gradients, under the same ISA."""
    module = layer(format, sparsity, torch.float32)
    twin = frozen(module)[0]
    long_ways: list[int] = []
    checked = frozen_module.checked_product
    monkeypatch.setattr(frozen_module, "checked_product", lambda *given: long_ways.append(1) or checked(*given))

    def ask(*shape: int, activation: str | None = "silu") -> None:
        x, mul = torch.randn(*shape, 512), torch.randn(*shape, 384) if gated else None
        y = twin.product(x, activation=activation, mul=mul)
        with torch.no_grad():
            assert near(y, module.product(x, activation=activation, mul=mul), torch.float32)

    with torch.no_grad():
        for _ in range(3):
            ask(1)
        assert len(long_ways) == 1
        for _ in range(2):
            ask(2, 3)
        assert len(long_ways) == 2
        ask(2, 3, activation="relu")
        assert len(long_ways) == 3
    ask(2, 3, activation="relu")  # gradients are recorded
    assert len(long_ways) == 4
    with torch.no_grad(), use_isa("serial"):
        ask(2, 3, activation="relu")
        ask(2, 3, activation="relu")
    assert len(long_ways) == 5
    assert copy.deepcopy(twin)._last is None and twin._last is not None


def test_copies_and_pickles() -> None:
    twin, x = frozen(layer("bitmap", 0.8, torch.float32)), torch.randn(4, 512)
    with torch.no_grad():
        for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
            assert torch.equal(other(x), twin(x))


def test_what_a_frozen_layer_does_not_do() -> None:
    twin = frozen(layer("bitmap", 0.8, torch.float32))
    with pytest.raises(RuntimeError, match="FrozenLinear: has no gradient"):
        twin(torch.randn(2, 512, requires_grad=True))
    assert not twin(torch.randn(2, 512)).requires_grad
    with pytest.raises(RuntimeError, match="keeps its device and dtype"):
        twin.half()
    with pytest.raises(RuntimeError, match="nothing to save"):
        twin.state_dict()
    with torch.no_grad():
        with pytest.raises(TypeError, match=r"x: got dtype torch\.float16"):
            twin(torch.randn(2, 512).half())
        with pytest.raises(ValueError, match=r"x: got shape \[2, 511\]"):
            twin(torch.randn(2, 511))
        with pytest.raises(ValueError, match="activation: got 'tanh'"):
            twin[0].product(torch.randn(2, 512), activation="tanh")
        with pytest.raises(ValueError, match="mul: got shape"):
            twin[0].product(torch.randn(2, 512), mul=torch.randn(2, 383))


def test_bad_input_changes_nothing() -> None:
    model = nn.Sequential(layer("bitmap", 0.5, torch.float32, 64, 64))
    for tokens in (0, (), (1, 0), (1.5,), True):
        with pytest.raises(ValueError, match="tokens: got"):
            freeze(model, tokens)
    with pytest.raises(TypeError, match="model: got int"):
        freeze(3)
    with pytest.raises(TypeError, match="model: got a SparseLinear"):
        freeze(model[0])
    with pytest.raises(ValueError, match="has no SparseLinear"):
        freeze(nn.Sequential(nn.Linear(4, 4)))
    assert type(model[0]) is SparseLinear


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("format", "sparsity"), CASES)
def test_on_the_gpu(format: str, sparsity: float) -> None:
    """Each form the plan may take there, in eager and compiled code, and captured in a CUDA graph."""
    module = layer(format, sparsity, torch.bfloat16).cuda()
    twin = frozen(module, (1, 16, 512))
    assert {kernel for _, kernel in twin[0].kernels} <= {"direct", "sliced", "scattered", "dense"}
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 5, 16, 512):
            x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
            truth = torch.nn.functional.linear(x.double(), module.weight.to_dense().double(), module.bias.double())
            assert near(twin(x), truth, torch.bfloat16) and near(compiled(x), truth, torch.bfloat16)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = twin(x)
            graph.replay()
            assert near(y, truth, torch.bfloat16)
