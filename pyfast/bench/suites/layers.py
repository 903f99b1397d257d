"""Suite ``layers``: does removing whole layers give the time that one expects?

A stack of blocks of a published width, with its embedding and head, is cut to fewer and fewer layers; all
depths are timed in turn. The expectation counts the head, which stays: (L*p + e) / (L'*p + e) with p and e
the bytes of a block and of the head for a decoded token, and their operations for a prefill. The stack is
shorter than the published model's, which makes the head weigh more: the prediction is for this stack.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pyfast.bench import decoding, models, variants
from pyfast.bench.floors import Floors
from pyfast.bench.options import Options
from pyfast.bench.progress import Progress
from pyfast.bench.schema import Bar, Result
from pyfast.bench.timing import Timing
from pyfast.bench.variants import DTYPES, Compression, Variant

LAYERS = 9
REMOVED = (0, 1, 2, 3)  # 0, 11, 22 and 33 % of nine layers
QUICK_LAYERS = 3
QUICK_REMOVED = (0, 1)
_NAMES = ("qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-3b")


@dataclass
class Case:
    """A stack of ``layers`` blocks of a published width, timed at every depth of ``removed``, in one
    operation."""

    model: str
    op: str
    layers: int = LAYERS
    removed: tuple[int, ...] = REMOVED
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def id(self) -> str:
        """Unique in the suite."""
        return f"{self.model}-{self.op}"

    @property
    def names(self) -> list[str]:
        """The depths, e.g. ``7 of 9 layers``."""
        return [self.name(removed) for removed in self.removed]

    def name(self, removed: int) -> str:
        """The name of the stack without ``removed`` layers."""
        return f"{self.layers - removed} of {self.layers} layers"

    def stacks(self) -> dict[str, Variant]:
        """The stacks by name; all share the weights of the deepest."""
        built = models.build(self.model, DTYPES[self.dtype], self.layers, device=self.device, seed=self.seed)
        made = {}
        for removed in self.removed:
            model = built.model
            if removed:
                last = self.layers - 1  # the final layer stays
                model = variants.without_layers(model, range(last - removed, last), verify=False)
            what = Compression("layers" if removed else "dense", removed / self.layers)
            made[self.name(removed)] = Variant(what, model, self.dtype, "F.linear", built.note)
        return made

    def implementations(self) -> dict[str, decoding.Call]:
        """By name; each call decodes one more token, or reads the prompt once."""
        return {
            name: decoding.call(variant.model, self.op, device=self.device, seed=self.seed)
            for name, variant in self.stacks().items()
        }


def cases(options: Options) -> list[Case]:
    """The stacks of a run: two widths on the CPU, a third on a GPU; quick: one width and few layers."""
    names = _NAMES[:1] if options.quick else _NAMES[:2] if options.device == "cpu" else _NAMES
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    layers, removed = (QUICK_LAYERS, QUICK_REMOVED) if options.quick else (LAYERS, REMOVED)
    return [
        Case(name, op, layers, removed, dtype, options.device, options.seed)
        for name in names
        for op in ("decode", "prefill")
    ]


def run(options: Options, floors: Floors, progress: Progress) -> tuple[list[Result], list[Bar]]:
    """Measure every stack at every depth. A width whose weights exceed the memory is said and left out."""
    results: list[Result] = []
    todo = cases(options)
    with progress.step("layers", total=len(todo)):
        for case in todo:
            try:
                with progress.step(case.id):
                    results += measure(case, options, floors)
            except MemoryError as error:
                variants.tell(progress, f"layers {case.id} is left out: {error}")
            progress.advance()
    return results, []


def measure(case: Case, options: Options, floors: Floors) -> list[Result]:
    """The results of one stack in one operation, the whole stack being the baseline."""
    stacks = case.stacks()
    rounds = {"decode": (4, 8), "prefill": (2, 4)} if options.quick else {"decode": (10, 40), "prefill": (2, 12)}
    by_variant = variants.time_op(
        list(stacks.values()),
        case.op,
        device=case.device,
        seed=case.seed,
        rounds=rounds[case.op],
        budget_s=options.budget(5.0) / len(stacks),
    )
    timings = {name: by_variant[variant.name] for name, variant in stacks.items()}
    whole = case.name(0)
    return [
        _row(case, variant, timings[name], stacks[whole], timings[whole], floors) for name, variant in stacks.items()
    ]


def _row(case: Case, variant: Variant, timing: Timing, whole: Variant, whole_timing: Timing, floors: Floors) -> Result:
    work = variants.streamed_bytes if case.op == "decode" else _operations
    tokens = decoding.tokens_of(case.op)
    rate = "tokens_per_s" if case.op == "decode" else "prefill_tokens_per_s"
    predicted = work(whole.model) / work(variant.model)
    measured = whole_timing.ms / timing.ms
    metrics = {
        rate: 1000 * tokens / timing.ms,
        "weight_bytes": float(variants.weight_bytes(variant.model)),
        "layers": float(case.layers - round(variant.what.sparsity * case.layers)),
        "predicted_speedup": predicted,
        "measured_over_predicted": measured / predicted,
    }
    return variants.row(
        variant,
        timing,
        suite="layers",
        op=case.op,
        case=f"{case.model} width, {case.layers} layers",
        shape=[1, tokens],
        tokens=tokens,
        floors=floors,
        baseline=f"{whole.impl} {whole.dtype}",
        baseline_ms=whole_timing.ms,
        metrics=metrics,
        note="the baseline is the whole stack with the same linear layers",
    )


def _operations(model: nn.Module) -> int:
    return variants.flops(model, decoding.PREFILL_TOKENS)
