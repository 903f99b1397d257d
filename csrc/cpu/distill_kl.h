// distill_kl: KL divergence between two tempered softmaxes and its gradient, a row of logits at a time.
//
//   t = softmax(teacher / teacher_temperature), s = softmax(student / student_temperature)
//   rows[i]    = row_scale[i] * sum_v t log(t / s)
//   grad[i, v] = row_scale[i] / student_temperature * (s - t)          (the gradient to the student's logits)
//
// Precision   Logits are widened to float32; sums run in float32 over 1024 words and in double above that.
//             KL is summed as t (expm1(x) - x) with x = log s - log t: every term is non-negative and nothing
//             cancels, so a KL of 1e-7 keeps five digits. Where t is 0 the term is s, its limit, which makes
//             the sum equal to the formula above for teachers that exclude words.
// Special     A teacher logit of -inf adds nothing. A student logit of -inf where the teacher has mass gives
//             +inf. NaN (or +inf) in a row gives NaN in that row alone. A row whose row_scale is exactly 0 is
//             not read: its value and gradient are 0.
// Aliasing    grad overlaps nothing. Rows are contiguous; row strides are in elements, 64-bit.
// Traffic     With E the bytes of one logits tensor: pass 1 reads each row (log-sum-exp), pass 2 reads it
//             again while it lies in L2/L3 and writes the gradient past the cache: 3E of memory traffic.
#pragma once

#include <cstdint>

#include "isa.h"
#include "scalars.h"

namespace pyfast {

struct DistillKlArgs {
  const void* student;
  const void* teacher;
  const float* row_scale;
  float* rows;
  void* grad;  // null: values alone
  int64_t student_stride, teacher_stride, grad_stride;
  int64_t vocab;
  double student_temperature, teacher_temperature;
  bool stream_grad;  // write the gradient with non-temporal stores
};

// Rows [begin, end).
using DistillKlKernel = void (*)(const DistillKlArgs& args, int64_t begin, int64_t end);

// rows of grad times scale[i] into out: what backward needs where the incoming gradient is not 1.
struct ScaleRowsArgs {
  const void* grad;
  const float* scale;
  void* out;
  int64_t grad_stride, scale_stride, out_stride;
  int64_t vocab;
};

using ScaleRowsKernel = void (*)(const ScaleRowsArgs& args, int64_t begin, int64_t end);

struct DistillKlTable {
  DistillKlKernel forward_kl[kDtypeCount];
  ScaleRowsKernel scale_rows[kDtypeCount];
};

extern const DistillKlTable kDistillKlSerial;
#if defined(__x86_64__)
extern const DistillKlTable kDistillKlAvx2;
extern const DistillKlTable kDistillKlAvx512;
#endif

const DistillKlTable& distill_kl_table(Isa isa);

}  // namespace pyfast
