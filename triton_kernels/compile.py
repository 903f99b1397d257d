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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import attention_distill, distill_kl, scale_rows, topk_distill
from ._divergences import DIVERGENCES
from ._launch import OPTIONS

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
    options: dict[str, int]


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


_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: One width for each layout of ``distill_kl.plan``; layouts do not depend on the width beyond the last.
_WIDTHS = (1024, 4096, 8192, 32000, 262144)


def cases(target: int) -> Iterator[Case]:
    """Every kernel, as compute capability ``target`` starts it, for 16-bit and 32-bit logits, at each layout of its
    plan, aligned and not, with and without gradient. ``distill_kl`` for every divergence, plain and with everything
    that an argument adds."""
    for divergence in DIVERGENCES:
        for extras in (False, True):
            for width in _layouts(divergence, extras):
                for dtype in _TYPES if divergence == "forward_kl" else ("bf16", "fp32"):
                    yield _distill_kl(dtype, width, divergence, extras)
                    yield _distill_kl(dtype, width, divergence, extras, aligned=False)
                yield _distill_kl("bf16", width, divergence, extras, with_grad=False)
    for dtype in _TYPES:
        for in_place in (False, True):
            yield _scale_rows(dtype, in_place)
    for dtype in _TYPES:
        for width in (2048, 32000, 151936):
            yield _topk_student(dtype, width, "bucket")
        for width in (64, 128, 256):
            for divergence in ("forward_kl", "mse", "jsd"):
                for kernel in (attention_distill.attention_rows, attention_distill.attention_keys):
                    yield _attention(kernel, dtype, width, divergence, target)
    yield _topk_student("bf16", 151936, "bucket", with_grad=False)
    yield from (_topk_student("bf16", 151936, tail) for tail in topk_distill.TAILS if tail != "bucket")
    yield from (_topk_teacher(count, tail) for count in (16, 1024) for tail in ("bucket", "sampled"))


def sample() -> Iterator[tuple[Case, int]]:
    """Some of ``cases`` with targets: those that need most registers on every target, and one of each other kind."""
    for divergence in DIVERGENCES:
        for target in TARGETS:
            yield _distill_kl("fp32", _WIDTHS[-1], divergence, extras=True, aligned=False), target
        yield _distill_kl("bf16", _WIDTHS[-1], divergence, extras=False), 90
        yield _distill_kl("bf16", _layouts(divergence, True)[1], divergence, extras=True), 90
    yield _scale_rows("bf16", in_place=True), 90


def _layouts(divergence: str, extras: bool) -> list[int]:
    """The first of ``_WIDTHS`` for each layout."""
    found: dict[str, int] = {}
    for width in _WIDTHS:
        found.setdefault(str(distill_kl.plan(width, 2, divergence, extras)), width)
    return list(found.values())


def _distill_kl(
    dtype: str, width: int, divergence: str, extras: bool, aligned: bool = True, with_grad: bool = True
) -> Case:
    kernel, options, constants = distill_kl.plan(width, _TYPES[dtype].itemsize, divergence, extras)
    pointers = {"student": dtype, "teacher": dtype, "row_scale": "fp32", "rows": "fp32"}
    absent = ["student_cap", "teacher_cap", "labels", "ce_scale", "ce_rows"]
    if extras:
        pointers |= {"labels": "i64", "ce_scale": "fp32", "ce_rows": "fp32"}
        absent.clear()
    if with_grad:
        pointers["grad"] = dtype
    else:
        absent.append("grad")
    remarks = f"{' extras' if extras else ''}{'' if aligned else ' odd'}{'' if with_grad else ' value'}"
    name = f"{kernel.__name__} {divergence} {dtype} block {constants['BLOCK']}{remarks}"
    numbers = ("student_rate", "teacher_rate", "student_cap", "teacher_cap", "share_t", "share_s")
    strides = ("student_stride", "teacher_stride", "grad_stride", "width")
    return _case(name, kernel, options, pointers, strides, numbers, {**constants, **dict.fromkeys(absent)}, aligned)


def _scale_rows(dtype: str, in_place: bool) -> Case:
    pointers = {"grad": dtype, "scale": "fp32", "out": dtype}
    strides = ("grad_stride", "scale_stride", "out_stride", "width")
    constants = {"BLOCK": scale_rows.BLOCK, "IN_PLACE": in_place}
    name = f"scale_rows_kernel {dtype} block {scale_rows.BLOCK}{' in place' if in_place else ''}"
    return _case(name, scale_rows.scale_rows_kernel, scale_rows.LAUNCH, pointers, strides, (), constants, aligned=True)


def _attention(kernel: Any, dtype: str, width: int, divergence: str, target: int) -> Case:
    layout = attention_distill.plan(width, _TYPES[dtype], divergence, target)
    constants: dict[str, Any] = {
        **dict.fromkeys(("WIDTH_S", "WIDTH_T", "PAD_S", "PAD_T"), width),
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "CAUSAL": True,
        "DIVERGENCE": divergence,
        "PRECISION": layout.precision,
    }
    if divergence == "forward_kl":  # what a call without padding leaves out
        constants |= {"key_mask": None, "means": None}
    types = {
        **dict.fromkeys(("q_s", "k_s", "q_t", "k_t", "grad_q", "grad_k"), dtype),
        **dict.fromkeys(("row_scale", "rows", "sums_s", "sums_t", "means"), "fp32"),
        "key_mask": "u8",
    }
    pointers = {name: element for name, element in types.items() if name in kernel.arg_names and name not in constants}
    numbers = ("rate_s", "rate_t", "slope_rate", "share_t", "share_s")
    sizes = [name for name in kernel.arg_names if name not in {*pointers, *numbers, *constants}]
    name = f"{kernel.__name__} {divergence} {dtype} width {width}"
    return _case(name, kernel, layout.options, pointers, sizes, numbers, constants, aligned=True)


def _case(
    name: str,
    kernel: Any,
    options: dict[str, int],
    pointers: dict[str, str],
    sizes: Iterable[str],
    numbers: Iterable[str],
    constants: dict[str, Any],
    aligned: bool,
) -> Case:
    """``constants`` are compiled in, whatever else names them; ``sizes`` are multiples of 16 where ``aligned``."""
    signature = {
        **{name: "*" + element for name, element in pointers.items()},
        **dict.fromkeys(sizes, "i32"),
        **dict.fromkeys(numbers, "fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    return Case(name, kernel, signature, constants, (*pointers, *(sizes if aligned else ())), options)


def _topk_student(dtype: str, width: int, tail: str, with_grad: bool = True) -> Case:
    block, entries, warps, stages = topk_distill.plan(width, 64, _TYPES[dtype].itemsize)
    constants = {"TAIL": topk_distill.TAILS[tail], "WITH_GRAD": with_grad}
    constants |= {"BLOCK": block, "ENTRIES": entries, "STAGES": stages}
    pointers = {"student": dtype, "ids": "i64", "log_t": "fp64", "log_rest": "fp64"}
    pointers |= {"row_scale": "fp32", "rows": "fp32", "grad": dtype}
    sizes = ("student_stride", "ids_stride", "grad_stride", "width", "count")
    name = f"topk_student {dtype} block {block} {tail}{'' if with_grad else ' value'}"
    options = {"num_warps": warps, **topk_distill.STUDENT_OPTIONS}
    rates = ("rate", "rate_rest")
    return _case(name, topk_distill.topk_student, options, pointers, sizes, rates, constants, aligned=True)


def _topk_teacher(count: int, tail: str) -> Case:
    entries, others, warps = topk_distill.teacher_plan(count)
    constants = {"TAIL": topk_distill.TAILS[tail], "ENTRIES": entries, "OTHERS": others}
    pointers = {"ids": "i64", "entries": "fp64", "row_scale": "fp32", "log_t": "fp64", "log_rest": "fp64"}
    sizes = ("ids_stride", "entries_stride", "width", "count")
    name = f"topk_teacher {entries} entries {tail}"
    options = {"num_warps": warps}
    return _case(name, topk_distill.topk_teacher, options, pointers, sizes, (), constants, aligned=True)


def compile_case(case: Case, target: int) -> Any:
    """Triton's compiled kernel for compute capability ``target`` (90 for 9.0); ``.asm`` has PTX and cubin."""
    order = case.kernel.arg_names
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, {name: case.signature[name] for name in order}, case.constants, attributes)
    options = {**OPTIONS, **case.options}
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
    return Resources(case.name, target, case.options["num_warps"], registers, stack + local, compiled.metadata.shared)


def main() -> None:
    """Print the table of every case and target."""
    parser = argparse.ArgumentParser(description="Compile pyfast's Triton kernels and list what they need.")
    parser.add_argument("--target", type=int, action="append", help="90 for compute capability 9.0; repeatable")
    targets = parser.parse_args().target or TARGETS
    print(f"{'kernel':64} {'sm':>4} {'warps':>5} {'registers':>9} {'stack':>5} {'shared':>7} {'programs':>8}")
    for target in targets:
        for case in cases(target):
            need = resources(case, target)
            print(
                f"{need.case:64} {need.target:4} {need.warps:5} {need.registers:9} {need.stack:5} "
                f"{need.shared:7} {need.programs:8}"
            )


if __name__ == "__main__":
    main()
