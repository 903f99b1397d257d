// indexed_linear for AVX2. See indexed_linear_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "vec_avx2.h"
#include "indexed_linear_rows.h"

namespace pyfast {

const IndexedLinearTable kIndexedLinearAvx2 = {
    {indexed_panel<8, 4>, indexed_panel<16, 4>, indexed_panel<32, 2>, indexed_panel<64, 1>},
};

}  // namespace pyfast
#endif
