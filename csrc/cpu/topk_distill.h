// topk_distill: divergence of a softmax from a teacher known by K of its words, and its gradient, a row at a time.
//
// With s = softmax(student / T), and t_k the teacher's probability of word id_k:
//
//   bucket       sum_k t_k log(t_k / s_k) + t_R log(t_R / s_R)      R: all other words as one; t_R = 1 - sum_k t_k
//   sampled      the same with t_k = w_k / sum w, hence t_R = 0; entries are weights w instead of log-probabilities
//   ignore       sum_k t_k log(t_k / s_k) - t_k + s_k               the generalised KL: without - t + s it may fall
//                                                                   below 0, since neither side sums to 1
//   renormalise  sum_k t_k log(t_k / s_k), t and s divided by their sums over the K words
//
//   rows[i]    = row_scale[i] * the above
//   grad[i, v] = row_scale[i] / T * the derivative by the student's logits, of all words:
//                  bucket, sampled   s_k - t_k,                      elsewhere s_v / s_R (s_R - t_R)
//                  ignore            s_k - t_k - s_k D,              elsewhere -s_v D, D = sum_k (s_k - t_k)
//                  renormalise       s_k - t_k (both divided),       elsewhere 0
//
// Entries     An entry of probability 0 (log-probability -inf, weight 0) is not there: its id is not looked at, and
//             its word lies outside. Ids that repeat are one word, which has the sum of their probabilities. A row
//             without entries is not read and gives 0 and no gradient. Where the entries name every word nothing lies
//             outside, and t_R, then a rounding error, is dropped. t_R is 0 where the entries sum to more than 1.
// Precision   What there are K of is computed in double. Terms are t (expm1(x) - x) with x = log s - log t, never
//             negative and free of cancellation; s_R is summed over the words outside themselves, not 1 - sum s_k,
//             so it keeps its digits where the K words hold nearly everything. The sums over V words run in float32
//             over 1024 words and in double above that.
// Special     A student logit of -inf where the teacher has mass gives +inf. NaN (or +inf) among the logits or the
//             entries gives NaN in that row alone, and so does an id out of range. renormalise looks at K logits and
//             nothing else. A row whose row_scale is exactly 0 is not read: its value and gradient are 0.
// Aliasing    grad overlaps nothing. Rows are contiguous; row strides are in elements, 64-bit.
// Traffic     With E the bytes of the logits: pass 1 reads the row (log-sum-exp), pass 2 reads it again while it lies
//             in L2/L3 and writes the gradient past the cache: 2E of memory traffic, E without the gradient.
//             renormalise reads no row and writes E, or nothing.
#pragma once

#include <cstdint>

#include "isa.h"
#include "scalars.h"

#include "../topk_tail.h"

namespace pyfast {

struct TopkDistillArgs {
  const void* student;
  const int64_t* ids;
  const double* entries;  // log-probabilities; weights where tail is sampled
  const float* row_scale;
  float* rows;
  void* grad;  // null: values alone
  int64_t student_stride, ids_stride, entries_stride, grad_stride;
  int64_t vocab, k;
  TopkTail tail;
  double temperature;
  bool stream_grad;  // write the gradient with non-temporal stores
};

// One word of the teacher, and what the student makes of it.
struct TopkEntry {
  int64_t id;
  double t, log_t;
  double logit;  // over the temperature
  double s;
  double grad;
};

// Rows [begin, end). scratch: 2 k entries.
using TopkDistillKernel = void (*)(const TopkDistillArgs& args, int64_t begin, int64_t end, TopkEntry* scratch);

struct TopkDistillTable {
  TopkDistillKernel rows[kDtypeCount];
};

extern const TopkDistillTable kTopkDistillSerial;
#if defined(__x86_64__)
extern const TopkDistillTable kTopkDistillAvx2;
extern const TopkDistillTable kTopkDistillAvx512;
#endif

const TopkDistillTable& topk_distill_table(Isa isa);

}  // namespace pyfast
