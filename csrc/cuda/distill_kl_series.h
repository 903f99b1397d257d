// Series of the mixtures of distill_kl close to s = t: host arithmetic, without CUDA or torch, so that tests can ask
// for any weights.
//
// With x = log s - log t, a mixture m = w_t t + w_s s has log(m / t) = u(x), u(0) = 0, and u' = w_s s / m is the
// logistic function c(x) with c(0) = w_s: c' = c (1 - c) gives its coefficients one after the other, and all that the
// terms of csrc/distill_kl_terms.h consist of follows from c, u and e^x:
//
//                     value of a word / t              h
//   jsd               w_s e^x (x - u) - w_t u          w_s (x - u)
//   skew_kl           w_s (e^x - 1) - u                w_s / w_t (c - w_s)
//   skew_reverse_kl   e^x (x - u) - w_t (e^x - 1)      (x - u) - (c - w_s)
//
// The nearest pole is at |x| >= pi. What is left out of a series on |x| <= kSeriesReach after kSeriesTerms terms is
// below 2e-6 of it for weights from 3 / 32 on. Beyond, where a row is near all the same, the terms are differences of a
// logarithm of the special function unit, off by 2^-22, and of what it nearly is: with a reach of 1/2 that was 5e-5 of
// a value at |x| of 0.4 and a weight of 0.1.
#pragma once

#include "../divergence.h"

namespace pyfast::cuda {

inline constexpr float kSeriesReach = 0.875f;
inline constexpr int kSeriesTerms = 8;
inline constexpr double kLeastWeight = 0.09375;

struct MixtureSeries {
  float value[kSeriesTerms];  // value / (t x²) = Σ value[i] x^i
  float slope[kSeriesTerms];  // h / x = Σ slope[i] x^i
};

namespace series {

inline constexpr int kOrder = 24;

struct Power {
  double at[kOrder];
};

inline Power product(const Power& a, const Power& b) {
  Power c{};
  for (int i = 0; i < kOrder; ++i)
    for (int k = 0; k <= i; ++k) c.at[i] += a.at[k] * b.at[i - k];
  return c;
}

inline Power sum(const Power& a, double by, const Power& b) {
  Power c;
  for (int i = 0; i < kOrder; ++i) c.at[i] = a.at[i] + by * b.at[i];
  return c;
}

// Drops the terms from `kept` on, each against the Chebyshev polynomial that deviates least from 0 in their place.
inline void economise(Power p, int first, float (&kept)[kSeriesTerms]) {
  constexpr int kMost = kOrder - 2;
  double coefficient[kMost];  // of y^i, x = reach y
  double reach = 1.0;
  for (int i = 0; i < kMost; ++i, reach *= kSeriesReach) coefficient[i] = p.at[first + i] * reach;
  for (int n = kMost - 1; n >= kSeriesTerms; --n) {  // y^n - 2^(1-n) T_n(y) has lower terms alone
    double term = coefficient[n];
    coefficient[n] = 0.0;
    for (int k = 1; n - 2 * k >= 0; ++k) {
      term *= -0.25 * (n - 2 * k + 2) * (n - 2 * k + 1) / (k * (n - k));
      coefficient[n - 2 * k] -= term;
    }
  }
  reach = 1.0;
  for (int i = 0; i < kSeriesTerms; ++i, reach *= kSeriesReach) kept[i] = static_cast<float>(coefficient[i] / reach);
}

}  // namespace series

// unit: what value and slope are multiplied by.
inline MixtureSeries mixture_series(Divergence divergence, double teacher, double student, double value_unit,
                                    double slope_unit) {
  using series::kOrder;
  series::Power exp{}, expm1{}, c{}, u{}, x{};
  exp.at[0] = 1.0;
  c.at[0] = student;
  for (int i = 1; i < kOrder; ++i) {
    exp.at[i] = exp.at[i - 1] / i;
    double square = 0.0;
    for (int k = 0; k < i; ++k) square += c.at[k] * c.at[i - 1 - k];
    u.at[i] = c.at[i - 1] / i;
    c.at[i] = (c.at[i - 1] - square) / i;
  }
  expm1 = exp;
  expm1.at[0] = 0.0;
  c.at[0] = 0.0;
  x.at[1] = 1.0;
  const series::Power v = sum(x, -1.0, u);  // log(s / m)
  series::Power value{}, slope{};
  if (divergence == Divergence::jsd) {
    value = sum(sum(value, student, product(exp, v)), -teacher, u);
    slope = sum(slope, student, v);
  } else if (divergence == Divergence::skew_kl) {
    value = sum(sum(value, student, expm1), -1.0, u);
    slope = sum(slope, student / teacher, c);
  } else {
    value = sum(product(exp, v), -teacher, expm1);
    slope = sum(v, -1.0, c);
  }
  MixtureSeries out{};
  economise(sum(series::Power{}, value_unit, value), 2, out.value);
  economise(sum(series::Power{}, slope_unit, slope), 1, out.slope);
  return out;
}

}  // namespace pyfast::cuda
