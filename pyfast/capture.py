"""Queries and keys of a Hugging Face model's attention, as attention transfer needs them.

transformers (5 and later) calls attention through a table of functions, chosen by a name in the model's configuration.
For the time of a context the configuration names an entry of ours, which notes what it is given and passes the call on
to the function that the model had::

    attention module ──▶ AttentionInterface["pyfast_capture_sdpa"] ──▶ sdpa
                              │
                              └─▶ query, key, scaling: references, no copy and no T×T matrix
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_PREFIX = "pyfast_capture_"


@dataclass(frozen=True)
class AttentionInputs:
    """What one call of attention was given, after any rotation of positions and norm of heads.

    ``query``: ``[B, H, T, D]``; ``key``: ``[B, H_kv, S, D]``; ``scaling``: factor of the scores; ``causal``: whether
    a query sees no later key; ``sliding_window``: how many keys back it sees, None for all; ``softcap``: c where
    scores are c·tanh(score / c), else None; ``mask``: the mask that the model made, ``[B, 1, T, S]`` or None.
    """

    query: Tensor
    key: Tensor
    scaling: float
    causal: bool
    sliding_window: int | None
    softcap: float | None
    mask: Tensor | None


class CapturedLayers(dict[int, AttentionInputs]):
    """Inputs of the chosen layers of one forward, by their number; ``depth`` is how many layers ran."""

    depth: int = 0


@dataclass
class AttentionCapture:
    """What :func:`capture_attention` yields: ``layers`` holds what the last forward's attention was given."""

    chosen: frozenset[int] | None
    layers: CapturedLayers = field(default_factory=CapturedLayers)
    _running: bool = False

    def _begin(self, *_: Any) -> None:
        self.layers, self._running = CapturedLayers(), True

    def _record(self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict) -> None:
        """One call; those of a checkpointed layer's second forward, in backward, come after the model's and pass."""
        if not self._running:
            return
        layer, self.layers.depth = self.layers.depth, self.layers.depth + 1
        if self.chosen is not None and layer not in self.chosen:
            return
        scaling, causal = options.get("scaling"), options.get("is_causal")
        self.layers[layer] = AttentionInputs(
            query,
            key,
            query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            bool(getattr(module, "is_causal", True) if causal is None else causal),
            options.get("sliding_window"),
            options.get("softcap"),
            mask,
        )

    def _end(self, model: nn.Module, _: Any, output: Any) -> None:
        self._running = False
        if not self.layers.depth:
            raise ValueError(
                f"model: {type(model).__name__} does not call attention through transformers.AttentionInterface, "
                "nothing could be captured"
            )
        if self.chosen is not None and not self.chosen <= self.layers.keys():
            missing = sorted(self.chosen - self.layers.keys())
            raise ValueError(f"layers: got {missing}, accepted: 0 to {self.layers.depth - 1}, the layers that ran")
        if hasattr(output, "keys"):  # a ModelOutput; not a plain tuple
            output.attention_inputs = self.layers


# Which captures a module of a model reports to.
_CAPTURES: WeakKeyDictionary[nn.Module, list[AttentionCapture]] = WeakKeyDictionary()


@contextlib.contextmanager
def capture_attention(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[AttentionCapture]:
    """Records the queries and keys that attention gets in each forward of ``model`` within the context.

    ::

        with capture_attention(student), capture_attention(teacher):
            ours = student(**batch)
            with torch.no_grad():
                theirs = teacher(**batch)
        loss(ours, theirs)  # DistillationLoss(attention=1.0) finds them as .attention_inputs of the outputs

    The model runs as it does otherwise: its own attention function (sdpa, eager, flash, flex) is called with the same
    arguments and gets the same masks, and no attention matrix is made for the capture. Recorded tensors belong to the
    autograd graph. With reentrant gradient checkpointing they carry no gradient.

    Args:
        model: a model of transformers 5 or later, unwrapped (of DistributedDataParallel and the like).
        layers: which calls of attention to keep, counted from 0 in the order in which they run (in a decoder or an
            encoder: the layers); negative from the end, by ``config.num_hidden_layers``. None for all.

    Yields:
        :class:`AttentionCapture`, refilled at each forward. Its ``layers`` are also ``attention_inputs`` of the
        ModelOutput that the forward returns.

    Raises:
        TypeError, ValueError: a model without such a configuration, layers that are not there; and, after a forward,
            a model that does not call attention through ``transformers.AttentionInterface``.
    """
    configurations = _configurations(model)
    if not configurations:
        raise TypeError(f"model: got {type(model).__name__}, accepted: a model of transformers, unwrapped")
    capture = AttentionCapture(_chosen(model, layers))
    modules = list(model.modules())
    switched = [(each, each._attn_implementation) for each in configurations]
    handles = [
        model.register_forward_pre_hook(capture._begin),
        model.register_forward_hook(capture._end),
    ]
    try:
        for configuration, implementation in switched:
            if not implementation.startswith(_PREFIX):  # else another capture of this model, or of its configuration
                _name(configuration, _register(implementation))
        for module in modules:
            _CAPTURES.setdefault(module, []).append(capture)
        yield capture
    finally:
        for handle in handles:
            handle.remove()
        for configuration, implementation in switched:
            _name(configuration, implementation)
        for module in modules:
            _CAPTURES[module].remove(capture)
        capture._running = False


def _configurations(model: nn.Module) -> list[Any]:
    """The configurations of a model and of its parts, each once, that name an implementation of attention."""
    found = {}
    for module in model.modules():
        configuration = getattr(module, "config", None)
        if isinstance(getattr(configuration, "_attn_implementation", None), str):
            found[id(configuration)] = configuration
    return list(found.values())


def _name(configuration: Any, implementation: str) -> None:
    """Names the implementation of this configuration and leaves those of its parts as they are."""
    configuration._attn_implementation = {"": implementation}


def _chosen(model: nn.Module, layers: Sequence[int] | None) -> frozenset[int] | None:
    if layers is None:
        return None
    wanted = list(layers)
    if not wanted or not all(type(index) is int for index in wanted):
        raise TypeError(f"layers: got {layers!r}, accepted: integers, at least one, or None for all")
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    for index in wanted:
        if index < -depth:
            raise ValueError(f"layers: got {index}, accepted: {-depth} and above")
    return frozenset(index + depth if index < 0 else index for index in wanted)


def _register(implementation: str) -> str:
    """Makes our entry over ``implementation``, with the same masks, and returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = _PREFIX + implementation
    AttentionInterface.register(name, _recording(implementation))
    masks = AttentionMaskInterface()
    if implementation in masks:
        AttentionMaskInterface.register(name, masks[implementation])
    return name


def _recording(implementation: str) -> Callable:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *rest: Any, **options: Any):
        for capture in _CAPTURES.get(module, ()):
            capture._record(module, query, key, mask, options)
        return _original(module, implementation)(module, query, key, value, mask, *rest, **options)

    return attention


def _original(module: nn.Module, implementation: str) -> Callable:
    """The function that ``implementation`` names where ``module`` is written: eager attention, and overrides of the
    others, belong to the file of the model."""
    for kind in type(module).__mro__:
        forward = vars(kind).get("forward")
        names = {} if forward is None else inspect.unwrap(forward).__globals__
        if "ALL_ATTENTION_FUNCTIONS" in names:
            return names["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, names.get("eager_attention_forward"))
    raise ValueError(f"model: {type(module).__name__} calls attention in a way that capture_attention does not know")
