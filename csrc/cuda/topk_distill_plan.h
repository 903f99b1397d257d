// How topk_distill is laid out on a GPU: host arithmetic, without CUDA or torch, so that tests can ask for every
// device.
#pragma once

#include <cstdint>

#include "resident_plan.h"

namespace pyfast::cuda {

inline constexpr int64_t kMostEntries = 1024;  // of a row; more would leave the row too little room
inline constexpr int kTopkThreads = 1024;      // of all blocks on a multiprocessor: 64 registers each
inline constexpr int kMarkBytes = 256;         // of TeacherWords::counts

// Entries come by fours, so that ids are read four at a time.
constexpr int64_t places_for(int64_t entries) { return (entries + 3) / 4 * 4; }

// Bytes of a block besides its part of the row: all of the entries may name words of that part.
constexpr int64_t teacher_bytes(int64_t entries) { return 24 * places_for(entries) + kMarkBytes; }

// cluster 0: the kernel does not take it.
inline ResidentPlan plan_topk_distill(int64_t words, int64_t word_bytes, int64_t entries, const DeviceLimits& limits) {
  if (!limits.clusters || entries > kMostEntries) return {};
  return plan_resident(most_vectors(words, word_bytes), 1, teacher_bytes(entries), kTopkThreads, limits);
}

}  // namespace pyfast::cuda
