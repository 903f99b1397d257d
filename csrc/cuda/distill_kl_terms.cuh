// What the words of a vector add to each divergence on the GPU; the terms are those of csrc/distill_kl_terms.h, which
// says why they are formed as they are. That file's one exponential and long polynomials a word suit a CPU; here
// instructions are what is scarce and the special function unit has a pipe of its own, so that s and t take an
// exponential each, without a branch.
//
// Plain or near. Of a row whose two distributions lie apart (its value is above kNearValue), s - t and differences of
// logarithms keep enough digits: what the hardware leaves in them, 2^-22, is small beside their sum. The rows close to
// convergence are near: their words with |x| < kNearLogRatio take a series in x, which keeps its digits down to x = 0.
// Which one a row is, all of its threads know from a sum that they have joined: from the first pass for the two KL,
// from the second one for the others, which do it again for a near row.
//
// Exponents. log2 s = zs · rate - log2 in one fma, without the highest logit in between. The constant is rounded, by
// 2^-24 of its size, for s and for t: RowConstants::balance and ::mass are what that leaves, so that s · mass and
// t · balance · mass are the probabilities, and s = t · balance · e^x to the rounding of each word's exponent.
//
//                     plain, a word                                    near, besides
//   forward_kl        gradient s - t; the value has the first pass     t Q; both by x where x is small
//   reverse_kl        s (x - H); the value has the first pass          s (e^-x - 1 + x)
//   tvd, mse          s - t                                            t E where x is small
//   mixtures          log2 s - log2 m, log2 t - log2 m                 csrc/distill_kl_terms.h
#pragma once

#include "common.cuh"
#include "distill_kl_group.cuh"
#include "distill_kl_store.cuh"
#include "vec.cuh"

#include "../distill_kl_terms.h"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

// The words of a vector, as floats.
template <class T>
struct Words {
  static constexpr int count = kVectorWords<T>;
  float at[count];
};

constexpr float kNearLogRatio = 0.25f;
constexpr float kNearValue = 0.0625f;
constexpr float kNearSquares = 0.015625f;  // of mse: Σ (s - t)² relative to Σ s²
constexpr float kLeastShare = 0.0625f;     // of a mixture, for which differences of logarithms keep enough digits
constexpr float kMostExponent = 0x1p30f;   // |z · rate| of a row's highest logit: beyond, the row is NaN
constexpr float kMost = 1e4f;              // a log ratio above those of words that count

// What a row's words are computed from. zs and zt: logits under their softcaps.
struct RowConstants {
  float student_rate, student_log2;  // log2 s = zs · rate - log2
  float teacher_rate, teacher_log2;
  float share, inverse, offset;  // x = log s - log t = (zs - share · zt) · inverse + offset
  float balance, mass;
  float mixture_teacher, mixture_student;  // w_t, w_s
  // Of near mixtures: the highest logits, and log2 of the sums of 2^((z - top) · rate).
  float student_top, student_sum, teacher_top, teacher_sum;
};

PYFAST_DEVICE float student_log2(float zs, const RowConstants& row) {
  return __builtin_fmaf(zs, row.student_rate, -row.student_log2);
}
PYFAST_DEVICE float teacher_log2(float zt, const RowConstants& row) {
  return __builtin_fmaf(zt, row.teacher_rate, -row.teacher_log2);
}
PYFAST_DEVICE float log_ratio(float zs, float zt, const RowConstants& row) {
  return __builtin_fmaf(__builtin_fmaf(-zt, row.share, zs), row.inverse, row.offset);
}
// (e^x - 1 - x) / x for |x| < kNearLogRatio: relative error 1.5e-6 (minimax).
PYFAST_DEVICE float series(float x) {
  float q = __builtin_fmaf(8.345744e-3f, x, 4.1753557e-2f);
  q = __builtin_fmaf(q, x, 0.16666657f);
  return x * __builtin_fmaf(q, x, 0.4999993f);
}

// A word's s, t, s - t, and x.
struct Word {
  float s, t, gap, x;
  float first, second;  // t x, and (e^x - 1 - x) / x where is_near
  bool is_near;
};

template <bool kNear>
PYFAST_DEVICE Word word_of(float zs, float zt, const RowConstants& row) {
  Word out{};
  out.s = ptx::exp2_approx(student_log2(zs, row));
  out.t = ptx::exp2_approx(teacher_log2(zt, row));
  out.gap = __builtin_fmaf(-out.t, row.balance, out.s);
  if constexpr (kNear) {
    out.t *= row.balance;
    out.gap = out.s - out.t;
    out.x = __builtin_fmaxf(__builtin_fminf(log_ratio(zs, zt, row), kMost), -kMost);  // a number for excluded words
    out.is_near = __builtin_fabsf(out.x) < kNearLogRatio;
    out.first = out.t * out.x;
    out.second = series(out.x);
    out.gap = out.is_near ? __builtin_fmaf(out.first, out.second, out.first) : out.gap;
  }
  return out;
}

// sign(x) / 2 + 1 / 2.
PYFAST_DEVICE float side_of(float zs, float zt, const RowConstants& row) {
  return ptx::fma_saturated(log_ratio(zs, zt, row), 0x1p100f, 0.5f);
}

// A word's logarithms in a mixture, to base 2. Words that the student excludes have s = 0; those that the teacher does
// keep a t of 2^-100, so that m is never 0.
struct Mixed {
  float s, student_log2, teacher_log2;
  float teacher_mass, mass;  // w_t t and m

  PYFAST_DEVICE Mixed(float zs, float zt, const RowConstants& row) {
    student_log2 = __builtin_fmaxf(pyfast::cuda::student_log2(zs, row), -127.0f);
    teacher_log2 = __builtin_fmaxf(pyfast::cuda::teacher_log2(zt, row), -100.0f);
    s = ptx::exp2_approx(student_log2);
    teacher_mass = ptx::exp2_approx(teacher_log2) * (row.mixture_teacher * row.balance);
    mass = __builtin_fmaf(s, row.mixture_student, teacher_mass);
  }
  PYFAST_DEVICE float share() const { return teacher_mass * ptx::reciprocal_approx(mass); }  // w_t t / m
};

// 2^y, which is all but exact near y = 0.
PYFAST_DEVICE float power_near_1(float y) {
  const float u = y * kLn2;
  const float power = __builtin_fmaf(u, __builtin_fmaf(u, __builtin_fmaf(u, 1.0f / 6, 0.5f), 1.0f), 1.0f);
  return __builtin_fabsf(y) < 0x1p-6f ? power : ptx::exp2_approx(y);
}

PYFAST_DEVICE constexpr bool is_mixture(Divergence divergence) {
  return divergence == Divergence::jsd || divergence == Divergence::skew_kl ||
         divergence == Divergence::skew_reverse_kl;
}

// The terms of csrc/distill_kl_terms.h.
template <Divergence divergence, class T, class Take>
PYFAST_DEVICE void each_near_mixture(const Words<T>& zs, const Words<T>& zt, const RowConstants& row,
                                     const Take& take) {
  const RowPair pair = {row.student_top,  row.student_rate,    row.student_sum,    row.teacher_top,
                        row.teacher_rate, row.teacher_sum,     row.share,          row.inverse,
                        row.offset,       row.mixture_teacher, row.mixture_student};
  PYFAST_UNROLL
  for (int v = 0; v < Words<T>::count; v += Vec::width) {
    Vec vs, vt;
    PYFAST_UNROLL
    for (int i = 0; i < Vec::width; ++i) {
      vs.at[i] = zs.at[v + i];
      vt.at[i] = zt.at[v + i];
    }
    const Terms e = mixture_terms<divergence>(vs, vt, pair);
    PYFAST_UNROLL
    for (int i = 0; i < Vec::width; ++i) take(v + i, e.value.at[i], e.slope.at[i], e.mass.at[i]);
  }
}

// The second pass: adds the words of a vector. `totals` are two, in turn, so that sums wait less for each other.
template <Divergence divergence, bool kNear, class T>
PYFAST_DEVICE void measure(const Words<T>& zs, const Words<T>& zt, const RowConstants& row, Totals (&totals)[2]) {
  if constexpr (is_mixture(divergence) && kNear) {
    each_near_mixture<divergence, T>(zs, zt, row, [&](int i, float value, float slope, float) {
      totals[i % 2].value += value;
      totals[i % 2].slope += slope;
    });
  } else {
    PYFAST_UNROLL
    for (int i = 0; i < Words<T>::count; ++i) {
      Totals& sum = totals[i % 2];
      if constexpr (is_mixture(divergence)) {
        const Mixed m(zs.at[i], zt.at[i], row);
        const float log2 = ptx::log2_approx(m.mass);
        if constexpr (divergence == Divergence::jsd) {
          sum.value = __builtin_fmaf(m.teacher_mass, m.teacher_log2 - log2, sum.value);
          sum.slope = __builtin_fmaf(m.s, m.student_log2 - log2, sum.slope);
        } else if constexpr (divergence == Divergence::skew_kl) {
          sum.value = __builtin_fmaf(m.teacher_mass, m.teacher_log2 - log2, sum.value);
          sum.slope = __builtin_fmaf(m.s, m.share(), sum.slope);
        } else {
          const float student = m.student_log2 - log2;
          sum.value = __builtin_fmaf(m.s, student, sum.value);
          sum.slope = __builtin_fmaf(m.s, __builtin_fmaf(student, kLn2, m.share()), sum.slope);
        }
      } else {
        const Word w = word_of<kNear>(zs.at[i], zt.at[i], row);
        if constexpr (divergence == Divergence::tvd) {
          sum.value += __builtin_fabsf(w.gap);
          sum.slope = __builtin_fmaf(w.s, side_of(zs.at[i], zt.at[i], row), sum.slope);
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

// What a row's sums say: its divergence, and H, in the unit that Factors takes.
struct Measured {
  float value, center;
};

template <Divergence divergence>
PYFAST_DEVICE Measured measured_of(const Totals& totals, const RowConstants& row, bool is_near) {
  if (is_mixture(divergence) && is_near) return {totals.value, totals.slope};
  const float value = totals.value * row.mass, slope = totals.slope * row.mass;
  const float balance = ptx::log2_approx(row.balance);  // of log2 t, whose constant is rounded
  if constexpr (divergence == Divergence::tvd) return {0.5f * value, (totals.slope - 0.5f * totals.square) * row.mass};
  if constexpr (divergence == Divergence::mse) return {value * row.mass, 2.0f * slope * row.mass};
  if constexpr (divergence == Divergence::jsd) {
    const float center = row.mixture_student * slope;
    return {kLn2 * (__builtin_fmaf(row.mixture_teacher, balance, value) + center), center};
  }
  if constexpr (divergence == Divergence::skew_kl)
    return {kLn2 * (value / row.mixture_teacher + balance), -row.mixture_student / row.mixture_teacher * slope};
  return {kLn2 * value, slope};
}

// Whether a row must be measured as a near one, by what it gave as a plain one.
template <Divergence divergence>
PYFAST_DEVICE bool lies_near(const Measured& row, const Totals& totals) {
  if constexpr (divergence == Divergence::mse) return totals.value < kNearSquares * totals.square;
  return row.value < kNearValue;
}

// The gradient of a word is s · (h · factor - bias) for an h of each divergence; forward_kl's is (s - t) · factor.
struct Factors {
  float factor, bias;
};

template <Divergence divergence>
PYFAST_DEVICE Factors factors_of(float scale, float center, const RowConstants& row, bool is_near) {
  if (is_mixture(divergence) && is_near) return {scale, center * scale};
  const float all = scale * row.mass;
  if constexpr (divergence == Divergence::tvd) return {all, (center + 0.5f) * all};
  if constexpr (divergence == Divergence::mse) return {2.0f * all * row.mass, center * all};
  if constexpr (divergence == Divergence::jsd) return {row.mixture_student * kLn2 * all, center * kLn2 * all};
  if constexpr (divergence == Divergence::skew_kl)
    return {-row.mixture_student / row.mixture_teacher * all, center * all};
  return {all, center * all};
}

// The last pass: the gradient of a vector's words. Adds to `value` where a near row of the two KL has it from here.
template <Divergence divergence, bool kNear, class T>
PYFAST_DEVICE Words<T> gradients(const Words<T>& zs, const Words<T>& zt, const RowConstants& row, const Factors& by,
                                 float (&value)[2]) {
  Words<T> out;
  if constexpr (is_mixture(divergence) && kNear) {
    each_near_mixture<divergence, T>(zs, zt, row, [&](int i, float, float slope, float mass) {
      out.at[i] = __builtin_fmaf(slope, by.factor, -mass * by.bias);
    });
  } else {
    Words<T> values;
    PYFAST_UNROLL
    for (int i = 0; i < Words<T>::count; ++i) {
      const float s = zs.at[i], t = zt.at[i];
      if constexpr (divergence == Divergence::forward_kl) {
        const Word w = word_of<kNear>(s, t, row);
        out.at[i] = w.gap * by.factor;
        if constexpr (kNear) values.at[i] = w.is_near ? w.first * w.second : (w.s - w.t) - w.first;
      } else if constexpr (divergence == Divergence::reverse_kl) {  // h = -1 for words that the teacher excludes
        const float x = log_ratio(s, t, row), h = is_finite(x) ? x : -1.0f;
        const float p = ptx::exp2_approx(student_log2(s, row)), slope = p * h;
        out.at[i] = __builtin_fmaf(slope, by.factor, -p * by.bias);
        if constexpr (kNear) {
          const float q = ptx::exp2_approx(teacher_log2(t, row));
          const float gap = t == kNegInf ? 0.0f : __builtin_fmaf(-q, row.balance, p);
          values.at[i] = __builtin_fabsf(h) < kNearLogRatio ? -slope * series(-h) : slope - gap;
        }
      } else if constexpr (divergence == Divergence::tvd) {
        const float p = ptx::exp2_approx(student_log2(s, row));
        out.at[i] = p * __builtin_fmaf(side_of(s, t, row), by.factor, -by.bias);
      } else if constexpr (divergence == Divergence::mse) {
        const Word w = word_of<kNear>(s, t, row);
        out.at[i] = w.s * __builtin_fmaf(w.gap, by.factor, -by.bias);
      } else {
        const Mixed m(s, t, row);
        float h;
        if constexpr (divergence == Divergence::jsd) {
          h = __builtin_fmaf(m.student_log2 - ptx::log2_approx(m.mass), by.factor, -by.bias);
        } else if constexpr (divergence == Divergence::skew_kl) {
          h = __builtin_fmaf(m.share(), by.factor, -by.bias);
        } else {
          const float log2 = m.student_log2 - ptx::log2_approx(m.mass);
          h = __builtin_fmaf(__builtin_fmaf(log2, kLn2, m.share()), by.factor, -by.bias);
        }
        out.at[i] = m.s * h;
      }
    }
    if constexpr (kNear && is_kl(divergence)) {
      PYFAST_UNROLL
      for (int i = 0; i < Words<T>::count; ++i) value[i % 2] += values.at[i];
    }
  }
  return out;
}

#endif

}  // namespace pyfast::cuda
