// What the words of a vector add to each divergence on the GPU. The terms are those of csrc/distill_kl_terms.h, which
// says why they are formed as they are. That file's one exponential and long polynomials a word suit a CPU. Here
// instructions are scarce and the special function unit is a pipe of its own: s and t take an exponential each, without
// a branch, and everything else follows from them in a few instructions.
//
// Ways. Of a row whose two distributions lie apart (its value is above kNearValue) s - t and differences of logarithms
// keep enough digits: what the hardware leaves in them, about 2^-22 of a probability, is small beside their sum. Close
// to convergence it is not: near rows take a series in x = log s - log t for their words of small |x|, which keeps its
// digits down to x = 0. Which way a row goes all its threads know from a sum that they have joined: from the first pass
// for the two KL, from the second one for the others, which then do it once more.
//
//                     plain                                            near, besides
//   forward_kl        gradient s - t; the value has the first pass     t E and t Q where |x| is small
//   reverse_kl        s (x - H); the value has the first pass          s (e^-x - 1 + x)
//   tvd, mse          s - t                                            t E where |x| is small
//   mixtures          log2 s - log2 m, log2 t - log2 m                 series in x (distill_kl_series.h)
//
// Mixtures of which one weight is small (kLeastWeight) take neither: their terms nearly cancel wherever that one
// distribution is not much above the other. They go by csrc/distill_kl_terms.h, as `shared`.
#pragma once

#include "common.cuh"
#include "distill_kl_group.cuh"
#include "distill_kl_options.h"
#include "distill_kl_sums.cuh"
#include "distill_kl_words.cuh"
#include "vec.cuh"

#include "../distill_kl_terms.h"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

enum class Way { plain, near, shared };

inline constexpr float kNearValue = 0.0625f;
inline constexpr float kNearSquares = 0.015625f;  // of mse: Σ (s - t)² relative to Σ s²
inline constexpr float kNearLogRatio = 0.25f;     // where the series of the other divergences ends
inline constexpr float kMost = 1e4f;              // a log ratio above those of words that count

// (e^x - 1 - x) / x for |x| < kNearLogRatio: relative error 1.5e-6 (minimax).
PYFAST_DEVICE float second_order(float x) {
  float q = __builtin_fmaf(8.345744e-3f, x, 4.1753557e-2f);
  q = __builtin_fmaf(q, x, 0.16666657f);
  return x * __builtin_fmaf(q, x, 0.4999993f);
}

// A word's s, t and s - t. Where it is near: its t x, and (e^x - 1 - x) / x.
struct Word {
  float s, t, gap, first, second;
  bool is_near;

  template <bool kNear>
  PYFAST_DEVICE static Word of(float zs, float zt, const RowConstants& row, const DistillKlOptions& o) {
    Word out{};
    out.s = ptx::exp2_approx(student_log2(zs, row, o));
    out.t = ptx::exp2_approx(teacher_log2(zt, row, o));
    if constexpr (kNear) {
      const float x =
          __builtin_fmaxf(__builtin_fminf(log_ratio(zs, zt, row.offset, o), kMost), -kMost);  // of any word a number
      out.t *= row.balance;
      out.is_near = __builtin_fabsf(x) < kNearLogRatio;
      out.first = out.t * x;
      out.second = second_order(x);
      out.gap = out.is_near ? __builtin_fmaf(out.first, out.second, out.first) : out.s - out.t;
    } else {
      out.gap = __builtin_fmaf(-out.t, row.balance, out.s);
    }
    return out;
  }

  // t Q
  PYFAST_DEVICE float value() const { return is_near ? first * second : (s - t) - first; }
};

// sign(x) / 2 + 1 / 2.
PYFAST_DEVICE float side_of(float zs, float zt, const RowConstants& row, const DistillKlOptions& o) {
  return ptx::fma_saturated(log_ratio(zs, zt, row.offset, o), 0x1p100f, 0.5f);
}

PYFAST_DEVICE constexpr bool is_mixture(Divergence divergence) {
  return divergence == Divergence::jsd || divergence == Divergence::skew_kl ||
         divergence == Divergence::skew_reverse_kl;
}

// A word of a mixture; logarithms to base 2. A word that the teacher excludes has a t of 2^-100, so that m is never 0;
// one that the student does has s = 0, and a finite logarithm.
struct Mixed {
  float s, teacher_mass;           // s, w_t t
  float student_log, teacher_log;  // log2 s / m (jsd, skew_reverse_kl), log2 t / m (jsd, skew_kl)
  float share;                     // w_t t / m (skew_kl), s / m (skew_reverse_kl)

  template <Divergence divergence>
  PYFAST_DEVICE static Mixed of(float zs, float zt, const RowConstants& row, const DistillKlOptions& o) {
    Mixed out{};
    float log2_s = student_log2(zs, row, o);
    if constexpr (divergence == Divergence::jsd) log2_s = __builtin_fmaxf(log2_s, kLeastLog);
    const float log2_t = __builtin_fmaxf(teacher_log2(zt, row, o), -100.0f);
    out.s = ptx::exp2_approx(log2_s);
    out.teacher_mass = ptx::exp2_approx(log2_t) * (o.mixture_teacher * row.balance);
    const float mass = __builtin_fmaf(out.s, o.mixture_student, out.teacher_mass);
    if constexpr (divergence == Divergence::jsd) {
      const float log2_m = ptx::log2_approx(mass);
      out.student_log = log2_s - log2_m;
      out.teacher_log = log2_t - (log2_m - row.balance_log2);
    } else if constexpr (divergence == Divergence::skew_kl) {
      out.share = out.teacher_mass * ptx::reciprocal_approx(mass);
      out.teacher_log = ptx::log2_approx(out.share * o.teacher_inverse);
    } else {
      out.share = out.s * ptx::reciprocal_approx(mass);
      out.student_log = __builtin_fmaxf(ptx::log2_approx(out.share), kLeastLog);
    }
    return out;
  }

 private:
  static constexpr float kLeastLog = -127.0f;
};

// Of a word of a near mixture: its part of the value (to base 2; of skew_kl w_t times that) and h (to base 2 for jsd).
struct NearMixed {
  float s, value, slope;

  template <Divergence divergence>
  PYFAST_DEVICE static NearMixed of(float zs, float zt, const RowConstants& row, const DistillKlOptions& o) {
    const Mixed m = Mixed::of<divergence>(zs, zt, row, o);
    const float x = log_ratio(zs, zt, row.offset, o), wt = o.mixture_teacher, ws = o.mixture_student;
    float value, slope;
    if constexpr (divergence == Divergence::jsd) {
      slope = ws * m.student_log;
      value = __builtin_fmaf(m.teacher_mass, m.teacher_log, m.s * slope);
    } else if constexpr (divergence == Divergence::skew_kl) {
      slope = __builtin_fmaf(m.share, -ws * o.teacher_inverse, ws);
      value = __builtin_fmaf(m.teacher_mass, m.teacher_log - ws * kLog2e, m.s * (ws * wt * kLog2e));
    } else {
      slope = __builtin_fmaf(m.share, -ws, __builtin_fmaf(m.student_log, kLn2, ws));
      value = __builtin_fmaf(m.s, m.student_log - wt * kLog2e, m.teacher_mass * kLog2e);
    }
    float near_value = o.series.value[kSeriesTerms - 1], near_slope = o.series.slope[kSeriesTerms - 1];
    PYFAST_UNROLL
    for (int i = kSeriesTerms - 2; i >= 0; --i) {
      near_value = __builtin_fmaf(near_value, x, o.series.value[i]);
      near_slope = __builtin_fmaf(near_slope, x, o.series.slope[i]);
    }
    const bool is_near = __builtin_fabsf(x) < kSeriesReach;
    return {m.s, is_near ? m.teacher_mass * x * x * near_value : value, is_near ? x * near_slope : slope};
  }
};

// take(i, terms) for the words of a vector, by csrc/distill_kl_terms.h.
template <Divergence divergence, class T, class Take>
PYFAST_DEVICE void each_shared(const Words<T>& zs, const Words<T>& zt, const RowConstants& row,
                               const DistillKlOptions& o, const Take& take) {
  const RowPair pair = {row.student_top, o.student_rate,    row.student_sum,  row.teacher_top,
                        o.teacher_rate,  row.teacher_sum,   o.share,          o.inverse,
                        row.offset,      o.mixture_teacher, o.mixture_student};
  PYFAST_UNROLL
  for (int v = 0; v < Words<T>::count; v += Vec::width) {
    Vec vs, vt;
    PYFAST_UNROLL
    for (int i = 0; i < Vec::width; ++i) {
      vs.at[i] = zs.at[v + i];
      vt.at[i] = zt.at[v + i];
    }
    const Terms e = terms<divergence>(vs, vt, pair);
    PYFAST_UNROLL
    for (int i = 0; i < Vec::width; ++i) take(v + i, e.value.at[i], e.slope.at[i], e.mass.at[i]);
  }
}

// h of a word of a mixture but for a constant, and a factor w_s (jsd) or -w_s / w_t (skew_kl).
template <Divergence divergence>
PYFAST_DEVICE float plain_slope(const Mixed& m, const DistillKlOptions& o) {
  if constexpr (divergence == Divergence::jsd) return m.student_log;
  if constexpr (divergence == Divergence::skew_kl) return m.share;
  return __builtin_fmaf(m.share, -o.mixture_student, m.student_log * kLn2);
}

// The second pass: adds the words of a vector. The totals are two, in turn, so that sums wait less for each other.
template <Divergence divergence, Way way, class T>
PYFAST_DEVICE void measure(const Words<T>& zs, const Words<T>& zt, const RowConstants& row, const DistillKlOptions& o,
                           Totals (&totals)[2]) {
  if constexpr (way == Way::shared) {
    each_shared<divergence, T>(zs, zt, row, o, [&](int i, float value, float slope, float) {
      totals[i % 2].value += value;
      totals[i % 2].slope += slope;
    });
  } else {
    PYFAST_UNROLL
    for (int i = 0; i < Words<T>::count; ++i) {
      Totals& sum = totals[i % 2];
      const float s = zs.at[i], t = zt.at[i];
      if constexpr (is_mixture(divergence) && way == Way::near) {
        const NearMixed m = NearMixed::of<divergence>(s, t, row, o);
        sum.value += m.value;
        sum.slope = __builtin_fmaf(m.s, m.slope, sum.slope);
      } else if constexpr (is_mixture(divergence)) {
        const Mixed m = Mixed::of<divergence>(s, t, row, o);
        const bool of_student = divergence == Divergence::skew_reverse_kl;
        sum.value =
            __builtin_fmaf(of_student ? m.s : m.teacher_mass, of_student ? m.student_log : m.teacher_log, sum.value);
        sum.slope = __builtin_fmaf(m.s, plain_slope<divergence>(m, o), sum.slope);
      } else {
        const Word w = Word::of<way == Way::near>(s, t, row, o);
        if constexpr (divergence == Divergence::tvd) {
          sum.value += __builtin_fabsf(w.gap);
          sum.slope = __builtin_fmaf(w.s, side_of(s, t, row, o), sum.slope);
          sum.square += w.s;
        } else {
          sum.value = __builtin_fmaf(w.gap, w.gap, sum.value);
          sum.slope = __builtin_fmaf(w.s, w.gap, sum.slope);
          sum.square = __builtin_fmaf(w.s, w.s, sum.square);
        }
      }
    }
  }
}

template <Divergence divergence>
PYFAST_DEVICE Measured measured_of(const Totals& totals, const RowConstants& row, const DistillKlOptions& o, Way way) {
  if (way == Way::shared) return {totals.value, totals.slope};
  const float value = totals.value * row.mass, slope = totals.slope * row.mass;
  if constexpr (divergence == Divergence::tvd) return {0.5f * value, (totals.slope - 0.5f * totals.square) * row.mass};
  if constexpr (divergence == Divergence::mse) return {value * row.mass, 2.0f * slope * row.mass};
  const bool is_plain = way == Way::plain;
  if constexpr (divergence == Divergence::jsd) {
    const float center = is_plain ? o.mixture_student * slope : slope;
    return {kLn2 * (value + (is_plain ? center : 0.0f)), center};
  }
  if constexpr (divergence == Divergence::skew_kl)
    return {kLn2 * value * o.teacher_inverse, is_plain ? -o.mixture_student * o.teacher_inverse * slope : slope};
  return {kLn2 * value, slope};
}

// Whether a row must be measured as a near one, by what it gave as a plain one.
template <Divergence divergence>
PYFAST_DEVICE bool lies_near(const Measured& row, const Totals& totals) {
  if constexpr (divergence == Divergence::mse) return totals.value < kNearSquares * totals.square;
  return row.value < kNearValue;
}

// The gradient of a word is s · (h · factor - bias) for an h of each divergence; that of forward_kl (s - t) · factor.
struct Factors {
  float factor, bias;
};

template <Divergence divergence>
PYFAST_DEVICE Factors factors_of(float scale, float center, const RowConstants& row, const DistillKlOptions& o,
                                 Way way) {
  if (way == Way::shared) return {scale, center * scale};
  const float all = scale * row.mass;
  if constexpr (divergence == Divergence::tvd) return {all, (center + 0.5f) * all};
  if constexpr (divergence == Divergence::mse) return {2.0f * all * row.mass, center * all};
  const bool is_plain = way == Way::plain;
  if constexpr (divergence == Divergence::jsd)
    return {(is_plain ? o.mixture_student : 1.0f) * kLn2 * all, center * kLn2 * all};
  if constexpr (divergence == Divergence::skew_kl)
    return {is_plain ? -o.mixture_student * o.teacher_inverse * all : all, center * all};
  return {all, center * all};
}

// The last pass: the gradient of a vector's words. Adds to `value` where a near row of the two KL has it from here.
template <Divergence divergence, Way way, class T>
PYFAST_DEVICE Words<T> gradients(const Words<T>& zs, const Words<T>& zt, const RowConstants& row,
                                 const DistillKlOptions& o, const Factors& by, float (&value)[2]) {
  Words<T> out;
  if constexpr (way == Way::shared) {
    each_shared<divergence, T>(zs, zt, row, o, [&](int i, float, float slope, float mass) {
      out.at[i] = __builtin_fmaf(slope, by.factor, -mass * by.bias);
    });
  } else {
    constexpr bool kNear = way == Way::near;
    PYFAST_UNROLL
    for (int i = 0; i < Words<T>::count; ++i) {
      const float s = zs.at[i], t = zt.at[i];
      if constexpr (divergence == Divergence::forward_kl) {
        const Word w = Word::of<kNear>(s, t, row, o);
        out.at[i] = w.gap * by.factor;
        if constexpr (kNear) value[i % 2] += w.value();
      } else if constexpr (divergence == Divergence::reverse_kl) {  // h = -1 for words that the teacher excludes
        const float x = log_ratio(s, t, row.offset, o), h = is_finite(x) ? x : -1.0f;
        const float p = ptx::exp2_approx(student_log2(s, row, o));
        out.at[i] = p * __builtin_fmaf(h, by.factor, -by.bias);
        if constexpr (kNear) {
          const float q = ptx::exp2_approx(teacher_log2(t, row, o)), first = p * h;
          const float gap = t == kNegInf ? 0.0f : __builtin_fmaf(-q, row.balance, p);
          value[i % 2] += __builtin_fabsf(h) < kNearLogRatio ? -first * second_order(-h) : first - gap;
        }
      } else if constexpr (divergence == Divergence::tvd) {
        const float p = ptx::exp2_approx(student_log2(s, row, o));
        out.at[i] = p * __builtin_fmaf(side_of(s, t, row, o), by.factor, -by.bias);
      } else if constexpr (divergence == Divergence::mse) {
        const Word w = Word::of<kNear>(s, t, row, o);
        out.at[i] = w.s * __builtin_fmaf(w.gap, by.factor, -by.bias);
      } else if constexpr (kNear) {
        const NearMixed m = NearMixed::of<divergence>(s, t, row, o);
        out.at[i] = m.s * __builtin_fmaf(m.slope, by.factor, -by.bias);
      } else {
        const Mixed m = Mixed::of<divergence>(s, t, row, o);
        out.at[i] = m.s * __builtin_fmaf(plain_slope<divergence>(m, o), by.factor, -by.bias);
      }
    }
  }
  return out;
}

#endif

}  // namespace pyfast::cuda
