// topk_distill for AVX-512 F/BW/DQ/VL: sixteen floats at a time. See topk_distill_rows.h for the algorithm.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")

#include "vec_avx512.h"
#include "topk_distill_rows.h"

namespace pyfast {

const TopkDistillTable kTopkDistillAvx512 = {{topk_distill<float>, topk_distill<bf16>, topk_distill<f16>}};

}  // namespace pyfast
#endif
