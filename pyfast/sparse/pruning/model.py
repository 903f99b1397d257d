"""Whole models: every chosen layer pruned, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.sparse.convert import Patterns, eligible_linears
from pyfast.sparse.masks import Threshold
from pyfast.sparse.pruning import calibration as batches_of
from pyfast.sparse.pruning.gradients import mean_gradients
from pyfast.sparse.pruning.options import LOSS_METHODS, STREAMED_METHODS, Options, make_options
from pyfast.sparse.pruning.scores import importance, mask_from
from pyfast.sparse.pruning.sparsegpt import inverse_factor, solve
from pyfast.sparse.pruning.statistics import Collector
from pyfast.sparse.pruning.stream import Plan, Stream, Unit, evaluating, plan


@dataclass(frozen=True)
class PrunedLayer:
    """What happened to one layer.

    Attributes:
        name: its name in the model.
        shape: (N, K) of its weight.
        removed: elements that are 0 because they were pruned.
        error: ‖(W − Ŵ) X‖ / ‖W X‖ over the calibration tokens for ``sparsegpt``, which knows it; None for the others.
    """

    name: str
    shape: tuple[int, int]
    removed: int
    error: float | None = None

    @property
    def sparsity(self) -> float:
        """Share of the elements removed."""
        return self.removed / max(self.shape[0] * self.shape[1], 1)


class Observer:
    """Who looks on while a model is pruned, unit by unit (a block, or the layers outside of all blocks), and may hand
    in what an earlier run found out. This one does neither."""

    def units(self, names: list[str]) -> None:
        """The units, in their order, before the first."""

    def saved(self, unit: Unit) -> tuple[dict[str, Tensor], list[PrunedLayer]] | None:
        """The new weights of a unit where they are known."""
        return None

    def pruned(self, unit: Unit, layers: list[PrunedLayer]) -> None:
        """A unit's layers hold their new weights."""

    def advance(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of what comes before the next unit is pruned."""


def prune(
    model: nn.Module,
    calibration: Iterable[Tensor | Mapping[str, Any]] | None = None,
    method: str = "wanda",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    scope: str | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    head: bool = False,
    dampening: float = 0.01,
    block_size: int = 128,
) -> list[PrunedLayer]:
    """Sets weights of a model's linear layers to 0, in place: one-shot pruning, without training.

    The model stays dense, and everything that runs, saves or trains it goes on as before. ``sparsify(model, "2:4")``
    after the pattern 2:4, or ``sparsify(model, "bitmap", 0.0)`` after any, stores the same zeros as a sparse weight.

    ========== ============================ ======================================================================
    method     an element's score           needs
    ========== ============================ ======================================================================
    magnitude  \\|w\\|                        nothing
    gradient   E\\|g\\|                       batches with labels; memory: a float32 a weight
    taylor     \\|w\\| · E\\|g\\|               the same (Molchanov et al., arXiv 1611.06440, 1906.10771; first order)
    wanda      \\|w\\| · ‖x‖₂                 batches (Sun et al., arXiv 2306.11695)
    sparsegpt  w² / [H⁻¹]_cc, and an        batches; memory: K² float32 for each layer of one block
               update of the kept weights   (Frantar and Alistarh, arXiv 2301.00774)
    ========== ============================ ======================================================================

    ``wanda`` and ``sparsegpt`` stream the batches through one decoder or encoder layer at a time: a block's statistics
    are those of the inputs that the pruned blocks before it produce, over the tokens whose ``attention_mask`` is not 0.
    Memory is that of the model, of one block's statistics, of the calibration set's hidden states and of what the
    model hands to its blocks beside them (masks, rotary tables). Blocks are the items of an ``nn.ModuleList``, whatever
    the family; layers outside of them (a pooler, the head) come last, from a run of the whole model.

    Args:
        model: a transformers model, or for all methods but the streamed any module; on any device. Eligible is
            what :func:`pyfast.sparsify` takes: every ``nn.Linear`` whose weight no other module shares, but the head.
        calibration: batches, read once: mappings of the model's arguments, or tensors, its first argument. None for
            ``"magnitude"`` only. One backward pass a batch for ``"gradient"`` and ``"taylor"``, from the model's own
            loss, each batch counting alike.
        method: see the table.
        sparsity: share of the elements removed, in [0, 1); None for what an N:M pattern removes.
        pattern: ``"unstructured"``, or ``"N:M"``: N kept of every M columns, M up to 32 (the last group of a row,
            short where M does not divide K, keeps min(N, its length)).
        scope: for the pattern ``"unstructured"``, what elements compete with: ``"row"``, ``"layer"``, or ``"global"``
            (all chosen layers; not for the streamed methods). None: rows for ``"wanda"``, as its paper has it, the
            layer for the others. ``"sparsegpt"`` has blocks of columns of its own. Counts are exact, and of equal
            scores the first stays.
        include: shell patterns of module names (``"model.layers.*.mlp.*"``); None takes all.
        exclude: shell patterns of module names left as they are.
        head: prune the output head too (where its weight is its own, not the embedding's).
        dampening: of ``"sparsegpt"``: times the mean of the Hessian's diagonal, added to it.
        block_size: of ``"sparsegpt"``: columns settled at once.

    Returns:
        What was done to each layer, in order.

    Raises:
        TypeError, ValueError: a wrong argument, no eligible layer, a weight that holds NaN (its layer is named), a
            calibration that gives no loss, reaches not every layer or is not finite, or a model whose blocks cannot be
            run one at a time. Hooks are gone, modes, gradients and ``requires_grad`` as before, whatever was raised.
            The weights are unchanged with ``"magnitude"``, ``"gradient"`` and ``"taylor"``; with the streamed methods
            the block at fault and those after it are, while blocks before it stay pruned.
    """
    options = make_options(method, sparsity, pattern, scope, dampening, block_size)
    chosen = eligible_linears(model, include, exclude, head)
    return prune_layers(model, chosen, calibration, options, Observer())


def prune_layers(
    model: nn.Module,
    chosen: Mapping[str, nn.Linear],
    calibration: Iterable[Tensor | Mapping[str, Any]] | None,
    options: Options,
    observer: Observer,
) -> list[PrunedLayer]:
    """:func:`prune` with checked options and layers, seen by an observer."""
    found = plan(model, chosen)
    observer.units([unit.name for unit in found.units])
    batches: list[batches_of.Batch] = []
    if options.method != "magnitude":
        if calibration is None:
            raise TypeError(f"calibration: got None, accepted for {options.method}: an iterable of batches")
        batches = batches_of.read(
            calibration, model, labels=options.method in LOSS_METHODS, head=found.rest is not None
        )
    if options.method in STREAMED_METHODS:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"model: {options.method} takes a decoder or an encoder, not both in one model")
        with evaluating(model):
            return [layer for done in _streamed(model, found, batches, options, observer) for layer in done]
    with evaluating(model):
        return _scored(model, found, batches, options, observer)


def _scored(
    model: nn.Module, found: Plan, batches: list[batches_of.Batch], options: Options, observer: Observer
) -> list[PrunedLayer]:
    """By scores that do not depend on what is pruned before: all are there and checked before a weight changes."""
    units = found.units
    layers = {name: layer for unit in units for name, layer in unit.layers.items()}
    gradients: dict[str, Tensor] = {}
    if options.method in LOSS_METHODS:
        done = 0

        def on_batch() -> None:
            nonlocal done
            done += 1
            observer.advance("gradients", done, len(batches))

        gradients = mean_gradients(model, layers, batches, on_batch)

    def scores_of(name: str) -> Tensor:
        return importance(layers[name].weight, options.method, gradients.get(name))

    for name in layers:
        if bool(scores_of(name).isnan().any()):
            raise ValueError(f"model: the scores of {name} hold NaN, which has no rank")
    select: Callable[[Tensor], Tensor] = partial(mask_from, options=options)
    if options.scope == "global":
        dtypes = {layer.weight.dtype for layer in layers.values()}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        total = sum(layer.weight.numel() for layer in layers.values())
        threshold = Threshold(lambda: map(scores_of, layers), round(options.sparsity * total), dtype)
        select = threshold.mask
    results = []
    for unit in units:
        # Asked for even where the answer is known: a global threshold counts ties in the order of the layers.
        masks = {name: select(scores_of(name)) for name in unit.layers}
        weights = {name: layer.weight.masked_fill(~masks[name], 0.0) for name, layer in unit.layers.items()}
        pruned = [_result(name, masks[name]) for name in unit.layers]
        results += _apply(unit, weights, pruned, observer, observer.saved(unit))
    return results


def _streamed(
    model: nn.Module, found: Plan, batches: list[batches_of.Batch], options: Options, observer: Observer
) -> Iterator[list[PrunedLayer]]:
    """By what each layer reads, block by block."""
    for chain in found.chains:
        observer.advance(f"inputs of {chain.name}", 0, 1)
        stream = Stream(chain, model, batches)
        for index, unit in enumerate(chain.units):
            if unit.layers:
                yield _prune_unit(unit, options, observer, partial(stream.run, index, go_on=False))
            if index < len(chain.units) - 1:
                stream.run(index, go_on=True)
    if found.rest is not None:

        def run(before: Callable[[Tensor | None], None]) -> None:
            for batch in batches:
                before(batch.mask)
                batch.run(model)

        yield _prune_unit(found.rest, options, observer, run)


def _prune_unit(
    unit: Unit,
    options: Options,
    observer: Observer,
    run: Callable[[Callable[[Tensor | None], None]], None],
) -> list[PrunedLayer]:
    saved = observer.saved(unit)
    if saved is not None:
        return _apply(unit, {}, [], observer, saved)
    collector = Collector(unit.layers, second_moments=options.method == "sparsegpt")

    def before(mask: Tensor | None) -> None:
        collector.mask = mask

    with collector.attached():
        run(before)
    weights: dict[str, Tensor] = {}
    pruned: list[PrunedLayer] = []
    hessian = factor = unused = None
    for number, (name, layer) in enumerate(unit.layers.items()):
        observer.advance(name, number, len(unit.layers))
        statistic = collector.take(name)
        weight = layer.weight.detach()
        if options.method == "wanda":
            scores = importance(weight, "wanda", statistic)
            if bool(scores.isnan().any()):
                raise ValueError(f"model: the scores of {name} hold NaN, which has no rank")
            mask = mask_from(scores, options)
            weights[name] = weight.masked_fill(~mask, 0.0)
            pruned.append(_result(name, mask))
            continue
        if not bool(weight.isfinite().all()):
            raise ValueError(f"model: {name} holds infinity")
        if hessian is None or hessian.shape != statistic.shape or not torch.equal(hessian, statistic):
            try:  # query, key and value read the same inputs: one factorization for the three
                factor, unused = inverse_factor(statistic, options.dampening)
            except ValueError as error:
                raise ValueError(f"calibration: the second moments of the inputs of {name}: {error}") from error
        hessian = statistic
        assert factor is not None and unused is not None
        weights[name], mask = solve(weight, factor, unused, options.sparsity, options.pattern, options.block_size)
        if not bool(weights[name].isfinite().all()):
            raise ValueError(f"model: the new weights of {name} overflow {weight.dtype}")
        pruned.append(_result(name, mask, _output_error(weight, weights[name], hessian)))
    return _apply(unit, weights, pruned, observer, None)


def _apply(
    unit: Unit,
    weights: Mapping[str, Tensor],
    pruned: list[PrunedLayer],
    observer: Observer,
    saved: tuple[dict[str, Tensor], list[PrunedLayer]] | None,
) -> list[PrunedLayer]:
    """New weights into the layers of a unit, those of an earlier run where there are such."""
    if saved is not None:
        weights, pruned = saved
    for name, layer in unit.layers.items():
        layer.weight.copy_(weights[name])
    observer.pruned(unit, pruned)
    return pruned


def _result(name: str, mask: Tensor, error: float | None = None) -> PrunedLayer:
    return PrunedLayer(name, (mask.shape[0], mask.shape[1]), mask.numel() - int(mask.sum()), error)


def _output_error(old: Tensor, new: Tensor, hessian: Tensor) -> float:
    """‖(W − Ŵ) X‖ / ‖W X‖ from H ∝ X Xᵀ."""

    def energy(weight: Tensor) -> float:
        return float(((weight @ hessian) * weight).sum(dtype=torch.float64))

    before, after = old.to(hessian.dtype), new.to(hessian.dtype)
    return (max(energy(before - after), 0.0) / max(energy(before), 1e-300)) ** 0.5
