// epilogue, for AVX2 + FMA + F16C: eight floats at a time. See epilogue_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")

#include "vec_avx2.h"
#include "epilogue_rows.h"

namespace pyfast {

constinit const EpilogueTable kEpilogueAvx2 = make_epilogue_table();

}  // namespace pyfast
#endif
