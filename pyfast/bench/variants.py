"""A whole model in several shapes — dense, compressed, cut — that share what they have in common.

A variant is a module tree of its own whose tensors are those of the dense model wherever they were not
replaced: five variants of one model take the memory of the dense weights once and of each compressed weight
once, so they can be timed in turn in one process.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from pyfast.bench import decoding, hardware
from pyfast.bench.baselines import Baseline
from pyfast.bench.decoding import Call
from pyfast.bench.floors import Floors, floor_ms
from pyfast.bench.progress import Progress
from pyfast.bench.schema import Result
from pyfast.bench.timing import Timing, interleave

M = TypeVar("M", bound=nn.Module)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Compression:
    """One way to make a model smaller.

    ``format`` is that of the result ("dense", "2:4", "bitmap", "layers"), ``sparsity`` the part of the
    weights (or of the layers) that goes. ``choice`` says how layers were chosen, "" for the others. ``head``: the
    output head too.
    """

    format: str
    sparsity: float = 0.0
    choice: str = ""
    head: bool = False

    @property
    def label(self) -> str:
        """Short words for tables, e.g. ``bitmap 80 %``."""
        if self.format in ("dense", "2:4"):
            return self.format
        percent = f"{100 * self.sparsity:.0f} %"
        if self.format == "layers":
            return f"{percent} of the layers removed" + (f" ({self.choice})" if self.choice else "")
        return f"{self.format} {percent}" + (", head too" if self.head else "")

    def stored_fraction(self, itemsize: int) -> float:
        """Stored bytes over dense bytes: the kept values, and the bits that say where they were."""
        position_bits = {"2:4": 1.0, "bitmap": 1.1}.get(self.format, 0.0)
        return 1 - self.sparsity + position_bits / (8 * itemsize)

    def resident_fraction(self, itemsize: int) -> float:
        """Bytes in memory while it is timed over dense bytes, at most: what is stored, and for a prompt the dense
        weight where much is left, else the entries by themselves, 5 bytes each."""
        left = 1 - self.sparsity
        return self.stored_fraction(itemsize) + (1.0 if left > 0.4 else 5 / itemsize * left)


COMPRESSIONS = (
    Compression("2:4", 0.5),
    Compression("bitmap", 0.5),
    Compression("bitmap", 0.8),
    Compression("bitmap", 0.9),
)
# Of a decoder the head streams as much as many layers: what is left dense bounds what the rest can buy.
OF_DECODERS = (*COMPRESSIONS, Compression("bitmap", 0.8, head=True))


@dataclass
class Variant:
    """A model under the clock: what it is (``what``), in which dtype, which implementation multiplies, the operations
    that it is timed in, and whether torch.compile makes its kernels."""

    what: Compression
    model: nn.Module
    dtype: str
    impl: str
    note: str = ""
    ops: tuple[str, ...] = ("decode", "prefill")
    compiled: bool = False

    @property
    def name(self) -> str:
        """Unique within one measurement."""
        return f"{self.what.label} · {self.impl} · {self.dtype}"

    @property
    def dense(self) -> bool:
        """Whether this is the uncompressed model: a candidate for the baseline."""
        return self.what.format == "dense"


class PackedLinear(nn.Module):
    """A dense linear whose weight a CPU library has packed in advance: what a careful user would run.

    A packing is made for a number of tokens, and a library repacks at each call, or falls back, where
    another number arrives. So one is held for each number that will be timed; other numbers take the
    nearest.

    Args:
        linear: the layer to replace; its weight ``[N, K]`` is read, not kept.
        kind: how to pack.
        tokens: the numbers of tokens to pack for.
    """

    def __init__(self, linear: nn.Linear, kind: Baseline, tokens: Sequence[int]) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.packings = {count: kind.make(weight, count) for count in tokens}
        self.bias = linear.bias
        self.weight_numel = weight.numel()
        self.weight_nbytes = weight.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., K] -> [..., N]."""
        count = x.numel() // x.shape[-1]
        multiply = self.packings.get(count) or self.packings[min(self.packings, key=lambda n: abs(n - count))]
        y = multiply(x)
        return y if self.bias is None else y + self.bias


def shared_copy(model: M) -> M:
    """A second module tree over the same tensors: replacing a layer in it leaves ``model`` as it is."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def packed(model: M, kind: Baseline, tokens: Sequence[int], head_tokens: Sequence[int] = (1,)) -> M:
    """A copy of ``model`` in which every ``nn.Linear`` multiplies with a weight packed for these numbers of
    tokens. The head has its own: with a cache it sees one token, however many the blocks see."""
    twin = shared_copy(model)
    head = _head(twin)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child, kind, head_tokens if child is head else tokens))
    return twin


def compress(model: M, what: Compression, tokens: Sequence[int], *, traceable: bool = False) -> M:
    """A copy of ``model`` with its linear layers in a sparse format, as one runs it: fused where it has gated MLPs, and
    frozen for these numbers of tokens. The head is left dense unless it is to go too."""
    return compress_in_place(shared_copy(model), what, tokens, traceable=traceable)


def compress_in_place(model: M, what: Compression, tokens: Sequence[int], *, traceable: bool = False) -> M:
    """:func:`compress` without a copy: of the dense layers nothing is left."""
    import pyfast

    pyfast.sparsify(model, format=what.format, sparsity=what.sparsity, head=what.head)
    with suppress(ValueError):  # no gated MLP
        pyfast.sparse.fuse(model)
    return pyfast.sparse.freeze(model, tokens, traceable=traceable)


def without_layers(model: M, layers: Sequence[int], *, verify: bool) -> M:
    """A copy of ``model`` without ``layers``. ``verify`` saves, reloads and compares, which takes time and
    disk."""
    from pyfast.structured import remove_layers

    return remove_layers(shared_copy(model), list(layers), verify=verify)


def adopt_head(model: nn.Module, donor: nn.Module) -> None:
    """Give ``model`` the output head of ``donor``, a model of the same shape; nothing where either has none."""
    old, new = _head(model), _head(donor)
    if old is None or new is None:
        return
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights held, embeddings included, a tensor that two modules share counted once."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        total += _new_bytes(module, seen) + getattr(module, "weight_nbytes", 0)
    return total


def streamed_bytes(model: nn.Module) -> int:
    """Bytes of weights that one decoded token reads: all of them but the embedding, of which it reads a row, and the
    forms of frozen layers that serve more tokens. An embedding that is also the head is read whole, once."""
    from pyfast.sparse import FrozenLinear

    seen: set[int] = set()
    idle: set[nn.Module] = set()
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            idle |= {form for kernel, form in layer.forms.items() if kernel != layer.kernel(1)}
    return sum(
        _new_bytes(module, seen) + getattr(module, "weight_nbytes", 0)
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and module not in idle
    )


def flops(model: nn.Module, tokens: int) -> int:
    """Multiplications and additions of the weights with ``tokens`` tokens through the blocks and one
    through the head. Zeros that a format does not store are not counted; attention itself is not
    counted."""
    head = _head(model)
    return sum(2 * _stored_weights(m) * (1 if m is head else tokens) for m in model.modules())


def config_of(model: nn.Module) -> Any:
    """The transformers configuration of a model."""
    return model.config


def time_op(
    wanted: Sequence[Variant], op: str, *, device: str, seed: int, rounds: tuple[int, int], budget_s: float
) -> dict[str, Timing]:
    """Times of one operation, the variants in turn; ``rounds`` are the fewest and the most, ``budget_s`` is
    that of one variant. A decoder is called twice beforehand, so that its cache has grown once."""
    calls = {v.name: decoding.call(v.model, op, device=device, seed=seed, compiled=v.compiled) for v in wanted}
    low, high = rounds
    return interleave(
        calls,
        budget_s=budget_s * len(calls),
        min_rounds=low,
        max_rounds=high,
        device=device,
        warmup=2 if op == "decode" else 1,
    )


def peak_growth(run: Call, device: str) -> int | None:
    """Bytes by which memory grows while ``run`` runs, weights not counted; None where it cannot be told."""
    gc.collect()
    if not device.startswith("cuda"):
        return hardware.peak_growth_bytes(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before)


def best_dense(variants: Sequence[Variant], timings: Mapping[str, Timing]) -> Variant | None:
    """The fastest of the uncompressed variants: the one and only baseline. None where none was timed."""
    candidates = [v for v in variants if v.dense and v.name in timings]
    return min(candidates, key=lambda v: timings[v.name].ms, default=None)


def same_dtype_speedup(variant: Variant, dense: Sequence[Variant], timings: Mapping[str, Timing]) -> dict[str, float]:
    """The metric ``speedup_same_dtype``: against the best dense of the variant's own dtype, where one was
    timed."""
    best = best_dense([v for v in dense if v.dtype == variant.dtype], timings)
    if best is None:
        return {}
    return {"speedup_same_dtype": timings[best.name].ms / timings[variant.name].ms}


def row(
    variant: Variant,
    timing: Timing,
    *,
    suite: str,
    op: str,
    case: str,
    shape: list[int],
    tokens: int,
    floors: Floors,
    baseline: str | None,
    baseline_ms: float | None,
    metrics: dict[str, float],
    note: str,
) -> Result:
    """One result of a whole model. Metrics of no value (None, not finite) must be left out by the caller."""
    nbytes, operations = streamed_bytes(variant.model), flops(variant.model, tokens)
    return Result.timed(
        timing,
        floor_ms=floor_ms(nbytes, operations, floors, by="read", dtype=variant.dtype),
        baseline_ms=baseline_ms,
        baseline=baseline,
        suite=suite,
        op=op,
        case=case,
        shape=shape,
        tokens=tokens,
        format=variant.what.format,
        sparsity=variant.what.sparsity,
        dtype=variant.dtype,
        impl=variant.impl,
        bytes=nbytes,
        flops=operations,
        metrics=metrics,
        note="; ".join(part for part in (variant.note, note) if part),
    )


def tell(progress: Progress, text: str) -> None:
    """Say something the reader must not miss: above the bars on a terminal, as a warning elsewhere."""
    if progress.quiet:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    else:
        progress.say(text)


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = find() if callable(find) else None
    return head


def _new_bytes(module: nn.Module, seen: set[int]) -> int:
    """Bytes of the module's own tensors that are not in ``seen`` yet; they are put there."""
    total = 0
    for tensor in _own_tensors(module):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.numel() * tensor.element_size()
    return total


def _own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from (t for t in module.parameters(recurse=False))
    yield from (t for t in module.buffers(recurse=False))


def _stored_weights(module: nn.Module | None) -> int:
    """Weights that the module multiplies with; 0 for what is no linear layer."""
    from pyfast.sparse import FrozenLinear

    if isinstance(module, nn.Linear):
        return module.weight.numel()
    if isinstance(module, FrozenLinear):
        return module.stored
    return module.weight_numel if isinstance(module, PackedLinear) else 0
