"""A Hugging Face checkpoint in, a pruned one out: the work of ``pyfast prune``, without the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfast.sparse.convert import Patterns, eligible_linears
from pyfast.sparse.pruning.journal import Journal, batches_fingerprint, check_out, model_fingerprint
from pyfast.sparse.pruning.model import Observer, PrunedLayer, prune_layers
from pyfast.sparse.pruning.options import LOSS_METHODS, Options
from pyfast.sparse.pruning.text import text_batches

_LENGTH = 512  # tokens in a sequence where nothing else is said and the model takes as many
_CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Calibration:
    """Text to calibrate on; see :func:`pyfast.sparse.pruning.text.text_batches`. ``length`` None: 512, or as much as
    the model takes."""

    text: Path | None = None
    samples: int = 64
    length: int | None = None


def _write_dense(model: Any, out: Path) -> None:
    model.save_pretrained(out)


# How a pruned model is written, by format.
WRITERS: dict[str, Callable[[Any, Path], None]] = {"dense": _write_dense}


def prune_checkpoint(
    model_path: str,
    out: Path,
    options: Options,
    calibration: Calibration,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    head: bool = False,
    format: str = "dense",
    device: str = "cpu",
    observer: Observer | None = None,
) -> tuple[list[PrunedLayer], bool]:
    """Prunes the checkpoint at ``model_path`` into ``out``, going on where an earlier run with the same request ended.

    ``out`` becomes a checkpoint that ``from_pretrained`` loads (tokenizer included where there is one), with zeros in
    place, beside ``pyfast_prune.json``, which says what was asked for and done. Until then ``out/prune-state`` holds
    the finished blocks: a run that was killed goes on at the next one, bit for bit as if it had not been (on the same
    machine with the same versions and threads). Scores of ``gradient`` and ``taylor`` are computed again.

    Returns:
        What was done to each layer, and whether an earlier run had already finished.

    Raises:
        TypeError, ValueError: a wrong argument, a model that cannot be loaded, an ``out`` that belongs to something
            else, or what :func:`pyfast.sparse.prune` raises.
    """
    if format not in WRITERS:
        raise ValueError(f"format: got {format!r}, accepted: {', '.join(WRITERS)}")
    check_out(out)
    model = _load_model(model_path).to(device)
    chosen = eligible_linears(model, include, exclude, head)
    tokenizer = _load_tokenizer(model_path, needed=options.method != "magnitude")
    batches: list[dict[str, Tensor]] | None = None
    if options.method != "magnitude":
        if options.method in LOSS_METHODS and not type(model).__name__.endswith(_CAUSAL):
            raise ValueError(
                f"method: {options.method} needs the loss of a causal language model, not {type(model).__name__}"
            )
        length = _length(calibration.length, model.config)
        batches = text_batches(
            tokenizer, calibration.text, calibration.samples, length, labels=options.method in LOSS_METHODS
        )
    request = {
        "model": model_fingerprint(model),
        "layers": list(chosen),
        **asdict(options),
        "calibration": None if batches is None else batches_fingerprint(batches),
        "format": format,
        "device": torch.device(device).type,
    }
    journal = Journal(out, request, observer or Observer())
    finished = journal.finished()
    if finished is not None:
        return finished, True
    layers = prune_layers(model, chosen, batches, options, journal)
    WRITERS[format](model, out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    journal.finish(layers)
    return layers, False


def _load_model(path: str) -> Any:
    """The checkpoint with the head that it was saved with, in its own dtype."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
        name = (getattr(config, "architectures", None) or [""])[0]
        kind = getattr(transformers, name, transformers.AutoModel)
        return kind.from_pretrained(path, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {path} cannot be loaded: {error}") from error


def _load_tokenizer(path: str, *, needed: bool) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a broken tokenizer file raises
        if needed:
            raise ValueError(f"model: the tokenizer of {path} cannot be loaded: {error}") from error
        return None


def _length(wanted: int | None, config: Any) -> int:
    most = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return min(_LENGTH, most or _LENGTH)
    if most is not None and wanted > most:
        raise ValueError(f"sequence-length: got {wanted}, accepted: at most {most}, the positions of the model")
    return wanted


def default_device() -> str:
    """cuda where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
