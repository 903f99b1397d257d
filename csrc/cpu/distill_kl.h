// distill_kl: divergence between two tempered softmaxes and its gradient, a row of logits at a time.
//
//   t = softmax(c(teacher) / teacher_temperature), s = softmax(c(student) / student_temperature)
//   rows[i]    = row_scale[i] * divergence(t, s) + ce_scale[i] * cross-entropy(labels[i], softmax(c(student)))
//   grad[i, v] = the derivative of rows[i] by student[i, v]
//
// with the softcap c(z) = cap tanh(z / cap) where there is one (-inf stays -inf), and the divergences of
// csrc/distill_kl_terms.h.
//
// Precision   Logits are widened to float32; sums run in float32 over 1024 words and in double above that.
//             Divergences are summed from terms that vanish, with their slope, where s = t: nothing cancels and
//             a KL of 1e-7 keeps five digits. The two KL of 0.025 and more are the difference of sums: five digits.
// Special     A teacher logit of -inf adds nothing. A student logit of -inf where the teacher has mass gives
//             +inf where the formula does. NaN (or +inf) in a row gives NaN in that row alone, and so does a label
//             that names no word. A row whose scales are exactly 0 is not read: its value and gradient are 0.
// Aliasing    grad overlaps nothing. Rows are contiguous; row strides are in elements, 64-bit.
// Traffic     With E the bytes of one logits tensor: pass 1 reads each row (log-sum-exp), pass 2 reads it
//             again while it lies in L2/L3: 2E of memory traffic, and 3E with the gradient, which is written past
//             the cache. Scratch for a third pass (see distill_kl_rows.h), or for what a shorter second one takes
//             (distill_kl_apart.h), stays in L2/L3.
#pragma once

#include <cstdint>

#include "../divergence.h"
#include "isa.h"
#include "scalars.h"

namespace pyfast {

struct DistillKlArgs {
  const void* student;
  const void* teacher;
  const float* row_scale;
  const int64_t* labels;  // null: no cross-entropy
  const float* ce_scale;
  float* rows;
  float* ce_rows;  // what the cross-entropy has in rows
  void* grad;      // null: values alone
  int64_t student_stride, teacher_stride, grad_stride;
  int64_t vocab;
  double mix;  // share of the first distribution of the mixture; see pyfast/reference/distill_kl.py
  double student_temperature, teacher_temperature;
  double student_softcap, teacher_softcap;  // 0: none
  bool stream_grad;                         // write the gradient with non-temporal stores
};

// Floats of scratch of a row of gradient: two for each word, what brings them to a multiple of 64 bytes, and
// kGroundFloats for each chunk of words.
inline constexpr int64_t kScratchPad = 16, kGroundFloats = 5;
constexpr int64_t row_scratch(int64_t vocab) { return 2 * vocab + kScratchPad + kGroundFloats * (vocab / kChunk + 2); }

// Rows [begin, end). scratch belongs to the thread: two rows of floats, rounded up to kScratchPad, for capped logits
// where there is a softcap, then row_scratch() where there is a gradient.
using DistillKlKernel = void (*)(const DistillKlArgs& args, float* scratch, int64_t begin, int64_t end);

// rows of grad times scale[i] into out: what backward needs where the incoming gradient is not 1. Where grad is out,
// rows of scale 1 are not touched.
struct ScaleRowsArgs {
  const void* grad;
  const float* scale;
  void* out;
  int64_t grad_stride, scale_stride, out_stride;
  int64_t vocab;
};

using ScaleRowsKernel = void (*)(const ScaleRowsArgs& args, int64_t begin, int64_t end);

struct DistillKlTable {
  DistillKlKernel rows[kDivergenceCount][kDtypeCount];
  ScaleRowsKernel scale_rows[kDtypeCount];
};

extern const DistillKlTable kDistillKlSerial;
#if defined(__x86_64__)
extern const DistillKlTable kDistillKlAvx2;
extern const DistillKlTable kDistillKlAvx512;
#endif

const DistillKlTable& distill_kl_table(Isa isa);

}  // namespace pyfast
