// indexed_linear for AVX-512. One token has use for a quarter of a register and 8 tokens for half: there the AVX2
// variant serves. See indexed_linear_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "vec_avx512.h"
#include "indexed_linear_rows.h"

namespace pyfast {
namespace {

template <int tile>
void as_avx2(const IndexedLinearArgs& a, int64_t panel, const float* x, float* sums) {
  kIndexedLinearAvx2.panel[tile](a, panel, x, sums);
}

}  // namespace

const IndexedLinearTable kIndexedLinearAvx512 = {
    {as_avx2<0>, as_avx2<1>, indexed_panel<16, 4, 2>, indexed_panel<32, 4>, indexed_panel<64, 4>},
};

}  // namespace pyfast
#endif
