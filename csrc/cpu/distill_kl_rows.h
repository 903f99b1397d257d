// The row algorithm of distill_kl, written once over Vec (vec_serial.h, vec_avx2.h, vec_avx512.h) and
// compiled by each ISA file. Everything is in an unnamed namespace: nothing compiled for a newer ISA can be
// picked by the linker for an older one.
//
//      student row  ──► max, Σ2^… (1024 words at a time, while they are in L1) ──► m, Σ ┐
//      teacher row  ──► the same ─────────────────────────────────────────────────► m, Σ ┤
//                                                                                        ▼
//      both rows again (L2/L3) ──► t, x ──► t·(e^x − 1 − x) ──► Σ in double ──► rows[i]
//                                       └─► t·(e^x − 1)·scale ──► streaming store ──► grad[i, :]
//
// Pass 2 needs two exponentials a word, not three: s = t·e^x, and e^x is wanted anyway.
#pragma once

#include "distill_kl.h"
#include "softmax_rows.h"

namespace pyfast {
namespace {

// Beyond this |x| the rounding of x itself, |x| 2^-24, would show in s = t e^x: s is then computed on its own.
constexpr float kFar = 16.0f;

// What pass 2 needs to know of a row pair; scalars in float32, computed in double.
struct RowPair {
  float student_shift, student_scale, student_log2_sum;
  float teacher_shift, teacher_scale, teacher_log2_sum;
  float teacher_share;     // student_temperature / teacher_temperature
  float student_inverse;   // 1 / student_temperature
  float log_ratio_offset;  // log-sum-exp of the teacher less that of the student
  float grad_scale;
};

struct Terms {
  Vec value, grad;
};

// value = s - t - t x and grad = s - t, each free of cancellation.
inline Terms forward_kl_terms(Vec zs, Vec zt, const RowPair& row) {
  const Vec t =
      exp2(fma(zt - broadcast(row.teacher_shift), broadcast(row.teacher_scale), broadcast(-row.teacher_log2_sum)));
  const Vec x =
      fma(fnma(zt, broadcast(row.teacher_share), zs), broadcast(row.student_inverse), broadcast(row.log_ratio_offset));
  const ExpParts e = exp_parts(x);
  Terms out{t * e.expm1_x, t * e.expm1};
  const auto far = not_at_most(abs(x), broadcast(kFar));
  if (any(far)) {  // also where the teacher excludes a word: x is inf or NaN, t is 0 and both terms have the limit s
    const Vec s =
        exp2(fma(zs - broadcast(row.student_shift), broadcast(row.student_scale), broadcast(-row.student_log2_sum)));
    const Vec grad = s - t;
    const Vec value = select(equal(t, broadcast(0.0f)), s, fnma(t, x, grad));
    out.value = select(far, value, out.value);
    out.grad = select(far, grad, out.grad);
  }
  return out;
}

// next_*: rows that the thread reads after this one. This pass computes while memory would rest, so it asks for them;
// the first pass over them then runs from L2.
template <class T, bool with_grad>
float forward_kl_row(const T* student, const T* teacher, T* grad, int64_t vocab, const RowPair& row, bool streaming,
                     const T* next_student, const T* next_teacher) {
  const Vec scale = broadcast(row.grad_scale);
  double total = 0.0;
  Vec part = broadcast(0.0f);
  auto partial = [&](int64_t at, int64_t n) {
    const Terms e =
        forward_kl_terms(load_partial(student + at, n, kNegInf), load_partial(teacher + at, n, kNegInf), row);
    if constexpr (with_grad) store_partial(grad + at, n, e.grad * scale);
    part = part + e.value;
  };
  constexpr int64_t store_bytes = Vec::width * static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  if (with_grad && streaming) {  // streaming stores want an aligned address: peel up to it
    const int64_t off =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(grad) % store_bytes) / static_cast<int64_t>(sizeof(T));
    i = off == 0 ? 0 : Vec::width - off;
    if (i > vocab) i = vocab;
    if (i > 0) partial(0, i);
  }
  while (i + Vec::width <= vocab) {
    const int64_t left = (vocab - i) / Vec::width * Vec::width;
    const int64_t end = i + (left < kChunk ? left : kChunk);
    for (; i < end; i += Vec::width) {
      prefetch(next_student + i);
      prefetch(next_teacher + i);
      const Terms e = forward_kl_terms(load(student + i), load(teacher + i), row);
      if constexpr (with_grad) {
        if (streaming)
          stream(grad + i, e.grad * scale);
        else
          store(grad + i, e.grad * scale);
      }
      part = part + e.value;
    }
    total += static_cast<double>(reduce_add(part));
    part = broadcast(0.0f);
  }
  if (i < vocab) partial(i, vocab - i);
  return static_cast<float>(total + static_cast<double>(reduce_add(part)));
}

template <class T>
void forward_kl(const DistillKlArgs& a, int64_t begin, int64_t end) {
  const double student_inverse = 1.0 / a.student_temperature, teacher_inverse = 1.0 / a.teacher_temperature;
  for (int64_t i = begin; i < end; ++i) {
    T* grad = a.grad == nullptr ? nullptr : static_cast<T*>(a.grad) + i * a.grad_stride;
    const float weight = a.row_scale[i];
    if (weight == 0.0f) {
      a.rows[i] = 0.0f;
      if (grad != nullptr) zero_row(grad, a.vocab);
      continue;
    }
    const T* student = static_cast<const T*>(a.student) + i * a.student_stride;
    const T* teacher = static_cast<const T*>(a.teacher) + i * a.teacher_stride;
    RowPair row;
    row.student_scale = static_cast<float>(student_inverse / kLn2Double);
    row.teacher_scale = static_cast<float>(teacher_inverse / kLn2Double);
    const RowSum s = row_sum(student, a.vocab, row.student_scale);
    const RowSum t = row_sum(teacher, a.vocab, row.teacher_scale);
    row.student_shift = s.shift;
    row.teacher_shift = t.shift;
    const double student_log2 = __builtin_log2(s.sum), teacher_log2 = __builtin_log2(t.sum);
    row.student_log2_sum = static_cast<float>(student_log2);
    row.teacher_log2_sum = static_cast<float>(teacher_log2);
    row.teacher_share = static_cast<float>(a.student_temperature / a.teacher_temperature);
    row.student_inverse = static_cast<float>(student_inverse);
    row.log_ratio_offset = static_cast<float>((t.shift * teacher_inverse - s.shift * student_inverse) +
                                              kLn2Double * (teacher_log2 - student_log2));
    row.grad_scale = static_cast<float>(weight * student_inverse);
    const T* next_student = i + 1 < end ? student + a.student_stride : student;
    const T* next_teacher = i + 1 < end ? teacher + a.teacher_stride : teacher;
    const float kl =
        grad == nullptr
            ? forward_kl_row<T, false>(student, teacher, grad, a.vocab, row, false, next_student, next_teacher)
            : forward_kl_row<T, true>(student, teacher, grad, a.vocab, row, a.stream_grad, next_student, next_teacher);
    a.rows[i] = weight * kl;
  }
  if (a.stream_grad) stream_fence();
}

template <class T>
void scale_rows(const ScaleRowsArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* grad = static_cast<const T*>(a.grad) + i * a.grad_stride;
    T* out = static_cast<T*>(a.out) + i * a.out_stride;
    if (grad == out && a.scale[i * a.scale_stride] == 1.0f) continue;
    const Vec scale = broadcast(a.scale[i * a.scale_stride]);
    int64_t v = 0;
    for (; v + Vec::width <= a.vocab; v += Vec::width) store(out + v, load(grad + v) * scale);
    if (v < a.vocab) store_partial(out + v, a.vocab - v, load_partial(grad + v, a.vocab - v, 0.0f) * scale);
  }
}

}  // namespace
}  // namespace pyfast
