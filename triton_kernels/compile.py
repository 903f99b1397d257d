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

from . import attention_distill, distill_kl

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
    stages: int | None = None


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
    for dtype, item_size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for width in (64, 128, 256):
            for divergence in ("forward_kl", "mse", "jsd"):
                for kernel in (attention_distill.attention_rows, attention_distill.attention_keys):
                    yield _attention(kernel, dtype, item_size, width, divergence)


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


def _attention(kernel: Any, dtype: str, item_size: int, width: int, divergence: str) -> Case:
    block_q, block_k, warps, stages = attention_distill.plan(width, item_size)
    constants: dict[str, Any] = {
        **dict.fromkeys(("WIDTH_S", "WIDTH_T", "PAD_S", "PAD_T"), width),
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "CAUSAL": True,
        "DIVERGENCE": divergence,
    }
    if divergence == "forward_kl":  # what a call without padding leaves out
        constants |= {"key_mask": None, "means": None}
    types = {
        **dict.fromkeys(("q_s", "k_s", "q_t", "k_t", "grad_q", "grad_k"), "*" + dtype),
        **dict.fromkeys(("row_scale", "rows", "sums_s", "sums_t", "means"), "*fp32"),
        **dict.fromkeys(("rate_s", "rate_t", "slope_rate", "share_t", "share_s"), "fp32"),
        "key_mask": "*u8",
    }
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    counts = ("heads", "repeat_s", "repeat_t")
    aligned = tuple(
        name for name, kind in signature.items() if kind[0] == "*" or (kind == "i32" and name not in counts)
    )
    name = f"{kernel.__name__} {dtype} width {width} {divergence}"
    return Case(name, kernel, signature, constants, aligned, warps, stages)


def compile_case(case: Case, target: int) -> Any:
    """Triton's compiled kernel for compute capability ``target`` (90 for 9.0); ``.asm`` has PTX and cubin."""
    order = case.kernel.arg_names
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, {name: case.signature[name] for name in order}, case.constants, attributes)
    options = {"num_warps": case.warps, **distill_kl.OPTIONS}
    if case.stages is not None:
        options["num_stages"] = case.stages
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
