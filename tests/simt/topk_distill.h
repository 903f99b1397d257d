// The kernel of topk_distill on the host, for the drivers topk_distill*.cpp. They choose the size of the cluster, so
// that short rows are held by many blocks.
#pragma once

#include "simt.h"

#include "topk_distill.cuh"

namespace {

using namespace pyfast;
using namespace pyfast::cuda;

// temperature: a pointer, since host.py passes float32. groups: how many clusters share the rows.
template <class T>
void topk_distill(const T* student, const int64_t* ids, const double* entries, const float* row_scale, float* rows,
                  T* grad, int64_t count, int64_t words, int64_t named, int64_t student_stride, int64_t student_offset,
                  int64_t tail, const double* temperature, int64_t cluster, int64_t groups, int64_t threads) {
  TopkDistillArgs<T> args{};
  args.student = student + student_offset;
  args.ids = ids;
  args.entries = entries;
  args.row_scale = row_scale;
  args.rows = rows;
  args.grad = grad;
  args.student_stride = student_stride;
  args.ids_stride = args.entries_stride = named;
  args.grad_stride = words;
  args.count = count;
  args.words = static_cast<int>(words);
  args.named = static_cast<int>(named);
  args.places = static_cast<int>(places_for(named));
  args.tail = static_cast<TopkTail>(tail);
  args.inverse = 1.0 / *temperature;
  args.rate = static_cast<float>(args.inverse * kLog2eDouble);
  args.share = static_cast<int>((most_vectors(words, sizeof(T)) + cluster - 1) / cluster);
  args.cluster = static_cast<int>(cluster);
  args.groups = groups;
  simt::launch({.grid = {static_cast<unsigned>(groups * cluster)},
                .block = {static_cast<unsigned>(threads)},
                .cluster = static_cast<unsigned>(cluster),
                .shared_bytes = static_cast<size_t>(kVectorBytes * args.share + teacher_bytes(named))},
               topk_distill_kernel<T>, args);
}

}  // namespace

#define TOPK_DISTILL(name, T)                                                                                          \
  SIMT_EXPORT name(const T* student, const int64_t* ids, const double* entries, const float* row_scale, float* rows,   \
                   T* grad, int64_t count, int64_t words, int64_t named, int64_t student_stride,                       \
                   int64_t student_offset, int64_t tail, const double* temperature, int64_t cluster, int64_t groups,   \
                   int64_t threads) {                                                                                  \
    topk_distill<T>(student, ids, entries, row_scale, rows, grad, count, words, named, student_stride, student_offset, \
                    tail, temperature, cluster, groups, threads);                                                      \
  }
