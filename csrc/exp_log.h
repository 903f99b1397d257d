// Exponentials and logarithms that keep their digits near 0, written once over Vec, which the file that includes this
// one brings: a vector of float32 (csrc/cpu/vec_*.h) or the one float of a GPU thread (csrc/cuda/vec.cuh, whose exp2 is
// an instruction). Everything is in an unnamed namespace: nothing compiled for a newer ISA can be picked by the linker
// for an older one.
#pragma once

#include "inline.h"

namespace pyfast {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr double kLn2Double = 0.69314718055994530942;
constexpr float kNegInf = -__builtin_inff();

#if !defined(PYFAST_VEC_HAS_EXP2)
// 2^n, relative error below 2e-7; 0 for -inf and below the normal numbers. Degree 5 on [0, 1] (minimax).
PYFAST_INLINE Vec exp2(Vec n) {
  const Vec f = above_floor(n);
  Vec p = fma(broadcast(0.0018775767f), f, broadcast(0.00898934f));
  p = fma(p, f, broadcast(0.055826318f));
  p = fma(p, f, broadcast(0.24015361f));
  p = fma(p, f, broadcast(0.6931531f));
  p = fma(p, f, broadcast(0.99999994f));
  return scale_by_floor(p, n);
}
#endif

struct ExpParts {
  Vec exp;      // e^x
  Vec expm1;    // e^x - 1
  Vec expm1_x;  // e^x - 1 - x
};

// For |x| <= 16. With x = k ln 2 + f, q = e^f - 1 - f and c = 2^k,
//   e^x - 1 - x = c q + (c f + (c - 1 - x)),
// which is q itself where k = 0: c f - x is then exactly 0. So both parts keep their relative accuracy down to x = 0.
PYFAST_INLINE ExpParts exp_parts(Vec x) {
  const Vec k = round_nearest(x * broadcast(kLog2e));
  const Vec f = fnma(k, broadcast(kLn2), x);
  const Vec f2 = f * f;
  const Vec low = fma(broadcast(0.16666578f), f, broadcast(0.5f));
  const Vec high = fma(broadcast(0.0013901287f), f2, fma(broadcast(0.008363146f), f, broadcast(0.041666854f)));
  const Vec q = fma(high, f2, low) * f2;
  const Vec c = power_of_two(k);
  const Vec expm1_x = fma(c, q, fma(c, f, (c - broadcast(1.0f)) - x));
  return {fma(c, f + q, c), expm1_x + x, expm1_x};
}

struct LogParts {
  Vec log1p;    // log(1 + v)
  Vec v_log1p;  // v - log(1 + v), never negative
};

// For v > -1 with y = 1 + v a normal number. With y = 2^k (1 + r), r in [-0.3, 0.42), and l = r - log(1 + r) = r² p(r),
//   v - log(1 + v) = l + (v - r - k ln 2),
// which is l itself where k = 0: r is then v, exactly. Degree 7 (minimax, relative error of l below 4e-7).
PYFAST_INLINE LogParts log_parts(Vec v) {
  const Exponent e = exponent(v + broadcast(1.0f));
  const Vec r = fma(e.inverse, v, e.inverse - broadcast(1.0f));
  Vec p = fma(broadcast(-0.08901954f), r, broadcast(0.14212723f));
  p = fma(p, r, broadcast(-0.14820293f));
  p = fma(p, r, broadcast(0.16581242f));
  p = fma(p, r, broadcast(-0.19972554f));
  p = fma(p, r, broadcast(0.25001395f));
  p = fma(p, r, broadcast(-0.33333665f));
  p = fma(p, r, broadcast(0.49999997f));
  const Vec l = p * (r * r);
  return {fma(e.k, broadcast(kLn2), r - l), l + fnma(e.k, broadcast(kLn2), v - r)};
}

// tanh(x) = E / (E + 2), E = e^2x - 1; NaN for NaN.
PYFAST_INLINE Vec tanh(Vec x) {
  const Vec e = exp_parts(min(broadcast(16.0f), abs(x) + abs(x))).expm1;
  const Vec t = e / (e + broadcast(2.0f));
  return select(above(broadcast(0.0f), x), broadcast(0.0f) - t, t);
}

}  // namespace
}  // namespace pyfast
