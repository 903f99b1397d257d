// The kernels of distill_kl on the host, for the drivers distill_kl*.cpp. They choose the size of the cluster, so that
// short rows are held by many blocks.
#pragma once

#include "simt.h"

#include "distill_kl.cuh"

namespace {

using namespace pyfast;
using namespace pyfast::cuda;

// cluster: blocks that hold a row, or 0 for the streamed kernel. groups: how many share the rows.
template <class T>
void distill_kl(const T* student, const T* teacher, const float* row_scale, const int64_t* labels,
                const float* ce_scale, float* rows, float* ce_rows, T* grad, int64_t count, int64_t words,
                int64_t student_stride, int64_t teacher_stride, int64_t student_offset, int64_t teacher_offset,
                int64_t divergence, float mix, float student_temperature, float teacher_temperature,
                float student_softcap, float teacher_softcap, int64_t cluster, int64_t groups, int64_t threads) {
  DistillKlArgs<T> args{};
  args.student = student + student_offset;
  args.teacher = teacher + teacher_offset;
  args.row_scale = row_scale;
  args.labels = labels;
  args.ce_scale = ce_scale;
  args.rows = rows;
  args.ce_rows = ce_rows;
  args.grad = grad;
  args.student_stride = student_stride;
  args.teacher_stride = teacher_stride;
  args.grad_stride = words;
  args.count = count;
  args.words = static_cast<int>(words);
  args.options = distill_kl_options(static_cast<Divergence>(divergence), mix, student_temperature, teacher_temperature,
                                    student_softcap, teacher_softcap);
  args.cluster = static_cast<int>(cluster == 0 ? 1 : cluster);
  args.groups = groups;
  const unsigned block = static_cast<unsigned>(threads);
  if (cluster == 0) {
    simt::launch({.grid = {static_cast<unsigned>(groups)}, .block = {block}, .shared_bytes = 32 * kStages * block},
                 args.is_general() ? distill_kl_streamed_kernel<T, true> : distill_kl_streamed_kernel<T, false>, args);
    return;
  }
  const int64_t vectors = (words + 2 * (kVectorWords<T> - 1)) / kVectorWords<T>;
  args.share = static_cast<int>((vectors + cluster - 1) / cluster);
  args.batch = DistillKlPlan{args.cluster, args.share, static_cast<int>(threads), 0}.batch();
  simt::launch({.grid = {static_cast<unsigned>(groups * cluster)},
                .block = {block},
                .cluster = static_cast<unsigned>(cluster),
                .shared_bytes = 32 * static_cast<size_t>(args.share)},
               args.is_general() ? distill_kl_resident_kernel<T, true> : distill_kl_resident_kernel<T, false>, args);
}

}  // namespace

#define DISTILL_KL(name, T)                                                                                          \
  SIMT_EXPORT name(const T* student, const T* teacher, const float* row_scale, const int64_t* labels,                \
                   const float* ce_scale, float* rows, float* ce_rows, T* grad, int64_t count, int64_t words,        \
                   int64_t student_stride, int64_t teacher_stride, int64_t student_offset, int64_t teacher_offset,   \
                   int64_t divergence, float mix, float student_temperature, float teacher_temperature,              \
                   float student_softcap, float teacher_softcap, int64_t cluster, int64_t groups, int64_t threads) { \
    distill_kl<T>(student, teacher, row_scale, labels, ce_scale, rows, ce_rows, grad, count, words, student_stride,  \
                  teacher_stride, student_offset, teacher_offset, divergence, mix, student_temperature,              \
                  teacher_temperature, student_softcap, teacher_softcap, cluster, groups, threads);                  \
  }
