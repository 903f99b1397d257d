// transpose, for AVX-512: squares of 16 by 16. See transpose_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")

#include "vec_avx512.h"
#include "transpose_rows.h"

namespace pyfast {

constinit const TransposeTable kTransposeAvx512 = make_transpose_table();

}  // namespace pyfast
#endif
