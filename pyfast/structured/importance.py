"""Which layers a model could do without: one pass over text, one figure a layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.structured.families import Anatomy, anatomy

# Tokens turned into float64 at a time: bounds the extra memory at 2 x 1024 x hidden size x 8 bytes.
_ROWS = 1024


def block_influence(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]]) -> Tensor:
    """How much each layer turns the hidden state: 1 - mean cosine between what enters it and what leaves it.

    The block influence of ShortGPT (arXiv 2403.03853, equation 1). A layer at 0 passes every token on in the
    direction in which it came; the layers with the lowest figures are the first to be removed::

        influence = block_influence(model, batches)
        remove_layers(model, influence.argsort()[:2])

    Args:
        model: a transformers model of a taught family (Llama, Qwen2, Qwen3, Mistral, BERT, RoBERTa), with any
            head or none. Only its body runs, in evaluation mode and without gradients; every module's mode is
            put back afterwards.
        batches: an iterable, read once, of batches. A batch is a tensor of token ids, integers ``[B, T]``, or
            a mapping of keyword arguments of the model with ``input_ids`` ``[B, T]`` (or ``inputs_embeds``
            ``[B, T, H]``); tensors are moved to the model's device. Where ``attention_mask`` ``[B, T]`` is
            given, tokens with a 0 there do not count. Arguments that only the head reads, such as
            ``labels``, are passed over.

    Returns:
        float64 ``[num_layers]`` on the CPU, each in [0, 2], without unit. Every token that counts weighs the
        same, however the tokens are spread over batches. Cosines are computed and summed in float64. A token
        whose state is zero before and after a layer has cosine 1; zero on one side only, 0.

    Raises:
        TypeError: ``model`` is no transformers model, ``batches`` is a single batch, or a batch is malformed.
        ValueError: the family is not taught, no token counts, a shape or an id is wrong, or a hidden state is
            not finite.
    """
    parts = anatomy(model)
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: got {type(batches).__name__}, an iterable of batches such as [batch] is wanted")
    meter = _Meter(parts.layers)
    tokens = 0
    with evaluating(model), torch.no_grad(), meter.attached():
        for number, batch in enumerate(batches):
            arguments, mask = _read(batch, f"batches[{number}]", model, parts)
            meter.mask = mask
            parts.base(**arguments)
            tokens += int(mask.sum())
    if tokens == 0:
        raise ValueError("batches: no token to look at (no batch at all, or every token masked as padding)")
    influence = 1.0 - torch.stack([total.cpu() for total in meter.totals]) / tokens
    if not bool(torch.isfinite(influence).all()):
        bad = [index for index, value in enumerate(influence.tolist()) if value != value]
        raise ValueError(f"batches: on these tokens the hidden states at layers {bad} are not finite")
    return influence


class _Meter:
    """Sums, layer by layer and while the model runs, the cosines of the tokens that ``mask`` lets count.

    Hooks see the state entering and the state leaving a layer itself. (transformers' ``output_hidden_states``
    would not do: it keeps every state alive, and its last one has already been through the final norm.)
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.totals = [torch.zeros((), dtype=torch.float64) for _ in layers]
        self.mask = torch.empty(0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(self._hook(index), with_kwargs=True) for index, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            leaving = output[0] if isinstance(output, tuple) else output
            cosines = _cosines(entering.flatten(0, 1), leaving.flatten(0, 1))
            # where, not a product: what the model computes for padding may be NaN.
            counted = torch.where(self.mask.flatten().to(cosines.device), cosines, 0.0)
            self.totals[index] = self.totals[index].to(cosines.device) + counted.sum()

        return hook


def _cosines(entering: Tensor, leaving: Tensor) -> Tensor:
    """Cosine of each row of ``entering`` ``[n, H]`` with the same row of ``leaving``: float64 ``[n]``."""
    pieces = []
    for before, after in zip(entering.split(_ROWS), leaving.split(_ROWS), strict=True):
        x, y = before.double(), after.double()
        xx, yy, xy = (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)
        # One square root of the product, not a product of two roots: equal rows then give exactly 1.
        cosine = xy / (xx * yy).sqrt()
        cosine = torch.where((xx == 0) | (yy == 0), 0.0, cosine)
        pieces.append(torch.where((xx == 0) & (yy == 0), 1.0, cosine))
    return torch.cat(pieces)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` in evaluation mode, and each back in its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _read(batch: Any, name: str, model: nn.Module, parts: Anatomy) -> tuple[dict[str, Any], Tensor]:
    """The keyword arguments of the model's body for ``batch``, and the boolean mask ``[B, T]`` of tokens."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"{name}: got {type(batch).__name__}, "
            "a tensor of token ids or a mapping of arguments of the model is wanted"
        )
    accepted = set(inspect.signature(parts.base.forward).parameters)
    head_only = set(inspect.signature(model.forward).parameters) - accepted | {"labels"}
    unknown = [key for key in batch if key not in accepted and key not in head_only]
    if unknown:
        raise TypeError(f"{name}: {type(model).__name__} takes no argument {', '.join(map(repr, unknown))}")
    device = parts.base.get_input_embeddings().weight.device
    arguments = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key in accepted and value is not None
    }
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if isinstance(ids, Tensor):
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: input_ids has dtype {ids.dtype}, int64 or int32 is wanted")
        if ids.dim() != 2:
            raise ValueError(f"{name}: input_ids has shape {tuple(ids.shape)}, [batch, tokens] is wanted")
        shape = ids.shape
        words = parts.base.get_input_embeddings().num_embeddings
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= words):
            raise ValueError(f"{name}: input_ids has {int(ids.min())} to {int(ids.max())}, known are 0 to {words - 1}")
    elif isinstance(embeds, Tensor) and embeds.dim() == 3:
        shape = embeds.shape[:2]
    else:
        raise TypeError(
            f"{name}: a tensor input_ids [batch, tokens] or inputs_embeds [batch, tokens, hidden] is wanted, "
            f"got {', '.join(map(repr, batch)) or 'nothing'}"
        )
    if shape.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(shape)} holds no token")
    mask = arguments.get("attention_mask")
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=device)
    elif not isinstance(mask, Tensor) or mask.shape != shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: attention_mask is {got}, a tensor {tuple(shape)} like the tokens is wanted")
    if parts.has_cache:
        arguments["use_cache"] = False
    return arguments, mask != 0
