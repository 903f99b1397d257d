// bitmap_linear: y = x Wᵀ + bias with W in bitmap form, for few tokens.
//
//   W is cut into tiles of 16 rows × 64 columns, row-major; a tile is 16 words of 64 bits, a word an 8×8 block:
//
//               8 columns   8 columns            8 columns
//             ┌──────────┬──────────┬── ··· ──┬──────────┐
//      8 rows │  word 0  │  word 2  │         │  word 14 │     bit = 8·row + column within the block
//             ├──────────┼──────────┼── ··· ──┼──────────┤
//      8 rows │  word 1  │  word 3  │         │  word 15 │
//             └──────────┴──────────┴── ··· ──┴──────────┘
//
//   bitmaps [tiles, 16], values in the order of tile, word, bit; offsets [tiles + 1] into values.
//   x [tokens, k] float32 (the caller widens and pads with zeros), k a multiple of 64; y [tokens, n].
//
// Sums run in float32, one partial sum a column of the block (mod 8). The vector variants multiply the zeros between
// the stored values of a block too: an activation of inf or NaN makes every row of its tile NaN, as a dense product
// does. Traffic is that of the weights, read once for every 3 tokens: values, 1 bit an element, 8 bytes a tile. One
// token in float32 at density d moves (4d + 0.133)/4 of the dense bytes: ceilings 1.88, 3.0, 4.3, 7.5 times dense at
// 50, 70, 80, 90 %.
#pragma once

#include <cstdint>

#include "isa.h"
#include "scalars.h"

namespace pyfast {

struct BitmapLinearArgs {
  const float* x;
  const void* values;
  const uint64_t* bitmaps;
  const int64_t* offsets;
  const float* bias;  // null: none
  void* y;
  int64_t tokens, n, k;
  int64_t x_stride, y_stride;
  int64_t nnz;
};

inline constexpr int kTileRows = 16, kTileColumns = 64, kTileWords = 16;

// Tile rows (16 rows of W each) [begin, end) for all tokens.
using BitmapLinearKernel = void (*)(const BitmapLinearArgs& args, int64_t begin, int64_t end);

struct BitmapLinearTable {
  BitmapLinearKernel linear[kDtypeCount];
  int64_t few_tokens;  // above so many, decompressing a panel and calling the dense library is faster (measured)
};

extern const BitmapLinearTable kBitmapLinearSerial;
#if defined(__x86_64__)
extern const BitmapLinearTable kBitmapLinearAvx2;
extern const BitmapLinearTable kBitmapLinearAvx512;        // 16 lanes: vexpandps
extern const BitmapLinearTable kBitmapLinearAvx512Narrow;  // 8 lanes: vpermi2ps by table, where vexpandps is slow
#endif

// The table for an ISA, a weight that stores this share of its elements, and a number of tokens.
const BitmapLinearTable& bitmap_linear_table(Isa isa, double density, int64_t tokens);

}  // namespace pyfast
