"""nvcc compiles the CUDA kernels without a warning and a spill, and with a GPU the conversions run on it.

Without one, tests/test_simt_*.py execute the kernels on the host. The truth is built here from the formats'
definitions, one element after the other.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from native_build import CUDA_TARGETS, CudaModule, build_cuda, needed, outside_the_stable_abi
from sparse_cases import same_bits

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
SHAPES = [(1, 1), (3, 5), (16, 16), (16, 64), (17, 65), (5, 24), (40, 136), (33, 129), (64, 192), (130, 260)]
OPS = sorted(path.stem for path in SOURCES.glob("*.cu"))


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> np.ndarray:
    """Elements of ``size`` bytes, none of them +0.0, among them -0.0 and NaN."""
    bits = rng.integers(1, 2 ** (8 * size), size=shape, dtype=f"u{size}")
    flat = bits.reshape(-1)
    flat[::7] = 1 << (8 * size - 1)
    flat[3::11] = 2 ** (8 * size - 1) - 1
    return bits


def sparse24_case(n: int, k: int, size: int, multiple: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A 2:4 weight with every legal pair: values [n, K/2], metadata int16 [n, K/16], dense [n, k]."""
    rng = np.random.default_rng(n * 1000 + k)
    padded = -(-k // multiple) * multiple
    dense = np.zeros((n, padded), dtype=f"u{size}")
    values = np.zeros((n, padded // 2), dtype=f"u{size}")
    metadata = np.zeros((n, padded // 16), dtype=np.uint16)
    drawn = random_bits(rng, values.shape, size)
    pairs = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    for row in range(n):
        for group in range(padded // 4):
            first, second = pairs[rng.integers(len(pairs))]
            for place, column in enumerate((4 * group + first, 4 * group + second)):
                if column < k:
                    values[row, 2 * group + place] = dense[row, column] = drawn[row, 2 * group + place]
            metadata[row, group // 4] |= (first | second << 2) << (4 * (group % 4))
    return values, metadata.view(np.int16), np.ascontiguousarray(dense[:, :k])


def bitmap_case(n: int, k: int, size: int, density: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A bitmap weight: values [stored], bitmaps int64 [tiles, 16], offsets [tiles + 1], dense [n, k]."""
    rng = np.random.default_rng(n * 1000 + k)
    dense = random_bits(rng, (n, k), size) * (rng.random((n, k)) < density).astype(f"u{size}")
    values, words, offsets = [], [], [0]
    for top in range(0, n, 16):
        for left in range(0, k, 64):
            for row in range(top, top + 16):
                word = 0
                for bit in range(64):
                    column = left + bit
                    if row < n and column < k and dense[row, column] != 0:
                        word |= 1 << bit
                        values.append(dense[row, column])
                words.append(word)
            offsets.append(len(values))
    bitmaps = np.array(words, dtype=np.uint64).reshape(-1, 16).view(np.int64)
    return np.array(values, dtype=f"u{size}"), bitmaps, np.array(offsets, dtype=np.int64), dense


@pytest.fixture(scope="module")
def cuda_module(tmp_path_factory: pytest.TempPathFactory) -> CudaModule:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return build_cuda(tmp_path_factory.mktemp("cuda"), monkeypatch)


def demangled(name: str) -> str:
    """The kernel's name with its template arguments, without namespaces and parameters."""
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(\w+\)|\w+::", "", text.removeprefix("void ").rsplit("(", 1)[0])


def stated_resources(op: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of shared memory of each kernel as the head of the .cuh says, by name; T is any element."""
    row = r"^//   (\w+(?:<.*>)?) +(\d+) registers +(\d+) bytes of shared memory"
    found = re.findall(row, (SOURCES / f"{op}.cuh").read_text(), re.MULTILINE)
    return {name: (int(registers), int(shared)) for name, registers, shared in found}


def cuobjdump(what: str, path: Path) -> str:
    """What it prints; the program is that of the CUDA toolkit or of Triton."""
    places = ["/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(places))
    if found is None:
        pytest.skip("no cuobjdump")
    return subprocess.run([found, what, str(path)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_warnings_and_spills(cuda_module: CudaModule, op: str) -> None:
    """No stack and no local memory, where spills would be, and no more registers than the head of the kernel's file
    says."""
    report = cuobjdump("-res-usage", cuda_module.object_of(op))
    stated, most = stated_resources(op), dict[str, int]()
    by_target = re.findall(r"^arch = sm_(\d+)$(.*?)(?=^arch|\Z)", report, re.DOTALL | re.MULTILINE)
    assert {target for target, _ in by_target} == set(CUDA_TARGETS), report
    for target, functions in by_target:
        kernels = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", functions)
        assert len(kernels) == functions.count("Function ") > 0, functions
        for name, registers, stack, local in kernels:
            assert (stack, local) == ("0", "0"), f"{name} spills on sm_{target}"
            kernel = re.sub(r"<(BFloat16|Float16|float|unsigned \w+)", "<T", demangled(name))
            most[kernel] = max(most.get(kernel, 0), int(registers))
    assert set(stated) <= set(most), f"the head of {op}.cuh names kernels that are not there"
    for kernel, registers in most.items():
        limit = stated[kernel][0] if stated else 80
        assert registers <= limit, f"{kernel} holds {registers} registers, more than {limit}"
        assert not stated or registers + 24 > limit, f"{kernel} holds {registers} registers, far fewer than {limit}"


OVERLAPPING = ("sparse24_linear", "bitmap_linear", "sliced_linear", "scattered_linear")


@pytest.mark.parametrize("op", OVERLAPPING)
def test_nothing_is_touched_before_the_grid_before_has_ended(cuda_module: CudaModule, op: str) -> None:
    """No load or store stands before griddepcontrol.wait in the machine code; ptxas may move ld.global.nc there."""
    listing = cuobjdump("-sass", cuda_module.object_of(op))
    overlapping = 0
    for function in listing.split("Function : ")[1:]:
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)", function)
        if "ACQBULK" not in found:
            assert "PREEXIT" not in found
            continue
        overlapping += 1
        assert found.index("PREEXIT") < found.index("ACQBULK")
        touching = {"LD", "LDG", "LDGSTS", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG"}
        assert not touching & set(found[: found.index("ACQBULK")]), function.splitlines()[0]
    assert overlapping > 0


def test_needs_nothing_of_torch_but_the_stable_interface(cuda_module: CudaModule) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    for op in OPS:
        path = cuda_module.object_of(op)
        symbols = subprocess.run(["nm", "-u", str(path)], capture_output=True, text=True, check=True).stdout.split()
        wanted = {symbol for symbol in symbols if re.search("torch|aten|c10", symbol, re.IGNORECASE)}
        assert "aoti_torch_get_current_cuda_stream" in wanted
        assert not {symbol for symbol in wanted if not re.match(r"(aoti_torch|torch)_[a-z0-9_]+$", symbol)}


def test_builds_against_this_torch(cuda_module: CudaModule) -> None:
    """The module compiles, links and needs nothing but the stable ABI, CUDA build of torch or not."""
    library = cuda_module.library
    assert library.name == "_cuda.abi3.so" and library.parent.name == "pyfast"
    symbols = needed(library)
    assert outside_the_stable_abi(symbols) == set()
    assert "aoti_torch_get_current_cuda_stream" in symbols
    contents = library.read_bytes()
    assert b"PyInit__cuda\0" in contents and b"\0008.0 9.0 12.0\0" in contents
    assert set(re.findall(rb"sm_\d+", contents)) == {f"sm_{target}".encode() for target in CUDA_TARGETS}


DTYPES = {"bfloat16": (torch.bfloat16, 2), "float16": (torch.float16, 2), "float32": (torch.float32, 4)}


def on_gpu(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copies the array; unsigned elements become ``dtype`` with the same bits."""
    signed = array.view(array.dtype.str.replace("u", "i"))
    tensor = torch.from_numpy(signed).cuda()
    return tensor if dtype is None else tensor.view(dtype)


def truth_dtype(array: np.ndarray) -> torch.dtype:
    """The integer dtype of the array's size."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[array.dtype.itemsize]


def bits_of(tensor: torch.Tensor, size: int) -> np.ndarray:
    return tensor.view({2: torch.int16, 4: torch.int32}[size]).cpu().numpy().view(f"u{size}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (70, 2048)])
def test_conversions_on_the_gpu(n: int, k: int, dtype: str) -> None:
    import pyfast  # noqa: F401
    from pyfast.reference import sparse24_convert as reference

    element, size = DTYPES[dtype]
    values, metadata, dense = sparse24_case(n, k, size, 32)
    out = torch.ops.pyfast.sparse24_decompress(on_gpu(values, element), on_gpu(metadata), n, k)
    np.testing.assert_array_equal(bits_of(out, size), dense)
    given = on_gpu(dense, element)
    packed, words, violation = torch.ops.pyfast.sparse24_compress(given)
    assert int(violation) == -1
    assert same_bits(torch.ops.pyfast.sparse24_decompress(packed, words, n, k), given)
    assert same_bits(torch.ops.pyfast.sparse24_gather(given, words), packed)
    full, scores = torch.randn(n, k, device="cuda").to(element), torch.randint(-2, 3, (n, k), device="cuda").float()
    for ranks in (None, scores):
        for found, truth in zip(
            torch.ops.pyfast.sparse24_prune(full, ranks), reference.prune(full, ranks), strict=True
        ):
            assert same_bits(found, truth)
    for density in (0.0, 0.5, 1.0):
        values, bitmaps, offsets, dense = bitmap_case(n, k, size, density)
        out = torch.ops.pyfast.bitmap_decompress(on_gpu(values, element), on_gpu(bitmaps), on_gpu(offsets), n, k)
        np.testing.assert_array_equal(bits_of(out, size), dense)
        found = torch.ops.pyfast.bitmap_compress(on_gpu(dense, element))
        for tensor, truth in zip(found, (values, bitmaps, offsets), strict=True):
            np.testing.assert_array_equal(tensor.view(truth_dtype(truth)).cpu().numpy().view(truth.dtype), truth)
