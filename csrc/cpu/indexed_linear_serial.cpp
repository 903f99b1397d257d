// indexed_linear, portable. See indexed_linear_rows.h.
#include "vec_serial.h"
#include "../inline.h"
#include "indexed_linear_rows.h"

namespace pyfast {
namespace {

PYFAST_INLINE float list_sum(const float* w, const uint8_t* columns, int64_t count, const float* x) {
  float sum[kIndexedUnit] = {};
  for (int64_t i = 0; i < count; i += kIndexedUnit)
    for (int c = 0; c < kIndexedUnit; ++c) sum[c] += w[i + c] * x[columns[i + c]];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace

const IndexedLinearTable kIndexedLinearSerial = {
    {indexed_single<list_sum>, indexed_panel<8, 1>, indexed_panel<16, 1>, indexed_panel<32, 1>, indexed_panel<64, 1>},
};

}  // namespace pyfast
