"""Dense linears to compare with: the best one counts, whatever its library and dtype.

``F.linear`` packs its weight at every call, so that at 4 to 16 tokens it is a weak baseline; a library that
has packed the weight beforehand is about twice as fast there. All of them compute ``x @ weight.T``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from pyfast.bench.timing import Timing, cold
from pyfast.sparse.dense import Linear, f_linear, mkl_prepacked, onednn_prepacked, runs


def compiled_linear(weight: torch.Tensor, tokens: int) -> Linear:
    """``torch.compile`` of ``F.linear`` with max-autotune: the second baseline on a GPU.

    What was compiled before is forgotten, because torch stops compiling a function after a handful of
    shapes; linears that were made but not yet called are not touched by it.
    """
    torch.compiler.reset()
    compiled = torch.compile(F.linear, dynamic=False, mode="max-autotune-no-cudagraphs")
    return lambda x: compiled(x, weight)


@dataclass(frozen=True)
class Baseline:
    """A kind of dense linear in one dtype. ``make(weight, tokens)`` takes a weight of that dtype."""

    impl: str
    dtype: torch.dtype
    make: Callable[[torch.Tensor, int], Linear]

    @property
    def name(self) -> str:
        """Unique in a case, such as "mkl-prepacked float32"."""
        return f"{self.impl} {str(self.dtype).removeprefix('torch.')}"

    def cold(self, weight: torch.Tensor, tokens: int, llc_bytes: int) -> Linear:
        """The linear over copies of the weight in rotation, until they exceed four times the last-level
        cache."""
        ring = cold(lambda: self.make(weight.clone(), tokens), weight.nbytes, llc_bytes)
        return lambda x: ring()(x)


_KINDS_CPU: tuple[tuple[str, Callable[[torch.Tensor, int], Linear]], ...] = (
    ("F.linear", f_linear),
    ("mkl-prepacked", mkl_prepacked),
    ("onednn-prepacked", onednn_prepacked),
)
_KINDS_CUDA: tuple[tuple[str, Callable[[torch.Tensor, int], Linear]], ...] = (
    ("F.linear", f_linear),
    ("torch.compile", compiled_linear),
)


@lru_cache(maxsize=8)
def available(
    device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
) -> tuple[Baseline, ...]:
    """The baselines that run on this machine, found out by running each once on a small weight."""
    found = []
    kinds = _KINDS_CUDA if device.startswith("cuda") else _KINDS_CPU
    for dtype in dtypes:
        found += [Baseline(impl, dtype, make) for impl, make in kinds if runs(make, dtype, device)]
    return tuple(found)


def prepacked(weight: torch.Tensor, tokens: int) -> list[Linear]:
    """Every prepacked linear of the machine over this weight."""
    return [
        baseline.make(weight, tokens)
        for baseline in available("cpu", (weight.dtype,))
        if baseline.impl.endswith("-prepacked")
    ]


def best(timings: Mapping[str, Timing], names: list[str]) -> tuple[str, Timing]:
    """The name and the timing of the fastest (by median) of the named ones. Raises ValueError if none is
    there."""
    timed = [(name, timings[name]) for name in names if name in timings]
    if not timed:
        raise ValueError(f"names: none of {names} was timed")
    return min(timed, key=lambda item: item[1].ms)
