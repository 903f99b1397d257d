"""The first generated tables of docs/kernels.md: what each variant of a CPU kernel reaches on one core, by itself.

    python benchmarks/facts.py [--json benchmarks/results/<device>/facts.json] [--write docs/kernels.md]

Kernels are called through ``pyfast._host``, by name, on one thread: data in the cache ("hot") shows the rate of the
instructions, data from memory ("cold", rotating over copies beyond four times the last-level cache) what is left of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle

import numpy as np
import torch
from generated import publish

from pyfast import BitmapWeight, Sparse24Weight, _host
from pyfast.bench import hardware
from pyfast.sparse import magnitude_mask

HOT, COLD = (256, 1024), (4096, 4096)


def median_s(call: Callable[[], object], rounds: int = 25) -> float:
    """Median seconds of a call, after two to warm up."""
    call(), call()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def weights(kind: str, sparsity: float, shape: tuple[int, int]) -> Iterator[tuple]:
    """Endless arguments of the kernel: one weight where hot, copies beyond the cache where cold."""
    dense = torch.randn(*shape)
    if kind == "sparse24_linear":
        weight = Sparse24Weight.from_dense(dense, mask=magnitude_mask(dense, "2:4", 0.5))
        arrays = (weight.values.numpy(), weight.metadata.numpy().view(np.uint16))
    else:
        weight = BitmapWeight.from_dense(torch.where(torch.rand(*shape) < sparsity, 0.0, dense))
        arrays = (weight.values.numpy(), weight.bitmaps.numpy().view(np.uint64), weight.offsets.numpy())
    copies = 1 if shape == HOT else 1 + 4 * hardware.last_level_cache_bytes() // weight.nbytes
    return cycle([tuple(array.copy() for array in arrays) for _ in range(copies)])


def linear_facts() -> list[dict]:
    """Billions of weight positions a second and core, for every variant, format and sparsity."""
    facts = []
    cases = [("sparse24_linear", 0.5)] + [("bitmap_linear", s) for s in (0.5, 0.7, 0.8, 0.9)]
    for op, sparsity in cases:
        for variant in _host.variants():
            if variant == "serial" or (op == "sparse24_linear" and variant == "avx512_lookup"):
                continue
            row = {"op": op, "sparsity": sparsity, "variant": variant}
            for name, shape in (("hot", HOT), ("cold", COLD)):
                x = np.random.default_rng(0).standard_normal((1, shape[1]), dtype=np.float32)
                source, extra = weights(op, sparsity, shape), (shape[0],) if op == "bitmap_linear" else ()
                kernel = getattr(_host, op)
                seconds = median_s(lambda: kernel(x, *next(source), *extra, variant=variant))  # noqa: B023
                row[f"{name}_gpositions_s"] = shape[0] * shape[1] / seconds / 1e9
            facts.append(row)
    return facts


def loss_facts() -> list[dict]:
    """Words a second and core of the forward KL with its gradient, rows that stay in L2."""
    facts = []
    student, teacher = (np.random.default_rng(i).standard_normal((16, 16000), dtype=np.float32) * 3 for i in (0, 1))
    for variant in _host.variants():
        if variant != "avx512_lookup":
            seconds = median_s(lambda: _host.distill_kl(student, teacher, 4.0, variant=variant), 9)  # noqa: B023
            facts.append({"op": "distill_kl", "variant": variant, "gwords_s": student.size / seconds / 1e9})
    return facts


def markdown(facts: dict) -> str:
    """The facts as two tables, the device named."""
    lines = [
        f"**{facts['device']}**, one thread. Each call checks its arguments, every bitmap too; that is in the figures.",
        "",
    ]
    lines += ["| kernel, one token, float32 | variant | in cache, G positions/s | from memory, G positions/s |"]
    lines += ["| --- | --- | ---: | ---: |"]
    for f in facts["linear"]:
        name = f"{f['op']} {f['sparsity']:.0%}".replace("%", " %")
        lines.append(f"| {name} | {f['variant']} | {f['hot_gpositions_s']:.1f} | {f['cold_gpositions_s']:.1f} |")
    lines += ["", "| forward KL, loss and gradient, float32 | G words/s |", "| --- | ---: |"]
    lines += [f"| {f['variant']} | {f['gwords_s']:.3f} |" for f in facts["losses"]]
    return "\n".join(lines)


def measure() -> dict:
    torch.manual_seed(0)
    return {"device": hardware.cpu_name(), "linear": linear_facts(), "losses": loss_facts()}


if __name__ == "__main__":
    publish("facts", __doc__.splitlines()[0], measure, markdown)
