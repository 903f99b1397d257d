"""Where a Hugging Face model keeps what turns hidden states into logits: the final norm and the head."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm")
# Fields of a configuration by which a model multiplies its logits; a head alone would not give the same.
_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


class Head(NamedTuple):
    """``weight`` [V, H], ``bias`` [V] or None, and the softcap that the model lays on its logits, or None."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None


def output_head(name: str, model: Any) -> Head:
    """The head of a language model; ``name`` is the argument that errors speak of.

    Raises:
        TypeError, ValueError: a model without one linear head, or one that scales its logits besides.
    """
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"{name}: got {type(model).__name__}, accepted: a language model of transformers, unwrapped")
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(f"{name}: {type(model).__name__} has no linear head (get_output_embeddings gives {head!r})")
    config = _text_config(model)
    for scale in _LOGIT_SCALES:
        if getattr(config, scale, None) not in (None, 1, 1.0):
            raise ValueError(f"{name}: {type(model).__name__} scales its logits ({scale}), which is not supported")
    return Head(head.weight, getattr(head, "bias", None), getattr(config, "final_logit_softcapping", None))


def final_norm(name: str, model: nn.Module) -> nn.Module:
    """The norm between the last layer of a decoder and its head.

    Raises:
        ValueError: a model that keeps none under a known name.
    """
    body = getattr(model, "base_model", model)
    for part in (body, getattr(body, "decoder", None)):
        for attribute in _NORMS:
            norm = getattr(part, attribute, None)
            if isinstance(norm, nn.Module):
                return norm
    raise ValueError(f"{name}: {type(model).__name__} has no final norm under a known name ({', '.join(_NORMS)})")


def _text_config(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model, "config") else None
