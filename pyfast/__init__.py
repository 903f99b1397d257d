"""pyfast: what does compression really buy, on this machine?

Three doors: :func:`distillation_loss` (fused), :func:`sparse_linear` and :func:`sparsify` (2:4 and bitmap weights),
and :mod:`pyfast.structured` (layers removed, verified). ``pyfast bench`` measures all three against the best dense.
"""

from pyfast import backends, nn, parallel, structured
from pyfast._version import __version__
from pyfast.capture import capture_attention
from pyfast.contrastive import contrastive_distillation_loss
from pyfast.hidden import hidden_loss, hidden_states_loss
from pyfast.integrations._on_import import register_when_imported
from pyfast.layer_map import layer_map
from pyfast.logit_lens import logit_lens_loss
from pyfast.ops.attention_distill import attention_distillation_loss
from pyfast.ops.distill_kl import distillation_loss, distillation_value_and_grad
from pyfast.ops.linear_distill import linear_distillation_loss
from pyfast.ops.topk_distill import topk_distillation_loss
from pyfast.sparse import BitmapWeight, Sparse24Weight, sparse_linear, sparsify

__all__ = [
    "BitmapWeight",
    "Sparse24Weight",
    "__version__",
    "attention_distillation_loss",
    "backends",
    "capture_attention",
    "contrastive_distillation_loss",
    "distillation_loss",
    "distillation_value_and_grad",
    "hidden_loss",
    "hidden_states_loss",
    "layer_map",
    "linear_distillation_loss",
    "logit_lens_loss",
    "nn",
    "parallel",
    "sparse_linear",
    "sparsify",
    "structured",
    "topk_distillation_loss",
]

register_when_imported()
