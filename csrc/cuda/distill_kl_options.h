// The options of distill_kl as its kernels take them: host arithmetic, without CUDA or torch.
#pragma once

#include <algorithm>

#include "../divergence.h"
#include "distill_kl_series.h"

namespace pyfast::cuda {

struct DistillKlOptions {
  Divergence divergence;
  float student_rate, teacher_rate;        // log2 e / temperature
  float inverse, share;                    // 1 / student_temperature, student_temperature / teacher_temperature
  float student_softcap, teacher_softcap;  // 0: none
  float mixture_teacher, mixture_student;  // w_t, w_s
  float teacher_inverse;                   // 1 / w_t
  bool goes_shared;                        // a mixture of which one weight is small
  MixtureSeries series;
};

// mix: share of the first distribution of the mixture, see pyfast/reference/distill_kl.py.
inline DistillKlOptions distill_kl_options(Divergence divergence, double mix, double student_temperature,
                                           double teacher_temperature, double student_softcap, double teacher_softcap) {
  constexpr double kLog2e = 1.44269504088896340736;
  const double teacher = divergence == Divergence::skew_reverse_kl ? 1.0 - mix : mix, student = 1.0 - teacher;
  DistillKlOptions o{};
  o.divergence = divergence;
  o.student_rate = static_cast<float>(kLog2e / student_temperature);
  o.teacher_rate = static_cast<float>(kLog2e / teacher_temperature);
  o.inverse = static_cast<float>(1.0 / student_temperature);
  o.share = static_cast<float>(student_temperature / teacher_temperature);
  o.student_softcap = static_cast<float>(student_softcap);
  o.teacher_softcap = static_cast<float>(teacher_softcap);
  o.mixture_teacher = static_cast<float>(teacher);
  o.mixture_student = static_cast<float>(student);
  o.teacher_inverse = static_cast<float>(1.0 / teacher);
  if (divergence == Divergence::jsd || divergence == Divergence::skew_kl || divergence == Divergence::skew_reverse_kl) {
    o.goes_shared = std::min(teacher, student) < kLeastWeight;
    if (!o.goes_shared)
      o.series =
          mixture_series(divergence, teacher, student, divergence == Divergence::skew_kl ? kLog2e : kLog2e / teacher,
                         divergence == Divergence::jsd ? kLog2e : 1.0);
  }
  return o;
}

}  // namespace pyfast::cuda
