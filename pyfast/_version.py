"""The version of the package, read by setup.py and pyproject.toml."""

__version__ = "0.1.0"
