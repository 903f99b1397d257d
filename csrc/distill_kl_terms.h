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
// That is computed from t and x, one exponential each; from s and -x where a mixture is nearer to s.
// Beyond |x| = 16 the rounding of x, |x| 2^-24, would show in s = t e^x, so s takes an exponential of its own there; so
// do words that the teacher excludes (t = 0, x = +inf or NaN), for which the limits stand.
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

// Two probabilities p and q of a word, and q - p without cancellation: from p, y = log(q / p) and its exponential. Far
// apart q is what `own` gives.
struct Masses {
  Vec p, q, gap;
};

template <class Own>
PYFAST_INLINE Masses masses(Vec p, Vec y, const ExpParts& e, Own own) {
  Masses out{p, p * e.exp, p * e.expm1};
  const auto far = is_far(y);
  if (any(far)) [[unlikely]] {
    const Vec q = own();
    out.q = select(far, q, out.q);
    out.gap = select(far, q - p, out.gap);
  }
  return out;
}

template <Divergence divergence>
PYFAST_INLINE Terms distance_terms(Vec zs, Vec zt, const RowPair& row) {  // tvd, mse
  const Vec x = log_ratio(zs, zt, row);
  const Masses m = masses(teacher_probability(zt, row), x, exp_parts(x), [&] { return student_probability(zs, row); });
  if constexpr (divergence == Divergence::mse) return {m.gap * m.gap, (m.q + m.q) * m.gap, m.q};
  const Vec zero = broadcast(0.0f), half = broadcast(0.5f) * m.q;
  const Vec slope = select(above(m.gap, zero), half, select(above(zero, m.gap), zero - half, zero * m.gap));
  return {broadcast(0.5f) * abs(m.gap), slope, m.q};
}

// Of the mixture m = w_p p + w_q q, with y = log(q / p): what a word adds to KL(p || m) and KL(q || m), log(m / p),
// log(q / m) and (q - p) / m. Computed from p, which KL(p || m) and log(m / p) suit best: q has the error of y, and
// log(q / m) = y - log(m / p) loses digits where m is nearly q.
struct MixtureParts {
  Masses masses;
  Vec kl_p, kl_q, log_m_p, log_q_m, ratio;
};

template <class Own>
PYFAST_INLINE MixtureParts mixture_parts(Vec p, Vec y, float weight_p, float weight_q, Own own) {
  const Vec wp = broadcast(weight_p), wq = broadcast(weight_q), one = broadcast(1.0f), zero = broadcast(0.0f);
  const ExpParts e = exp_parts(y);
  MixtureParts m;
  m.masses = masses(p, y, e, own);
  const Vec q = m.masses.q, gap = m.masses.gap, v = wq * e.expm1;
  const LogParts l = log_parts(v);
  m.kl_p = p * l.v_log1p;
  m.log_m_p = l.log1p;
  m.log_q_m = y - l.log1p;
  // KL(q || m) in two forms: the first keeps its digits near q = p, the second far from it.
  const Vec near = p * fnma(e.expm1 + one, e.expm1_x - l.v_log1p, wp * e.expm1 * e.expm1);
  m.kl_q = select(not_at_most(abs(y), one), fnma(wp, gap, q * m.log_q_m), near);
  m.ratio = e.expm1 * reciprocal(v + one);
  const auto far = is_far(y);
  if (any(far)) [[unlikely]] {  // r = e^-|y|; g = log(m / the larger one)
    const auto more = above(y, zero);
    const Vec r = exp2(broadcast(-kLog2e) * abs(y));
    const Vec share = fma(select(more, wp, wq), r, select(more, wq, wp));
    const Vec g = log_parts(share - one).log1p;
    const Vec log_m_p = select(equal(p, zero), zero, select(more, y + g, g));  // its factor p is 0
    const Vec log_q_m = select(equal(q, zero), zero, select(more, zero - g, y - g));
    const Vec size = (one - r) * reciprocal(share), ratio = select(more, size, zero - size);
    m.kl_p = select(far, fma(wq, gap, zero - p * log_m_p), m.kl_p);
    m.kl_q = select(far, fnma(wp, gap, q * log_q_m), m.kl_q);
    m.log_m_p = select(far, log_m_p, m.log_m_p);
    m.log_q_m = select(far, log_q_m, m.log_q_m);
    m.ratio = select(far, select(equal(p + q, zero), zero, ratio), m.ratio);
  }
  return m;
}

// A, B, log(s / m) = x - u, and (s - t) / m = E / (1 + w_s E).
struct MixtureTerms {
  Vec s, kl_teacher, kl_student, log_share, ratio;
};

// Which distribution the terms are computed from: of a mixture the one that is nearer to it, but for skew_kl, which is
// weighed by t alone. Known to the compiler for all others, so that they are compiled once.
enum class From { teacher, student };

PYFAST_INLINE From from_of(Divergence divergence, const RowPair& row) {
  const bool either = divergence == Divergence::jsd || divergence == Divergence::skew_reverse_kl;
  return either && row.mixture_teacher < row.mixture_student ? From::student : From::teacher;
}

template <From from>
PYFAST_INLINE MixtureTerms mixture_of(Vec zs, Vec zt, const RowPair& row) {
  const Vec x = log_ratio(zs, zt, row), zero = broadcast(0.0f);
  const float wt = row.mixture_teacher, ws = row.mixture_student;
  const auto student = [&] { return student_probability(zs, row); };
  const auto teacher = [&] { return teacher_probability(zt, row); };
  if constexpr (from == From::student) {
    const MixtureParts m = mixture_parts(student(), zero - x, ws, wt, teacher);
    return {m.masses.p, m.kl_q, m.kl_p, zero - m.log_m_p, zero - m.ratio};
  } else {
    const MixtureParts m = mixture_parts(teacher(), x, wt, ws, student);
    return {m.masses.q, m.kl_p, m.kl_q, m.log_q_m, m.ratio};
  }
}

template <Divergence divergence, From from>
PYFAST_INLINE Terms mixture_terms(Vec zs, Vec zt, const RowPair& row) {  // jsd, skew_kl, skew_reverse_kl
  const Vec wt = broadcast(row.mixture_teacher), ws = broadcast(row.mixture_student);
  const MixtureTerms m = mixture_of<from>(zs, zt, row);
  if constexpr (divergence == Divergence::jsd)
    return {fma(wt, m.kl_teacher, ws * m.kl_student), m.s * (ws * m.log_share), m.s};
  if constexpr (divergence == Divergence::skew_kl) return {m.kl_teacher, m.s * (ws * ws * m.ratio), m.s};
  return {m.kl_student, m.s * fnma(ws * wt, m.ratio, m.log_share), m.s};
}

template <Divergence divergence, From from>
PYFAST_INLINE Terms terms_from(Vec zs, Vec zt, const RowPair& row) {
  if constexpr (divergence == Divergence::forward_kl) return forward_kl_terms(zs, zt, row);
  if constexpr (divergence == Divergence::reverse_kl) return reverse_kl_terms(zs, zt, row);
  if constexpr (divergence == Divergence::tvd || divergence == Divergence::mse)
    return distance_terms<divergence>(zs, zt, row);
  return mixture_terms<divergence, from>(zs, zt, row);
}

template <Divergence divergence>
PYFAST_INLINE Terms terms(Vec zs, Vec zt, const RowPair& row) {
  return from_of(divergence, row) == From::student ? terms_from<divergence, From::student>(zs, zt, row)
                                                   : terms_from<divergence, From::teacher>(zs, zt, row);
}

}  // namespace
}  // namespace pyfast
