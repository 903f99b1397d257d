// Sums over all threads that share a row of distill_kl: the threads of a block, or of a cluster of blocks.
//
//   32 lanes ──► shuffles ──► shared memory ──► warp 0 ──► a copy into every block of the cluster ──► every warp
//                                     (__syncthreads)           (st.shared::cluster)    (barrier.cluster)
//
// All threads get the same bits. What a block receives lies in two halves that sums use in turn, so that one barrier a
// sum is enough: nobody writes into a half again before all have passed the barrier of the sum between.
#pragma once

#include "common.cuh"
#include "distill_kl_plan.h"
#include "vec.cuh"

#include "../exp_log.h"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

inline constexpr int kMaxWarps = 32;
inline constexpr int kMaxFields = 9;
inline constexpr float kLowestLogit = -3.40282347e+38f;  // a peak below every logit but -inf

struct GroupMemory {
  float warps[kMaxWarps][kMaxFields];
  float blocks[2][kMaxCluster][kMaxFields];
};
static_assert(sizeof(GroupMemory) <= kGroupBytes);

// Blocks that share a row. Without clusters that is one block, which any GPU has.
template <bool kClusters>
struct Group {
  GroupMemory& memory;
  int rank = 0, size = 1;
  int half = 0;

  PYFAST_DEVICE explicit Group(GroupMemory& shared) : memory(shared) {
    if constexpr (kClusters) {
      rank = static_cast<int>(ptx::cluster_rank());
      size = static_cast<int>(ptx::cluster_size());
      sync();  // no block may be written to before it has begun
    }
  }

  PYFAST_DEVICE void sync() const {
    if constexpr (kClusters) {
      ptx::syncwarp();
      ptx::cluster_sync();
    } else {
      ptx::syncthreads();
    }
  }
};

// hi + lo, of which lo holds what hi was rounded by.
struct Sum {
  float hi, lo;
};

PYFAST_DEVICE Sum add(const Sum& a, const Sum& b) {
  const float hi = a.hi + b.hi;
  const float part = hi - a.hi;
  return {hi, ((a.hi - (hi - part)) + (b.hi - part)) + (a.lo + b.lo)};
}

// What a pass leaves: sums that are only added.
struct Totals {
  float value, slope;

  PYFAST_DEVICE static Totals nothing() { return {0.0f, 0.0f}; }

  template <int kLanes>
  PYFAST_DEVICE void join(float, float, bool, bool) {
    PYFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      value += ptx::shfl_xor(value, distance);
      slope += ptx::shfl_xor(slope, distance);
    }
  }
};

// 2^((z - top) · scale). The highest logit of a row gives exactly 1, so that a word that has all of the mass leaves no
// rounding in the sum.
PYFAST_DEVICE float power_below(float z, float top, float scale) { return ptx::exp2_approx((z - top) * scale); }

// Sums of 2^((z - peak) · scale) over logits z, the peak being the highest of them.
struct Statistics {
  float student_peak, teacher_peak;
  Sum student, teacher;
  float plain;          // of the student, at temperature 1
  float drift, absent;  // of s (x - origin), and of s over words that the teacher excludes

  PYFAST_DEVICE static Statistics nothing() {
    return {kLowestLogit, kLowestLogit, {0.0f, 0.0f}, {0.0f, 0.0f}, 0.0f, 0.0f, 0.0f};
  }

  template <int kLanes>
  PYFAST_DEVICE void join(float student_scale, float teacher_scale, bool with_plain, bool with_drift) {
    float top_s = student_peak, top_t = teacher_peak;
    PYFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      top_s = __builtin_fmaxf(top_s, ptx::shfl_xor(top_s, distance));
      top_t = __builtin_fmaxf(top_t, ptx::shfl_xor(top_t, distance));
    }
    const float keep_s = power_below(student_peak, top_s, student_scale);
    const float keep_t = power_below(teacher_peak, top_t, teacher_scale);
    student = {student.hi * keep_s, student.lo * keep_s};
    teacher = {teacher.hi * keep_t, teacher.lo * keep_t};
    PYFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      student = add(student, {ptx::shfl_xor(student.hi, distance), ptx::shfl_xor(student.lo, distance)});
      teacher = add(teacher, {ptx::shfl_xor(teacher.hi, distance), ptx::shfl_xor(teacher.lo, distance)});
    }
    if (with_plain) {
      plain *= power_below(student_peak, top_s, kLog2e);
      PYFAST_UNROLL
      for (int distance = kLanes / 2; distance > 0; distance /= 2) plain += ptx::shfl_xor(plain, distance);
    }
    if (with_drift) {
      drift *= keep_s;
      absent *= keep_s;
      PYFAST_UNROLL
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        drift += ptx::shfl_xor(drift, distance);
        absent += ptx::shfl_xor(absent, distance);
      }
    }
    student_peak = top_s;
    teacher_peak = top_t;
  }
};

// Joins what the threads of the group hold; all of them call it together. What follows `mine` goes to join().
template <bool kClusters, class Fields, class... Options>
PYFAST_DEVICE Fields join_group(Group<kClusters>& group, Fields mine, Options... options) {
  constexpr int kFields = static_cast<int>(sizeof(Fields) / sizeof(float));
  static_assert(kFields <= kMaxFields);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  float* fields = reinterpret_cast<float*>(&mine);
  mine.template join<32>(options...);
  if (lane == 0) PYFAST_UNROLL
  for (int i = 0; i < kFields; ++i) group.memory.warps[warp][i] = fields[i];
  ptx::syncthreads();
  if (warp == 0) {
    mine = Fields::nothing();
    if (lane < warps) PYFAST_UNROLL
    for (int i = 0; i < kFields; ++i) fields[i] = group.memory.warps[lane][i];
    mine.template join<32>(options...);
    float* target = group.memory.blocks[group.half][group.rank];
    if (lane < group.size) {
      PYFAST_UNROLL
      for (int i = 0; i < kFields; ++i) {
        if constexpr (kClusters)
          ptx::st_cluster(target + i, static_cast<uint32_t>(lane), fields[i]);
        else
          target[i] = fields[i];
      }
    }
  }
  group.sync();
  mine = Fields::nothing();
  if (lane % kMaxCluster < group.size) PYFAST_UNROLL
  for (int i = 0; i < kFields; ++i) fields[i] = group.memory.blocks[group.half][lane % kMaxCluster][i];
  mine.template join<kMaxCluster>(options...);
  group.half ^= 1;
  return mine;
}

#endif

}  // namespace pyfast::cuda
