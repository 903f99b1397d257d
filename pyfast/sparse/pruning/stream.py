"""Calibration through a model one block at a time.

A block is an item of an outermost ``nn.ModuleList`` that holds layers to prune: the decoder or encoder layers of every
transformers model. No family is known by name.

    batches ─▶ model ─▶ [block 0] ─▶ [block 1] ─▶ … ─▶ rest of the model
                capture: the state that enters block 0, and the other arguments of every block (masks, rotary tables),
                while the blocks pass the state on unchanged
    then, for each block:  run it on the states, collecting what its layers read;  prune it;  run it again on the same
                states: what leaves it enters the next one

The states of the calibration set, one for each batch, are all that is kept between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.sparse.pruning.calibration import Batch

REST = "other layers"


@dataclass
class Unit:
    """Layers that are pruned together: those of a block, or those outside of every block."""

    name: str
    layers: dict[str, nn.Linear]


@dataclass
class Chain:
    """Blocks that run one after the other, each with the unit of its layers to prune (none: it only runs)."""

    name: str
    blocks: list[nn.Module]
    units: list[Unit]


@dataclass
class Plan:
    """All layers to prune, each in one unit, in the order in which they are pruned."""

    chains: list[Chain] = field(default_factory=list)
    rest: Unit | None = None

    @property
    def units(self) -> list[Unit]:
        found = [unit for chain in self.chains for unit in chain.units if unit.layers]
        return found if self.rest is None else [*found, self.rest]


def plan(model: nn.Module, chosen: Mapping[str, nn.Linear]) -> Plan:
    """Finds the blocks that the chosen layers lie in. A layer with several names counts once, by its first."""
    chains: dict[str, Chain] = {}
    rest: dict[str, nn.Linear] = {}
    seen: set[nn.Module] = set()
    for name, linear in chosen.items():
        if linear in seen:
            continue
        seen.add(linear)
        place = _block_of(model, name)
        if place is None:
            rest[name] = linear
            continue
        path, index = place
        if path not in chains:
            blocks = list(model.get_submodule(path).children())
            chains[path] = Chain(path, blocks, [Unit(f"{path}.{i}", {}) for i in range(len(blocks))])
        chains[path].units[index].layers[name] = linear
    return Plan(list(chains.values()), Unit(REST, rest) if rest else None)


def _block_of(model: nn.Module, name: str) -> tuple[str, int] | None:
    """The outermost module list that a module lies in, and the position of its item."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[:end]), int(parts[end])
    return None


@dataclass
class _Call:
    """The arguments of one block for one batch, but for the state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool  # the state is given as hidden_states=


class Stream:
    """The states of all batches on their way through one chain."""

    def __init__(self, chain: Chain, model: nn.Module, batches: Sequence[Batch]):
        self._chain = chain
        self._masks = [batch.mask for batch in batches]
        self._states: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        for batch in batches:
            self._capture(model, batch)

    def run(self, index: int, before: Callable[[Tensor | None], None] | None = None, *, go_on: bool) -> None:
        """Runs block ``index`` on the states of every batch, which where ``go_on`` become those that leave it.
        ``before`` is told the mask of each batch."""
        for number, state in enumerate(self._states):
            if before is not None:
                before(self._masks[number])
            call = self._calls[number][index]
            if call.by_name:
                output = self._chain.blocks[index](*call.args, hidden_states=state, **call.kwargs)
            else:
                output = self._chain.blocks[index](state, *call.args, **call.kwargs)
            if go_on:
                self._states[number] = output[0] if isinstance(output, tuple) else output

    def _capture(self, model: nn.Module, batch: Batch) -> None:
        calls: list[_Call] = []
        state: Tensor | None = None
        beside: tuple[Any, ...] | None = None  # what block 0 returns after the state; None where it returns it alone

        def passing(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def stand_in(*args: Any, **kwargs: Any) -> Any:
                nonlocal state, beside
                by_name = not args
                entering = kwargs.get("hidden_states") if by_name else args[0]
                if index != len(calls) or not isinstance(entering, Tensor):
                    raise _unlike_a_chain(self._chain, "they are not called once each, in order, with a hidden state")
                others = {key: value for key, value in kwargs.items() if not (by_name and key == "hidden_states")}
                calls.append(_Call(args[1:], others, by_name))
                if index == 0:
                    state = entering
                    output = forward(*args, **kwargs)
                    if isinstance(output, tuple):
                        beside = output[1:]
                    elif not isinstance(output, Tensor):
                        raise _unlike_a_chain(self._chain, f"they return {type(output).__name__}")
                elif entering is not state:
                    raise _unlike_a_chain(self._chain, "the state is changed between them")
                return entering if beside is None else (entering, *beside)

            return stand_in

        with _replaced(self._chain.blocks, passing):
            batch.run(model)
        if len(calls) != len(self._chain.blocks) or state is None:
            raise _unlike_a_chain(self._chain, f"{len(calls)} of {len(self._chain.blocks)} run")
        self._states.append(state)
        self._calls.append(calls)


def _unlike_a_chain(chain: Chain, why: str) -> ValueError:
    return ValueError(
        f"model: the {len(chain.blocks)} blocks of {chain.name} cannot be run one at a time: {why}; "
        "accepted by magnitude, gradient and taylor"
    )


@contextmanager
def _replaced(
    blocks: Sequence[nn.Module], stand_in: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Each block's ``forward`` replaced by ``stand_in(index, forward)``."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index, block.forward)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if own is not None:
                block.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
