"""Calls that the vocabulary-parallel losses refuse, and what each error says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parallel_cases import CUTS, STUDENT_WIDTH, TEACHER_WIDTH, WORDS, linear_inputs, pair, shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import pyfast
from pyfast.parallel import vocab_parallel_distillation_loss, vocab_parallel_linear_distillation_loss


def wrong(**change: Any) -> Callable[[int, int], Any]:
    """Calls the loss with some arguments changed, on every rank; a function gets the rank and the world size."""

    def call(rank: int, world: int) -> torch.Tensor:
        student, teacher = shards(rank, world)
        made = {name: value(rank, world) if callable(value) else value for name, value in change.items()}
        arguments = {"student_shard": student, "teacher_shard": teacher, **made}
        return vocab_parallel_distillation_loss(**arguments)

    return call


def wrong_dtensors(**change: Any) -> Callable[[int, int], Any]:
    """The same with DTensors: ``student`` and ``teacher`` are placements, or "plain"."""

    def call(rank: int, world: int) -> torch.Tensor:
        mesh = init_device_mesh("cpu", (world,))
        options = {**change}
        logits = dict(zip(("student", "teacher"), pair(4), strict=True)) | options.pop("logits", {})
        for name in ("student", "teacher"):
            placement = options.pop(name, Shard(-1))
            if placement != "plain":
                logits[name] = distribute_tensor(logits[name], mesh, [placement], src_data_rank=None)
        if "labels" in options:
            options["labels"] = distribute_tensor(options["labels"], mesh, [Shard(0)], src_data_rank=None)
        return options.pop("function", pyfast.distillation_loss)(**logits, **options)

    return call


def wrong_linear(**change: Any) -> Callable[[int, int], Any]:
    def call(rank: int, world: int) -> torch.Tensor:
        inputs = linear_inputs(slice(CUTS[world][rank], CUTS[world][rank + 1]))
        inputs["student_hidden"].requires_grad_()
        return vocab_parallel_linear_distillation_loss(**{**inputs, **change})

    return call


def wrong_linear_dtensors(**change: Any) -> Callable[[int, int], Any]:
    """Heads as DTensors, the one that is changed with another placement, or "plain"."""

    def call(rank: int, world: int) -> torch.Tensor:
        mesh = init_device_mesh("cpu", (world,))
        inputs: dict[str, Any] = linear_inputs(slice(None))
        for name in inputs:
            place = change.get(name, Shard(0) if name.endswith("head") else "plain")
            if place != "plain":
                inputs[name] = distribute_tensor(inputs[name], mesh, [place], src_data_rank=None)
        return pyfast.linear_distillation_loss(**inputs)

    return call


def double_backward(rank: int, world: int) -> None:
    student, teacher = shards(rank, world)
    rows = vocab_parallel_distillation_loss(student, teacher, reduction="none")
    (grad,) = torch.autograd.grad((rows * student.sum(-1)).sum(), student, create_graph=True)
    grad.sum().backward()


FOUR = torch.arange(4)
BAD: dict[str, tuple[type[Exception], str, Callable[[int, int], Any]]] = {
    "group": (TypeError, "group: got str", wrong(group="tp")),
    "list": (TypeError, "student_shard", wrong(student_shard=[1.0])),
    "integers": (TypeError, "teacher_shard", wrong(teacher_shard=torch.ones(4, 5, dtype=torch.int64))),
    "tokens": (ValueError, "teacher: got shape", wrong(teacher_shard=lambda *at: shards(*at)[1][1:])),
    "words": (ValueError, "teacher_shard: got", wrong(teacher_shard=torch.ones(4, 1000))),
    "no words": (
        ValueError,
        "student_shard: got no word",
        wrong(student_shard=torch.ones(4, 0), teacher_shard=torch.ones(4, 0)),
    ),
    "divergence": (ValueError, "divergence", wrong(divergence="kl")),
    "temperature": (ValueError, "temperature", wrong(temperature=0.0)),
    "reduction": (ValueError, "reduction", wrong(reduction="batchmean")),
    "no labels": (ValueError, "labels", wrong(ce_weight=1.0)),
    "label": (
        ValueError,
        f"labels: got {WORDS}, accepted: 0 to {WORDS - 1}",
        wrong(ce_weight=1.0, labels=FOUR + WORDS - 3),
    ),
    "vocab_size": (
        ValueError,
        f"vocab_size: got {WORDS + 1}, accepted: an integer from 1 to {WORDS}",
        # the last rank has them all, and the cut of the others is within their words
        wrong(vocab_size=WORDS + 1, vocab_start=lambda rank, world: CUTS[world][rank]),
    ),
    "vocab_size beyond the student's words": (
        ValueError,
        "teacher_shard: got words",
        wrong(
            teacher_shard=lambda *at: torch.cat([shards(*at)[1], torch.ones(4, 3)], -1),
            vocab_size=WORDS + 2,
            vocab_start=lambda rank, world: CUTS[world][rank],
        ),
    ),
    "vocab_size zero": (ValueError, "vocab_size", wrong(vocab_size=0, vocab_start=0)),
    "vocab_start": (ValueError, "vocab_start: got", wrong(vocab_start=lambda rank, world: CUTS[world][rank] + 1)),
    "vocab_start below 0": (ValueError, "vocab_start", wrong(vocab_start=-1)),
    "vocab_start boolean": (ValueError, "vocab_start", wrong(vocab_start=True)),
    "one DTensor": (TypeError, "student, teacher: got", wrong_dtensors(teacher="plain")),
    "other DTensor": (TypeError, "student, teacher: got", wrong_dtensors(student="plain")),
    "replicated": (ValueError, "student: got placements", wrong_dtensors(student=Replicate())),
    "by tokens": (ValueError, "teacher: got placements", wrong_dtensors(teacher=Shard(0))),
    "labels by words": (ValueError, "labels: got placements", wrong_dtensors(labels=FOUR)),
    "DTensor backend": (ValueError, "backend", wrong_dtensors(backend="native")),
    "DTensor vocabularies": (ValueError, "vocabularies differ", wrong_dtensors(logits={"teacher": torch.ones(4, 400)})),
    "value and grad": (
        TypeError,
        "student, teacher: got DTensors",
        wrong_dtensors(function=pyfast.distillation_value_and_grad),
    ),
    "head": (ValueError, "student_head: got shape", wrong_linear(student_head=torch.ones(5, STUDENT_WIDTH + 1))),
    "rows of the heads": (ValueError, "teacher_shard: got", wrong_linear(teacher_head=torch.ones(999, TEACHER_WIDTH))),
    "teacher missing": (ValueError, "got neither", wrong_linear(teacher_hidden=None)),
    "chunk_size": (ValueError, "chunk_size: got 0", wrong_linear(chunk_size=0)),
    "rows with a gradient": (ValueError, 'reduction: got "none"', wrong_linear(reduction="none")),
    "plain head": (TypeError, "teacher_head: got Tensor", wrong_linear_dtensors(teacher_head="plain")),
    "head by columns": (ValueError, "student_head: got placements", wrong_linear_dtensors(student_head=Shard(1))),
    "hidden states by tokens": (
        ValueError,
        "student_hidden: got placements",
        wrong_linear_dtensors(student_hidden=Shard(0)),
    ),
    "double backward": (RuntimeError, "once_differentiable", double_backward),
}
# What one rank alone has nothing to say about.
BAD_OF_SEVERAL: dict[str, tuple[type[Exception], str, Callable[[int, int], Any]]] = {
    "vocab_size without vocab_start": (ValueError, "vocab_start: got None", wrong(vocab_size=100)),
    "shards begin elsewhere": (
        ValueError,
        "shards begin at",
        wrong_dtensors(logits={"teacher": torch.ones(4, 400)}, vocab_size=300),
    ),
}
