// indexed_linear: y = f(x Wᵀ + bias) driven by the stored values.
//
// W is cut into panels of `panel` rows, a panel into blocks of `block` columns (at most 256). A row's part of a block
// is a list of values and columns:
//
//                 block 0        block 1                  the lists lie in the order of panel, block, row:
//              ┌────────────┬────────────┬ ···            a thread that walks a panel reads them as one stream
//     panel 0  │ row 0 list │ row 0 list │
//              │ row 1 list │ row 1 list │                values  float32 [entries]
//              │   ···      │   ···      │                columns uint8   [entries]   within the block
//              ├────────────┼────────────┼ ···            starts  int32   [panels · blocks · panel + 1], in fours
//     panel 1  │   ···      │   ···      │
//
// A list is padded with zeros in column 0 to a multiple of four entries. The layout is derived from a weight's
// container for this machine, kept in memory, and never saved: 5 bytes an entry.
//
// The tokens lie side by side in registers. For a tile of up to 64 tokens the activations are transposed once, and the
// part of a block, [block, tile] floats, stays in L1 or L2 while a panel's rows pass by:
//
//     one entry:   broadcast w, then one FMA a register of tokens with x[column], read from the cache
//
// Multiplications by zero are skipped, whatever the number of tokens: at density d the work is d times that of a dense
// product plus about a load and a broadcast an entry. Sums run in float32 in registers within a block and in a buffer
// of [panel, tile] floats between blocks.
//
// One token has nothing to lie side by side: there four entries do, whose activations are looked up in the part of the
// block, at most 1 KB.
#pragma once

#include <cstdint>

#include "epilogue.h"
#include "isa.h"

namespace pyfast {

struct IndexedLinearArgs {
  const float* values;
  const uint8_t* columns;
  const int32_t* starts;
  int64_t n, k;
  int64_t panel, block, blocks;
};

inline constexpr int kIndexedUnit = 4;  // entries a list is a multiple of

// Widths of a tile of tokens, in the order of the table.
inline constexpr int kTokenTiles[] = {1, 8, 16, 32, 64};
inline constexpr int kTokenTileCount = 5;

// Sums of all rows of one panel: sums [panel, tile] of x [blocks · block, tile].
using IndexedLinearKernel = void (*)(const IndexedLinearArgs& args, int64_t panel, const float* x, float* sums);

struct IndexedLinearTable {
  IndexedLinearKernel panel[kTokenTileCount];
};

extern const IndexedLinearTable kIndexedLinearSerial;
#if defined(__x86_64__)
extern const IndexedLinearTable kIndexedLinearAvx2;
extern const IndexedLinearTable kIndexedLinearAvx512;
#endif

const IndexedLinearTable& indexed_linear_table(Isa isa);

}  // namespace pyfast
