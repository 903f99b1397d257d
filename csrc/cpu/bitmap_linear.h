// bitmap_linear: y = f(x Wᵀ + bias) with W in bitmap form, for few tokens.
//
//   W is cut into tiles of 16 rows × 64 columns, row-major; a tile is 16 words of 64 bits, a row each:
//
//                 column 0  1  2 ···                    63
//               ┌─────────────────────────────────────────┐
//        row 0  │  word 0                                 │     bit c of word r: element (r, c) is stored
//        row 1  │  word 1                                 │
//          ···  │    ···                                  │
//        row 15 │  word 15                                │
//               └─────────────────────────────────────────┘
//
//   bitmaps [tiles, 16], values in the order of tile, row, column; offsets [tiles + 1] into values.
//   x [tokens, k] float32 (the caller widens and pads with zeros), k a multiple of 64; y as epilogue.h says.
//
// Sums run in float32. The expanding variants multiply the zeros between the stored values too: an activation of inf or
// NaN makes all outputs of its token NaN, as a dense product does. Traffic is that of the weights, read once for every
// few tokens: values, 1 bit an element, 8 bytes a tile. One token in float32 at density d moves (4d + 0.133)/4 of the
// dense bytes: ceilings 1.88, 3.0, 4.3, 7.5 times dense at 50, 70, 80, 90 %.
#pragma once

#include <cstdint>

#include "epilogue.h"
#include "isa.h"
#include "scalars.h"

namespace pyfast {

struct BitmapLinearArgs {
  const float* x;
  const void* values;
  const uint64_t* bitmaps;
  const int64_t* offsets;
  int64_t tokens, k;
  int64_t x_stride;
  int64_t nnz;
  Epilogue out;
};

inline constexpr int kTileRows = 16, kTileColumns = 64;

// Tile rows (16 rows of W each) [begin, end) for all tokens.
using BitmapLinearKernel = void (*)(const BitmapLinearArgs& args, int64_t begin, int64_t end);

struct BitmapLinearTable {
  BitmapLinearKernel linear[kStoredCount];
};

extern const BitmapLinearTable kBitmapLinearSerial;
#if defined(__x86_64__)
extern const BitmapLinearTable kBitmapLinearAvx2;
extern const BitmapLinearTable kBitmapLinearAvx512;        // values expanded to the columns (vexpandps)
extern const BitmapLinearTable kBitmapLinearAvx512Vbmi2;   // the same, 16-bit and 8-bit values in their own width
extern const BitmapLinearTable kBitmapLinearAvx512Lookup;  // activations looked up for the values (VBMI2)
extern const BitmapLinearKernel kBitmapLinearAvx512Bf16;   // bfloat16 multiplied as it is; x rounded to it (BF16)
#endif

// The table for an ISA and a weight that stores this share of its elements.
const BitmapLinearTable& bitmap_linear_table(Isa isa, double density);

}  // namespace pyfast
