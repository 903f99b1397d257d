// epilogue, for AVX-512: sixteen floats at a time. See epilogue_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")

#include "vec_avx512.h"
#include "epilogue_rows.h"

namespace pyfast {

constinit const EpilogueTable kEpilogueAvx512 = make_epilogue_table();

}  // namespace pyfast
#endif
