"""Which backend serves a call: one priority list an op, and a reason for every refusal.

Backends
    native      compiled CPU kernels; the ISA (avx512, avx2, serial) is chosen at run time, see :func:`isa`
    cuda        compiled CUDA kernels (``pyfast._cuda``)
    triton      Triton kernels
    reference   plain torch: the definition of the op, on any device, in any floating dtype

A public function takes ``backend=None`` (the first that accepts) or one of these names (it must accept). Inside
forward-mode AD (``torch.func.jvp``, ``torch.autograd.forward_ad``) that is the reference: the kernels give no tangents.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from pyfast import _changes, _native

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("avx512", "avx2", "serial")

_HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class OpRow:
    """One line of :func:`op_table`: an op, a backend, whether this machine can use it, and why (not)."""

    op: str
    backend: str
    available: bool
    reason: str


# Priority order, an op.
PRIORITY: dict[str, tuple[str, ...]] = {
    "distill_kl": ("native", "cuda", "triton", "reference"),
    "linear_distill": ("native", "triton", "reference"),
    "topk_distill": ("native", "cuda", "triton", "reference"),
    "attention_distill": ("native", "triton", "reference"),
    "shard_distill": ("reference",),
    "sparse24_linear": ("native", "cuda", "reference"),
    "bitmap_linear": ("native", "cuda", "reference"),
    "indexed_linear": ("native", "reference"),
    "sliced_linear": ("cuda", "reference"),
    "scattered_linear": ("cuda", "reference"),
    "sparse24_convert": ("native", "cuda", "reference"),
    "bitmap_convert": ("native", "cuda", "reference"),
    "bitmask_convert": ("native", "reference"),
    "nm_mask": ("native", "reference"),
}


# Native, but not by ISA.
_WITHOUT_ISA = {
    "bitmask_convert": "portable code, no ISA variants",
    "sparse24_convert": "the kernels of bitmap_convert",
    "linear_distill": "torch's matrix products around the kernels of distill_kl",
    "attention_distill": "torch's matrix products around the kernels of distill_kl",
}

# Conversions that move elements of one byte too: weights of int8 values.
_CONVERTS_INT8 = ("sparse24_convert", "bitmap_convert", "bitmask_convert")


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents now, which torch drops silently at an op that has only a backward."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def refusal(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot serve ``op`` for tensors on ``device`` (a device type) of ``dtype``; None if it can."""
    if backend not in PRIORITY[op]:
        return f"{op} has no {backend} kernel"
    if backend == "reference":
        return None
    if in_forward_mode():
        return f"the {backend} kernel has no forward-mode derivative"
    if backend == "native" and dtype == torch.int8 and op in _CONVERTS_INT8:
        dtype = torch.float32
    if dtype not in FAST_DTYPES:
        return f"the {backend} kernel takes float32, bfloat16 or float16, not {dtype}"
    if backend == "native":
        if device != "cpu":
            return f"the native kernel runs on the CPU, not on {device}"
        return _native.CPU_REASON or None
    if device != "cuda":
        return f"the {backend} kernel runs on CUDA devices, not on {device}"
    if backend == "triton":
        return None if _HAS_TRITON else "triton is not installed"
    return _native.CUDA_REASON or None


def select(op: str, device: str, dtype: torch.dtype, requested: str | None = None) -> str:
    """The backend that serves ``op``: ``requested`` if it accepts (ValueError with its reason if not), else the
    first of the priority list that accepts."""
    if requested is None:
        for backend in PRIORITY[op]:
            if refusal(op, backend, device, dtype) is None:
                return backend
        return "reference"
    reason = refusal(op, requested, device, dtype)
    if reason is not None:
        raise ValueError(f"backend: got {requested!r}, but {reason}; accepted: {', '.join(PRIORITY[op])}")
    return requested


def active_isa() -> str | None:
    """The ISA that the native kernels use now, or None without the compiled module."""
    return None if _native.CPU is None else _native.CPU.active_isa()


def isas_built() -> list[str]:
    """The ISAs in the compiled module, best first."""
    if _native.CPU is None:
        return []
    built = _native.CPU.build_info()["isas"].split()
    return [name for name in ISAS if name in built]


def isas_supported() -> list[str]:
    """The built ISAs that this processor can run, best first."""
    if _native.CPU is None:
        return []
    supported = _native.CPU.supported_isas()
    return [name for name in ISAS if name in supported]


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Use this ISA for the native kernels inside the ``with`` block (for the whole process: it is not a thread's
    choice). ValueError where it is unknown or this processor cannot run it."""
    if _native.CPU is None:
        raise ValueError(f"isa: {_native.CPU_REASON}")
    before = _native.CPU.active_isa()
    _native.CPU.set_active_isa(name)
    place = _changes.set_isa(1 + ISAS.index(name))
    try:
        yield
    finally:
        _native.CPU.set_active_isa(before)
        _changes.set_isa(place)


def build_info() -> dict[str, str]:
    """How the native modules were built: compiler, ISAs, torch ABI target, CUDA architectures."""
    info = {"native": "built" if _native.CPU is not None else _native.CPU_REASON}
    if _native.CPU is not None:
        info |= _native.CPU.build_info()
    info["cuda"] = "built" if _native.CUDA is not None else _native.CUDA_REASON
    if _native.CUDA is not None:
        info["cuda_architectures"] = _native.CUDA.architectures()
    return info


def release_memory() -> int:
    """Gives back the memory of large gradients and logits, which is kept for the next step (never more than was in use
    at once; docs/decisions.md says why). Returns its bytes."""
    return 0 if _native.CPU is None else _native.CPU.release_memory()


def op_table() -> list[OpRow]:
    """Every op with its backends in priority order and the reason for each refusal; the native one is split by ISA
    where it has variants."""
    rows: list[OpRow] = []
    cuda_here = torch.cuda.is_available()
    for op, backends in PRIORITY.items():
        for backend in backends:
            if backend == "native" and op in _WITHOUT_ISA:
                state = _native.CPU_REASON or f"serves CPU tensors; {_WITHOUT_ISA[op]}"
                rows.append(OpRow(op, backend, _native.CPU is not None, state))
            elif backend == "native":
                rows += [OpRow(op, name, *_isa_state(name)) for name in ISAS]
            elif backend == "reference":
                rows.append(OpRow(op, backend, True, "plain torch; float64 and every device"))
            else:
                reason = refusal(op, backend, "cuda", torch.float32)
                if reason is None and not cuda_here:
                    reason = "no CUDA device here"
                rows.append(OpRow(op, backend, reason is None, reason or "serves CUDA tensors"))
    return rows


def _isa_state(name: str) -> tuple[bool, str]:
    if name not in isas_built():
        return False, _native.CPU_REASON or "not built for this architecture"
    if name not in isas_supported():
        return False, "this processor cannot run it"
    if name == active_isa():
        return True, "in use for CPU tensors"
    return True, f"can run; PYFAST_ISA={name} selects it"
