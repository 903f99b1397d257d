"""The product of many tokens with a 2:4 weight by cuSPARSELt, through torch.

At few tokens the bytes of the weight are the bound, and ``csrc/cuda/sparse24_linear.cuh`` reads them as they are
stored. At many the arithmetic is: there tensor cores skip the zeros at twice their dense rate, which this library
reaches with the instructions of the newest GPUs. Its layout is its own: it is made from the dense weight, which is
freed.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyfast.reference.epilogue import epilogue
from pyfast.sparse.formats import Sparse24Weight

DTYPES = (torch.bfloat16, torch.float16)
SHAPE_UNIT = 16  # rows and columns of a weight, in 16-bit elements
TOKEN_UNIT = 8
LEAST_CAPABILITY = (8, 0)

# alg_id, split_k, split_k_mode. What cuSPARSELt takes where nothing was searched.
_UNSEARCHED = 0, 1, -1


def available(device: torch.device | str | int | None = None) -> tuple[bool, str]:
    """Whether cuSPARSELt serves that CUDA device (the current one by default), and why (not)."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if not hasattr(torch._C, "_cusparselt"):
        return False, f"torch {torch.__version__} is built without cuSPARSELt"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
        return False, f"compute capability {found}, cuSPARSELt needs {least}"
    return True, f"cuSPARSELt {torch.backends.cusparselt.version()}"


@lru_cache(maxsize=64)
def serves(shape: tuple[int, int], device: torch.device) -> bool:
    """Whether cuSPARSELt takes 16-bit weights of this shape on that device."""
    return available(device)[0] and all(size > 0 and size % SHAPE_UNIT == 0 for size in shape)


def bucket(tokens: int) -> int:
    """The numbers of tokens that share an algorithm: up to the next power of two, 8 at least."""
    return max(TOKEN_UNIT, 1 << (tokens - 1).bit_length())


class CusparseltLayout:
    """A 2:4 weight as cuSPARSELt wants it: 9/16 of the dense bytes.

    The fastest of its algorithms is searched at the first call of each :func:`bucket`, which runs them all and waits
    for the device: call once with each number of tokens before a CUDA graph is captured. In a capture an algorithm that
    was searched before is taken, else the default one.
    """

    def __init__(self, compressed: Tensor, shape: tuple[int, int]) -> None:
        self.compressed, self.shape = compressed, shape
        self._algorithms: dict[tuple[int, bool], tuple[int, int, int]] = {}  # by bucket, with a bias or without
        self._lock = threading.Lock()

    @classmethod
    def of(cls, weight: Sparse24Weight) -> CusparseltLayout:
        """The layout of a weight on CUDA of 16-bit elements. RuntimeError where :func:`available` says no, ValueError
        for a dtype or shape that cuSPARSELt does not take."""
        if weight.values.device.type != "cuda":
            raise RuntimeError(f"weight: no cuSPARSELt on {weight.values.device}, accepted: a CUDA device")
        served, reason = available(weight.values.device)
        if not served:
            raise RuntimeError(f"weight: no cuSPARSELt here: {reason}")
        return cls(_compressed(weight), weight.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.compressed.nbytes

    def linear(
        self, rows: Tensor, bias: Tensor | None = None, activation: int = 0, mul: Tensor | None = None
    ) -> Tensor:
        """f(rows Wᵀ + bias) · mul, rows [tokens, k] to [tokens, n] of the weight's dtype.

        The product is a view of [n, tokens]: cuSPARSELt writes that faster than its transpose.
        """
        tokens = rows.shape[0]
        if tokens == 0:
            return rows.new_empty(0, self.shape[0])
        missing = -tokens % TOKEN_UNIT
        columns = (pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()).t()
        alg_id, split_k, mode = self._algorithm(columns, bias)
        product = torch._cslt_sparse_mm(
            self.compressed, columns, bias=bias, alg_id=alg_id, split_k=split_k, split_k_mode=mode
        )
        return epilogue(product.t()[:tokens], activation, mul)

    def _algorithm(self, columns: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
        key = bucket(columns.shape[1]), bias is not None
        found = self._algorithms.get(key)
        if found is not None:
            return found
        if torch.cuda.is_current_stream_capturing():
            return _UNSEARCHED
        with self._lock:
            if key not in self._algorithms:
                self._algorithms[key] = _search(self.compressed, columns, bias)
            return self._algorithms[key]


def _compressed(weight: Sparse24Weight) -> Tensor:
    n, k = weight.shape
    if n == 0 or k == 0 or n % SHAPE_UNIT or k % SHAPE_UNIT:
        raise ValueError(f"weight: got shape [{n}, {k}], cuSPARSELt accepts multiples of {SHAPE_UNIT}")
    dense = weight.to_dense().detach()
    if dense.dtype not in DTYPES:
        raise ValueError(f"weight: got {dense.dtype}, accepted: {', '.join(map(str, DTYPES))}")
    return torch._cslt_compress(dense)


def _search(compressed: Tensor, columns: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
    alg_id, split_k, mode, _ = search(compressed, columns, bias, None, None, False)
    return alg_id, split_k, mode
