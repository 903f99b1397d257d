"""The constants of the cost model for a GPU, measured there and kept on disk (``pyfast calibrate --device cuda``).

Each product is timed in a CUDA graph that goes over copies of its weight until they exceed four times the second-level
cache: what a model sees whose weights do not fit it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyfast import _changes, _cuda_clock, _native
from pyfast._version import __version__
from pyfast.ops import sparse24_convert
from pyfast.ops.bitmap_linear import bitmap_linear
from pyfast.ops.sparse24_linear import sparse24_linear
from pyfast.sparse import cache, cuda_costs, cusparselt
from pyfast.sparse.cuda_costs import DENSITIES, FEW_TOKENS, MANY_TOKENS, SCATTERED_TOKENS, SLICED_TOKENS, CudaConstants
from pyfast.sparse.cusparselt import CusparseltLayout
from pyfast.sparse.formats import BitmapWeight, Sparse24Weight
from pyfast.sparse.scattered import ScatteredLayout
from pyfast.sparse.sliced import SlicedLayout

SHAPES = ((4096, 4096), (8192, 8192))  # a line through two sizes
_CALLS = 8  # in a graph, at the least

Times = dict[str, Any]  # microseconds, nested as the constants of the same name are


@lru_cache(maxsize=1)
def library() -> str:
    """Which library made an entry."""
    path = getattr(_native.CUDA, "__file__", None)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else "none"
    return f"pyfast {__version__}, native {digest}, torch {torch.__version__}"


_measured: dict[str, CudaConstants] = {}  # in this process


def constants(index: int) -> CudaConstants:
    """The constants of a GPU: those of its last calibration, else the built-in ones."""
    return _constants(torch.cuda.get_device_name(index))


@lru_cache(maxsize=16)
def _constants(device: str) -> CudaConstants:
    if device in _measured:
        return _measured[device]
    plain = cache.constants_of(device, library())
    if plain is not None:
        try:
            return cuda_costs.from_json(plain, "calibrated")
        except (KeyError, TypeError, ValueError) as error:
            cache.damaged(error)
    return cuda_costs.built_in(device)


def save(found: CudaConstants) -> Path | None:
    """Keeps a calibration, and uses it from now on in this process; the file, or None where it cannot be written."""
    _constants.cache_clear()
    _changes.rise()
    _measured[found.device] = found
    return cache.store(found.device, library(), cuda_costs.to_json(found))


def calibrate(
    *,
    say: Callable[[str], None] = lambda what: None,
    shapes: tuple[tuple[int, int], tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.bfloat16,
) -> CudaConstants:
    """Measures the constants of the current GPU, saves them and gives them back: a few seconds.

    Args:
        say: is told what is measured.
        shapes: (N, K) of a small and of a large weight.
        dtype: bfloat16 or float16.

    Raises:
        RuntimeError: there is no GPU, or no CUDA kernels.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("calibrate: torch sees no GPU")
    if _native.CUDA is None:
        raise RuntimeError(f"calibrate: {_native.CUDA_REASON}")
    with torch.inference_mode():
        small, large = (_times(say, shape, dtype) for shape in shapes)
    positions = tuple(n * k for n, k in shapes)
    lines = {name: _lines(small[name], large[name], positions) for name in large}
    found = CudaConstants(source="calibrated", device=torch.cuda.get_device_name(), **lines)
    save(found)
    return found


def _lines(small: Any, large: Any, positions: tuple[int, ...]) -> Any:
    """Lines through the times at two sizes, nested as they are; neither part below nothing."""
    if isinstance(large, tuple):
        return tuple(_lines(one, other, positions) for one, other in zip(small, large, strict=True))
    slope = max(large - small, 0.0) / (positions[1] - positions[0])
    begin = max(small - slope * positions[0], 0.0)
    return begin, (large - begin) / positions[1] * 1e6


def _times(say: Callable[[str], None], shape: tuple[int, int], dtype: torch.dtype) -> Times:
    n, k = shape
    dense = torch.randn(n, k, device="cuda", dtype=dtype)
    x = {tokens: torch.randn(tokens, k, device="cuda", dtype=dtype) for tokens in sorted({*FEW_TOKENS, *MANY_TOKENS})}

    def times(items: list[Any], multiply: Callable[[Tensor, Any], object], tokens: tuple[int, ...]) -> tuple:
        def of(count: int) -> float:
            return _microseconds(items, lambda item: multiply(x[count], item))

        return tuple(of(count) for count in tokens)

    say(f"{n}x{k}: dense products")
    found: Times = {"dense": times(_copies(dense, dense.nbytes), linear, MANY_TOKENS)}
    say(f"{n}x{k}: 2:4")
    two_four = Sparse24Weight(*sparse24_convert.prune(dense), shape)
    items = _copies(two_four, two_four.nbytes)
    found["sparse24"] = times(items, _direct24, FEW_TOKENS)
    found["sparse24_decompress"] = _microseconds(items, _to_dense)
    found["cusparselt"] = ()
    if cusparselt.serves(shape, dense.device):
        found["cusparselt"] = times([CusparseltLayout.of(item) for item in items], _by_layout, MANY_TOKENS)
    bitmaps: dict[str, list[Any]] = {"bitmap": [], "sliced": [], "scattered": [], "bitmap_decompress": []}
    for density in DENSITIES:
        say(f"{n}x{k}: bitmap, {density:.0%} stored")
        weight = BitmapWeight.from_dense(dense, mask=torch.rand(n, k, device="cuda") < density)
        items = _copies(weight, weight.nbytes)
        bitmaps["bitmap"].append(times(items, _direct, FEW_TOKENS))
        sliced, scattered = SlicedLayout.of(weight), ScatteredLayout.of(weight)
        bitmaps["sliced"].append(times(_copies(sliced, weight.nbytes), _by_layout, SLICED_TOKENS))
        bitmaps["scattered"].append(times(_copies(scattered, weight.nbytes), _by_layout, SCATTERED_TOKENS))
        bitmaps["bitmap_decompress"].append(_microseconds(items, _to_dense))
    for kernel in ("bitmap", "sliced", "scattered"):
        found[kernel] = tuple(zip(*bitmaps[kernel], strict=True))
    found["bitmap_decompress"] = tuple(bitmaps["bitmap_decompress"])
    return found


def _copies(weight: Any, nbytes: int) -> list[Any]:
    """The weight and copies of it, together more than four times the second-level cache."""
    count = 4 * _cuda_clock.l2_bytes() // nbytes
    return [weight, *(weight.clone() if isinstance(weight, Tensor) else copy.deepcopy(weight) for _ in range(count))]


def _microseconds(items: list[Any], call: Callable[[Any], object]) -> float:
    """Of a call, by calls over all items in one CUDA graph."""
    rounds = -(-_CALLS // len(items))
    captured = _cuda_clock.Captured([partial(call, item) for item in items] * rounds)
    return _cuda_clock.median_ms(captured) / (rounds * len(items)) * 1e3


def _direct(x: Tensor, weight: BitmapWeight) -> Tensor:
    tables = weight.values, weight.bitmaps, weight.offsets
    return bitmap_linear(x, *tables, None, None, weight.shape[0], 0, None, "cuda")


def _direct24(x: Tensor, weight: Sparse24Weight) -> Tensor:
    return sparse24_linear(x, weight.values, weight.metadata, None, None, 0, None, "cuda")


def _by_layout(x: Tensor, layout: Any) -> Tensor:
    y: Tensor = layout.linear(x, None, 0, None)
    return y


def _to_dense(weight: Any) -> Tensor:
    dense: Tensor = weight.to_dense()
    return dense
