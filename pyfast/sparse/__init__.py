"""Sparse weights: formats, masks, the product, whole models, models on disk."""

from pyfast.sparse.convert import sparsify
from pyfast.sparse.formats import BitmapWeight, Sparse24Weight, SparseWeight
from pyfast.sparse.fuse import FusedGatedMLP, fuse
from pyfast.sparse.linear import SparseLinear, sparse_linear
from pyfast.sparse.masks import magnitude_mask
from pyfast.sparse.pretrained import save_pretrained

__all__ = [
    "BitmapWeight",
    "FusedGatedMLP",
    "Sparse24Weight",
    "SparseLinear",
    "SparseWeight",
    "fuse",
    "magnitude_mask",
    "save_pretrained",
    "sparse_linear",
    "sparsify",
]
