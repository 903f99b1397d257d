"""The constants of the cost model, measured on this device and kept on disk.

``pyfast calibrate`` (or :func:`calibrate`) runs each kernel on weights of a few megabytes, in a few seconds. Nothing is
ever timed inside a forward pass: without a calibration the built-in constants serve.

``pyfast/sparse/cache.py`` says where. A processor, a number of threads and an ISA are a device.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfast import _changes, _native, _products
from pyfast._cpu import cpu_name, last_level_cache_bytes, takes_512_bits_in_halves
from pyfast._version import __version__
from pyfast.ops.bitmap_linear import bitmap_linear
from pyfast.ops.sparse24_linear import sparse24_linear
from pyfast.sparse import cache, dense, layouts
from pyfast.sparse.built_in import built_in
from pyfast.sparse.cost_model import (
    DENSE_TOKENS,
    DENSITIES,
    GROUPS,
    TILES,
    Constants,
    Lists,
    Rates,
    Row,
    Work,
    entries,
)
from pyfast.sparse.formats import BitmapWeight, Sparse24Weight, SparseWeight
from pyfast.sparse.layouts import PACKED_TOKENS, IndexedLayout
from pyfast.sparse.measured import number, sized

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPE = (1024, 2048)
_READ_AT_MOST = 512 << 20
_AGREE = 1.15  # two times this near each other are believed
_CALLS = (3, 30)
_SECONDS_AT_MOST = 0.1  # of one measurement
_UNSTEADY_AT_MOST = 0.1  # of all measurements

Measure = Callable[[Callable[[], object]], float]  # seconds of a call


def device(threads: int, isa: str | None) -> str:
    """Which device an entry of the file is for."""
    return f"{cpu_name()}, {threads} threads, {isa or 'no native kernels'}"


@lru_cache(maxsize=1)
def library() -> str:
    """Which library made an entry: a kernel that changed makes its constants worthless."""
    path = getattr(_native.CPU, "__file__", None)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else "none"
    return f"pyfast {__version__}, native {digest}, torch {torch.__version__}"


@lru_cache(maxsize=64)
def constants(threads: int, isa: str) -> Constants:
    """The constants for this many threads and an ISA: those of the last calibration, else the built-in ones. Read from
    the file once a process."""
    if (threads, isa) in _measured:
        return _measured[threads, isa]
    plain = cache.constants_of(device(threads, isa), library())
    if plain is not None:
        try:
            return from_json(plain)
        except (KeyError, TypeError, ValueError) as error:
            cache.damaged(error)
    packs = dense.runs(dense.onednn_prepacked, torch.float32)
    cpu = _native.CPU
    return built_in(
        isa,
        threads,
        packs=packs,
        bfloat16=_bfloat16(),
        vbmi2=cpu is not None and cpu.has_vbmi2(),
        bf16=cpu is not None and cpu.has_avx512_bf16(),
        halves=takes_512_bits_in_halves(),
    )


def _bfloat16() -> float:
    """What a dense product takes in bfloat16 where it takes 1 in float32, by the instructions of the processor."""
    if torch.cpu._is_amx_tile_supported():
        return 1 / 8
    return 1 / 2 if torch.cpu._is_avx512_bf16_supported() else 1.0


_measured: dict[tuple[int, str], Constants] = {}  # in this process


def forget() -> None:
    """Lets the file be read again, and forgets what this process has measured."""
    _measured.clear()
    constants.cache_clear()
    _changes.rise()


def save(found: Constants, threads: int, isa: str) -> Path | None:
    """Adds a calibration to the file, which is there whole or not at all, and uses it from now on in this process.
    None, with a warning, where it cannot be written."""
    constants.cache_clear()
    _changes.rise()
    _measured[threads, isa] = found
    return cache.store(device(threads, isa), library(), to_json(found))


def kept_in(threads: int, isa: str) -> Path | None:
    """The file that holds a calibration of this device by this library; None where none does."""
    return cache.kept_in(device(threads, isa), library())


def to_json(found: Constants) -> dict[str, Any]:
    """The constants as plain values."""
    return asdict(found)


def from_json(plain: dict[str, Any]) -> Constants:
    """The constants that :func:`to_json` wrote. KeyError, TypeError or ValueError for anything else."""
    rates = {
        dtype: Rates(
            bitmap=tuple(_row(row, len(DENSITIES)) for row in sized(one["bitmap"], len(GROUPS))),
            sparse24=_row(one["sparse24"], len(GROUPS)),
            bitmap_decompress=number(one["bitmap_decompress"]),
            sparse24_decompress=number(one["sparse24_decompress"]),
            dense=_row(one["dense"], len(DENSE_TOKENS)),
            packed=_row(one["packed"], len(DENSE_TOKENS)) if one["packed"] else (),
        )
        for dtype, one in plain["rates"].items()
    }
    if "float32" not in rates:
        raise ValueError("rates of float32 are missing")
    return Constants(
        source="calibrated",
        read_gbps=number(plain["read_gbps"]),
        call_us=number(plain["call_us"]),
        singles=_lists(plain["singles"]),
        pairs=None if plain["pairs"] is None else _lists(plain["pairs"]),
        rates=rates,
    )


def _lists(plain: dict[str, Any]) -> Lists:
    return Lists(_row(plain["entry"], len(TILES)), _row(plain["start"], len(TILES)), number(plain["turn"]))


def _row(values: Any, size: int) -> Row:
    return tuple(number(value) for value in sized(values, size))


class Clock:
    """Seconds of a call: the shortest of a few, believed when the next shortest is near it. Another program that takes
    a processor makes threads wait for each other, and times tenfold."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._unsteady: list[bool] = []

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        start = self._now()
        times: list[float] = []
        steady = False
        while not steady and len(times) < _CALLS[1]:
            before = self._now()
            call()
            times.append(self._now() - before)
            best = sorted(times)[:2]
            steady = len(times) >= _CALLS[0] and best[1] <= _AGREE * best[0]
            if len(times) >= _CALLS[0] and self._now() - start > _SECONDS_AT_MOST:
                break
        self._unsteady.append(not steady)
        return min(times)

    def busy(self) -> bool:
        """Whether too many times were not confirmed."""
        return sum(self._unsteady) > _UNSTEADY_AT_MOST * len(self._unsteady)


def calibrate(
    *, measure: Measure | None = None, say: Callable[[str], None] = lambda what: None, shape: tuple[int, int] = SHAPE
) -> Constants:
    """Measures the constants with torch's present number of threads and the ISA in use, saves them and gives them back.

    Args:
        measure: gives the seconds of a call; None for a :class:`Clock`.
        say: is told what is measured.
        shape: (N, K) of the weights; K a multiple of 32.

    Raises:
        RuntimeError: there are no native kernels, or the machine is too busy: nothing is saved then.
    """
    if _native.CPU is None:
        raise RuntimeError(f"calibrate: {_native.CPU_REASON}")
    generator = torch.Generator().manual_seed(0)
    clock = Clock()
    measure = measure or clock
    with torch.inference_mode():
        say("memory and calls")
        read_gbps, call_us = _read_gbps(measure), _call_us(measure)
        say("the indexed kernel")
        singles = _indexed(measure, shape, torch.float32, generator)
        pairs = _indexed(measure, shape, torch.bfloat16, generator) if layouts.pairs(torch.bfloat16) else None
        rates = {}
        for name, dtype in DTYPES.items():
            say(name)
            rates[name] = _rates(measure, shape, dtype, generator)
    if clock.busy():
        raise RuntimeError(
            "calibrate: the machine is busy with something else and times do not repeat; try again later"
        )
    found = Constants("calibrated", read_gbps, call_us, singles, pairs, rates)
    save(found, torch.get_num_threads(), _native.CPU.active_isa())
    return found


def _read_gbps(measure: Measure) -> float:
    nbytes = min(4 * last_level_cache_bytes(), _READ_AT_MOST)
    matrix = torch.ones(nbytes // 4 // 4096, 4096)
    vector = torch.ones(4096)
    return matrix.nbytes / measure(lambda: torch.mv(matrix, vector)) / 1e9


def _call_us(measure: Measure) -> float:
    weight = BitmapWeight.from_dense(torch.ones(16, 64))
    x = torch.ones(1, 64)
    return 1e6 * measure(lambda: _direct(x, weight))


def _direct(x: Tensor, weight: SparseWeight) -> Tensor:
    if isinstance(weight, Sparse24Weight):
        return sparse24_linear(x, weight.values, weight.metadata, None, None, 0, None, "native")
    tensors = weight.tensors()
    n = weight.shape[0]
    return bitmap_linear(x, weight.values, tensors["bitmaps"], tensors["offsets"], None, None, n, 0, None, "native")


def _random_bitmap(
    shape: tuple[int, int], density: float, dtype: torch.dtype, generator: torch.Generator
) -> SparseWeight:
    kept = torch.rand(shape, generator=generator) < density
    return BitmapWeight.from_dense(torch.where(kept, 1.0, 0.0).to(dtype))


def _two_four(shape: tuple[int, int], dtype: torch.dtype) -> SparseWeight:
    """Two of every four kept, which two by turns."""
    n, k = shape
    kept = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 1]], dtype=dtype)
    return Sparse24Weight.from_dense(kept.repeat(n // 4 + 1, k // 4 + 1)[:n, :k].contiguous())


def _rates(measure: Measure, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Rates:
    n, k = shape
    ps = 1e12 / (n * k)
    bitmaps = [_random_bitmap(shape, density, dtype, generator) for density in DENSITIES]
    two_four = _two_four(shape, dtype)
    x = {tokens: torch.ones(tokens, k, dtype=dtype) for tokens in sorted({*GROUPS, *DENSE_TOKENS})}

    def products(multiply: Callable[[Tensor], object], tokens: tuple[int, ...]) -> Row:
        return tuple(ps * measure(lambda count=count: multiply(x[count])) for count in tokens)  # type: ignore[misc]

    by_density = [products(lambda x, w=weight: _direct(x, w), GROUPS) for weight in bitmaps]  # type: ignore[misc]
    whole = two_four.to_dense()
    packed: Row = ()
    if dense.runs(dense.onednn_prepacked, dtype):
        packed = products(dense.onednn_prepacked(whole, PACKED_TOKENS), DENSE_TOKENS)
    return Rates(
        bitmap=tuple(zip(*by_density, strict=True)),
        sparse24=products(lambda x: _direct(x, two_four), GROUPS),
        bitmap_decompress=ps * measure(bitmaps[DENSITIES.index(0.5)].to_dense),
        sparse24_decompress=ps * measure(two_four.to_dense),
        dense=products(lambda x: _products.linear(x, whole), DENSE_TOKENS),
        packed=packed,
    )


def _indexed(measure: Measure, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Lists:
    """Times of an entry, of a list and of an activation turned: from a weight of short lists, one of long ones, and one
    of a few rows without entries, where turning is all that is done."""
    n, k = shape
    wide = 8 * k
    empty = IndexedLayout.of(_random_bitmap((16, wide), 0.0, dtype, generator))
    x = torch.ones(TILES[-1], wide, dtype=dtype)
    turn = 1e12 * measure(lambda: empty.linear(x, None, 0, None)) / x.numel()
    found = []
    short, long = 0.02, 0.5
    weights = [_random_bitmap(shape, density, dtype, generator) for density in (short, long)]
    made = [IndexedLayout.of(weight) for weight in weights]
    work = partial(Work, "bitmap", n, k, dtype="float32", tokens=1, threads=1, few_tokens=0, pairs=layouts.pairs(dtype))
    counts = [entries(work(weight.values.numel())) for weight in weights]
    for tile in TILES:
        x = torch.ones(tile, k, dtype=dtype)
        a, b = (1e12 * measure(lambda: one.linear(x, None, 0, None)) - turn * tile * (n + k) for one in made)  # noqa: B023
        (e0, l0), (e1, l1) = counts
        # e·entry + l·list = time, for both weights; neither below nothing where the clock disagrees with the model
        entry = min(max((b * l0 - a * l1) / (e1 * l0 - e0 * l1), 0.0), b / e1)
        found.append((max(entry, 0.0), max((a - e0 * entry) / l0, 0.0)))
    entry_row, list_row = zip(*found, strict=True)
    return Lists(tuple(entry_row), tuple(list_row), turn)
