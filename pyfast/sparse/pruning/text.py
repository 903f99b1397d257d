"""Calibration batches from text that is on the machine."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BATCH = 4  # sequences run at once
_MOST = 1 << 20  # characters read of one file
_OMITTED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__")


def text_batches(
    tokenizer: Any, path: Path | None, samples: int, length: int, *, labels: bool
) -> list[dict[str, Tensor]]:
    """``samples`` sequences of exactly ``length`` tokens, special tokens included, four to a batch.

    Each file gives its first sequence before any gives its second. Files come in the order of a hash of their names:
    the same on every machine, and mixed over all subjects.

    Args:
        tokenizer: a fast tokenizer of transformers.
        path: a file, or a folder of text files; None: the sources of Python's standard library.
        samples: how many sequences.
        length: tokens in each.
        labels: add the tokens as labels, for a causal language model's loss.

    Raises:
        ValueError: nothing readable, or too little of it.
    """
    for name, value in (("samples", samples), ("sequence-length", length)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, accepted: 1 or more")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"model: its tokenizer {type(tokenizer).__name__} is not a fast one")
    found: list[list[list[int]]] = []
    for text in documents(path):
        windows = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
        whole = [window for window in windows if len(window) == length]
        if whole:
            found.append(whole)
        if len(found) == samples:
            break
    taken = [window for turn in zip_longest(*found) for window in turn if window is not None][:samples]
    if len(taken) < samples:
        raise ValueError(
            f"text: {path or 'the standard library'} gives {len(taken)} sequences of {length} tokens, "
            f"{samples} are wanted (see --samples, --sequence-length)"
        )
    batches = []
    for begin in range(0, samples, _BATCH):
        ids = torch.tensor(taken[begin : begin + _BATCH])
        batches.append({"input_ids": ids, "labels": ids} if labels else {"input_ids": ids})
    return batches


def documents(path: Path | None) -> Iterator[str]:
    """The texts of a file, or of the files of a folder; what is no UTF-8 text is passed over."""
    if path is not None and path.is_file():
        files = [path]
    elif path is None or path.is_dir():
        files = _files(path)
    else:
        raise ValueError(f"text: {path} is no file and no folder")
    for file in files:
        try:
            with file.open(encoding="utf-8") as stream:
                yield stream.read(_MOST)
        except (OSError, UnicodeDecodeError) as error:
            if file == path:
                raise ValueError(f"text: {path} cannot be read as UTF-8 text: {error}") from error


def _files(folder: Path | None) -> list[Path]:
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    omitted = () if folder else _OMITTED
    found: list[str] = []
    for here, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in omitted]
        found += [
            Path(here, name).relative_to(root).as_posix()
            for name in names
            if not name.startswith(".") and (folder or name.endswith(".py")) and Path(here, name).is_file()
        ]
    return [root / name for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())]
