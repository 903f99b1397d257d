"""The weights of the suite ``sparse``: dense ones, pruned at random, in each format, and copies of each in rotation.

Weights are cold: each implementation rotates over copies of its weight until they exceed four times the last-level
cache.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from pyfast._cuda_clock import l2_bytes
from pyfast.bench import hardware
from pyfast.bench.cases import DTYPES, with_isa
from pyfast.bench.timing import Rotating, cold
from pyfast.sparse import Plan, layouts, plan

ROWS_CHECKED = 256
_OF_TORCH = {"csr": "torch CSR", "cslt": "torch cuSPARSELt"}
_PATTERNS_2_OF_4 = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool
)


@dataclass(frozen=True)
class Variant:
    """A sparse weight to time: format "2:4" or "bitmap", or of torch "csr" or "cslt" (2:4 by cuSPARSELt); sparsity from
    0 to 1; dtype."""

    format: str
    sparsity: float
    dtype: str
    isa: str | None = None  # None: what a user gets

    @property
    def impl(self) -> str:
        if self.isa is not None:
            return f"pyfast[{self.isa}]"
        return _OF_TORCH.get(self.format, "pyfast")

    @property
    def shown_format(self) -> str:
        """The format as results name it."""
        return "2:4" if self.format == "cslt" else self.format

    @property
    def name(self) -> str:
        return f"{self.impl} {self.format} {self.sparsity:.2f} {self.dtype}"


def prune(weight: torch.Tensor, format: str, sparsity: float) -> torch.Tensor:
    """The weight with zeros in the pattern of a format, placed at random: exactly two of each four of a
    row, or ``sparsity`` of the whole. Of drawn weights it does not matter which ones go."""
    generator = torch.Generator(weight.device).manual_seed(1)
    rows, columns = weight.shape
    if format in ("2:4", "cslt"):
        pattern = torch.randint(0, 6, (rows, columns // 4), generator=generator, device=weight.device)
        kept = _PATTERNS_2_OF_4.to(weight.device)[pattern].reshape(rows, columns)
    else:
        kept = torch.rand(rows, columns, generator=generator, device=weight.device) >= sparsity
    return torch.where(kept, weight, 0.0)  # a product with the mask would leave -0.0, which formats keep


def build(dense: torch.Tensor, format: str) -> Any:
    """The container of a format over a pruned weight."""
    if format == "csr":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says at every first use that CSR is a beta
            csr = dense.to_sparse_csr()
            # MKL takes 32-bit indices; torch would otherwise convert them at every call.
            indices = csr.crow_indices().int(), csr.col_indices().int()
            return torch.sparse_csr_tensor(*indices, csr.values(), csr.shape, check_invariants=True)
    if format == "cslt":
        return torch._cslt_compress(dense)
    import pyfast

    kinds: dict[str, Any] = {"2:4": pyfast.Sparse24Weight, "bitmap": pyfast.BitmapWeight}
    return kinds[format].from_dense(dense)


def weight_bytes(weight: Any) -> int:
    """Bytes of a weight as its format stores it."""
    if isinstance(weight, torch.Tensor) and weight.layout is torch.sparse_csr:
        return weight.crow_indices().nbytes + weight.col_indices().nbytes + weight.values().nbytes
    return int(weight.nbytes)


@dataclass
class Sparse:
    """A variant, built: copies in rotation, bytes of one copy, non-zeros, and the first rows of the pruned
    weight to check results with."""

    variant: Variant
    ring: Rotating[Any]
    nbytes: int
    nonzeros: int
    first_rows: torch.Tensor

    def plan(self, tokens: int) -> Plan | None:
        """Who serves; None for a weight of torch's."""
        if self.variant.format in _OF_TORCH:
            return None
        return with_isa(self.variant.isa, lambda: plan(self.ring.items[0], tokens))()

    def prepare(self, x: torch.Tensor) -> None:
        """Makes the layouts of all copies, as :func:`pyfast.sparse.prepare` does for a model, and on a CPU calls each
        once: a layer in use has been called with x of this shape before, and remembers what served it."""
        found = self.plan(x.shape[0])
        if found is None:
            return
        linear = with_isa(self.variant.isa, lambda: self.linear()(x))
        for weight in self.ring.items:
            if found.kernel != "direct":
                layouts.of(weight).get(found.kernel, weight)
            if x.device.type == "cpu":
                linear()

    def linear(self) -> Callable[[torch.Tensor], torch.Tensor]:
        ring = self.ring
        if self.variant.format == "csr":
            return lambda x: (ring() @ x.T).T
        if self.variant.format == "cslt":
            return lambda x: torch._cslt_sparse_mm(ring(), x.T).T
        import pyfast

        return lambda x: pyfast.sparse_linear(x, ring())


@dataclass
class Weights:
    """Every weight of one shape, shared by the cases of that shape."""

    dense: torch.Tensor
    sparse: dict[str, Sparse]
    llc_bytes: int
    note: str

    def rounds(self) -> int:
        """Calls that reach every copy of every weight at least once."""
        return max(len(sparse.ring) for sparse in self.sparse.values())


@lru_cache(maxsize=1)
def weights_of(shape: tuple[int, int], variants: tuple[Variant, ...], device: str, seed: int) -> Weights:
    """The weights of one shape, drawn from ``seed``; those of the last call are kept."""
    generator = torch.Generator(device).manual_seed(seed)
    dense = torch.randn(*shape, generator=generator, device=device)
    llc_bytes, note = _affordable_cache(len(variants) + 5) if device == "cpu" else (l2_bytes(), "")
    built: dict[str, Sparse] = {}
    for v in variants:
        pruned = prune(dense, v.format, v.sparsity).to(DTYPES[v.dtype])
        weight = build(pruned, v.format)
        nbytes = weight_bytes(weight)
        ring = cold(_copier(weight), nbytes, llc_bytes)
        built[v.name] = Sparse(v, ring, nbytes, int(torch.count_nonzero(pruned)), pruned[:ROWS_CHECKED].clone())
    return Weights(dense, built, llc_bytes, note)


def _copier(weight: Any) -> Callable[[], Any]:
    if isinstance(weight, torch.Tensor):
        return weight.clone
    return lambda: copy.deepcopy(weight)


def _affordable_cache(implementations: int) -> tuple[int, str]:
    """The last-level cache to exceed four times, cut down where the copies would take half of the memory."""
    llc_bytes = hardware.last_level_cache_bytes()
    affordable = hardware.available_memory_bytes() // 2 // implementations // 5
    if llc_bytes <= affordable:
        return llc_bytes, ""
    return affordable, "weights only partly cold: too little memory for more copies"
