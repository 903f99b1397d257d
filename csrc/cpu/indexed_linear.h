// indexed_linear: y = f(x Wᵀ + bias) driven by the stored values.
//
// W is cut into panels of `panel` rows, a panel into blocks of `block` columns. Within a block the panel's rows are put
// in the order of what they store there, fullest first, and taken four by four: a quad. A step of a quad is one entry
// of each of its rows.
//
//   panel × block       row 2  ▪▪▪▪▪▪▪       quad 0   steps  ▪▪▪▪▪▪▪    values  float32 [steps, 4]
//   by length:          row 5  ▪▪▪▪▪▪▪                       ▪▪▪▪▪▪▪    columns uint8   [steps, 4]   within the block
//                       row 0  ▪▪▪▪▪▪                        ▪▪▪▪▪▪·    starts  int32   [quads + 1]  steps
//                       row 7  ▪▪▪▪▪▪                        ▪▪▪▪▪▪·    rows    uint8   [quads, 4]   within the panel
//                       row 1  ▪▪▪▪▪         quad 1   ···
//
// Quads lie in the order of panel, block, length: a thread that walks a panel reads values and columns as two streams.
// Neighbours are of about one length, so that hardly anything is filled up (· above), and the end of a quad is a
// branch that is guessed right: rows one after another, each with a length of its own, cost a wrong guess each, about
// as much as a short row's multiplications. The layout is derived from a weight's container for this machine, kept in
// memory, and never saved: 5 bytes an entry.
//
// Pairs: bfloat16 values, which processors with BF16 multiply two by two. A step of a quad is two entries of each of
// its rows then, values bfloat16 [steps, 4, 2] and columns uint8 [steps, 4, 2]: 3 bytes an entry.
//
// The tokens lie side by side in registers. For a tile of up to 64 tokens the activations are transposed once, and the
// part of a block, [block, tile] floats, stays in L1 or L2 while a panel's rows pass by:
//
//     one entry:   broadcast w, then one FMA a register of tokens with x[column], read from the cache
//     one pair:    broadcast both w, interleave the tokens of both columns, then one vdpbf16ps a register of tokens
//
// Multiplications by zero are skipped, whatever the number of tokens: at density d the work is d times that of a dense
// product plus about a load and a broadcast an entry. Sums run in float32 in registers within a block and in a buffer
// of [panel, tile] floats between blocks. The rows of a quad are independent sums: no FMA waits for the one before.
//
// One token has nothing to lie side by side: there the rows of a quad do, and a step's activations are looked up in the
// part of the block, at most 1 KB.
//
// What fills up a quad has the value +0.0 and the column `block`, one behind the last: the activations transposed have
// zeros there. So NaN and infinities reach the rows that store something in their column, and no others.
#pragma once

#include <cstdint>

#include "epilogue.h"
#include "isa.h"
#include "scalars.h"

namespace pyfast {

inline constexpr int kQuad = 4;             // rows
inline constexpr int64_t kMostPanel = 256;  // rows
inline constexpr int64_t kMostBlock = 192;  // columns: a multiple of 64 that leaves a number for what fills up

// Entries of a row that a step has. Value: float, or bf16 for pairs.
template <class Value>
inline constexpr int kEntriesOfStep = sizeof(Value) == sizeof(bf16) ? 2 : 1;

template <class Value>
struct IndexedLinearArgs {
  const Value* values;
  const uint8_t* columns;
  const int32_t* starts;
  const uint8_t* rows;
  int64_t panel, block, blocks;
};

// Sums of all rows of one panel: sums [panel, tile] of x [blocks · (block + 1), tile], whose tokens lie as pair_slot()
// says where they are bfloat16.
template <class Value>
using IndexedLinearKernel = void (*)(const IndexedLinearArgs<Value>& args, int64_t panel, const Value* x, float* sums);

// Widths of a tile of tokens, in the order of the table.
inline constexpr int kTokenTiles[] = {1, 8, 16, 32, 64};
inline constexpr int kTokenTileCount = 5;

struct IndexedLinearTable {
  IndexedLinearKernel<float> panel[kTokenTileCount];
};

extern const IndexedLinearTable kIndexedLinearSerial;
#if defined(__x86_64__)
extern const IndexedLinearTable kIndexedLinearAvx2;
extern const IndexedLinearTable kIndexedLinearAvx512;
#endif

const IndexedLinearTable& indexed_linear_table(Isa isa);

}  // namespace pyfast
