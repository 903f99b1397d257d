"""Which teacher layer each student layer learns from, where the depths differ."""

from __future__ import annotations

STRATEGIES = ("uniform", "last", "first")


def layer_map(student_layers: int, teacher_layers: int, strategy: str = "uniform") -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer), one for each student layer, counted from 0 over the layers' outputs.

    With ``student_layers`` = 3 and ``teacher_layers`` = 6::

        uniform   0 → 1, 1 → 3, 2 → 5    student i learns from teacher round((i + 1) · 6 / 3) − 1 (TinyBERT, 2020)
        last      0 → 3, 1 → 4, 2 → 5    the last layers
        first     0 → 0, 1 → 1, 2 → 2    the first layers

    Args:
        student_layers: depth of the student, from 1.
        teacher_layers: depth of the teacher, at least that of the student.
        strategy: one of the names above. Halves are rounded up.

    Raises:
        TypeError, ValueError: a depth that is no such number, a student deeper than its teacher, an unknown strategy.
    """
    for name, depth in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(f"{name}: got {type(depth).__name__}, accepted: an integer of at least 1")
        if depth < 1:
            raise ValueError(f"{name}: got {depth}, accepted: an integer of at least 1")
    if student_layers > teacher_layers:
        raise ValueError(
            f"student_layers: got {student_layers}, accepted: at most the teacher's {teacher_layers}; "
            "give the pairs yourself where the student is deeper"
        )
    if strategy == "uniform":
        half_up = student_layers  # floor((2a + b) / 2b) rounds a / b, exactly
        return [
            (i, (2 * (i + 1) * teacher_layers + half_up) // (2 * student_layers) - 1) for i in range(student_layers)
        ]
    if strategy == "last":
        return [(i, teacher_layers - student_layers + i) for i in range(student_layers)]
    if strategy == "first":
        return [(i, i) for i in range(student_layers)]
    raise ValueError(f"strategy: got {strategy!r}, accepted: {', '.join(STRATEGIES)}")


def layer_pairs(layers: str | list[tuple[int, int]], student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """``layers`` as pairs of positions from 0: a strategy of :func:`layer_map`, or pairs, where negative numbers
    count from the end.

    Raises:
        TypeError, ValueError: ``layers`` of another form, empty, or naming a layer that is not there.
    """
    if isinstance(layers, str):
        if layers not in STRATEGIES:
            raise ValueError(f"layers: got {layers!r}, accepted: {', '.join(STRATEGIES)}, or pairs (student, teacher)")
        return layer_map(student_layers, teacher_layers, layers)
    pairs = list(layers)
    if not pairs:
        raise ValueError("layers: got no pairs, accepted: at least one pair (student, teacher)")
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(type(index) is int for index in pair):
            raise TypeError(f"layers: got {pair!r}, accepted: pairs of integers (student layer, teacher layer)")
        for who, index, depth in zip(("student", "teacher"), pair, (student_layers, teacher_layers), strict=True):
            if not -depth <= index < depth:
                raise ValueError(f"layers: got {who} layer {index}, accepted: {-depth} to {depth - 1}")
        found.append((pair[0] % student_layers, pair[1] % teacher_layers))
    return found
