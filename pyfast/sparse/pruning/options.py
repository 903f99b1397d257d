"""What to prune by: the method, how much, in which pattern, compared with what; checked once, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from pyfast.sparse.masks import SCOPES, check_share, parse_pattern

METHODS = ("magnitude", "gradient", "taylor", "wanda", "sparsegpt")
LOSS_METHODS = ("gradient", "taylor")  # these need the model's loss
STREAMED_METHODS = ("wanda", "sparsegpt")  # these need the inputs of every layer


@dataclass(frozen=True)
class Options:
    """Checked options; made by :func:`make_options`."""

    method: str
    sparsity: float
    pattern: str
    scope: str | None  # row, layer or global; None where pattern or method has groups of its own
    dampening: float = 0.01
    block_size: int = 128

    @property
    def nm(self) -> tuple[int, int] | None:
        """(n, m) kept of every m columns; None for unstructured."""
        return parse_pattern(self.pattern)


def make_options(
    method: str,
    sparsity: float | None,
    pattern: str,
    scope: str | None = None,
    dampening: float = 0.01,
    block_size: int = 128,
) -> Options:
    """Options as :func:`pyfast.sparse.prune` takes them. TypeError or ValueError names what is wrong."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, accepted: {', '.join(METHODS)}")
    nm = parse_pattern(pattern)
    if sparsity is None:
        if nm is None:
            raise ValueError("sparsity: got None, accepted for the pattern 'unstructured': a number in [0, 1)")
        sparsity = 1.0 - nm[0] / nm[1]
    check_share(sparsity)
    if nm is not None and abs(sparsity - (1.0 - nm[0] / nm[1])) > 1e-9:
        raise ValueError(f"sparsity: got {sparsity}, accepted for the pattern {pattern}: {1.0 - nm[0] / nm[1]:g}")
    return Options(
        method,
        float(sparsity),
        pattern,
        _scope(method, nm, scope),
        _dampening(dampening),
        _block_size(block_size),
    )


def _scope(method: str, nm: tuple[int, int] | None, scope: str | None) -> str | None:
    if nm is not None or method == "sparsegpt":
        if scope is not None:
            groups = "groups of columns" if nm is not None else "blocks of columns"
            raise ValueError(f"scope: got {scope!r}, accepted: None, since the elements compete in {groups}")
        return None
    if scope is None:
        return "row" if method == "wanda" else "layer"
    accepted = SCOPES[:2] if method in STREAMED_METHODS else SCOPES
    if scope not in accepted:
        raise ValueError(f"scope: got {scope!r}, accepted for {method}: {', '.join(accepted)}")
    return scope


def _dampening(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"dampening: got {type(value).__name__}, accepted: a number above 0, at most 1")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"dampening: got {value}, accepted: a number above 0, at most 1")
    return float(value)


def _block_size(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"block_size: got {type(value).__name__}, accepted: an integer, 1 or more")
    if value < 1:
        raise ValueError(f"block_size: got {value}, accepted: an integer, 1 or more")
    return value
