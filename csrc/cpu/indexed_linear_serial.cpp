// indexed_linear, portable. See indexed_linear_rows.h.
#include "vec_serial.h"
#include "indexed_linear_rows.h"

namespace pyfast {
namespace {

void single(const IndexedLinearArgs& a, int64_t panel, const float* x, float* sums) {
  indexed_single(a, panel, x, sums,
                 [](const float* w, const uint8_t* columns, int64_t count, int64_t, const float* xb) {
                   float sum[kIndexedUnit] = {};
                   for (int64_t i = 0; i < count; i += kIndexedUnit)
                     for (int c = 0; c < kIndexedUnit; ++c) sum[c] += w[i + c] * xb[columns[i + c]];
                   return (sum[0] + sum[1]) + (sum[2] + sum[3]);
                 });
}

}  // namespace

const IndexedLinearTable kIndexedLinearSerial = {
    {single, indexed_panel<8, 1>, indexed_panel<16, 1>, indexed_panel<32, 1>, indexed_panel<64, 1>},
};

}  // namespace pyfast
