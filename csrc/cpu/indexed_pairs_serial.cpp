// indexed_linear of pairs, portable: for a layout that meets an ISA without instructions for them. See indexed_pairs.h.
#include "vec_serial.h"
#include "../inline.h"
#include "indexed_linear_rows.h"
#include "indexed_pairs.h"

namespace pyfast {
namespace {

template <int tile>
void pairs_panel(const IndexedLinearArgs<bf16>& a, int64_t panel, const bf16* x, float* sums) {
  constexpr int lanes = tile < kMostPairLanes ? tile : kMostPairLanes;
  for (int64_t i = 0; i < a.panel * tile; ++i) sums[i] = 0.0f;
  for (int64_t block = 0; block < a.blocks; ++block) {
    const Quads quads(a, panel, block);
    const bf16* xb = x + block * (a.block + 1) * tile;
    for (int64_t row = 0; row < a.panel; ++row) {
      float* sum = sums + int64_t{quads.rows[row]} * tile;
      for (int64_t step = quads.starts[row / kQuad]; step < quads.starts[row / kQuad + 1]; ++step) {
        for (int64_t e = 2 * (kQuad * step + row % kQuad), end = e + 2; e < end; ++e) {
          const bf16* at = xb + int64_t{a.columns[e]} * tile;
          for (int t = 0; t < tile; ++t) {
            const int slot = lanes == 1 ? 0 : t / lanes * lanes + pair_slot(t % lanes, lanes);
            sum[t] += widen(a.values[e]) * widen(at[slot]);
          }
        }
      }
    }
  }
}

void pack(const float* in, int64_t columns, int lanes, bf16* out, int64_t stride) {
  for (int64_t c = 0; c < columns; ++c)
    for (int t = 0; t < lanes; ++t) narrow(in[c * lanes + t], out + c * stride + pair_slot(t, lanes));
}

}  // namespace

const IndexedPairsTable kIndexedPairsSerial = {{pairs_panel<1>, pairs_panel<16>, pairs_panel<32>, pairs_panel<64>},
                                               pack};

}  // namespace pyfast
