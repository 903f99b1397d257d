"""Structured removal: which parts of a model matter least, and cutting them out without breaking the rest."""

from __future__ import annotations

from pyfast.structured.importance import block_influence
from pyfast.structured.surgery import remove_layers
from pyfast.structured.verify import SurgeryError

__all__ = ["SurgeryError", "block_influence", "remove_layers"]
