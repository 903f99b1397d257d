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

from pyfast.ops import bitmap_convert, bitmask_convert, sparse24_convert
from pyfast.reference.bitmap_convert import TILE_COLUMNS, TILE_ROWS
from pyfast.reference.sparse24_convert import COLUMN_UNIT, padded
from pyfast.sparse.checks import check_bitmask, check_tensor, popcount

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORED_DTYPES = (*DTYPES, torch.int8)
FORMAT_VERSION = 2
LARGEST_CODE = 127  # of int8 values: symmetric, -128 is not used

Self = TypeVar("Self", bound="SparseWeight")


class SparseWeight(ABC):
    """A weight [N, K] of a linear layer in a sparse form.

    Attributes:
        values: the stored elements, in the order of the format.
        scales: float32 ``[N]`` where the values are int8, made by :meth:`quantize`: an element is
            scales[row] · value. None where the values are numbers themselves.
        shape: (N, K) of the dense weight: out_features, in_features.
    """

    format: ClassVar[str]
    names: ClassVar[tuple[str, ...]]  # of the tensors, but for scales
    values: Tensor
    scales: Tensor | None
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

    def to_dense(self) -> Tensor:
        """The dense weight [N, K] on the device of the values: bit for bit in their dtype; of int8 values, the float32
        products of value and scale."""
        dense = self._decompress()
        return dense if self.scales is None else dense * self.scales[:, None]

    def quantize(self: Self) -> Self:
        """The same pattern with int8 values and one float32 scale a row.

        Symmetric, per output channel, round to nearest: scale = max|w| / 127 of the row (no smaller than the smallest
        normal float32), value = w / scale rounded to the nearest integer, ties to even. The error of an element is at
        most half a scale. No calibration: activations stay floating point (weight-only quantization).

        Raises:
            ValueError: the values are int8 already, or a row holds NaN, infinity or more than float32 can scale.
        """
        if self.scales is not None:
            raise ValueError("weight: holds int8 values already")
        dense = self._decompress()
        exact = dense if dense.dtype == torch.float64 else dense.float()
        largest = exact.abs().amax(1) if exact.shape[1] else exact.new_zeros(exact.shape[0])
        scales = (largest / LARGEST_CODE).float().clamp(min=torch.finfo(torch.float32).tiny)
        bad = (~torch.isfinite(scales)).nonzero()
        if len(bad):
            raise ValueError(f"weight: row {int(bad[0])} holds NaN, infinity or more than float32 can scale")
        codes = (exact / scales[:, None]).round().to(torch.int8)
        return self._unchecked({**self.tensors(), "values": self._gather(codes), "scales": scales}, self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The flat tensors that make up the weight, by name; ``scales`` among them where the values are int8."""
        tensors = {name: getattr(self, name) for name in self.names}
        return tensors if self.scales is None else tensors | {"scales": self.scales}

    @classmethod
    def from_tensors(cls: type[Self], tensors: dict[str, Tensor], shape: tuple[int, int]) -> Self:
        """Puts a weight together and checks it: shapes, dtypes and the pattern. ValueError where they disagree."""
        cls._check_scales(tensors, shape)
        cls._check(tensors, shape)
        return cls._unchecked(tensors, shape)

    @classmethod
    def _check_scales(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> None:
        """ValueError where a tensor is missing or too many, or the scales are not those of int8 values."""
        quantized = "values" in tensors and tensors["values"].dtype == torch.int8
        _check_names(tensors, (*cls.names, "scales") if quantized else cls.names)
        if quantized:
            scales = tensors["scales"]
            check_tensor("scales", scales, (torch.float32,), (shape[0],))
            if not bool((torch.isfinite(scales) & (scales > 0)).all()):
                raise ValueError("scales: hold a number that is not positive and finite; the weight is damaged")

    @classmethod
    @abstractmethod
    def empty(
        cls: type[Self],
        shape: tuple[int, int],
        stored: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        int8: bool = False,
    ) -> Self:
        """A weight of ``stored`` values whose tensors have no content yet, to read one into (of ``dtype``, or int8 with
        scales). ValueError where the format has no such number of values for the shape."""

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
        """Like ``Tensor.to``: device and floating dtype; the pattern follows to the device. A dtype changes the values
        where they are floating point; int8 values and their scales stay as they are."""
        tensors = self.tensors()
        if self.scales is None:
            tensors["values"] = self.values.to(*args, **kwargs)
        device = self.values.new_empty(0, dtype=torch.float32).to(*args, **kwargs).device
        return self._unchecked({name: tensor.to(device) for name, tensor in tensors.items()}, self.shape)

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

    @abstractmethod
    def _decompress(self) -> Tensor:
        """The stored elements as they are, at their places in [N, K]."""

    @abstractmethod
    def _gather(self, dense: Tensor) -> Tensor:
        """The elements of ``dense`` [N, K], of any dtype, at the stored places, in the order of the values."""

    @classmethod
    @abstractmethod
    def _check(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> None:
        """ValueError where the values and the pattern are no weight of this shape."""

    @classmethod
    def _unchecked(cls: type[Self], tensors: dict[str, Tensor], shape: tuple[int, int]) -> Self:
        return cls(*(tensors[name] for name in cls.names), shape, tensors.get("scales"))  # type: ignore[call-arg]

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
    names = ("values", "metadata")

    def __init__(self, values: Tensor, metadata: Tensor, shape: tuple[int, int], scales: Tensor | None = None):
        self.values, self.metadata, self.shape, self.scales = values, metadata, shape, scales

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

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        stored: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        int8: bool = False,
    ) -> Sparse24Weight:
        n, k = shape[0], padded(shape[1], COLUMN_UNIT)
        if stored != n * k // 2:
            raise ValueError(f"stored: got {stored}, accepted for 2:4 and the shape {list(shape)}: {n * k // 2}")
        values = torch.empty(n, k // 2, dtype=torch.int8 if int8 else dtype, device=device)
        scales = torch.empty(n, dtype=torch.float32, device=device) if int8 else None
        return cls(values, torch.empty(n, k // 16, dtype=torch.int16, device=device), shape, scales)

    def _decompress(self) -> Tensor:
        return sparse24_convert.decompress(self.values, self.metadata, *self.shape)

    def _gather(self, dense: Tensor) -> Tensor:
        return sparse24_convert.gather(dense, self.metadata)

    @classmethod
    def _check(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> None:
        n, k = shape[0], padded(shape[1], COLUMN_UNIT)
        check_tensor("values", tensors["values"], STORED_DTYPES, (n, k // 2))
        check_tensor("metadata", tensors["metadata"], (torch.int16,), (n, k // 16))
        metadata = tensors["metadata"]
        nibbles = (metadata.to(torch.int64).unsqueeze(-1) >> torch.arange(0, 16, 4, device=metadata.device)) & 15
        legal = torch.zeros(16, dtype=torch.bool, device=metadata.device)
        legal[[0x4, 0x8, 0x9, 0xC, 0xD, 0xE]] = True
        if not bool(legal[nibbles].all()):
            raise ValueError("metadata: holds a nibble that names no pair of columns; the weight is damaged")


class BitmapWeight(SparseWeight):
    """An unstructured sparse weight: one bit an element and the stored values.

    Tiles of 16 rows × 64 columns, a word of 64 bits a row: ``bitmaps`` int64 ``[tiles, 16]``, ``values`` flat in the
    order of tile, row, column, ``offsets`` int64 ``[tiles + 1]`` into them. 1.06 bits an element above the values.
    Any pattern is accepted, N:M patterns (1:4, 4:8, …) too.
    """

    format = "bitmap"
    names = ("values", "bitmaps", "offsets")

    def __init__(
        self, values: Tensor, bitmaps: Tensor, offsets: Tensor, shape: tuple[int, int], scales: Tensor | None = None
    ):
        self.values, self.bitmaps, self.offsets, self.shape, self.scales = values, bitmaps, offsets, shape, scales

    @property
    def density(self) -> float:
        """Stored elements over all elements."""
        n, k = self.shape
        return self.values.numel() / max(n * k, 1)

    @classmethod
    def from_dense(cls, dense: Tensor, *, mask: Tensor | None = None) -> BitmapWeight:
        dense = _checked_dense(dense, mask)
        return cls(*bitmap_convert.compress(dense), (dense.shape[0], dense.shape[1]))

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        stored: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        int8: bool = False,
    ) -> BitmapWeight:
        if not 0 <= stored <= shape[0] * shape[1]:
            raise ValueError(f"stored: got {stored}, accepted for the shape {list(shape)}: 0 to {shape[0] * shape[1]}")
        tiles = bitmap_convert.tile_count(*shape)
        values = torch.empty(stored, dtype=torch.int8 if int8 else dtype, device=device)
        bitmaps = torch.empty(tiles, TILE_ROWS, dtype=torch.int64, device=device)
        scales = torch.empty(shape[0], dtype=torch.float32, device=device) if int8 else None
        return cls(values, bitmaps, torch.empty(tiles + 1, dtype=torch.int64, device=device), shape, scales)

    @classmethod
    def from_bitmask(
        cls,
        shape: tuple[int, int] | Tensor,
        compressed: Tensor,
        bitmask: Tensor,
        row_offsets: Tensor,
        *,
        scales: Tensor | None = None,
    ) -> BitmapWeight:
        """Converts a row-major bitmask, the layout in which sparse checkpoints are exchanged (``"sparse-bitmask"`` of
        the compressed-tensors format; docs/formats.md).

        Args:
            shape: (N, K), or an integer tensor that holds them.
            compressed: the stored elements ``[S]`` in the order of row, column; float32, bfloat16, float16, float64,
                or int8 with ``scales`` float32 ``[N]``.
            bitmask: uint8 ``[N, ceil(K/8)]``; element (i, j) is stored where bit j % 8 of byte j // 8 of row i is set.
            row_offsets: int64 ``[N]``, where each row begins in ``compressed``.

        Raises:
            ValueError: a wrong dtype, shape or device, bits beyond K, or counts that disagree; named in the message.
        """
        check_tensor("compressed", compressed, STORED_DTYPES, None)
        n, k = check_bitmask(shape, compressed, bitmask, row_offsets)
        values, bitmaps, offsets = bitmask_convert.from_bitmask(
            compressed.contiguous(), bitmask.contiguous(), row_offsets.contiguous(), k
        )
        tensors = {"values": values, "bitmaps": bitmaps, "offsets": offsets}
        tensors |= {} if scales is None else {"scales": scales}
        cls._check_scales(tensors, (n, k))
        return cls._unchecked(tensors, (n, k))

    def to_bitmask(self) -> dict[str, Tensor]:
        """The weight as a row-major bitmask: ``shape`` int64 [2], ``compressed``, ``bitmask`` and ``row_offsets`` (and
        ``scales``), as :meth:`from_bitmask` takes them."""
        compressed, bitmask, row_offsets = bitmask_convert.to_bitmask(
            self.values, self.bitmaps, self.offsets, *self.shape
        )
        tensors = {"shape": torch.tensor(self.shape), "compressed": compressed, "bitmask": bitmask}
        tensors["row_offsets"] = row_offsets
        return tensors if self.scales is None else tensors | {"scales": self.scales}

    def _decompress(self) -> Tensor:
        return bitmap_convert.decompress(self.values, self.bitmaps, self.offsets, *self.shape)

    def _gather(self, dense: Tensor) -> Tensor:
        return bitmap_convert.gather(dense, self.bitmaps, self.offsets, self.values.numel())

    @classmethod
    def _check(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> None:
        values, bitmaps, offsets = tensors["values"], tensors["bitmaps"], tensors["offsets"]
        tiles = bitmap_convert.tile_count(*shape)
        check_tensor("values", values, STORED_DTYPES, None)
        check_tensor("bitmaps", bitmaps, (torch.int64,), (tiles, TILE_ROWS))
        check_tensor("offsets", offsets, (torch.int64,), (tiles + 1,))
        counts = popcount(bitmaps).sum(-1)
        if values.dim() != 1 or int(offsets[0]) != 0 or not torch.equal(offsets.diff(), counts):
            raise ValueError("offsets: do not agree with the bitmaps; the weight is damaged")
        if int(offsets[-1]) != values.numel():
            raise ValueError(
                f"values: got {values.numel()} elements, the bitmaps hold {int(offsets[-1])}; the weight is damaged"
            )
        if _bits_in_padding(bitmaps, shape):
            raise ValueError(f"bitmaps: hold bits outside the shape {list(shape)}; the weight is damaged")


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
