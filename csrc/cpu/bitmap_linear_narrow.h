// bitmap_linear over Vec of 8 lanes: one row of an 8×8 block a step. The ISA file that includes this gives
// expand(values, entry): the next popcount(mask) values spread to the lanes whose bit is set, 0 elsewhere.
//
//   8 bits of the bitmap ──► row of a 256-entry table: for each lane, 8 + its rank among the set bits, or absent
//   8 values from memory ──► permuted by that row ──► FMA with the block's 8 activations
//
// sum[row] stays in a register for the whole strip of 16 rows. Where 16 sums do not fit (AVX2; more tokens), the
// strip is done one half of 8 rows at a time: the second half finds the values in L2.
#pragma once

#include "bitmap_linear_strip.h"

namespace pyfast {
namespace {

constexpr int32_t kAbsent = INT32_MIN;

struct ExpandTable {
  alignas(64) int32_t lane[256][8];

  constexpr ExpandTable() : lane{} {
    for (int mask = 0; mask < 256; ++mask) {
      int rank = 0;
      for (int bit = 0; bit < 8; ++bit) lane[mask][bit] = (mask >> bit) & 1 ? 8 + rank++ : kAbsent;
    }
  }
};

constexpr ExpandTable kExpandTable{};

// 32 times the 8 bits of a row of the block: their row of the table as an offset in bytes, by one shift and one mask.
inline uint64_t table_offset(uint64_t word, int row) { return (row == 0 ? word << 5 : word >> (8 * row - 5)) & 0x1fe0; }

inline const int32_t* table_row(uint64_t offset) {
  return reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(kExpandTable.lane) + offset);
}

template <class T, int tokens, int halves>
void bitmap_strip(const BitmapLinearArgs& a, int64_t tile_row, int64_t token, int first_half) {
  const int64_t tiles = a.k / kTileColumns;
  TileValues<T> buffer;
  Vec sum[tokens][8 * halves];
  // Every loop over sums is unrolled, or gcc keeps them in memory: an array whose index is not a constant has an
  // address.
#pragma GCC unroll 3
  for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 16
    for (int i = 0; i < 8 * halves; ++i) sum[t][i] = broadcast(0.0f);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const uint64_t* words = a.bitmaps + (tile_row * tiles + tile) * kTileWords;
    const float* x = a.x + token * a.x_stride + tile * kTileColumns;
    const T* w = buffer.at(a, tile_row * tiles + tile);
    for (int block = 0; block < kTileColumns / 8; ++block) {
      Vec x8[tokens];
      for (int t = 0; t < tokens; ++t) x8[t] = load(x + t * a.x_stride + 8 * block);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const uint64_t word = words[2 * block + half];
        if (halves == 1 && half != first_half) {
          w += __builtin_popcountll(word);
          continue;
        }
        prefetch_values(w);
#pragma GCC unroll 8
        for (int row = 0; row < 8; ++row) {
          const uint64_t offset = table_offset(word, row);
          const Vec e = expand(w, table_row(offset));
          const int at = halves == 1 ? row : 8 * half + row;
#pragma GCC unroll 3
          for (int t = 0; t < tokens; ++t) sum[t][at] = fma(e, x8[t], sum[t][at]);
          w += __builtin_popcountll(offset);
        }
      }
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 16
    for (int i = 0; i < 8 * halves; ++i)
      write_output<T>(a, tile_row * kTileRows + 8 * first_half + i, token + t, reduce_add(sum[t][i]));
}

// All tokens, `group` at a time. whole_strips: 16 sums fit in registers at one token.
template <class T, int group, bool whole_strips>
void bitmap_linear(const BitmapLinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    int64_t token = 0;
    if constexpr (group > 1) {
      for (; token + group <= a.tokens; token += group)
        for (int half = 0; half < 2; ++half) bitmap_strip<T, group, 1>(a, tile_row, token, half);
    }
    for (; token < a.tokens; ++token) {
      if constexpr (whole_strips) {
        bitmap_strip<T, 1, 2>(a, tile_row, token, 0);
      } else {
        for (int half = 0; half < 2; ++half) bitmap_strip<T, 1, 1>(a, tile_row, token, half);
      }
    }
  }
}

}  // namespace
}  // namespace pyfast
