"""Distillation through the logit lens: what intermediate layers would predict, compared layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast.layer_map import layer_map
from pyfast.ops import _arguments as arguments
from pyfast.ops._linear_chunks import Operands
from pyfast.ops.linear_distill import layers_loss


def logit_lens_loss(
    student_hiddens: Sequence[Tensor],
    teacher_hiddens: Sequence[Tensor],
    student_norm: Callable[[Tensor], Tensor],
    student_head: Tensor,
    teacher_norm: Callable[[Tensor], Tensor],
    teacher_head: Tensor,
    *,
    layers: Mapping[int, int] | Sequence[int] | Sequence[tuple[int, int]] | None = None,
    layer_weights: Sequence[float] | None = None,
    divergence: str = "jsd",
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    train_head: bool = True,
    last_is_normed: bool = True,
    chunk_size: int | None = None,
    **options: Any,
) -> Tensor:
    """Divergence between what the intermediate layers of student and teacher predict (DistillLens, arXiv 2602.13567).

    The hidden states of each chosen layer go through their own model's final norm and head, as if the layer were the
    last, and are compared by :func:`linear_distillation_loss`; the result is the mean over the layers. The divergence
    is symmetric by default (``jsd`` with β = ½): a middle layer of the student should neither miss what the teacher's
    considers nor consider what it does not.

    All layers run as one batch of layers × tokens, in chunks: no logits in full, one gradient of the head.

    Args:
        student_hiddens: as ``output_hidden_states=True`` of Hugging Face gives it: L + 1 tensors ``[..., H_s]``, the
            embeddings first. **Layers are counted from 0 without the embeddings: layer i is entry i + 1.** Gradients
            flow to the layers that are chosen.
        teacher_hiddens: likewise, of the same leading shape; no gradient flows to it.
        student_norm, teacher_norm: the final norm of each model (``model.model.norm``), a module or function that works
            on the last dimension. Gradients flow to the student's.
        student_head, teacher_head: ``[V, H_s]`` and ``[V, H_t]`` (``model.lm_head.weight``).
        student_bias, teacher_bias: ``[V]``, of the heads; the student's receives a gradient.
        layers: which layers are compared. None: all of the student's but the last, which the loss on the output
            covers. Student layers alone (``[3, 7]``) take the teacher's at the same relative depth, see
            :func:`pyfast.layer_map.layer_map`; a mapping ``{3: 7}`` or pairs ``[(3, 7)]`` name both.
        layer_weights: one weight, 0 or above, for each of ``layers`` (None: the same for all), scaled to sum 1.
        divergence: as in :func:`linear_distillation_loss`.
        train_head: False keeps gradients from the student's head (and ``student_bias``); hidden states and norm still
            get theirs.
        last_is_normed: the last entry of both tuples has been through the final norm already, as models of Hugging Face
            return it; the norm is then not applied to it again.
        chunk_size: as in :func:`linear_distillation_loss`.
        options: the options of :func:`pyfast.distillation_loss`. ``labels`` and ``mask`` have the shape of one
            layer's tokens.

    Returns:
        The weighted mean over layers of what :func:`linear_distillation_loss` returns for each.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, length or value, named in the message.
    """
    given = arguments.LossOptions.of("logit_lens_loss", divergence, options)
    depths = []
    for name, hiddens in (("student_hiddens", student_hiddens), ("teacher_hiddens", teacher_hiddens)):
        if not isinstance(hiddens, Sequence) or not all(isinstance(hidden, Tensor) for hidden in hiddens):
            raise TypeError(f"{name}: got {type(hiddens).__name__}, accepted: a tuple of tensors, the embeddings first")
        if len(hiddens) < 2:
            raise ValueError(f"{name}: got {len(hiddens)} tensors, accepted: the embeddings and at least one layer")
        depths.append(len(hiddens) - 1)
    for name, norm in (("student_norm", student_norm), ("teacher_norm", teacher_norm)):
        if not callable(norm):
            raise TypeError(
                f"{name}: got {type(norm).__name__}, accepted: the model's final norm, a module or function"
            )
    pairs = _pairs(layers, *depths)
    weights = _weights(layer_weights, len(pairs))

    def seen(hiddens: Sequence[Tensor], layer: int, norm: Callable[[Tensor], Tensor]) -> Tensor:
        last = layer == len(hiddens) - 2
        return hiddens[layer + 1] if last and last_is_normed else norm(hiddens[layer + 1])

    student = [seen(student_hiddens, layer, student_norm) for layer, _ in pairs]
    with torch.no_grad():
        teacher = [seen(teacher_hiddens, layer, teacher_norm) for _, layer in pairs]
    if not train_head:
        student_head = student_head.detach()
        student_bias = None if student_bias is None else student_bias.detach()
    operands = Operands(student, student_head, student_bias, teacher, teacher_head, teacher_bias)
    return layers_loss(weights, operands, given, chunk_size)


def _pairs(
    layers: Mapping[int, int] | Sequence[int] | Sequence[tuple[int, int]] | None, student: int, teacher: int
) -> list[tuple[int, int]]:
    """The chosen (student layer, teacher layer), of models of ``student`` and ``teacher`` layers."""
    uniform = layer_map(student, teacher)
    if layers is None:
        if student == 1:
            raise ValueError("layers: got None, accepted for a student of one layer, which has none between: [0]")
        return uniform[:-1]
    accepted = f"student layers from 0 to {student - 1}, alone or each with a teacher layer from 0 to {teacher - 1}"
    if not isinstance(layers, Mapping | Sequence) or isinstance(layers, str):
        raise TypeError(f"layers: got {type(layers).__name__}, accepted: {accepted}")
    chosen = []
    for item in layers.items() if isinstance(layers, Mapping) else layers:
        pair = tuple(item) if isinstance(item, Sequence) else (item,)
        if len(pair) not in (1, 2) or not all(isinstance(i, int) and not isinstance(i, bool) for i in pair):
            raise TypeError(f"layers: got {item!r}, accepted: {accepted}")
        if any(not 0 <= i < depth for i, depth in zip(pair, (student, teacher), strict=False)):
            raise ValueError(f"layers: got {item!r}, accepted: {accepted}")
        chosen.append(uniform[pair[0]] if len(pair) == 1 else (pair[0], pair[1]))
    if not chosen:
        raise ValueError(f"layers: got none, accepted: {accepted}")
    return chosen


def _weights(layer_weights: Sequence[float] | None, count: int) -> list[float]:
    """A weight for each chosen layer, of sum 1."""
    if layer_weights is None:
        return [1 / count] * count
    if len(layer_weights) != count:
        raise ValueError(f"layer_weights: got {len(layer_weights)}, accepted: {count}, one for each of layers")
    weights = [arguments.not_negative("layer_weights", weight) for weight in layer_weights]
    total = sum(weights)
    if total == 0:
        raise ValueError("layer_weights: got zeros alone, accepted: at least one above 0")
    return [weight / total for weight in weights]
