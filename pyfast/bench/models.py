"""Whole models for the benchmark: published dimensions by name, or a local Hugging Face checkpoint.

A name (``qwen2.5-0.5b``, ``llama-3.2-1b``, ...) gives a model of exactly the published shape whose weights
are drawn at random: time and bytes depend on the shape alone, so nothing has to be downloaded. A path gives
the checkpoint's own weights. Nothing here touches the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyfast.bench import hardware

RANDOM_NOTE = "weights drawn at random"
_STD = 0.02  # the standard deviation with which these families are initialised before training
_POOL = 4_194_301  # a prime: no row width divides it, so no two rows of a matrix are filled alike


@dataclass(frozen=True)
class Dimensions:
    """The published shape of one decoder model.

    Attributes:
        family: transformers' ``model_type``.
        hidden: width of the residual stream.
        intermediate: width of the gated MLP.
        layers: number of decoder layers.
        heads: query heads; ``kv_heads``: key and value heads; ``head_dim``: width of one head.
        vocab: words in the vocabulary.
        tied: whether the head shares the embedding's weight.
        extra: the remaining fields of the configuration (rotary base and scaling, norm epsilon, context).
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self, layers: int | None = None) -> Any:
        """The transformers configuration, with ``layers`` decoder layers instead of all where given."""
        from transformers import AutoConfig

        count = self.layers if layers is None else layers
        extra = {**self.extra, "max_window_layers": count} if self.family == "qwen2" else dict(self.extra)
        if self.family == "llama":
            extra["head_dim"] = self.head_dim
        return AutoConfig.for_model(
            self.family,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=count,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            **extra,
        )


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, tied: bool = True) -> Dimensions:
    extra = {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
    return Dimensions("qwen2", hidden, intermediate, layers, heads, kv_heads, hidden // heads, 151936, tied, extra)


def _llama3(hidden: int, intermediate: int, layers: int, heads: int, *, factor: float, tied: bool) -> Dimensions:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    extra = {
        "rope_theta": 500_000.0,
        "rope_scaling": scaling,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
    return Dimensions("llama", hidden, intermediate, layers, heads, 8, hidden // heads, 128256, tied, extra)


PUBLISHED: dict[str, Dimensions] = {
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, factor=32.0, tied=True),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, factor=8.0, tied=False),
}


@dataclass
class Built:
    """A model ready to be timed.

    Attributes:
        model: in evaluation mode, no gradients, on the asked device.
        name: what to call it in a table; says so where layers were cut.
        kind: ``"causal"`` (has a head and a cache) or ``"encoder"``.
        layers_published: decoder or encoder layers before any cut.
        path: the checkpoint's folder, or None where the weights were drawn at random.
        note: where the weights come from, in words.
    """

    model: nn.Module
    name: str
    kind: str
    layers_published: int
    path: Path | None
    note: str


def describe(name_or_path: str) -> str:
    """``"name"`` for a published name, ``"path"`` for a local checkpoint; anything else is an error.

    Raises:
        ValueError: neither a published name nor a folder with a ``config.json``.
    """
    if name_or_path.lower() in PUBLISHED:
        return "name"
    if (Path(name_or_path).expanduser() / "config.json").is_file():
        return "path"
    raise ValueError(
        f"model: {name_or_path!r} is neither a published name ({', '.join(PUBLISHED)}) nor a folder that holds "
        "a Hugging Face checkpoint (with a config.json); give one of these names or the path of such a folder"
    )


def load_config(name_or_path: str, layers: int | None = None) -> Any:
    """The transformers configuration of a published name or local checkpoint, cut to ``layers`` where given.

    Raises:
        ValueError: unknown model, or ``layers`` outside 1 … the model's own number.
    """
    if describe(name_or_path) == "name":
        dimensions = PUBLISHED[name_or_path.lower()]
        return dimensions.config(_checked_layers(layers, dimensions.layers))
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(Path(name_or_path).expanduser()), local_files_only=True)
    count = _checked_layers(layers, config.num_hidden_layers)
    if count != config.num_hidden_layers:
        config.num_hidden_layers = count
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types[:count])
    return config


def build(
    name_or_path: str,
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Built:
    """Make a model to be timed.

    Args:
        name_or_path: a name of ``PUBLISHED``, or a folder with a Hugging Face checkpoint.
        dtype: of the weights.
        layers: keep only the first so many layers (for quick runs); the name of the result says so.
        device: where the weights live.
        seed: of the random weights; the generator of the process is left alone.

    Raises:
        ValueError: unknown model, or ``layers`` out of range.
        MemoryError: the weights do not fit into the memory that is free; raised before any is taken.
    """
    kind = describe(name_or_path)
    config = load_config(name_or_path, layers)
    path = Path(name_or_path).expanduser().resolve() if kind == "path" else None
    published = load_config(name_or_path).num_hidden_layers
    name = name_or_path.lower() if path is None else path.name
    if config.num_hidden_layers != published:
        name += f" ({config.num_hidden_layers} of {published} layers)"
    causal = path is None or is_causal(config)
    check_memory(weight_bytes(config, dtype, causal=causal), name, device)
    if path is None:
        model = draw(config, dtype, device=device, seed=seed)
        note = RANDOM_NOTE
    else:
        model = _load(path, config, dtype, causal).to(device)
        note = "weights of a local checkpoint"
    return Built(model, name, "causal" if causal else "encoder", published, path, note)


def draw(config: Any, dtype: torch.dtype, *, device: str | torch.device = "cpu", seed: int = 0) -> nn.Module:
    """A causal model of ``config`` with weights drawn at random, quickly.

    The module tree is made without storage, then filled. Drawing billions of normal numbers takes longer than
    the benchmark itself, so a pool of a few million is drawn once and repeated, each weight from an offset of
    its own; its length is prime, so rows of one matrix never coincide. Magnitudes are distributed as
    they should be, which is all that magnitude pruning and timing see. Norms are ones, biases zeros.
    """
    model = skeleton(config, dtype)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gives each name its own storage; the tie is made again before filling
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator).mul_(_STD).to(device=device, dtype=dtype)
    filled: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                if id(parameter) in filled:
                    continue
                filled.add(id(parameter))
                if parameter.dim() < 2:
                    parameter.fill_(1.0 if key == "weight" else 0.0)
                else:
                    offset = int(torch.randint(_POOL, (1,), generator=generator))
                    _fill(parameter.view(-1), pool, offset)
            if list(module.buffers(recurse=False)):
                _restore_buffers(module)
    return model.eval().requires_grad_(False)


def skeleton(config: Any, dtype: torch.dtype, *, causal: bool = True) -> Any:
    """The model of ``config`` on the ``meta`` device: shapes and names, no storage."""
    from transformers import AutoModel, AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM if causal else AutoModel
    with torch.device("meta"):
        return factory.from_config(config, dtype=dtype)


def weight_bytes(config: Any, dtype: torch.dtype, *, causal: bool = True) -> int:
    """Bytes of the weights of a model of ``config``, tied weights counted once; takes no memory itself."""
    return sum(p.numel() * p.element_size() for p in skeleton(config, dtype, causal=causal).parameters())


def available_bytes(device: str | torch.device = "cpu") -> int:
    """Bytes that can be taken on ``device`` now without swapping."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return hardware.available_memory_bytes()


def check_memory(needed: int, what: str, device: str | torch.device = "cpu") -> None:
    """Raise MemoryError where ``needed`` bytes and an eighth for activations exceed the free memory."""
    free = available_bytes(device)
    if needed * 1.125 > free:
        raise MemoryError(
            f"{what}: needs about {needed * 1.125 / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are free; "
            "choose a smaller model or bfloat16, or close other programs"
        )


def _checked_layers(layers: int | None, published: int) -> int:
    if layers is None:
        return published
    if not 1 <= layers <= published:
        raise ValueError(f"layers: got {layers}, the model has {published}; accepted are 1 to {published}")
    return layers


def is_causal(config: Any) -> bool:
    """Whether a checkpoint has a head that predicts the next word (otherwise it is taken as an encoder)."""
    names = config.architectures or []
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _load(path: Path, config: Any, dtype: torch.dtype, causal: bool) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM if causal else AutoModel
    with _no_bars():
        model = factory.from_pretrained(str(path), config=config, dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers meanwhile: they would be drawn over the benchmark's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _fill(flat: torch.Tensor, pool: torch.Tensor, offset: int) -> None:
    """Copy ``pool`` cyclically, from ``offset`` on, into the 1-D ``flat``."""
    done = 0
    while done < flat.numel():
        part = pool[offset : offset + flat.numel() - done]
        flat[done : done + part.numel()].copy_(part)
        done += part.numel()
        offset = 0


def _restore_buffers(module: nn.Module) -> None:
    """Give the buffers of ``module`` their values back, which ``to_empty`` lost.

    Rotary frequencies are buffers that no checkpoint holds: they follow from the configuration. The module's
    own constructor is the one place that knows how, so a second one is made with storage and read.

    Raises:
        ValueError: a module with buffers that is not made from a configuration alone.
    """
    config = getattr(module, "config", None)
    if config is None:
        raise ValueError(f"config: cannot restore the buffers of {type(module).__name__}")
    fresh = type(module)(config=config)
    for key, buffer in module.named_buffers(recurse=False):
        buffer.copy_(fresh.get_buffer(key))
