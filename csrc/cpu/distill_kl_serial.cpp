// distill_kl, portable: one float at a time. See distill_kl_rows.h for the algorithm.

#include "vec_serial.h"
#include "distill_kl_rows.h"

namespace pyfast {

constinit const DistillKlTable kDistillKlSerial = make_distill_kl_table();

}  // namespace pyfast
