"""What this machine can do at best: the floors beside which every time is put."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from pyfast.bench import hardware

_BYTES_AT_MOST = 2 << 30


@dataclass(frozen=True)
class Floors:
    """Bandwidths in GB/s (10⁹ bytes; a copy counts what it reads and what it writes) and dense matmul peaks
    in GFLOP/s. A bf16 peak of 0 means that it was not measured."""

    copy_gbps: float
    read_gbps: float
    dense_gflops: float
    dense_bf16_gflops: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """The figures by name, rounded for the environment of a report."""
        return {name: round(value, 2) for name, value in asdict(self).items()}


def floor_ms(nbytes: int, flops: int, floors: Floors, *, by: str = "copy", dtype: str = "float32") -> float:
    """Milliseconds that moving ``nbytes`` and computing ``flops`` takes at the least.

    ``by="copy"`` uses the copy bandwidth (an op that reads and writes alike), ``by="read"`` the read
    bandwidth (a matrix-vector product). Arithmetic and transfer may overlap, so the larger of the two times
    counts. ``dtype`` chooses the arithmetic peak: the 16-bit one for "bfloat16" and "float16", if it is the
    higher.
    """
    if by not in ("copy", "read"):
        raise ValueError(f"by: {by!r} is unknown; accepted are copy, read")
    bandwidth = floors.copy_gbps if by == "copy" else floors.read_gbps
    peak = floors.dense_gflops
    if dtype in ("bfloat16", "float16"):
        peak = max(peak, floors.dense_bf16_gflops)
    return max(nbytes / (bandwidth * 1e6), flops / (peak * 1e6))


def measure(device: str = "cpu", quick: bool = False) -> Floors:
    """Measure the floors on ``device`` with torch's present number of threads, in about 2 s (quick: 1 s)."""
    return _measure_cuda(quick) if device.startswith("cuda") else _measure_cpu(quick)


def _best_s(call: Callable[[], object], budget_s: float) -> float:
    """The shortest of repeated calls, in seconds. A floor is what was possible once, not the usual."""
    call()
    best = float("inf")
    start = time.perf_counter()
    for done in range(1000):
        before = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - before)
        if done >= 2 and time.perf_counter() - start > budget_s:
            break
    return best


def _measure_cpu(quick: bool) -> Floors:
    budget_s = 0.15 if quick else 0.4
    # Four times the last-level cache, unless the machine has too little memory for two such buffers.
    nbytes = min(max(4 * hardware.last_level_cache_bytes(), 64 << 20), _BYTES_AT_MOST)
    nbytes = min(nbytes, hardware.available_memory_bytes() // 8)
    source = torch.ones(nbytes // 4, dtype=torch.float32)
    target = torch.zeros_like(source)

    copy_s = _best_s(lambda: target.copy_(source), budget_s)

    columns = 4096
    matrix = source[: source.numel() // columns * columns].view(-1, columns)
    vector = torch.ones(columns)
    read_s = min(
        _best_s(lambda: source.sum(), budget_s),
        _best_s(lambda: torch.mv(matrix, vector), budget_s),
    )
    return Floors(
        copy_gbps=2 * source.nbytes / copy_s / 1e9,
        read_gbps=source.nbytes / read_s / 1e9,
        dense_gflops=_cpu_gflops(torch.float32, quick, budget_s),
        dense_bf16_gflops=_cpu_gflops(torch.bfloat16, quick, budget_s),
    )


def _cpu_gflops(dtype: torch.dtype, quick: bool, budget_s: float) -> float:
    """The best matmul rate seen over a few sizes and the prepacked linears."""
    from pyfast.bench import baselines

    best = 0.0
    for n in (512,) if quick else (1024, 2048):
        a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
        calls: list[Callable[[], object]] = [partial(torch.matmul, a, b)]
        calls += [partial(linear, a) for linear in baselines.prepacked(b, tokens=n)]
        seconds = min(_best_s(call, budget_s / 2) for call in calls)
        best = max(best, 2 * n**3 / seconds / 1e9)
    return best


def _measure_cuda(quick: bool) -> Floors:
    rounds = 5 if quick else 20
    source = torch.ones(1 << (28 if quick else 29), dtype=torch.float32, device="cuda")
    target = torch.zeros_like(source)

    def best_s(call: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(rounds + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        return best

    def gflops(dtype: torch.dtype) -> float:
        n = 8192 if dtype is torch.bfloat16 else 4096
        a, b = torch.randn(2, n, n, device="cuda").to(dtype)
        return 2 * n**3 / best_s(lambda: a @ b) / 1e9

    return Floors(
        copy_gbps=2 * source.nbytes / best_s(lambda: target.copy_(source)) / 1e9,
        read_gbps=source.nbytes / best_s(lambda: source.sum()) / 1e9,
        dense_gflops=gflops(torch.float32),
        dense_bf16_gflops=gflops(torch.bfloat16),
    )
