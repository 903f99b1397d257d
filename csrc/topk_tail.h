// What topk_distill makes of the words that the teacher does not name, in the order of every table of kernels.
#pragma once

namespace pyfast {

enum class TopkTail { bucket = 0, ignore = 1, renormalise = 2, sampled = 3 };

inline constexpr int kTopkTailCount = 4;
inline constexpr const char* kTopkTailNames[kTopkTailCount] = {"bucket", "ignore", "renormalise", "sampled"};

}  // namespace pyfast
