// distill_kl, portable: one float at a time. See distill_kl_rows.h for the algorithm.

#include "vec_serial.h"
#include "distill_kl_rows.h"

namespace pyfast {

const DistillKlTable kDistillKlSerial = {
    {forward_kl<float>, forward_kl<bf16>, forward_kl<f16>},
    {scale_rows<float>, scale_rows<bf16>, scale_rows<f16>},
};

}  // namespace pyfast
