// distill_kl for AVX-512 F/BW/DQ/VL: sixteen floats at a time. See distill_kl_rows.h for the algorithm.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")

#include "vec_avx512.h"
#include "distill_kl_rows.h"

namespace pyfast {

constinit const DistillKlTable kDistillKlAvx512 = make_distill_kl_table();

}  // namespace pyfast
#endif
