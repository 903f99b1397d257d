"""Which backend and which ISA serves a call, and what is left without the compiled module."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_cases import same_bits, weight_24, weight_unstructured
from torch import nn

import pyfast
from pyfast import _native, backends
from pyfast.ops import _library

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("serial", "avx2", "avx512", "avx512_lookup")


def python(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    clean = {name: value for name, value in os.environ.items() if name != "PYFAST_ISA"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean | environment)


def test_op_table_has_every_op_with_a_reason() -> None:
    rows = backends.op_table()
    files = {path.stem for path in (ROOT / "pyfast" / "ops").glob("[a-z]*.py")}
    assert {row.op for row in rows} == files == set(backends.PRIORITY)
    for op in files:
        mine = [row for row in rows if row.op == op]
        others = [name for name in backends.PRIORITY[op] if name != "native"]
        assert all(row.reason for row in mine)
        available = {row.backend for row in mine if row.available}
        if "native" not in backends.PRIORITY[op]:
            assert [row.backend for row in mine] == others and "reference" in available
        elif list((ROOT / "csrc" / "cpu").glob(f"{op}_avx2.cpp")):  # by ISA
            assert [row.backend for row in mine] == ["avx512", "avx2", "serial", *others]
            assert available >= {*backends.isas_supported(), "reference"}
            assert [row.backend for row in mine if row.reason.startswith("in use")] == [backends.active_isa()]
        else:
            assert [row.backend for row in mine] == ["native", *others]
            assert available >= {"native", "reference"}
        if not torch.cuda.is_available():
            assert not [row for row in mine if row.backend in ("cuda", "triton") and row.available]


def test_op_table_follows_the_isa() -> None:
    with backends.isa("serial"):
        used = {row.backend for row in backends.op_table() if row.reason.startswith("in use")}
    assert used == {"serial"}


def test_op_table_says_what_a_processor_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "isas_supported", lambda: ["serial"])
    refused = [row for row in backends.op_table() if row.backend in ("avx2", "avx512")]
    assert refused and all(not row.available and "cannot run" in row.reason for row in refused)


@pytest.mark.parametrize("op", backends.PRIORITY)
def test_select_takes_the_first_that_accepts(op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        first = next(name for name in backends.PRIORITY[op] if name not in ("cuda", "triton"))
        assert backends.select(op, "cpu", dtype) == first
    assert backends.select(op, "cpu", torch.float64) == "reference"
    assert backends.select(op, "mps", torch.float32) == "reference"
    for dtype in (torch.float32, torch.float64):
        assert backends.select(op, "cpu", dtype, "reference") == "reference"


def test_select_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(_native, "CUDA_REASON", "")
    assert backends.select("distill_kl", "cuda", torch.bfloat16) == "cuda"
    assert backends.select("distill_kl", "cuda", torch.bfloat16, "triton") == "triton"
    assert backends.select("topk_distill", "cuda", torch.bfloat16) == "cuda"
    assert backends.select("linear_distill", "cuda", torch.bfloat16) == "triton"
    assert backends.select("sparse24_linear", "cuda", torch.bfloat16) == "cuda"
    assert backends.select("distill_kl", "cuda", torch.float64) == "reference"
    monkeypatch.setattr(_native, "CUDA_REASON", "pyfast._cuda is not built")
    assert backends.select("distill_kl", "cuda", torch.bfloat16) == "triton"
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    for op, backend, reason in (
        ("distill_kl", "triton", "triton is not installed"),
        ("sparse24_linear", "cuda", "pyfast._cuda is not built"),
    ):
        assert backends.select(op, "cuda", torch.bfloat16) == "reference"
        with pytest.raises(ValueError, match=reason):
            backends.select(op, "cuda", torch.bfloat16, backend)


@pytest.mark.parametrize(
    ("op", "requested", "dtype", "reason"),
    [
        ("distill_kl", "native", torch.float64, "takes float32, bfloat16 or float16, not torch.float64"),
        ("distill_kl", "triton", torch.float32, "runs on CUDA devices, not on cpu"),
        ("distill_kl", "cuda", torch.float32, "runs on CUDA devices, not on cpu"),
        ("linear_distill", "cuda", torch.float32, "linear_distill has no cuda kernel"),
        ("bitmap_linear", "cuda", torch.float32, "runs on CUDA devices, not on cpu"),
        ("bitmap_linear", "triton", torch.float32, "bitmap_linear has no triton kernel"),
        ("distill_kl", "opencl", torch.float32, "distill_kl has no opencl kernel"),
    ],
)
def test_select_refuses_with_the_reason(op: str, requested: str, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        backends.select(op, "cpu", dtype, requested)
    message = str(caught.value)
    assert message.startswith(f"backend: got {requested!r}, but ") and reason in message
    assert message.endswith(f"accepted: {', '.join(backends.PRIORITY[op])}")


def test_select_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "CPU_REASON", "pyfast._C is not built")
    assert backends.select("distill_kl", "cpu", torch.float32) == "reference"
    with pytest.raises(ValueError, match=r"backend: got 'native', but pyfast\._C is not built"):
        backends.select("distill_kl", "cpu", torch.float32, "native")


def test_public_functions_pass_the_request_on() -> None:
    logits = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"backend: got 'opencl'"):
        pyfast.distillation_loss(logits, logits, backend="opencl")
    with pytest.raises(ValueError, match=r"backend: got 'native', but .*float64"):
        pyfast.distillation_loss(logits.double(), logits.double(), backend="native")


def test_isa_switches_and_restores() -> None:
    before = backends.active_isa()
    for name in backends.isas_supported():
        with backends.isa(name):
            assert backends.active_isa() == name
            with backends.isa("serial"):
                assert backends.active_isa() == "serial"
            assert backends.active_isa() == name
        assert backends.active_isa() == before
    with pytest.raises(KeyError), backends.isa("serial"):
        raise KeyError("an error inside")
    assert backends.active_isa() == before


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "avx512_lookup"])
def test_unknown_isa_is_refused(name: str) -> None:
    before = backends.active_isa()
    with pytest.raises(ValueError, match=r"accepted: serial, avx2, avx512"), backends.isa(name):
        pytest.fail("entered")
    assert backends.active_isa() == before


def test_isas_are_listed_best_first() -> None:
    assert backends.isas_built() == ["avx512", "avx2", "serial"]
    supported = backends.isas_supported()
    assert supported == [name for name in backends.isas_built() if name in supported] and supported[-1] == "serial"


ACTIVE = "import pyfast; print(pyfast.backends.active_isa())"


@pytest.mark.parametrize("name", ["serial", "avx2", ""])
def test_environment_chooses_the_isa(name: str) -> None:
    if name and name not in backends.isas_supported():
        pytest.skip(f"this processor cannot run {name}")
    done = python(ACTIVE, PYFAST_ISA=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (name or backends.isas_supported()[0])


def test_unknown_isa_in_the_environment() -> None:
    call = """
import torch, pyfast
try:
    pyfast.backends.active_isa()
except ValueError as error:
    print(error)
logits = torch.randn(2, 8)
pyfast.distillation_loss(logits, logits)
"""
    done = python(call, PYFAST_ISA="sse9")
    message = "PYFAST_ISA: got 'sse9', accepted: serial, avx2, avx512"
    assert done.stdout.strip() == message, done.stderr
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == f"ValueError: {message}"


# Served by the reference, in a process that cannot load pyfast._C; by native kernels in this one.
EVERYTHING = """
import torch, pyfast

def everything(case):
    out = {}
    student = case["student"].clone().requires_grad_()
    loss = pyfast.distillation_loss(student, case["teacher"], temperature=2.0)
    loss.backward()
    out["loss"], out["grad"] = loss.detach(), student.grad
    for kind, name in ((pyfast.Sparse24Weight, "24"), (pyfast.BitmapWeight, "bitmap")):
        packed = kind.from_dense(case[name])
        for part, tensor in packed.tensors().items():
            out[f"packed {name} {part}"] = tensor
        out[f"packed {name} dense"] = packed.to_dense()
        out[f"y {name}"] = pyfast.sparse_linear(case["x"], packed, case["bias"])
    for format, sparsity in (("2:4", 0.5), ("bitmap", 0.8)):
        model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        model.load_state_dict(case["model"])
        pyfast.sparsify(model, format, sparsity)
        assert isinstance(model[0], pyfast.nn.SparseLinear)
        out[f"y model {format}"] = model(case["x"]).detach()
        for part, tensor in model.state_dict().items():
            out[f"packed model {format} {part}"] = tensor
    return out
"""

WITHOUT_NATIVE = f"""
import sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "pyfast._C":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pyfast, pyfast.cli, pyfast.bench
said = [w for w in caught if issubclass(w.category, RuntimeWarning)]
assert len(said) == 1, said
print(said[0].message)
assert "pyfast._C" not in sys.modules
{EVERYTHING}
case, result = sys.argv[1:]
torch.save(everything(torch.load(case)), result)
from pyfast import backends
assert backends.active_isa() is None
assert backends.isas_built() == backends.isas_supported() == [] and backends.release_memory() == 0
try:
    with backends.isa("serial"):
        raise AssertionError("entered")
except ValueError as error:
    assert "pyfast._C is not built" in str(error)
assert "not built" in backends.build_info()["native"]
sys.argv = ["pyfast", "info"]
pyfast.cli.main()
"""


@pytest.mark.parametrize("has_parts", [True, False])
def test_backward_with_and_without_the_parts_of_torch(monkeypatch: pytest.MonkeyPatch, has_parts: bool) -> None:
    name = f"only_for_tests_{has_parts}".lower()
    monkeypatch.setattr(_library, "_HAS_PARTS", has_parts)
    _library.define(f"{name}(Tensor x, float factor) -> Tensor")
    torch.library.impl(_library.LIBRARY, name, "CPU")(lambda x, factor: x * factor)
    saved = []

    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        saved.append((len(inputs), output.shape))
        ctx.factor = inputs[1]

    _library.register_autograd(name, lambda ctx, grad: (grad * ctx.factor, None), setup_context)
    op = getattr(torch.ops.pyfast, name)
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(op(x, 2.5).sum(), x)
    assert torch.equal(grad, torch.full((3,), 2.5)) and saved == [(2, (3,))]
    with torch.no_grad():
        assert not op(x, 2.5).requires_grad
    assert torch.equal(op(x.detach(), 2.0), 2 * x.detach()) and len(saved) == 1


BROKEN_CUDA = """
import sys, warnings
import torch

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "pyfast._cuda":
            raise ImportError("undefined symbol: of another torch")

torch.version.cuda = "13.0"
sys.meta_path.insert(0, Broken())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pyfast
print(*(w.message for w in caught if issubclass(w.category, RuntimeWarning)), sep="\\n")
"""


def test_a_cuda_module_that_does_not_load_is_told() -> None:
    done = python(BROKEN_CUDA)
    assert done.returncode == 0, done.stderr
    (told,) = done.stdout.splitlines()
    assert told.startswith("pyfast: pyfast._cuda does not load: undefined symbol: of another torch; Triton")


def test_without_the_compiled_module_the_reference_serves(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8))
    case = {
        "student": torch.randn(5, 1000),
        "teacher": torch.randn(5, 1000),
        "24": weight_24(40, 96),
        "bitmap": weight_unstructured(40, 96, 0.7),
        "x": torch.randn(3, 96),
        "bias": torch.randn(40),
        "model": model.state_dict(),
    }
    torch.save(case, tmp_path / "case.pt")
    done = python(WITHOUT_NATIVE, tmp_path / "case.pt", tmp_path / "result.pt")
    assert done.returncode == 0, done.stderr
    warning, _, info = done.stdout.partition("\n")
    assert warning.startswith("pyfast: pyfast._C is not built") and "reference serves" in warning
    assert "ISA active" in info and "none: the plain-torch reference serves" in info
    assert all(op in info for op in backends.PRIORITY)

    reference = torch.load(tmp_path / "result.pt")
    namespace: dict = {}
    exec(EVERYTHING, namespace)
    native = namespace["everything"](case)
    assert list(reference) == list(native)
    for name, tensor in native.items():
        if name.startswith("packed"):
            assert same_bits(tensor, reference[name]), name
        else:
            torch.testing.assert_close(reference[name], tensor, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """Of every kernel file of one ISA, its external and weak symbols as (kind, demangled name)."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("no g++ or no nm")
    folder = tmp_path_factory.mktemp("objects")

    def compiled(source: Path) -> list[tuple[str, str]]:
        target = folder / f"{source.stem}.o"
        flags = ["-O1", "-std=c++20", "-ffp-contract=off", "-c", str(source), "-o", str(target)]
        done = subprocess.run([compiler, *flags], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        listed = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
        entries = [line[16:].strip().split(" ", 1) for line in listed.splitlines()]
        return [(kind, name) for kind, name in entries if kind.isupper() or kind in "uvw"]

    sources = sorted(path for isa in VARIANTS for path in (ROOT / "csrc" / "cpu").glob(f"*_{isa}.cpp"))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([path.stem for path in sources], pool.map(compiled, sources), strict=True))


def test_kernel_files_share_no_code(symbols: dict[str, list[tuple[str, str]]]) -> None:
    """A kernel file defines its table and nothing else that the linker sees. An inline function or a template of the
    standard library would be a weak symbol: the linker keeps one of many, and the serial kernels could get the one
    compiled for AVX-512, which stops on a processor without it."""
    ops = ("bitmap_linear", "distill_kl", "sparse24_linear")
    assert set(symbols) >= {f"{op}_{isa}" for op in ops for isa in ("serial", "avx2", "avx512")}
    tables = {"pyfast::k" + "".join(word.capitalize() for word in name.split("_")) for name in symbols}
    for name, entries in symbols.items():
        table = "pyfast::k" + "".join(word.capitalize() for word in name.split("_"))
        defined = [(kind, symbol) for kind, symbol in entries if kind != "U"]
        assert [symbol for _, symbol in defined] == [table], f"{name}: {defined}"
        assert defined[0][0] in "DRB", f"{name}: {defined}"
        needed = [symbol for kind, symbol in entries if kind == "U" and ("::" in symbol or "(" in symbol)]
        foreign = [symbol for symbol in needed if symbol not in tables]  # the table of an older ISA may be called
        assert not foreign, f"{name} calls C++ of another file: {foreign}"
