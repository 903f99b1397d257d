// How distill_kl is laid out on a GPU: host arithmetic, without CUDA or torch, so that tests can ask for every device.
#pragma once

#include <cstdint>

#include "resident_plan.h"

namespace pyfast::cuda {

inline constexpr int kBatches = 2;  // groups of copies a row, in Resident

struct DistillKlPlan {
  int cluster;  // blocks that hold a row; 0: it is streamed
  int share;    // vectors of a row that a block holds
  int threads;  // a block
  int64_t shared_bytes;

  // Slots of a block in one of kBatches: whole turns of its threads.
  int batch() const { return ((share + threads - 1) / threads + kBatches - 1) / kBatches * threads; }
};

// Threads of all blocks of a resident kernel on a multiprocessor: 80 registers each, and 128 in the general one, which
// takes softcaps, labels and any mixture. Threads of a block of a streamed kernel, of which a multiprocessor holds two,
// of registers as of 100 KB.
constexpr int resident_threads(bool is_general) { return is_general ? 512 : 768; }
constexpr int streamed_threads(bool is_general) { return is_general ? 256 : 320; }
inline constexpr int kStages = 4;

inline DistillKlPlan plan_distill_kl(int64_t words, int64_t word_bytes, bool is_general, const DeviceLimits& limits) {
  const ResidentPlan plan = plan_resident(most_vectors(words, word_bytes), 2, 0, resident_threads(is_general), limits);
  const int streamed = streamed_threads(is_general);
  if (plan.cluster == 0) return {0, 0, streamed, 2 * kStages * kVectorBytes * streamed};
  return {plan.cluster, plan.share, plan.threads, plan.shared_bytes};
}

}  // namespace pyfast::cuda
