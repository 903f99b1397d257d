"""DTensors whose last dimension is sharded over one dimension of their mesh: the shard, its place and its group."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class Place(NamedTuple):
    """How a DTensor lies on its mesh."""

    mesh: DeviceMesh
    dims: list[int | None]  # the dimension of the tensor that each dimension of the mesh shards; None: replicated
    sharded_by: int  # the dimension of the mesh that shards the words

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group(self.sharded_by)

    def starts(self, words: int) -> list[int]:
        """Number of the first of ``words`` on each rank of the group; the number of words where a rank has none."""
        ranks = self.mesh.size(self.sharded_by)
        width = -(-words // ranks)
        return [min(words, rank * width) for rank in range(ranks)]

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return self.mesh.get_local_rank(self.sharded_by)


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    if type(value) in (Tensor, torch.nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def place(name: str, tensor: DTensor, words_dim: int) -> Place:
    """Where ``tensor`` lies; its words, dimension ``words_dim``, must be sharded by one dimension of the mesh, and the
    others may replicate it or shard another of its dimensions."""
    dims = _sharded_dims(tensor)
    by_words = [] if dims is None else [i for i, dim in enumerate(dims) if dim == words_dim % tensor.dim()]
    if dims is None or len(by_words) != 1:
        raise ValueError(
            f"{name}: got placements {list(tensor.placements)}, accepted: Shard({words_dim}), its words, on one "
            "dimension of the mesh, on the others Replicate() or a Shard of another dimension"
        )
    return Place(tensor.device_mesh, dims, by_words[0])


def local_tokens(name: str, value: Tensor | None, of: Place) -> Tensor | None:
    """The local part of something with one entry a token beside logits that lie at ``of``; a plain tensor is that part
    already."""
    if not is_dtensor(value):
        return value
    accepted = [None if i == of.sharded_by else dim for i, dim in enumerate(of.dims)]
    if value.device_mesh != of.mesh or _sharded_dims(value) != accepted:
        placements = ", ".join("Replicate()" if dim is None else f"Shard({dim})" for dim in accepted)
        raise ValueError(
            f"{name}: got placements {list(value.placements)} on {value.device_mesh}, accepted: [{placements}] on the "
            f"student's {of.mesh}, or a plain tensor of this rank's tokens"
        )
    return value.to_local()


def _sharded_dims(tensor: DTensor) -> list[int | None] | None:
    """The dimension of ``tensor`` that each dimension of its mesh shards, None for one that replicates it. None where
    it lies in any other way."""
    from torch.distributed.tensor import Shard

    dims: list[int | None] = []
    for placement in tensor.placements:
        if isinstance(placement, Shard) and not hasattr(placement, "split_factor"):  # of a strided shard
            dims.append(placement.dim % tensor.dim())
        elif placement.is_replicate():
            dims.append(None)
        else:
            return None
    return dims
