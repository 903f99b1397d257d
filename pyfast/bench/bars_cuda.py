"""The speed bars for a GPU, judged from results. They are set for an H100; a run on another GPU, or a quick one, leaves
them undecided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from pyfast.bench.options import Options
from pyfast.bench.schema import Bar, Result

# Layers of Llama-3.1-8B and Qwen2.5-7B.
SPARSE_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (3584, 18944))
SPARSE_TOKENS = (1, 2, 4, 8, 16, 32, 64)
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
# By tokens: format, sparsity and the speedup over the best dense layer at the worst shape and number of tokens.
SPARSE_SPEEDUPS = {
    (1, 32): (("2:4", 0.5, 1.45),),
    (8, 32): (("bitmap", 0.5, 1.3), ("bitmap", 0.7, 1.8), ("bitmap", 0.8, 2.1)),
    (1, 1): (("bitmap", 0.5, 1.2), ("bitmap", 0.7, 2.0), ("bitmap", 0.8, 2.8), ("bitmap", 0.9, 4.0)),
}
NOISE = 0.95  # "never slower than dense": to within this factor
KL_VOCABULARY = 128256
KL_ROWS = 8192


def sparse(results: Iterable[Result], options: Options) -> list[Bar]:
    """``sparse_linear`` in bfloat16 against the best dense layer, and that no product is slower than dense."""
    why = undecided(options)
    rows = [] if why else [r for r in results if r.op == "sparse_linear" and r.impl == "pyfast" and r.speedup]
    found = [bar for tokens, goals in SPARSE_SPEEDUPS.items() for bar in _speedups(rows, tokens, goals, why)]
    slowest = min(rows, key=lambda r: r.speedup or 0.0, default=None)
    return [*found, _bar("sparse_linear: never slower than dense, anywhere", NOISE, slowest, why)]


def _speedups(
    rows: list[Result], tokens: tuple[int, int], goals: Iterable[tuple[str, float, float]], why: str
) -> Iterator[Bar]:
    first, last = tokens
    for format, sparsity, required in goals:
        here = [
            r for r in rows if r.format == format and abs(r.sparsity - sparsity) < 0.005 and first <= r.tokens <= last
        ]
        complete = {tuple(r.shape) for r in here} >= set(SPARSE_SHAPES)
        worst = min(here, key=lambda r: r.speedup or 0.0) if complete else None
        words = "1 token" if last == 1 else f"{first} to {last} tokens"
        name = f"sparse_linear bfloat16, {words}, {format} at {100 * sparsity:.0f} %: over the best dense"
        yield _bar(name, required, worst, why)


def losses(results: Iterable[Result], options: Options) -> list[Bar]:
    """The forward and reverse KL at the vocabulary of Llama 3: share of the copy bandwidth at the least traffic, and
    time against ``torch.compile`` and Liger."""
    why = undecided(options)
    rows = [] if why else [r for r in results if r.op == "distill_kl" and r.shape == [KL_ROWS, KL_VOCABULARY]]
    forward = {r.impl: r for r in rows if r.case == "loss+gradient"}
    reverse = next((r for r in rows if r.case == "reverse_kl loss+gradient" and r.impl == "pyfast"), None)
    mine = forward.get("pyfast")
    found = [
        Bar.judge(
            f"{name} bfloat16 {KL_ROWS}x{KL_VOCABULARY}: share of the copy floor",
            0.8,
            r.of_floor if r else None,
            unit="of floor",
            note=_spread(r) if r else why or "not measured",
        )
        for name, r in (("forward_kl", mine), ("reverse_kl", reverse))
    ]
    for other, required in (("torch.compile", 2.0), ("liger", 3.0)):
        peer = forward.get(other)
        measured = peer.ms / mine.ms if peer and mine else None
        name = f"forward_kl bfloat16 {KL_ROWS}x{KL_VOCABULARY}: against {other}"
        found.append(Bar.judge(name, required, measured, note=_spread(peer) if peer else why or "not measured"))
    return found


def undecided(options: Options) -> str:
    """Why this run cannot judge the bars; empty if it can."""
    if options.quick:
        return "not judged by a quick run"
    name = torch.cuda.get_device_name()
    return "" if "H100" in name else f"set for an H100; this run used {name}"


def _bar(name: str, required: float, worst: Result | None, why: str) -> Bar:
    note = why or "not every shape was measured"
    if worst is not None:
        size = "x".join(map(str, worst.shape))
        share = f"{worst.format} {100 * worst.sparsity:.0f} %"
        note = f"the worst: {size}, {worst.tokens} tokens, {share}, {worst.note or 'kernel not told'}, {_spread(worst)}"
    return Bar.judge(name, required, worst.speedup if worst else None, note=note)


def _spread(r: Result) -> str:
    return f"{r.ms:.3g} ms ({r.ms_min:.3g} to {r.ms_max:.3g})"
