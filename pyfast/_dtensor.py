"""The distillation losses of DTensors whose words are sharded by one dimension of their mesh: checks, and then the
losses of ``pyfast/parallel.py`` on the local shards. ``to_local`` makes the gradients DTensors again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from pyfast import backends
from pyfast.ops import _arguments as arguments
from pyfast.parallel import vocab_parallel_distillation_loss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    divergence: str,
    *,
    labels: Tensor | None,
    mask: Tensor | None,
    vocab_size: int | None,
    backend: str | None,
    **options: Any,
) -> Tensor:
    """:func:`pyfast.distillation_loss` where the logits are DTensors."""
    if not arguments.is_dtensor(student) or not arguments.is_dtensor(teacher):
        raise TypeError(
            f"student, teacher: got {type(student).__name__} and {type(teacher).__name__}, accepted: both DTensors or "
            "both plain tensors"
        )
    arguments.check_floating("student", student, "of logits [..., V]")
    arguments.check_floating("teacher", teacher, "of logits [..., V]")
    if backend is not None:
        backends.select("shard_distill", student.device.type, student.dtype, backend)
    place = _place("student", student, -1)
    if _place("teacher", teacher, -1) != place:
        raise ValueError(
            f"teacher: got placements {list(teacher.placements)} on {teacher.device_mesh}, accepted: the student's, "
            f"{list(student.placements)} on {place.mesh}"
        )
    words = arguments.common_vocabulary(student.shape[-1], teacher.shape[-1], vocab_size)
    starts = [min(start, words) for start in place.starts(student.shape[-1])]
    if starts != [min(start, words) for start in place.starts(teacher.shape[-1])]:
        raise ValueError(
            f"teacher: got {teacher.shape[-1]} words, whose shards begin at {place.starts(teacher.shape[-1])}, "
            f"accepted: shards that begin at the same words as the student's, {place.starts(student.shape[-1])}"
        )
    return vocab_parallel_distillation_loss(
        student.to_local(),
        teacher.to_local(),
        divergence,
        group=place.group,
        vocab_start=starts[place.rank],
        vocab_size=words,
        labels=_local_tokens("labels", labels, place),
        mask=_local_tokens("mask", mask, place),
        **options,
    )


class _Place(NamedTuple):
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


def _place(name: str, tensor: DTensor, words_dim: int) -> _Place:
    """Where ``tensor`` lies; its words, dimension ``words_dim``, must be sharded by one dimension of the mesh, and the
    others may replicate it or shard another of its dimensions."""
    dims = _sharded_dims(tensor)
    by_words = [] if dims is None else [i for i, dim in enumerate(dims) if dim == words_dim % tensor.dim()]
    if dims is None or len(by_words) != 1:
        raise ValueError(
            f"{name}: got placements {list(tensor.placements)}, accepted: Shard({words_dim}), its words, on one "
            "dimension of the mesh, on the others Replicate() or a Shard of another dimension"
        )
    return _Place(tensor.device_mesh, dims, by_words[0])


def _local_tokens(name: str, value: Tensor | None, of: _Place) -> Tensor | None:
    """The local part of something with one entry a token beside logits that lie at ``of``; a plain tensor is that part
    already."""
    if not arguments.is_dtensor(value):
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
