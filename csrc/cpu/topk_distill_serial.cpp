// topk_distill, portable: one float at a time. See topk_distill_rows.h for the algorithm.

#include "vec_serial.h"
#include "topk_distill_rows.h"

namespace pyfast {

const TopkDistillTable kTopkDistillSerial = {{topk_distill<float>, topk_distill<bf16>, topk_distill<f16>}};

}  // namespace pyfast
