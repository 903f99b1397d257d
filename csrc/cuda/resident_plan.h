// Over how many blocks kernels spread what they hold of a row on chip: host arithmetic, without CUDA or torch, so that
// tests can ask for every device.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pyfast::cuda {

// What a GPU has. Bytes of shared memory.
struct DeviceLimits {
  int64_t shared_a_block, shared_a_multiprocessor;
  bool clusters;  // sm_90 and up
};

inline constexpr int kMaxCluster = 8;  // what every GPU with clusters can run
inline constexpr int64_t kVectorBytes = 16;
inline constexpr int64_t kGroupBytes = 2048;     // shared memory for sums over the threads of a group
inline constexpr int64_t kReservedBytes = 1024;  // that a block takes from a multiprocessor besides its own

struct ResidentPlan {
  int cluster;           // blocks that hold a row; 0: it does not fit
  int share;             // vectors of a row that a block holds
  int threads;           // a block
  int64_t shared_bytes;  // besides kGroupBytes
};

// Vectors of a row of so many words, which may begin within one.
inline int64_t most_vectors(int64_t words, int64_t word_bytes) {
  const int64_t vector_words = kVectorBytes / word_bytes;
  return (words + 2 * (vector_words - 1)) / vector_words;
}

// `rows`: how many are held beside each other. `more`: bytes that each block takes besides. `threads`: of all blocks on
// a multiprocessor.
//
// Blocks that share a multiprocessor do not wait at the same time: three of them keep memory busy while one reduces.
// So a row is spread over as few blocks as let three share a multiprocessor; failing that, over as many as there may
// be.
inline ResidentPlan plan_resident(int64_t vectors, int64_t rows, int64_t more, int64_t threads,
                                  const DeviceLimits& limits) {
  constexpr int64_t kWanted = 3, kMost = 12;
  ResidentPlan plan{};
  for (int cluster = 1; cluster <= (limits.clusters ? kMaxCluster : 1); cluster *= 2) {
    const int64_t share = (vectors + cluster - 1) / cluster, bytes = rows * kVectorBytes * share + more;
    if (bytes + kGroupBytes > limits.shared_a_block) continue;
    const int64_t blocks = limits.shared_a_multiprocessor / (bytes + kGroupBytes + kReservedBytes);
    const int64_t room = threads / std::clamp<int64_t>(blocks, 1, kMost) / 32 * 32;
    plan = {cluster, static_cast<int>(share), static_cast<int>(std::min(room, (share + 31) / 32 * 32)), bytes};
    if (blocks >= kWanted) break;
  }
  return plan;
}

}  // namespace pyfast::cuda
