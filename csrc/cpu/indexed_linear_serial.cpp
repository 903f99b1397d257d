// indexed_linear, portable. See indexed_linear_rows.h.
#include "vec_serial.h"
#include "indexed_linear_rows.h"

namespace pyfast {

const IndexedLinearTable kIndexedLinearSerial = {
    {indexed_panel<8, 1>, indexed_panel<16, 1>, indexed_panel<32, 1>, indexed_panel<64, 1>},
};

}  // namespace pyfast
