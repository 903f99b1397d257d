"""What a run of ``pyfast prune`` has finished, on disk, so that one that was killed goes on at the next block.

    OUT/prune-state/journal.json        the request (a fingerprint of model, layers, options and calibration), and the
                                        units that are finished, each with its file and what was done to its layers
    OUT/prune-state/0003.safetensors    the new weights of the fourth unit

A unit's file is complete before the journal names it, and the journal is replaced in one step: whenever the process
dies, what the journal names is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyfast.sparse.pruning.model import Observer, PrunedLayer
from pyfast.sparse.pruning.stream import Unit

STATE = "prune-state"
REPORT = "pyfast_prune.json"
_VERSION = 1
_ACCEPTED = "a new or empty folder, or that of a run to go on with"


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Of all parameters and buffers."""
    return fingerprint(sorted(model.state_dict().items()))


def batches_fingerprint(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Of a calibration set."""
    return fingerprint((f"{i}.{name}", tensor) for i, batch in enumerate(batches) for name, tensor in batch.items())


class Journal(Observer):
    """Keeps the weights of finished units and hands them in again; passes everything on to another observer."""

    def __init__(self, out: Path, request: dict[str, Any], then: Observer):
        """``request`` is what the run is to do, as JSON.

        Raises:
            ValueError: ``out`` holds other files, or a run with another request (what differs is named).
        """
        self._out, self._folder, self._request, self._then = out, out / STATE, request, then
        self._done: dict[str, dict[str, Any]] = {}
        if (self._folder / "journal.json").is_file():
            self._done = {unit["name"]: unit for unit in self._read(self._folder / "journal.json")["units"]}
        check_out(out)

    def finished(self) -> list[PrunedLayer] | None:
        """What a run that came to its end did; None where there was none."""
        if not (self._out / REPORT).is_file():
            return None
        layers = _layers(self._read(self._out / REPORT)["layers"])
        shutil.rmtree(self._folder, ignore_errors=True)  # the process may have died just before
        return layers

    def finish(self, layers: list[PrunedLayer]) -> None:
        """OUT holds the whole model: the report takes the place of the journal."""
        self._write(self._out / REPORT, {"layers": [asdict(layer) for layer in layers]})
        shutil.rmtree(self._folder, ignore_errors=True)

    def units(self, names: list[str]) -> None:
        self._then.units(names)

    def advance(self, what: str, done: int, total: int) -> None:
        self._then.advance(what, done, total)

    def saved(self, unit: Unit) -> tuple[dict[str, Tensor], list[PrunedLayer]] | None:
        entry = self._done.get(unit.name)
        if entry is None:
            return None
        path = self._folder / entry["file"]
        try:
            weights = load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"out: {path} is damaged ({error}); remove {self._folder} to start again") from error
        if {name: tensor.shape for name, tensor in weights.items()} != {
            name: layer.weight.shape for name, layer in unit.layers.items()
        }:
            raise ValueError(f"out: {path} holds other layers; remove {self._folder} to start again")
        return weights, _layers(entry["layers"])

    def pruned(self, unit: Unit, layers: list[PrunedLayer]) -> None:
        if unit.name not in self._done:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = f"{len(self._done):04}.safetensors"
            weights = {name: layer.weight.detach().cpu().contiguous() for name, layer in unit.layers.items()}
            unfinished = self._folder / f"{file}.unfinished"
            save_file(weights, unfinished)
            _replace(unfinished, self._folder / file)
            self._done[unit.name] = {
                "name": unit.name,
                "file": file,
                "layers": [asdict(layer) for layer in layers],
            }
            self._write(self._folder / "journal.json", {"units": list(self._done.values())})
        self._then.pruned(unit, layers)

    def _read(self, path: Path) -> dict[str, Any]:
        """What ``path`` holds, if it belongs to this request."""
        try:
            content = json.loads(path.read_text())
            before = content["request"]
            if content["version"] != _VERSION or not isinstance(before, dict):
                raise ValueError("of another version")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: {path} is no journal of this program ({error})") from error
        differing = [key for key in {**before, **self._request} if before.get(key) != self._request.get(key)]
        if differing:
            shown = ", ".join(
                f"{key} {_short(before.get(key))} not {_short(self._request.get(key))}" for key in differing
            )
            raise ValueError(f"out: {self._out} belongs to a run with another request: {shown}; choose another OUT")
        return content

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"version": _VERSION, "request": self._request, **content}, indent=1))
        _replace(unfinished, path)


def check_out(out: Path) -> None:
    """ValueError where ``out`` cannot become, or continue, the result of a run."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, accepted: {_ACCEPTED}")
    if out.is_dir() and any(out.iterdir()) and not (out / STATE).is_dir() and not (out / REPORT).is_file():
        raise ValueError(
            f"out: {out} holds other files, accepted: a new or empty folder, or that of a run to go on with"
        )


def _replace(unfinished: Path, path: Path) -> None:
    """Puts a complete file in place, on disk before its name is."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _layers(entries: list[dict[str, Any]]) -> list[PrunedLayer]:
    return [PrunedLayer(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries]


def _short(value: Any) -> str:
    text = f"{len(value)} of them" if isinstance(value, list) else str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"
