// The first pass of distill_kl over a row pair: the sums of both softmaxes, for the two KL also the sum that gives
// their value and H, and what follows from them for the passes after it.
//
// Exponents. log2 s = zs · rate - log2 in one fma, without the highest logit in between. The constant is rounded, by
// 2^-24 of its size, for s and for t apart. RowConstants::balance and ::mass are what that leaves: s · mass and
// t · balance · mass are the probabilities, and s = t · balance · e^x up to the rounding of each word's exponent.
#pragma once

#include "common.cuh"
#include "distill_kl_group.cuh"
#include "distill_kl_options.h"
#include "distill_kl_store.cuh"
#include "distill_kl_words.cuh"
#include "vec.cuh"

#include "../exp_log.h"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

inline constexpr float kLowestTop = -1e30f;      // below the highest logit of a row; finite when it is scaled
inline constexpr float kMostExponent = 0x1p30f;  // |z · rate| of a row's highest logit: beyond, the row is NaN
inline constexpr float kNear1 = 0x1p-6f;

PYFAST_DEVICE constexpr bool is_kl(Divergence divergence) {
  return divergence == Divergence::forward_kl || divergence == Divergence::reverse_kl;
}

// Sums of 2^(z · rate - top · rate) over logits z, top being the highest of them. top · rate is rounded, and that
// number is subtracted wherever it occurs.
struct Statistics {
  float student_top, teacher_top;
  Sum student, teacher;
  float drift, absent;  // of w (x - origin), the weights w being those of one of the two; of w where x is infinite
  float plain;          // of the student, 2^((z - top) log2 e)

  PYFAST_DEVICE static Statistics nothing() {
    return {kLowestTop, kLowestTop, {0.0f, 0.0f}, {0.0f, 0.0f}, 0.0f, 0.0f, 0.0f};
  }

  // kExact: keeps what the sums are rounded by. Within a warp nothing large is lost: its share of the row is small, or
  // the row is short.
  template <int kLanes, bool kExact>
  PYFAST_DEVICE void join(float student_rate, float teacher_rate, Divergence divergence, bool with_plain) {
    const bool with_drift = is_kl(divergence);
    float top_s = student_top, top_t = teacher_top;
    PYFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      top_s = __builtin_fmaxf(top_s, ptx::shfl_xor(top_s, distance));
      top_t = __builtin_fmaxf(top_t, ptx::shfl_xor(top_t, distance));
    }
    const float keep_s = kept(student_top, top_s, student_rate), keep_t = kept(teacher_top, top_t, teacher_rate);
    student = {student.hi * keep_s, student.lo * keep_s};
    teacher = {teacher.hi * keep_t, teacher.lo * keep_t};
    if (with_drift) {
      drift *= divergence == Divergence::reverse_kl ? keep_s : keep_t;
      absent *= keep_s;
    }
    if (with_plain) plain *= ptx::exp2_approx((student_top - top_s) * kLog2e);
    PYFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      student = add<kExact>(student, distance);
      teacher = add<kExact>(teacher, distance);
    }
    if (with_drift) {
      PYFAST_UNROLL
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        drift += ptx::shfl_xor(drift, distance);
        absent += ptx::shfl_xor(absent, distance);
      }
    }
    if (with_plain) {
      PYFAST_UNROLL
      for (int distance = kLanes / 2; distance > 0; distance /= 2) plain += ptx::shfl_xor(plain, distance);
    }
    student_top = top_s;
    teacher_top = top_t;
  }

  // The share of a sum below `top` in one below a higher one.
  PYFAST_DEVICE static float kept(float top, float higher, float rate) {
    return ptx::exp2_approx(ptx::multiply(top, rate) - ptx::multiply(higher, rate));
  }

 private:
  template <bool kExact>
  PYFAST_DEVICE static Sum add(const Sum& own, int distance) {
    if constexpr (kExact)
      return cuda::add(own, {ptx::shfl_xor(own.hi, distance), ptx::shfl_xor(own.lo, distance)});
    else
      return {own.hi + ptx::shfl_xor(own.hi, distance), 0.0f};
  }
};

// What the words of a row are computed from, besides DistillKlOptions. zs and zt are logits under their softcaps.
struct RowConstants {
  float student_log2, teacher_log2;  // log2 s = zs · student_rate - student_log2
  float offset;                      // x = log s - log t = (zs - share · zt) · inverse + offset
  float balance, balance_log2, mass;
  // For Way::shared: the highest logits, and log2 of the sums of 2^((z - top) · rate).
  float student_top, student_sum, teacher_top, teacher_sum;
};

PYFAST_DEVICE float student_log2(float zs, const RowConstants& row, const DistillKlOptions& o) {
  return __builtin_fmaf(zs, o.student_rate, -row.student_log2);
}
PYFAST_DEVICE float teacher_log2(float zt, const RowConstants& row, const DistillKlOptions& o) {
  return __builtin_fmaf(zt, o.teacher_rate, -row.teacher_log2);
}
PYFAST_DEVICE float log_ratio(float zs, float zt, float offset, const DistillKlOptions& o) {
  return __builtin_fmaf(__builtin_fmaf(-zt, o.share, zs), o.inverse, offset);
}

// 2^y - 1 for |y| < kNear1.
PYFAST_DEVICE float expm1_near_0(float y) {
  const float u = y * kLn2;
  return __builtin_fmaf(u * u, __builtin_fmaf(u, 1.0f / 6, 0.5f), u);
}

// 2^y, which is all but exact near y = 0.
PYFAST_DEVICE float power_near_1(float y) {
  return __builtin_fabsf(y) < kNear1 ? 1.0f + expm1_near_0(y) : ptx::exp2_approx(y);
}

// A row's divergence, and H = Σ s h in the unit of its h.
struct Measured {
  float value, center;
};

// The row's x but for RowConstants::offset: near those of the row where its logits have an offset.
template <class T>
PYFAST_DEVICE float origin_of(const RowInMemory<T>& row, const DistillKlOptions& o) {
  const float zs = capped(ptx::to_float(*row.student), o.student_softcap);
  const float zt = capped(ptx::to_float(*row.teacher), o.teacher_softcap);
  const float x = log_ratio(zs, zt, 0.0f, o);
  return is_finite(x) ? x : 0.0f;
}

// Σ a(i), Σ a(i) b(i) for i below kCount, a power of two.
template <int kCount, class A>
PYFAST_DEVICE float sum_over(const A& a) {
  float part[kCount / 2];
  PYFAST_UNROLL
  for (int i = 0; i < kCount / 2; ++i) part[i] = a(2 * i) + a(2 * i + 1);
  PYFAST_UNROLL
  for (int half = kCount / 4; half > 0; half /= 2) {
    PYFAST_UNROLL
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}
template <int kCount, class A, class B>
PYFAST_DEVICE float sum_over(const A& a, const B& b) {
  float part[2] = {a(0) * b(0), a(1) * b(1)};
  PYFAST_UNROLL
  for (int i = 2; i < kCount; ++i) part[i % 2] = __builtin_fmaf(a(i), b(i), part[i % 2]);
  return part[0] + part[1];
}

// Adds vectors to the statistics of this thread. kDivergence: that of the call as far as it matters, but for the
// general kernel, which also takes softcaps and, with_plain, the sum of the cross-entropy.
template <class T, bool kGeneral, Divergence kDivergence, int kVectors>
PYFAST_DEVICE void add_statistics(Statistics& sums, const Words4 (&student)[kVectors],
                                  const Words4 (&teacher)[kVectors], float origin, const DistillKlOptions& o,
                                  bool with_plain) {
  constexpr int kCount = kVectors * kVectorWords<T>;
  const Divergence divergence = kGeneral ? o.divergence : kDivergence;
  const bool reverse = divergence == Divergence::reverse_kl;
  float top_s = highest_of<T>(student), top_t = highest_of<T>(teacher);
  if constexpr (kGeneral) {
    top_s = capped(top_s, o.student_softcap);
    top_t = capped(top_t, o.teacher_softcap);
  }
  top_s = __builtin_fmaxf(sums.student_top, top_s);
  top_t = __builtin_fmaxf(sums.teacher_top, top_t);
  const float shift_s = ptx::multiply(top_s, o.student_rate), shift_t = ptx::multiply(top_t, o.teacher_rate);
  const float keep_s = ptx::exp2_approx(ptx::multiply(sums.student_top, o.student_rate) - shift_s);
  const float keep_t = ptx::exp2_approx(ptx::multiply(sums.teacher_top, o.teacher_rate) - shift_t);
  float zs[kCount], zt[kCount], s[kCount], t[kCount];
  PYFAST_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Words<T> vs = logits_of<T>(student[v], kGeneral ? o.student_softcap : 0.0f);
    const Words<T> vt = logits_of<T>(teacher[v], kGeneral ? o.teacher_softcap : 0.0f);
    PYFAST_UNROLL
    for (int i = 0; i < kVectorWords<T>; ++i) {
      zs[v * kVectorWords<T> + i] = vs.at[i];
      zt[v * kVectorWords<T> + i] = vt.at[i];
    }
  }
  PYFAST_UNROLL
  for (int i = 0; i < kCount; ++i) {
    s[i] = ptx::exp2_approx(__builtin_fmaf(zs[i], o.student_rate, -shift_s));
    t[i] = ptx::exp2_approx(__builtin_fmaf(zt[i], o.teacher_rate, -shift_t));
  }
  sums.student.hi = __builtin_fmaf(sums.student.hi, keep_s, sum_over<kCount>([&](int i) { return s[i]; }));
  sums.teacher.hi = __builtin_fmaf(sums.teacher.hi, keep_t, sum_over<kCount>([&](int i) { return t[i]; }));
  if (kGeneral && with_plain) {
    const float keep = ptx::exp2_approx((sums.student_top - top_s) * kLog2e);
    const float more = sum_over<kCount>([&](int i) { return ptx::exp2_approx((zs[i] - top_s) * kLog2e); });
    sums.plain = __builtin_fmaf(sums.plain, keep, more);
  }
  if (is_kl(divergence)) {
    const auto weight = [&](int i) { return reverse ? s[i] : t[i]; };
    const auto ratio = [&](int i) { return log_ratio(zs[i], zt[i], -origin, o); };
    float drift = sum_over<kCount>(weight, ratio), absent = 0.0f;
    if (!is_finite(drift)) [[unlikely]] {  // logits of -inf, which count only where there is mass
      drift = sum_over<kCount>([&](int i) {
        const bool counts = weight(i) != 0.0f && !(reverse && zt[i] == kNegInf);
        return counts ? weight(i) * ratio(i) : 0.0f;
      });
      absent = sum_over<kCount>([&](int i) { return zt[i] == kNegInf ? s[i] : 0.0f; });
    }
    sums.drift = __builtin_fmaf(sums.drift, reverse ? keep_s : keep_t, drift);
    if (reverse) sums.absent = __builtin_fmaf(sums.absent, keep_s, absent);
  }
  sums.student_top = top_s;
  sums.teacher_top = top_t;
}

// log(t / s) of two sums, which keeps its digits where they are close.
PYFAST_DEVICE float log_of_ratio(const Sum& t, const Sum& s) {
  const float gap = (t.hi - s.hi) + (t.lo - s.lo);
  const Vec more = broadcast(__builtin_fabsf(gap)) / broadcast(gap < 0.0f ? t.hi : s.hi);
  const float log = log_parts(more).log1p.at[0];
  return gap < 0.0f ? -log : log;
}

// A sum whose highest word counts 2^rest, not what that was rounded to: exact where one word has all of the mass.
PYFAST_DEVICE Sum with_exact_top(const Sum& sum, float rest) {
  return {sum.hi,
          sum.lo - (__builtin_fabsf(rest) < kNear1 ? (ptx::exp2_approx(rest) - 1.0f) - expm1_near_0(rest) : 0.0f)};
}

// What follows from the sums. NaN in any of them reaches every constant.
PYFAST_DEVICE RowConstants constants_of(const Statistics& sums, const DistillKlOptions& o) {
  RowConstants row;
  const float shift_s = ptx::multiply(sums.student_top, o.student_rate);
  const float shift_t = ptx::multiply(sums.teacher_top, o.teacher_rate);
  const float rest_s = __builtin_fmaf(sums.student_top, o.student_rate, -shift_s);
  const float rest_t = __builtin_fmaf(sums.teacher_top, o.teacher_rate, -shift_t);
  const float log2_s = ptx::log2_approx(sums.student.hi), log2_t = ptx::log2_approx(sums.teacher.hi);
  const bool fits = __builtin_fmaxf(__builtin_fabsf(shift_s), __builtin_fabsf(shift_t)) < kMostExponent;
  const float bad = fits ? 0.0f * (log2_s + log2_t) : __builtin_nanf("");
  row.student_log2 = shift_s + log2_s + bad;
  row.teacher_log2 = shift_t + log2_t + bad;
  const float ratio = log_of_ratio(with_exact_top(sums.teacher, rest_t), with_exact_top(sums.student, rest_s));
  row.offset = __builtin_fmaf(rest_s - rest_t, kLn2, ratio) - log_ratio(sums.student_top, sums.teacher_top, 0.0f, o);
  const float over_s = row.student_log2 - shift_s, over_t = row.teacher_log2 - shift_t;
  row.balance_log2 = __builtin_fmaf(-kLog2e, ratio, over_t - over_s);
  row.balance = power_near_1(row.balance_log2);
  row.mass = power_near_1(over_s - log2_s);
  row.student_top = sums.student_top;
  row.teacher_top = sums.teacher_top;
  row.student_sum = log2_s - rest_s + bad;
  row.teacher_sum = log2_t - rest_t + bad;
  return row;
}

// The two KL: H, and the value of a row that is not near.
PYFAST_DEVICE Measured measured_by_sums(Divergence divergence, const Statistics& sums, const RowConstants& row,
                                        float origin) {
  const float offset = origin + row.offset;
  if (divergence == Divergence::forward_kl) return {-(sums.drift / sums.teacher.hi + offset), 0.0f};
  const float present = sums.student.hi - sums.absent;
  const float value = __builtin_fmaf(offset, present, sums.drift) / sums.student.hi;
  return {value, value - sums.absent / sums.student.hi};
}

#endif

}  // namespace pyfast::cuda
