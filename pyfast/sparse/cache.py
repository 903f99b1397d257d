"""Where calibrations are kept on disk: one JSON file, an entry a device.

The file is ``calibration.json`` in ``$XDG_CACHE_HOME/pyfast`` (``~/.cache/pyfast``); ``PYFAST_CACHE_DIR`` names another
directory, or ``none`` to neither read nor write. An entry counts only for the library that made it (version, native
module, torch): after an upgrade it is passed over, with a warning, until the next calibration.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

SCHEMA = 1


def cache_file() -> Path | None:
    """Where calibrations are kept; None where ``PYFAST_CACHE_DIR`` is ``none`` or there is no home directory."""
    named = os.environ.get("PYFAST_CACHE_DIR")
    if named is not None:
        return None if named in ("", "none") else Path(named) / "calibration.json"
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "pyfast" / "calibration.json"


def constants_of(device: str, library: str) -> dict[str, Any] | None:
    """The constants that this library measured on a device, as plain values; None, with a warning where the reason is
    worth one, where there are none."""
    path = cache_file()
    entry = {} if path is None else _read(path).get(device, {})
    if not entry:
        return None
    if entry.get("library") != library:
        warn("the calibration of this device was made with another library; `pyfast calibrate` renews it")
        return None
    constants = entry.get("constants")
    if isinstance(constants, dict):
        return constants
    damaged(KeyError("constants"))
    return None


def damaged(error: Exception) -> None:
    """Says that the entry of this device cannot be read."""
    warn(f"{cache_file()}: the entry of this device is damaged ({error}); `pyfast calibrate` writes it anew")


def kept_in(device: str, library: str) -> Path | None:
    """The file that holds a calibration of this device by this library; None where none does."""
    path = cache_file()
    entry = {} if path is None else _read(path).get(device, {})
    return path if entry.get("library") == library else None


def store(device: str, library: str, constants: dict[str, Any]) -> Path | None:
    """Adds a calibration to the file, which is there whole or not at all. None, with a warning, where it cannot be
    written."""
    path = cache_file()
    if path is None:
        return None
    entries = _read(path)
    entries[device] = {"library": library, "constants": constants}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"schema": SCHEMA, "devices": entries}, file, indent=1)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        warn(f"{path}: cannot be written ({error.strerror}); the calibration ends with this process")
        return None
    return path


def _read(path: Path) -> dict[str, Any]:
    """The entries of the file, by device; nothing, with a warning, where it is not one."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["schema"] != SCHEMA:
            return {}
        entries = whole["devices"]
        if not (isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())):
            raise TypeError("devices")
    except FileNotFoundError:
        return {}
    except OSError as error:
        warn(f"{path}: cannot be read ({error.strerror})")
        return {}
    except (ValueError, KeyError, TypeError):
        warn(f"{path}: is damaged and is ignored; `pyfast calibrate` writes it anew")
        return {}
    return entries


def warn(text: str) -> None:
    """A warning to the user."""
    warnings.warn(text, UserWarning, stacklevel=4)
