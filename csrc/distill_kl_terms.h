// What one word adds to each divergence of distill_kl, over Vec; CPU and CUDA share it. With t, s the probabilities of
// a word, x = log s - log t, E = e^x - 1 and Q = E - x, every divergence but forward_kl has the gradient s (h - H), H =
// Σ s h:
//
//                     value of the word                        h (up to a constant, which H removes)
//   forward_kl        t Q                                      gradient s - t
//   reverse_kl        s (e^-x - 1 + x)                         x
//   jsd               w_t A + w_s B                            w_s (x - u)
//   skew_kl           A                                        w_s² E / (1 + w_s E)
//   skew_reverse_kl   B                                        (x - u) - w_s w_t E / (1 + w_s E)
//   tvd               |s - t| / 2                              sign(x) / 2
//   mse               (s - t)²                                 2 (s - t)
//
// where m = w_t t + w_s s is the mixture, u = log(m / t) = log(1 + w_s E), A = t (w_s E - u) sums to KL(t || m) and
// B = s (w_t (t / s - 1) - (u - x)) to KL(s || m). Each is 0 where s = t, together with its first derivative: what is
// added to the plain formula sums to 0 over the row, and nothing cancels near convergence.
//
// That is computed from t and x, one exponential each. Beyond |x| = 16 the rounding of x, |x| 2^-24, would show in
// s = t e^x, so s takes an exponential of its own there; so do words that the teacher excludes (t = 0, x = +inf or
// NaN), for which the limits stand.
#pragma once

#include "divergence.h"
#include "exp_log.h"

namespace pyfast {
namespace {

// What the terms need to know of a row pair; scalars in float32, computed in double.
struct RowPair {
  float student_shift, student_scale, student_log2_sum;
  float teacher_shift, teacher_scale, teacher_log2_sum;
  float teacher_share;                     // student_temperature / teacher_temperature
  float student_inverse;                   // 1 / student_temperature
  float log_ratio_offset;                  // log-sum-exp of the teacher less that of the student
  float mixture_teacher, mixture_student;  // w_t, w_s
};

struct Terms {
  Vec value;
  Vec slope;  // s h; for forward_kl s - t
  Vec mass;   // s
};

PYFAST_INLINE Vec probability(Vec z, float shift, float scale, float log2_sum) {
  return exp2(fma(z - broadcast(shift), broadcast(scale), broadcast(-log2_sum)));
}

PYFAST_INLINE Vec student_probability(Vec zs, const RowPair& row) {
  return probability(zs, row.student_shift, row.student_scale, row.student_log2_sum);
}

PYFAST_INLINE Vec teacher_probability(Vec zt, const RowPair& row) {
  return probability(zt, row.teacher_shift, row.teacher_scale, row.teacher_log2_sum);
}

PYFAST_INLINE Vec log_ratio(Vec zs, Vec zt, const RowPair& row) {
  return fma(fnma(zt, broadcast(row.teacher_share), zs), broadcast(row.student_inverse),
             broadcast(row.log_ratio_offset));
}

constexpr float kFar = 16.0f;

PYFAST_INLINE Vec::Mask is_far(Vec x) { return not_at_most(abs(x), broadcast(kFar)); }

// p * a, and 0 where p is 0, whatever a is.
PYFAST_INLINE Vec weigh(Vec p, Vec a) { return select(equal(p, broadcast(0.0f)), broadcast(0.0f), p * a); }

PYFAST_INLINE Terms forward_kl_terms(Vec zs, Vec zt, const RowPair& row) {
  const Vec t = teacher_probability(zt, row), x = log_ratio(zs, zt, row);
  const ExpParts e = exp_parts(x);
  Terms out{t * e.expm1_x, t * e.expm1, t};
  const auto far = is_far(x);
  if (any(far)) [[unlikely]] {
    const Vec s = student_probability(zs, row), gap = s - t;
    out.value = select(far, select(equal(t, broadcast(0.0f)), s, fnma(t, x, gap)), out.value);
    out.slope = select(far, gap, out.slope);
  }
  return out;
}

// The teacher's excluded words have no part in Σ s log(s / t): value -s and h = -1 say so.
PYFAST_INLINE Terms reverse_kl_terms(Vec zs, Vec zt, const RowPair& row) {
  const Vec s = student_probability(zs, row), x = log_ratio(zs, zt, row);
  const ExpParts e = exp_parts(broadcast(0.0f) - x);
  Terms out{s * e.expm1_x, s * x, s};
  const auto far = is_far(x);
  if (any(far)) [[unlikely]] {
    const Vec t = teacher_probability(zt, row), none = broadcast(0.0f) - s;
    const auto excluded = equal(x, broadcast(-kNegInf));
    const Vec slope = select(excluded, none, weigh(s, x));
    out.value = select(far, select(excluded, none, (t - s) + slope), out.value);
    out.slope = select(far, slope, out.slope);
  }
  return out;
}

// t and s, and s - t without cancellation.
struct Masses {
  Vec t, s, gap;
};

PYFAST_INLINE Masses masses(Vec zs, Vec zt, Vec x, const ExpParts& e, const RowPair& row) {
  const Vec t = teacher_probability(zt, row), gap = t * e.expm1;
  Masses out{t, t * e.exp, gap};
  const auto far = is_far(x);
  if (any(far)) [[unlikely]] {
    const Vec s = student_probability(zs, row);
    out.s = select(far, s, out.s);
    out.gap = select(far, s - t, out.gap);
  }
  return out;
}

template <Divergence divergence>
PYFAST_INLINE Terms distance_terms(Vec zs, Vec zt, const RowPair& row) {  // tvd, mse
  const Vec x = log_ratio(zs, zt, row);
  const Masses p = masses(zs, zt, x, exp_parts(x), row);
  if constexpr (divergence == Divergence::mse) return {p.gap * p.gap, (p.s + p.s) * p.gap, p.s};
  const Vec zero = broadcast(0.0f), half = broadcast(0.5f) * p.s;
  const Vec slope = select(above(p.gap, zero), half, select(above(zero, p.gap), zero - half, zero * p.gap));
  return {broadcast(0.5f) * abs(p.gap), slope, p.s};
}

// A, B, x - u and E / (1 + w_s E) of a mixture.
struct MixtureParts {
  Vec kl_teacher, kl_student, log_share, ratio;
};

template <Divergence divergence>
PYFAST_INLINE Terms mixture_terms(Vec zs, Vec zt, const RowPair& row) {  // jsd, skew_kl, skew_reverse_kl
  const Vec x = log_ratio(zs, zt, row), wt = broadcast(row.mixture_teacher), ws = broadcast(row.mixture_student);
  const Vec one = broadcast(1.0f), zero = broadcast(0.0f);
  const ExpParts e = exp_parts(x);
  const Masses p = masses(zs, zt, x, e, row);
  const Vec v = ws * e.expm1;
  const LogParts l = log_parts(v);
  MixtureParts m;
  m.kl_teacher = p.t * l.v_log1p;
  m.log_share = x - l.log1p;
  // B in two forms: the first keeps its digits near s = t, the second far from it.
  const Vec near = p.t * fnma(e.expm1 + one, e.expm1_x - l.v_log1p, wt * e.expm1 * e.expm1);
  m.kl_student = select(not_at_most(abs(x), one), fnma(wt, p.gap, p.s * m.log_share), near);
  m.ratio = e.expm1 * reciprocal(v + one);
  const auto far = is_far(x);
  if (any(far)) [[unlikely]] {  // r = e^-|x|; where x > 0, u = x + log(w_s + w_t r), else log(w_t + w_s r)
    const auto more = above(x, zero);
    const Vec r = exp2(broadcast(-kLog2e) * abs(x));
    const Vec share = fma(select(more, wt, ws), r, select(more, ws, wt));
    const Vec g = log_parts(share - one).log1p;
    const Vec u = select(more, x + g, g), log_share = select(more, zero - g, x - g);
    const Vec ratio = (one - r) * reciprocal(share);
    m.kl_teacher = select(far, fma(ws, p.gap, zero - weigh(p.t, u)), m.kl_teacher);
    m.kl_student = select(far, fnma(wt, p.gap, weigh(p.s, log_share)), m.kl_student);
    const auto dead = equal(p.s, zero);
    m.log_share = select(far, select(dead, zero, log_share), m.log_share);
    m.ratio = select(far, select(dead, zero, select(more, ratio, zero - ratio)), m.ratio);
  }
  if constexpr (divergence == Divergence::jsd)
    return {fma(wt, m.kl_teacher, ws * m.kl_student), p.s * (ws * m.log_share), p.s};
  if constexpr (divergence == Divergence::skew_kl) return {m.kl_teacher, p.s * (ws * ws * m.ratio), p.s};
  return {m.kl_student, p.s * fnma(ws * wt, m.ratio, m.log_share), p.s};
}

template <Divergence divergence>
PYFAST_INLINE Terms terms(Vec zs, Vec zt, const RowPair& row) {
  if constexpr (divergence == Divergence::forward_kl) return forward_kl_terms(zs, zt, row);
  if constexpr (divergence == Divergence::reverse_kl) return reverse_kl_terms(zs, zt, row);
  if constexpr (divergence == Divergence::tvd || divergence == Divergence::mse)
    return distance_terms<divergence>(zs, zt, row);
  return mixture_terms<divergence>(zs, zt, row);
}

}  // namespace
}  // namespace pyfast
