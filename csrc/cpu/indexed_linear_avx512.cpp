// indexed_linear for AVX-512. 8 tokens are half a register: there the AVX2 variant serves. See indexed_linear_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "vec_avx512.h"
#include "indexed_linear_rows.h"

namespace pyfast {
namespace {

void eight(const IndexedLinearArgs& a, int64_t panel, const float* x, float* sums) {
  kIndexedLinearAvx2.panel[0](a, panel, x, sums);
}

}  // namespace

const IndexedLinearTable kIndexedLinearAvx512 = {
    {eight, indexed_panel<16, 4>, indexed_panel<32, 4>, indexed_panel<64, 2>},
};

}  // namespace pyfast
#endif
