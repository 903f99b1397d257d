// indexed_linear, portable. See indexed_linear_rows.h.
#include "vec_serial.h"
#include "../inline.h"
#include "indexed_linear_rows.h"

namespace pyfast {
namespace {

PYFAST_INLINE void sum_steps(const float* w, const uint8_t* columns, int64_t steps, const float* x, float* sum) {
  for (int i = 0; i < kQuad; ++i) sum[i] = 0.0f;
  for (int64_t e = 0; e < kQuad * steps; e += kQuad)
    for (int i = 0; i < kQuad; ++i) sum[i] += w[e + i] * x[columns[e + i]];
}

}  // namespace

const IndexedLinearTable kIndexedLinearSerial = {
    {indexed_single<sum_steps>, indexed_panel<8, 1>, indexed_panel<16, 1>, indexed_panel<32, 1>, indexed_panel<64, 1>},
};

}  // namespace pyfast
