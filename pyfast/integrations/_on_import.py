"""Registers :mod:`pyfast.integrations.quantizer` when transformers is imported, before or after pyfast.

transformers knows quantization methods by registration and has no entry points, and importing it takes longer than
importing torch: a program without it should not. A model read while the method is unknown would be filled with random
numbers, so that the order of two imports must not decide.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHED = "transformers.quantizers"


def register() -> None:
    """Now, if transformers has what it takes (5 or later)."""
    if hasattr(sys.modules[WATCHED], "register_quantizer"):
        importlib.import_module("pyfast.integrations.quantizer")


class _AfterImport(MetaPathFinder):
    """Sees the import of one module, steps aside, and calls :func:`register` when that module has run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then_register(module: ModuleType) -> None:
                run(module)
                register()

            spec.loader.exec_module = run_then_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """At once where transformers is imported already, else when it is."""
    if WATCHED in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
