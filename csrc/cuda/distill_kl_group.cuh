// Sums over all threads that share a row of distill_kl: the threads of a block, or of a cluster of blocks.
//
//   32 lanes ──► shuffles ──► shared memory ──► warp 0 ──► a copy into every block of the cluster ──► warp 0 ──► all
//                                     (__syncthreads)           (st.shared::cluster)    (barrier.cluster)
//                                     (__syncthreads)
//
// Each warp does its own part and the first one the rest, because instructions are what this kernel is short of. All
// blocks get the same bits. What a block receives lies in two halves that sums use in turn, so that one barrier a
// sum is enough: nobody writes into a half again before all have passed the barrier of the sum between.
#pragma once

#include "common.cuh"
#include "distill_kl_plan.h"
#include "vec.cuh"

#include "../divergence.h"
#include "../exp_log.h"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

inline constexpr int kMaxWarps = 32;
inline constexpr int kMaxFields = 9;
inline constexpr int kMaxSent = 8;           // of 16 bytes, by broadcast()
inline constexpr float kLowestTop = -1e30f;  // below the highest logit of a row; finite when it is scaled

struct GroupMemory {
  float warps[kMaxWarps][kMaxFields];
  float blocks[2][kMaxCluster][kMaxFields];
  Words4 sent[kMaxSent];
};
static_assert(sizeof(GroupMemory) <= kGroupBytes);

// Blocks that share a row. Without clusters that is one block, which any GPU has.
template <bool kClusters>
struct Group {
  GroupMemory& memory;
  const int size;
  int half = 0;

  PYFAST_DEVICE Group(GroupMemory& shared, int blocks) : memory(shared), size(kClusters ? blocks : 1) {
    if constexpr (kClusters) {
      sync();  // no block may be written to before it has begun
    }
  }

  PYFAST_DEVICE int rank() const {
    if constexpr (kClusters)
      return static_cast<int>(ptx::cluster_rank());
    else
      return 0;
  }

  // Whether this thread is of the first warp of its block: the one that has what join_group() joins.
  PYFAST_DEVICE static bool leads() { return threadIdx.x < 32; }

  // What the first lane of the block has, to all of its threads. A barrier lies between two calls.
  template <class Fields>
  PYFAST_DEVICE Fields broadcast(const Fields& own) const {
    static_assert(sizeof(Fields) <= sizeof(memory.sent));
    Fields* const sent = reinterpret_cast<Fields*>(memory.sent);
    if (threadIdx.x == 0) *sent = own;
    ptx::syncthreads();
    return *sent;
  }

  // All threads of the group; only what the first warps wrote before is seen after it in other blocks.
  PYFAST_DEVICE void sync() const {
    if constexpr (kClusters) {
      ptx::syncwarp();
      if (leads()) ptx::cluster_fence();
      ptx::cluster_sync_relaxed();
    } else {
      ptx::syncthreads();
    }
  }
};

// hi + lo, of which lo holds what hi was rounded by.
struct Sum {
  float hi, lo;
};

PYFAST_DEVICE bool is_finite(float x) { return __builtin_fabsf(x) <= 3.40282347e+38f; }

PYFAST_DEVICE Sum add(const Sum& a, const Sum& b) {
  const float hi = a.hi + b.hi;
  const float part = hi - a.hi;
  return {hi, ((a.hi - (hi - part)) + (b.hi - part)) + (a.lo + b.lo)};
}

// What a pass leaves: sums over words, of which the terms of the divergence say what they are.
struct Totals {
  float value, slope, square;

  PYFAST_DEVICE static Totals nothing() { return {0.0f, 0.0f, 0.0f}; }

  template <int kLanes, bool kExact>
  PYFAST_DEVICE void join() {
    PYFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      value += ptx::shfl_xor(value, distance);
      slope += ptx::shfl_xor(slope, distance);
      square += ptx::shfl_xor(square, distance);
    }
  }
};

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

// Joins what the threads of the group hold; all of them call it together, and the first warp of each block gets it.
// What follows `mine` goes to join().
template <bool kClusters, class Fields, class... Options>
PYFAST_DEVICE Fields join_group(Group<kClusters>& group, Fields mine, Options... options) {
  constexpr int kFields = static_cast<int>(sizeof(Fields) / sizeof(float));
  static_assert(kFields <= kMaxFields);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  float* fields = reinterpret_cast<float*>(&mine);
  mine.template join<32, false>(options...);
  if (lane == 0) PYFAST_UNROLL
  for (int i = 0; i < kFields; ++i) group.memory.warps[warp][i] = fields[i];
  ptx::syncthreads();
  if (warp == 0) {
    mine = Fields::nothing();
    if (lane < warps) PYFAST_UNROLL
    for (int i = 0; i < kFields; ++i) fields[i] = group.memory.warps[lane][i];
    mine.template join<32, true>(options...);
  }
  if constexpr (kClusters) {
    if (group.size == 1) return mine;
    if (warp == 0 && lane < group.size) {
      float* const target = group.memory.blocks[group.half][group.rank()];
      PYFAST_UNROLL
      for (int i = 0; i < kFields; ++i) ptx::st_cluster(target + i, static_cast<uint32_t>(lane), fields[i]);
    }
    group.sync();
    if (warp == 0) {
      mine = Fields::nothing();
      if (lane % kMaxCluster < group.size) PYFAST_UNROLL
      for (int i = 0; i < kFields; ++i) fields[i] = group.memory.blocks[group.half][lane % kMaxCluster][i];
      mine.template join<kMaxCluster, true>(options...);
    }
    group.half ^= 1;
  }
  return mine;
}

#endif

}  // namespace pyfast::cuda
