// topk_distill for AVX2 + FMA + F16C: eight floats at a time. See topk_distill_rows.h for the algorithm.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")

#include "vec_avx2.h"
#include "topk_distill_rows.h"

namespace pyfast {

const TopkDistillTable kTopkDistillAvx2 = {{topk_distill<float>, topk_distill<bf16>, topk_distill<f16>}};

}  // namespace pyfast
#endif
