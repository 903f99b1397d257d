"""Layers that read the same x as one product: the query, key and value projections of an attention.

    x ──► q_proj ──► [tokens, n_q]                      ┌─► q_proj hands out y[..., :n_q]
    x ──► k_proj ──► [tokens, n_k]    x ──► one weight ─┼─► k_proj           y[..., n_q : n_q + n_k]
    x ──► v_proj ──► [tokens, n_v]          of all rows └─► v_proj           the rest

The module around them calls them one after the other, as it always did. The first one asked multiplies for all, the
others hand out what is waiting for them if they are asked with the very same tensor, and multiply anew if not: what is
given back never depends on the order, only how often is multiplied.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyfast.reference.bitmap_convert import TILE_ROWS
from pyfast.sparse.formats import BitmapWeight, SparseWeight
from pyfast.sparse.linear import SparseLinear

#: Children of an attention that read the same x, by the names that families give them.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


class Rows(nn.Module):
    """A layer whose rows are those of several, and what waits to be handed out of its last product.

    Args:
        layer: x ``[..., K]`` to ``[..., sum of sizes]``.
        sizes: the rows of each part.
    """

    def __init__(self, layer: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.sizes = layer, list(sizes)
        # x, its state and what is left of its product; replaced as a whole.
        self._waiting: tuple[Tensor, object, list[Tensor | None]] | None = None

    def take(self, place: int, x: Tensor) -> Tensor:
        """The part of the product with x."""
        state, waiting = _state(x), self._waiting
        parts: list[Tensor | None]
        if waiting is not None and waiting[0] is x and waiting[1] == state and waiting[2][place] is not None:
            parts = waiting[2]
        else:
            parts = list(self.layer(x).split(self.sizes, -1))
            self._waiting = x, state, parts
        part = parts[place]
        assert part is not None
        parts[place] = None
        if all(each is None for each in parts):
            self._waiting = None
        return part

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_waiting": None}


class JoinedPart(nn.Module):
    """One of several layers that are multiplied as one; made by :func:`pyfast.sparse.freeze`.

    Its x must not be written to between the calls of the parts where it is a tensor of inference mode, which counts no
    writes; no attention does that.
    """

    def __init__(self, rows: Rows, place: int) -> None:
        super().__init__()
        self.rows, self.place = rows, place
        self.out_features = rows.sizes[place]

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` to ``[..., out_features]``, a view of the joined product."""
        return self.rows.take(self.place, x)

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, part {self.place + 1} of {len(self.rows.sizes)}"


def _state(x: Tensor) -> object:
    """Another one after x was written to, and for another thread."""
    if torch.compiler.is_compiling():
        return None
    return threading.get_ident(), 0 if x.is_inference() else x._version


def joinable(model: nn.Module) -> list[tuple[SparseLinear, ...]]:
    """The sparse projections of every attention of a model that can be one weight: of one format, dtype and width,
    without hooks, each in one place alone; of bitmaps all but the last have whole tiles of rows. Attentions between two
    sequences, of which key and value read another x, are left out by their class's name."""
    homes: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        homes[module] = homes.get(module, 0) + 1
    found: list[tuple[SparseLinear, ...]] = []
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in PROJECTIONS:
            given = (children.get(name) for name in names)
            layers = tuple(child for child in given if isinstance(child, SparseLinear) and type(child) is SparseLinear)
            alone = len(layers) == len(names) and all(homes[layer] == homes[parent] == 1 for layer in layers)
            if alone and "cross" not in type(parent).__name__.lower() and _fit(layers):
                found.append(layers)
    return found


def _fit(layers: Sequence[SparseLinear]) -> bool:
    kinds = {
        (layer.weight_format, layer.in_features, layer.values.dtype, layer.values.device, layer.scales is None)
        for layer in layers
    }
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    tiled = layers[0].weight_format != "bitmap" or all(layer.out_features % TILE_ROWS == 0 for layer in layers[:-1])
    return len(kinds) == 1 and not hooked and tiled


def weight_of(layers: Sequence[SparseLinear]) -> SparseWeight:
    """The weight whose rows are those of the layers, in their order."""
    weights = [layer.weight for layer in layers]
    tensors = {name: [w.tensors()[name].detach() for w in weights] for name in weights[0].tensors()}
    if isinstance(weights[0], BitmapWeight):
        begin, offsets = 0, [tensors["offsets"][0][:1]]
        for weight, own in zip(weights, tensors["offsets"], strict=True):
            offsets.append(own[1:] + begin)
            begin += weight.values.numel()
        tensors["offsets"] = offsets
    joined = {name: torch.cat(parts) for name, parts in tensors.items()}
    shape = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    return type(weights[0])._unchecked(joined, shape)


def bias_of(layers: Sequence[SparseLinear]) -> Tensor | None:
    """The layers' biases behind each other, zeros for those without; None where none has one."""
    some = next((layer.bias for layer in layers if layer.bias is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(one.out_features) if one.bias is None else one.bias for one in layers]).detach()
