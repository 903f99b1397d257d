"""Suite ``model``: a whole model, dense and compressed — decoding with the cache, prefill, bytes and memory.

The dense model runs in every dtype and with every way to multiply that the machine offers; the fastest is the
baseline. A prediction stands beside the measured speedup. For a decoded token it is the ratio of the bytes of
weights that the baseline and the compressed model read, which for removed layers is (L*p + e) / (L'*p + e):
p the bytes of a layer, e those of the head. For prefill, bound by arithmetic, the operations take the
bytes' place. Sparse models are fused and frozen (:func:`pyfast.sparse.freeze`), as one runs them.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pyfast.bench import bars, baselines, decoding, encoder, models, variants
from pyfast.bench.floors import Floors
from pyfast.bench.models import Built
from pyfast.bench.options import Options
from pyfast.bench.progress import Progress
from pyfast.bench.schema import Bar, Result
from pyfast.bench.timing import Timing
from pyfast.bench.variants import DTYPES, Compression, Variant

REMOVED = 0.22  # the part of the layers that goes, as 36 -> 28
QUICK_LAYERS = 4
HOPELESS = 1.5  # times the best in the first round: no longer a candidate for the baseline
# What is decoded on a GPU under torch.compile too: compiling a model takes some twenty seconds.
COMPILED = (Compression("2:4", 0.5), Compression("bitmap", 0.8))
OPS = ("decode", "prefill")
TOKENS = tuple(decoding.tokens_of(op) for op in OPS)

_Timings = dict[str, dict[str, Timing]]  # by operation, then by the name of the variant
_Recipe = tuple[str, Compression]  # the dtype of the weights and what is done to them


@dataclass(frozen=True)
class Case:
    """One model: a published name or the path of a checkpoint; ``layers`` cuts it, None leaves it whole."""

    model: str
    layers: int | None = None

    @property
    def id(self) -> str:
        """Short name of the case."""
        return self.model if self.layers is None else f"{self.model}, {self.layers} layers"


@dataclass
class OperationCase:
    """One operation of one model in one dtype, dense and compressed: the form that pytest-benchmark takes."""

    model: Case
    op: str
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def id(self) -> str:
        """Unique in the suite."""
        return f"{self.model.id}-{self.op}".replace(", ", "-").replace(" ", "-")

    @property
    def names(self) -> list[str]:
        """The dense model, each compression, and the removal of layers."""
        return ["dense", *(what.label for what in variants.OF_DECODERS), "layers removed"]

    def implementations(self) -> dict[str, decoding.Call]:
        """By name; each call decodes one more token, or reads the prompt once."""
        built = models.build(self.model.model, DTYPES[self.dtype], self.model.layers, device=self.device)
        made = {"dense": built.model}
        made |= {what.label: variants.compress(built.model, what, TOKENS) for what in variants.OF_DECODERS}
        gone = _last_layers(variants.config_of(built.model).num_hidden_layers)
        made["layers removed"] = variants.without_layers(built.model, gone, verify=False)
        return {name: decoding.call(model, self.op, device=self.device, seed=self.seed) for name, model in made.items()}


@dataclass
class _Dense:
    """The uncompressed model in its several shapes, and what is said of its weights.

    ``plain`` are those of ordinary linear layers by dtype, from which compressed ones are made; ``variants`` are
    those that are timed.
    """

    plain: dict[str, Variant]
    variants: list[Variant]
    name: str
    note: str


@dataclass(frozen=True)
class _Reference:
    """The best dense variant of one operation, and what of it is needed after its weights are gone."""

    variant_name: str
    label: str
    dtype: str
    ms: float
    streamed: int
    flops: int


def cases(options: Options) -> list[Case]:
    """The models of a run: the checkpoint where one is given, else the published ones (quick: cut short)."""
    if options.model_path is not None:
        return [Case(options.model_path)]
    return [Case(name, QUICK_LAYERS if options.quick else None) for name in options.models]


def operation_cases(options: Options) -> list[OperationCase]:
    """Every operation of the models of a run."""
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    return [OperationCase(case, op, dtype, options.device, options.seed) for case in cases(options) for op in OPS]


def run(options: Options, floors: Floors, progress: Progress) -> tuple[list[Result], list[Bar]]:
    """Measure every model, then the pretrained encoder. What cannot run here is said and left out."""
    results: list[Result] = []
    wanted = cases(options)
    with progress.step("model", total=len(wanted) + 1):
        for case in wanted:
            try:
                results += measure(case, options, floors, progress)
            except MemoryError as error:
                variants.tell(progress, f"model {case.id} is left out: {error}")
            progress.advance()
        if options.model_path is None:
            results += encoder.run(options, floors, progress)
        progress.advance()
    judged = options.device == "cpu" and any(case.model == bars.MODEL for case in wanted)
    return results, bars.model(results, options) if judged else []


def measure(case: Case, options: Options, floors: Floors, progress: Progress) -> list[Result]:
    """All results of one model; the checkpoint of an encoder is judged by its embeddings instead.

    Variants are timed in turn with the dense ones, as many together as memory holds. A variant that fits only
    without the dense model is made in place of it and timed alone; its note says so.

    Raises:
        ValueError: unknown model.
        MemoryError: the dense model does not fit in any dtype.
    """
    if models.describe(case.model) == "path" and not models.is_causal(models.load_config(case.model)):
        return encoder.run(options, floors, progress, path=case.model)
    with progress.step(f"{case.id}: dense weights"):
        dense = _dense(case, options)
        for plain in dense.plain.values() if options.device == "cuda" else ():
            twin = replace(plain, impl="torch.compile", ops=("decode",), compiled=True)
            dense.variants += _if_it_compiles(twin, options, progress)
    with progress.step(f"{case.id}: every dtype and library"):
        first = _time(dense.variants, options, brief=True)
        best = _references(dense.variants, first)
    recipes = [(dtype, what) for dtype in _dtypes(dense, best, options) for what in variants.OF_DECODERS]
    groups, alone = _plan(recipes, dense, options.device)
    heads = {dtype: _best_of_dtype(dense.variants, first["decode"], dtype) for dtype in dense.plain}
    dense.variants, beaten = _contenders(dense.variants, first)
    note = f"{dense.note}; beaten in a first, brief round and not timed again"
    results = _rows(beaten, first, best, dense.name, note, options, floors)
    for number, group in enumerate(groups):
        with progress.step(f"{case.id}: compressed, {number + 1} of {len(groups)}"):
            made = [_compressed(dense.plain[dtype], what, heads[dtype]) for dtype, what in group]
            if number == 0:
                made += _shortened(dense.variants, best)
                made += _compiled(dense, options, progress)
            timings = _time([*dense.variants, *made], options)
            best = _references(dense.variants, timings)
            shown = [*dense.variants, *made] if number == 0 else made
            results += _rows(shown, timings, best, dense.name, dense.note, options, floors, dense.variants)
            del made, shown
            gc.collect()
    name, note = dense.name, dense.note
    del dense, heads, beaten
    for dtype, what in alone:
        gc.collect()
        with progress.step(f"{case.id}: {what.label}"):
            built = models.build(case.model, DTYPES[dtype], case.layers, device=options.device)
            single = [_in_place(built, what, dtype)]
            timings = _time(single, options)
            results += _rows(single, timings, best, name, note, options, floors)
            del built, single
    return results


def _dense(case: Case, options: Options) -> _Dense:
    """The dense model: ordinary linear layers in every dtype that fits, packed ones where there is still
    room."""
    config = models.load_config(case.model, case.layers)
    found: list[Variant] = []
    built: Built | None = None
    refused: MemoryError | None = None
    for dtype in ("bfloat16",) if options.device == "cuda" else ("float32", "bfloat16"):
        needed = models.weight_bytes(config, DTYPES[dtype])
        if dtype == "float32" and 2 * needed > models.available_bytes(options.device):
            continue  # it would leave no room for anything beside it, and bfloat16 holds the same model
        try:
            built = models.build(case.model, DTYPES[dtype], case.layers, device=options.device)
        except MemoryError as error:
            refused = error
            continue
        found.append(Variant(Compression("dense"), built.model, dtype, "F.linear"))
    if built is None:
        raise refused or MemoryError(f"{case.id}: no dtype fits")
    sources = {plain.dtype: plain for plain in found}
    for plain in sources.values():
        for kind in baselines.available(options.device, (DTYPES[plain.dtype],)):
            room = models.available_bytes(options.device)
            if kind.impl.endswith("-prepacked") and 4 * variants.weight_bytes(plain.model) < room:
                # One token bound by memory is the same matrix-vector product in MKL, packed or not.
                found.append(_packed(plain, kind, ("prefill",) if kind.impl == "mkl-prepacked" else OPS))
    return _Dense(sources, found, built.name, built.note)


def _packed(plain: Variant, kind: baselines.Baseline, ops: tuple[str, ...]) -> Variant:
    model = variants.packed(plain.model, kind, [decoding.tokens_of(op) for op in ops])
    return Variant(plain.what, model, plain.dtype, kind.impl, ops=ops)


def _dtypes(dense: _Dense, best: Mapping[str, _Reference], options: Options) -> list[str]:
    """The dtypes of the sparse models: that of the fastest dense one, and float32 unless the run is a quick one."""
    wanted = [best["decode"].dtype] if options.quick else ["float32", best["decode"].dtype]
    return [dtype for dtype in dict.fromkeys(wanted) if dtype in dense.plain]


def _best_of_dtype(dense: Sequence[Variant], timings: Mapping[str, Timing], dtype: str) -> Variant | None:
    """The fastest uncompiled one: its head can be given to another model."""
    return variants.best_dense([v for v in dense if v.dtype == dtype and not v.compiled], timings)


def _contenders(dense: Sequence[Variant], first: _Timings) -> tuple[list[Variant], list[Variant]]:
    """The dense variants with the operations in which they may yet be the best of their dtype, and with those in which
    they are too far behind for that."""
    kept, beaten = [], []
    for variant in dense:
        able: list[str] = []
        for op in variant.ops:
            best = variants.best_dense([v for v in dense if v.dtype == variant.dtype], first[op])
            if best is not None and first[op][variant.name].ms <= HOPELESS * first[op][best.name].ms:
                able.append(op)
        unable = tuple(op for op in variant.ops if op not in able)
        kept += [replace(variant, ops=tuple(able))] if able else []
        beaten += [replace(variant, ops=unable)] if unable else []
    return kept, beaten


def _plan(recipes: Sequence[_Recipe], dense: _Dense, device: str) -> tuple[list[list[_Recipe]], list[_Recipe]]:
    """Groups of recipes that fit beside the dense model, and those that fit only in place of it."""
    room = models.available_bytes(device) * 0.9
    groups: list[list[_Recipe]] = [[]]
    alone: list[_Recipe] = []
    used = 0.0
    for dtype, what in recipes:
        bytes_dense = variants.weight_bytes(dense.plain[dtype].model)
        needed = bytes_dense * what.resident_fraction(DTYPES[dtype].itemsize)
        if needed > room:
            alone.append((dtype, what))
            continue
        if used + needed > room:
            groups.append([])
            used = 0.0
        groups[-1].append((dtype, what))
        used += needed
    return groups, alone


def _compressed(plain: Variant, what: Compression, fastest: Variant | None) -> Variant:
    """The model with its blocks compressed. A head that stays dense is that of the fastest dense variant of the dtype:
    otherwise the gain of compression would be mixed with the loss of a slower library."""
    model = variants.compress(plain.model, what, TOKENS)
    if what.head:
        return Variant(what, model, plain.dtype, bars.HEAD_TOO, "the head in the same format, untied")
    if fastest is None or fastest.impl == plain.impl:
        return Variant(what, model, plain.dtype, "pyfast")
    variants.adopt_head(model, fastest.model)
    return Variant(what, model, plain.dtype, "pyfast", f"dense head by {fastest.impl}")


def _compiled(dense: _Dense, options: Options, progress: Progress) -> list[Variant]:
    """Compressed models under torch.compile, where the dense one is timed so too."""
    made: list[Variant] = []
    for plain in dense.plain.values():
        if any(v.compiled and v.dtype == plain.dtype for v in dense.variants):
            for what in COMPILED:
                model = variants.compress(plain.model, what, TOKENS, traceable=True)
                twin = Variant(what, model, plain.dtype, "pyfast, torch.compile", ops=("decode",), compiled=True)
                made += _if_it_compiles(twin, options, progress)
    return made


def _if_it_compiles(variant: Variant, options: Options, progress: Progress) -> list[Variant]:
    """The variant; nothing, and a word about it, where torch.compile or the capture in a CUDA graph fails. What was
    compiled here is not compiled again."""
    try:
        decoding.call(variant.model, "decode", device=options.device, seed=options.seed, compiled=True)
    except Exception as error:  # of any kind: those of the compiler's backends have no common class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        variants.tell(progress, f"{variant.name} is left out: {reason}")
        return []
    return [variant]


def _in_place(built: Built, what: Compression, dtype: str) -> Variant:
    """The compressed model in place of the dense one, of which nothing is left."""
    model = variants.compress_in_place(built.model, what, TOKENS)
    note = "timed apart from the dense model: both together exceed the memory"
    return Variant(what, model, dtype, bars.HEAD_TOO if what.head else "pyfast", note)


def _shortened(dense: Sequence[Variant], best: Mapping[str, _Reference]) -> list[Variant]:
    """The model without the last layers before the final one, made from the best dense variant of each
    operation."""
    made: list[Variant] = []
    for variant in dense:
        ops = tuple(op for op in OPS if op in best and best[op].variant_name == variant.name)
        total = int(variants.config_of(variant.model).num_hidden_layers)
        gone = _last_layers(total)
        if not ops or not gone:
            continue
        model = variants.without_layers(variant.model, gone, verify=False)
        note = f"{total} layers to {total - len(gone)}, the last ones before the final layer removed"
        what = Compression("layers", len(gone) / total)
        made.append(replace(variant, what=what, model=model, note=note, ops=ops))
    return made


def _last_layers(total: int) -> range:
    """The positions that go: the last ones before the final layer; none of a model of one layer."""
    removed = min(max(1, round(REMOVED * total)), total - 1)
    return range(total - 1 - removed, total - 1)


def _time(wanted: Sequence[Variant], options: Options, *, brief: bool = False) -> _Timings:
    """Decode and prefill of all variants in turn; ``brief`` is enough to tell which of them is the
    fastest."""
    if brief:
        rounds, budget_s = {"decode": (3, 6), "prefill": (1, 3)}, 0.2
    elif options.quick:
        rounds, budget_s = {"decode": (5, 8), "prefill": (2, 3)}, 0.3
    else:
        rounds, budget_s = {"decode": (8, 16), "prefill": (3, 5)}, 0.5
    timings: _Timings = {}
    for op in OPS:
        able = [v for v in wanted if op in v.ops]
        if able:
            timings[op] = variants.time_op(
                able,
                op,
                device=options.device,
                seed=options.seed,
                rounds=rounds[op],
                budget_s=budget_s,
            )
    return timings


def _references(dense: Sequence[Variant], timings: _Timings) -> dict[str, _Reference]:
    """The best dense variant of each operation."""
    found = {}
    for op, by_name in timings.items():
        best = variants.best_dense(dense, by_name)
        if best is not None:
            found[op] = _Reference(
                best.name,
                f"{best.impl} {best.dtype}",
                best.dtype,
                by_name[best.name].ms,
                variants.streamed_bytes(best.model),
                variants.flops(best.model, decoding.PREFILL_TOKENS),
            )
    return found


def _rows(
    wanted: Sequence[Variant],
    timings: _Timings,
    best: Mapping[str, _Reference],
    name: str,
    note: str,
    options: Options,
    floors: Floors,
    dense: Sequence[Variant] = (),
) -> list[Result]:
    """A result for each variant and operation; ``dense`` are those timed in the same round."""
    results = []
    for variant in wanted:
        held = variants.weight_bytes(variant.model)
        growth = variants.peak_growth(_typical(variant, options), options.device)
        memory = {"weight_bytes": float(held)}
        if growth is not None:
            memory["peak_bytes"] = float(held + growth)
        for op in variant.ops:
            timing = timings[op][variant.name]
            tokens = decoding.tokens_of(op)
            rate = "prefill_tokens_per_s" if op == "prefill" else "tokens_per_s"
            metrics = {rate: 1000 * tokens / timing.ms, **memory, **_predicted(variant, op, best.get(op))}
            metrics |= variants.same_dtype_speedup(variant, dense, timings[op])
            results.append(
                variants.row(
                    variant,
                    timing,
                    suite="model",
                    op=op,
                    case=name,
                    shape=[1, tokens],
                    tokens=tokens,
                    floors=floors,
                    baseline=best[op].label if op in best else None,
                    baseline_ms=best[op].ms if op in best else None,
                    metrics=metrics,
                    note=note,
                )
            )
    return results


def _predicted(variant: Variant, op: str, best: _Reference | None) -> dict[str, float]:
    """The speedup that bytes (decode) or operations (prefill) let one expect, where they do.

    Nothing is predicted for the prefill of a sparse format (whether it can skip arithmetic is what is
    measured), nor across dtypes, whose arithmetic differs in speed.
    """
    if best is None or variant.dense:
        return {}
    if op == "decode":
        return {"predicted_speedup": best.streamed / variants.streamed_bytes(variant.model)}
    if variant.what.format == "layers" and variant.dtype == best.dtype:
        return {"predicted_speedup": best.flops / variants.flops(variant.model, decoding.PREFILL_TOKENS)}
    return {}


def _typical(variant: Variant, options: Options) -> decoding.Call:
    """Prefill and a few decoded tokens: the run over which peak memory is taken."""
    prompt = decoding.random_prompt(variant.model, decoding.PREFILL_TOKENS, options.seed, options.device)

    def work() -> None:
        decoder = decoding.Decoder(variant.model, prompt)
        for _ in range(2):
            decoder.step()

    return work
