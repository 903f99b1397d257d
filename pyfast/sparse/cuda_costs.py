"""What a product with a sparse weight is expected to take on a GPU, by each kernel that can serve it.

    time = a beginning + positions of the matrix · time of one

Both depend on the kernel, the number of tokens and the density. ``pyfast calibrate --device cuda`` finds them from two
sizes of weights, cold, in CUDA graphs; before that those of an H100 or an H200 serve
(``cuda_built_in.json``).

    direct      the weight as it is stored: our kernels to 64 tokens; above, decompression and the dense product
    sliced      bitmap weights, to 8 tokens, by the layout of ``sliced.py``
    scattered   bitmap weights, to 32 tokens, by the layout of ``scattered.py``
    cusparselt  2:4 weights, by NVIDIA's library
    dense       the dense product (``F.linear``)

Only 16-bit weights have kernels of their own. Others are decompressed at each call: their dense product reads twice the
bytes of a 16-bit one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from pyfast.sparse.cost_model import Work, interpolate
from pyfast.sparse.measured import number, sized

FEW_TOKENS = (1, 2, 4, 8, 16, 32, 64)  # each ends what one kernel of the direct product takes at once
SLICED_TOKENS = (1, 2, 4, 8)
SCATTERED_TOKENS = (8, 16, 32)
MANY_TOKENS = (1, 8, 64, 128, 256, 512, 1024, 2048)  # of the dense library and of cuSPARSELt
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
HALVES = ("bfloat16", "float16")
_SHARED_BYTES = 225 << 10  # of a block on sm_90, less what is not x

Line = tuple[float, float]  # microseconds to begin and end, picoseconds a position
Row = tuple[Line, ...]


@dataclass(frozen=True)
class CudaConstants:
    """What the cost model knows of a GPU.

    Attributes:
        source: ``"calibrated"`` or ``"built-in"``.
        device: the name of the GPU that was measured.
        bitmap: for each of ``FEW_TOKENS`` a row over ``DENSITIES``.
        bitmap_decompress: over ``DENSITIES``.
        sliced: for each of ``SLICED_TOKENS`` a row over ``DENSITIES``.
        scattered: for each of ``SCATTERED_TOKENS``; empty where it was not measured.
        sparse24: for each of ``FEW_TOKENS``.
        sparse24_decompress: the same of a 2:4 weight.
        cusparselt: for each of ``MANY_TOKENS``; empty where the library is not there.
        dense: for each of ``MANY_TOKENS``.
    """

    source: str
    device: str
    bitmap: tuple[Row, ...]
    bitmap_decompress: Row
    sliced: tuple[Row, ...]
    scattered: tuple[Row, ...]
    sparse24: Row
    sparse24_decompress: Line
    cusparselt: Row
    dense: Row


def predict(constants: CudaConstants, work: Work) -> dict[str, float]:
    """Milliseconds of each kernel that can serve the product."""
    positions = work.n * work.k
    two_four = work.format == "2:4"
    halves = work.dtype in HALVES

    def ms(line: Line, wider: float = 1.0) -> float:
        return line[0] * 1e-3 + wider * line[1] * positions * 1e-9

    def by_density(row: Row) -> Line:
        return _between(DENSITIES, row, work.density)

    wider = work.itemsize / 2  # than what was measured
    dense = ms(_many(constants.dense, work.tokens), wider)
    found = {"dense": dense}
    if halves and work.tokens <= FEW_TOKENS[-1]:
        tier = _tier(FEW_TOKENS, work.tokens)
        found["direct"] = ms(constants.sparse24[tier] if two_four else by_density(constants.bitmap[tier]))
    else:
        line = constants.sparse24_decompress if two_four else by_density(constants.bitmap_decompress)
        found["direct"] = ms(line, wider) + dense
    if halves and not two_four and work.tokens <= SLICED_TOKENS[-1]:
        found["sliced"] = sum(
            ms(by_density(constants.sliced[_tier(SLICED_TOKENS, tokens)]))
            for tokens in _sliced_launches(work.tokens, work.k)
        )
    if halves and not two_four and constants.scattered and work.tokens <= SCATTERED_TOKENS[-1]:
        found["scattered"] = ms(by_density(constants.scattered[_tier(SCATTERED_TOKENS, work.tokens)]))
    if halves and two_four and constants.cusparselt:
        found["cusparselt"] = ms(_many(constants.cusparselt, work.tokens))
    return found


def layout_bytes(work: Work, kernel: str) -> int:
    """Bytes in memory beside the container, about."""
    positions = work.n * work.k
    if kernel == "direct":
        return 0
    if kernel in ("sliced", "scattered"):
        return 3 * work.stored
    return positions * 9 // 8 if kernel == "cusparselt" else work.dense_bytes


def _sliced_launches(tokens: int, k: int) -> list[int]:
    """Tokens of each launch of the sliced product: as many as shared memory holds x of."""
    most = next((most for most in SLICED_TOKENS[::-1] if 2 * most * k <= _SHARED_BYTES), 1)
    return [min(most, tokens - first) for first in range(0, tokens, most)]


def _tier(tiers: tuple[int, ...], tokens: int) -> int:
    """The smallest tier that holds the tokens."""
    return next(i for i, tier in enumerate(tiers) if tier >= tokens)


def _many(row: Row, tokens: int) -> Line:
    if tokens <= MANY_TOKENS[-1]:
        return _between(MANY_TOKENS, row, tokens)
    begin, position = row[-1]
    return begin, position * tokens / MANY_TOKENS[-1]


def _between(points: Sequence[float], row: Row, at: float) -> Line:
    begins, positions = zip(*row, strict=True)
    return interpolate(points, begins, at), interpolate(points, positions, at)


def to_json(found: CudaConstants) -> dict[str, Any]:
    """The constants as plain values."""
    return asdict(found)


def from_json(plain: dict[str, Any], source: str) -> CudaConstants:
    """The constants that :func:`to_json` wrote. KeyError, TypeError or ValueError for anything else."""
    device = plain["device"]
    if not isinstance(device, str):
        raise ValueError("device: a name was expected")
    cusparselt, scattered = plain["cusparselt"], plain["scattered"]
    return CudaConstants(
        source=source,
        device=device,
        bitmap=_rows(plain["bitmap"], len(FEW_TOKENS)),
        bitmap_decompress=_row(plain["bitmap_decompress"], len(DENSITIES)),
        sliced=_rows(plain["sliced"], len(SLICED_TOKENS)),
        scattered=_rows(scattered, len(SCATTERED_TOKENS)) if scattered else (),
        sparse24=_row(plain["sparse24"], len(FEW_TOKENS)),
        sparse24_decompress=_line(plain["sparse24_decompress"]),
        cusparselt=_row(cusparselt, len(MANY_TOKENS)) if cusparselt else (),
        dense=_row(plain["dense"], len(MANY_TOKENS)),
    )


def _line(value: Any) -> Line:
    begin, position = (number(part) for part in sized(value, 2))
    return begin, position


def _row(values: Any, size: int) -> Row:
    return tuple(_line(value) for value in sized(values, size))


def _rows(values: Any, tiers: int) -> tuple[Row, ...]:
    return tuple(_row(row, len(DENSITIES)) for row in sized(values, tiers))


@lru_cache(maxsize=1)
def built_in(device: str) -> CudaConstants:
    """The constants of an H100 or an H200, as they were measured there: of the one that ``device`` names, else of the
    first."""
    text = resources.files("pyfast.sparse").joinpath("cuda_built_in.json").read_text(encoding="utf-8")
    known = json.loads(text)
    plain = next((one for one in known if one["device"].split()[1] in device), known[0])
    return from_json(plain, "built-in")
