// Sums over all threads that share a row of distill_kl: the threads of a block, or of a cluster of blocks.
//
//   32 lanes ──► shuffles ──► shared memory ──► warp 0 ──► into every block of the cluster ──► warp 0 ──► all threads
//                            (__syncthreads)               (st.shared::cluster, barrier.cluster)    (__syncthreads)
//
// Each warp does its own part and the first one the rest, because instructions are what the kernels are short of. All
// blocks get the same bits. What a block receives lies in two halves that sums use in turn, so that one barrier a sum
// is enough: nobody writes into a half again before all have passed the barrier of the sum between.
#pragma once

#include "common.cuh"
#include "resident_plan.h"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline constexpr bool kHasClusters = true;
#else
inline constexpr bool kHasClusters = false;
#endif

inline constexpr int kMaxWarps = 32;
inline constexpr int kMaxFields = 9;
inline constexpr int kMaxSent = 8;  // of 16 bytes, by broadcast()

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
