// transpose, portable: one float at a time. See transpose_rows.h.

#include "vec_serial.h"
#include "transpose_rows.h"

namespace pyfast {

constinit const TransposeTable kTransposeSerial = make_transpose_table();

}  // namespace pyfast
