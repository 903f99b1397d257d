"""SparseLinear as a module: state_dict, pickle, copies, casts, meta, compile, export, and nothing half loaded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sparse_cases import mask_24
from torch import nn

from pyfast.nn import SparseLinear

KINDS = [("2:4", False), ("2:4", True), ("bitmap", False), ("bitmap", True)]
X = torch.randn(5, 70, generator=torch.Generator().manual_seed(3))


def make(format="bitmap", int8=False, sparsity=0.5, seed=0, shape=(70, 33), bias=True):
    torch.manual_seed(seed)
    module = SparseLinear.from_linear(nn.Linear(*shape, bias=bias), format, sparsity)
    return module.quantize_() if int8 else module


@pytest.mark.parametrize(("format", "int8"), KINDS)
def test_copies_and_files_compute_the_same(format, int8, tmp_path):
    module = make(format, int8)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    loaded = make(format, int8, seed=1)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
    assigned = make(format, int8, seed=1).to("meta")
    assigned.load_state_dict(module.state_dict(), assign=True)
    empty = make(format, int8, seed=1).to("meta").to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    for twin in (loaded, assigned, empty, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(X), module(X))
        assert all(
            torch.equal(a, b) for a, b in zip(twin.state_dict().values(), module.state_dict().values(), strict=True)
        )
    parts = {"values", "bias", *(("metadata",) if format == "2:4" else ("bitmaps", "offsets"))}
    assert set(module.state_dict()) == parts | ({"scales"} if int8 else set())


@pytest.mark.parametrize(("format", "int8"), KINDS)
def test_casts(format, int8):
    module = make(format, int8)
    pattern = {name: b.clone() for name, b in module.named_buffers()}
    for dtype, cast in ((torch.float16, module.half), (torch.bfloat16, module.bfloat16), (torch.float32, module.float)):
        y = cast()(X.to(dtype))
        assert y.dtype == dtype and torch.isfinite(y).all()
        assert module.values.dtype == (torch.int8 if int8 else dtype)
        assert all(
            torch.equal(b, pattern[name]) and b.dtype == pattern[name].dtype for name, b in module.named_buffers()
        )
    meta = module.to("meta")
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert meta(X.to("meta")).shape == (5, 33)


@pytest.mark.parametrize(("format", "int8"), KINDS)
def test_export_and_compile(format, int8):
    module = make(format, int8).eval()
    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(module, (X,), dynamic_shapes=({0: tokens},))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 5, 40):
        x = torch.randn(count, 70)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


def other(**changes):
    return lambda: make(**changes).state_dict()


def edited(format="bitmap", int8=False, **changes):
    def state():
        state = make(format, int8, seed=1).state_dict()
        for name, change in changes.items():
            state[name] = change(state[name].clone())
        return state

    return state


def flip(bitmaps):
    bitmaps[0, 0] ^= 1
    return bitmaps


REFUSED = {
    "another format": ("bitmap", False, other(format="2:4", seed=1), "values"),
    "another number of values": ("bitmap", False, other(sparsity=0.8), "values: got shape"),
    "another shape": ("2:4", False, other(format="2:4", shape=(70, 32)), "got shape"),
    "another bias": ("bitmap", False, edited(bias=lambda b: b[1:]), "bias: got shape"),
    "a bit": ("bitmap", False, edited(bitmaps=flip), "offsets"),
    "offsets": ("bitmap", False, edited(offsets=lambda o: o + 1), "offsets"),
    "a nibble": ("2:4", False, edited("2:4", metadata=lambda m: m * 0), "nibble"),
    "int8 into floats": ("bitmap", False, other(int8=True, seed=1), "values: got dtype"),
    "floats into int8": ("bitmap", True, other(seed=1), "values: got dtype"),
    "scales": ("bitmap", True, edited(int8=True, scales=lambda s: s * 0), "scales"),
    "values missing": ("bitmap", False, lambda: {k: v for k, v in other(seed=1)().items() if k != "values"}, "Missing"),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_state_leaves_the_module_as_it_was(case, nested):
    format, int8, state, message = REFUSED[case]
    module = make(format, int8)
    before = copy.deepcopy(module.state_dict())
    given = state()
    if nested:
        module, given = nn.ModuleDict({"proj": module}), {f"proj.{name}": tensor for name, tensor in given.items()}
        message = f"proj: {message}" if message not in ("Missing", "values", "got shape", "nibble") else message
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(given)
    after = (module["proj"] if nested else module).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_weight_is_loaded_whole_or_not_at_all():
    module, twin = make(), make(seed=1)
    values, bias = module.values.detach().clone(), module.bias.detach().clone()
    found = module.load_state_dict({"values": twin.values, "bias": twin.bias}, strict=False)
    assert found.missing_keys == ["bitmaps", "offsets"]
    assert torch.equal(module.values, values) and torch.equal(module.bias, bias)
    found = module.load_state_dict({"bias": twin.bias}, strict=False)
    assert torch.equal(module.values, values) and torch.equal(module.bias, twin.bias)
    with pytest.raises(RuntimeError, match="Unexpected"):
        module.load_state_dict(twin.state_dict() | {"weight": torch.ones(1)})


def test_half_of_a_checkpoint_in_another_precision_is_cast():
    module = make()
    module.load_state_dict({n: t.half() if t.is_floating_point() else t for n, t in module.state_dict().items()})
    assert module.values.dtype == torch.float32


def test_quantize_in_place_keeps_the_pattern_and_the_bias():
    linear = nn.Linear(64, 32)
    module = SparseLinear.from_linear(linear, "2:4", mask=mask_24(linear.weight.detach()))
    metadata, bias = module.metadata.clone(), module.bias
    assert module.quantize_() is module
    assert torch.equal(module.metadata, metadata) and module.bias is bias
    with pytest.raises(ValueError, match="int8 values already"):
        module.quantize_()
