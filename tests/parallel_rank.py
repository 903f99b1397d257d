"""One rank of a group: a program that runs all cases on its shards and saves what it got for test_parallel.py."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_cases import CASES, COMPILED_WORLD, LINEAR, WORDS, run_case, run_linear, run_linear_dtensors, shards
from parallel_errors import BAD, BAD_OF_SEVERAL

from pyfast.parallel import vocab_parallel_distillation_loss


def worker(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    cases = {name: build() for name, build in CASES.items()}
    results = {name: run_case(of) for name, of in cases.items() if of.kind != "compiled" or world == COMPILED_WORLD}
    linear = {name: run_linear(rank, world, **options) for name, options in LINEAR.items()}
    errors = {}
    for name, (_, _, call) in (BAD | (BAD_OF_SEVERAL if world > 1 else {})).items():
        try:
            call(rank, world)
        except Exception as error:
            errors[name] = type(error).__name__, str(error)
    saved = {"results": results, "linear": linear, "errors": errors, "twice": run_twice(rank, world)}
    saved["linear dtensors"] = run_linear_dtensors(world)
    if world == COMPILED_WORLD:
        saved["unknown label"] = run_unknown_label(rank, world)
    torch.save(saved, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_twice(rank: int, world: int) -> list[torch.Tensor]:
    """Gradients of a graph that is kept, and of an incoming gradient of exactly 1."""
    student, teacher = shards(rank, world)
    loss = vocab_parallel_distillation_loss(student, teacher, "jsd")
    first = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    second = torch.autograd.grad(2 * loss, student, retain_graph=True)[0].clone()
    return [first, second, torch.autograd.grad(loss, student)[0]]


def run_unknown_label(rank: int, world: int) -> torch.Tensor:
    """A label that no rank holds, where nobody looks: in a compiled step."""
    loss_of = torch.compile(vocab_parallel_distillation_loss, backend="aot_eager", fullgraph=True)
    labels = torch.tensor([0, WORDS, -1, 5])
    return loss_of(*shards(rank, world), labels=labels, ce_weight=1.0, reduction="none").detach()


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
