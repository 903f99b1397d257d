// 2^n for logits that lie near the shift of their row, over Vec: fewer operations than exp2 in exp_log.h, which knows
// every number. Here the logits must have n = z rate − shift in [−112, 16), and `Outside` tells where one has
// not: the caller then takes exp2. The rounded part of n is subtracted from z rate itself, inside a multiply-add: what
// is left keeps its digits however far from 0 n is.
#pragma once

#include "power_table.h"

namespace pyfast {
namespace {

// What turns logits into n. The shift is rounded to a step of the table; sums times `unit` are those of the shift.
struct Ranged {
  float rate, origin;
  double unit;
  bool usable;  // the shift is one that steps of the table can hold
};

inline Ranged ranged(float shift, float rate) {
  constexpr double steps = 1 << Powers::kBits;
  const double at = static_cast<double>(shift) * rate;
  const double rounded = __builtin_rint(at * steps) / steps;
  const bool usable = __builtin_fabs(at) <= 65536.0;
  return {rate, usable ? static_cast<float>(kMagic<Powers::kBits> + kLeast - rounded) : 0.0f,
          usable ? __builtin_exp2(rounded - at) : 1.0, usable};
}

// z[j] by of[j % sides]. Each step of all vectors before the next step of any, which is a few per cent faster than one
// vector after the other: a scheduler holds the operations of few vectors, and each step waits for the one before.
template <int count, int sides>
PYFAST_INLINE void ranged_exp2(Vec (&z)[count], const Ranged (&of)[sides], const Powers& powers, Outside& outside) {
  Vec n[count], k[count];
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) n[j] = fma(z[j], broadcast(of[j % sides].rate), broadcast(of[j % sides].origin));
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) k[j] = broadcast(of[j % sides].origin + Powers::kOffset) - n[j];
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) outside.note(n[j]);
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) z[j] = fma(z[j], broadcast(of[j % sides].rate), k[j]);
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) n[j] = powers.at(n[j]);
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) z[j] = Powers::times(n[j], z[j]);
}

}  // namespace
}  // namespace pyfast
