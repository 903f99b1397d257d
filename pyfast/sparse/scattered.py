"""The scattered layout of a bitmap weight: what ``csrc/cuda/scattered_linear.cuh`` draws, made by plain torch on the
weight's device, kept in memory and never saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyfast.ops.scattered_linear import MOST_CHUNKS, scattered_linear
from pyfast.reference.scattered_linear import IMAGE_ROWS, LANES, LINE_BYTES, LINES, WAY, to_images
from pyfast.reference.sliced_linear import CHUNK_ENTRIES, pack_deltas
from pyfast.reference.sparse24_convert import stored
from pyfast.sparse.formats import BitmapWeight
from pyfast.sparse.sliced import HALVES, row_blocks

LONGEST = 15  # distance, in 4 bits
CHUNK_BYTES, GROUP_BYTES = LANES * (2 * CHUNK_ENTRIES + 4), 16
GROUP = 4  # extras side by side


@dataclass(frozen=True)
class ScatteredLayout:
    """The product on tensor cores whose fragments are filled with the stored values, for some tokens on a GPU.

    Attributes:
        values: ``[chunks, 32, 8]``, entries of the 32 lanes of a tile of 64 x 64.
        deltas: uint8 ``[chunks, 32, 4]``, the distance of each entry from the one before, two to a byte.
        extras: int32 ``[groups, 4]``, entries with their positions.
        ends: int32 ``[tiles + 1, 2]``, the chunks and the groups before each tile.
        n: rows of the weight.
    """

    values: Tensor
    deltas: Tensor
    extras: Tensor
    ends: Tensor
    n: int

    @classmethod
    def of(cls, weight: BitmapWeight) -> ScatteredLayout:
        """The layout of a weight of 16-bit values.

        Takes memory for about 2²² elements of the dense weight at a time, besides the layout, and waits for the device:
        it cannot be captured in a graph. Stored values of +0.0 are left out.

        Args:
            weight: of bfloat16 or float16 values, not empty.

        Raises:
            TypeError, ValueError: another weight.
        """
        if not isinstance(weight, BitmapWeight):
            raise TypeError(f"weight: got {type(weight).__name__}, accepted: BitmapWeight")
        if weight.dtype not in HALVES:
            raise TypeError(f"weight: got dtype {weight.dtype}, accepted: bfloat16, float16")
        if 0 in weight.shape:
            raise ValueError(f"weight: got shape {list(weight.shape)}, accepted: not empty")
        with torch.no_grad():
            parts = [_of_rows(dense) for _, dense in row_blocks(weight, IMAGE_ROWS)]
            values, deltas, extras, counts = (torch.cat(part) for part in zip(*parts, strict=True))
        if len(values) > MOST_CHUNKS:
            raise ValueError(f"weight: {len(values)} chunks of {LANES} x {CHUNK_ENTRIES}, accepted: {MOST_CHUNKS}")
        ends = pad(counts.cumsum(0), (0, 0, 1, 0)).to(torch.int32)
        return cls(values, deltas, extras, ends, weight.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (self.values, self.deltas, self.extras, self.ends))

    def linear(self, x: Tensor, bias: Tensor | None, activation: int, mul: Tensor | None) -> Tensor:
        """f(x Wᵀ + bias) · mul, x [tokens, k] to [tokens, n]."""
        return scattered_linear(x, self.values, self.deltas, self.extras, self.ends, bias, self.n, activation, mul)


def _of_rows(dense: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, deltas, extras of rows of tiles, and how many chunks and groups each tile has [tiles, 2]."""
    images = to_images(dense)
    held = stored(images)
    entry, distance = _entries(held)
    rank = entry.cumsum(1)
    chunks = _choose_chunks(held, rank)
    most = (chunks * CHUNK_ENTRIES)[:, None, None]

    # The last entry of each lane stands where it has no other, at no distance; of none, a zero at the first place.
    last = torch.where(entry, _way(entry), -1).amax(1)
    filling = images.gather(1, last.clamp(min=0)[:, None]).squeeze(1)
    tile = torch.repeat_interleave(chunks)
    values = filling[tile, :, None].expand(-1, -1, CHUNK_ENTRIES).contiguous()
    distances = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    begins = chunks.cumsum(0) - chunks
    some = chunks > 0
    distances[begins[some], :, 0] = (last[some] < 0).to(torch.uint8)
    at = (entry & (rank <= most)).nonzero(as_tuple=True)
    number = rank[at] - 1
    to = begins[at[0]] + number // CHUNK_ENTRIES, at[2], number % CHUNK_ENTRIES
    values[to], distances[to] = images[at], distance[at].to(torch.uint8)

    extras, groups = _extras(images, (held & (rank > most)).nonzero(as_tuple=True))
    return values, pack_deltas(distances, 4), extras, torch.stack([chunks, groups], 1)


def _way(like: Tensor) -> Tensor:
    """How far on the way of its lane each element lies."""
    return torch.arange(WAY, device=like.device)[:, None].expand_as(like)


def _entries(held: Tensor) -> tuple[Tensor, Tensor]:
    """Which elements are entries, the stored ones and bridges, and their distances from the entry before."""
    way = _way(held)
    reached = pad(torch.where(held, way, -1).cummax(1).values[:, :-1], (0, 0, 1, 0), value=-1)  # the stored one before
    follows = held.flip(1).cummax(1).values.flip(1)  # something is stored here or behind
    gap = way - reached
    entry = held | (follows & (gap % LONGEST == 0))
    return entry, gap - (gap - 1) // LONGEST * LONGEST


def _choose_chunks(held: Tensor, rank: Tensor) -> Tensor:
    """Chunks of each tile, as many as make it smallest: what the lanes have beyond are extras."""
    stored_there = held.sum((1, 2))
    sizes = []
    for chunks in range(WAY // CHUNK_ENTRIES + 1):
        left = stored_there - (held & (rank <= chunks * CHUNK_ENTRIES)).sum((1, 2))
        sizes.append(chunks * CHUNK_BYTES + -(-left // GROUP) * GROUP_BYTES)
    return torch.stack(sizes, 1).argmin(1)


def _extras(images: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The words of these entries, in groups of 4 that the last word of a tile fills up, and the groups of each tile."""
    tile, way, lane = at
    offset = way % LINES * LINE_BYTES + way // LINES * 2 + 4 * lane
    words = images[at].view(torch.int16).to(torch.int32) & 0xFFFF | offset.to(torch.int32) << 16
    counts = torch.bincount(tile, minlength=len(images))
    groups = -(-counts // GROUP)
    of = torch.repeat_interleave(groups * GROUP)
    number = torch.arange(len(of), device=of.device) - ((groups.cumsum(0) - groups) * GROUP)[of]
    from_ = (counts.cumsum(0) - counts)[of] + torch.minimum(number, counts[of] - 1)
    return words[from_].reshape(-1, GROUP), groups
