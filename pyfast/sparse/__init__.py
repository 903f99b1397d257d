"""Sparse weights: formats, masks, the product, whole models."""

from pyfast.sparse.convert import sparsify
from pyfast.sparse.formats import BitmapWeight, Sparse24Weight, SparseWeight
from pyfast.sparse.linear import SparseLinear, sparse_linear
from pyfast.sparse.masks import magnitude_mask
from pyfast.sparse.pruning import PrunedLayer, choose_mask, masks_of, prune, rewind, sparsegpt

__all__ = [
    "BitmapWeight",
    "PrunedLayer",
    "Sparse24Weight",
    "SparseLinear",
    "SparseWeight",
    "choose_mask",
    "magnitude_mask",
    "masks_of",
    "prune",
    "rewind",
    "sparse_linear",
    "sparsegpt",
    "sparsify",
]
