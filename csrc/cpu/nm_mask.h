// nm_mask: which N elements of every group of M consecutive columns have the largest scores.
//
//   scores [rows, k]   float32, bfloat16 or float16
//   mask   [rows, k]   bytes: 1 where the element stays, 0 elsewhere
//
// An element stays if fewer than n of its group rank before it: larger ones, and equal ones in lower columns. Each
// group therefore keeps exactly n; the last group of a row, short where m does not divide k, keeps min(n, its length).
// -0.0 equals +0.0, and NaN counts as -inf, so that counts are exact for whatever comes in.
//
//   m = 4, n = 2      scores   3 1 4 1 | 5 9 2 6 | 5 5 5
//                     rank     1 2 0 3 | 2 0 3 1 | 0 1 2
//                     mask     1 0 1 0 | 0 1 0 1 | 1 1 0
//
// Ranks come by comparing all pairs of a group, without a branch: m - 1 rotations of the groups in a register where a
// group fits into one, else m broadcasts. Traffic: the scores once, a byte an element written.
#pragma once

#include <cstdint>

#include "isa.h"
#include "scalars.h"

namespace pyfast {

inline constexpr int64_t kNmMaskMaxGroup = 32;

struct NmMaskArgs {
  const void* scores;
  uint8_t* mask;
  int64_t k;
  int64_t score_stride;  // elements between rows; the mask's rows are contiguous
  int64_t n, m;          // 1 <= n <= m <= kNmMaskMaxGroup
};

// Rows [begin, end).
using NmMaskKernel = void (*)(const NmMaskArgs& args, int64_t begin, int64_t end);

struct NmMaskTable {
  NmMaskKernel rows[kDtypeCount];
};

extern const NmMaskTable kNmMaskSerial;
#if defined(__x86_64__)
extern const NmMaskTable kNmMaskAvx2;
extern const NmMaskTable kNmMaskAvx512;
#endif

const NmMaskTable& nm_mask_table(Isa isa);

}  // namespace pyfast
