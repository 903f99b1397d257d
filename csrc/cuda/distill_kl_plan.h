// How distill_kl is laid out on a GPU: host arithmetic, without CUDA or torch, so that tests can ask for every device.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pyfast::cuda {

// What a GPU has. Bytes of shared memory.
struct DeviceLimits {
  int64_t shared_a_block, shared_a_multiprocessor;
  bool clusters;  // sm_90 and up
};

inline constexpr int kBatches = 2;  // groups of copies a row, in Resident

struct DistillKlPlan {
  int cluster;  // blocks that hold a row; 0: it is streamed
  int share;    // vectors of a row that a block holds
  int threads;  // a block
  int64_t shared_bytes;

  // Slots of a block in one of kBatches: whole turns of its threads.
  int batch() const { return ((share + threads - 1) / threads + kBatches - 1) / kBatches * threads; }
};

inline constexpr int kMaxCluster = 8;  // what every GPU with clusters can run
// Threads of all blocks of a resident kernel on a multiprocessor: 80 registers each, and 128 in the general one, which
// takes softcaps, labels and any mixture. Threads of a block of a streamed kernel, of which a multiprocessor holds two,
// of registers as of 100 KB.
constexpr int resident_threads(bool is_general) { return is_general ? 512 : 768; }
constexpr int streamed_threads(bool is_general) { return is_general ? 256 : 320; }
inline constexpr int kStages = 4;
inline constexpr int64_t kGroupBytes = 2048;     // shared memory besides the words
inline constexpr int64_t kReservedBytes = 1024;  // that a block takes from a multiprocessor besides its own

// Blocks that share a multiprocessor do not wait at the same time: three of them keep memory busy while one reduces.
// So a row is spread over as few blocks as let three share a multiprocessor; failing that, over as many as there may
// be.
inline DistillKlPlan plan_distill_kl(int64_t words, int64_t word_bytes, bool is_general, const DeviceLimits& limits) {
  constexpr int64_t kVectorBytes = 16, kWanted = 3, kMost = 12;
  const int64_t vector_words = kVectorBytes / word_bytes;
  const int64_t vectors = (words + 2 * (vector_words - 1)) / vector_words;  // rows may begin within one
  const int streamed = streamed_threads(is_general);
  DistillKlPlan plan{0, 0, streamed, 2 * kStages * kVectorBytes * streamed};
  for (int cluster = 1; cluster <= (limits.clusters ? kMaxCluster : 1); cluster *= 2) {
    const int64_t share = (vectors + cluster - 1) / cluster, bytes = 2 * kVectorBytes * share;
    if (bytes + kGroupBytes > limits.shared_a_block) continue;
    const int64_t blocks = limits.shared_a_multiprocessor / (bytes + kGroupBytes + kReservedBytes);
    const int64_t room = resident_threads(is_general) / std::clamp<int64_t>(blocks, 1, kMost) / 32 * 32;
    plan = {cluster, static_cast<int>(share), static_cast<int>(std::min(room, (share + 31) / 32 * 32)), bytes};
    if (blocks >= kWanted) break;
  }
  return plan;
}

}  // namespace pyfast::cuda
