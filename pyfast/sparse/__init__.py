"""Sparse weights: formats, masks, the product, whole models."""

from pyfast.sparse.convert import sparsify
from pyfast.sparse.formats import BitmapWeight, Sparse24Weight, SparseWeight
from pyfast.sparse.linear import SparseLinear, sparse_linear
from pyfast.sparse.masks import magnitude_mask

__all__ = [
    "BitmapWeight",
    "Sparse24Weight",
    "SparseLinear",
    "SparseWeight",
    "magnitude_mask",
    "sparse_linear",
    "sparsify",
]
