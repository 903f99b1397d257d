// epilogue, portable: one float at a time. See epilogue_rows.h.

#include "vec_serial.h"
#include "epilogue_rows.h"

namespace pyfast {

constinit const EpilogueTable kEpilogueSerial = make_epilogue_table();

}  // namespace pyfast
