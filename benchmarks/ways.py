"""The generated tables of docs/kernels.md on what a CPU kernel does in more than one way: rows of the KL that lie near
each other or apart, one token by a weight's bitmap or by its lists, or by 2:4, what a row and a stored value cost from
the cache, conversions by instruction set, and dense products by MKL or by oneDNN.

    python benchmarks/ways.py [--json benchmarks/results/<device>/ways.json] [--write docs/kernels.md]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from generated import publish
from torch import Tensor

from pyfast import BitmapWeight, Sparse24Weight, _products, backends
from pyfast._cpu import cpu_name, last_level_cache_bytes
from pyfast.bench.timing import Rotating, cold, interleave
from pyfast.ops.nm_mask import nm_mask
from pyfast.sparse import layouts
from pyfast.sparse.layouts import IndexedLayout

ROWS, WORDS = 512, 32000
DISTANCES = {"near": 0.05, "apart": 1.0}  # of the student's logits from the teacher's, at a temperature of 4
SHAPES = ((4096, 4096), (4864, 896))
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
THREADS = 2
TOKENS = (1, 16, 128, 512)
CONVERTED = (512, 2048)
WARM = (512, 128, 1024)  # rows of the larger and of the smaller weight, columns: both fit a cache
BITMAP_TOKENS = (1, 2, 4)
LIST_TOKENS = (1, 8, 16, 32, 64)
LIST_SPARSITIES = (0.5, 0.8, 0.95)


def losses() -> list[dict[str, Any]]:
    """Milliseconds of the KL of ROWS rows, value alone and with the gradient."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        teacher = torch.randn(ROWS, WORDS).mul_(3)
        scale = torch.ones(ROWS)
        calls: dict[str, Callable[[], object]] = {}
        for distance, spread in DISTANCES.items():
            student = (teacher + spread * torch.randn(ROWS, WORDS)).to(dtype)
            for divergence in ("forward_kl", "reverse_kl"):
                for with_grad in (False, True):
                    options = (divergence, 0.0, 4.0, 4.0, 0.0, 0.0, None, None, with_grad)
                    inputs = (student, teacher.to(dtype), scale)
                    name = f"{divergence}, {'gradient' if with_grad else 'value alone'}, {distance}"
                    calls[name] = lambda inputs=inputs, options=options: torch.ops.pyfast.distill_kl(*inputs, *options)
        for name, timing in interleave(calls, budget_s=4.0).items():
            divergence, wanted, distance = name.split(", ")
            row = {"dtype": str(dtype).removeprefix("torch."), "divergence": divergence, "wanted": wanted}
            found.append({**row, "distance": distance, "ms": timing.ms})
    return found


def one_token() -> list[dict[str, Any]]:
    """Microseconds of a product with one token, float32, cold weights, by ISA."""
    found = []
    for n, k in SHAPES:
        dense, x = torch.randn(n, k), torch.randn(1, k)
        for sparsity in SPARSITIES:
            mask = torch.rand(n, k) >= sparsity

            def weight(dense: torch.Tensor = dense, mask: torch.Tensor = mask) -> BitmapWeight:
                return BitmapWeight.from_dense(dense, mask=mask)

            cache = last_level_cache_bytes()
            bitmaps = cold(weight, weight().nbytes, cache)
            lists = cold(lambda make=weight: IndexedLayout.of(make()), IndexedLayout.of(weight()).nbytes, cache)

            def by_bitmap(ring: Rotating[BitmapWeight] = bitmaps, x: torch.Tensor = x, n: int = n) -> object:
                one = ring()
                tables = (one.values, one.bitmaps, one.offsets)
                return torch.ops.pyfast.bitmap_linear(x, *tables, None, None, n, 0, None)

            def by_lists(ring: Rotating[IndexedLayout] = lists, x: torch.Tensor = x) -> object:
                return ring().linear(x, None, 0, None)

            for isa in backends.isas_supported():
                if isa == "serial":
                    continue
                with backends.isa(isa):
                    timings = interleave({"bitmap": by_bitmap, "lists": by_lists}, budget_s=0.5)
                row = {"n": n, "k": k, "sparsity": sparsity, "isa": isa}
                found.append({**row, **{f"{way}_us": 1e3 * timing.ms for way, timing in timings.items()}})
    return found


def two_four() -> list[dict[str, Any]]:
    """Microseconds of one token by a cold 2:4 weight, and the bytes of the weight a nanosecond."""
    found = []
    for (n, k), dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        dense, x = torch.randn(n, k).to(dtype), torch.randn(1, k).to(dtype)

        def weight(dense: Tensor = dense) -> Sparse24Weight:
            return Sparse24Weight.from_dense(dense, mask=nm_mask(dense.float().abs(), 2, 4))

        ring = cold(weight, (nbytes := weight().nbytes), last_level_cache_bytes())

        def by_two_four(ring: Rotating[Sparse24Weight] = ring, x: Tensor = x) -> object:
            one = ring()
            return torch.ops.pyfast.sparse24_linear(x, one.values, one.metadata, None, None, 0, None)

        for isa in backends.isas_supported():
            if isa == "serial":
                continue
            with backends.isa(isa):
                ms = interleave({"2:4": by_two_four}, budget_s=0.5)["2:4"].ms
            row = {"n": n, "k": k, "dtype": str(dtype).removeprefix("torch."), "isa": isa}
            found.append({**row, "us": 1e3 * ms, "gbps": nbytes / ms / 1e6})
    return found


def _warm_ns(call: Callable[[int], Callable[[], object]]) -> float:
    """Nanoseconds on one core that the rows take which the larger weight has more; the call itself drops out."""
    large, small, _ = WARM
    timings = interleave({"large": call(large), "small": call(small)}, budget_s=0.2)
    return 1e6 * (timings["large"].ms - timings["small"].ms)


def by_bitmap_warm() -> list[dict[str, Any]]:
    """Nanoseconds of one core for 64 columns of a row, of which half are stored, by the bitmap."""
    found = []
    large, small, k = WARM
    for name in ("float32", "bfloat16", "float16", "int8"):
        plain = torch.float32 if name == "int8" else getattr(torch, name)
        weights = {}
        for n in (large, small):
            weight = BitmapWeight.from_dense(torch.randn(n, k).to(plain), mask=torch.rand(n, k) < 0.5)
            weights[n] = weight.quantize() if name == "int8" else weight
        for tokens in BITMAP_TOKENS:
            x = torch.randn(tokens, k).to(plain)

            def call(n: int, weights: dict[int, BitmapWeight] = weights, x: torch.Tensor = x) -> Callable[[], object]:
                w = weights[n]
                tables = (w.values, w.bitmaps, w.offsets, w.scales)
                return lambda: torch.ops.pyfast.bitmap_linear(x, *tables, None, n, 0, None)

            for isa in backends.isas_supported():
                if isa == "serial":
                    continue
                with backends.isa(isa):
                    ns = _warm_ns(call) / ((large - small) * k / 64)
                found.append({"dtype": name, "tokens": tokens, "isa": isa, "ns": ns})
    return found


def by_lists_warm() -> list[dict[str, Any]]:
    """Nanoseconds of one core for a stored value by the indexed layout, outputs included: float32, and bfloat16 where
    the ISA multiplies it in pairs."""
    found = []
    large, small, k = WARM
    for sparsity, isa in product(LIST_SPARSITIES, backends.isas_supported()):
        if isa == "serial":
            continue
        with backends.isa(isa):
            masks = {n: torch.rand(n, k) >= sparsity for n in (large, small)}
            more = int(masks[large].sum() - masks[small].sum())
            for dtype in (torch.float32, torch.bfloat16):
                if dtype == torch.bfloat16 and not layouts.pairs(dtype):
                    continue
                made = {
                    n: IndexedLayout.of(BitmapWeight.from_dense(torch.randn(n, k).to(dtype), mask=mask))
                    for n, mask in masks.items()
                }
                row = {"sparsity": sparsity, "dtype": str(dtype).removeprefix("torch."), "isa": isa}
                for tokens in LIST_TOKENS:
                    x = torch.randn(tokens, k).to(dtype)

                    def call(n: int, made: dict[int, IndexedLayout] = made, x: Tensor = x) -> Callable[[], object]:
                        return lambda: made[n].linear(x, None, 0, None)

                    found.append({**row, "tokens": tokens, "ns": _warm_ns(call) / more})
    return found


def conversions() -> list[dict[str, Any]]:
    """Billions of elements a second that half-stored weights are converted at, by ISA. Small ones: memory that comes
    fresh from the system would take longer than the conversion."""
    found = []
    ops = torch.ops.pyfast
    n, k = CONVERTED
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        dense = nm_mask(torch.rand(n, k), 2, 4).to(dtype)
        bitmap, two_four = ops.bitmap_compress(dense), ops.sparse24_compress(dense)
        calls: dict[str, Callable[[], object]] = {
            "bitmap, scan and pack": lambda dense=dense: ops.bitmap_compress(dense),
            "bitmap, pack": lambda dense=dense, b=bitmap: ops.bitmap_gather(dense, b[1], b[2], b[0].numel()),
            "bitmap, expand": lambda b=bitmap: ops.bitmap_decompress(*b, n, k),
            "2:4, scan and pack": lambda dense=dense: ops.sparse24_compress(dense),
            "2:4, pack": lambda dense=dense, t=two_four: ops.sparse24_gather(dense, t[1]),
            "2:4, expand": lambda t=two_four: ops.sparse24_decompress(t[0], t[1], n, k),
        }
        for isa in backends.isas_supported():
            with backends.isa(isa):
                for name, timing in interleave(calls, budget_s=0.5).items():
                    row = {"dtype": str(dtype).removeprefix("torch."), "isa": isa, "conversion": name}
                    found.append({**row, "elements_per_ns": n * k / timing.ms / 1e6})
    return found


def products() -> list[dict[str, Any]]:
    """Milliseconds of a dense product of float32, cold weights that no library has packed, by each library."""
    found = []
    for n, k in SHAPES:
        cache = last_level_cache_bytes()
        ring = cold(lambda n=n, k=k: torch.randn(n, k), 4 * n * k, cache)  # type: ignore[misc]
        for tokens in TOKENS:
            x = torch.randn(tokens, k)
            calls: dict[str, Callable[[], object]] = {
                "mkl": lambda ring=ring, x=x: torch.nn.functional.linear(x, ring()),
                "onednn": lambda ring=ring, x=x: _products.onednn_linear(x, ring()),
            }
            timings = interleave(calls, budget_s=0.5)
            row = {"n": n, "k": k, "tokens": tokens}
            found.append({**row, **{f"{library}_ms": timing.ms for library, timing in timings.items()}})
    return found


def measure() -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        found = {
            "losses": losses(),
            "one_token": one_token(),
            "two_four": two_four(),
            "conversions": conversions(),
            "products": products(),
        }
        torch.set_num_threads(1)
        found |= {"by_bitmap_warm": by_bitmap_warm(), "by_lists_warm": by_lists_warm()}
        return {"device": cpu_name(), "threads": THREADS, **found}


def _by_isa(rows: list[dict[str, Any]], kind: Callable[[dict[str, Any]], str], form: str) -> list[str]:
    """A table of times, a line for each kind and ISA, a column for each number of tokens."""
    tokens = list(dict.fromkeys(r["tokens"] for r in rows))
    cells: dict[str, list[str]] = {}
    for r in rows:
        cells.setdefault(f"{kind(r)}, {r['isa']}", []).append(form.format(r["ns"]))
    head = ["| tokens | " + " | ".join(map(str, tokens)) + " |", "| --- |" + " ---: |" * len(tokens)]
    return head + [f"| {name} | " + " | ".join(shown) + " |" for name, shown in cells.items()]


def text(figures: dict[str, Any]) -> str:
    """Markdown of the tables."""
    about = f"{figures['threads']} threads."
    lines = [f"**{figures['device']}**, {about} KL of {ROWS}x{WORDS} logits, ms:", ""]
    lines += ["| rows | " + " | ".join(f"{w}, {d}" for w in ("value alone", "gradient") for d in DISTANCES) + " |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    cells: dict[str, dict[tuple[str, str], float]] = {}
    for r in figures["losses"]:
        cells.setdefault(f"`{r['divergence']}` {r['dtype']}", {})[r["wanted"], r["distance"]] = r["ms"]
    for name, found in cells.items():
        shown = [f"{found[w, d]:.2f}" for w in ("value alone", "gradient") for d in DISTANCES]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    lines += ["", "One token, float32, cold weights, µs by the bitmap / by lists:", ""]
    lines += ["| weight | " + " | ".join(f"{s:.0%}".replace("%", " %") for s in SPARSITIES) + " |"]
    lines += ["| --- |" + " ---: |" * len(SPARSITIES)]
    for n, k in SHAPES:
        for isa in dict.fromkeys(r["isa"] for r in figures["one_token"]):
            here = [r for r in figures["one_token"] if (r["n"], r["k"], r["isa"]) == (n, k, isa)]
            shown = [f"{r['bitmap_us']:.0f} / {r['lists_us']:.0f}" for r in here]
            lines.append(f"| {n}x{k}, {isa} | " + " | ".join(shown) + " |")
    lines += ["", "One token, cold 2:4 weights, µs (GB/s):", ""]
    rows = figures["two_four"]
    isas = list(dict.fromkeys(r["isa"] for r in rows))
    lines += ["| weight | " + " | ".join(isas) + " |", "| --- |" + " ---: |" * len(isas)]
    weights: dict[str, list[str]] = {}
    for r in rows:
        weights.setdefault(f"{r['n']}x{r['k']}, {r['dtype']}", []).append(f"{r['us']:.0f} ({r['gbps']:.0f})")
    lines += [f"| {name} | " + " | ".join(shown) + " |" for name, shown in weights.items()]
    lines += [
        "",
        "One core, weights in the cache, ns of a row of 64 columns by the bitmap, 50 % stored, by tokens:",
        "",
    ]
    lines += _by_isa(figures["by_bitmap_warm"], lambda r: r["dtype"], "{:.1f}")
    lines += ["", "One core, weights in the cache, ns of a stored value by lists, by tokens and sparsity:", ""]
    by_lists = figures["by_lists_warm"]
    lines += _by_isa(by_lists, lambda r: f"{r['sparsity']:.0%}, {r['dtype']}".replace("%", " %"), "{:.2f}")
    isas = list(dict.fromkeys(r["isa"] for r in figures["conversions"]))
    size = "x".join(map(str, CONVERTED))
    lines += ["", f"Conversions of a {size} weight that stores one half, 10⁹ elements a second:", ""]
    lines += ["| conversion | " + " | ".join(isas) + " |", "| --- |" + " ---: |" * len(isas)]
    rates: dict[str, list[str]] = {}
    for r in figures["conversions"]:
        rates.setdefault(f"{r['conversion']}, {r['dtype']}", []).append(f"{r['elements_per_ns']:.2g}")
    lines += [f"| {name} | " + " | ".join(shown) + " |" for name, shown in rates.items()]
    lines += ["", "Dense products of float32, cold weights, ms by MKL / by oneDNN:", ""]
    lines += ["| tokens | " + " | ".join(map(str, TOKENS)) + " |", "| --- |" + " ---: |" * len(TOKENS)]
    for n, k in SHAPES:
        here = [r for r in figures["products"] if (r["n"], r["k"]) == (n, k)]
        lines.append(f"| {n}x{k} | " + " | ".join(f"{r['mkl_ms']:.3g} / {r['onednn_ms']:.3g}" for r in here) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    publish("ways", __doc__.split("\n")[0], measure, text)
