"""The Triton attention kernels against the reference in float64: in the interpreter, and on a GPU if there is one.

The cases run in this file started as a program, see ``triton_programs.py``.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_programs import PLACES, check_compiled, error_of, python, saved_by

from pyfast.reference.attention_distill import attention_distill as reference

MIX = {"jsd": 0.3, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
RATES = (0.3, 0.2)


@dataclass
class Case:
    """A call: what the kernels are given. ``heads``: query heads, key heads of student and teacher."""

    tokens: int
    keys: int
    divergence: str = "forward_kl"
    causal: bool = True
    dtype: torch.dtype = torch.float32
    heads: tuple[int, int, int] = (2, 2, 2)
    widths: tuple[int, int] = (16, 16)
    masked: bool = False
    apart: float = 1.0
    with_grad: bool = True

    def inputs(self, device: str) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.tokens * 1000 + self.keys)

        batch = 2 if self.masked else 1

        def draw(heads: int, length: int, width: int) -> Tensor:
            layout = torch.randn(batch, length, heads, width, generator=generator)  # tokens first, as models have it
            return layout.transpose(1, 2).to(self.dtype)

        heads, keys_s, keys_t = self.heads
        q_t, k_t = draw(heads, self.tokens, self.widths[1]), draw(keys_t, self.keys, self.widths[1])
        q_s, k_s = draw(heads, self.tokens, self.widths[0]), draw(keys_s, self.keys, self.widths[0])
        if self.apart < 1:
            q_s, k_s = q_t + self.apart * q_s, k_t.clone()
        last = torch.arange(self.tokens) + (self.keys - self.tokens if self.causal else self.keys)
        counted = (last >= 0).expand(batch, -1)
        mask = None
        if self.masked:
            mask = torch.ones(2, self.keys, dtype=torch.bool)
            mask[0, -2:] = False
            mask[1, : self.keys // 2] = False
            counted = counted & (mask.cumsum(1)[:, last.clamp(0, self.keys - 1)] > 0)
            for k in (k_s, k_t):
                k[~mask[:, None].expand(k.shape[:3])] = math.nan
        scale = (torch.rand(batch, heads, self.tokens, generator=generator) + 0.5) * counted[:, None]
        for q in (q_s, q_t):
            q[~(scale != 0)] = math.nan
        tensors = {"q_s": q_s, "k_s": k_s, "q_t": q_t, "k_t": k_t, "row_scale": scale, "key_mask": mask}
        mix = MIX.get(self.divergence, 0.0)
        rates = RATES if self.apart == 1 else (RATES[0], RATES[0])
        options = {"causal": self.causal, "divergence": self.divergence, "mix": mix}
        options |= {"student_rate": rates[0], "teacher_rate": rates[1]}
        return {name: x if x is None else x.to(device) for name, x in tensors.items()} | options


CASES = {
    "square": Case(50, 50),
    "one token": Case(1, 1),
    "one query": Case(1, 37, heads=(4, 2, 1)),
    "few queries": Case(5, 40),
    "more queries than keys": Case(33, 9),
    "not causal": Case(35, 50, causal=False),
    "grouped queries": Case(21, 21, heads=(4, 2, 1), widths=(16, 20)),
    "odd widths": Case(20, 20, widths=(5, 33)),
    "padded": Case(39, 39, masked=True, heads=(4, 1, 2)),
    "padded, not causal": Case(20, 35, masked=True, causal=False),
    "half": Case(35, 35, dtype=torch.float16, heads=(4, 2, 2)),
    "value alone": Case(20, 20, with_grad=False),
    "value alone, mse": Case(20, 20, "mse", with_grad=False),
    "near": Case(30, 30, apart=1e-3),
    **{
        name: Case(19, 19, name, masked=True)
        for name in ("mse", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
    },
}
# The interpreter multiplies the bits of bfloat16 as whole numbers.
ON_DEVICE = {
    "bfloat16": Case(300, 300, dtype=torch.bfloat16, heads=(4, 2, 2), widths=(64, 128)),
    "bfloat16 wide": Case(200, 333, "jsd", dtype=torch.bfloat16, widths=(256, 256), masked=True),
    "long": Case(1000, 1500, heads=(4, 2, 4), widths=(64, 64)),
}

ROWS, KEYS = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
BAD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "teacher's heads": ("ValueError", "q_t", {"q_t": torch.zeros(1, 4, 3, 4)}),
    "key heads": ("ValueError", "k_s", {"k_s": torch.zeros(1, 3, 3, 4)}),
    "key width": ("ValueError", "k_t", {"k_t": torch.zeros(1, 1, 3, 5)}),
    "dtypes": ("TypeError", "k_s", {"k_s": KEYS.half()}),
    "float64": (
        "TypeError",
        "q_s",
        {name: x.double() for name, x in zip(("q_s", "k_s", "q_t", "k_t"), (ROWS, KEYS) * 2, strict=True)},
    ),
    "scale": ("ValueError", "row_scale", {"row_scale": torch.ones(1, 1, 3)}),
    "mask": ("TypeError", "key_mask", {"key_mask": torch.ones(1, 3)}),
    "divergence": ("ValueError", "divergence", {"divergence": "kl"}),
    "width": ("ValueError", "q_s, q_t", {"q_s": torch.zeros(1, 2, 3, 300), "k_s": torch.zeros(1, 1, 3, 300)}),
}


def worker(device: str, target: str) -> None:
    """Run every case on ``device`` and save {"results": …, "errors": …} to ``target``."""
    from pyfast.triton_kernels.attention_distill import attention_distill

    results, errors = {}, {}
    for name, case in {**CASES, **(ON_DEVICE if device == "cuda" else {})}.items():
        results[name] = [x.cpu() for x in attention_distill(**case.inputs(device), with_grad=case.with_grad)]
    plain = {"q_s": ROWS, "k_s": KEYS, "q_t": ROWS, "k_t": KEYS, "row_scale": torch.ones(1, 2, 3)}
    for name, (_, _, change) in BAD.items():
        errors[name] = error_of(lambda change=change: attention_distill(**{**plain, **change}))
    torch.save({"results": results, "errors": errors}, target)


@pytest.fixture(scope="module", params=PLACES)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return saved_by(__file__, request.param, tmp_path_factory)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-300))


@pytest.mark.parametrize("name", [*CASES, *ON_DEVICE])
def test_against_float64(outcome: dict[str, Any], name: str) -> None:
    if name not in outcome["results"]:
        pytest.skip("bfloat16 and long sequences: on a GPU")
    case = {**CASES, **ON_DEVICE}[name]
    inputs = {
        key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in case.inputs("cpu").items()
    }
    leaves = [inputs[key].requires_grad_() for key in ("q_s", "k_s")]
    want = reference(**inputs)
    rows, *grads = outcome["results"][name]
    assert rows.dtype == torch.float32
    assert distance(rows, want.detach()) < (5e-4 if name == "near" else 3e-6)
    if not case.with_grad:
        assert all(grad.shape == (0,) for grad in grads)
        return
    for got, exact in zip(grads, torch.autograd.grad(want.sum(), leaves), strict=True):
        assert got.dtype == case.dtype and got.is_contiguous()
        if case.keys == 1:
            assert not got.any()
            continue
        rounding = distance(exact.to(case.dtype), exact)  # bfloat16 slopes are rounded before their product, too
        assert distance(got, exact) < (2 * rounding if case.dtype == torch.bfloat16 else 1.05 * rounding) + (
            1e-3 if name == "near" else 5e-6
        )


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(outcome: dict[str, Any], name: str) -> None:
    error, argument, _ = BAD[name]
    kind, message = outcome["errors"][name]
    assert kind == error and message.startswith(argument + ":") and "accepted" in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("teacher_heads", [4, 2])  # the kernels, and blocks of torch's products
def test_public_loss_on_the_device_and_in_a_graph(teacher_heads: int) -> None:
    import pyfast

    shapes = [(2, 4, 300, 64), (2, 2, 300, 64), (2, teacher_heads, 300, 64), (2, 2, 300, 64)]
    q_s, k_s, q_t, k_t = (torch.randn(*shape, device="cuda") for shape in shapes)
    leaves = q_s.requires_grad_(), k_s.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = pyfast.attention_distillation_loss(*leaves, q_t, k_t)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def exact() -> tuple[Tensor, ...]:  # whose graph must not outlive it: a capture may not meet another stream's nodes
        loss = pyfast.attention_distillation_loss(*(x.double() for x in (*leaves, q_t, k_t)))
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    for got, want in zip(step(), exact(), strict=True):
        assert distance(got, want.double()) < 1e-5
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q_t.copy_(q_t.flip(0))
    graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(captured, step(), strict=True))


def test_compiles_ahead_of_time_without_spills(tmp_path: Path) -> None:
    pairs = (
        "[(case, target) for target in compile.TARGETS for case in compile.cases(target)"
        " if case.name.startswith('attention') and ("
        "case.name.endswith(('forward_kl bf16 width 64', 'forward_kl bf16 width 128'))"
        " or (target == 90 and"
        " case.name.endswith(('forward_kl fp32 width 128', 'mse bf16 width 128', 'jsd fp16 width 128'))))]"
    )
    check_compiled(pairs, {"attention_rows", "attention_keys"}, tmp_path)


def test_float32_is_multiplied_without_wgmma(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    program = (  # the ptxas of Triton 3.6 loses operands of float32's wgmma, see _HOPPER
        "from pyfast.triton_kernels import compile\n"
        "for case in compile.cases(90):\n"
        "    if case.name.startswith('attention') and ' forward_kl fp32 ' in case.name:\n"
        "        print('wgmma' in compile.compile_case(case, 90).asm['ptx'], case.name)\n"
    )
    found = python(["-c", program], tmp_path, {"TRITON_CACHE_DIR": str(tmp_path)}).splitlines()
    assert len(found) == 6
    assert not [line for line in found if not line.startswith("False ")]


if __name__ == "__main__":
    worker(*sys.argv[1:])
