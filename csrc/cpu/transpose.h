// 4×4 blocks of floats turned over, in vectors that every x86-64 and compiler has.
#pragma once

#include <cstdint>

#include "scalars.h"

namespace pyfast {
namespace {

using Four = float __attribute__((vector_size(16)));
using FourInts = int32_t __attribute__((vector_size(16)));

// out[c][r] = in[r][c] for r, c in 0 … 3, rows a stride apart. T is widened.
template <class T>
[[gnu::always_inline]] inline void transpose4(const T* in, int64_t in_stride, float* out, int64_t out_stride) {
  Four row[4];
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) row[r][c] = widen(in[r * in_stride + c]);
  const Four ab_low = __builtin_shuffle(row[0], row[1], FourInts{0, 4, 1, 5});
  const Four ab_high = __builtin_shuffle(row[0], row[1], FourInts{2, 6, 3, 7});
  const Four cd_low = __builtin_shuffle(row[2], row[3], FourInts{0, 4, 1, 5});
  const Four cd_high = __builtin_shuffle(row[2], row[3], FourInts{2, 6, 3, 7});
  const Four column[4] = {__builtin_shuffle(ab_low, cd_low, FourInts{0, 1, 4, 5}),
                          __builtin_shuffle(ab_low, cd_low, FourInts{2, 3, 6, 7}),
                          __builtin_shuffle(ab_high, cd_high, FourInts{0, 1, 4, 5}),
                          __builtin_shuffle(ab_high, cd_high, FourInts{2, 3, 6, 7})};
  for (int c = 0; c < 4; ++c) __builtin_memcpy(out + c * out_stride, &column[c], sizeof column[c]);
}

}  // namespace
}  // namespace pyfast
