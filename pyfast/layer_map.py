"""Which layer of a deeper teacher a layer of the student learns from."""

from __future__ import annotations

STRATEGIES = ("uniform", "last", "first")


def layer_map(student_layers: int, teacher_layers: int, strategy: str = "uniform") -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer), counted from 0 over the outputs of the transformer layers, in the student's
    order.

    - ``"uniform"``: every student layer at its relative depth, layer i to layer round((i + 1) · L_t / L_s) − 1 with
      halves rounded up, so that the last learns from the last (TinyBERT, Jiao et al., 2020, g(m) = m · L_t / L_s).
    - ``"last"``: as many of the last layers as both have; ``"first"``: as many of the first.

    Args:
        student_layers, teacher_layers: how many layers each has, from 1; either may be the deeper one.
        strategy: one of the names above.

    Raises:
        TypeError, ValueError: naming the argument, what was got and what is accepted.
    """
    for name, count in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name}: got {type(count).__name__}, accepted: an integer from 1")
        if count < 1:
            raise ValueError(f"{name}: got {count}, accepted: an integer from 1")
    if strategy == "uniform":
        # In integers: floor(x + 1/2) of x = (i + 1) · L_t / L_s. A shallower teacher gives its first layer at least.
        ends = [(2 * (i + 1) * teacher_layers + student_layers) // (2 * student_layers) for i in range(student_layers)]
        return [(i, max(end, 1) - 1) for i, end in enumerate(ends)]
    shared = min(student_layers, teacher_layers)
    if strategy == "last":
        return [(student_layers - k, teacher_layers - k) for k in range(shared, 0, -1)]
    if strategy == "first":
        return [(k, k) for k in range(shared)]
    raise ValueError(f"strategy: got {strategy!r}, accepted: {', '.join(STRATEGIES)}")
