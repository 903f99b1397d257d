"""The sliced layout of a bitmap weight: what ``csrc/cuda/sliced_linear.cuh`` draws, made by plain torch on the weight's
device, kept in memory and never saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyfast.ops import bitmap_convert
from pyfast.ops.sliced_linear import BLOCK_WARPS, MOST_CHUNKS, MOST_COLUMNS, sliced_linear
from pyfast.reference.bitmap_convert import TILE_ROWS
from pyfast.reference.sliced_linear import CHUNK_ENTRIES, SLICE_ROWS, pack_deltas
from pyfast.reference.sparse24_convert import stored
from pyfast.sparse.formats import BitmapWeight

HALVES = (torch.bfloat16, torch.float16)
BLOCK_ELEMENTS = 2**22  # of the dense weight, looked at together


@dataclass(frozen=True)
class SlicedLayout:
    """The product driven by the stored values, for few tokens on a GPU.

    Attributes:
        values: ``[chunks, 32, 8]``, the entries of 32 rows of a slice; +0.0 stands for no entry.
        deltas: uint8 ``[chunks, 32, 4 or 8]``, the distance of each entry from the one before in its row.
        starts: int16 (unsigned) ``[warps, 32]``, the column that each row has reached where a warp's work begins.
        segments: int32 ``[warps, 4]``, the slice in which it begins, that slice's first chunk and end, 0.
        ends: int32 ``[slices]``, the chunk at which each slice ends.
        rows: int32 ``[slices, 32]``, the row of the weight; -1 for none.
        n: rows of the weight.
    """

    values: Tensor
    deltas: Tensor
    starts: Tensor
    segments: Tensor
    ends: Tensor
    rows: Tensor
    n: int

    @classmethod
    def of(cls, weight: BitmapWeight, *, multiprocessors: int | None = None) -> SlicedLayout:
        """The layout of a weight of 16-bit values.

        Takes memory for about 2²² elements of the dense weight at a time, besides the layout, and waits for the device:
        it cannot be captured in a graph. Stored values of +0.0 are left out.

        Args:
            weight: of bfloat16 or float16 values, not empty, at most 65536 columns.
            multiprocessors: blocks to cut the work for; None for those of the weight's device, 1 on the CPU. Any
                number gives right results on any device.

        Raises:
            TypeError, ValueError: another weight; multiprocessors below 1.
        """
        if not isinstance(weight, BitmapWeight):
            raise TypeError(f"weight: got {type(weight).__name__}, accepted: BitmapWeight")
        if weight.dtype not in HALVES:
            raise TypeError(f"weight: got dtype {weight.dtype}, accepted: bfloat16, float16")
        n, k = weight.shape
        if n < 1 or not 1 <= k <= MOST_COLUMNS:
            raise ValueError(f"weight: got shape {[n, k]}, accepted: not empty, at most {MOST_COLUMNS} columns")
        if multiprocessors is None:
            cuda = weight.device.type == "cuda"
            multiprocessors = torch.cuda.get_device_properties(weight.device).multi_processor_count if cuda else 1
        if multiprocessors < 1:
            raise ValueError(f"multiprocessors: got {multiprocessors}, accepted: 1 or more")
        with torch.no_grad():
            values, deltas, starts, segments, ends, rows = _build(weight, multiprocessors)
        return cls(values, deltas, starts, segments, ends, rows, n)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = self.values, self.deltas, self.starts, self.segments, self.ends, self.rows
        return sum(tensor.nbytes for tensor in held)

    def linear(self, x: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
        """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
        pattern = self.deltas, self.starts, self.segments, self.ends, self.rows
        return sliced_linear(x, self.values, *pattern, bias, self.n, activation, mul)


def _build(weight: BitmapWeight, multiprocessors: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    bits, lengths = _choose_bits(weight)
    ordered, order = lengths.sort(descending=True, stable=True)
    chunks = _slice_chunks(ordered)
    ends = chunks.cumsum(0)
    total = int(ends[-1])
    if total > MOST_CHUNKS:
        raise ValueError(f"weight: {total} chunks of {SLICE_ROWS} x {CHUNK_ENTRIES} entries, accepted: {MOST_CHUNKS}")
    values = weight.values.new_zeros(total, SLICE_ROWS, CHUNK_ENTRIES)
    distances = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    _fill(values, distances, weight, 2**bits - 1, lengths, order, ends - chunks)
    rows = pad(order, (0, len(ends) * SLICE_ROWS - len(order)), value=-1).reshape(-1, SLICE_ROWS)
    starts, segments = _cut(distances, ends, min(multiprocessors, -(-total // BLOCK_WARPS)))
    return values, pack_deltas(distances, bits), starts, segments, ends.to(torch.int32), rows.to(torch.int32)


def _choose_bits(weight: BitmapWeight) -> tuple[int, Tensor]:
    """Bits of a delta, 4 or 8, whichever make the layout smaller, and the entries of each row, bridges included."""
    lengths = {bits: weight.offsets.new_zeros(weight.shape[0]) for bits in (4, 8)}
    for first, dense in row_blocks(weight):
        row, gap = _places(dense)[::2]
        for bits, counts in lengths.items():
            counts[first : first + len(dense)].index_add_(0, row, 1 + _bridges(gap, 2**bits - 1))
    chunks = torch.stack([_slice_chunks(counts.sort(descending=True).values).sum() for counts in lengths.values()])
    of_4, of_8 = chunks.tolist()
    bits = 4 if of_4 * (2 * CHUNK_ENTRIES + 4) <= of_8 * (2 * CHUNK_ENTRIES + 8) else 8
    return bits, lengths[bits]


def _slice_chunks(ordered: Tensor) -> Tensor:
    """Chunks of each slice, of rows in descending order of their entries: enough for the first row, 1 at least."""
    return ((ordered[::SLICE_ROWS] + CHUNK_ENTRIES - 1) // CHUNK_ENTRIES).clamp(min=1)


def row_blocks(weight: BitmapWeight, multiple: int = TILE_ROWS) -> Iterator[tuple[int, Tensor]]:
    """The dense weight in blocks of rows, each with the number of its first row. All blocks but the last have a
    multiple of ``multiple`` rows, which is one of 16."""
    n, k = weight.shape
    tiles = weight.bitmaps.shape[0] // -(-n // TILE_ROWS)  # of a row of tiles
    step = max(BLOCK_ELEMENTS // (multiple * k), 1) * (multiple // TILE_ROWS)  # rows of tiles
    bounds = [*weight.offsets[:: tiles * step].tolist(), weight.values.numel()]
    for i, first in enumerate(range(0, n, step * TILE_ROWS)):
        here = slice(i * step * tiles, (i + 1) * step * tiles)
        offsets = weight.offsets[here.start : here.stop + 1]
        values = weight.values.detach()[bounds[i] : bounds[i + 1]]
        count = min(step * TILE_ROWS, n - first)
        yield first, bitmap_convert.decompress(values, weight.bitmaps[here], offsets - offsets[0], count, k)


def _places(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and distance from the element before in its row (from column 0 for the first) of each stored
    element, row by row."""
    row, column = stored(dense).nonzero(as_tuple=True)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    return row, column, torch.where(first, column, column - column.roll(1))


def _bridges(gap: Tensor, most: int) -> Tensor:
    """Entries of the largest distance that stand before an element."""
    return (gap - 1).clamp(min=0) // most


def _fill(
    values: Tensor, distances: Tensor, weight: BitmapWeight, most: int, lengths: Tensor, order: Tensor, begins: Tensor
) -> None:
    """Writes the entries of all rows to their places: ``lengths`` of the rows, ``order`` in which they stand, and the
    chunk at which each slice begins."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    for first, dense in row_blocks(weight):
        row, column, gap = _places(dense)
        bridges = _bridges(gap, most)
        mine = lengths[first : first + len(dense)]
        entry = (1 + bridges).cumsum(0) - 1 - (mine.cumsum(0) - mine)[row]

        def spot(row: Tensor, entry: Tensor, first: int = first) -> Tensor:
            to = place[first + row]
            chunk = begins[to // SLICE_ROWS] + entry // CHUNK_ENTRIES
            return (chunk * SLICE_ROWS + to % SLICE_ROWS) * CHUNK_ENTRIES + entry % CHUNK_ENTRIES

        at = spot(row, entry)
        values.view(-1)[at] = dense[row, column]
        distances.view(-1)[at] = (gap - bridges * most).to(torch.uint8)
        bridged = torch.repeat_interleave(bridges)
        ordinal = torch.arange(len(bridged), device=bridged.device) - (bridges.cumsum(0) - bridges)[bridged]
        distances.view(-1)[spot(row[bridged], entry[bridged] - 1 - ordinal)] = most


def _cut(distances: Tensor, ends: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """starts and segments of the warps of ``blocks`` blocks: the chunks in equal ranges for the blocks, and each of
    these for its warps."""
    total = len(distances)
    share, longer = divmod(total, blocks)
    block = torch.arange(blocks + 1, device=ends.device)
    bounds = block * share + block.clamp(max=longer)
    warp = torch.arange(BLOCK_WARPS, device=ends.device)
    firsts = (bounds[:-1, None] + bounds.diff()[:, None] * warp // BLOCK_WARPS).reshape(-1)
    slices = torch.searchsorted(ends, firsts, right=True)
    begins = pad(ends, (1, 0))[slices]
    reached = pad(distances.sum(-1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (0, 0, 1, 0))
    starts = reached[firsts] - reached[begins]
    segments = torch.stack([slices, begins, ends[slices], torch.zeros_like(slices)], 1)
    return torch.where(starts < 2**15, starts, starts - 2**16).to(torch.int16), segments.to(torch.int32)
