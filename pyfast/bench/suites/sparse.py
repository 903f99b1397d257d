"""Suite ``sparse``: sparse weights beside the best dense linear, and the rate of conversion.

The task is ``x @ W.T`` with x ``[tokens, K]`` and W ``[N, K]``; pyfast's is ``sparse_linear`` with the kernel of its
plan, whose layout is made, and each copy called once, before the clock starts. Weights are cold: each implementation
rotates over copies of its weight until they exceed four times the last-level cache. On a GPU one CUDA graph holds calls
to all copies, so that launches from Python are no part of the time. All implementations of a shape and number of tokens
are timed in turn, dense ones of every dtype among them; the fastest dense one is the baseline of them all. The floor is
the time to read the weight (as that format stores it) and x and to write y, at the bandwidth of reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pyfast._cuda_clock import Captured
from pyfast.bench import bars, bars_cuda, baselines
from pyfast.bench.cases import DTYPES, cpu_variants, is_pyfast, keep_runnable, relative_error, time_case, with_isa
from pyfast.bench.floors import Floors, floor_ms
from pyfast.bench.options import Options
from pyfast.bench.progress import Progress
from pyfast.bench.schema import Bar, Result
from pyfast.bench.sparse_weights import ROWS_CHECKED, Variant, Weights, build, prune, weight_bytes, weights_of
from pyfast.sparse import layouts

CONVERSION_SHAPE = (4096, 4096)
_CSR_TOKENS = (1, 16, 128)
_COMPILED_TOKENS = (1, 16)  # and on a GPU, at the first shape, torch.compile, which searches for seconds a case


@dataclass
class SparseCase:
    """One shape (N, K) and number of tokens, with the sparse variants to time beside the dense baselines."""

    shape: tuple[int, int]
    tokens: int
    variants: tuple[Variant, ...]
    device: str = "cpu"
    seed: int = 0
    say: Callable[[str], None] = field(default=lambda text: None, repr=False)

    @property
    def id(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}-{self.tokens}"

    @property
    def names(self) -> list[str]:
        return [b.name for b in self.baselines] + [v.name for v in self.timed]

    @property
    def timed(self) -> tuple[Variant, ...]:
        """The variants that are timed at this number of tokens; cases of one shape share the weights of all."""
        return tuple(v for v in self.variants if self._is_timed(v))

    def _is_timed(self, v: Variant) -> bool:
        if v.format == "csr":
            return self.tokens in _CSR_TOKENS
        if v.format == "cslt":
            return self.tokens % 8 == 0  # what cuSPARSELt takes
        return v.isa is None or self.tokens == 1

    @property
    def baselines(self) -> tuple[baselines.Baseline, ...]:
        if self.device == "cpu":
            return baselines.available(self.device)
        found = baselines.available(self.device, (torch.bfloat16,))
        compiled = self.tokens in _COMPILED_TOKENS and self.shape == bars_cuda.SPARSE_SHAPES[0]
        return tuple(b for b in found if b.impl != "torch.compile" or compiled)

    def weights(self) -> Weights:
        """The weights of this case's shape; cases of one shape that follow each other share them."""
        return weights_of(self.shape, self.variants, self.device, self.seed)

    @property
    def calls(self) -> int:
        """How many products one call of an implementation makes."""
        return 1 if self.device == "cpu" else self.weights().rounds()

    def x(self) -> torch.Tensor:
        """The input ``[tokens, K]``, float32."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.tokens, self.shape[1], generator=generator).to(self.device)

    def implementations(self) -> dict[str, Callable[[], object]]:
        """By name; each gives y ``[tokens, N]``."""
        weights = self.weights()
        x = {name: self.x().to(dtype) for name, dtype in DTYPES.items()}
        impls: dict[str, Callable[[], object]] = {}
        for baseline in self.baselines:
            dtype = str(baseline.dtype).removeprefix("torch.")
            linear = baseline.cold(weights.dense.to(baseline.dtype), self.tokens, weights.llc_bytes)
            impls[baseline.name] = _bind(linear, x[dtype])
        for variant in self.timed:
            sparse = weights.sparse[variant.name]
            sparse.prepare(x[variant.dtype])
            impls[variant.name] = with_isa(variant.isa, _bind(sparse.linear(), x[variant.dtype]))
        if self.device != "cpu":
            impls = {name: _captured(run, self.calls) for name, run in impls.items()}
        return keep_runnable(impls, is_pyfast, self.say)

    def flops(self, nonzeros: int) -> int:
        return 2 * nonzeros * self.tokens

    def bytes(self, weight_bytes: int, dtype: str) -> int:
        return weight_bytes + self.tokens * sum(self.shape) * DTYPES[dtype].itemsize


def _bind(linear: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], object]:
    return lambda: linear(x)


def _captured(run: Callable[[], object], calls: int) -> Callable[[], object]:
    """A CUDA graph of that many calls, captured when it is called first."""
    made: list[Captured] = []

    def replay() -> object:
        if not made:
            made.append(Captured([run] * calls))
        return made[0]()

    return replay


@dataclass
class ConversionCase:
    """From a dense float32 weight to one format, or back."""

    op: str
    format: str
    shape: tuple[int, int] = CONVERSION_SHAPE
    device: str = "cpu"
    seed: int = 0
    tokens: int = 0

    @property
    def id(self) -> str:
        return f"{self.op}-{self.shape[0]}x{self.shape[1]}-{self.format}"

    @property
    def names(self) -> list[str]:
        return ["pyfast"]

    def implementations(self) -> dict[str, Callable[[], object]]:
        dense = prune(torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed)), self.format, 0.5)
        dense = dense.to(self.device)
        weight = build(dense, self.format)
        self.weight_bytes = weight_bytes(weight)
        self.error = relative_error(weight.to_dense(), dense.double())
        if self.op == "to_dense":
            return {"pyfast": weight.to_dense}
        if self.op == "to_indexed":
            return {"pyfast": lambda: layouts.IndexedLayout.of(weight)}
        return {"pyfast": lambda: build(dense, self.format)}


def cases(options: Options) -> list[SparseCase]:
    """The cases of a run. On a CPU: a square layer, the two shapes of Qwen2.5-0.5B's MLP and, unless quick,
    Llama-3.1-8B's, in float32 and bfloat16. On a GPU: layers of Llama-3.1-8B and Qwen2.5-7B in bfloat16."""
    plan = _cpu_plan(options.quick) if options.device == "cpu" else _cuda_plan(options.quick)
    return [
        SparseCase(shape, count, tuple(variants), options.device, options.seed)
        for shape, variants, counts in plan
        for count in counts
    ]


_Plan = list[tuple[tuple[int, int], list[Variant], tuple[int, ...]]]


def _cpu_plan(quick: bool) -> _Plan:
    f32, bf16 = "float32", "bfloat16"
    two_four = [Variant("2:4", 0.5, f32), Variant("2:4", 0.5, bf16)]
    few = [*two_four, *(Variant("bitmap", s, f32) for s in (0.5, 0.8, 0.9)), Variant("bitmap", 0.8, bf16)]
    if quick:
        return [((4864, 896), few, (1, 16)), ((896, 4864), few, (1,))]
    all_sparsities = [Variant("bitmap", s, f32) for s in (0.5, 0.8, 0.9, 0.95)]
    all_sparsities += [Variant("bitmap", s, bf16) for s in (0.5, 0.8)]
    csr = [Variant("csr", s, f32) for s in (0.8, 0.95)]
    avx2 = [Variant("bitmap", s, f32, "avx2") for s in (0.5, 0.8)] if "pyfast[avx2]" in cpu_variants() else []
    tokens = (1, 4, 16, 128, 512)
    return [
        ((4096, 4096), [*two_four, *all_sparsities, *csr, *avx2], tokens),
        ((4864, 896), [*two_four, *all_sparsities], tokens),
        ((896, 4864), few, (1, 16, 128)),
        ((14336, 4096), few, (1, 16, 128)),
    ]


def _cuda_plan(quick: bool) -> _Plan:
    bf16 = "bfloat16"
    bitmaps = [Variant("bitmap", s, bf16) for s in bars_cuda.SPARSITIES]
    two_four = [Variant("2:4", 0.5, bf16), Variant("cslt", 0.5, bf16)]
    csr = [Variant("csr", s, bf16) for s in (0.8, 0.9)]
    if quick:
        return [((4864, 896), [*two_four, *bitmaps], (1, 16))]
    first, *others = bars_cuda.SPARSE_SHAPES
    tokens = bars_cuda.SPARSE_TOKENS
    return [
        (first, [*two_four, *bitmaps, *csr], (*tokens, 128, 512, 2048)),
        *((shape, [*two_four, *bitmaps], (*tokens, 512)) for shape in others),
    ]


def conversions(options: Options) -> list[ConversionCase]:
    """The conversions of a run. The indexed layout is the CPU's."""
    shape = (1024, 1024) if options.quick else CONVERSION_SHAPE
    ops = ("from_dense", "to_dense", "to_indexed") if options.device == "cpu" else ("from_dense", "to_dense")
    return [
        ConversionCase(op, format, shape, options.device, options.seed) for format in ("2:4", "bitmap") for op in ops
    ]


def run(options: Options, floors: Floors, progress: Progress) -> tuple[list[Result], list[Bar]]:
    """Measure every case. ``speedup`` is against the best dense of any kind and dtype of the same case;
    the metrics hold "speedup_same_dtype" and "weight_bytes" and, from the plan, "predicted_ms",
    "predicted_speedup_same_dtype" and "extra_bytes"."""
    results: list[Result] = []
    todo, more = cases(options), conversions(options)
    with progress.step("sparse", total=len(todo) + len(more)):
        for case in todo:
            case.say = progress.say
            with progress.step(case.id):
                results += _measure(case, options, floors)
            progress.advance()
        weights_of.cache_clear()
        for conversion in more:
            with progress.step(conversion.id):
                results.append(_measure_conversion(conversion, options, floors))
            progress.advance()
    return results, (bars if options.device == "cpu" else bars_cuda).sparse(results, options)


def _measure(case: SparseCase, options: Options, floors: Floors) -> list[Result]:
    impls = case.implementations()
    # One token of the shape that is judged gets the time that steady medians take; the rest shows the picture.
    judged = case.tokens == 1 and list(case.shape) == bars.SPARSE_SHAPE
    budget_s = options.budget(2.5 if judged else 1.0 if case.tokens < 128 else 1.5)
    min_rounds = 3 if case.tokens >= 128 else 5
    if case.device != "cpu":  # a graph of dozens of products
        budget_s, min_rounds = options.budget(0.25), 7
    timings = time_case(impls, budget_s=budget_s, device=case.device, min_rounds=min_rounds, calls=case.calls)
    weights = case.weights()
    dense = {b.name: b for b in case.baselines if b.name in timings}
    best_name, best = baselines.best(timings, list(dense))
    best_of = {
        dtype: baselines.best(timings, names)[1].ms
        for dtype in ("float32", "bfloat16")
        if (names := [name for name, b in dense.items() if b.dtype is DTYPES[dtype]])
    }
    common: dict[str, Any] = {
        "suite": "sparse",
        "op": "sparse_linear",
        "case": f"{case.shape[0]}x{case.shape[1]}",
        "shape": list(case.shape),
        "tokens": case.tokens,
        "baseline": best_name,
        "baseline_ms": best.ms,
    }
    results = []
    for name, timing in timings.items():
        sparse = weights.sparse.get(name)
        dtype = sparse.variant.dtype if sparse else str(dense[name].dtype).removeprefix("torch.")
        stored = sparse.nbytes if sparse else weights.dense.numel() * DTYPES[dtype].itemsize
        nbytes = case.bytes(stored, dtype)
        flops = case.flops(sparse.nonzeros if sparse else weights.dense.numel())
        metrics = {"weight_bytes": float(stored)}
        if dtype in best_of:
            metrics["speedup_same_dtype"] = best_of[dtype] / timing.ms
        chosen = sparse.plan(case.tokens) if sparse else None
        if chosen is not None and chosen.ms is not None:
            metrics |= {"predicted_ms": chosen.ms, "extra_bytes": float(chosen.extra_bytes)}
            dense_ms = min(ms for kernel, ms in chosen.alternatives.items() if kernel in ("dense", "packed"))
            metrics["predicted_speedup_same_dtype"] = dense_ms / chosen.ms
        kernel = f"kernel: {chosen.kernel}" if chosen is not None else ""
        rows = sparse.first_rows if sparse else weights.dense[:ROWS_CHECKED].to(DTYPES[dtype])
        results.append(
            Result.timed(
                timing,
                format=sparse.variant.shown_format if sparse else "dense",
                sparsity=sparse.variant.sparsity if sparse else 0.0,
                dtype=dtype,
                impl=sparse.variant.impl if sparse else dense[name].impl,
                bytes=nbytes,
                flops=flops,
                floor_ms=floor_ms(nbytes, flops, floors, by="read", dtype=dtype),
                error=_error(case.x().to(DTYPES[dtype]), rows, impls[name]()),
                metrics=metrics,
                note="; ".join(filter(None, (kernel, weights.note))),
                **common,
            )
        )
    return results


def _error(x: torch.Tensor, weight: torch.Tensor, y: object) -> float | None:
    """Relative error of the first token's outputs for the first rows of the weight, against float64."""
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"y: a tensor was expected, got {type(y).__name__}")
    truth = x[0].double() @ weight.double().T
    return relative_error(y[0, : weight.shape[0]], truth)


def _measure_conversion(case: ConversionCase, options: Options, floors: Floors) -> Result:
    impls = keep_runnable(case.implementations(), lambda name: True, lambda text: None)
    timing = time_case(impls, budget_s=options.budget(1.0), device=case.device)["pyfast"]
    weights = case.shape[0] * case.shape[1]
    nbytes = 4 * weights + case.weight_bytes
    return Result.timed(
        timing,
        suite="sparse",
        op=case.op,
        case=f"{case.shape[0]}x{case.shape[1]}",
        shape=list(case.shape),
        tokens=0,
        format=case.format,
        sparsity=0.5,
        dtype="float32",
        impl="pyfast",
        bytes=nbytes,
        flops=0,
        floor_ms=floor_ms(nbytes, 0, floors, by="copy"),
        error=case.error,
        metrics={"mweights_per_s": weights / timing.ms / 1e3, "weight_bytes": float(case.weight_bytes)},
    )
