"""Fusions where a model has them: the gated MLP, whose activation and product join the kernel of gate_proj."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from pyfast.reference.epilogue import ACTIVATIONS, activate
from pyfast.sparse.linear import SparseLinear

Model = TypeVar("Model", bound=nn.Module)
PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class FusedGatedMLP(nn.Module):
    """down(f(gate(x)) · up(x)) with the activation and the product in the epilogue of the sparse gate's kernel.

    Two tensors [tokens, intermediate] are not written and read again. Where a gradient is wanted the same layers are
    called one by one. The children keep their names: the state_dict is that of the module it stands for.
    """

    def __init__(self, gate_proj: SparseLinear, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn
        self.activation = _activation(act_fn)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., hidden]`` to ``[..., hidden]``."""
        activation = ACTIVATIONS[self.activation]
        return self.down_proj(self.gate_proj.product(x, activation=activation, mul=self.up_proj(x)))

    def extra_repr(self) -> str:
        return f"activation={ACTIVATIONS[self.activation]!r}"


def fuse(model: Model) -> Model:
    """Replaces every gated MLP whose gate is sparse by a :class:`FusedGatedMLP`, in place.

    Such an MLP has the children gate_proj, up_proj, down_proj and act_fn and no others, as in the decoders of the
    Llama, Qwen, Mistral and Gemma families; its activation is silu, relu or one of the two gelu. Before it is replaced
    both are run on two random tokens: an MLP that computes something else is left as it is. So is one with hooks.
    The names of parameters and buffers do not change. A model whose gate and up projections are one layer (Phi-3) has
    nothing to fuse: the product needs both halves.

    Args:
        model: any module; changed in place and returned.

    Raises:
        TypeError, ValueError: no module, or no MLP that can be fused. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, accepted: a torch.nn.Module")
    fused = {name: twin for name, mlp in model.named_modules() if name and (twin := _fused(mlp)) is not None}
    if not fused:
        raise ValueError("model: has no gated MLP with a sparse gate_proj to fuse")
    for name, twin in fused.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, twin)
    return model


def _fused(mlp: nn.Module) -> FusedGatedMLP | None:
    children = dict(mlp.named_children())
    if isinstance(mlp, FusedGatedMLP) or set(children) != PARTS or mlp._forward_hooks or mlp._forward_pre_hooks:
        return None
    gate, act = children["gate_proj"], children["act_fn"]
    if type(gate) is not SparseLinear or gate.values.is_meta or gate._forward_hooks or gate._forward_pre_hooks:
        return None
    own_tensors = [*mlp.parameters(recurse=False), *mlp.buffers(recurse=False), *act.parameters(), *act.buffers()]
    if own_tensors or not _is_known(act):
        return None
    twin = FusedGatedMLP(**children).train(mlp.training)  # type: ignore[arg-type]
    return twin if _agree(mlp, twin, gate) else None


def _activation(act: nn.Module) -> int:
    """The number of an activation, found by what it computes: its class has many names."""
    probe = torch.linspace(-6, 6, 97, dtype=torch.float64)
    with torch.no_grad():
        y = act(probe)
        for number in range(1, len(ACTIVATIONS)):
            if y.shape == probe.shape and torch.allclose(y, activate(probe, number), rtol=1e-9, atol=1e-9):
                return number
    raise ValueError(f"act_fn: got {act}, accepted: {', '.join(ACTIVATIONS[1:])}")


def _is_known(act: nn.Module) -> bool:
    try:
        _activation(act)
    except ValueError:
        return False
    return True


def _agree(mlp: nn.Module, twin: nn.Module, gate: SparseLinear) -> bool:
    dtype = next((p.dtype for p in mlp.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, gate.in_features, generator=generator).to(gate.values.device, dtype)
    training = mlp.training
    with torch.no_grad():
        try:
            expected = mlp.eval()(x).double()
        finally:
            mlp.train(training)
        difference = (twin(x).double() - expected).norm()
    return bool(difference <= max(16 * torch.finfo(dtype).eps, 1e-4) * expected.norm())
