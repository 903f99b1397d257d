// What AVX-512 does by vpexpandd, for 8 lanes of AVX2. Include only from a file whose target pragma names it.
//
//   8 bits     ──► row of a table of 256: for each lane its rank among the set bits, or absent (sign bit)
//   8 values   ──► permuted by that row, absent lanes cleared
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pyfast {
namespace {

struct ExpandTable {
  alignas(64) int32_t lane[256][8];

  constexpr ExpandTable() : lane{} {
    for (int mask = 0; mask < 256; ++mask) {
      int rank = 0;
      for (int bit = 0; bit < 8; ++bit) lane[mask][bit] = (mask >> bit) & 1 ? rank++ : INT32_MIN;
    }
  }
};

constexpr ExpandTable kExpandTable{};

inline __m256i spread(__m256i values, __m256i row) {
  return _mm256_andnot_si256(_mm256_srai_epi32(row, 31), _mm256_permutevar8x32_epi32(values, row));
}

}  // namespace
}  // namespace pyfast
