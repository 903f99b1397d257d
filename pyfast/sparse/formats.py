"""The two sparse weight containers: small classes over flat tensors (docs/formats.md draws both)."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from os import PathLike
from typing import Any, ClassVar, TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from pyfast.ops import bitmap_convert, sparse24_convert
from pyfast.reference.bitmap_convert import TILE_COLUMNS, TILE_ROWS
from pyfast.reference.sparse24_convert import COLUMN_UNIT, padded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMAT_VERSION = 1

Self = TypeVar("Self", bound="SparseWeight")


class SparseWeight(ABC):
    """A weight [N, K] of a linear layer in a sparse form.

    Attributes:
        values: the stored elements, in the order of the format.
        shape: (N, K) of the dense weight: out_features, in_features.
    """

    format: ClassVar[str]
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    @abstractmethod
    def from_dense(cls: type[Self], dense: Tensor, *, mask: Tensor | None = None) -> Self:
        """Converts a dense weight [N, K] (float32, bfloat16, float16; float64 by the reference).

        Every element whose bits are not those of +0.0 is stored, −0.0 and NaN too: :meth:`to_dense` gives the same
        bits back. ``mask`` (boolean [N, K]) sets the elements where it is False to +0.0 first; prefer it to
        ``weight * mask``, which leaves −0.0 behind.

        Raises:
            TypeError, ValueError: not a matrix of an accepted dtype, or not of the format's pattern.
        """

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The dense weight [N, K], bit for bit, in the dtype and on the device of the values."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The flat tensors that make up the weight, by name."""

    @classmethod
    @abstractmethod
    def from_tensors(cls: type[Self], tensors: dict[str, Tensor], shape: tuple[int, int]) -> Self:
        """Puts a weight together and checks it: shapes, dtypes and the pattern. ValueError where they disagree."""

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what a product with one token has to read."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Like ``Tensor.to``: device and floating dtype; the pattern follows to the device."""
        moved = {
            name: tensor.to(*args, **kwargs) if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors().items()
        }
        device = moved["values"].device
        return self._unchecked({name: tensor.to(device) for name, tensor in moved.items()}, self.shape)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file: the tensors, and format, version and shape as its metadata."""
        about = {"pyfast_format": self.format, "version": str(FORMAT_VERSION), "shape": json.dumps(self.shape)}
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, path, about)

    @classmethod
    def load(cls: type[Self], path: str | PathLike[str], device: str | torch.device = "cpu") -> Self:
        """Reads what :meth:`save` wrote and checks it. ValueError for a truncated, foreign or damaged file."""
        try:
            with safetensors.safe_open(path, "pt", str(device)) as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except safetensors.SafetensorError as error:
            raise ValueError(f"path: {path} is not a whole safetensors file ({error})") from error
        if about.get("pyfast_format") != cls.format:
            raise ValueError(
                f"path: {path} holds {about.get('pyfast_format', 'no pyfast weight')!r}, accepted: {cls.format!r}"
            )
        if about.get("version") != str(FORMAT_VERSION):
            raise ValueError(f"path: {path} has version {about.get('version')}, accepted: {FORMAT_VERSION}")
        return cls.from_tensors(tensors, _shape_from(about.get("shape", ""), path))

    @classmethod
    @abstractmethod
    def _unchecked(cls: type[Self], tensors: dict[str, Tensor], shape: tuple[int, int]) -> Self: ...

    def __repr__(self) -> str:
        n, k = self.shape
        return f"{type(self).__name__}({n}x{k}, {self.dtype}, {self.nbytes} bytes, {self.device})"


class Sparse24Weight(SparseWeight):
    """A 2:4 weight: two kept elements in every group of four columns.

    ``values [N, K'/2]`` and ``metadata`` int16 ``[N, K'/16]``, K' = K rounded up to a multiple of 32. A nibble of
    metadata a group: its low two bits are the first kept column, the high two the second; kept pairs
    (0,1), (2,3), (0,3), (1,2) make the word 0x9CE4.
    """

    format = "2:4"

    def __init__(self, values: Tensor, metadata: Tensor, shape: tuple[int, int]):
        self.values, self.metadata, self.shape = values, metadata, shape

    @classmethod
    def from_dense(cls, dense: Tensor, *, mask: Tensor | None = None) -> Sparse24Weight:
        dense = _checked_dense(dense, mask)
        values, metadata, violation = sparse24_convert.compress(dense)
        if (position := int(violation)) >= 0:
            row, column = divmod(position, dense.shape[1])
            group = dense[row, column : column + 4].tolist()
            raise ValueError(
                f"dense: not 2:4, row {row} columns {column} to {column + 3} hold {group}; accepted: at most two "
                "stored elements in each group of four (-0.0 counts as stored: add 0.0 to drop negative zeros, "
                "or give mask=)"
            )
        return cls(values, metadata, (dense.shape[0], dense.shape[1]))

    def to_dense(self) -> Tensor:
        return sparse24_convert.decompress(self.values, self.metadata, *self.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "metadata": self.metadata}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Sparse24Weight:
        _check_names(tensors, ("values", "metadata"))
        n, k = shape[0], padded(shape[1], COLUMN_UNIT)
        _check_tensor("values", tensors["values"], DTYPES, (n, k // 2))
        _check_tensor("metadata", tensors["metadata"], (torch.int16,), (n, k // 16))
        metadata = tensors["metadata"]
        nibbles = (metadata.to(torch.int64).unsqueeze(-1) >> torch.arange(0, 16, 4, device=metadata.device)) & 15
        legal = torch.zeros(16, dtype=torch.bool, device=metadata.device)
        legal[[0x4, 0x8, 0x9, 0xC, 0xD, 0xE]] = True
        if not bool(legal[nibbles].all()):
            raise ValueError("metadata: holds a nibble that names no pair of columns; the weight is damaged")
        return cls._unchecked(tensors, shape)

    @classmethod
    def _unchecked(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Sparse24Weight:
        return cls(tensors["values"], tensors["metadata"], shape)


class BitmapWeight(SparseWeight):
    """An unstructured sparse weight: one bit an element and the stored values.

    Tiles of 16 rows × 64 columns, a word of 64 bits a row: ``bitmaps`` int64 ``[tiles, 16]``, ``values`` flat in the
    order of tile, row, column, ``offsets`` int64 ``[tiles + 1]`` into them. 1.06 bits an element above the values.
    """

    format = "bitmap"

    def __init__(self, values: Tensor, bitmaps: Tensor, offsets: Tensor, shape: tuple[int, int]):
        self.values, self.bitmaps, self.offsets, self.shape = values, bitmaps, offsets, shape

    @property
    def density(self) -> float:
        """Stored elements over all elements."""
        n, k = self.shape
        return self.values.numel() / max(n * k, 1)

    @classmethod
    def from_dense(cls, dense: Tensor, *, mask: Tensor | None = None) -> BitmapWeight:
        dense = _checked_dense(dense, mask)
        return cls(*bitmap_convert.compress(dense), (dense.shape[0], dense.shape[1]))

    def to_dense(self) -> Tensor:
        return bitmap_convert.decompress(self.values, self.bitmaps, self.offsets, *self.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "bitmaps": self.bitmaps, "offsets": self.offsets}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> BitmapWeight:
        _check_names(tensors, ("values", "bitmaps", "offsets"))
        values, bitmaps, offsets = tensors["values"], tensors["bitmaps"], tensors["offsets"]
        tiles = bitmap_convert.tile_count(*shape)
        _check_tensor("values", values, DTYPES, None)
        _check_tensor("bitmaps", bitmaps, (torch.int64,), (tiles, TILE_ROWS))
        _check_tensor("offsets", offsets, (torch.int64,), (tiles + 1,))
        counts = _popcount(bitmaps).sum(-1)
        if values.dim() != 1 or int(offsets[0]) != 0 or not torch.equal(offsets.diff(), counts):
            raise ValueError("offsets: do not agree with the bitmaps; the weight is damaged")
        if int(offsets[-1]) != values.numel():
            raise ValueError(
                f"values: got {values.numel()} elements, the bitmaps hold {int(offsets[-1])}; the weight is damaged"
            )
        if _bits_in_padding(bitmaps, shape):
            raise ValueError(f"bitmaps: hold bits outside the shape {list(shape)}; the weight is damaged")
        return cls._unchecked(tensors, shape)

    @classmethod
    def _unchecked(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> BitmapWeight:
        return cls(tensors["values"], tensors["bitmaps"], tensors["offsets"], shape)


FORMATS: dict[str, type[SparseWeight]] = {cls.format: cls for cls in (Sparse24Weight, BitmapWeight)}


def format_class(name: str) -> type[SparseWeight]:
    """The container of a format's name. ValueError names those that exist."""
    if name not in FORMATS:
        raise ValueError(f"format: got {name!r}, accepted: {', '.join(map(repr, FORMATS))}")
    return FORMATS[name]


def _checked_dense(dense: Tensor, mask: Tensor | None) -> Tensor:
    if not isinstance(dense, Tensor):
        raise TypeError(f"dense: got {type(dense).__name__}, accepted: a tensor [out_features, in_features]")
    if dense.dtype not in DTYPES:
        raise TypeError(f"dense: got dtype {dense.dtype}, accepted: float32, bfloat16, float16, float64")
    if dense.dim() != 2 or dense.layout != torch.strided:
        raise ValueError(f"dense: got shape {list(dense.shape)} ({dense.layout}), accepted: a dense matrix [N, K]")
    dense = dense.detach()
    if mask is None:
        return dense
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: got {getattr(mask, 'dtype', type(mask).__name__)}, accepted: a boolean tensor")
    if mask.shape != dense.shape:
        raise ValueError(f"mask: got shape {list(mask.shape)}, accepted: that of the weight, {list(dense.shape)}")
    return torch.where(mask, dense, 0.0)


def _check_names(tensors: dict[str, Tensor], names: tuple[str, ...]) -> None:
    if sorted(tensors) != sorted(names):
        raise ValueError(f"tensors: got {sorted(tensors)}, accepted: {sorted(names)}")


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, accepted: {', '.join(map(str, dtypes))}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, accepted: {list(shape)}")


def _shape_from(text: str, path: object) -> tuple[int, int]:
    try:
        n, k = json.loads(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"path: {path} names no shape") from error
    if not (isinstance(n, int) and isinstance(k, int) and n >= 0 and k >= 0):
        raise ValueError(f"path: {path} names the shape {text}, accepted: [out_features, in_features]")
    return n, k


def _bits_in_padding(bitmaps: Tensor, shape: tuple[int, int]) -> bool:
    """Whether the last row or column of tiles stores anything beyond the matrix."""
    n, k = shape
    if bitmaps.numel() == 0:
        return False
    tiles = bitmaps.reshape(-1, padded(k, TILE_COLUMNS) // TILE_COLUMNS, TILE_ROWS)
    rows, columns = n - (len(tiles) - 1) * TILE_ROWS, k - (tiles.shape[1] - 1) * TILE_COLUMNS
    below = tiles[-1, :, rows:] != 0
    right = tiles[:, -1] >> (columns - 1) >> 1  # a shift by 64 is not defined
    if columns < TILE_COLUMNS:
        right = right & ((1 << (TILE_COLUMNS - columns)) - 1)  # int64 shifts its sign in
    return bool(below.any() | ((right != 0) & (columns < TILE_COLUMNS)).any())


def _popcount(words: Tensor) -> Tensor:
    """Set bits of each int64: sums of neighbouring fields of 1, 2, 4 bits, then of the eight bytes."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return sum(((x >> shift) & 0xFF for shift in range(0, 64, 8)), torch.zeros_like(x))
