"""The distillation losses of DTensors whose words are sharded by one dimension of their mesh: checks, and then the
losses of ``pyfast/parallel.py`` on the local shards. ``to_local`` makes the gradients DTensors again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from pyfast import backends
from pyfast.ops import _arguments as arguments
from pyfast.ops._arguments import LossOptions
from pyfast.ops._linear_chunks import Operands
from pyfast.parallel import CHUNK, linear_loss_of_shards, loss_of_shards

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def distillation_loss(student: Tensor, teacher: Tensor, options: LossOptions) -> Tensor:
    """:func:`pyfast.distillation_loss` where the logits are DTensors."""
    if not arguments.is_dtensor(student) or not arguments.is_dtensor(teacher):
        raise TypeError(
            f"student, teacher: got {type(student).__name__} and {type(teacher).__name__}, accepted: both DTensors or "
            "both plain tensors"
        )
    arguments.check_floating("student", student, "of logits [..., V]")
    arguments.check_floating("teacher", teacher, "of logits [..., V]")
    if options.backend is not None:
        backends.select("shard_distill", student.device.type, student.dtype, options.backend)
    place = _place("student", student, -1)
    if _place("teacher", teacher, -1) != place:
        raise ValueError(
            f"teacher: got placements {list(teacher.placements)} on {teacher.device_mesh}, accepted: the student's, "
            f"{list(student.placements)} on {place.mesh}"
        )
    start, words = _compared(place, student.shape[-1], teacher.shape[-1], options.vocab_size)
    local = replace(
        options,
        labels=_local_tokens("labels", options.labels, place),
        mask=_local_tokens("mask", options.mask, place),
        vocab_size=words,
    )
    return loss_of_shards(student.to_local(), teacher.to_local(), local, place.group, start)


def linear_distillation_loss(operands: Operands, options: LossOptions, chunk_size: int | None) -> Tensor:
    """:func:`pyfast.linear_distillation_loss` where the heads are DTensors sharded by their rows, on a mesh of one
    dimension. Hidden states, labels and mask are those of all tokens, plain or replicated."""
    student_hidden, student_head = operands.student_hiddens[0], operands.student_head
    if options.backend is not None:
        backends.select("shard_distill", student_hidden.device.type, student_hidden.dtype, options.backend)
    if not arguments.is_dtensor(student_head):
        raise TypeError(f"student_head: got {type(student_head).__name__}, accepted: a DTensor, as teacher_head is one")
    place = _place("student_head", student_head, 0)
    if place.mesh.ndim != 1:
        raise ValueError(f"student_head: got {place.mesh}, accepted: a mesh of one dimension, such as mesh['tp']")
    teacher_hiddens = operands.teacher_hiddens
    parts = operands._replace(
        student_head=student_head.to_local(),
        teacher_head=_rows_here("teacher_head", operands.teacher_head, 0, place),
        student_bias=_rows_here("student_bias", operands.student_bias, 0, place),
        teacher_bias=_rows_here("teacher_bias", operands.teacher_bias, 0, place),
        teacher_logits=_rows_here("teacher_logits", operands.teacher_logits, -1, place),
        student_hiddens=[_replicated("student_hidden", student_hidden, place)],
        teacher_hiddens=teacher_hiddens and [_replicated("teacher_hidden", teacher_hiddens[0], place)],
    )
    student_words = teacher_words = student_head.shape[0]
    if operands.teacher_head is not None:
        teacher_words = operands.teacher_head.shape[0]
    elif operands.teacher_logits is not None:
        teacher_words = operands.teacher_logits.shape[-1]
    start, words = _compared(place, student_words, teacher_words, options.vocab_size)
    local = replace(
        options,
        labels=_replicated("labels", options.labels, place),
        mask=_replicated("mask", options.mask, place),
        vocab_size=words,
    )
    return linear_loss_of_shards(parts, local, CHUNK if chunk_size is None else chunk_size, place.group, start)


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


def _compared(place: _Place, student: int, teacher: int, vocab_size: int | None) -> tuple[int, int]:
    """This rank's first word, and how many words of the two vocabularies are compared, whose shards must begin at the
    same words."""
    words = arguments.common_vocabulary(student, teacher, vocab_size)
    starts = [min(start, words) for start in place.starts(student)]
    if starts != [min(start, words) for start in place.starts(teacher)]:
        raise ValueError(
            f"teacher: got {teacher} words, whose shards begin at {place.starts(teacher)}, accepted: shards that begin "
            f"at the same words as the student's, {place.starts(student)}"
        )
    return starts[place.rank], words


def _rows_here(name: str, tensor: Tensor | None, words_dim: int, of: _Place) -> Tensor | None:
    """The local part of something that is sharded by words like the student's head."""
    if tensor is None:
        return None
    if not arguments.is_dtensor(tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, accepted: a DTensor, as student_head is one")
    if _place(name, tensor, words_dim).mesh != of.mesh:
        raise ValueError(f"{name}: got {tensor.device_mesh}, accepted: the mesh of student_head, {of.mesh}")
    return tensor.to_local()


def _replicated(name: str, tensor: Any, of: _Place) -> Any:
    """A plain tensor as it is, a DTensor that every rank has in full as a plain one."""
    if not arguments.is_dtensor(tensor):
        return tensor
    if tensor.device_mesh != of.mesh or _sharded_dims(tensor) != [None]:
        raise ValueError(
            f"{name}: got placements {list(tensor.placements)} on {tensor.device_mesh}, accepted: [Replicate()] on "
            f"{of.mesh}, or a plain tensor, of all tokens"
        )
    return tensor.to_local()


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
