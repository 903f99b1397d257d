"""Triton kernels of pyfast; imports torch and triton, and nothing else of the package.

The folder stands at the root of the project and is installed as ``pyfast.triton_kernels``. Another project
owns the top-level name ``triton_kernels``, so this one refuses to be imported by it.
"""

from __future__ import annotations

if __name__ != "pyfast.triton_kernels":
    raise ImportError(
        f"this folder holds pyfast's Triton kernels and cannot be imported as {__name__!r}: "
        "install pyfast and import pyfast.triton_kernels. If you meant another project's triton_kernels, the "
        "current directory hides it: start Python elsewhere (pytest rather than python -m pytest)"
    )
