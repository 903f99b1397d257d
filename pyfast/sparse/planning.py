"""Which kernel serves a product with a sparse weight, and why: the choice that :func:`pyfast.sparse_linear` makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pyfast import _changes, _native, backends
from pyfast.sparse import calibration, cost_model, cuda_calibration, cuda_costs, cusparselt, layouts
from pyfast.sparse.cost_model import Work
from pyfast.sparse.formats import SparseWeight

NOISE = 1.05  # a kernel that takes more memory must be this much faster
_CHOICES_AT_MOST = 512  # numbers of tokens that a weight remembers
_DTYPES = (*backends.FAST_DTYPES, torch.int8)


@dataclass(frozen=True)
class Plan:
    """Who serves a product without gradients, and what it is expected to take.

    Attributes:
        kernel: ``"direct"`` (the weight as it is stored), ``"indexed"``, ``"sliced"``, ``"scattered"``,
            ``"cusparselt"``, ``"dense"`` or ``"packed"`` (derived layouts, :mod:`pyfast.sparse.layouts`).
        ms: expected milliseconds; None where there is no model of the device.
        alternatives: the same of every kernel that could serve, the dense ones always among them.
        extra_bytes: memory that the kernel keeps beside the stored weight.
        reason: why, in words.
        source: ``"calibrated"`` for this device, ``"built-in"`` or, where there is nothing to choose, ``"fixed"``.
    """

    kernel: str
    ms: float | None
    alternatives: Mapping[str, float]
    extra_bytes: int
    reason: str
    source: str


def plan(weight: SparseWeight, tokens: int) -> Plan:
    """The plan for x ``[tokens, K]`` against a weight, under the policy of :func:`pyfast.sparse.set_layouts`; on a CPU
    with torch's present number of threads and the ISA in use. Nothing is timed and nothing is made.

    Where a gradient is wanted, and under torch.compile and torch.export, the direct kernel serves whatever the plan.

    Raises:
        TypeError, ValueError: not a sparse weight; tokens below 1.
    """
    if not isinstance(weight, SparseWeight):
        raise TypeError(f"weight: got {type(weight).__name__}, accepted: Sparse24Weight or BitmapWeight")
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"tokens: got {type(tokens).__name__}, accepted: an integer, 1 or more")
    if tokens < 1:
        raise ValueError(f"tokens: got {tokens}, accepted: 1 or more")
    fixed = _fixed(weight)
    if fixed is not None:
        return Plan("direct", None, {}, 0, fixed, "fixed")
    work = work_of(weight, tokens)
    if weight.device.type == "cuda":
        on_gpu = cuda_calibration.constants(weight.device.index or 0)
        expected, source = cuda_costs.predict(on_gpu, work), on_gpu.source
        if not cusparselt.serves(weight.shape, weight.device):
            expected.pop("cusparselt", None)
        bytes_of = cuda_costs.layout_bytes
    else:
        constants = calibration.constants(work.threads, _isa())
        expected, source = cost_model.predict(constants, work), constants.source
        bytes_of = cost_model.layout_bytes
    kernel = pick(expected)
    reason = _reason(kernel, expected, work)
    return Plan(kernel, expected[kernel], expected, bytes_of(work, kernel), reason, source)


def break_even(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype = torch.float32, *, threads: int | None = None
) -> float | None:
    """The sparsity from which on a bitmap weight is expected to be no slower than the best dense linear of its dtype.

    Args:
        shape: (N, K): out_features, in_features.
        tokens: rows of x, 1 or more.
        dtype: float32, bfloat16 or float16.
        threads: None for torch's present number.

    Returns:
        A share of the elements removed, in steps of 1 %; None where even 99 % is not enough.

    Raises:
        TypeError, ValueError: a wrong argument, or no native kernels.
    """
    if _native.CPU is None:
        raise ValueError(f"break_even: {_native.CPU_REASON}")
    name = str(dtype).removeprefix("torch.")
    if dtype not in backends.FAST_DTYPES:
        raise TypeError(f"dtype: got {dtype}, accepted: float32, bfloat16, float16")
    for argument, value in (("shape", shape[0]), ("shape", shape[1]), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{argument}: got {value}, accepted: 1 or more")
    threads = threads or torch.get_num_threads()
    constants = calibration.constants(threads, _isa())
    return cost_model.break_even(constants, shape, tokens, name, threads, _native.CPU.few_tokens())


def choose(weight: SparseWeight, tokens: int) -> str:
    """The kernel of :func:`plan`, remembered by the weight: what a forward pass asks."""
    key = tokens, torch.get_num_threads(), _changes.number
    choices = layouts.of(weight).choices
    kernel = choices.get(key)
    if kernel is None:
        if len(choices) >= _CHOICES_AT_MOST:
            choices.clear()
        kernel = choices[key] = plan(weight, tokens).kernel
    return kernel


def work_of(weight: SparseWeight, tokens: int) -> Work:
    """The product in the terms of the cost model."""
    n, k = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    stored = weight.values.numel()
    cpu = _native.CPU
    few = 0
    if cpu is not None and weight.dtype in _DTYPES:
        few = cpu.few_tokens()
    pairs = layouts.pairs(weight.dtype)
    return Work(weight.format, n, k, stored, dtype, tokens, torch.get_num_threads(), few, pairs)


def _isa() -> str:
    return "none" if _native.CPU is None else _native.CPU.active_isa()


def _fixed(weight: SparseWeight) -> str | None:
    """Why there is nothing to choose, or None."""
    if weight.device.type == "cuda":
        if _native.CUDA is None:
            return f"the plain-torch reference serves: {_native.CUDA_REASON}"
        if weight.dtype == torch.int8:
            return "int8 weights are decompressed at each call on a GPU"
    elif weight.device.type != "cpu":
        return f"on {weight.device.type} the plain-torch reference serves"
    elif _native.CPU is None:
        return f"the plain-torch reference serves: {_native.CPU_REASON}"
    if weight.dtype not in _DTYPES:
        return f"the plain-torch reference serves: there is no native kernel for {weight.dtype}"
    return "the weight is empty" if 0 in weight.shape else None


def pick(expected: Mapping[str, float]) -> str:
    """The kernel to take of those whose milliseconds are expected: the direct one where nothing is."""
    if "direct" not in expected:
        return "direct"
    best = "direct"
    for kernel in layouts.KINDS:
        if kernel in expected and layouts.allowed(kernel) and expected[kernel] * NOISE < expected[best]:
            best = kernel
    return best


def _reason(kernel: str, expected: Mapping[str, float], work: Work) -> str:
    others = sorted((ms, name) for name, ms in expected.items() if name != kernel)
    told = ", ".join(f"{name} {ms:.3g} ms" for ms, name in others)
    tokens = "1 token" if work.tokens == 1 else f"{work.tokens} tokens"
    text = f"{kernel} {expected[kernel]:.3g} ms at {tokens} and {work.density:.0%} stored; {told}"
    faster = [name for ms, name in others if ms * NOISE < expected[kernel]]
    if faster:
        text += f"; {' and '.join(faster)} forbidden by set_layouts({layouts.policy()!r})"
    elif kernel == "direct" and others and others[0][0] < expected[kernel]:
        text += "; the difference is not worth the memory"
    return text
