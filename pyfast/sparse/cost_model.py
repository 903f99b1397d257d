"""What a product with a sparse weight is expected to take, by each kernel that can serve it.

    time = √((bytes / bandwidth)² + (operations · time of one)²) + the cost of a call

Of memory and arithmetic neither hides the other whole: where both would take as long by themselves, together they were
measured to take about 1.4 times that, by libraries and by the kernels here.

Bytes are those of the weight as the kernel reads it, of the activations and of the outputs; weights are taken to be
cold, as they are in a model that exceeds the caches. The operations are those the kernel does:

    direct    positions of the matrix, zeros too, once for every 4, 2 or 1 tokens; above ``few_tokens`` the weight is
              decompressed, position by position, and multiplied by ``F.linear``
    indexed   entries once for every 64 tokens, the last ones as 64, 32, 16, 8 or 1; lists (a row's part of a block) as
              often; activations and outputs turned once; entries in pairs are another kernel with times of its own
    dense     positions, at a cost that depends on the number of tokens: ``F.linear`` packs its weight at every call
    packed    positions likewise, packed in advance

The constants come from :mod:`pyfast.sparse.calibration` where ``pyfast calibrate`` has been run on this device, else
from :mod:`pyfast.sparse.built_in`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import hypot

from pyfast.sparse.layouts import block_columns

KERNELS = ("direct", "indexed", "dense", "packed")
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

GROUPS = (1, 2, 4)  # tokens that the direct kernels take at once
TILES = (1, 8, 16, 32, 64)  # tokens that the indexed kernel takes at once
DENSITIES = (0.05, 0.2, 0.5, 0.9)  # of the bitmaps whose positions were timed
DENSE_TOKENS = (1, 2, 4, 16, 64, 256)
LIST_BYTES = 2  # of the indexed layout: a quarter of a start, and a row
ENTRY_BYTES = {False: 5, True: 3}  # of the indexed layout: a float32, or a bfloat16 of a pair, and a column

Row = tuple[float, ...]


@dataclass(frozen=True)
class Rates:
    """Times of one operation for weights of one dtype, in picoseconds, all threads at work.

    Attributes:
        bitmap: of a position, a row for each of ``GROUPS``, in it one for each of ``DENSITIES``.
        sparse24: of a position, for each of ``GROUPS``.
        bitmap_decompress, sparse24_decompress: of a position.
        dense: of a position with all tokens, for each of ``DENSE_TOKENS``.
        packed: the same; empty where no library packs this dtype.
    """

    bitmap: tuple[Row, ...]
    sparse24: Row
    bitmap_decompress: float
    sparse24_decompress: float
    dense: Row
    packed: Row = ()


@dataclass(frozen=True)
class Lists:
    """Times of the indexed kernel, in picoseconds, all threads at work.

    Attributes:
        entry, start: of an entry and of a list, for each of ``TILES``.
        turn: of an activation or an output.
    """

    entry: Row
    start: Row
    turn: float


@dataclass(frozen=True)
class Constants:
    """What the cost model knows of a device.

    Attributes:
        source: ``"built-in"`` or ``"calibrated"``.
        read_gbps: bandwidth of reading memory, 10⁹ bytes a second.
        call_us: the cost of one call, microseconds.
        singles: of entries one by one.
        pairs: of bfloat16 in pairs; None where the device does not multiply them so.
        rates: by the name of the dtype.
    """

    source: str
    read_gbps: float
    call_us: float
    singles: Lists
    pairs: Lists | None = None
    rates: dict[str, Rates] = field(default_factory=dict)

    def of(self, dtype: str) -> Rates:
        """The rates of a dtype; those of float32 where it has none of its own."""
        return self.rates.get(dtype, self.rates["float32"])


@dataclass(frozen=True)
class Work:
    """A product: a weight of shape (n, k) that stores ``stored`` elements, and a number of tokens. ``pairs``: whether
    its indexed layout holds pairs."""

    format: str
    n: int
    k: int
    stored: int
    dtype: str
    tokens: int
    threads: int
    few_tokens: int
    pairs: bool = False

    @property
    def density(self) -> float:
        """Stored elements over all."""
        return self.stored / max(self.n * self.k, 1)

    @property
    def itemsize(self) -> int:
        """Bytes of a stored element."""
        return ITEMSIZE[self.dtype]

    @property
    def container_bytes(self) -> int:
        """Bytes of the weight as it is stored."""
        positions = self.n * self.k
        if self.format == "2:4":
            return positions // 2 * self.itemsize + positions // 8
        return self.stored * self.itemsize + positions // 8 + positions // 128

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight; of integers, in float32."""
        return self.n * self.k * (4 if self.dtype == "int8" else self.itemsize)


def entries(work: Work) -> tuple[int, int]:
    """Entries and lists of the indexed layout. Lists of about one length lie side by side; what fills them up is under
    half an entry a list, and part of what a list takes."""
    return work.stored, work.n * -(-work.k // block_columns(work.density, work.pairs))


def layout_bytes(work: Work, kernel: str) -> int:
    """Bytes in memory beside the container."""
    if kernel == "direct":
        return 0
    if kernel == "indexed":
        count, lists = entries(work)
        return ENTRY_BYTES[work.pairs] * count + LIST_BYTES * lists
    return work.dense_bytes


def predict(constants: Constants, work: Work) -> dict[str, float]:
    """Milliseconds of each kernel that can serve the product."""
    rates = constants.of(work.dtype)
    positions = work.n * work.k
    vectors = work.tokens * (work.n + work.k) * (4 if work.dtype == "int8" else work.itemsize)

    def ms(weight_bytes: float, picoseconds: float) -> float:
        memory = (weight_bytes + vectors) / (constants.read_gbps * 1e6)
        return hypot(memory, picoseconds * 1e-9) + constants.call_us * 1e-3

    found = {
        "direct": ms(work.container_bytes, _direct(rates, work) * positions),
        "indexed": ms(layout_bytes(work, "indexed"), _indexed(constants, work)),
    }
    if work.dtype == "int8":
        return found
    found["dense"] = ms(work.dense_bytes, _by_tokens(rates.dense, work.tokens) * positions)
    if rates.packed:
        found["packed"] = ms(work.dense_bytes, _by_tokens(rates.packed, work.tokens) * positions)
    return found


def _direct(rates: Rates, work: Work) -> float:
    """Picoseconds of a position."""
    two_four = work.format == "2:4"
    if work.tokens > work.few_tokens and work.dtype != "int8":
        decompress = rates.sparse24_decompress if two_four else rates.bitmap_decompress
        return decompress + _by_tokens(rates.dense, work.tokens)
    total, left = 0.0, work.tokens
    for i in reversed(range(len(GROUPS))):
        one = rates.sparse24[i] if two_four else interpolate(DENSITIES, rates.bitmap[i], work.density)
        total += left // GROUPS[i] * one
        left %= GROUPS[i]
    return total


def _indexed(constants: Constants, work: Work) -> float:
    """Picoseconds of all entries."""
    times = constants.pairs if work.pairs and constants.pairs is not None else constants.singles
    count, lists = entries(work)
    tiles = sum(passes * (count * times.entry[i] + lists * times.start[i]) for i, passes in _passes(work.tokens))
    return tiles + work.tokens * (work.n + work.k) * times.turn


def _passes(tokens: int) -> list[tuple[int, int]]:
    """Tiles of tokens, as indices of ``TILES``, and how often: the widest, then the narrowest that holds the rest."""
    widest = len(TILES) - 1
    whole, rest = divmod(tokens, TILES[widest])
    last = [(next(i for i, tile in enumerate(TILES) if tile >= rest), 1)] if rest else []
    return [(widest, whole), *last]


def _by_tokens(row: Row, tokens: int) -> float:
    if tokens <= DENSE_TOKENS[-1]:
        return interpolate(DENSE_TOKENS, row, tokens)
    return row[-1] * tokens / DENSE_TOKENS[-1]


def interpolate(points: Sequence[float], values: Sequence[float], at: float) -> float:
    """The value at ``at``, linear between the points, that of the nearest point outside."""
    right = bisect_right(points, at)
    if right == 0:
        return values[0]
    if right == len(points):
        return values[-1]
    x0, x1, y0, y1 = points[right - 1], points[right], values[right - 1], values[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def break_even(
    constants: Constants,
    shape: tuple[int, int],
    tokens: int,
    dtype: str,
    threads: int,
    few_tokens: int,
) -> float | None:
    """The smallest sparsity, in steps of 1 %, from which on the best sparse kernel for a bitmap weight is expected to
    be as fast as the best dense one; None where not even 99 % is enough."""
    n, k = shape
    pairs = dtype == "bfloat16" and constants.pairs is not None
    found = None
    for percent in range(99, -1, -1):
        stored = round((1 - percent / 100) * n * k)
        expected = predict(constants, Work("bitmap", n, k, stored, dtype, tokens, threads, few_tokens, pairs))
        dense = min(ms for kernel, ms in expected.items() if kernel in ("dense", "packed"))
        if min(expected["direct"], expected["indexed"]) > dense:
            break
        found = percent / 100
    return found
