// transpose, for AVX2: squares of 8 by 8. See transpose_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "vec_avx2.h"
#include "transpose_rows.h"

namespace pyfast {

constinit const TransposeTable kTransposeAvx2 = make_transpose_table();

}  // namespace pyfast
#endif
