"""Forms of a sparse weight that are derived for this machine: kept beside the weight, never saved.

    container (what is stored, saved and trained)
        │  read as it is                                  "direct"     nothing more in memory
        ├─ bitmap_to_indexed, sparse24_to_indexed ──►     "indexed"    CPU: about 5 bytes a stored element, 3 in pairs
        ├─ rows in slices of 32 ────────────────────►     "sliced"     GPU: about 3 bytes a stored element
        ├─ tiles of 64 x 64 dealt to lanes ─────────►     "scattered"  GPU: about 3 bytes a stored element
        └─ to_dense ──┬─────────────────────────────►     "dense"      the dense weight
                      ├─ packed by oneDNN ──────────►     "packed"     CPU: the dense weight, in oneDNN's blocks
                      └─ compressed by cuSPARSELt ──►     "cusparselt" GPU: 9/16 of the dense weight

A layout is made at the first call that wants it, which takes about as long as reading a dense weight a few times. It
belongs to one container and holds for the values it was made from. It is dropped where a tensor of the container has
another identity, version or address, after a step of any ``torch.optim`` optimizer over the values (fused ones do
not raise a tensor's version), by ``module.to()`` and by :func:`drop_layouts`. Copies and pickles of a container or a
module start without layouts. **Not seen** are values written through ``.data``, NumPy or another library: call
:func:`drop_layouts` after it.

After a change the layout is made again at the second call only: a weight that is trained and used without gradients
once between two steps would otherwise pay for it at every step.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyfast import _changes, _native, _products
from pyfast.ops.indexed_linear import indexed_linear
from pyfast.reference.epilogue import epilogue
from pyfast.sparse.cusparselt import CusparseltLayout
from pyfast.sparse.formats import SparseWeight
from pyfast.sparse.scattered import ScatteredLayout
from pyfast.sparse.sliced import SlicedLayout

POLICIES = ("auto", "indexed", "none")
SPARSE_KINDS = ("indexed", "sliced", "scattered", "cusparselt")
KINDS = (*SPARSE_KINDS, "packed", "dense")  # where two are expected to be alike the earlier one is taken
PACKED_TOKENS = 16  # oneDNN packs for a number of rows; its blocks serve any
NARROW_BLOCK_DENSITY = 0.15  # from here on a row stores enough in 128 columns

_LOCK = threading.Lock()


def _policy_from_environment() -> str:
    policy = os.environ.get("PYFAST_LAYOUTS", "auto")
    if policy not in POLICIES:
        raise ValueError(f"PYFAST_LAYOUTS: got {policy!r}, accepted: {', '.join(map(repr, POLICIES))}")
    return policy


_policy = _policy_from_environment()


def set_layouts(policy: str) -> str:
    """Which derived layouts sparse weights may keep in memory, in the whole process; returns the policy before.

    ``"auto"``: whatever is expected to be fastest, a dense copy of the weight included. ``"indexed"``: no dense copies,
    only forms that store what the weight stores.
    ``"none"``: none; every call reads the weight as it is stored. Layouts that exist stay until :func:`drop_layouts`.
    The environment variable ``PYFAST_LAYOUTS`` sets the policy at the start. ValueError for another name.
    """
    global _policy
    if policy not in POLICIES:
        raise ValueError(f"policy: got {policy!r}, accepted: {', '.join(map(repr, POLICIES))}")
    before, _policy = _policy, policy
    _changes.rise()
    return before


def policy() -> str:
    """The policy that :func:`set_layouts` has set."""
    return _policy


def allowed(kind: str) -> bool:
    """Whether the policy allows this kind of layout."""
    return _policy == "auto" or (_policy == "indexed" and kind in SPARSE_KINDS)


def panel_rows(n: int, threads: int) -> int:
    """Rows of a panel of the indexed layout: about 8 panels a thread, so that threads share evenly, each of 64 to 256
    rows, so that a block of activations is used by enough of them and rows of one length find each other."""
    return min(max(n // (8 * threads) // 16 * 16, 64), 256)


def block_columns(density: float, pairs: bool = False) -> int:
    """Columns of a block of the indexed layout: a few dozen entries of a row, whose activations fit L1."""
    return 128 if density >= NARROW_BLOCK_DENSITY and not pairs else 192


def pairs(dtype: torch.dtype) -> bool:
    """Whether the indexed layout of a weight of this dtype holds pairs, which this machine multiplies two by two."""
    cpu = _native.CPU
    return dtype == torch.bfloat16 and cpu is not None and cpu.active_isa() == "avx512" and cpu.has_avx512_bf16()


@dataclass(frozen=True)
class IndexedLayout:
    """The product driven by the stored values (``csrc/cpu/indexed_linear.h`` draws it)."""

    values: Tensor
    columns: Tensor
    starts: Tensor
    rows: Tensor
    n: int
    panel: int
    block: int

    @classmethod
    def of(cls, weight: SparseWeight) -> IndexedLayout:
        """The layout of a weight on the CPU, of any dtype that the native kernels take."""
        n, k = weight.shape
        tensors = {name: tensor.detach() for name, tensor in weight.tensors().items()}
        values, scales = tensors["values"], tensors.get("scales")
        density = values.numel() / max(n * k, 1)
        in_pairs = pairs(weight.dtype)
        panel, block = panel_rows(n, torch.get_num_threads()), block_columns(density, in_pairs)
        ops = torch.ops.pyfast
        if weight.format == "2:4":
            made = ops.sparse24_to_indexed(values, tensors["metadata"], scales, k, panel, block, in_pairs)
        else:
            made = ops.bitmap_to_indexed(
                values, tensors["bitmaps"], tensors["offsets"], scales, n, k, panel, block, in_pairs
            )
        values, columns, starts, rows = made
        return cls(values, columns, starts, rows, n, panel, block)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (self.values, self.columns, self.starts, self.rows))

    def linear(self, x: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
        """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
        layout = self.values, self.columns, self.starts, self.rows
        return indexed_linear(x, *layout, bias, self.n, self.panel, self.block, activation, mul)


@dataclass(frozen=True)
class DenseLayout:
    """The weight decompressed, for a library that packs it at every call."""

    weight: Tensor

    @classmethod
    def of(cls, weight: SparseWeight) -> DenseLayout:
        """The dense weight."""
        return cls(weight.to_dense().detach())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weight.nbytes

    def linear(self, x: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
        """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
        return epilogue(_products.linear(x, self.weight, bias), activation, mul)


@dataclass(frozen=True)
class PackedLayout:
    """The weight decompressed and packed by oneDNN."""

    packed: Tensor
    nbytes: int

    @classmethod
    def of(cls, weight: SparseWeight) -> PackedLayout:
        """The packed weight; RuntimeError where oneDNN has no kernel for the dtype."""
        whole = weight.to_dense().detach()
        return cls(torch.ops.mkldnn._reorder_linear_weight(whole, PACKED_TOKENS), whole.nbytes)

    def linear(self, x: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
        """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
        return epilogue(_products.onednn_linear(x, self.packed, bias), activation, mul)


Layout = IndexedLayout | SlicedLayout | ScatteredLayout | CusparseltLayout | DenseLayout | PackedLayout
_MAKERS: dict[str, Callable[[Any], Layout]] = {
    "indexed": IndexedLayout.of,
    "sliced": SlicedLayout.of,
    "scattered": ScatteredLayout.of,
    "cusparselt": CusparseltLayout.of,
    "dense": DenseLayout.of,
    "packed": PackedLayout.of,
}


def make(kind: str, weight: SparseWeight) -> Layout:
    """A layout of this kind, a new one: outside inference mode, so that it can be used everywhere. RuntimeError or
    ValueError where it cannot be made."""
    with torch.inference_mode(False), torch.no_grad():
        return _MAKERS[kind](weight)


@dataclass(frozen=True)
class _Stamp:
    """What the tensors of a container were when its layouts were made. ``memory`` keeps their memory from being given
    to others, so that an equal address means the same memory."""

    tensors: tuple[Tensor, ...]
    state: tuple[tuple[int, int], ...]  # version and address of each
    memory: tuple[Tensor, ...]

    @classmethod
    def of(cls, weight: SparseWeight) -> _Stamp:
        tensors = tuple(weight.tensors().values())
        state = tuple((t._version, t.data_ptr()) for t in tensors)
        return cls(tensors, state, tuple(t.detach() for t in tensors))

    def matches(self, weight: SparseWeight) -> bool:
        for now, then, state in zip(weight.tensors().values(), self.tensors, self.state, strict=True):
            if now is not then or (now._version, now.data_ptr()) != state:
                return False
        return True


class Layouts:
    """The layouts of one container. Any number of threads may ask for one at the same time; it is made once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: tuple[_Stamp, dict[str, Layout]] | None = None  # replaced as a whole
        self._changed = False
        self._refused: set[str] = set()
        self.choices: dict[Any, str] = {}  # of planning.py
        self.last: Any = None  # the Remembered call of linear.py; it may hold a layout

    def get(self, kind: str, weight: SparseWeight) -> Layout | None:
        """The layout of this kind, made where it is not there. None at the first call after a change, while a CUDA
        graph is captured, for tensors whose changes cannot be seen (made in inference mode), and, with a warning, where
        it cannot be made."""
        held = self._held
        if held is not None and kind in held[1] and held[0].matches(weight):
            return held[1][kind]
        with self._lock:
            held = self._held
            if held is not None and not held[0].matches(weight):
                held, self.last, self._changed = None, None, True
            if held is not None and kind in held[1]:
                return held[1][kind]  # another thread was faster
            if held is None:
                if any(tensor.is_inference() for tensor in weight.tensors().values()):
                    return None
                held = self._held = _Stamp.of(weight), {}
                _watch(weight.values, self)
                if self._changed:
                    self._changed = False
                    return None
            if kind in self._refused or (weight.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                return None
            try:
                layout = make(kind, weight)
            except (RuntimeError, ValueError) as error:  # out of memory, or a weight beyond what the layout can count
                self._refused.add(kind)
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"pyfast: no {kind} layout of {weight!r}, it is read as it is stored: {reason}", stacklevel=2
                )
                return None
            self._held = held[0], {**held[1], kind: layout}
            return layout

    def drop(self, *, changed: bool = False) -> None:
        """Forgets every layout; ``changed`` where the values are others now."""
        with self._lock:
            if self._held is not None:
                self._held, self.last, self._changed = None, None, changed

    def held(self) -> dict[str, int]:
        """The kinds that are in memory, with their bytes."""
        held = self._held
        return {} if held is None else {kind: layout.nbytes for kind, layout in held[1].items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Layouts:
        return Layouts()

    def __reduce__(self) -> tuple[type[Layouts], tuple[()]]:
        return Layouts, ()


def of(weight: SparseWeight) -> Layouts:
    """The layouts of a container, kept in it."""
    found: Layouts | None = weight.__dict__.get("_layouts")
    return weight.__dict__.setdefault("_layouts", Layouts()) if found is None else found


def drop_layouts(weight: SparseWeight | nn.Module) -> None:
    """Forgets the derived layouts of a weight, or of every sparse layer of a model, and frees their memory."""
    for one in _weights(weight):
        of(one).drop()


def layout_bytes(weight: SparseWeight | nn.Module) -> int:
    """Bytes that the derived layouts of a weight, or of every sparse layer of a model, hold now."""
    return sum(sum(of(one).held().values()) for one in _weights(weight))


def _weights(weight: SparseWeight | nn.Module) -> list[SparseWeight]:
    if isinstance(weight, SparseWeight):
        return [weight]
    if not isinstance(weight, nn.Module):
        raise TypeError(f"weight: got {type(weight).__name__}, accepted: a sparse weight or a torch.nn.Module")
    found = (getattr(module, "weight", None) for module in weight.modules())
    return [one for one in found if isinstance(one, SparseWeight)]


# Values that an optimizer may change, by id: the layouts made from them.
_watched: dict[int, tuple[weakref.ref[Tensor], weakref.WeakSet[Layouts]]] = {}
_hook: Any = None


def _watch(values: Tensor, layouts: Layouts) -> None:
    """Drops the layouts after any optimizer step over the values."""
    global _hook
    with _LOCK:
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_after_step)
        key = id(values)
        if key not in _watched:
            _watched[key] = weakref.ref(values, lambda _: _watched.pop(key, None)), weakref.WeakSet()
        _watched[key][1].add(layouts)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _watched:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entry = _watched.get(id(parameter))
            if entry is not None and entry[0]() is parameter:
                for layouts in list(entry[1]):
                    layouts.drop(changed=True)
