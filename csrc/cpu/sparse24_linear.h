// sparse24_linear: y = f(x Wᵀ + bias) with W in 2:4 form, for few tokens.
//
//   values   [n, k/2]   the two kept weights of each group of four columns, in column order
//   metadata [n, k/16]  a nibble a group: low two bits the first kept column, high two the second
//   x        [tokens, k] float32 (the caller widens and pads with zeros); y [tokens, n] as epilogue.h says
//
// k is a multiple of 32: the container pads. Sums run in float32, one partial sum a lane.
// Traffic is that of the weights, read once for every 4 tokens: k/2 values and k/8 bytes of metadata a row.
// At one token in float32 that is 17/32 of the dense bytes, so the ceiling is 1.88 times dense.
#pragma once

#include <cstdint>

#include "epilogue.h"
#include "isa.h"
#include "scalars.h"

namespace pyfast {

struct Sparse24LinearArgs {
  const float* x;
  const void* values;
  const uint16_t* metadata;
  int64_t tokens, k;
  int64_t x_stride;
  Epilogue out;
};

// Output columns (rows of W) [begin, end) for all tokens.
using Sparse24LinearKernel = void (*)(const Sparse24LinearArgs& args, int64_t begin, int64_t end);

struct Sparse24LinearTable {
  Sparse24LinearKernel linear[kStoredCount];
};

extern const Sparse24LinearTable kSparse24LinearSerial;
#if defined(__x86_64__)
extern const Sparse24LinearTable kSparse24LinearAvx2;
extern const Sparse24LinearTable kSparse24LinearAvx512;
#endif

const Sparse24LinearTable& sparse24_linear_table(Isa isa);

}  // namespace pyfast
