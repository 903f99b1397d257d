"""The calls of ``test_parallel.py``: logits, heads and options of every case, and what a rank does with them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import pyfast
from pyfast.ops.distill_kl import DIVERGENCES
from pyfast.parallel import vocab_parallel_distillation_loss, vocab_parallel_linear_distillation_loss

INF, NAN = math.inf, math.nan
WORLDS = [1, 2, 4]
COMPILED_WORLD = 2
WORDS = 301
CUTS = {1: [0, WORDS], 2: [0, 97, WORDS], 4: [0, 64, 64, 150, WORDS]}  # uneven; of four ranks one has no word
# Of gradients. In 16 bits they are rounded when they are finished and again when they are scaled.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class Case:
    """Logits of the whole vocabulary and the options of one call."""

    student: torch.Tensor
    teacher: torch.Tensor
    divergence: str = "forward_kl"
    options: dict[str, Any] = field(default_factory=dict)
    reduction: str = "mean"
    kind: str = "shards"
    incoming: float = 1.5

    def weights(self) -> torch.Tensor:
        """What comes in for each value in backward."""
        if self.reduction != "none":
            return torch.tensor(self.incoming)
        return torch.linspace(-1.0, 2.0, self.student[..., 0].numel()).reshape(self.student.shape[:-1])


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    CASES[build.__name__] = build
    return build


def each_divergence(build: Callable[[str], Case]) -> Callable[[str], Case]:
    for divergence in DIVERGENCES:
        CASES[f"{build.__name__}-{divergence}"] = lambda divergence=divergence: build(divergence)
    return build


def draw(*shape: int, seed: int, spread: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def pair(*leading: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(*leading, WORDS, seed=1, dtype=dtype), draw(*leading, WORDS, seed=2, dtype=dtype)


def labelled(*leading: int) -> dict[str, torch.Tensor]:
    labels = torch.randint(0, WORDS, leading, generator=torch.Generator().manual_seed(3))
    labels.view(-1)[1] = -100
    mask = torch.ones(leading, dtype=torch.bool)
    mask.view(-1)[2] = False
    return {"labels": labels, "mask": mask}


@each_divergence
def plain(divergence: str) -> Case:
    return Case(*pair(2, 4), divergence, reduction="none")


@each_divergence
def every_option(divergence: str) -> Case:
    student, teacher = pair(2, 4)
    student[0, 1], teacher[0, 2] = NAN, INF  # in tokens that do not count
    options = {"temperature": 2.0, "teacher_temperature": 1.5, "softcap": 10.0, "teacher_softcap": 30.0}
    options |= {"alpha": 0.3, "beta": 0.2, "ce_weight": 0.4, **labelled(2, 4)}
    return Case(student, teacher, divergence, options)


@each_divergence
def excluded(divergence: str) -> Case:
    student, teacher = pair(4)
    teacher[0, ::3] = -INF
    teacher[1, 1:] = -INF  # one word left, on the first rank
    teacher[2, ::2] = -INF
    student[2, ::4] = -INF  # excluded by both
    teacher[3, 100:] = torch.finfo(torch.float32).min
    student[3, 5] = -INF
    return Case(student, teacher, divergence, reduction="none")


@each_divergence
def near(divergence: str) -> Case:
    teacher = draw(4, WORDS, seed=5)
    return Case(teacher + draw(4, WORDS, seed=6, spread=4.5e-4), teacher, divergence, reduction="none")


@each_divergence
def equal(divergence: str) -> Case:
    logits = draw(3, WORDS, seed=7)
    return Case(logits, logits.clone(), divergence, {"temperature": 3.0}, reduction="none")


@each_divergence
def nan(divergence: str) -> Case:
    student, teacher = pair(4)
    student[1, 7], teacher[3, 200] = NAN, NAN
    return Case(student, teacher, divergence, reduction="none")


@each_divergence
def dtensor(divergence: str) -> Case:
    return Case(*pair(2, 4), divergence, {"ce_weight": 0.4, "temperature": 2.0, **labelled(2, 4)}, kind="dtensor")


for _dtype in TOLERANCE:
    CASES[f"{_dtype}"] = lambda dtype=_dtype: Case(*pair(4, dtype=dtype), "jsd", {"temperature": 0.5})


@case
def loss_scale() -> Case:
    """Small float16 gradients reach it before they are rounded: the divisor comes last."""
    return Case(*pair(4, dtype=torch.float16), "jsd", {"num_items": 2.0**18}, incoming=2.0**16)


@case
def mixed_dtypes() -> Case:
    return Case(draw(4, WORDS, seed=1, dtype=torch.bfloat16), draw(4, WORDS, seed=2), "reverse_kl")


@case
def views() -> Case:
    student = draw(WORDS, 6, seed=1).t()[::2]
    return Case(student, draw(1, WORDS, seed=2).expand(3, WORDS), "skew_kl", reduction="sum")


@case
def one_token() -> Case:
    return Case(*pair(), "tvd", reduction="none")


@case
def no_token() -> Case:
    return Case(*pair(0), "jsd", reduction="sum")


@case
def no_token_counts() -> Case:
    return Case(*pair(3), "jsd", {"labels": torch.full((3,), -100), "ce_weight": 1.0})


@case
def other_ignore_index() -> Case:
    return Case(*pair(3), "jsd", {"labels": torch.tensor([300, 7, 0]), "ignore_index": 7, "ce_weight": 1.0})


@case
def num_items() -> Case:
    return Case(*pair(4), "mse", {"num_items": torch.tensor(40), "mask": torch.tensor([True, True, False, True])})


@case
def vocab_size() -> Case:
    """The last rank of two keeps part of its words, of four one has none and one none left."""
    return Case(
        *pair(4), "skew_reverse_kl", {"vocab_size": 140, "ce_weight": 0.5, "labels": torch.tensor([0, 139, 64, 9])}
    )


@case
def padded_teacher() -> Case:
    student, teacher = pair(4)
    return Case(student, torch.cat([teacher, draw(4, 3, seed=9)], -1), "jsd", {"vocab_size": WORDS - 1})


@case
def compiled() -> Case:
    return Case(*pair(4), "jsd", {"ce_weight": 0.4, **labelled(4)}, kind="compiled")


@case
def evaluation() -> Case:
    return Case(*pair(2, 4), "jsd", reduction="none", kind="evaluation")


@case
def mesh_of_two_dimensions() -> Case:
    return Case(
        *pair(4, 3), "jsd", {"num_items": 12, "ce_weight": 0.4, **labelled(4, 3)}, kind="dtensor of tokens and words"
    )


@case
def subgroups() -> Case:
    return Case(*pair(4), "reverse_kl", kind="subgroups")


@case
def padded_dtensor() -> Case:
    """Vocabularies that differ where their shards still begin at the same words."""
    student, teacher = pair(4)
    teacher = torch.cat([teacher, draw(4, 1, seed=9)], -1)
    return Case(student, teacher, "jsd", {"vocab_size": 290}, kind="dtensor")


def shards(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = pair(4)
    words = slice(CUTS[world][rank], CUTS[world][rank + 1])
    return student[:, words].clone().requires_grad_(), teacher[:, words]


def truth(of: Case) -> tuple[torch.Tensor, torch.Tensor]:
    student = of.student.double().requires_grad_()
    options = {"reduction": of.reduction, "backend": "reference", **of.options}
    loss = pyfast.distillation_loss(student, of.teacher.double(), of.divergence, **options)
    (grad,) = torch.autograd.grad((loss * of.weights()).sum(), student)
    return loss.detach(), grad


def run_case(of: Case) -> dict[str, Any]:
    """This rank's part of a case: the loss, its gradient, where that lies in the whole, and the collectives."""
    world, rank = dist.get_world_size(), dist.get_rank()
    options = {"reduction": of.reduction, **of.options}
    loss_of: Callable[..., torch.Tensor] = vocab_parallel_distillation_loss
    words, tokens = slice(None), 0
    if of.kind.startswith("dtensor"):
        loss_of = pyfast.distillation_loss
        by_tokens = of.kind == "dtensor of tokens and words"
        shape = (max(1, world // 2), min(world, 2)) if by_tokens else (world,)
        mesh = init_device_mesh("cpu", shape)
        tokens = mesh.get_local_rank(0) if by_tokens else 0
        leading = [Shard(0)] if by_tokens else []
        student = distribute_tensor(of.student, mesh, [*leading, Shard(-1)], src_data_rank=None)
        teacher = distribute_tensor(of.teacher, mesh, [*leading, Shard(-1)], src_data_rank=None)
        if "labels" in options:  # one as a DTensor, the other as this rank's tokens
            place = mesh, [*leading, Replicate()]
            options["labels"] = distribute_tensor(options["labels"], *place, src_data_rank=None)
            options["mask"] = distribute_tensor(options["mask"], *place, src_data_rank=None).to_local()
    else:
        if of.kind == "subgroups":
            size = max(1, world // 2)
            groups = [dist.new_group(list(range(begin, begin + size))) for begin in range(0, world, size)]
            options["group"] = groups[rank // size]
            world, rank = size, rank % size
        cuts = CUTS[world]
        words = slice(cuts[rank], cuts[rank + 1])
        if "vocab_size" in options:
            options["vocab_start"] = cuts[rank]
        student = of.student[..., words]
        teacher = of.teacher[..., words.start : None if rank == world - 1 else words.stop]
    if of.kind == "compiled":
        loss_of = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    student = student.detach().requires_grad_()

    counting = CommDebugMode if of.kind != "compiled" else contextlib.nullcontext
    with counting() as forward, torch.set_grad_enabled(of.kind != "evaluation"):
        loss = loss_of(student, teacher, of.divergence, **options)
    result = {"loss": loss.detach(), "words": words, "tokens": tokens}
    result["collectives"] = [0 if forward is None else forward.get_total_counts(), 0]
    if of.kind == "evaluation":
        return result | {"attached": loss.requires_grad}
    with CommDebugMode() as backward:
        (grad,) = torch.autograd.grad((loss * of.weights()).sum(), student)
    result["collectives"][1] = backward.get_total_counts()
    if of.kind.startswith("dtensor"):
        result["placed"] = grad.placements == student.placements
        grad = grad.full_tensor()
    return result | {"grad": grad}


LINEAR_DTENSORS: dict[str, Any] = {"divergence": "jsd", "chunk_size": 4, "vocab_size": 280}
TOKENS, STUDENT_WIDTH, TEACHER_WIDTH = 10, 6, 9
# What each call of the linear form changes: options of the loss, and of ``linear_inputs``.
LINEAR: dict[str, dict[str, Any]] = {
    **{divergence: {"divergence": divergence, "chunk_size": 3} for divergence in DIVERGENCES},
    "every option": {
        "divergence": "jsd",
        "chunk_size": 3,
        "bias": True,
        "softcap": 10.0,
        "temperature": 2.0,
        "ce_weight": 0.4,
        "vocab_size": 200,
        "labels": torch.tensor([0, 199, 5, -100, 70, 63, 64, 97, 96, -100]),
    },
    "teacher logits": {"divergence": "skew_kl", "given": True},
    "frozen head": {"divergence": "jsd", "frozen": ["student_head"]},
    "frozen hidden states": {"divergence": "jsd", "frozen": ["student_hidden"]},
    "no token counts": {"divergence": "jsd", "mask": torch.zeros(TOKENS, dtype=torch.bool)},
    "evaluation": {"divergence": "jsd", "reduction": "none", "frozen": ["student_hidden", "student_head"]},
    "float64": {"divergence": "jsd", "dtype": torch.float64, "bias": True},
    "bfloat16": {"divergence": "jsd", "dtype": torch.bfloat16, "bias": True, "chunk_size": 4},
    "float16": {"divergence": "jsd", "dtype": torch.float16, "num_items": 100.0},
    "autocast": {"divergence": "jsd", "autocast": True},
}


def linear_inputs(
    words: slice, *, bias: bool = False, given: bool = False, dtype: torch.dtype = torch.float32, **_: Any
) -> dict[str, torch.Tensor]:
    """Hidden states, and these rows of the heads."""
    inputs = {
        "student_hidden": draw(TOKENS, STUDENT_WIDTH, seed=1, spread=1.0, dtype=dtype),
        "student_head": draw(WORDS, STUDENT_WIDTH, seed=2, spread=1.0, dtype=dtype)[words].clone(),
    }
    if given:
        return inputs | {"teacher_logits": draw(TOKENS, WORDS, seed=3, dtype=dtype)[:, words]}
    inputs["teacher_hidden"] = draw(TOKENS, TEACHER_WIDTH, seed=3, spread=1.0, dtype=dtype)
    inputs["teacher_head"] = draw(WORDS, TEACHER_WIDTH, seed=4, spread=1.0, dtype=dtype)[words]
    if bias:
        inputs["student_bias"] = draw(WORDS, seed=5, spread=1.0, dtype=dtype)[words].clone()
        inputs["teacher_bias"] = draw(WORDS, seed=6, spread=1.0, dtype=dtype)[words]
    return inputs


def loss_options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in options.items() if name not in ("bias", "given", "dtype", "frozen", "autocast")
    }


def run_linear(rank: int, world: int, **options: Any) -> dict[str, Any]:
    """Loss, collectives, and the gradients of what is not frozen."""
    words = slice(CUTS[world][rank], CUTS[world][rank + 1])
    inputs = linear_inputs(words, **options)
    names = {"student_hidden", "student_head", "student_bias"} & set(inputs) - set(options.get("frozen", []))
    operands = {name: inputs[name].requires_grad_() for name in sorted(names)}
    with CommDebugMode() as forward, torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
        loss = vocab_parallel_linear_distillation_loss(**inputs, vocab_start=words.start, **loss_options(options))
    result = {"loss": loss.detach(), "words": words, "forward": forward.get_total_counts()}
    if not operands:
        return result | {"backward": 0, "grads": {}}
    with CommDebugMode() as backward:
        grads = torch.autograd.grad(1.5 * loss, list(operands.values()))
    return result | {"backward": backward.get_total_counts(), "grads": dict(zip(operands, grads, strict=True))}


def run_linear_dtensors(world: int) -> dict[str, Any]:
    """The linear form through its public function, with heads as DTensors, and biases; as ``run_linear`` otherwise."""
    mesh = init_device_mesh("cpu", (world,))
    inputs: dict[str, Any] = linear_inputs(slice(None), bias=True)
    for name in inputs:
        place = [Replicate() if name == "teacher_hidden" else Shard(0)]
        if name != "student_hidden":  # the one of the hidden states plain, the other a DTensor
            inputs[name] = distribute_tensor(inputs[name], mesh, place, src_data_rank=None)
    names = ("student_bias", "student_head", "student_hidden")
    operands = [inputs[name].requires_grad_() for name in names]
    with CommDebugMode() as forward:
        loss = pyfast.linear_distillation_loss(**inputs, **LINEAR_DTENSORS)
    with CommDebugMode() as backward:
        grads = torch.autograd.grad(1.5 * loss, operands)
    placed = [grad.placements == operand.placements for grad, operand in zip(grads[:2], operands[:2], strict=True)]
    whole = dict(zip(names, [grads[0].full_tensor(), grads[1].full_tensor(), grads[2]], strict=True))
    collectives = forward.get_total_counts(), backward.get_total_counts()
    return {"loss": loss.detach(), "collectives": collectives, "placed": placed, "grads": whole}


def linear_truth(**options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs = {name: tensor.double() for name, tensor in linear_inputs(slice(None), **options).items()}
    operands = {name: inputs[name].requires_grad_() for name in inputs if name.startswith("student")}
    student = torch.nn.functional.linear(*(inputs.get(f"student_{part}") for part in ("hidden", "head", "bias")))
    teacher = inputs.get("teacher_logits")
    if teacher is None:
        teacher = torch.nn.functional.linear(*(inputs.get(f"teacher_{part}") for part in ("hidden", "head", "bias")))
    changes = {name: value for name, value in loss_options(options).items() if name != "chunk_size"}
    loss = pyfast.distillation_loss(student, teacher, backend="reference", **changes)
    grads = torch.autograd.grad(1.5 * loss.sum(), list(operands.values()))
    return loss.detach(), dict(zip(operands, grads, strict=True))
