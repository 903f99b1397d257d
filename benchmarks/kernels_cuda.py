"""Each CUDA kernel by itself on a GPU, beside cuBLAS and a copy: generated tables of docs/kernels-gpu.md.

    python benchmarks/kernels_cuda.py measure FILE.json [--only topk kl]
    python benchmarks/kernels_cuda.py tables benchmarks/results/*/kernels.json [--write docs/kernels-gpu.md]

What is timed are the kernels, not the public calls. Products are graphs over cold weights, as in the suite ``sparse``;
losses and conversions are calls, the cache flushed before each. A file holds the device, torch, and lists of rows:

    sparse        us of a product [tokens m, k] by [n, k]: ``dense``, ``2:4``, bitmap at 50 to 90 % by ``bitmap_linear``
                  (b50 ...), ``sliced_linear`` (s50 ...) and ``scattered_linear`` (c50 ...), and gradx70 and gradx24
                  beside dgradx, the dense one. Of builds whose kernels all began in order, or all overlapped:
                  ``sparse_in_order``, ``sparse_overlapping``; of the first form of scattered_linear, printed to 0.1 us
                  by a script that is not kept: ``scattered_first``
    kl            us, and TB/s at 3E, of loss and gradient of rows that lie apart; a copy at 2E. kl_near: of near ones
    topk          us, and TB/s at 2E, of the top-k loss (bucket) and its gradient, by cuda and by triton; a copy
    conversions   us, and TB/s at what must be moved
    grad_values   us, and bytes beyond its arguments, of the gradient to the stored values, of a bitmap and of 2:4
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from generated import measure_or_tables

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (3584, 18944))
SPARSITIES = (50, 70, 80, 90)
SLICED_TOKENS = (1, 2, 4, 8)
SCATTERED_TOKENS = (8, 16, 32)
TOKENS = (*SLICED_TOKENS, 16, 32, 64)
LOGITS = ((8192, 32000), (8192, 128256), (8192, 151936), (2048, 262144))
NAMED = (64, 256)  # words of the teacher
SECONDS = 0.25  # for all implementations of a case together
BUILDS = ("sparse_in_order", "sparse_overlapping", "sparse")

Calls = Mapping[str, Callable[[], object]]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def products(n: int, k: int) -> list[dict]:
    """Rows of ``sparse`` for one shape."""
    import pyfast
    from pyfast._cuda_clock import Captured
    from pyfast.bench.timing import copies_needed, interleave
    from pyfast.ops import sparse24_convert
    from pyfast.sparse.scattered import ScatteredLayout
    from pyfast.sparse.sliced import SlicedLayout

    ops = torch.ops.pyfast
    copies = copies_needed(n * k // 4, torch.cuda.get_device_properties(0).L2_cache_size)
    dense = [draw(n, k) for _ in range(copies)]
    two_four = [sparse24_convert.prune(one) for one in dense]
    bitmaps, sliced, scattered = {}, {}, {}
    for sparsity in SPARSITIES:
        mask = torch.rand(n, k, device="cuda") >= sparsity / 100
        weights = [pyfast.BitmapWeight.from_dense(one, mask=mask) for one in dense]
        bitmaps[sparsity] = [(one.values, one.bitmaps, one.offsets) for one in weights]
        for by_sparsity, layout in ((sliced, SlicedLayout), (scattered, ScatteredLayout)):
            first = layout.of(weights[0])
            by_sparsity[sparsity] = [first, *(copy.deepcopy(first) for _ in weights[1:])]

    def impls(tokens: int) -> dict[str, list[Callable[[], object]]]:
        x, grad = draw(tokens, k), draw(tokens, n)
        found: dict[str, list[Callable[[], object]]] = {
            "dense": [lambda w=w: F.linear(x, w) for w in dense],
            "2:4": [lambda w=w: ops.sparse24_linear_mma(x, *w, None, 0, None) for w in two_four],
        }
        for sparsity, weights in bitmaps.items():
            found[f"b{sparsity}"] = [lambda w=w: ops.bitmap_linear_few(x, *w, None, n, 0, None) for w in weights]
        for letter, by_sparsity, served in (("s", sliced, SLICED_TOKENS), ("c", scattered, SCATTERED_TOKENS)):
            for sparsity, layouts in by_sparsity.items() if tokens in served else ():
                found[f"{letter}{sparsity}"] = [lambda w=w: w.linear(x, None, 0, None) for w in layouts]
        if tokens <= 32:
            found["gradx70"] = [lambda w=w: ops.bitmap_grad_x_few(grad, *w, k) for w in bitmaps[70]]
            found["gradx24"] = [lambda w=w: ops.sparse24_grad_x_few(grad, *w, k) for w in two_four]
            found["dgradx"] = [lambda w=w: grad @ w for w in dense]
        return found

    rows = []
    for tokens in TOKENS:
        graphs = {impl: Captured(calls) for impl, calls in impls(tokens).items()}
        for impl, timing in interleave(graphs, device="cuda", budget_s=SECONDS, calls=copies).items():
            rows.append(
                {"n": n, "k": k, "m": tokens, "impl": impl, "us": 1e3 * timing.ms, "us_min": 1e3 * timing.ms_min}
            )
    return rows


def gradients(n: int, k: int) -> list[dict]:
    """Rows of ``grad_values`` for one shape: the gradient to the stored values, of 70 % and of 2:4, at 8192 tokens, and
    its memory."""
    import pyfast
    from pyfast.bench.timing import interleave
    from pyfast.ops import sparse24_convert

    ops = torch.ops.pyfast
    weight = pyfast.BitmapWeight.from_dense(draw(n, k), mask=torch.rand(n, k, device="cuda") >= 0.7)
    x, grad = draw(8192, k), draw(8192, n)
    tables, stored = (weight.bitmaps, weight.offsets), weight.values.numel()
    metadata = sparse24_convert.prune(draw(n, k))[1]
    calls = {
        "own": lambda: ops.bitmap_grad_values(grad, x, *tables, stored),
        "dense and gather": lambda: ops.bitmap_gather(grad.T @ x, *tables, stored),
        "own 2:4": lambda: ops.sparse24_grad_values(grad, x, metadata),
        "dense and gather 2:4": lambda: ops.sparse24_gather(grad.T @ x, metadata),
    }
    rows = []
    for impl, timing in interleave(calls, device="cuda", budget_s=SECONDS).items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls[impl]()
        peak = torch.cuda.max_memory_allocated() - before
        rows.append({"n": n, "k": k, "impl": impl, "us": 1e3 * timing.ms, "extra_bytes": peak})
    return rows


def losses(rows: int, words: int, near: bool = False) -> list[dict]:
    """Rows of ``kl`` for one shape; ``near``: of a student that is the teacher and noise."""
    from pyfast.ops.distill_kl import DIVERGENCES

    student, teacher, scale = draw(rows, words), draw(rows, words), torch.ones(rows, device="cuda")
    if near:
        student = teacher + 0.01 * student
    target = torch.empty_like(teacher)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(teacher)}
    for name in DIVERGENCES:
        options = (student, teacher, scale, name, 0.5, 1.0, 1.0, 0.0, 0.0, None, None, True)
        calls[f"{name} cuda"] = lambda options=options: torch.ops.pyfast.distill_kl(*options)
        calls[f"{name} triton"] = lambda options=options: torch.ops.pyfast.distill_kl_triton(*options)
    moved = {impl: (2 if impl == "copy" else 3) * teacher.nbytes for impl in calls}
    return [{"rows": rows, "words": words, **row} for row in timed(calls, moved)]


def topk_losses(rows: int, words: int) -> list[dict]:
    """Rows of ``topk`` for one shape."""
    student, teacher, scale = draw(rows, words), draw(rows, words), torch.ones(rows, device="cuda")
    target = torch.empty_like(student)
    found = []
    for named in NAMED:
        entries, ids = teacher.float().log_softmax(-1).topk(named)
        inputs = (student, ids, entries.double(), scale, "bucket", 1.0, True)
        calls: dict[str, Callable[[], object]] = {
            "copy": lambda: target.copy_(teacher),
            "cuda": lambda inputs=inputs: torch.ops.pyfast.topk_distill_cuda(*inputs),
            "triton": lambda inputs=inputs: torch.ops.pyfast.topk_distill_triton(*inputs),
        }
        moved = dict.fromkeys(calls, 2 * student.nbytes)
        found += [{"rows": rows, "words": words, "named": named, **row} for row in timed(calls, moved)]
    return found


def conversions(n: int, k: int) -> list[dict]:
    """Rows of ``conversions`` for one shape."""
    import pyfast
    from pyfast.ops import bitmap_convert, sparse24_convert

    ops = torch.ops.pyfast
    dense, scores = draw(n, k), torch.rand(n, k, device="cuda")
    half, target = torch.where(torch.rand(n, k, device="cuda") < 0.5, dense, 0), torch.empty_like(dense)
    bitmap = pyfast.BitmapWeight.from_dense(half)
    pair = sparse24_convert.prune(dense)
    two_four = pyfast.Sparse24Weight(*pair, (n, k))
    tables, stored, one = (bitmap.bitmaps, bitmap.offsets), bitmap.values.numel(), dense.nbytes
    cases: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2 * one, lambda: target.copy_(dense)),
        "2:4 to dense": (one + two_four.nbytes, two_four.to_dense),
        "2:4 as stored": (one + two_four.nbytes, lambda: ops.sparse24_compress(dense)),
        "2:4 magnitude": (one + two_four.nbytes, lambda: sparse24_convert.prune(dense)),
        "2:4 scores": (3 * one + two_four.nbytes, lambda: sparse24_convert.prune(dense, scores)),
        "2:4 gather": (one + two_four.nbytes, lambda: sparse24_convert.gather(dense, pair[1])),
        "bitmap to dense": (one + bitmap.nbytes, bitmap.to_dense),
        "bitmap scan": (one + bitmap.bitmaps.nbytes, lambda: ops.bitmap_scan(half)),
        "bitmap gather": (one + bitmap.nbytes, lambda: bitmap_convert.gather(half, *tables, stored)),
    }
    moved = {impl: nbytes for impl, (nbytes, _) in cases.items()}
    return [{"n": n, "k": k, **row} for row in timed({impl: call for impl, (_, call) in cases.items()}, moved)]


def timed(calls: Calls, moved: Mapping[str, int]) -> list[dict]:
    from pyfast.bench.timing import interleave

    timings = interleave(calls, device="cuda", budget_s=SECONDS)
    return [{"impl": impl, "us": 1e3 * t.ms, "tbs": moved[impl] / t.ms / 1e9} for impl, t in timings.items()]


def measure(path: Path, only: list[str] | None) -> None:
    """Writes ``path`` after each list, so that a run cut short leaves what it had. ``only``: the lists to measure; the
    others of the file stay."""
    found: dict = json.loads(path.read_text()) if only and path.exists() else {}
    found |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    parts: dict[str, tuple[Callable[[int, int], list[dict]], tuple[tuple[int, int], ...]]] = {
        "sparse": (products, SHAPES),
        "kl": (losses, LOGITS),
        "kl_near": (partial(losses, near=True), LOGITS[1:2]),
        "topk": (topk_losses, LOGITS[1:3]),
        "conversions": (conversions, SHAPES[:2]),
        "grad_values": (gradients, SHAPES[:2]),
    }
    for name in only or parts:
        rows_of, shapes = parts[name]
        found[name] = [row for shape in shapes for row in rows_of(*shape)]
        path.write_text(json.dumps(found, indent=0) + "\n")


# ---- tables


def tables(files: list[dict]) -> dict[str, str]:
    """Markdown by the name of its block."""
    return {
        "distill-cuda": of_losses(files),
        "topk-cuda": of_topk(files),
        "sparse24-cuda": of_sparse24(files),
        "sliced-cuda": of_bitmaps(files, "s", (1, 4, 8)),
        "scattered-first": of_first_form(files),
        "scattered-cuda": of_bitmaps(files, "c", SCATTERED_TOKENS),
    }


def short_name(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` as ``H100``."""
    return device.removeprefix("NVIDIA ").split()[0]


def runs(file: dict) -> list[tuple[str, list[dict]]]:
    """The products of a file, with their device and the build that they were measured in; the present one is last."""
    device = short_name(file["device"])
    names = {name: name.removeprefix("sparse").replace("_", " ") for name in BUILDS if name in file}
    return [(f"{device},{words}" if words else device, file[name]) for name, words in names.items()]


def speedup(rows: list[dict], n: int, k: int, tokens: int, impl: str) -> str:
    us = {row["impl"]: row["us"] for row in rows if (row["n"], row["k"], row["m"]) == (n, k, tokens)}
    return f"{us['dense'] / us[impl]:.2f}" if impl in us else "-"


def table(head: list[str], texts: int, rows: list[list[str]]) -> str:
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_losses(files: list[dict]) -> str:
    """TB/s at 3E of the kernels by clusters."""
    divergences = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "mse")
    lines = []
    for file in files:
        for rows, words in LOGITS:
            here = {r["impl"]: r["tbs"] for r in file.get("kl", []) if (r["rows"], r["words"]) == (rows, words)}
            cells = [
                f"{here[impl]:.2f}" if impl in here else "-" for impl in ("copy", *(f"{d} cuda" for d in divergences))
            ]
            lines.append([short_name(file["device"]), f"{rows} x {words}", *cells])
    return table(["GPU", "rows x words", "copy", *divergences], 2, lines)


def of_topk(files: list[dict]) -> str:
    """Milliseconds, and TB/s at 2E, of both kernels of the top-k loss."""
    impls = ("copy", "cuda", "triton")
    cases: dict[tuple, dict[str, dict]] = {}
    for file in files:
        for row in file.get("topk", []):
            case = short_name(file["device"]), f"{row['rows']} x {row['words']}", str(row["named"])
            cases.setdefault(case, {})[row["impl"]] = row
    lines = [
        [*case, *(f"{here[i]['us'] / 1e3:.2f} ({here[i]['tbs']:.2f})" for i in impls)] for case, here in cases.items()
    ]
    return table(["GPU", "rows x words", "K", *impls], 3, lines)


def of_sparse24(files: list[dict]) -> str:
    """Times dense, by tokens."""
    tokens = (1, 8, 16, 32, 64)
    lines = [
        [name, f"{n} x {k}", *(speedup(rows, n, k, m, "2:4") for m in tokens)]
        for file in files
        for name, rows in runs(file)
        for n, k in SHAPES
    ]
    return table(["GPU", "n x k", *map(str, tokens[:-1]), f"{tokens[-1]} tokens"], 2, lines)


def of_bitmaps(files: list[dict], letter: str, tokens: tuple[int, ...]) -> str:
    """Times dense, by sparsity, of one kernel for bitmap weights, in the last of BUILDS that has it."""
    lines = []
    for file in files:
        having = [run for run in runs(file) if any(row["impl"][0] == letter for row in run[1])]
        for name, rows in having[-1:]:
            lines += [
                [
                    name,
                    str(m),
                    f"{n} x {k}",
                    *(speedup(rows, n, k, m, f"{letter}{sparsity}") for sparsity in SPARSITIES),
                ]
                for m in tokens
                for n, k in SHAPES
            ]
    head = ["GPU", "tokens", "n x k", *(f"{sparsity} %" for sparsity in SPARSITIES)]
    return table(head, 3, lines) if lines else "(not measured yet)"


def of_first_form(files: list[dict]) -> str:
    """Times dense of the first form of scattered_linear, in brackets of the faster of the other two."""
    lines = []
    for file in files:
        rows = file.get("scattered_first", [])
        for tokens, (n, k) in ((tokens, shape) for tokens in SCATTERED_TOKENS for shape in SHAPES if rows):
            us = {row["impl"]: row["us"] for row in rows if (row["n"], row["k"], row["m"]) == (n, k, tokens)}
            before = {s: min(us[f"{kind}{s}"] for kind in "bs" if f"{kind}{s}" in us) for s in SPARSITIES}
            cells = [f"{us['dense'] / us[f'c{s}']:.2f} ({us['dense'] / before[s]:.2f})" for s in SPARSITIES]
            lines.append([short_name(file["device"]), str(tokens), f"{n} x {k}", *cells])
    return table(["GPU", "tokens", "n x k", *(f"{sparsity} %" for sparsity in SPARSITIES)], 3, lines)


if __name__ == "__main__":
    measure_or_tables(
        __doc__.splitlines()[0],
        lambda given: measure(given.files[0], given.only),
        tables,
        name="--only",
        nargs="+",
        help="the lists to measure",
    )
