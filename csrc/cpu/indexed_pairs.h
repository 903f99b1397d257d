// The kernels of indexed_linear for pairs of bfloat16 entries; the layout is drawn in indexed_linear.h.
#pragma once

#include "indexed_linear.h"

namespace pyfast {

// Widths of a tile of tokens, in the order of the table. Fewer than 16 tokens would save nothing: what a pair takes
// beside its products is most of it.
inline constexpr int kPairTiles[] = {1, 16, 32, 64};
inline constexpr int kPairTileCount = 4;
inline constexpr int kMostPairLanes = 32;  // bfloat16 of a register

// Where token t lies in a register of 16 or 32 tokens: such that interleaving the low halves of each 128 bits of two
// registers gives the pairs of the first half of the tokens, and the high halves those of the second.
//
//     of 16:  0 1 2 3  8  9 10 11 │ 4 5 6 7 12 13 14 15
//     of 32:  0 1 2 3 16 17 18 19 │ 4 5 6 7 20 21 22 23 │ 8 9 10 11 24 25 26 27 │ 12 13 14 15 28 29 30 31
constexpr int pair_slot(int t, int lanes) { return t % (lanes / 2) / 4 * 8 + t / (lanes / 2) * 4 + t % 4; }

struct IndexedPairsTable {
  IndexedLinearKernel<bf16> panel[kPairTileCount];
  // in [columns, lanes] float32 that came from bfloat16, to their slots in the first lanes of out [columns, stride].
  void (*pack)(const float* in, int64_t columns, int lanes, bf16* out, int64_t stride);
};

extern const IndexedPairsTable kIndexedPairsSerial;
#if defined(__x86_64__)
extern const IndexedPairsTable kIndexedPairsAvx512Bf16;
#endif

// The portable one where the ISA has no instructions for pairs: layouts of pairs are not made there.
const IndexedPairsTable& indexed_pairs_table(Isa isa);

}  // namespace pyfast
