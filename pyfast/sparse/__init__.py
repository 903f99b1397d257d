"""Sparse weights: formats, masks, the product and its plan, whole models, models on disk."""

from pyfast.sparse.calibration import calibrate
from pyfast.sparse.convert import sparsify
from pyfast.sparse.formats import BitmapWeight, Sparse24Weight, SparseWeight
from pyfast.sparse.frozen import FrozenLinear, freeze
from pyfast.sparse.fuse import FusedGatedMLP, fuse
from pyfast.sparse.joined import JoinedPart
from pyfast.sparse.layouts import drop_layouts, layout_bytes, set_layouts
from pyfast.sparse.linear import SparseLinear, prepare, sparse_linear
from pyfast.sparse.masks import magnitude_mask
from pyfast.sparse.planning import Plan, break_even, plan
from pyfast.sparse.pretrained import save_pretrained
from pyfast.sparse.pruning import PrunedLayer, choose_mask, masks_of, prune, rewind, sparsegpt

__all__ = [
    "BitmapWeight",
    "FrozenLinear",
    "FusedGatedMLP",
    "JoinedPart",
    "Plan",
    "PrunedLayer",
    "Sparse24Weight",
    "SparseLinear",
    "SparseWeight",
    "break_even",
    "calibrate",
    "choose_mask",
    "drop_layouts",
    "freeze",
    "fuse",
    "layout_bytes",
    "magnitude_mask",
    "masks_of",
    "plan",
    "prepare",
    "prune",
    "rewind",
    "save_pretrained",
    "set_layouts",
    "sparse_linear",
    "sparsegpt",
    "sparsify",
]
