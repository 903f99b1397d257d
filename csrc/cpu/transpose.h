// transpose: a small matrix turned over, on its way widened to float32. For activations and outputs of kernels that
// take the tokens side by side.
#pragma once

#include <cstdint>

#include "isa.h"
#include "scalars.h"

namespace pyfast {

// out [columns, wide] = inᵀ of in [rows, columns], zeros in the lanes [rows, wide); 0 < rows <= wide.
using TransposeKernel = void (*)(const void* in, int64_t in_stride, int64_t rows, int64_t columns, float* out,
                                 int64_t out_stride, int64_t wide);

struct TransposeTable {
  TransposeKernel of[kDtypeCount];  // the dtype of in
};

extern const TransposeTable kTransposeSerial;
#if defined(__x86_64__)
extern const TransposeTable kTransposeAvx2;
extern const TransposeTable kTransposeAvx512;
#endif

const TransposeTable& transpose_table(Isa isa);

}  // namespace pyfast
