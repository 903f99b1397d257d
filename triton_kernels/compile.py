"""Compile the kernels ahead of time, with or without a GPU, and read what they need.

``python -m pyfast.triton_kernels.compile`` prints, for each kernel and target, registers a thread, bytes of
stack (spilled registers live there), bytes of shared memory, and programs that fit a multiprocessor. Triton
keeps these figures only for kernels loaded on a GPU, so they are read from the binary by cuobjdump, which
comes with Triton. Works on Triton 3.6 and later; not in the interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import distill_kl, topk_distill

#: Compute capabilities checked: A100, H100, B200.
TARGETS = (80, 90, 100)

#: Registers of a multiprocessor, 32 bits each, on every target.
_REGISTERS = 65536


class Case(NamedTuple):
    """One specialisation of a kernel: what Triton's launcher would compile for such arguments."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    warps: int
    options: dict[str, Any] = distill_kl.OPTIONS


class Resources(NamedTuple):
    """What one compiled case needs: registers a thread, stack bytes a thread, shared bytes a program."""

    case: str
    target: int
    warps: int
    registers: int
    stack: int
    shared: int

    @property
    def programs(self) -> int:
        """Programs that fit one multiprocessor by registers (granted in eights), threads and slots."""
        threads = 32 * self.warps
        granted = -(-self.registers // 8) * 8
        return min(32, 2048 // threads, _REGISTERS // (threads * granted))


def cases() -> Iterator[Case]:
    """Every kernel, for 16-bit and 32-bit logits, at each layout of its plan, aligned and not."""
    for dtype, item_size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for width in (1024, 8192, 32000, 128256):
            for aligned in (True, False):
                for with_grad in (True, False) if dtype == "bf16" and aligned else (True,):
                    yield _distill_kl(dtype, item_size, width, aligned, with_grad)
        for width in (2048, 32000, 151936):
            yield _topk_student(dtype, item_size, width, "bucket", True)
    yield _topk_student("bf16", 2, 151936, "bucket", False)
    yield from (_topk_student("bf16", 2, 151936, tail, True) for tail in topk_distill.TAILS if tail != "bucket")
    yield from (_topk_teacher(count, tail) for count in (16, 1024) for tail in ("bucket", "sampled"))


def _distill_kl(dtype: str, item_size: int, width: int, aligned: bool, with_grad: bool) -> Case:
    kernel, block, warps, stages = distill_kl.plan(width, item_size)
    constants: dict[str, Any] = {
        "BLOCK": block,
        "DIVERGENCE": distill_kl.DIVERGENCES["forward_kl"],
        "WITH_GRAD": with_grad,
    }
    if stages:
        constants["STAGES"] = stages
    pointers = {"student": dtype, "teacher": dtype, "row_scale": "fp32", "rows": "fp32", "grad": dtype}
    sizes = ("student_stride", "teacher_stride", "grad_stride", "width")
    signature = {
        **{name: "*" + element for name, element in pointers.items()},
        **{name: "i32" for name in sizes},
        **{name: "fp32" for name in ("student_rate", "teacher_rate")},
        **{name: "constexpr" for name in constants},
    }
    remarks = ("" if aligned else " odd") + ("" if with_grad else " value")
    name = f"{kernel.__name__} {dtype} block {block}{remarks}"
    return Case(name, kernel, signature, constants, (*pointers, *(sizes if aligned else ())), warps)


def _topk_student(dtype: str, item_size: int, width: int, tail: str, with_grad: bool) -> Case:
    block, entries, warps, stages = topk_distill.plan(width, 64, item_size)
    constants = {"TAIL": topk_distill.TAILS[tail], "WITH_GRAD": with_grad}
    constants |= {"BLOCK": block, "ENTRIES": entries, "STAGES": stages}
    pointers = {"student": dtype, "ids": "i64", "log_t": "fp64", "log_rest": "fp64"}
    pointers |= {"row_scale": "fp32", "rows": "fp32", "grad": dtype}
    sizes = ("student_stride", "ids_stride", "grad_stride", "width", "count")
    signature = {
        **{name: "*" + element for name, element in pointers.items()},
        **{name: "i32" for name in sizes},
        **{name: "fp32" for name in ("rate", "rate_rest")},
        **{name: "constexpr" for name in constants},
    }
    name = f"topk_student {dtype} block {block} {tail}{'' if with_grad else ' value'}"
    aligned = (*pointers, *sizes)
    return Case(name, topk_distill.topk_student, signature, constants, aligned, warps, topk_distill.STUDENT_OPTIONS)


def _topk_teacher(count: int, tail: str) -> Case:
    entries, others, warps = topk_distill.teacher_plan(count)
    constants = {"TAIL": topk_distill.TAILS[tail], "ENTRIES": entries, "OTHERS": others}
    pointers = {"ids": "i64", "entries": "fp64", "row_scale": "fp32", "log_t": "fp64", "log_rest": "fp64"}
    sizes = ("ids_stride", "entries_stride", "width", "count")
    signature = {
        **{name: "*" + element for name, element in pointers.items()},
        **{name: "i32" for name in sizes},
        **{name: "constexpr" for name in constants},
    }
    name = f"topk_teacher {entries} entries {tail}"
    return Case(name, topk_distill.topk_teacher, signature, constants, (*pointers, *sizes), warps)


def compile_case(case: Case, target: int) -> Any:
    """Triton's compiled kernel for compute capability ``target`` (90 for 9.0); ``.asm`` has PTX and cubin."""
    order = case.kernel.arg_names
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, {name: case.signature[name] for name in order}, case.constants, attributes)
    options = {"num_warps": case.warps, **case.options}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(case: Case, target: int) -> Resources:
    """Compile ``case`` for ``target`` and read its needs from the binary.

    Raises:
        RuntimeError: cuobjdump does not say them.
    """
    compiled = compile_case(case, target)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", str(binary)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"{tool} --dump-resource-usage said:\n{done.stdout}{done.stderr}")
    registers, stack, local = (int(figure) for figure in found.groups())
    return Resources(case.name, target, case.warps, registers, stack + local, compiled.metadata.shared)


def main() -> None:
    """Print the table of every case and target."""
    parser = argparse.ArgumentParser(description="Compile pyfast's Triton kernels and list what they need.")
    parser.add_argument("--target", type=int, action="append", help="90 for compute capability 9.0; repeatable")
    targets = parser.parse_args().target or TARGETS
    print(f"{'kernel':44} {'sm':>4} {'warps':>5} {'registers':>9} {'stack':>5} {'shared':>7} {'programs':>8}")
    for case in cases():
        for target in targets:
            need = resources(case, target)
            print(
                f"{need.case:44} {need.target:4} {need.warps:5} {need.registers:9} {need.stack:5} "
                f"{need.shared:7} {need.programs:8}"
            )


if __name__ == "__main__":
    main()
