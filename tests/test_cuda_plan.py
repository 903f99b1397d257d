"""The cost model of a GPU, and with one the plan's choices: every kernel that may serve gives the same product."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from sparse_cases import weight_24, weight_unstructured

from pyfast import BitmapWeight, Sparse24Weight, sparse
from pyfast.sparse import cuda_calibration, cuda_costs, layouts
from pyfast.sparse.cost_model import Work
from pyfast.sparse.cuda_costs import DENSITIES, FEW_TOKENS, MANY_TOKENS, SCATTERED_TOKENS, SLICED_TOKENS, CudaConstants


def simple() -> CudaConstants:
    """Times that can be worked out by hand."""

    def row(*positions: float) -> cuda_costs.Row:
        return tuple((2.0, position) for position in positions)

    return CudaConstants(
        source="calibrated",
        device="a GPU",
        bitmap=tuple(row(*(0.5 + density for density in DENSITIES)) for _ in FEW_TOKENS),
        bitmap_decompress=row(*(2.0 for _ in DENSITIES)),
        sliced=tuple(row(*(tokens * density for density in DENSITIES)) for tokens in SLICED_TOKENS),
        scattered=tuple(row(*(0.3 + tokens / 80 + density for density in DENSITIES)) for tokens in SCATTERED_TOKENS),
        sparse24=row(*(0.5 + tokens / 64 for tokens in FEW_TOKENS)),
        sparse24_decompress=(2.0, 3.0),
        cusparselt=row(*(0.9 * max(1.0, tokens / 256) for tokens in MANY_TOKENS)),
        dense=row(*(max(1.0, tokens / 256) for tokens in MANY_TOKENS)),
    )


def work(format: str, tokens: int, density: float = 0.2, dtype: str = "bfloat16") -> Work:
    n, k = 1000, 2000
    return Work(format, n, k, round(density * n * k), dtype, tokens, 1, 0)


def test_times_of_every_kernel_that_can_serve():
    launch, positions = 2e-3, 2e6 * 1e-9
    found = cuda_costs.predict(simple(), work("bitmap", 3))
    assert found == pytest.approx(
        {
            "dense": launch + positions,
            "direct": launch + 0.7 * positions,
            "sliced": launch + 0.8 * positions,
            "scattered": launch + 0.6 * positions,
        }
    )
    found = cuda_costs.predict(simple(), work("bitmap", 20))  # counted as 32 tokens
    assert found["scattered"] == pytest.approx(launch + 0.9 * positions) and "sliced" not in found
    assert "scattered" not in cuda_costs.predict(simple(), work("bitmap", 33))
    found = cuda_costs.predict(simple(), work("2:4", 16, 0.5))
    assert found == pytest.approx(
        {"dense": launch + positions, "direct": launch + 0.75 * positions, "cusparselt": launch + 0.9 * positions}
    )
    found = cuda_costs.predict(simple(), work("bitmap", 512))  # above few tokens: decompressed, in a launch of its own
    assert found == pytest.approx({"dense": launch + 2 * positions, "direct": 2 * launch + 4 * positions})
    assert cuda_costs.predict(simple(), work("2:4", 4096, 0.5))["dense"] == pytest.approx(launch + 16 * positions)
    found = cuda_costs.predict(simple(), work("bitmap", 1, dtype="float32"))
    assert found == pytest.approx({"dense": launch + 2 * positions, "direct": 2 * launch + 6 * positions})
    without = dataclasses.replace(simple(), cusparselt=())
    assert "cusparselt" not in cuda_costs.predict(without, work("2:4", 16, 0.5))
    without = dataclasses.replace(simple(), scattered=())
    assert "scattered" not in cuda_costs.predict(without, work("bitmap", 16))


def test_sliced_products_wider_than_shared_memory_count_every_launch():
    assert cuda_costs._sliced_launches(8, 14336) == [8]
    assert cuda_costs._sliced_launches(8, 18944) == [4, 4]
    assert cuda_costs._sliced_launches(5, 18944) == [4, 1]
    assert cuda_costs._sliced_launches(3, 65536) == [1, 1, 1]


def test_bytes_beside_the_container():
    assert cuda_costs.layout_bytes(work("bitmap", 1), "direct") == 0
    assert cuda_costs.layout_bytes(work("bitmap", 1), "sliced") == 3 * 400_000
    assert cuda_costs.layout_bytes(work("bitmap", 8), "scattered") == 3 * 400_000
    assert cuda_costs.layout_bytes(work("2:4", 1, 0.5), "cusparselt") == 2_250_000
    assert cuda_costs.layout_bytes(work("bitmap", 1), "dense") == 4_000_000


def test_constants_survive_json():
    plain = json.loads(json.dumps(cuda_costs.to_json(simple())))
    assert cuda_costs.from_json(plain, "calibrated") == simple()
    for name, value in (
        ("dense", [1.0]),
        ("bitmap", []),
        ("sparse24_decompress", ["2", 1.0]),
        ("device", 3),
        ("sparse24", [[-1.0, 1.0]] * 7),
    ):
        with pytest.raises((KeyError, TypeError, ValueError)):
            cuda_costs.from_json({**plain, name: value}, "calibrated")
    del plain["sliced"]
    with pytest.raises(KeyError):
        cuda_costs.from_json(plain, "calibrated")


@pytest.mark.parametrize(
    ("device", "measured"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "H100"),
    ],
)
def test_the_built_in_constants_are_those_of_the_device_or_the_nearest(device: str, measured: str) -> None:
    found = cuda_costs.built_in(device)
    assert found.source == "built-in" and measured in found.device
    assert all(begin < 20 and 0.01 < position < 100 for begin, position in (*found.dense, *found.sparse24))


def test_a_line_through_two_sizes():
    found = cuda_calibration._lines((5.0, (9.0, 4.0)), (8.0, (9.0, 16.0)), (1_000_000, 4_000_000))
    assert found == ((4.0, 1.0), ((9.0, 0.0), (0.0, 4.0)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("policy", layouts.POLICIES)
def test_every_choice_gives_the_product(policy: str, dtype: torch.dtype) -> None:
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-3}[dtype]  # float32 may be tf32
    weights = [
        Sparse24Weight.from_dense(weight_24(640, 1024).to("cuda", dtype)),
        BitmapWeight.from_dense(weight_unstructured(640, 1024, 0.8).to("cuda", dtype)),
    ]
    before = layouts.set_layouts(policy)
    try:
        for weight in weights:
            for tokens in (1, 4, 16, 100, 1000):
                x = torch.randn(tokens, 1024, device="cuda", dtype=dtype)
                bias = torch.randn(640, device="cuda", dtype=dtype)
                found = sparse.plan(weight, tokens)
                assert policy == "auto" or found.kernel != "dense"
                assert policy != "none" or found.kernel == "direct"
                truth = torch.nn.functional.silu(x.double() @ weight.to_dense().double().T + bias.double())
                for _ in range(2):
                    y = sparse.sparse_linear(x, weight, bias, activation="silu")
                    assert (y.double() - truth).norm() < 1.1 * rounding * truth.norm(), found
    finally:
        layouts.set_layouts(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_layout_is_made_while_a_graph_is_captured() -> None:
    weight = BitmapWeight.from_dense(weight_unstructured(4096, 1024, 0.9).to("cuda", torch.bfloat16))
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    eager = sparse.sparse_linear(x, weight, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse.sparse_linear(x, weight)
    graph.replay()
    assert torch.equal(y, eager) and layouts.layout_bytes(weight) == 0
