"""Sparse models through ``from_pretrained``: the quantization method ``"pyfast"`` of transformers.

Importing this module registers it; ``import pyfast`` does that as soon as transformers is imported. A model whose
``config.json`` has the entry of :mod:`pyfast.sparse.pretrained` then comes back with its
:class:`~pyfast.nn.SparseLinear` layers, from any number of safetensors shards and for any ``dtype`` and ``device_map``.
Once loaded it is an ordinary model: it trains, casts and saves like the one that was saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyfast.sparse.pretrained import ENTRY_VERSION, METHOD, check_entry, check_files, check_layers, make_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # which is being imported when this module is


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """The entry of ``config.json``: which layers are sparse, in which format, with how many values."""

    def __init__(self, layers: dict[str, dict[str, Any]], version: int = ENTRY_VERSION, quant_method: str = METHOD):
        self.quant_method = quant_method  # type: ignore[assignment] # theirs are an enumeration
        self.version = version
        self.layers = check_entry(version, layers)


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Makes room for the sparse layers before tensors are read, and checks them afterwards."""

    requires_calibration = True  # a dense checkpoint is made sparse by pyfast.sparsify, not while it is read
    quantization_config: SparseConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        found = make_room(model, self.quantization_config.layers, model.base_model_prefix)
        check_files(found, self.quantization_config.layers, checkpoint_files or ())
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_layers(model)
        # What marks a quantized model forbids casting and training, which these layers can do.
        del model.hf_quantizer, model.quantization_method, model.is_quantized
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "to_dict"):
                vars(config).pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
