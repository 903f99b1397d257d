"""Device functions on rows of logits: soft cap, and sums of exponentials over a row that is read in blocks.

Every lane keeps a peak and sums of its own, relative to that peak; lanes meet once a row, in ``join``. Exponents are
differences from the highest logit, so nothing overflows; -inf adds nothing; NaN and +inf make the row NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
#: Where a lane's peak starts: below every logit but -inf, whose distance to it is then a number.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def fold(peak, logit, rate):
    """One more logit a lane, with one exponential.

    Returns the new peak, and the factors of what was summed so far and of the new word:
    Σ e^(rate · (logit - peak)) becomes Σ · keep + weight.
    """
    step = logit - peak
    shrink = tl.exp2(-tl.abs(step) * (rate * LOG2_E))
    higher = step > 0.0
    return tl.maximum(peak, logit), tl.where(higher, shrink, 1.0), tl.where(higher, 1.0, shrink)


@triton.jit
def join(peak, highest, total, rate):
    """A sum over the row relative to its highest logit, from the lanes' sums relative to their peaks."""
    return tl.sum(total * tl.exp2((peak - highest) * (rate * LOG2_E)), axis=0)


@triton.jit
def probability(logit, highest, total, rate):
    """e^(rate · (logit - highest)) / total."""
    return tl.exp2((logit - highest) * (rate * LOG2_E) - tl.log2(total))


@triton.jit
def _tanh(u):
    """tanh(u), and 1 - |tanh(u)| where |u| is 0.55 or more, each to about one unit in the last place."""
    # tanh(u) / u - 1 over u², fitted to |u| < 0.56; tanh is then right to 1.3e-9.
    square = u * u
    p = square * -0.006198616 + 0.02102047
    p = p * square - 0.053840496
    p = p * square + 0.1333248
    p = p * square - 0.33333313
    rest = 2.0 / (tl.exp2(tl.abs(u) * (2.0 * LOG2_E)) + 1.0)
    far = tl.where(u < 0.0, rest - 1.0, 1.0 - rest)
    return tl.where(tl.abs(u) < 0.55, u + u * square * p, far), rest


@triton.jit
def softcap(logit, cap):
    """cap · tanh(logit / cap), and the logit itself without a cap (None). -inf, a word that is excluded, stays."""
    if cap is None:
        return logit
    else:
        value, _ = _tanh(logit * (1.0 / cap))
        return tl.where(logit == -float("inf"), logit, cap * value)


@triton.jit
def softcap_slope(logit, cap):
    """Derivative of ``softcap``, 1 - tanh², without cancellation where tanh is close to 1."""
    value, rest = _tanh(logit * (1.0 / cap))
    slope = tl.where(rest < 0.5, rest * (2.0 - rest), 1.0 - value * value)
    return tl.where(logit == -float("inf"), 1.0, slope)
