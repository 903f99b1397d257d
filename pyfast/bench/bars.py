"""The speed bars that the project has set itself, judged from results.

They hold for a CPU with AVX-512 on the shapes named; a run on other hardware, or a quick one, leaves them
undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

from pyfast.bench.environment import active_isa
from pyfast.bench.options import Options
from pyfast.bench.schema import Bar, Result

LOSS_SHAPES = ((512, 32000), (128, 151936))  # the vocabularies of Llama 2 and Qwen 2.5
LOSS_DTYPES = ("float32", "bfloat16")
_EVERY = tuple(product(LOSS_SHAPES, LOSS_DTYPES))
_FIRST = tuple(product(LOSS_SHAPES[:1], LOSS_DTYPES))  # torch.compile takes seconds a case
# Shapes and dtypes at which a divergence is measured and judged.
LOSS_CASES = {"forward_kl": _EVERY, "reverse_kl": _EVERY, "jsd": _FIRST, "skew_kl": _FIRST}
SPARSE_SHAPE = [4096, 4096]
HEAD_TOO = "pyfast[head too]"  # the model whose output head is sparse as well
# Scratch that does not grow with the batch is allowed: memory below this share of a logits tensor counts as
# none.
EXTRA_MEMORY_SHARE = 0.05


def losses(results: Iterable[Result], options: Options) -> list[Bar]:
    """The losses with their gradients. Between logits a bar holds for the worst of the cases in ``LOSS_CASES``:
    against the copy floor, against ``torch.compile``, and memory beyond the gradient."""
    why = undecided(options)
    rows = [] if why else [r for r in results if r.suite == "losses" and r.case.endswith("loss+gradient")]
    return [*_logit_losses(rows, why), *_topk(rows, why), *_attention(rows, why), *_fused_linear(rows, why)]


def _logit_losses(rows: list[Result], why: str) -> Iterator[Bar]:
    mine = [r for r in rows if r.op == "distill_kl"]
    for divergence, cases in LOSS_CASES.items():
        case = "loss+gradient" if divergence == "forward_kl" else f"{divergence} loss+gradient"
        found = [r for r in mine if r.case == case and r.impl == "pyfast"]
        kl = divergence in ("forward_kl", "reverse_kl")
        if kl:
            yield _worst(
                f"{divergence}: share of the copy floor", 0.55, found, cases, lambda r: r.of_floor, why, unit="of floor"
            )
        yield _worst(f"{divergence}: against torch.compile", 5.0 if kl else 3.5, found, cases, _over_compile, why)
        yield _worst(
            f"{divergence}: memory beyond the gradient",
            EXTRA_MEMORY_SHARE,
            found,
            cases,
            _extra_share,
            why,
            unit="of the logits",
            at_most=True,
        )
    avx2 = next((r for r in mine if r.impl == "pyfast[avx2]" and r.case == "loss+gradient"), None)
    yield Bar.judge(
        "forward_kl under AVX2: against torch.compile",
        2.0,
        _over_compile(avx2) if avx2 else None,
        note=f"{_label(avx2)}, {_spread(avx2)}" if avx2 else why,
    )


def _topk(rows: list[Result], why: str) -> Iterator[Bar]:
    found = [r for r in rows if (r.op, r.impl, r.dtype, r.shape[-1]) == ("topk_distill", "pyfast", "float32", 151936)]
    r = next(iter(found), None)
    yield Bar.judge(
        "top-64 of 151936 words: against our own full KL",
        2.0,
        r.metrics.get("speedup_vs_full_kl") if r else None,
        note=_spread(r) if r else why,
    )


def _attention(rows: list[Result], why: str) -> Iterator[Bar]:
    found = {r.tokens: r for r in rows if r.op == "attention_distill" and r.impl == "pyfast"}
    long, half = found.get(2048), found.get(1024)
    note = _spread(long) if long else why
    yield Bar.judge("attention, 2048 tokens: against eager", 1.0, long.speedup if long else None, note=note)
    yield Bar.judge(
        "attention: extra memory of 2048 tokens over that of 1024",
        2.2,
        _ratio(long, half),
        note=note,
        at_most=True,
    )


def _fused_linear(rows: list[Result], why: str) -> Iterator[Bar]:
    found = {r.impl: r for r in rows if r.op == "linear_distill" and "forward_kl" in r.case}
    ours = found.get("pyfast")
    note = _spread(ours) if ours else why
    yield Bar.judge(
        "fused linear: extra memory over eager's", 1 / 8, _ratio(ours, found.get("eager")), note=note, at_most=True
    )
    speed = ours.metrics.get("speedup_vs_products") if ours else None
    yield Bar.judge(
        "fused linear: time over that of its products alone", 1.1, 1 / speed if speed else None, note=note, at_most=True
    )


def _worst(
    name: str,
    required: float,
    found: list[Result],
    cases: Sequence[tuple[tuple[int, int], str]],
    figure: Callable[[Result], float | None],
    why: str,
    *,
    unit: str = "x",
    at_most: bool = False,
) -> Bar:
    """The bar for the worst of ``cases``; undecided where one of them is missing."""
    figures = [
        (value, r)
        for shape, dtype in cases
        for r in found
        if tuple(r.shape) == shape and r.dtype == dtype and (value := figure(r)) is not None
    ]
    if len(figures) < len(cases):
        return Bar.judge(name, required, None, unit=unit, note=why or "not every shape was measured", at_most=at_most)
    value, r = (max if at_most else min)(figures, key=lambda pair: pair[0])
    return Bar.judge(name, required, value, unit=unit, note=f"the worst: {_label(r)}, {_spread(r)}", at_most=at_most)


def _over_compile(r: Result) -> float | None:
    return r.metrics.get("speedup_vs_compile")


def _extra_share(r: Result) -> float | None:
    """Memory beyond the gradient, as a share of one logits tensor."""
    extra = r.metrics.get("extra_bytes")
    return None if extra is None else extra / (r.bytes / 3)


def _ratio(one: Result | None, other: Result | None) -> float | None:
    """Of their extra memory; None where it was not measured, or too little to tell."""
    pair = [r.metrics.get("extra_bytes") if r else None for r in (one, other)]
    return None if pair[0] is None or not pair[1] else pair[0] / pair[1]


def _label(r: Result) -> str:
    return f"{'x'.join(map(str, r.shape))} {r.dtype}"


SPARSE_SHAPES = (SPARSE_SHAPE, [4864, 896])
SPARSE_COLUMNS = (("bitmap", 0.5), ("bitmap", 0.8), ("bitmap", 0.9), ("bitmap", 0.95), ("2:4", 0.5))
# By tokens, in the order of the columns: against the best dense float32.
SPARSE_SPEEDUPS = {
    1: (1.75, 4.0, 5.0, 7.0, 1.75),
    16: (1.3, 2.4, 4.5, 7.0, 1.4),
    128: (1.0, 2.5, 4.0, 6.0, 1.0),
    512: (1.0, 2.3, 3.5, 5.0, 1.0),
}
CONVERSION_MWEIGHTS_PER_S = 200.0


def sparse(results: Iterable[Result], options: Options) -> list[Bar]:
    """``sparse_linear`` in float32 at every number of tokens, for the worst of two shapes, against the best dense
    float32; the note tells the same against the best dense of any dtype (a processor with bfloat16 instructions reads
    half the bytes and multiplies twice as fast). Then bfloat16 and AVX2 at one token, and the rate of conversion."""
    why = undecided(options)
    rows = [] if why else [r for r in results if r.suite == "sparse"]
    products = [r for r in rows if r.op == "sparse_linear"]
    return [*_sparse_float32(products, why), *_sparse_one_token(products, why), _conversion(rows, why)]


def _sparse_of(rows: list[Result], format: str, sparsity: float, **fields: object) -> list[Result]:
    return [
        r
        for r in rows
        if r.format == format
        and abs(r.sparsity - sparsity) < 0.005
        and all(getattr(r, name) == value for name, value in fields.items())
    ]


def _same_dtype(r: Result) -> float:
    return r.metrics.get("speedup_same_dtype", 0.0)


def _sparse_float32(products: list[Result], why: str) -> Iterator[Bar]:
    for tokens, bars_of_row in SPARSE_SPEEDUPS.items():
        for (format, sparsity), required in zip(SPARSE_COLUMNS, bars_of_row, strict=True):
            found = _sparse_of(products, format, sparsity, tokens=tokens, dtype="float32", impl="pyfast")
            found = [r for r in found if r.shape in SPARSE_SHAPES and "speedup_same_dtype" in r.metrics]
            name = f"sparse_linear float32, {tokens} token{'s' if tokens > 1 else ''}, {format} at {sparsity:.0%}"
            complete = len({tuple(r.shape) for r in found}) == len(SPARSE_SHAPES)
            worst = min(found, key=_same_dtype) if complete else None
            note = why or "not every shape was measured"
            if worst is not None:
                every = f"{worst.speedup:.2f}x the best of any dtype, {worst.baseline}; " if worst.speedup else ""
                note = f"the worst: {_label(worst)}, {worst.note or 'kernel not told'}; {every}{_spread(worst)}"
            measured = _same_dtype(worst) if worst is not None else None
            yield Bar.judge(
                f"{name}: against the best dense float32".replace("%:", " %:"), required, measured, note=note
            )


def _sparse_one_token(products: list[Result], why: str) -> Iterator[Bar]:
    for what, fields, sparsity, required in (
        ("bfloat16", {"dtype": "bfloat16", "impl": "pyfast"}, 0.5, 1.6),
        ("bfloat16", {"dtype": "bfloat16", "impl": "pyfast"}, 0.8, 2.0),
        ("float32 under AVX2", {"dtype": "float32", "impl": "pyfast[avx2]"}, 0.5, 1.4),
        ("float32 under AVX2", {"dtype": "float32", "impl": "pyfast[avx2]"}, 0.8, 2.5),
    ):
        found = _sparse_of(products, "bitmap", sparsity, tokens=1, shape=SPARSE_SHAPE, **fields)
        r = next(iter(found), None)
        any_dtype = what == "bfloat16"
        against = "the best dense of any dtype" if any_dtype else "the best dense float32"
        measured = None if r is None else r.speedup if any_dtype else _same_dtype(r)
        name = f"sparse_linear 4096x4096 {what}, 1 token, bitmap at {sparsity:.0%}: against {against}"
        yield Bar.judge(name.replace("%:", " %:"), required, measured, note=_spread(r) if r else why)


def _conversion(rows: list[Result], why: str) -> Bar:
    rates = {
        f"{r.op} {r.format}": r.metrics["mweights_per_s"]
        for r in rows
        if r.op in ("from_dense", "to_dense", "to_indexed") and "mweights_per_s" in r.metrics
    }
    slowest = min(rates, key=lambda name: rates[name]) if rates else None
    return Bar.judge(
        "conversion 4096x4096 float32, the slowest of every format and way",
        CONVERSION_MWEIGHTS_PER_S,
        rates[slowest] if slowest else None,
        unit="Mweights/s",
        note=f"slowest: {slowest}" if slowest else why,
    )


# Of a whole model at 80 %, against the fastest dense float32 one: tokens a second decoded, and of a prompt of 512 read.
MODEL = "qwen2.5-0.5b"
MODEL_SPEEDUPS = {"decode": 2.5, "prefill": 1.8}


def model(results: Iterable[Result], options: Options) -> list[Bar]:
    """A model of Qwen2.5-0.5B's dimensions in float32, its layers at 80 %, and its output head dense or at 80 % too."""
    why = undecided(options)
    rows = [] if why else [r for r in results if r.suite == "model" and r.case == MODEL]
    made = []
    for op, required in MODEL_SPEEDUPS.items():
        for head, impl in (("dense", "pyfast"), ("at 80 % too", HEAD_TOO)):
            found = _sparse_of(rows, "bitmap", 0.8, op=op, dtype="float32", impl=impl)
            r = next((r for r in found if "speedup_same_dtype" in r.metrics), None)
            name = f"{MODEL} float32, {op}, layers at 80 %, head {head}: against the fastest dense float32"
            note = _spread(r) if r else why or "not measured"
            made.append(Bar.judge(name, required, _same_dtype(r) if r else None, note=note))
    return made


def undecided(options: Options) -> str:
    """Why this run cannot judge the bars; empty if it can."""
    if options.device != "cpu":
        return "set for a CPU"
    if options.quick:
        return "not judged by a quick run"
    isa = active_isa()
    return "" if isa == "avx512" else f"set for AVX-512; this run used {isa or 'the reference'}"


def _spread(r: Result) -> str:
    return f"{r.ms:.3g} ms ({r.ms_min:.3g} to {r.ms_max:.3g})"
