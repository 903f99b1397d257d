"""Times on a GPU: calls captured in CUDA graphs, so that what the host does between them is not part of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch


def l2_bytes(device: int | None = None) -> int:
    """Bytes of the second-level cache of a GPU (the current one)."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if device is None else device)
    return getattr(properties, "L2_cache_size", 0) or 50 << 20


@lru_cache(maxsize=4)
def _flush_buffer(device: int) -> torch.Tensor:
    return torch.empty(4 * l2_bytes(device), dtype=torch.uint8, device=f"cuda:{device}")


def flush_l2(times: int = 1) -> None:
    """Overwrites a buffer of four times the second-level cache on the current stream. It also keeps the GPU busy, for
    about 70 microseconds each time on an H100, while the host launches what comes next, so that launching a kernel or a
    graph is not part of the time. What the host takes longer for needs to be flushed for more ``times``."""
    buffer = _flush_buffer(torch.cuda.current_device())
    for _ in range(times):
        buffer.zero_()


class Captured:
    """Calls in one CUDA graph, one after the other; a call replays them and gives what the last one gave.

    They run once before the capture, on a stream of their own, which also compiles what compiles at its first call.
    Their outputs stay in memory as long as the graph, as does what the calls hold: a replay reads it where it lay.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = [call() for call in calls]
        self._kept = calls

    def __call__(self) -> Any:
        self._graph.replay()
        return self._outputs[-1]


def median_ms(call: Callable[[], object], rounds: int = 7) -> float:
    """Milliseconds of a call by events, the median of a few, each after :func:`flush_l2`."""
    call()
    events = []
    for _ in range(rounds):
        flush_l2()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[rounds // 2]
