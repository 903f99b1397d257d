"""The torch library ``pyfast``: where every op is defined. Kernels register themselves from C++ or Triton."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("pyfast", "FRAGMENT")


def define(schema: str) -> None:
    """Defines an op that follows the rules of torch.compile (functional, with a fake)."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
