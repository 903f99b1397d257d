"""Choosing the mask: for one matrix, and for whole models layer by layer."""

from pyfast.sparse.pruning.model import PrunedLayer, prune
from pyfast.sparse.pruning.rewind import masks_of, rewind
from pyfast.sparse.pruning.scores import choose_mask
from pyfast.sparse.pruning.sparsegpt import sparsegpt

__all__ = ["PrunedLayer", "choose_mask", "masks_of", "prune", "rewind", "sparsegpt"]
