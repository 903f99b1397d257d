// x · weightᵀ + bias by one of the libraries that torch brings along: what the sparse ops call for many tokens.
//
// aten::linear multiplies float32 by MKL, which has AVX-512 for Intel's processors alone: on others with AVX-512 oneDNN
// takes a third to a half of the time (docs/kernels.md). pyfast/_products.py chooses, for this file too.
#pragma once

#include "torch_glue.h"

namespace pyfast {

// Products of float32 by oneDNN from now on, in the whole process, or by whatever aten::linear takes.
void multiply_by_onednn(bool chosen);

// x [tokens, k], weight [n, k], bias [n] to [tokens, n], all of one dtype.
Tensor dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

}  // namespace pyfast
