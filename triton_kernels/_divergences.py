"""Device functions: the divergences between two distributions, a word at a time, without cancellation.

``terms`` gives for each word a value, whose sum over the row is the divergence, and a pull. The gradient to the
student's logits, before temperature and scale, is pull - s · mean, where mean is the sum of the pulls. With s and t the
probabilities of student and teacher, x = log s - log t, and m = share_t · t + share_s · s where there is a mixture:

    forward_kl        value t (e^x - 1 - x)                              pull s - t           (mean 0)
    reverse_kl        value s (e^-x - 1 + x); -s where t excludes        pull s x;  -s where t excludes
    skew_kl           value A                                            pull s share_s² g
    skew_reverse_kl   value B                                            pull s (log(s/m) - share_s share_t g)
    jsd               value share_t A + share_s B                        pull s share_s log(s/m)
    tvd               value |s - t| / 2                                  pull s sign(s - t) / 2
    mse               value (s - t)²                                     pull 2 s (s - t)

    A = t P(m/t - 1), B = s P(m/s - 1), P(v) = v - log(1 + v), g = (s - t)/m

A and B sum to KL(t ‖ m) and KL(s ‖ m): what P adds to the textbook terms, m - t and m - s, sums to 0, and makes every
term positive. The same holds for the terms of forward_kl and reverse_kl. Close to convergence, where the differences
inside would cancel, e^x - 1 - x and P are series; elsewhere terms are taken directly, in a form that has a limit where
s or t is 0. A pull may be shifted by any multiple of s; these are 0 where s = t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._softmax import LOG2_E

#: The divergences that ``terms`` knows.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "mse")

# Series of e^x - 1 - x below this |x|.
_SMALL = tl.constexpr(0.25)
# In mixtures |log(s/t)| is cut here; beyond it the smaller of the two adds nothing that float32 could hold.
_FAR = tl.constexpr(80.0)


@triton.jit
def _excess(x):
    """e^x - 1 - x for |x| < 1/4."""
    # Over x², up to x⁵: relative error 1.3e-8 at |x| = 1/4.
    p = x * (1.0 / 5040.0) + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    p = p * x + 0.5
    return p * x * x


@triton.jit
def _difference(s, t, x):
    """s - t, which keeps its digits where s and t are close."""
    return tl.where(tl.abs(x) < _SMALL, t * (x + _excess(x)), s - t)


@triton.jit
def _against_mixture(p, q, y, own, other):
    """The part of a word in KL(p ‖ m), m = own · p + other · q, from y = log(q/p) of at most ``_FAR``.

    Returns p · P(m/p - 1), log(m/p), and (q - p)/m.
    """
    power = tl.exp2(y * LOG2_E)
    growth = tl.where(tl.abs(y) < _SMALL, y + _excess(y), power - 1.0)
    v = other * growth
    ratio = own + other * power
    # log(1 + v) = 2 artanh(f). Four terms of its series: relative error of P 4e-7 at |f| = 1/4.
    f = v / (1.0 + ratio)
    square = f * f
    rest = square * (1.0 / 9.0) + 1.0 / 7.0
    rest = rest * square + 1.0 / 5.0
    rest = rest * square + 1.0 / 3.0
    rest = rest * square * f
    near = square < 0.0625
    log_ratio = tl.where(near, 2.0 * (f + rest), tl.log(ratio))
    value = tl.where(near, p * (v * f - 2.0 * rest), other * (q - p) - p * log_ratio)
    return value, log_ratio, growth / ratio


@triton.jit
def terms(s, t, x, excluded, share_t, share_s, DIVERGENCE: tl.constexpr):
    """Value and pull of each word; see the head of the file.

    ``excluded`` are the words whose teacher logit is -inf: there x may be anything. Where s is 0, x may be -inf.
    """
    if DIVERGENCE == "forward_kl":
        gap = _difference(s, t, x)
        value = tl.where(tl.abs(x) < _SMALL, t * _excess(x), gap - t * x)
        return tl.where(t == 0.0, s, value), gap
    elif DIVERGENCE == "reverse_kl":
        pull = tl.where(excluded, -s, tl.where(s == 0.0, 0.0, s * x))
        value = tl.where(tl.abs(x) < _SMALL, s * _excess(-x), t - s + pull)
        return tl.where(excluded, t - s, value), pull
    elif DIVERGENCE == "tvd":
        gap = _difference(s, t, x)
        sign = tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, gap))
        return 0.5 * tl.abs(gap), s * sign
    elif DIVERGENCE == "mse":
        gap = _difference(s, t, x)
        return gap * gap, 2.0 * s * gap
    else:
        # Written so that NaN stays.
        x = tl.where(excluded | (x > _FAR), _FAR, tl.where(x < -_FAR, -_FAR, x))
        value_t, _, gap_t = _against_mixture(t, s, x, share_t, share_s)
        value_s, log_ratio, gap_s = _against_mixture(s, t, -x, share_s, share_t)
        if DIVERGENCE == "skew_kl":
            return value_t, s * (share_s * share_s * gap_t)
        elif DIVERGENCE == "skew_reverse_kl":
            return value_s, s * (share_s * share_t * gap_s - log_ratio)
        else:
            tl.static_assert(DIVERGENCE == "jsd", "unknown divergence")
            return share_t * value_t + share_s * value_s, s * (-share_s * log_ratio)
