// distill_kl for AVX2 + FMA + F16C: eight floats at a time. See distill_kl_rows.h for the algorithm.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")

#include "vec_avx2.h"
#include "distill_kl_rows.h"

namespace pyfast {

constinit const DistillKlTable kDistillKlAvx2 = make_distill_kl_table();

}  // namespace pyfast
#endif
