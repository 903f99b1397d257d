"""Sparse weights: formats, masks, the product and its plan, whole models."""

from pyfast.sparse.calibration import calibrate
from pyfast.sparse.convert import sparsify
from pyfast.sparse.formats import BitmapWeight, Sparse24Weight, SparseWeight
from pyfast.sparse.layouts import drop_layouts, layout_bytes, set_layouts
from pyfast.sparse.linear import SparseLinear, prepare, sparse_linear
from pyfast.sparse.masks import magnitude_mask
from pyfast.sparse.planning import Plan, break_even, plan
from pyfast.sparse.pruning import PrunedLayer, choose_mask, masks_of, prune, rewind, sparsegpt

__all__ = [
    "BitmapWeight",
    "Plan",
    "PrunedLayer",
    "Sparse24Weight",
    "SparseLinear",
    "SparseWeight",
    "break_even",
    "calibrate",
    "choose_mask",
    "drop_layouts",
    "layout_bytes",
    "magnitude_mask",
    "masks_of",
    "plan",
    "prepare",
    "prune",
    "rewind",
    "set_layouts",
    "sparse_linear",
    "sparsegpt",
    "sparsify",
]
